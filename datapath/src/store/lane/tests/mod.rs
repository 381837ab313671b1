//! A lane alone with a disk: what the simulator does not ask of it, because only replicas will.

mod changed;
mod check;
mod disk;
mod fetch;
mod fill;
mod order;
mod promise;
mod removal;
mod repair;
mod room;
mod rot;
mod space;

use super::{AckPolicy, BlockRange, Context, FetchOutcome, Lane, LaneConfig, Payload, PoolShare};
use crate::limits::PIECE_BYTES_MAX;
use crate::memory::{Memory, Pages};
use crate::record::{ChangeKind, Stamp};
use crate::request::RequestError;
use crate::store::bugs::Bugs;
use crate::store::check::check_lane;
use crate::store::checkpoint_body::VolumeRecord;
use crate::store::format::format_writes;
use crate::store::layout::Layout;
use crate::store::recovery::recover_lane;
use crate::store::segment::SegmentState;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use disk::{Disk, Random, TestMemory};
use std::collections::{BTreeMap, VecDeque};

const PAGES_BYTES: u32 = 24 << 20;
const LENT_BYTES: u32 = 8 << 20;
/// Blocks of the volume that tests use.
const VOLUME_BLOCKS: u64 = 8 * 512;

/// A change, without its payload: the stamp and the block give that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Made {
    stamp: Stamp,
    kind: ChangeKind,
    block: u32,
    count: u32,
}

impl Made {
    fn content(&self, block: u32) -> [u8; BLOCK_BYTES_USIZE] {
        let word = self.stamp.sequence << 32 | u64::from(self.stamp.epoch) << 24 | u64::from(block);
        let mut bytes = [0; BLOCK_BYTES_USIZE];
        bytes.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&word.to_le_bytes()));
        bytes
    }
}

struct World {
    layout: Layout,
    config: LaneConfig,
    disk: Disk,
    memory: TestMemory,
    pages: Pages,
    lane: Lane,
    random: Random,
    /// Answers, in the order in which they came.
    answers: Vec<(u32, Result<(), RequestError>)>,
    fetched: VecDeque<(u32, FetchOutcome)>,
    /// Where the next lent payload is put, so that none is put over another soon.
    lent_at: u32,
    /// All changes of the order, the one with sequence n at n - 1.
    made: Vec<Made>,
    epoch: u32,
    /// What is answered counts as committed.
    commits: bool,
}

impl World {
    fn new(ack: AckPolicy, segments: u32, seed: u64) -> World {
        World::with_map_cache(ack, segments, seed, 1 << 20)
    }

    fn with_map_cache(ack: AckPolicy, segments: u32, seed: u64, map_cache_bytes: u64) -> World {
        let segment_blocks = 256;
        let pool_bytes = u64::from(segments) * u64::from(segment_blocks * BLOCK_BYTES);
        let layout = Layout::with_segment_blocks([7; 16], pool_bytes, 1, segment_blocks).unwrap();
        let mut disk = Disk::new(usize::try_from(pool_bytes).unwrap());
        format_writes(&layout).iter().for_each(|write| disk.put(write.place, &write.block[..]));
        let config = LaneConfig { lane: 0, layout, ack, checkpoint_log_bytes: 4 << 20, bugs: Bugs::none() };
        let mut pages = Pages::new(MemoryRange { start: 0, len: PAGES_BYTES });
        let recovered = recover_lane(&mut disk, layout, 0, map_cache_bytes, Bugs::none()).unwrap();
        let mut world = World {
            layout,
            config,
            lane: Lane::new(config, recovered, &mut pages),
            disk,
            memory: TestMemory(vec![0; (PAGES_BYTES + LENT_BYTES) as usize]),
            pages,
            random: Random(seed),
            answers: Vec::new(),
            fetched: VecDeque::new(),
            lent_at: PAGES_BYTES,
            made: Vec::new(),
            epoch: 1,
            commits: true,
        };
        world.put_volume(5);
        world.run();
        assert!(world.lane.is_lasting(0));
        world
    }

