//! WRITE: pieces under a range lock, with a read of the edges where they cut a block.

use super::Shard;
use super::payload::payload_bytes;
use super::share::Purpose;
use super::task::PieceKind;
use crate::engine::region_locks::RegionClaim;
use crate::memory::Memory;
use crate::record::ChangeKind;
use crate::request::{Operation, RequestError};
use crate::store::lane::{BlockRange, OwnedPayload};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64, MemoryRange};

/// What a piece of a write waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its range lock, or nothing yet.
    Waiting,
    /// The old content of its edge blocks.
    Edges { left: u32 },
    /// The lane; its memory is the lane's.
    Writing,
}

/// A part of a write, at most 1 MiB and within two leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct WritePiece {
    start_bytes: u64,
    length_bytes: u32,
    block: u32,
    count: u32,
    /// A page for the descriptor, the blocks, and two pages for old edges if there are cut blocks.
    memory: MemoryRange,
    stage: Stage,
}

impl WritePiece {
    /// Whole blocks whose payload is somewhere else.
    pub(super) fn whole_blocks(block: u32, count: u32) -> WritePiece {
        let start_bytes = u64::from(block) * BLOCK_BYTES_U64;
        let (length_bytes, memory) = (count * BLOCK_BYTES, MemoryRange::default());
        WritePiece { start_bytes, length_bytes, block, count, memory, stage: Stage::Writing }
    }

    /// The blocks that a range of bytes touches.
    pub(super) fn covering(start_bytes: u64, length_bytes: u32) -> WritePiece {
        let block = start_bytes / BLOCK_BYTES_U64;
        let end = (start_bytes + u64::from(length_bytes)).div_ceil(BLOCK_BYTES_U64);
        WritePiece {
            start_bytes,
            length_bytes,
            block: u32::try_from(block).expect("volumes have fewer blocks"),
            count: u32::try_from(end - block).expect("at most a piece"),
            memory: MemoryRange::default(),
            stage: Stage::Waiting,
        }
    }

    fn is_cut(&self) -> bool {
        !(self.start_bytes | u64::from(self.length_bytes)).is_multiple_of(BLOCK_BYTES_U64)
    }

    /// How it locks its range: alone, if old content must be kept around it.
    pub(super) fn claim(&self) -> RegionClaim {
        RegionClaim { block: self.block, count: self.count, exclusive: self.is_cut() }
    }

    pub(super) fn memory_pages(&self) -> u32 {
        1 + self.count + if self.is_cut() { 2 } else { 0 }
    }

    pub(super) fn give_memory(&mut self, memory: MemoryRange) {
        assert_eq!(memory.len, self.memory_pages() * BLOCK_BYTES);
        self.memory = memory;
    }

    pub(super) fn memory(&self) -> MemoryRange {
        self.memory
    }

    /// Where the client's bytes go.
    pub(super) fn payload_bytes(&self) -> MemoryRange {
        payload_bytes(self.memory, self.start_bytes, self.length_bytes)
    }

    /// The descriptor's page and the blocks.
    fn to_write(self) -> MemoryRange {
        self.memory.part(0, (1 + self.count) * BLOCK_BYTES)
    }

    fn edge(self, index: u32) -> MemoryRange {
        self.memory.part((1 + self.count + index) * BLOCK_BYTES, BLOCK_BYTES)
    }

    /// Does the first block keep old bytes in front, the last one behind?
    fn cut_edges(self) -> (bool, bool) {
        let end = self.start_bytes + u64::from(self.length_bytes);
        (!self.start_bytes.is_multiple_of(BLOCK_BYTES_U64), !end.is_multiple_of(BLOCK_BYTES_U64))
    }
}

impl<M: Memory> Shard<M> {
    /// All bytes of a piece are in its memory.
    pub(super) fn begin_write(&mut self, task: u32, write: WritePiece) {
        let piece = self.begin_piece(task, PieceKind::Write(write));
        let export = self.tasks.get(task).export as usize;
        if self.served[export].locks.acquire(piece, write.claim()) {
            self.start_write(piece);
        }
    }

