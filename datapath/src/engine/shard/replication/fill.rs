//! Bringing a replica back, carried out: the head's node reads and sends, the other one appends.
//!
//! ```text
//!   head ─▶ piece ─▶ own lane reads ─▶ runs of data and of holes ─▶ link ─▶ member cuts out what is newer ─▶ its lane
//! ```
//!
//! One piece is read at a time, whatever there is to copy: clients' reads of the lane wait for no more than that.

use super::super::Shard;
use super::{Leader, Work};
use crate::checksum::crc32c;
use crate::engine::ports::ConnectionId;
use crate::memory::Memory;
use crate::record::{NodeId, Stamp, VolumeNumber};
use crate::replica::bugs::PlantedBug;
use crate::store::lane::{BlockRange, Completion, HoleMap, Payload};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use crate::wire::peer_message::{CopyHeader, PeerFrame, PeerMessage};

/// What a head wants copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyPiece {
    pub(super) member: NodeId,
    pub(super) epoch: u32,
    pub(super) fill: u64,
    pub(super) block: u32,
    pub(super) count: u32,
}

impl<M: Memory> Shard<M> {
    /// A head wants a piece copied. It wants no second one before it has heard of the first.
    pub(super) fn queue_copy(&mut self, index: usize, piece: CopyPiece) {
        self.replication.replicas[index].waiting_copy = Some(piece);
        self.start_copy(index);
    }

    /// Reads the piece that waits, once there is memory for it.
    pub(super) fn start_copy(&mut self, index: usize) {
        let Some(piece) = self.replication.replicas[index].waiting_copy else { return };
        let Some(memory) = self.allocate_for_peer(1 + piece.count) else { return };
        self.replication.replicas[index].waiting_copy = None;
        let cookie = self.begin_work(Work::CopyRead { replica: index, piece, memory });
        let served = &self.served[self.replication.replicas[index].served];
        let range = BlockRange { volume: served.volume, block: piece.block, count: piece.count };
        let blocks = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        self.with_lane(served.lane, |lane, context| lane.read(context, cookie, range, blocks));
    }

    /// The own replica's blocks have come, or cannot be read.
    pub(super) fn finish_copy_read(
        &mut self,
        index: usize,
        piece: CopyPiece,
        memory: MemoryRange,
        completion: &Completion,
    ) {
        let now = self.now;
        let CopyPiece { member, epoch, fill, .. } = piece;
        let link = self.replication.dials.up(member).filter(|_| completion.result.is_ok());
        let Some(link) = link else {
            self.give_back_for_peer(memory);
            self.replication.copies_failed += u64::from(completion.result.is_err());
            self.replication.replicas[index].head.copy_failed(now, member, epoch, fill);
            return self.settle_head(index);
        };
        // From now on its users hold it.
        self.replication.peer_pages -= memory.len / BLOCK_BYTES;
        self.use_memory(memory);
        let volume = self.replication.replicas[index].volume;
        let copies = self.send_copies(link, volume, piece, memory, &completion.holes);
        self.unuse(memory);
        self.replication.replicas[index].head.copy_sent(now, member, epoch, fill, copies);
        self.settle_head(index);
    }

    /// Sends a piece run by run; says how many there were.
    fn send_copies(
        &mut self,
        link: ConnectionId,
        volume: VolumeNumber,
        piece: CopyPiece,
        memory: MemoryRange,
        holes: &HoleMap,
    ) -> u32 {
        let CopyPiece { epoch, fill, .. } = piece;
        let (mut first, mut copies) = (0, 0);
        while first < piece.count {
            let data = !holes.is_hole(first);
            let end = (first..piece.count).find(|index| holes.is_hole(*index) == data).unwrap_or(piece.count);
            let copy = CopyHeader { data, block: piece.block + first, count: end - first };
            let frame = PeerFrame { volume, message: PeerMessage::Copy { epoch, fill, copy } };
            if data {
                let blocks = memory.part((1 + first) * BLOCK_BYTES, copy.count * BLOCK_BYTES);
                let bytes = self.memory.bytes(blocks);
                let checksums: Vec<u32> = bytes.chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect();
                self.send_part(link, frame, &checksums, blocks, memory);
            } else {
                self.send_on_link(link, volume, frame.message);
            }
            (first, copies) = (end, copies + 1);
        }
        copies
    }

