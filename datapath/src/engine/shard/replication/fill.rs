//! Bringing a replica back, carried out: the head's node reads and sends, the other one appends.
//!
//! ```text
//!   head ─▶ piece ─▶ own lane reads ─▶ runs of data and of holes ─▶ link ─▶ member cuts out what is newer ─▶ its lane
//! ```
//!
//! Where the head has no replica in sync of its own, another one reads, and it may be the own replica that is filled.
//!
//! One piece is read at a time, whatever there is to copy: clients' reads of the lane wait for no more than that.

use super::super::Shard;
use super::{Leader, Work};
use crate::checksum::crc32c;
use crate::engine::ports::ConnectionId;
use crate::memory::Memory;
use crate::record::{NodeId, Stamp, VolumeNumber};
use crate::replica::bugs::PlantedBug;
use crate::replica::member::Step;
use crate::request::RequestError;
use crate::store::lane::{BlockRange, Completion, Payload};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use crate::wire::peer_message::{CopyHeader, PeerFrame, PeerMessage};

/// What a head wants copied: the first blocks from `block` on that are lacking.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyWish {
    pub(super) member: NodeId,
    pub(super) epoch: u32,
    pub(super) fill: u64,
    pub(super) base: Stamp,
    pub(super) block: u32,
}

/// What is read for it: some blocks of one leaf.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyPiece {
    pub(super) wish: CopyWish,
    pub(super) first: u32,
    pub(super) count: u32,
    /// The holes among them are lacking, whatever is known of each.
    pub(super) holes: bool,
}

/// What comes with a copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyPayload {
    /// The memory whose users are counted.
    pub(super) lender: MemoryRange,
    /// A page for a descriptor, and the blocks.
    pub(super) pages: MemoryRange,
    /// It was read for the own head, which counts it.
    pub(super) is_own: bool,
}

impl<M: Memory> Shard<M> {
    /// A head wants a piece copied. It wants no second one before it has heard of the first.
    pub(super) fn queue_copy(&mut self, index: usize, wish: CopyWish) {
        self.replication.replicas[index].waiting_copy = Some(wish);
        self.start_copy(index);
    }

    /// Reads the piece that waits, once it is known which and there is memory for it.
    pub(super) fn start_copy(&mut self, index: usize) {
        let Some(wish) = self.replication.replicas[index].waiting_copy else { return };
        if self.is_of_an_earlier_fill(index, &wish) {
            // It had waited for memory, and was given up meanwhile.
            self.replication.replicas[index].waiting_copy = None;
            return;
        }
        if !self.knows_what_is_lacking(index, &wish) {
            return;
        }
        let Some(piece) = self.next_lacking(index, wish) else {
            let now = self.now;
            let replica = &mut self.replication.replicas[index];
            replica.waiting_copy = None;
            let end = replica.head.record().size_blocks;
            replica.head.copy_sent(now, wish.member, (wish.epoch, wish.fill), end, 0);
            return self.settle_head(index);
        };
        let served = self.replication.replicas[index].served;
        if self.is_remote(served) {
            self.replication.replicas[index].waiting_copy = None;
            let cookie = self.begin_work(Work::CopyRead { replica: index, piece, memory: None });
            return self.read_elsewhere_for(index, cookie, (piece.first, piece.count));
        }
        let Some(memory) = self.allocate_for_peer(1 + piece.count) else { return };
        self.replication.replicas[index].waiting_copy = None;
        let cookie = self.begin_work(Work::CopyRead { replica: index, piece, memory: Some(memory) });
        let blocks = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        self.read_blocks(served, cookie, (piece.first, piece.count), blocks);
    }

    /// The blocks have come, or cannot be read.
    pub(super) fn finish_copy_read(
        &mut self,
        index: usize,
        piece: CopyPiece,
        memory: Option<MemoryRange>,
        completion: &Completion,
    ) {
        let now = self.now;
        let CopyWish { member, epoch, fill, .. } = piece.wish;
        let to_own = member == self.replication.node();
        let link = self.replication.dials.up(member);
        if completion.result.is_err() || link.is_none() && !to_own {
            self.drop_payload_of_peer(memory);
            self.replication.copies_failed += u64::from(completion.result.is_err());
            self.replication.replicas[index].head.copy_failed(now, member, epoch, fill);
            return self.settle_head(index);
        }
        if let Some(memory) = memory {
            // From now on its users hold it.
            self.replication.peer_pages -= memory.len / BLOCK_BYTES;
            self.use_memory(memory);
        }
        let volume = self.replication.replicas[index].volume;
        let runs = self.lacking_runs(index, &piece, completion, memory);
        let copies = match link.filter(|_| !to_own) {
            Some(link) => self.send_copies(link, volume, piece, memory, &runs),
            None => self.copy_to_own(index, piece, memory, &runs),
        };
        memory.into_iter().for_each(|memory| self.unuse(memory));
        let next_block = u64::from(piece.first) + u64::from(piece.count);
        let head = &mut self.replication.replicas[index].head;
        head.copy_sent(now, member, (epoch, fill), next_block, copies);
        self.settle_head(index);
    }

