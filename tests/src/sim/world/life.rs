//! One life of an engine: clients come, ask, check and go until something ends it.

use datapath::engine::ports::ConnectionId;
use datapath::units::Moment;

use super::{Subject, World};
use crate::sim::client::{Client, ClientCounts, ClientPlan, Tolerance};
use crate::sim::disk::Disk;
use crate::sim::doubts::{Came, Doubts};
use crate::sim::driver::{Driver, Notice, Plan};
use crate::sim::oracle::Oracle;
use crate::sim::random::Random;
use crate::sim::subject::{MemoryPlan, StableReader};
use crate::sim::trace;
use crate::sim::workload::{Ask, AskKind, Workload};

/// A request that takes longer is lost. Stalls of the disk are 2 s, and several may meet in one request.
const ANSWER_NS_MAX: u64 = 60_000_000_000;
/// A life does not take longer than that, whatever its trigger waits for.
const ANSWERS_MAX: u64 = 1_500;
const WATCH_NS: u64 = 500_000_000;
/// More happenings between two watches mean that the engine runs in circles.
const HAPPENINGS_PER_WATCH_MAX: u64 = 5_000_000;
/// Bytes that a verifying client reads at once.
const VERIFY_BYTES: u64 = 256 << 10;
const VERIFY_DEPTH: usize = 3;

/// How a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Killed,
    PowerCut,
    Drained,
}

/// What brings the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trigger {
    /// This many device writes, the first ones of which are those of recovery.
    DeviceWrites(u64),
    /// This many answers to working clients.
    Answers(u64),
    /// This much time.
    Nanoseconds(u64),
}

/// When and how a life is to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ending {
    trigger: Trigger,
    outcome: Outcome,
    last: bool,
}

impl Ending {
    pub(super) fn draw(random: &mut Random) -> Ending {
        let trigger = match random.below(10) {
            0 => Trigger::DeviceWrites(random.range(0..=6)),
            1 => Trigger::DeviceWrites(random.skewed(1..=300)),
            2 => Trigger::Nanoseconds(random.skewed(1..=20_000_000)),
            _ => Trigger::Answers(random.range(20..=700)),
        };
        let outcome =
            *random.pick(&[Outcome::Killed, Outcome::PowerCut, Outcome::PowerCut, Outcome::Drained]);
        Ending { trigger, outcome, last: false }
    }

    /// An end so early that the engine has hardly more than started.
    pub(super) fn draw_early(random: &mut Random) -> Ending {
        let trigger = match random.below(3) {
            0 => Trigger::DeviceWrites(random.range(0..=12)),
            1 => Trigger::DeviceWrites(random.skewed(1..=200)),
            _ => Trigger::Answers(random.range(1..=60)),
        };
        let outcome = *random.pick(&[Outcome::Killed, Outcome::PowerCut]);
        Ending { trigger, outcome, last: false }
    }

    pub(super) fn last() -> Ending {
        Ending { trigger: Trigger::Answers(100), outcome: Outcome::Drained, last: true }
    }
}

/// What the life is at. Only the last one finishes in peace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Clients read back everything; others may work already.
    Verifying,
    Working,
    /// Clients send nothing new and wait for their answers.
    Finishing,
    /// As in the beginning, before an orderly stop.
    VerifyingAgain,
    Draining,
}

enum Role {
    Worker(Box<Workload>),
    /// Reads the volume from this byte on.
    Verifier(u64),
    /// A verifier that has read everything. Its place stays, so that the others keep their numbers.
    Retired,
}

struct Session {
    role: Role,
    volume: usize,
    client: Option<(Client, ConnectionId)>,
    connected_at: Moment,
    came: Came,
    /// It stopped reading for a while, so the server may lose patience.
    was_paused: bool,
    think_planned: bool,
}

pub(super) struct Life<'w, 'a, S: Subject> {
    world: &'w mut World<'a, S>,
    driver: Driver<S::Engine>,
    sessions: Vec<Session>,
    /// By volume.
    doubts: Vec<Doubts>,
    ending: Ending,
    stage: Stage,
    /// Workers wait until everything was read back.
    verify_first: bool,
    /// Answers to workers.
    answers: u64,
    errors_at_start: u64,
    rotten: bool,
    disk_failed: bool,
    drain_began: Moment,
    happenings_seen: u64,
    next_client: u64,
    random: Random,
}

