//! Device operations of the reactor on a real file, driven by an engine that plays a list of effects.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use datapath::engine::ports::ConnectionId;
use datapath::engine::ports::{DeviceError, DeviceIndex, Effect, Engine, Event, Memory, Token};
use datapath::reactor::features::{Feature, Features};
use datapath::reactor::mailbox::{Message, mailbox};
use datapath::reactor::pool_file::PoolFile;
use datapath::reactor::{Arena, ArenaLayout, Reactor, ReactorConfig};
use datapath::units::{MemoryRange, Moment};

const MASKS: [&str; 5] = ["", "6.1", "5.15", "registered-buffers", "5.15,registered-files"];
const DEVICE: DeviceIndex = DeviceIndex(0);

/// Plays rounds of effects: a round begins when the one before has ended in full.
struct Player {
    arena: Arena,
    rounds: VecDeque<Vec<Effect>>,
    effects: VecDeque<Effect>,
    under_way: usize,
    results: Vec<(Token, Result<(), DeviceError>)>,
}

impl Player {
    fn new(engine_bytes: u32) -> Player {
        let layout = ArenaLayout { receive_buffers: 1, receive_buffer_bytes: 4096, engine_bytes };
        Player {
            arena: Arena::new(layout).expect("memory"),
            rounds: VecDeque::new(),
            effects: VecDeque::new(),
            under_way: 0,
            results: Vec::new(),
        }
    }

    fn range(&self, offset: u32, len: u32) -> MemoryRange {
        self.arena.engine_range().part(offset, len)
    }
}

impl Engine for Player {
    type Memory = Arena;
    type Report = ();

    fn handle_event(&mut self, _now: Moment, event: Event) {
        if let Event::DeviceDone { token, result } = event {
            self.under_way -= 1;
            self.results.push((token, result));
        }
    }

