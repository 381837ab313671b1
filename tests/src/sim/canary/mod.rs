//! A block server that is too simple to be wrong, and can be told to be wrong.
//!
//! It does one request at a time: load the blocks, change them, write them in place, answer. Correct, it shows
//! that the simulator raises no false alarm; with a [`Bug`] it shows that the alarm rings. It is no model
//! of Berth: it has no checksums, and multi-block writes are torn by crashes.

mod engine;
mod protocol;

pub use engine::Canary;

use datapath::units::{BLOCK_BYTES_U64, MemoryRange, Moment};

use super::disk::Disk;
use super::memory::SimMemory;
use super::oracle::Promises;
use super::subject::{DiskReader, MemoryPlan, Setup, StartError, Subject, SubjectCounts, Survives};
use super::world::{QUOTA, Tally};

/// Requests are done in parts of this length.
const PART_BYTES: u32 = 1 << 20;
const CONNECTIONS_MAX: u32 = 64;
/// Each connection's sends leave from its own part of the memory.
const SEND_BYTES: u32 = 32 << 10;
const RECEIVE_BYTES: u32 = 8 << 10;
const RECEIVE_BUFFERS: u16 = 12;
const RECEIVE_START: u32 = PART_BYTES + 8192;
const SEND_START: u32 = RECEIVE_START + RECEIVE_BYTES * RECEIVE_BUFFERS as u32;

/// What can be wrong with the canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// FLUSH is answered without a sync.
    FlushWithoutSync,
    /// FUA is ignored.
    FuaWithoutSync,
    /// A change is answered before its device write is done.
    EarlyAck,
    /// A read now and then shows what a sector held before its last write.
    StaleRead,
    /// A read now and then shows a sector made of two.
    TornRead,
    /// Zeroes miss the last sector of their range.
    ShortZeroes,
    /// Some answers come twice.
    AnswerTwice,
    /// Some answers never come.
    NoAnswer,
    /// A buffer is changed while the device reads it.
    TouchLentBuffer,
    /// Receive buffers are never returned.
    KeepBuffers,
    /// EIO for no reason.
    FalseError,
    /// A failed device write is answered with success.
    HideWriteError,
    /// The engine says that it is drained without a sync.
    DrainWithoutSync,
    /// Holes are reported where there is data.
    FalseHole,
    /// Connections are closed for no reason.
    FalseClose,
    /// A write next to another one in the same block is done on an old copy of the block.
    LostNeighbour,
}

/// All of them, with the names by which they are asked for.
pub const BUGS: [(&str, Bug); 16] = [
    ("flush-without-sync", Bug::FlushWithoutSync),
    ("fua-without-sync", Bug::FuaWithoutSync),
    ("early-ack", Bug::EarlyAck),
    ("stale-read", Bug::StaleRead),
    ("torn-read", Bug::TornRead),
    ("short-zeroes", Bug::ShortZeroes),
    ("answer-twice", Bug::AnswerTwice),
    ("no-answer", Bug::NoAnswer),
    ("touch-lent-buffer", Bug::TouchLentBuffer),
    ("keep-buffers", Bug::KeepBuffers),
    ("false-error", Bug::FalseError),
    ("hide-write-error", Bug::HideWriteError),
    ("drain-without-sync", Bug::DrainWithoutSync),
    ("false-hole", Bug::FalseHole),
    ("false-close", Bug::FalseClose),
    ("lost-neighbour", Bug::LostNeighbour),
];

/// The canary as a subject.
#[derive(Clone, Debug, Default)]
pub struct CanarySubject {
    /// What is wrong with it, if anything.
    pub bug: Option<Bug>,
}

/// A volume's name, first byte on the disk and size.
pub(crate) type Place = (String, u64, u64);

fn places(setup: &Setup) -> Vec<Place> {
    let mut next = BLOCK_BYTES_U64;
    let place = |volume: &super::subject::VolumeSpec| {
        let start = next;
        next += volume.size_bytes;
        (volume.name.clone(), start, volume.size_bytes)
    };
    setup.volumes.iter().map(place).collect()
}

impl Subject for CanarySubject {
    type Engine = Canary;

    fn memory_plan(&self, _setup: &Setup) -> MemoryPlan {
        MemoryPlan {
            total_bytes: SEND_START + CONNECTIONS_MAX * SEND_BYTES,
            receive_buffer: MemoryRange { start: RECEIVE_START, len: RECEIVE_BYTES },
            receive_buffer_count: RECEIVE_BUFFERS,
        }
    }

    fn promises(&self, setup: &Setup) -> Promises {
        Promises { durable_acks: setup.durable_acks, atomic_window_bytes: 0 }
    }

    fn survives(&self, _setup: &Setup) -> Survives {
        Survives { errors: true, rot: false, lies: false }
    }

    /// It has no log.
    fn quota(&self) -> Tally {
        Tally { checkpoints: 0, cleaned_segments: 0, ..QUOTA }
    }

    fn format(&mut self, _setup: &Setup, disk: &mut Disk) {
        disk.write_now(0, b"canary");
    }

    fn start(
        &mut self,
        setup: &Setup,
        _now: Moment,
        disk: &mut DiskReader<'_>,
        memories: Vec<SimMemory>,
    ) -> Result<Vec<Canary>, StartError> {
        let mut label = [0; 6];
        disk.read_at(0, &mut label).map_err(|error| StartError::Read(format!("{error:?}")))?;
        if &label != b"canary" {
            return Err(StartError::Refused(format!("the label is {label:?}")));
        }
        let canary = |memory| Canary::new(memory, places(setup), setup.durable_acks, self.bug);
        Ok(memories.into_iter().map(canary).collect())
    }

    fn counts(&self, _engine: &Canary) -> SubjectCounts {
        SubjectCounts::default()
    }

    fn check(&mut self, _setup: &Setup, _disk: &mut DiskReader<'_>) -> Result<(), String> {
        Ok(())
    }
}