impl<'w, 'a, S: Subject> Life<'w, 'a, S> {
    pub(super) fn new(
        engines: Vec<S::Engine>,
        disk: Disk,
        now: Moment,
        plan: &MemoryPlan,
        world: &'w mut World<'a, S>,
        ending: Ending,
        mut random: Random,
    ) -> Life<'w, 'a, S> {
        let (errors_at_start, rotten) = (disk.counts.errors, disk.is_rotten());
        let driver = Driver::new(engines, disk, now, plan, random.fork("driver", 0));
        let doubts = world.setup.volumes.iter().map(|_| Doubts::default()).collect();
        Life {
            driver,
            sessions: Vec::new(),
            doubts,
            ending,
            stage: Stage::Verifying,
            verify_first: random.percent(50),
            answers: 0,
            errors_at_start,
            rotten,
            disk_failed: false,
            drain_began: now,
            happenings_seen: 0,
            next_client: world.report.lives * 1_000,
            world,
            random,
        }
    }

    pub(super) fn run(mut self) -> (Outcome, Driver<S::Engine>) {
        self.driver.plan(WATCH_NS, Plan::Watch);
        if let Trigger::Nanoseconds(nanoseconds) = self.ending.trigger {
            self.driver.plan(nanoseconds, Plan::End);
        }
        self.add_verifiers();
        if !self.verify_first {
            self.add_workers();
        }
        let outcome = loop {
            if let Some(outcome) = self.step() {
                break outcome;
            }
        };
        self.leave_all();
        (outcome, self.driver)
    }

    fn step(&mut self) -> Option<Outcome> {
        let ended = match self.driver.step() {
            Notice::Nothing => false,
            Notice::Turn => {
                if self.stage == Stage::Draining && self.driver.is_drained() {
                    return Some(self.finish_drain());
                }
                self.triggered()
            }
            Notice::Readable(id) => {
                self.handle_readable(id);
                self.triggered()
            }
            Notice::Planned(Plan::Think(index)) => {
                self.think(index);
                false
            }
            Notice::Planned(Plan::Watch) => return self.watch(),
            Notice::Planned(Plan::End) => true,
            Notice::Dead => panic!("nothing will ever happen again"),
        };
        if ended && self.stage < Stage::Finishing { self.end() } else { None }
    }

    fn triggered(&mut self) -> bool {
        // After an error of the disk a volume may refuse all changes, so device writes may never come.
        if !self.ending.last && !self.disk_failed && self.driver.disk.counts.errors > self.errors_at_start {
            self.disk_failed = true;
            self.ending.trigger = Trigger::Answers(self.answers + self.random.below(200));
        }
        if self.answers >= ANSWERS_MAX {
            return true;
        }
        match self.ending.trigger {
            Trigger::DeviceWrites(count) => self.driver.counts.device_writes >= count,
            Trigger::Answers(count) => self.answers >= count,
            Trigger::Nanoseconds(_) => false,
        }
    }

    /// The trigger was pulled.
    fn end(&mut self) -> Option<Outcome> {
        if self.ending.last {
            self.stage = Stage::Finishing;
            self.advance();
            return None;
        }
        if self.ending.outcome == Outcome::Drained {
            self.drain();
            return None;
        }
        Some(self.ending.outcome)
    }

    fn drain(&mut self) {
        self.stage = Stage::Draining;
        self.drain_began = self.driver.now();
        self.driver.drain();
    }

    fn finish_drain(&mut self) -> Outcome {
        assert!(self.driver.is_quiet() || self.failed(), "drained with device operations under way");
        self.driver.assert_buffers_returned();
        Outcome::Drained
    }