    /// What of a piece is lacking: runs of data and of holes.
    fn lacking_runs(
        &self,
        index: usize,
        piece: &CopyPiece,
        completion: &Completion,
        memory: Option<MemoryRange>,
    ) -> Vec<CopyHeader> {
        let mut runs: Vec<CopyHeader> = Vec::new();
        // Another replica that read in place of this one has not told which blocks are holes.
        let is_hole = |offset: u32| match (completion.read, memory) {
            (Some(_), _) => completion.holes.is_hole(offset),
            (None, None) => true,
            (None, Some(memory)) => {
                let block = memory.part((1 + offset) * BLOCK_BYTES, BLOCK_BYTES);
                self.memory.bytes(block).iter().all(|byte| *byte == 0)
            }
        };
        for offset in 0..piece.count {
            let (block, data) = (piece.first + offset, !is_hole(offset));
            if !(self.lacks(index, &piece.wish, block) || !data && piece.holes) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.data == data && run.block + run.count == block => run.count += 1,
                _ => runs.push(CopyHeader { data, block, count: 1 }),
            }
        }
        runs
    }

    /// Sends a piece run by run; says how many there were.
    fn send_copies(
        &mut self,
        link: ConnectionId,
        volume: VolumeNumber,
        piece: CopyPiece,
        memory: Option<MemoryRange>,
        runs: &[CopyHeader],
    ) -> u32 {
        let CopyWish { epoch, fill, .. } = piece.wish;
        for copy in runs.iter().copied() {
            let frame = PeerFrame { volume, message: PeerMessage::Copy { epoch, fill, copy } };
            if let Some(memory) = memory.filter(|_| copy.data) {
                let first = copy.block - piece.first;
                let blocks = memory.part((1 + first) * BLOCK_BYTES, copy.count * BLOCK_BYTES);
                let bytes = self.memory.bytes(blocks);
                let checksums: Vec<u32> = bytes.chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect();
                self.send_part(link, frame, &checksums, blocks, memory);
            } else {
                self.send_on_link(link, volume, frame.message);
            }
        }
        u32::try_from(runs.len()).expect("at most a piece")
    }

    /// The own replica is filled by the own head.
    fn copy_to_own(
        &mut self,
        index: usize,
        piece: CopyPiece,
        memory: Option<MemoryRange>,
        runs: &[CopyHeader],
    ) -> u32 {
        let (now, CopyWish { epoch, fill, .. }) = (self.now, piece.wish);
        for copy in runs.iter().copied() {
            let Some(member) = &mut self.replication.replicas[index].member else { break };
            let step = member.handle(now, PeerMessage::Copy { epoch, fill, copy });
            let Step::Copy { fill, runs } = step else { continue };
            let first = copy.block - piece.first;
            // The page in front is not needed: the first one, or a block that is no part of any run.
            let payload = memory.filter(|_| copy.data).map(|lender| {
                let pages = lender.part(first * BLOCK_BYTES, (1 + copy.count) * BLOCK_BYTES);
                CopyPayload { lender, pages, is_own: true }
            });
            self.append_copy(index, Leader::ThisNode, (fill, copy), &runs, payload);
        }
        u32::try_from(runs.len()).expect("at most a piece")
    }

    /// A head fills the replica here: up to the first stamp it has all in common, and its order goes on after the second.
    pub(super) fn begin_fill_here(&mut self, index: usize, fill: u64, stamps: (Stamp, Stamp)) {
        let cookie = self.begin_work(Work::BeginFill { replica: index, fill });
        let served = &self.served[self.replication.replicas[index].served];
        let volume = served.volume;
        self.with_lane(served.lane, |lane, context| lane.restart_order(context, cookie, volume, stamps));
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
        payload: Option<CopyPayload>,
    ) {
        let unused = payload.filter(|payload| !payload.is_own).map(|payload| payload.lender);
        let served = &self.served[self.replication.replicas[index].served];
        let (lane, volume) = (served.lane, served.volume);
        let (bugs, whole) = (self.replication.bugs, [(copy.block, copy.count)]);
        let runs = if bugs.has(PlantedBug::CopyWins) { &whole } else { runs };
        let is_kept = bugs.has(PlantedBug::HolesNotFilled) && !copy.data;
        if self.lies_beyond(index, (copy.block, copy.count)) {
            self.drop_payload_of_peer(unused);
            if let Leader::Link(id, _) = asker {
                self.close_link(id);
            }
            return;
        }
        if runs.is_empty() || is_kept {
            self.drop_payload_of_peer(unused);
            return self.finish_copy(index, fill, true, Ok(()));
        }
        for (position, (block, count)) in runs.iter().copied().enumerate() {
            let last = position + 1 == runs.len();
            let pages = unused.filter(|_| last).map_or(0, |memory| memory.len / BLOCK_BYTES);
            let lent = payload.map(|payload| payload.lender);
            // The page in front of a run is the payload's first, or a block that is not needed.
            let payload = payload.map(|payload| {
                let first = (block - copy.block) * BLOCK_BYTES;
                Payload::Lent(payload.pages.part(first, (1 + count) * BLOCK_BYTES))
            });
            if let Some(memory) = lent {
                self.use_memory(memory);
            }
            let cookie = self.begin_work(Work::Copy { replica: index, fill, last, lent, pages });
            let range = BlockRange { volume, block, count };
            self.with_lane(lane, |lane, context| lane.append_copy(context, cookie, range, payload));
        }
    }

    /// A run of a copy is on stable media, or cannot be appended.
    pub(super) fn finish_copy(
        &mut self,
        index: usize,
        fill: u64,
        last: bool,
        result: Result<(), RequestError>,
    ) {
        if let Err(error) = result {
            return self.append_failed(index, error);
        }
        if let Some(member) = self.replication.replicas[index].member.as_mut().filter(|_| last) {
            member.copy_stored(fill);
        }
        self.answer_leader(index);
    }

    /// The beginning or the end of a fill is on stable media, or cannot be stored.
    pub(super) fn finish_fill_mark(
        &mut self,
        index: usize,
        fill: u64,
        begins: bool,
        result: Result<(), RequestError>,
    ) {
        if let Err(error) = result {
            return self.append_failed(index, error);
        }
        if let Some(member) = &mut self.replication.replicas[index].member {
            if begins { member.fill_stored(fill) } else { member.end_stored(fill) }
        }
        self.answer_leader(index);
    }
}
