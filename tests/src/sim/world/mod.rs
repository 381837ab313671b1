//! One seed: a pool is formatted, lives through crash after crash, and must keep every promise.
//!
//! A *life* goes from the start of an engine to a kill, a power cut or an orderly stop. In each, clients first
//! or meanwhile read back all that the volumes hold. Lives follow each other until the seed has come to its quota of
//! requests, recoveries, checkpoints and cleaned segments ([`QUOTA`]). The last life has a healthy disk: everything must be
//! answered, all data be right, the stop be clean and the pool pass its own check.

mod life;
mod report;

use datapath::units::Moment;

use self::life::{Ending, Life, Outcome};
pub use self::report::{QUOTA, Report, Tally};
use super::disk::{Disk, DiskFaults};
use super::memory::SimMemory;
use super::oracle::{Crash, Oracle};
use super::random::Random;
use super::scenario::Slant;
use super::subject::{DiskReader, Setup, StableReader, StartError, Subject, Survives, VolumeSpec};
use super::trace;
use super::workload::Pattern;

/// A seed that has not come to its quota in so many lives never will.
const LIVES_MAX: u64 = 200;
/// Lives in which the disk lies, after the quota: what it does then may end the story.
const LYING_LIVES: u64 = 15;
/// Lives of a seed in which they are short.
const SHORT_LIVES: u64 = 100;
const MIB: u64 = 1 << 20;

/// Which kinds of trouble a seed has. Each is absent in many seeds, so that none hides behind another.
#[derive(Clone, Debug)]
struct Swarm {
    /// Percentage of lives in which the disk reports errors.
    errors: u64,
    stalls: u64,
    /// Bits flip between lives.
    rot: bool,
    /// Chance per million occasions.
    rot_while_running: u64,
    /// In the end, once the seed has come to its quota: lies may end the story.
    lies: bool,
    tear_bytes: usize,
    delay_ns_max: u64,
    /// Chances per million occasions.
    disconnects: u64,
    reading_pauses: u64,
    /// The longest of these.
    reading_pause_ns_max: u64,
    idle_pauses: u64,
    clients: u64,
    pattern: Pattern,
}

/// Runs one seed to its end.
///
/// # Panics
/// When a promise is broken. The thread's [`trace`] tells how it came to that.
pub fn run_seed<S: Subject>(seed: u64, slant: Slant, subject: &mut S, verbose: bool) -> Report {
    trace::begin(seed, verbose);
    let mut world = World::new(seed, slant, subject);
    while world.goes_on() {
        if !world.live(false) {
            return world.finish();
        }
    }
    if world.live(true) {
        world.check_pool();
    }
    world.finish()
}

struct World<'a, S: Subject> {
    subject: &'a mut S,
    setup: Setup,
    swarm: Swarm,
    oracles: Vec<Oracle>,
    /// Lent to the engine while it lives.
    disk: Option<Disk>,
    /// Of one thread each, from earlier lives.
    memories: Vec<SimMemory>,
    now: Moment,
    random: Random,
    report: Report,
    /// The number of lives when the disk began to lie.
    lying_since: Option<u64>,
    /// The last life ended with a kill or a power cut.
    has_crashed: bool,
}

