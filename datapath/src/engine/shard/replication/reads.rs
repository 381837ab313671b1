//! Reads of a replicated volume: answered only with what is committed, and only with everybody's leave.
//!
//! The lane shows a change as soon as it is on this node's media, which is before it is committed. A read that may have
//! seen one waits until that is: every change not committed when the read ends counts. Then either content is right.

use super::super::Shard;
use super::super::read::blocks_of;
use super::super::task::PieceKind;
use crate::memory::Memory;
use crate::replica::bugs::PlantedBug;
use crate::request::RequestError;
use crate::store::lane::Completion;
use crate::units::{BLOCK_BYTES_U64, Moment};
use crate::wire::peer_message::ChangeHeader;

/// A read that waits, and the last change that it may have seen.
#[derive(Debug)]
pub(super) struct HeldRead {
    completion: Completion,
    until: u64,
}

impl<M: Memory> Shard<M> {
    /// Keeps the end of a read that may not be answered yet. True if it was kept.
    pub(in crate::engine::shard) fn hold_read(&mut self, completion: &Completion) -> bool {
        let piece = self.pieces.get(completion.cookie);
        let served = self.tasks.get(piece.task).export as usize;
        let (Some(replica), PieceKind::Read(read)) = (self.served[served].replica, piece.kind) else {
            return false;
        };
        if !self.is_of_this_term(piece.task) {
            // There may be no head here any more that could say when to answer.
            self.finish_later(completion.cookie, Err(RequestError::ShuttingDown));
            return true;
        }
        let head = &self.replication.replicas[replica].head;
        let (block, count) = blocks_of(read.offset_bytes, read.length_bytes);
        let overlaps = |first: u32, length: u32| first < block + count && block < first + length;
        let overlapping = head.pending().filter(|change| overlaps(change.block, change.count));
        let until = overlapping.last().map_or(0, |change| change.stamp.sequence);
        let until = if self.replication.bugs.has(PlantedBug::ReadBeforeCommit) { 0 } else { until };
        if completion.result.is_err() || head.committed() >= until && head.may_read(self.clock_for_leases()) {
            return false;
        }
        self.replication.replicas[replica].held.push(HeldRead { completion: *completion, until });
        true
    }

    /// Is what the lane says of these blocks what the volume holds now? Where it is not known, nothing may be told or
    /// left undone because of it.
    pub(in crate::engine::shard) fn is_known_now(&self, task: u32, start_bytes: u64, end_bytes: u64) -> bool {
        let Some(replica) = self.served[self.tasks.get(task).export as usize].replica else { return true };
        let head = &self.replication.replicas[replica].head;
        let overlaps = |change: &ChangeHeader| {
            let first = u64::from(change.block) * BLOCK_BYTES_U64;
            first < end_bytes && start_bytes < first + u64::from(change.count) * BLOCK_BYTES_U64
        };
        self.is_of_this_term(task) && head.may_read(self.clock_for_leases()) && !head.pending().any(overlaps)
    }

    /// Read after the last event that is handled: whatever was read from the own replica, was read before.
    fn clock_for_leases(&self) -> Moment {
        if self.replication.bugs.has(PlantedBug::StaleClock) {
            self.replication.stale_clock
        } else {
            self.now
        }
    }

    /// Looks at held reads again.
    pub(super) fn answer_held(&mut self, index: usize) {
        let now = self.clock_for_leases();
        let replica = &mut self.replication.replicas[index];
        if replica.held.is_empty() || !replica.head.may_read(now) {
            return;
        }
        let committed = replica.head.committed();
        let ready: Vec<HeldRead> = replica.held.extract_if(.., |held| held.until <= committed).collect();
        for HeldRead { completion, .. } in ready {
            self.progress = true;
            self.finish_piece(&completion);
        }
    }

    /// The volume is not led here any more: nobody knows what it holds now.
    pub(super) fn fail_held(&mut self, index: usize) {
        for held in std::mem::take(&mut self.replication.replicas[index].held) {
            let result = Err(RequestError::ShuttingDown);
            self.finish_piece(&Completion { result, ..held.completion });
        }
    }
}
