//! Which blocks the log changed after a point of a volume's order, for bringing back a replica that was away.
//!
//! ```text
//!   newest segment ──▶ descriptor ──▶ descriptor ──▶ … its end ──▶ the next older one ──▶ …
//!                                                                 └─ it held a change up to the point: that is all
//! ```
//!
//! A block's content was written for a change that the log still holds, or was moved since into a younger segment with its
//! number unchanged. So whatever changed after the point and still holds data is found in the segments down to the one
//! where the point lies. What became a hole need not be in the log any more: of that the leaves tell, each with the highest
//! number of a change to it ([`Lane::may_have_changed`]).
//!
//! Too much may be found, too little never: where the log is not what it must be, nothing is answered.

use super::stream::StreamKind;
use super::{Context, DiskEffect, DiskToken, Lane, Operation};
use crate::block_set::BlockSet;
use crate::memory::Memory;
use crate::store::batch::{BatchHeader, Descriptor};
use crate::store::layout::SegmentIndex;
use crate::store::segment::SegmentState;
use crate::units::{BLOCK_BYTES, MemoryRange};

/// A set of more parts than this (about 100 MiB) is not worth its memory: a terabyte has changed.
const PARTS_MAX: usize = 1 << 20;

/// What of the log is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything back to the point.
    All,
    /// Only what is kept because it may not be committed.
    Kept,
}

/// The answer to [`Lane::find_changed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// What the caller named it.
    pub cookie: u32,
    /// The blocks, and perhaps others. Nothing if the log cannot tell.
    pub blocks: Option<BlockSet>,
}

/// Where the batches of a segment end that are in effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Block(u32),
    Batch(u64),
}

/// A search under way: it has one read under way.
#[derive(Debug)]
pub(super) struct Walk {
    cookie: u32,
    /// Position in the lane.
    volume: u32,
    after: u64,
    extent: Extent,
    memory: MemoryRange,
    /// Segments still to be looked at and the one that is, the newest last. None is written again meanwhile.
    segments: Vec<(SegmentIndex, End)>,
    /// The next descriptor.
    block: u32,
    /// The block in front of the memory, and how many are there.
    read_from: u32,
    read_blocks: u32,
    before: Option<(BatchHeader, u32)>,
    /// A change up to the point was seen in this segment.
    reaches_back: bool,
    blocks: BlockSet,
}

/// What comes after a descriptor.
enum Next {
    Descriptor,
    Segment,
    Damage,
}

impl Lane {
    /// Finds the blocks that the volume's changes after this sequence wrote: those that hold data, and with
    /// [`Extent::Kept`] those that were released too. All changes that are in effect now are seen. `memory`, some blocks
    /// of it, is used until the answer comes with [`Self::poll_changed`].
    pub fn find_changed(
        &mut self,
        cookie: u32,
        volume: u32,
        after: u64,
        extent: Extent,
        memory: MemoryRange,
    ) {
        let unchanged = extent == Extent::All && self.volumes[volume as usize].record.sequence <= after;
        let segments = if unchanged { Vec::new() } else { self.segments_to_walk(volume, extent) };
        segments.iter().for_each(|(segment, _)| self.segments.begin_read(*segment));
        let index = self.walks.insert(Walk {
            cookie,
            volume,
            after,
            extent,
            memory,
            segments,
            block: 0,
            read_from: 0,
            read_blocks: 0,
            before: None,
            reaches_back: false,
            blocks: BlockSet::default(),
        });
        self.continue_walk(index);
    }

    /// The next answer to [`Self::find_changed`].
    pub fn poll_changed(&mut self) -> Option<Changed> {
        self.changed.pop_front()
    }

    /// May blocks of this leaf have been released after this sequence, so that no data tell of it?
    #[must_use]
    pub fn may_have_changed(&self, volume: u32, leaf: u32, after: u64) -> bool {
        // What was copied here where nothing was left no trace.
        let is_copy = self.volumes[volume as usize].record.order_after > after;
        is_copy || self.map.leaf_sequence(volume, leaf) > after
    }

    fn segments_to_walk(&self, volume: u32, extent: Extent) -> Vec<(SegmentIndex, End)> {
        let mut segments: Vec<SegmentIndex> = match extent {
            // A stream that was never written to stands in an anchor, which no lane owns.
            Extent::All => {
                let owned = |segment: &SegmentIndex| self.segments.state(*segment) != SegmentState::Foreign;
                self.segments.indices().filter(owned).collect()
            }
            Extent::Kept => {
                self.volumes[volume as usize].record.kept.iter().map(|kept| kept.segment).collect()
            }
        };
        segments.sort_unstable_by_key(|segment| (self.segments.newest_number(*segment), segment.0));
        segments.dedup();
        let ends = segments.into_iter().map(|segment| (segment, self.end_in_effect(segment)));
        ends.filter(|(_, end)| *end != End::Block(0)).collect()
    }

