//! The streams of a lane: each appends batches to a segment of its own.

use crate::store::batch::DescriptorWriter;
use crate::store::layout::{Place, SegmentIndex};
use crate::store::map::FrameIndex;
use crate::units::MemoryRange;
use std::collections::VecDeque;

/// What a stream carries. Blocks that die together should lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamKind {
    /// Changes from clients; rolled forward after a crash.
    Client,
    /// What the cleaner moved; rolled forward after a crash.
    Survivor,
    /// Leaves and checkpoint bodies; found through the root only.
    Map,
}

impl StreamKind {
    pub(super) const ALL: [StreamKind; 3] = [StreamKind::Client, StreamKind::Survivor, StreamKind::Map];

    pub(super) fn index(self) -> usize {
        match self {
            StreamKind::Client => 0,
            StreamKind::Survivor => 1,
            StreamKind::Map => 2,
        }
    }

    pub(super) fn code(self) -> u8 {
        match self {
            StreamKind::Client => 0,
            StreamKind::Survivor => 1,
            StreamKind::Map => 2,
        }
    }
}

/// For one entry of a batch: what must be done when it takes effect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// Volume by its position in the lane.
    pub(super) volume: u32,
    /// The leaves that it changes, pinned.
    pub(super) frames: [Option<FrameIndex>; 2],
    /// Whom to answer, if anyone.
    pub(super) cookie: Option<u32>,
    /// Answer only when on stable media.
    pub(super) durable: bool,
    /// Blocks counted as possibly new.
    pub(super) new_blocks: u32,
}

impl Record {
    /// How many leaves it changes.
    pub(super) fn leaf_count(&self) -> u64 {
        self.frames.iter().flatten().count() as u64
    }
}

/// A batch that still takes entries.
#[derive(Debug)]
pub(super) struct OpenBatch {
    pub(super) memory: MemoryRange,
    pub(super) writer: DescriptorWriter,
    /// Payload blocks that fit into what is left of the segment.
    pub(super) capacity_blocks: u32,
    pub(super) records: Vec<Record>,
}

/// Memory to give back when a batch is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum BatchMemory {
    /// A buffer of the lane.
    Buffer(MemoryRange),
    /// Pages of the allocator.
    Pages(MemoryRange),
    /// Pages of the allocator: a payload, and a descriptor that does not lie in front of it.
    TwoPages(MemoryRange, MemoryRange),
    /// The next batch of the stream will give it back.
    Later,
    /// Lent by whoever is answered: nothing to give back.
    Lent,
    /// A lent payload, and pages of the allocator for a descriptor that does not lie in front of it.
    LentAndPages(MemoryRange),
}

impl BatchMemory {
    /// May the memory not be touched after the answer?
    pub(super) fn is_lent(self) -> bool {
        matches!(self, BatchMemory::Lent | BatchMemory::LentAndPages(_))
    }
}

/// A batch on its way to the device, or there but not yet in effect.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) number: u64,
    pub(super) crc: u32,
    pub(super) position: Position,
    /// Place of the first payload block.
    pub(super) payload: Place,
    pub(super) descriptor: MemoryRange,
    pub(super) memory: BatchMemory,
    pub(super) writes_left: u8,
    pub(super) continues: bool,
    pub(super) records: Vec<Record>,
}

/// Where in its stream a batch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) segment: SegmentIndex,
    pub(super) block: u32,
    pub(super) generation: u64,
    pub(super) next_segment: SegmentIndex,
}

/// One stream.
#[derive(Debug)]
pub(super) struct Stream {
    /// Where the next batch goes; nothing until the stream's first segments were assigned.
    pub(super) position: Option<Position>,
    /// CRC of the last descriptor sealed.
    pub(super) chain: u32,
    /// Number and CRC of the last batch in effect.
    pub(super) applied: (u64, u32),
    /// All batches up to this number are on the device.
    pub(super) written_through: u64,
    /// All batches up to this number are on stable media.
    pub(super) flushed_through: u64,
    pub(super) open: Option<OpenBatch>,
    pub(super) under_way: VecDeque<Batch>,
}

impl Stream {
    pub(super) fn new() -> Stream {
        Stream {
            position: None,
            chain: 0,
            applied: (0, 0),
            written_through: 0,
            flushed_through: 0,
            open: None,
            under_way: VecDeque::new(),
        }
    }

    /// Where rolling forward must begin so as to see exactly what is not in effect.
    pub(super) fn first_unapplied(&self) -> Position {
        self.under_way.front().map_or_else(|| self.position.expect("an open stream"), |batch| batch.position)
    }

    /// Batches still being written.
    pub(super) fn writing_count(&self) -> usize {
        self.under_way.iter().filter(|batch| batch.writes_left > 0).count()
    }
}
