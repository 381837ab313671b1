//! TRIM and WRITE_ZEROES: descriptors where whole blocks are concerned, writes at the edges.

use super::Shard;
use super::share::Purpose;
use super::task::{PIECES_PER_TASK_MAX, PieceKind};
use super::write::WritePiece;
use crate::engine::region_locks::RegionClaim;
use crate::limits::PIECE_BYTES_MAX;
use crate::memory::Memory;
use crate::record::ChangeKind;
use crate::request::Operation;
use crate::store::lane::{BlockRange, Release};
use crate::store::map::LEAF_BLOCKS;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

impl<M: Memory> Shard<M> {
    /// Releases the whole blocks of the range, a leaf's worth at a time. With `zero` the bytes of blocks that are
    /// cut by the range become zeroes too; a trim leaves them as they are.
    pub(super) fn advance_release(&mut self, task: u32, zero: bool) {
        loop {
            let state = self.tasks.get(task);
            let request = state.request;
            if state.begun_bytes >= request.length_bytes || state.pieces >= PIECES_PER_TASK_MAX {
                return;
            }
            let start = request.offset_bytes + state.begun_bytes;
            let end = request.offset_bytes + request.length_bytes;
            let cut = !start.is_multiple_of(BLOCK_BYTES_U64) || end - start < BLOCK_BYTES_U64;
            let (stop, is_stored) = if cut {
                (end.min((start / BLOCK_BYTES_U64 + 1) * BLOCK_BYTES_U64), zero)
            } else {
                self.next_release(task, start, end)
            };
            if cut && is_stored {
                if !self.begin_zero_piece(task, start, stop) {
                    return self.wait_task(task);
                }
                continue;
            }
            self.tasks.get_mut(task).begun_bytes = stop - request.offset_bytes;
            if is_stored {
                self.begin_release(task, start, stop);
            }
        }
    }

    /// How far one piece goes: to the end of a leaf that holds something, or over all leaves that hold nothing.
    fn next_release(&self, task: u32, start: u64, end: u64) -> (u64, bool) {
        let leaf_bytes = u64::from(LEAF_BLOCKS) * BLOCK_BYTES_U64;
        let whole_end = end / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        let leaf = u32::try_from(start / leaf_bytes).expect("leaves fit 32 bits");
        let last = u32::try_from(whole_end.div_ceil(leaf_bytes)).expect("leaves fit 32 bits");
        let lane = &self.lanes[self.lane_of(task)].lane;
        let one_leaf = whole_end.min((u64::from(leaf) + 1) * leaf_bytes);
        if self.is_remote(self.tasks.get(task).export as usize) {
            return (one_leaf, true);
        }
        let stop = match lane.map().table(self.volume_of(task)).next_present(leaf, last) {
            Some(present) if present == leaf => return (one_leaf, true),
            Some(present) => whole_end.min(u64::from(present) * leaf_bytes),
            None => whole_end,
        };
        // Somebody else may have written there since this node was the head.
        if self.is_known_now(task, start, stop) { (stop, false) } else { (one_leaf, true) }
    }

    fn begin_release(&mut self, task: u32, start: u64, stop: u64) {
        let block = u32::try_from(start / BLOCK_BYTES_U64).expect("volumes have fewer blocks");
        let count = u32::try_from((stop - start) / BLOCK_BYTES_U64).expect("at most a leaf");
        let claim = RegionClaim { block, count, exclusive: false };
        let piece = self.begin_piece(task, PieceKind::Release(claim));
        let export = self.tasks.get(task).export as usize;
        if self.served[export].locks.acquire(piece, claim) {
            self.start_release(piece, claim);
        }
    }

    /// The range is locked.
    pub(super) fn start_release(&mut self, piece: u32, claim: RegionClaim) {
        let task = self.pieces.get(piece).task;
        if let Some(error) = self.tasks.get(task).error {
            // While it waited for the lock the request has failed.
            return self.finish_later(piece, Err(error));
        }
        let (why, durable) = match self.tasks.get(task).request.operation {
            Operation::Trim { durable } => (Release::Trim, durable),
            Operation::WriteZeroes { durable, .. } => (Release::Zero, durable),
            _ => unreachable!("only trims and zeroes release"),
        };
        let range = BlockRange { volume: self.volume_of(task), block: claim.block, count: claim.count };
        if let Some(replica) = self.served[self.tasks.get(task).export as usize].replica {
            let kind = if why == Release::Trim { ChangeKind::Trim } else { ChangeKind::Zero };
            return self.submit_change(replica, piece, kind, (claim.block, claim.count), None);
        }
        let lane = self.lane_of(task);
        self.with_lane(lane, |lane, context| lane.release(context, piece, range, why, durable));
    }

    /// WRITE_ZEROES that must stay provisioned: zeroes are written like any data.
    pub(super) fn advance_zeroes(&mut self, task: u32) {
        loop {
            let state = self.tasks.get(task);
            let request = state.request;
            if state.begun_bytes >= request.length_bytes || state.pieces >= PIECES_PER_TASK_MAX {
                return;
            }
            let start = request.offset_bytes + state.begun_bytes;
            let end = request.offset_bytes + request.length_bytes;
            let piece = u64::from(PIECE_BYTES_MAX);
            let stop = end.min((start / piece + 1) * piece);
            if !self.begin_zero_piece(task, start, stop) {
                return self.wait_task(task);
            }
        }
    }

    fn begin_zero_piece(&mut self, task: u32, start: u64, stop: u64) -> bool {
        let length = u32::try_from(stop - start).expect("at most a piece");
        let mut write = WritePiece::covering(start, length);
        let Some(memory) = self.allocate(task, write.memory_pages(), Purpose::Write) else { return false };
        write.give_memory(memory);
        self.memory.bytes_mut(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES)).fill(0);
        self.tasks.get_mut(task).begun_bytes += u64::from(length);
        self.begin_write(task, write);
        true
    }
}