    /// Up to where what the segment holds is in effect.
    fn end_in_effect(&self, segment: SegmentIndex) -> End {
        for stream in [StreamKind::Client, StreamKind::Survivor] {
            let stream = &self.streams[stream.index()];
            if stream.position.is_some() && stream.first_unapplied().segment == segment {
                return End::Block(stream.first_unapplied().block);
            }
        }
        // Of one that a stream writes to, or will, nothing is in effect if it was not found above.
        if self.segments.is_settled(segment) && self.segments.state(segment) == SegmentState::Sealed {
            End::Batch(self.segments.newest_number(segment))
        } else {
            End::Block(0)
        }
    }

    fn continue_walk(&mut self, index: u32) {
        let walk = self.walks.get_mut(index);
        let Some((segment, _)) = walk.segments.last().copied() else { return self.end_walk(index, true) };
        let left = self.config.layout.segment_blocks - walk.block;
        let blocks = left.min(walk.memory.len / BLOCK_BYTES);
        (walk.read_from, walk.read_blocks) = (walk.block, blocks);
        let place = self.config.layout.place(segment, walk.block);
        let memory = walk.memory.part(0, blocks * BLOCK_BYTES);
        self.start(Operation::Walk(index), |token: DiskToken| DiskEffect::Read { token, place, memory });
    }

    pub(super) fn finish_walk_read<M: Memory>(&mut self, context: &Context<'_, M>, index: u32, good: bool) {
        if !good {
            return self.end_walk(index, false);
        }
        loop {
            let walk = self.walks.get_mut(index);
            let Some(offset) = walk.block.checked_sub(walk.read_from).filter(|at| *at < walk.read_blocks)
            else {
                return self.continue_walk(index);
            };
            let bytes = context.memory.bytes(walk.memory.part(offset * BLOCK_BYTES, BLOCK_BYTES));
            let number = self.volumes[walk.volume as usize].record.number;
            let segment_blocks = self.config.layout.segment_blocks;
            match walk.take(Descriptor::decode(bytes), self.config.lane, number, segment_blocks) {
                Next::Descriptor => {}
                Next::Damage => return self.end_walk(index, false),
                Next::Segment if walk.blocks.parts() > PARTS_MAX => return self.end_walk(index, false),
                Next::Segment => {
                    let (segment, _) = walk.segments.pop().expect("the one that was read");
                    let is_last = walk.reaches_back && walk.extent == Extent::All;
                    (walk.block, walk.read_blocks, walk.before, walk.reaches_back) = (0, 0, None, false);
                    self.segments.end_read(segment);
                    if is_last {
                        return self.end_walk(index, true);
                    }
                    return self.continue_walk(index);
                }
            }
        }
    }

    fn end_walk(&mut self, index: u32, known: bool) {
        let walk = self.walks.remove(index);
        walk.segments.iter().for_each(|(segment, _)| self.segments.end_read(*segment));
        self.changed.push_back(Changed { cookie: walk.cookie, blocks: known.then_some(walk.blocks) });
    }
}

impl Walk {
    /// Takes what the descriptor tells, and goes behind its batch.
    fn take(
        &mut self,
        descriptor: Option<Descriptor<'_>>,
        lane: u32,
        volume: u32,
        segment_blocks: u32,
    ) -> Next {
        let (_, end) = *self.segments.last().expect("a segment that is read");
        let Some(found) = descriptor.filter(|found| self.is_next(found, lane, segment_blocks)) else {
            return Next::Damage;
        };
        if usize::from(found.header.stream) == StreamKind::Map.index() {
            return Next::Segment;
        }
        for view in found.entries().filter(|view| view.entry.volume == volume) {
            let entry = view.entry;
            let has_blocks = entry.kind.is_change() || entry.kind.has_payload();
            if has_blocks && entry.sequence > self.after {
                self.blocks.insert(entry.block, entry.count);
            }
            self.reaches_back |= entry.kind.is_change() && entry.sequence <= self.after;
        }
        self.before = Some((found.header, found.crc));
        self.block += found.total_blocks();
        let is_over = match end {
            End::Block(block) => self.block >= block,
            End::Batch(number) => found.header.number >= number,
        };
        if is_over { Next::Segment } else { Next::Descriptor }
    }

    /// Is this the descriptor that must be here?
    fn is_next(&self, found: &Descriptor<'_>, lane: u32, segment_blocks: u32) -> bool {
        let (_, end) = *self.segments.last().expect("a segment that is read");
        let header = &found.header;
        let inside = match end {
            End::Block(block) => self.block + found.total_blocks() <= block,
            End::Batch(number) => {
                header.number <= number && self.block + found.total_blocks() <= segment_blocks
            }
        };
        let of_map = usize::from(header.stream) == StreamKind::Map.index();
        let follows = self.before.is_none_or(|(before, crc)| header.follows(&before, crc));
        u32::from(header.lane) == lane && follows && (inside || of_map)
    }
}