    fn finish_turn(&mut self, _now: Moment) {
        if self.under_way == 0 && self.effects.is_empty() {
            self.effects.extend(self.rounds.pop_front().unwrap_or_default());
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        let effect = self.effects.pop_front();
        self.under_way += usize::from(effect.is_some());
        effect
    }

    fn poll_timeout(&self) -> Option<Moment> {
        None
    }

    fn memory(&mut self) -> &mut Arena {
        &mut self.arena
    }

    fn send_pieces(&self, _connection: ConnectionId) -> &[MemoryRange] {
        unreachable!("no connections")
    }

    fn report(&self) {}

    fn is_open(&self) -> bool {
        true
    }

    fn is_drained(&self) -> bool {
        self.under_way == 0 && self.effects.is_empty() && self.rounds.is_empty()
    }
}

fn pool(name: &str, length_bytes: u64) -> PoolFile {
    let directory =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("devices-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a scratch directory");
    let path = directory.join(name);
    if path.exists() {
        std::fs::remove_file(&path).expect("an old file goes");
    }
    PoolFile::create(&path, length_bytes).expect("a pool")
}

/// Plays everything, then ends.
fn play(player: Player, config: ReactorConfig) -> Player {
    let (mailbox, inbox) = mailbox().expect("an eventfd");
    mailbox.post(Message::Drain).expect("room");
    let reactor = Reactor::new(player, config, inbox).expect("a ring");
    std::thread::spawn(move || reactor.run()).join().expect("no panic").expect("an orderly end")
}

fn config(file: Arc<std::fs::File>, mask: &str) -> ReactorConfig {
    ReactorConfig {
        devices: vec![file],
        features: Features::allowed_by(mask).expect("a mask"),
        ..ReactorConfig::default()
    }
}

#[test]
fn what_is_written_and_synced_is_read_back() {
    for (mask, index) in MASKS.into_iter().zip(0_u32..) {
        let pool = pool(&format!("rw-{index}"), 4 << 20);
        let mut player = Player::new(4 << 20);
        let (source, target) = (player.range(0, 2 << 20), player.range(2 << 20, 2 << 20));
        for (place, byte) in player.arena.bytes_mut(source).iter_mut().zip(0_u32..) {
            *place = (byte ^ (byte >> 8) ^ index).to_le_bytes()[0];
        }
        let write = |token: u32, durable: bool| Effect::DeviceWrite {
            token: Token(token),
            device: DEVICE,
            offset_bytes: u64::from(token) * (1 << 20) + 4096,
            memory: source.part(token * (1 << 20), 1 << 20),
            durable,
        };
        let read = |token: u32| Effect::DeviceRead {
            token: Token(10 + token),
            device: DEVICE,
            offset_bytes: u64::from(token) * (1 << 20) + 4096,
            memory: target.part(token * (1 << 20), 1 << 20),
        };
        player.rounds.push_back(vec![write(0, false), write(1, true)]);
        player.rounds.push_back(vec![Effect::DeviceSync { token: Token(2), device: DEVICE }]);
        player.rounds.push_back(vec![read(0), read(1)]);
        let player = play(player, config(pool.file(), mask));
        assert_eq!(player.results.len(), 5);
        assert!(player.results.iter().all(|(_, result)| result.is_ok()), "{mask:?}: {:?}", player.results);
        assert!(player.arena.bytes(source) == player.arena.bytes(target), "mask {mask:?}");
        let mut outside = vec![0; 2 << 20];
        pool.read_at(4096, &mut outside).expect("read past the ring");
        assert!(player.arena.bytes(source) == outside, "mask {mask:?}");
    }
}

#[test]
fn more_than_the_queues_hold_is_done_all_the_same() {
    for mask in MASKS {
        let pool = pool("many", 4 << 20);
        let mut player = Player::new(4 << 20);
        let memory = player.range(0, 4 << 20);
        player.rounds.push_back(
            (0..1000)
                .map(|token| Effect::DeviceWrite {
                    token: Token(token),
                    device: DEVICE,
                    offset_bytes: u64::from(token) * 4096,
                    memory: memory.part(token * 4096, 4096),
                    durable: false,
                })
                .collect(),
        );
        // Fewer submissions than operations at a time, and fewer of those than there is to do.
        let config =
            ReactorConfig { submissions_max: 8, device_operations_max: 32, ..config(pool.file(), mask) };
        let mut player = play(player, config);
        player.results.sort_by_key(|(token, _)| *token);
        let tokens: Vec<u32> = player.results.iter().map(|(token, _)| token.0).collect();
        assert_eq!(tokens, (0..1000).collect::<Vec<_>>(), "each exactly once, mask {mask:?}");
        assert!(player.results.iter().all(|(_, result)| result.is_ok()));
    }
}

#[test]
fn a_short_or_refused_transfer_is_a_failure() {
    let pool = pool("short", 24 << 10);
    for mask in MASKS {
        let mut player = Player::new(64 << 10);
        let memory = player.range(0, 32 << 10);
        player.rounds.push_back(vec![
            // Two blocks more than there are: six arrive, then the end.
            Effect::DeviceRead { token: Token(0), device: DEVICE, offset_bytes: 0, memory },
            Effect::DeviceRead { token: Token(1), device: DEVICE, offset_bytes: 1 << 30, memory },
        ]);
        let player = play(player, config(pool.file(), mask));
        let failures = player.results.iter().filter(|(_, result)| result.is_err()).count();
        assert_eq!(failures, 2, "mask {mask:?}: {:?}", player.results);

        let read_only = Arc::new(std::fs::File::open(pool.path()).expect("readable"));
        let mut player = Player::new(64 << 10);
        let memory = player.range(0, 4096);
        let write =
            Effect::DeviceWrite { token: Token(7), device: DEVICE, offset_bytes: 0, memory, durable: true };
        player.rounds.push_back(vec![write]);
        let player = play(player, config(read_only, mask));
        assert_eq!(player.results, [(Token(7), Err(DeviceError::Failed))], "mask {mask:?}");
    }
}

#[test]
fn masks_hide_what_the_kernel_has() {
    let features = |mask: &str| {
        let (_mailbox, inbox) = mailbox().expect("an eventfd");
        let config = ReactorConfig {
            features: Features::allowed_by(mask).expect("a mask"),
            ..ReactorConfig::default()
        };
        Reactor::new(Player::new(4096), config, inbox).expect("a ring").features()
    };
    assert!(!features("registered-buffers").has(Feature::RegisteredBuffers));
    for hidden in [Feature::DeferTaskrun, Feature::BufferRing, Feature::MultishotAccept, Feature::SubmitAll] {
        assert!(!features("5.15").has(hidden), "{}", hidden.name());
    }
}