    /// A head fills the replica here: its order goes on after `after`.
    pub(super) fn begin_fill_here(&mut self, index: usize, fill: u64, after: Stamp) {
        let cookie = self.begin_work(Work::BeginFill { replica: index, fill });
        let served = &self.served[self.replication.replicas[index].served];
        let volume = served.volume;
        self.with_lane(served.lane, |lane, context| lane.restart_order(context, cookie, volume, after));
    }

    /// That was all.
    pub(super) fn end_fill_here(&mut self, index: usize, fill: u64) {
        let cookie = self.begin_work(Work::EndFill { replica: index, fill });
        let served = &self.served[self.replication.replicas[index].served];
        let volume = served.volume;
        self.with_lane(served.lane, |lane, context| lane.end_filling(context, cookie, volume));
    }

    /// Appends what live changes have left of a copy.
    pub(super) fn append_copy(
        &mut self,
        index: usize,
        asker: Leader,
        (fill, copy): (u64, CopyHeader),
        runs: &[(u32, u32)],
        memory: Option<MemoryRange>,
    ) {
        let served = &self.served[self.replication.replicas[index].served];
        let (lane, volume) = (served.lane, served.volume);
        let size_blocks = self.lanes[lane].lane.volumes()[volume as usize].size_blocks();
        let (bugs, whole) = (self.replication.bugs, [(copy.block, copy.count)]);
        let runs = if bugs.has(PlantedBug::CopyWins) { &whole } else { runs };
        let held = BlockRange { volume, block: copy.block, count: copy.count };
        let is_kept = bugs.has(PlantedBug::HolesNotFilled) && !copy.data
            || bugs.has(PlantedBug::SurplusKept) && self.lanes[lane].lane.holds_all(held);
        if u64::from(copy.block) + u64::from(copy.count) > size_blocks {
            self.drop_payload_of_peer(memory);
            if let Leader::Link(id, _) = asker {
                self.close_link(id);
            }
            return;
        }
        if runs.is_empty() || is_kept {
            self.drop_payload_of_peer(memory);
            return self.finish_copy(index, fill, true, true);
        }
        for (position, (block, count)) in runs.iter().copied().enumerate() {
            let last = position + 1 == runs.len();
            let pages = memory.filter(|_| last).map_or(0, |memory| memory.len / BLOCK_BYTES);
            // The page in front of a run is the payload's first, or a block that is not needed.
            let payload = memory.map(|memory| {
                Payload::Lent(memory.part((block - copy.block) * BLOCK_BYTES, (1 + count) * BLOCK_BYTES))
            });
            if let Some(memory) = memory {
                self.use_memory(memory);
            }
            let cookie = self.begin_work(Work::Copy { replica: index, fill, last, lent: memory, pages });
            let range = BlockRange { volume, block, count };
            self.with_lane(lane, |lane, context| lane.append_copy(context, cookie, range, payload));
        }
    }

    /// A run of a copy is on stable media, or cannot be appended.
    pub(super) fn finish_copy(&mut self, index: usize, fill: u64, last: bool, good: bool) {
        if !good {
            return self.fail_member(index);
        }
        if let Some(member) = self.replication.replicas[index].member.as_mut().filter(|_| last) {
            member.copy_stored(fill);
        }
        self.answer_leader(index);
    }

    /// The beginning or the end of a fill is on stable media, or cannot be stored.
    pub(super) fn finish_fill_mark(&mut self, index: usize, fill: u64, begins: bool, good: bool) {
        if !good {
            return self.fail_member(index);
        }
        if let Some(member) = &mut self.replication.replicas[index].member {
            if begins { member.fill_stored(fill) } else { member.end_stored(fill) }
        }
        self.answer_leader(index);
    }
}