impl<'a, S: Subject> World<'a, S> {
    fn new(seed: u64, slant: Slant, subject: &'a mut S) -> World<'a, S> {
        let mut random = Random::new(seed);
        let mut setup = draw_setup(seed, slant, &mut random.fork("setup", 0));
        subject.adapt(&mut setup);
        let survives = subject.survives(&setup);
        let mut swarm = draw_swarm(&mut random.fork("swarm", 0), &setup, survives);
        if slant.restless {
            swarm.disconnects = 30_000;
        }
        if slant.hoarding {
            swarm.clients = random.fork("hoarders", 0).range(20..=40);
            swarm.reading_pauses = 100_000;
            swarm.reading_pause_ns_max = 20_000_000_000;
            // The server would not see them leave while they are stalled, and soon have as many as it takes.
            swarm.disconnects = 0;
            // Damage can take all space of so small a pool: that is for other scenarios.
            (swarm.rot, swarm.rot_while_running) = (false, 0);
        }
        let mut disk = Disk::new(setup.disk_bytes, random.fork("disk", 0));
        subject.format(&setup, &mut disk);
        let promises = subject.promises(&setup);
        let oracles =
            (0..).zip(&setup.volumes).map(|(index, volume)| Oracle::new(index, volume.size_bytes, promises));
        let now = Moment(random.range(0..=1 << 40));
        World {
            oracles: oracles.collect(),
            memories: Vec::new(),
            disk: Some(disk),
            subject,
            setup,
            swarm,
            now,
            random,
            report: Report::default(),
            lying_since: None,
            has_crashed: false,
        }
    }

    /// Is there another life before the last one?
    fn goes_on(&mut self) -> bool {
        let lives = self.report.lives;
        if self.setup.slant.short_lives {
            return lives < SHORT_LIVES;
        }
        if self.lying_since.is_none() && !self.report.tally().reaches(&self.subject.quota()) {
            assert!(lives < LIVES_MAX, "{lives} lives have come to no more than {:?}", self.report.tally());
            return true;
        }
        self.swarm.lies && lives - *self.lying_since.get_or_insert(lives) < LYING_LIVES
    }

    /// How clients behave in the next life. A seed that lacks nothing but a cleaned segment is written faster: else many
    /// had hundreds of lives before the pool is used up.
    fn pattern(&self) -> Pattern {
        let asked = self.subject.quota();
        let tally = self.report.tally();
        let enough = Tally { cleaned_segments: asked.cleaned_segments, ..tally }.reaches(&asked);
        let pattern = self.swarm.pattern.clone();
        if enough && !tally.reaches(&asked) { pattern.filling(256 << 10) } else { pattern }
    }

    fn disk(&mut self) -> &mut Disk {
        self.disk.as_mut().expect("no engine has the disk between lives")
    }

    /// One life. Returns false if damage that a single copy cannot repair ends the story.
    fn live(&mut self, last: bool) -> bool {
        let number = self.report.lives;
        let mut random = self.random.fork("life", number);
        self.prepare_disk(last, &mut random);
        let threads = self.subject.draw_threads(&self.setup, &mut random.fork("threads", 0));
        let Some(engines) = self.start(threads) else { return false };
        self.report.lives += 1;
        self.report.threads += threads as u64;
        self.report.recoveries += u64::from(std::mem::take(&mut self.has_crashed));
        let ending = match (last, self.setup.slant.short_lives) {
            (true, _) => Ending::last(),
            (false, true) => Ending::draw_early(&mut random),
            (false, false) => Ending::draw(&mut random),
        };
        trace::note(
            self.now,
            "life begins: number, last, threads",
            [number, u64::from(last), threads as u64],
        );
        let disk = self.disk.take().expect("the disk is here");
        let (errors, failed_syncs) = (disk.counts.errors, disk.counts.failed_syncs);
        let plan = self.subject.memory_plan(&self.setup);
        let answers = self.report.clients.answers;
        let life = Life::new(engines, disk, self.now, &plan, self, ending, random);
        let (outcome, driver) = life.run();
        driver.engines().for_each(|engine| self.report.subject.add(&self.subject.counts(engine)));
        self.report.turns += driver.counts.turns;
        self.report.moves += driver.move_count();
        let (memories, mut disk, now, _engines) = driver.dismantle();
        self.report.virtual_ns += now.since_ns(self.now);
        self.now = now.after_ns(1_000_000);
        let lost_by_sync = disk.counts.failed_syncs > failed_syncs;
        let failed = disk.counts.errors > errors;
        let crash = self.end(outcome, &mut disk, failed);
        let crash = if lost_by_sync { Crash::PowerCut } else { crash };
        self.has_crashed = outcome != Outcome::Drained;
        if self.report.clients.answers == answers && self.has_crashed {
            self.report.early_crashes += 1;
        }
        for oracle in &mut self.oracles {
            if outcome == Outcome::Drained && !failed {
                oracle.drain();
            }
            oracle.crash(crash);
        }
        self.disk = Some(disk);
        self.memories.extend(memories);
        true
    }

    /// Does to the disk what the end of the process means.
    fn end(&mut self, outcome: Outcome, disk: &mut Disk, failed: bool) -> Crash {
        trace::note(
            self.now,
            "life ends: 0 kill 1 power cut 2 drained",
            [outcome as u64, u64::from(failed), 0],
        );
        match outcome {
            Outcome::Killed => {
                self.report.kills += 1;
                disk.kill();
                Crash::Kill
            }
            Outcome::PowerCut => {
                self.report.power_cuts += 1;
                disk.cut_power();
                Crash::PowerCut
            }
            // An orderly stop must leave nothing that a power cut could take.
            Outcome::Drained => {
                self.report.drains += 1;
                disk.cut_power();
                Crash::PowerCut
            }
        }
    }

    fn prepare_disk(&mut self, last: bool, random: &mut Random) {
        let swarm = self.swarm.clone();
        let lies = swarm.lies && (self.lying_since.is_some() || self.setup.slant.short_lives);
        let errors = if random.percent(swarm.errors) { random.skewed(1_000..=50_000) } else { 0 };
        let failing_syncs = if self.setup.slant.failing_syncs { 50_000 } else { 0 };
        let mut faults = DiskFaults {
            write_errors: if random.percent(50) { errors } else { 0 },
            read_errors: if random.percent(50) { errors } else { 0 },
            sync_errors: if random.percent(50) { errors * 10 } else { failing_syncs },
            stalls: swarm.stalls,
            lost_writes: if lies { 2_000 } else { 0 },
            misdirected_writes: if lies { 2_000 } else { 0 },
            tear_bytes: swarm.tear_bytes,
            delay_ns_max: swarm.delay_ns_max,
        };
        if last {
            faults = DiskFaults { tear_bytes: swarm.tear_bytes, ..DiskFaults::none() };
            self.disk().repair_rot();
        }
        self.disk().faults = faults;
        if swarm.rot && !last && random.percent(40) {
            let count = crate::to_usize(random.skewed(1..=20));
            let disk = self.disk.as_mut().expect("no engine has the disk between lives");
            let fragile = self.subject.fragile(&self.setup, &mut StableReader(disk));
            let flipped = disk.flip_bits(count, &fragile);
            self.report.flipped_bits += flipped as u64;
        }
    }

    /// Starts an engine. A refusal must be deserved, and be over once its cause is gone.
    fn start(&mut self, threads: usize) -> Option<Vec<S::Engine>> {
        loop {
            let disk = self.disk.as_mut().expect("no engine has the disk between lives");
            let errors = disk.counts.errors;
            // A refused start keeps its memory; the next one begins with new memory.
            let total_bytes = self.subject.memory_plan(&self.setup).total_bytes;
            let mut memories = Vec::with_capacity(threads);
            for _ in 0..threads {
                let mut memory = self.memories.pop().unwrap_or_else(|| SimMemory::new(total_bytes));
                memory.reset();
                memories.push(memory);
            }
            let error = match self.subject.start(&self.setup, self.now, &mut DiskReader::new(disk), memories)
            {
                Ok(engines) => return Some(engines),
                Err(error) => error,
            };
            self.report.refusals += 1;
            let (rotten, lied) = (disk.is_rotten(), disk.counts.lies > 0);
            let unreadable = disk.counts.errors > errors;
            trace::note(
                self.now,
                "start refused: rotten, lied, unreadable",
                [rotten.into(), lied.into(), unreadable.into()],
            );
            assert!(rotten || lied || unreadable, "an undamaged image is refused: {error}");
            assert!(unreadable || matches!(error, StartError::Refused(_)), "no read failed, but: {error}");
            if lied {
                return None;
            }
            disk.repair_rot();
            disk.faults.read_errors = 0;
        }
    }

    fn check_pool(&mut self) {
        let disk = self.disk.as_mut().expect("no engine has the disk between lives");
        if disk.counts.lies > 0 {
            return;
        }
        if let Err(damage) = self.subject.check(&self.setup, &mut DiskReader::new(disk)) {
            panic!("the pool is damaged after an orderly stop: {damage}");
        }
    }

    fn finish(mut self) -> Report {
        let (tally, quota) = (self.report.tally(), self.subject.quota());
        assert!(self.setup.slant.short_lives || tally.reaches(&quota), "{tally:?}, but {quota:?} is asked");
        let counts = self.disk().counts;
        self.report.digest = trace::digest();
        self.report.disk_errors = counts.errors;
        self.report.disk_written_bytes = counts.written_bytes;
        self.report
    }
}

fn draw_setup(seed: u64, slant: Slant, random: &mut Random) -> Setup {
    let disk_bytes = *random.pick(&[16 * MIB, 24 * MIB, 32 * MIB, 64 * MIB]);
    let count = random.range(1..=3);
    // At most a quarter of the disk: what else there must be room for is the subject's business.
    let size_max = (disk_bytes / 4 / count).min(6 * MIB);
    let volume = |index: u64, random: &mut Random| VolumeSpec {
        name: format!("volume-{index}"),
        size_bytes: random.range(16..=size_max / 4096) * 4096,
    };
    let request_bytes_max = *random.pick(&[256 << 10, MIB, MIB, 3 * MIB]);
    Setup {
        seed,
        slant,
        disk_bytes,
        volumes: (0..count).map(|index| volume(index, random)).collect(),
        durable_acks: random.percent(40),
        prefer_fua: random.percent(30),
        request_bytes_max: if slant.long_requests { 3 * MIB } else { request_bytes_max },
        may_fill: slant.fills,
        random: random.fork("subject", 0),
    }
}

fn draw_swarm(random: &mut Random, setup: &Setup, survives: Survives) -> Swarm {
    let some =
        |random: &mut Random, percent: u64, value: u64| if random.percent(percent) { value } else { 0 };
    Swarm {
        errors: if survives.errors { some(random, 40, 50) } else { 0 },
        stalls: some(random, 20, 300),
        rot: survives.rot && random.percent(25),
        rot_while_running: if survives.rot { some(random, 10, 2_000) } else { 0 },
        lies: survives.lies && random.percent(4),
        tear_bytes: *random.pick(&[512, 4096]),
        delay_ns_max: *random.pick(&[5_000, 50_000, 200_000, 2_000_000]),
        disconnects: some(random, 40, 3_000),
        reading_pauses: some(random, 30, 2_000),
        reading_pause_ns_max: 3_000_000_000,
        idle_pauses: some(random, 40, 3_000),
        clients: random.range(1..=5),
        pattern: Pattern::draw(random, setup.request_bytes_max),
    }
}