    /// Moves on once nobody waits for anything.
    fn advance(&mut self) {
        let verifying = self.sessions.iter().any(|session| matches!(session.role, Role::Verifier(_)));
        let waiting = self.sessions.iter().filter_map(|session| session.client.as_ref());
        let waiting = waiting.map(|(client, _)| client.pending_count()).sum::<usize>();
        match self.stage {
            Stage::Verifying if !verifying => {
                self.stage = Stage::Working;
                if self.verify_first {
                    self.add_workers();
                }
            }
            Stage::Finishing if !verifying && waiting == 0 => {
                self.stage = Stage::VerifyingAgain;
                self.add_verifiers();
            }
            Stage::VerifyingAgain if !verifying => {
                self.drain();
            }
            _ => {}
        }
    }

    fn add_verifiers(&mut self) {
        for volume in 0..self.world.setup.volumes.len() {
            self.add_session(volume, Role::Verifier(0));
        }
    }

    fn add_workers(&mut self) {
        for number in 0..self.world.swarm.clients {
            let volume = self.random.index(self.world.setup.volumes.len());
            let size_bytes = self.world.setup.volumes[volume].size_bytes;
            let random = self.random.fork("workload", number);
            let workload = Workload::new(self.world.pattern(), size_bytes, random);
            self.add_session(volume, Role::Worker(Box::new(workload)));
        }
    }

    fn add_session(&mut self, volume: usize, role: Role) {
        let index = self.sessions.len();
        self.sessions.push(Session {
            role,
            volume,
            client: None,
            connected_at: self.driver.now(),
            came: Came::default(),
            was_paused: false,
            think_planned: false,
        });
        let delay = self.random.range(0..=100_000);
        self.plan_think(index, delay);
    }

    fn plan_think(&mut self, index: usize, nanoseconds: u64) {
        if !std::mem::replace(&mut self.sessions[index].think_planned, true) {
            self.driver.plan(nanoseconds, Plan::Think(index));
        }
    }

    /// A client has time: it connects, sends, stops reading or leaves.
    fn think(&mut self, index: usize) {
        self.sessions[index].think_planned = false;
        if self.stage >= Stage::Finishing && matches!(self.sessions[index].role, Role::Worker(_)) {
            return;
        }
        if self.sessions[index].client.is_none() {
            return self.connect(index);
        }
        let is_worker = matches!(self.sessions[index].role, Role::Worker(_));
        if is_worker && !self.ending.last && self.random.per_million(self.world.swarm.rot_while_running) {
            self.rot();
        }
        if is_worker && self.random.per_million(self.world.swarm.disconnects) {
            return self.disconnect(index);
        }
        if is_worker && self.random.per_million(self.world.swarm.reading_pauses) {
            let session = &mut self.sessions[index];
            session.was_paused = true;
            let (_, id) = session.client.as_ref().expect("connected");
            let longest = self.world.swarm.reading_pause_ns_max;
            let hoarding = self.world.setup.slant.hoarding;
            let pause =
                if hoarding { self.random.range(0..=longest) } else { self.random.skewed(1_000..=longest) };
            self.driver.pause_reading(*id, pause);
        }
        self.send_some(index);
        if is_worker && self.random.per_million(self.world.swarm.idle_pauses) {
            let pause = self.random.skewed(1_000_000..=5_000_000_000);
            return self.plan_think(index, pause);
        }
        // Answers bring the client back as well; this one makes it send while it waits for them.
        let pause = self.random.skewed(2_000..=400_000);
        self.plan_think(index, pause);
    }

    /// Bits flip while the engine runs.
    fn rot(&mut self) {
        let fragile = self.world.subject.fragile(&self.world.setup, &mut StableReader(&self.driver.disk));
        let flipped = self.driver.disk.flip_bits(1, &fragile);
        self.world.report.flipped_bits += flipped as u64;
        self.rotten |= flipped > 0;
    }

