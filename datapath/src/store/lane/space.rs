//! What a lane needs of its pool's segments, and what it can spare.

use super::stream::StreamKind;
use super::{Lane, WORKING_SEGMENTS};
use crate::store::layout::{Layout, SegmentIndex};

impl Lane {
    /// Segments that the lane cannot do without: those that its live blocks would fill, with all that was promised, and those
    /// it works in.
    #[must_use]
    pub fn segments_needed(&self) -> u32 {
        if self.volumes.is_empty() {
            return 0;
        }
        let blocks = self.blocks_spoken_for();
        let filled = blocks.div_ceil(u64::from(self.config.layout.usable_blocks()));
        u32::try_from(filled).expect("segments fit 32 bits") + self.working_segments()
    }

    pub(super) fn working_segments(&self) -> u32 {
        WORKING_SEGMENTS + self.pool_share.segments / 16
    }

    /// Blocks of all volumes that a pool of so many segments can hold, if volumes are in all of its lanes.
    #[must_use]
    pub fn capacity_blocks_of(layout: &Layout, segments: u32) -> u64 {
        let working = layout.lanes * (WORKING_SEGMENTS + segments / 16);
        u64::from(segments.saturating_sub(working)) * u64::from(layout.usable_blocks())
    }

    /// Does a change wait, for space or for memory?
    #[must_use]
    pub fn has_blocked_changes(&self) -> bool {
        self.blocked.iter().any(|queue| !queue.is_empty())
    }

    /// Does a change wait for a segment that the pool does not have?
    #[must_use]
    pub fn is_hungry(&self) -> bool {
        self.has_blocked_changes()
            && self.pool_share.free == 0
            && self.segments.free_count() <= self.segments_kept(StreamKind::Client) + 1
    }

    /// Does a change wait for room that other shards may have?
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.is_short
    }

    /// Another lane is hungry: a free segment that this one can spare.
    pub fn spare_segment(&mut self) -> Option<SegmentIndex> {
        let kept = self.segments_kept(StreamKind::Client) + 2;
        if self.volumes.is_empty() || self.segments.free_count() > kept {
            self.segments.give_back()
        } else {
            None
        }
    }
}