    /// The range is locked: fetch the edges, or write.
    pub(super) fn start_write(&mut self, piece: u32) {
        let PieceKind::Write(write) = self.pieces.get(piece).kind else {
            unreachable!("a write holds the lock")
        };
        if let Some(error) = self.tasks.get(self.pieces.get(piece).task).error {
            // While it waited for the lock the request has failed.
            self.pages.release(write.memory);
            self.set_stage(piece, Stage::Writing);
            return self.finish_later(piece, Err(error));
        }
        let (front, back) = write.cut_edges();
        let one_block = write.count == 1;
        let mut edges = Vec::with_capacity(2);
        if front || (one_block && back) {
            edges.push((write.block, write.edge(0)));
        }
        if back && !one_block {
            edges.push((write.block + write.count - 1, write.edge(1)));
        }
        if edges.is_empty() {
            return self.hand_to_lane(piece);
        }
        let left = u32::try_from(edges.len()).expect("two at most");
        self.set_stage(piece, Stage::Edges { left });
        let task = self.pieces.get(piece).task;
        let served = self.tasks.get(task).export as usize;
        for (block, memory) in edges {
            self.read_blocks(served, piece, (block, 1), memory);
        }
    }

    fn set_stage(&mut self, piece: u32, stage: Stage) {
        let PieceKind::Write(write) = &mut self.pieces.get_mut(piece).kind else { unreachable!("a write") };
        write.stage = stage;
    }

    /// A step of the piece has ended. True when that was the last.
    pub(super) fn finish_write_step(
        &mut self,
        piece: u32,
        write: WritePiece,
        result: Result<(), RequestError>,
    ) -> bool {
        let task = self.pieces.get(piece).task;
        match write.stage {
            Stage::Waiting => unreachable!("nothing was asked of the lane"),
            Stage::Edges { left } if left > 1 => {
                self.set_stage(piece, Stage::Edges { left: left - 1 });
                false
            }
            Stage::Edges { .. } if result.is_err() || self.tasks.get(task).error.is_some() => {
                self.give_back(task, write.memory, Purpose::Write);
                self.unlock(self.tasks.get(task).export, write.claim());
                true
            }
            Stage::Edges { .. } => {
                self.merge_edges(write);
                self.hand_to_lane(piece);
                false
            }
            Stage::Writing => {
                // The lane, or the last user of a replicated change, gives the memory back.
                self.note_given_back(task, write.memory.len, Purpose::Write);
                self.unlock(self.tasks.get(task).export, write.claim());
                true
            }
        }
    }

    /// Puts the old bytes around the new ones.
    fn merge_edges(&mut self, write: WritePiece) {
        let (front, back) = write.cut_edges();
        let blocks = write.to_write().part(BLOCK_BYTES, write.count * BLOCK_BYTES);
        let new = write.payload_bytes();
        if front {
            let kept = new.start - blocks.start;
            self.memory.copy(write.edge(0).part(0, kept), blocks.part(0, kept));
        }
        if back {
            let kept = blocks.end() - new.end();
            let old = write.edge(u32::from(write.count > 1));
            self.memory.copy(old.part(BLOCK_BYTES - kept, kept), blocks.part(blocks.len - kept, kept));
        }
    }

    fn hand_to_lane(&mut self, piece: u32) {
        let PieceKind::Write(write) = self.pieces.get(piece).kind else { unreachable!("a write") };
        self.set_stage(piece, Stage::Writing);
        let task = self.pieces.get(piece).task;
        let (Operation::Write { durable } | Operation::WriteZeroes { durable, .. }) =
            self.tasks.get(task).request.operation
        else {
            unreachable!("only writes write")
        };
        let whole = write.to_write();
        if write.is_cut() {
            self.pages.release(write.memory.part(whole.len, write.memory.len - whole.len));
        }
        let range = BlockRange { volume: self.volume_of(task), block: write.block, count: write.count };
        if let Some(replica) = self.served[self.tasks.get(task).export as usize].replica {
            let blocks = (range.block, range.count);
            return self.submit_change(replica, piece, ChangeKind::Data, blocks, Some(whole));
        }
        let lane = self.lane_of(task);
        self.with_lane(lane, |lane, context| {
            lane.write(context, piece, range, OwnedPayload { whole }, durable);
        });
    }
}