    fn connect(&mut self, index: usize) {
        let id = self.driver.connect();
        let session = &mut self.sessions[index];
        let volume = &self.world.setup.volumes[session.volume];
        let mut plan = ClientPlan::draw(&mut self.random, &volume.name, volume.size_bytes);
        if matches!(session.role, Role::Verifier(_)) {
            plan.depth = VERIFY_DEPTH;
        }
        trace::note(
            self.driver.now(),
            "client connects: client, connection, volume",
            [self.next_client, id.0.into(), session.volume as u64],
        );
        let client = Client::new(self.next_client, crate::to_u32(session.volume), plan);
        self.next_client += 1;
        session.client = Some((client, id));
        session.connected_at = self.driver.now();
        session.came = self.doubts[session.volume].come();
        session.was_paused = false;
    }

    fn send_some(&mut self, index: usize) {
        let now = self.driver.now();
        let session = &mut self.sessions[index];
        let (client, id) = session.client.as_mut().expect("connected");
        let oracle = &mut self.world.oracles[session.volume];
        let free = client.free_depth();
        let count = if free == 0 { 0 } else { 1 + self.random.index(free) };
        match &mut session.role {
            Role::Worker(workload) => {
                for _ in 0..count {
                    client.send(now, workload.draw(), oracle);
                }
            }
            Role::Verifier(next) => {
                let size = self.world.setup.volumes[session.volume].size_bytes;
                for _ in 0..count {
                    let length_bytes = VERIFY_BYTES.min(size - *next);
                    if length_bytes > 0 {
                        let kind = AskKind::Read { one_piece: false };
                        client.send(now, Ask { kind, offset_bytes: *next, length_bytes, fua: false }, oracle);
                        *next += length_bytes;
                    }
                }
            }
            Role::Retired => {}
        }
        let output = client.output();
        if !output.is_empty() {
            self.driver.client_writes(*id, output);
            output.clear();
        }
    }

    /// Leaves in good or bad manner, and comes back later.
    fn disconnect(&mut self, index: usize) {
        let session = &mut self.sessions[index];
        let (mut client, id) = session.client.take().expect("connected");
        if client.is_ready() && self.random.percent(50) {
            client.send_disconnect();
            let output = std::mem::take(client.output());
            self.driver.client_writes(id, &output);
        }
        trace::note(self.driver.now(), "client leaves connection", [id.0.into(), 0, 0]);
        self.close_client(index, client, id);
        let pause = self.random.skewed(1_000..=10_000_000);
        self.plan_think(index, pause);
    }

    fn close_client(&mut self, index: usize, mut client: Client, id: ConnectionId) {
        self.forget_client(index, &mut client);
        self.driver.client_leaves(id);
    }

    /// What it asked and did not hear of is in doubt.
    fn forget_client(&mut self, index: usize, client: &mut Client) {
        let volume = self.sessions[index].volume;
        self.doubts[volume].go(client.leave(&mut self.world.oracles[volume]));
        add_counts(&mut self.world.report.clients, &client.counts);
    }

    fn handle_readable(&mut self, id: ConnectionId) {
        let index = self
            .sessions
            .iter()
            .position(|session| session.client.as_ref().is_some_and(|(_, own)| *own == id));
        let Some(index) = index else { return };
        let now = self.driver.now();
        let tolerance = self.tolerance();
        if self.driver.disk.counts.lies > 0 {
            self.world.oracles.iter_mut().for_each(Oracle::expect_only_genuine_data);
        }
        let session = &mut self.sessions[index];
        let (client, _) = session.client.as_mut().expect("found by its connection");
        let before = client.counts.answers;
        let oracle = &mut self.world.oracles[session.volume];
        client.handle_input(now, self.driver.client_input(id), oracle, tolerance);
        let answers = client.counts.answers - before;
        // What a failed device did with a change is known only after a crash and recovery.
        if answers > 0 && self.driver.disk.counts.errors == self.errors_at_start {
            self.doubts[session.volume].settle(session.came, oracle);
        }
        if matches!(session.role, Role::Worker(_)) {
            self.answers += answers;
        }
        let output = client.output();
        if !output.is_empty() {
            self.driver.client_writes(id, output);
            output.clear();
        }
        if self.driver.is_at_end_for_client(id) {
            return self.handle_server_close(index);
        }
        if self.finish_verifier(index) {
            return;
        }
        if answers > 0
            || self.sessions[index].client.as_ref().is_some_and(|(client, _)| client.free_depth() > 0)
        {
            let pause = self.random.skewed(100..=50_000);
            self.plan_think(index, pause);
        }
        if self.stage == Stage::Finishing {
            self.advance();
        }
    }