    fn put_volume(&mut self, number: u32) {
        self.lane.put_volume(VolumeRecord {
            number,
            epoch: 0,
            size_blocks: VOLUME_BLOCKS,
            sequence: 0,
            identity: [1; 16],
            replicated: true,
            name: format!("volume {number}"),
            ..VolumeRecord::default()
        });
    }

    /// A new process takes over what the disk has, and is open when this returns.
    fn restart(&mut self) {
        self.pages = Pages::new(MemoryRange { start: 0, len: PAGES_BYTES });
        let recovered = recover_lane(&mut self.disk, self.layout, 0, 1 << 20, Bugs::none()).unwrap();
        self.lane = Lane::new(self.config, recovered, &mut self.pages);
        self.answers.clear();
        self.fetched.clear();
        while !self.lane.is_open() {
            assert!(self.step(), "the first checkpoint needs nobody's help");
        }
    }

    fn lose_power(&mut self) {
        self.disk.lose_power(&mut self.random);
        self.restart();
    }

    fn with_lane<R>(&mut self, work: impl FnOnce(&mut Lane, &mut Context<'_, TestMemory>) -> R) -> R {
        let mut context = Context { memory: &mut self.memory, pages: &mut self.pages };
        work(&mut self.lane, &mut context)
    }

    /// One turn and the end of one operation. False if nothing is left to do that is not held back.
    fn step(&mut self) -> bool {
        let foreign: Vec<_> = self.lane.segments().indices().collect();
        let is_free = |lane: &Lane, segment| {
            lane.segments().state(segment) == SegmentState::Foreign && !self.layout.is_anchor(segment)
        };
        for segment in foreign {
            if self.lane.segments_wanted() > 0 && is_free(&self.lane, segment) {
                self.lane.lend(segment, false);
            }
        }
        let free = self.lane.segments().indices().filter(|segment| is_free(&self.lane, *segment)).count();
        self.lane.set_pool_share(PoolShare {
            segments: self.lane.segments().pool_count() - 4,
            free: u32::try_from(free).unwrap(),
            ..PoolShare::default()
        });
        if self.commits {
            self.lane.note_committed(0, self.answered());
        }
        self.with_lane(Lane::upkeep);
        let mut moved = self.lane.wants_turn();
        while let Some(effect) = self.lane.poll_effect() {
            self.disk.submit(&self.memory, effect);
            moved = true;
        }
        if let Some(token) = self.disk.complete_one(&mut self.memory, &mut self.random) {
            self.with_lane(|lane, context| lane.handle_disk(context, token, true));
            moved = true;
        }
        while let Some(completion) = self.lane.poll_completion() {
            self.answers.push((completion.cookie, completion.result));
        }
        while let Some(fetched) = self.lane.poll_fetched() {
            self.fetched.push_back((fetched.cookie, fetched.outcome));
        }
        moved
    }

    fn run(&mut self) {
        while self.step() {}
    }

    /// The change that comes next in the order; its cookie is its sequence.
    fn append(&mut self, kind: ChangeKind, block: u32, count: u32, lent: bool) {
        let last = self.lane.last_stamp(0).sequence;
        self.made.truncate(usize::try_from(last).unwrap());
        let stamp = Stamp { epoch: self.epoch, sequence: last + 1 };
        self.made.push(Made { stamp, kind, block, count });
        self.append_made(last + 1, lent);
    }

    fn append_made(&mut self, sequence: u64, lent: bool) {
        let made = self.made[usize::try_from(sequence - 1).unwrap()];
        let whole_bytes = (1 + made.count) * BLOCK_BYTES;
        let payload = (made.kind == ChangeKind::Data).then(|| {
            let whole = if lent {
                if self.lent_at + whole_bytes > PAGES_BYTES + LENT_BYTES {
                    self.lent_at = PAGES_BYTES;
                }
                MemoryRange { start: self.lent_at, len: whole_bytes }
            } else {
                self.pages.allocate(1 + made.count).expect("pages for a payload")
            };
            for index in 0..made.count {
                let block = self.memory.bytes_mut(whole.part((1 + index) * BLOCK_BYTES, BLOCK_BYTES));
                block.copy_from_slice(&made.content(made.block + index));
            }
            if lent {
                self.lent_at = whole.end();
                Payload::Lent(whole)
            } else {
                Payload::Owned(super::OwnedPayload { whole })
            }
        });
        let cookie = u32::try_from(sequence).unwrap();
        let range = BlockRange { volume: 0, block: made.block, count: made.count };
        self.with_lane(|lane, context| {
            lane.append(context, cookie, made.kind, range, payload, made.stamp);
        });
    }

    /// A change of any kind and size, anywhere in the first `blocks` of the volume.
    fn append_any(&mut self, blocks: u32) {
        let (kind, longest) = match self.random.below(8) {
            0 => (ChangeKind::Zero, 300),
            1 => (ChangeKind::Trim, 40),
            2 => (ChangeKind::Data, 256),
            3 | 4 => (ChangeKind::Data, 24),
            _ => (ChangeKind::Data, 3),
        };
        let count = 1 + self.random.below(longest);
        let block = self.random.below(blocks - count);
        let lent = self.random.below(2) == 0;
        self.append(kind, block, count, lent);
    }

    /// How many changes were answered well. They are answered in order.
    fn answered(&self) -> u64 {
        let good = self.answers.iter().filter(|(_, result)| result.is_ok());
        good.map(|(cookie, _)| u64::from(*cookie)).max().unwrap_or(0)
    }

    /// The volume holds what the changes up to its last one make, no more and no less, and the pool is sound.
    fn check(&mut self) {
        let last = usize::try_from(self.lane.volumes()[0].record.sequence).unwrap();
        let mut newest: BTreeMap<u32, Made> = BTreeMap::new();
        for made in &self.made[..last] {
            newest.extend((made.block..made.block + made.count).map(|block| (block, *made)));
        }
        let mut recovered = recover_lane(&mut self.disk, self.layout, 0, 1 << 20, Bugs::none()).unwrap();
        if let Some(made) = self.made[..last].last() {
            assert_eq!(recovered.volumes[0].stamp(), made.stamp);
        }
        let mut found: BTreeMap<u32, u64> = BTreeMap::new();
        recovered
            .visit_blocks(&mut self.disk, 0, |block, mapping| {
                found.insert(block, mapping.place.offset_bytes());
            })
            .unwrap();
        newest.retain(|_, made| made.kind == ChangeKind::Data);
        assert!(found.keys().eq(newest.keys()), "other blocks hold data than should");
        for (block, offset) in found {
            let at = usize::try_from(offset).unwrap();
            let bytes = &self.disk.seen[at..at + BLOCK_BYTES_USIZE];
            assert!(bytes == newest[&block].content(block), "block {block} is not of {:?}", newest[&block]);
        }
        let report = check_lane(&mut self.disk, &self.layout, &mut recovered);
        assert!(report.is_clean(), "{report:?}");
    }

    /// Fetches a change, and checks what was found. False if it is gone.
    fn fetch(&mut self, sequence: u64) -> bool {
        let memory = MemoryRange { start: PAGES_BYTES, len: PIECE_BYTES_MAX };
        self.with_lane(|lane, context| lane.fetch(context, 9, 0, sequence, memory));
        while self.fetched.is_empty() {
            assert!(self.step() || !self.fetched.is_empty(), "a fetch ends");
        }
        let (cookie, outcome) = self.fetched.pop_front().unwrap();
        assert_eq!(cookie, 9);
        let FetchOutcome::Found { stamp, kind, block, count } = outcome else {
            assert_eq!(outcome, FetchOutcome::Gone);
            return false;
        };
        let made = self.made[usize::try_from(sequence - 1).unwrap()];
        assert_eq!(Made { stamp, kind, block, count }, made);
        for index in 0..if kind == ChangeKind::Data { count } else { 0 } {
            let bytes = self.memory.bytes(memory.part(index * BLOCK_BYTES, BLOCK_BYTES));
            assert!(bytes == made.content(block + index), "block {index} of {made:?}");
        }
        true
    }
}
