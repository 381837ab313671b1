//! BLOCK_STATUS: which parts of a range hold data.

use super::Shard;
use super::task::PieceKind;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::memory::Memory;
use crate::request::{Extent, RequestError};
use crate::store::layout::Place;
use crate::store::map::LEAF_BLOCKS;
use crate::units::BLOCK_BYTES_U64;

/// Leaves that one status looks at before others have their turn.
const LEAVES_PER_TURN: u32 = 64;
const LEAF_BYTES: u64 = LEAF_BLOCKS as u64 * BLOCK_BYTES_U64;

impl<M: Memory> Shard<M> {
    /// Describes leaf after leaf, until the range or the extents are used up. A leaf that is away is loaded first.
    pub(super) fn advance_status(&mut self, task: u32, one_extent: bool) {
        if self.is_remote(self.tasks.get(task).export as usize) {
            // Where it is not known that there is a hole, there may be data.
            let length_bytes = self.tasks.get(task).request.length_bytes;
            return self.add_extent(task, length_bytes, false);
        }
        if self.lanes[self.lane_of(task)].lane.must_not_be_shown() {
            return self.fail_task(task, RequestError::Io);
        }
        for _ in 0..LEAVES_PER_TURN {
            let state = self.tasks.get(task);
            let request = state.request;
            let start = request.offset_bytes + state.begun_bytes;
            let end = request.offset_bytes + request.length_bytes;
            let enough = state.extents.len() > if one_extent { 1 } else { STATUS_EXTENTS_MAX };
            if start >= end || enough {
                self.tasks.get_mut(task).begun_bytes = request.length_bytes;
                return;
            }
            if state.pieces > 0 || !self.describe_leaf(task, start, end) {
                return;
            }
        }
        self.wait_task(task);
    }

    fn describe_leaf(&mut self, task: u32, start: u64, end: u64) -> bool {
        let (lane, volume) = (self.lane_of(task), self.volume_of(task));
        let leaf = u32::try_from(start / LEAF_BYTES).expect("leaves fit 32 bits");
        let last = u32::try_from(end.div_ceil(LEAF_BYTES)).expect("leaves fit 32 bits");
        let present = self.lanes[lane].lane.map().table(volume).next_present(leaf, last);
        if present != Some(leaf) {
            let stop = present.map_or(end, |present| u64::from(present) * LEAF_BYTES);
            let stop = stop.min(end);
            self.add_extent(task, stop - start, self.is_known_now(task, start, stop));
            return true;
        }
        let piece = self.begin_piece(task, PieceKind::Plain);
        let here = self.with_lane(lane, |lane, context| lane.want_leaf(context, piece, volume, leaf));
        let Some(frame) = here else { return false };
        self.end_piece(piece);
        let stop = end.min((u64::from(leaf) + 1) * LEAF_BYTES);
        // A hole is a promise that it reads as zeroes; data promises nothing.
        let is_known = self.is_known_now(task, start, stop);
        let Some(frame) = frame else {
            self.add_extent(task, stop - start, is_known);
            return true;
        };
        let mut at = start;
        while at < stop {
            let block = u32::try_from(at / BLOCK_BYTES_U64 % u64::from(LEAF_BLOCKS)).expect("below a leaf");
            let next = stop.min((at / BLOCK_BYTES_U64 + 1) * BLOCK_BYTES_U64);
            let hole = self.lanes[lane].lane.mapping(frame, block).place == Place::NONE && is_known;
            self.add_extent(task, next - at, hole);
            at = next;
        }
        true
    }

    fn add_extent(&mut self, task: u32, length_bytes: u64, hole: bool) {
        let state = self.tasks.get_mut(task);
        state.begun_bytes += length_bytes;
        match state.extents.last_mut() {
            Some(last) if last.hole == hole => last.length_bytes += length_bytes,
            _ => state.extents.push(Extent { length_bytes, hole }),
        }
    }
}