    /// A verifier that has read everything leaves.
    fn finish_verifier(&mut self, index: usize) -> bool {
        let session = &mut self.sessions[index];
        let Role::Verifier(next) = session.role else { return false };
        let size = self.world.setup.volumes[session.volume].size_bytes;
        let done =
            next == size && session.client.as_ref().is_some_and(|(client, _)| client.pending_count() == 0);
        if done {
            let (client, id) = session.client.take().expect("connected");
            self.close_client(index, client, id);
            self.sessions[index].role = Role::Retired;
            self.advance();
        }
        done
    }

    fn handle_server_close(&mut self, index: usize) {
        let draining = self.stage == Stage::Draining;
        let excused = draining || self.sessions[index].was_paused || self.failed();
        assert!(
            excused,
            "the server closed the connection of session {index} without a reason: {}",
            self.describe()
        );
        let (mut client, id) = self.sessions[index].client.take().expect("connected");
        self.forget_client(index, &mut client);
        self.driver.forget(id);
        if let Role::Verifier(next) = &mut self.sessions[index].role {
            *next = 0;
        }
        if !draining {
            self.plan_think(index, 1_000_000);
        }
    }

    /// Has the disk given cause for errors in this life?
    fn failed(&self) -> bool {
        self.is_damaged() || self.driver.disk.counts.errors > self.errors_at_start
    }

    /// May something on the disk be other than what was written?
    fn is_damaged(&self) -> bool {
        self.rotten || self.driver.disk.counts.lies > 0
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance {
            // Damaged blocks may have been given up when space was short.
            io: self.failed() || self.world.report.subject.lost_blocks > 0,
            // A block that cannot be read cannot be moved either, so damage takes space away.
            no_space: self.world.setup.may_fill || self.is_damaged(),
            shutting_down: self.stage == Stage::Draining,
        }
    }

    fn describe(&self) -> String {
        let engines: String =
            self.driver.engines().map(|engine| self.world.subject.describe(engine)).collect();
        format!("{engines}{}", self.driver.describe())
    }

    /// Is anything stuck?
    fn watch(&mut self) -> Option<Outcome> {
        let now = self.driver.now();
        let happenings = self.driver.counts.happenings;
        assert!(
            happenings - self.happenings_seen < HAPPENINGS_PER_WATCH_MAX,
            "{} things happened in {WATCH_NS} ns: the engine runs in circles",
            happenings - self.happenings_seen
        );
        self.happenings_seen = happenings;
        if self.stage == Stage::Draining && now.since_ns(self.drain_began) > ANSWER_NS_MAX {
            // With a failed disk nothing can be made safe any more.
            assert!(self.failed(), "the engine does not stop: {}", self.describe());
            return Some(Outcome::Killed);
        }
        for session in &self.sessions {
            let Some((client, id)) = &session.client else { continue };
            let since = if client.is_ready() { client.oldest_pending() } else { Some(session.connected_at) };
            let waiting = since.map_or(0, |since| now.since_ns(since));
            assert!(
                waiting < ANSWER_NS_MAX,
                "{id:?} waits for an answer since {since:?}: {client:?}\n{}",
                self.describe()
            );
        }
        self.driver.plan(WATCH_NS, Plan::Watch);
        None
    }

    /// The process is gone, and with it every connection.
    fn leave_all(&mut self) {
        for session in &mut self.sessions {
            if let Some((mut client, _)) = session.client.take() {
                let _ = client.leave(&mut self.world.oracles[session.volume]);
                add_counts(&mut self.world.report.clients, &client.counts);
            }
        }
    }
}

fn add_counts(total: &mut ClientCounts, counts: &ClientCounts) {
    total.requests += counts.requests;
    total.answers += counts.answers;
    total.errors += counts.errors;
    total.written_bytes += counts.written_bytes;
    total.read_bytes += counts.read_bytes;
}
