//! What a simulation is run on: the door between the world and a store with its engine.

use std::ops::Range;

use datapath::engine::ports::{DeviceError, Engine};
use datapath::units::{MemoryRange, Moment};

use super::disk::Disk;
use super::memory::SimMemory;
use super::oracle::Promises;
use super::random::Random;
use super::scenario::Slant;
use super::world::{QUOTA, Tally};

/// A volume of the simulated pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// The export's name.
    pub name: String,
    /// Its size; a multiple of 4096.
    pub size_bytes: u64,
}

/// What a seed decided about the world before a subject is formatted.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The seed.
    pub seed: u64,
    /// How its world is bent.
    pub slant: Slant,
    /// The disk's size.
    pub disk_bytes: u64,
    /// The volumes.
    pub volumes: Vec<VolumeSpec>,
    /// The volumes' policy is `durable`, not `device`.
    pub durable_acks: bool,
    /// The disk has no volatile cache problem for FUA: subjects may prefer FUA writes to write and sync.
    pub prefer_fua: bool,
    /// Longest read or write that clients send.
    pub request_bytes_max: u64,
    /// Writes may be refused for lack of space.
    pub may_fill: bool,
    /// A stream for what the subject itself wants to vary.
    pub random: Random,
}

/// How a subject lays out its memory.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPlan {
    /// Bytes in all.
    pub total_bytes: u32,
    /// The first of the driver's receive buffers; the others follow it.
    pub receive_buffer: MemoryRange,
    /// Number of these.
    pub receive_buffer_count: u16,
}

/// Which faults a subject promises to survive (see the table in [`super::disk`]). Those it does not are never
/// injected.
#[derive(Clone, Copy, Debug)]
pub struct Survives {
    /// Device operations that report errors.
    pub errors: bool,
    /// Flipped bits outside of [`Subject::fragile`].
    pub rot: bool,
    /// Lost and misdirected writes.
    pub lies: bool,
}

/// Why an engine could not be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The image is damaged in a way that forbids serving it.
    #[error("the store refuses to start: {0}")]
    Refused(String),
    /// A read failed.
    #[error("the store cannot read its image: {0}")]
    Read(String),
}

/// What a subject did, for the totals of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct SubjectCounts {
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Damaged blocks given up.
    pub lost_blocks: u64,
    /// Segments cleaned.
    pub cleaned_segments: u64,
    /// Batches appended.
    pub batches: u64,
    /// Receive buffers that stalled connections gave back.
    pub inputs_parked: u64,
    /// Connections closed because others waited for their memory.
    pub connections_put_out: u64,
}

/// Synchronous reads of the disk, for recovery before there is an engine.
#[derive(Debug)]
pub struct DiskReader<'a> {
    disk: &'a mut Disk,
}

impl<'a> DiskReader<'a> {
    /// Reads of `disk`.
    #[must_use]
    pub fn new(disk: &'a mut Disk) -> DiskReader<'a> {
        DiskReader { disk }
    }

    /// The disk's size.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    /// Fills `target` with what the disk holds from `offset_bytes` on.
    ///
    /// # Errors
    /// When the disk reports one.
    pub fn read_at(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<(), DeviceError> {
        self.disk.read_now(offset_bytes, target)
    }
}

/// What a disk would hold after a loss of power that takes every write with it that no sync has covered.
#[derive(Debug)]
pub struct StableReader<'a>(pub &'a Disk);

/// A store and its engine under test.
pub trait Subject {
    /// What the world drives.
    type Engine: Engine<Memory = SimMemory>;

    /// Changes of the setup that the subject needs or wants to vary (a smaller disk, no `durable`).
    fn adapt(&mut self, _setup: &mut Setup) {}

    /// The memory that each of its threads wants.
    fn memory_plan(&self, setup: &Setup) -> MemoryPlan;

    /// What it promises.
    fn promises(&self, setup: &Setup) -> Promises;

    /// What it survives.
    fn survives(&self, setup: &Setup) -> Survives;

    /// What each seed is to see of it.
    fn quota(&self) -> Tally {
        QUOTA
    }

    /// Where bits must not rot now, because a single copy cannot tell that from a write that was never finished: ranges
    /// of bytes.
    fn fragile(&self, _setup: &Setup, _stable: &mut StableReader<'_>) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Creates pool and volumes on an empty disk, with [`Disk::write_now`].
    fn format(&mut self, setup: &Setup, disk: &mut Disk);

    /// How many threads the process has in its next life.
    fn draw_threads(&self, _setup: &Setup, _random: &mut Random) -> usize {
        1
    }

    /// Recovers the pool and makes an engine for each thread: one for each memory. What recovery writes goes through
    /// effects.
    ///
    /// # Errors
    /// When the image is damaged or cannot be read.
    fn start(
        &mut self,
        setup: &Setup,
        now: Moment,
        disk: &mut DiskReader<'_>,
        memories: Vec<SimMemory>,
    ) -> Result<Vec<Self::Engine>, StartError>;

    /// What the engine did in its life.
    fn counts(&self, engine: &Self::Engine) -> SubjectCounts;

    /// What the engine is busy with, for the report of a failure.
    fn describe(&self, _engine: &Self::Engine) -> String {
        String::new()
    }

    /// Checks a drained pool from outside: every block accounted for, every checksum right.
    ///
    /// # Errors
    /// What is wrong.
    fn check(&mut self, setup: &Setup, disk: &mut DiskReader<'_>) -> Result<(), String>;
}
