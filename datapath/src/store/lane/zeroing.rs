//! Segments of a file that were never written: ext4 and XFS would convert each extent at its first write, so they are
//! written with zeroes ahead of use. Clients do not wait for it while there are others: then one write at a time is enough,
//! and the device is theirs.

use super::stream::StreamKind;
use super::{Context, DiskEffect, Lane, Operation};
use crate::memory::Memory;
use crate::store::layout::SegmentIndex;
use crate::units::{BLOCK_BYTES, MemoryRange};
use std::collections::VecDeque;

/// Pages of zeroes that one write takes.
pub(super) const ZERO_PAGES: u32 = 16;

/// A segment on its way.
#[derive(Clone, Copy, Debug)]
struct Zeroed {
    segment: SegmentIndex,
    /// Writes of blocks from here on have not begun.
    next_block: u32,
    under_way: u32,
}

/// What waits to be written with zeroes.
#[derive(Debug)]
pub(super) struct Zeroing {
    waiting: VecDeque<SegmentIndex>,
    current: Option<Zeroed>,
    zeroes: MemoryRange,
}

impl Zeroing {
    /// `zeroes` are [`ZERO_PAGES`].
    pub(super) fn new(zeroes: MemoryRange) -> Zeroing {
        Zeroing { waiting: VecDeque::new(), current: None, zeroes }
    }

    /// Comes behind those that wait.
    pub(super) fn push(&mut self, segment: SegmentIndex) {
        self.waiting.push_back(segment);
    }

    /// Segments that wait, and the one that is being written.
    pub(super) fn count(&self) -> u32 {
        let waiting = u32::try_from(self.waiting.len()).expect("a few");
        waiting + u32::from(self.current.is_some())
    }
}

impl Lane {
    /// Writes at a time: more, the sooner clients will wait for a segment.
    fn zero_writes_at_once(&self) -> u32 {
        match self.segments.free_count().saturating_sub(self.segments_kept(StreamKind::Client)) {
            0 | 1 => 16,
            2 | 3 => 4,
            _ => 1,
        }
    }

    pub(super) fn upkeep_zeroing(&mut self) {
        let layout = self.config.layout;
        let begin = |segment| Zeroed { segment, next_block: 0, under_way: 0 };
        let current = self.zeroing.current.or_else(|| self.zeroing.waiting.pop_front().map(begin));
        let Some(mut current) = current else { return };
        let most = self.zero_writes_at_once();
        while current.next_block < layout.segment_blocks && current.under_way < most {
            let blocks = ZERO_PAGES.min(layout.segment_blocks - current.next_block);
            let memory = self.zeroing.zeroes.part(0, blocks * BLOCK_BYTES);
            let place = layout.place(current.segment, current.next_block);
            self.start(Operation::ZeroWrite, |token| DiskEffect::Write { token, place, memory });
            self.counters.zero_blocks_written += u64::from(blocks);
            self.counters.device_blocks_written += u64::from(blocks);
            current.next_block += blocks;
            current.under_way += 1;
        }
        self.zeroing.current = Some(current);
    }

    pub(super) fn finish_zero_write<M: Memory>(&mut self, context: &mut Context<'_, M>, good: bool) {
        if !good {
            self.fail(context);
        }
        let current = self.zeroing.current.as_mut().expect("a segment is being zeroed");
        current.under_way -= 1;
        let is_last = current.under_way == 0 && current.next_block == self.config.layout.segment_blocks;
        let segment = current.segment;
        if is_last && !self.failed {
            self.zeroing.current = None;
            self.segments.receive(segment);
        }
    }
}
