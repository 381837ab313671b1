//! What the head's own replica cannot give is read from another one, and written again into the own log.
//!
//! ```text
//!   own lane: damaged ─▶ PeerReads ─▶ link ─▶ member's lane ─▶ link ─┬─▶ memory of whoever reads
//!                                                                    └─▶ own log, as a copy: its damaged blocks only
//! ```
//!
//! Where a leaf of the own map is damaged nothing is written again: nobody knows what it maps, and the log takes no change
//! of its blocks.

use super::super::Shard;
use super::{COOKIE, Leader, Replica, Work};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::record::NodeId;
use crate::replica::bugs::PlantedBug;
use crate::replica::peer_reads::{Answer, Turn};
use crate::request::RequestError;
use crate::store::lane::{BlockBits, BlockRange, BlocksRead, Completion, HoleMap, Payload};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use crate::wire::peer_message::{ChangeHeader, PeerMessage};

/// What a head on another node wants read.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerPiece {
    pub(super) epoch: u32,
    pub(super) read: u64,
    pub(super) block: u32,
    pub(super) count: u32,
}

impl<M: Memory> Shard<M> {
    /// A lane's answer. If it is a damaged read of a volume that is led here, another replica is asked, and true is
    /// returned: the read goes on.
    pub(in crate::engine::shard) fn ask_another_replica(&mut self, completion: &Completion) -> bool {
        let Some(mut blocks) = completion.read else { return false };
        if completion.result.is_ok() && !self.feign_damage(completion, &mut blocks) {
            return false;
        }
        let Some(index) = self.replica_of_read(completion.cookie) else { return false };
        let now = self.now;
        let replica = &mut self.replication.replicas[index];
        if !replica.head.is_serving() {
            return false;
        }
        let read = replica.peer_reads.begin(now, blocks.range.block, blocks.range.count);
        let mut waiting = *completion;
        if self.take_memory_of_work(completion.cookie) {
            // Whatever was read is gone with it.
            blocks.memory = MemoryRange::default();
            waiting.result = Err(RequestError::Io);
        }
        waiting.read = Some(blocks);
        self.replication.replicas[index].damaged_reads.push((read, waiting));
        self.advance_peer_reads(index);
        true
    }

    /// For simulations: takes one in so many reads for damaged though they are good, and one of their blocks.
    pub fn feign_damage_in(&mut self, reads: u32) {
        self.replication.feigns_damage_in = reads;
    }

    pub(super) fn feign_damage(&mut self, completion: &Completion, blocks: &mut BlocksRead) -> bool {
        let in_all = u64::from(self.replication.feigns_damage_in);
        if in_all == 0 || !self.replication.random().is_multiple_of(in_all) {
            return false;
        }
        let data = (0..blocks.range.count).find(|index| !completion.holes.is_hole(*index));
        data.into_iter().for_each(|index| blocks.damaged.set(index));
        true
    }

    /// The replica that a read is for, if it is one of clients or one for copying: those of other heads are theirs to ask
    /// elsewhere.
    fn replica_of_read(&self, cookie: u32) -> Option<usize> {
        if Shard::<M>::is_replication_cookie(cookie) {
            return match self.replication.works.get(cookie & !COOKIE) {
                Work::CopyRead { replica, .. } | Work::LookForNew { replica, .. } => Some(*replica),
                _ => None,
            };
        }
        let task = self.pieces.get(cookie).task;
        let replica = self.served[self.tasks.get(task).export as usize].replica?;
        self.is_of_this_term(task).then_some(replica)
    }

    /// Asks whom to ask, and ends the reads that nobody can answer.
    pub(super) fn advance_peer_reads(&mut self, index: usize) {
        if self.replication.replicas[index].peer_reads.is_empty() {
            return;
        }
        let now = self.now;
        loop {
            let Replica { head, peer_reads, .. } = &mut self.replication.replicas[index];
            let overlaps = |change: &ChangeHeader, block: u32, count: u32| {
                change.block < block + count && block < change.block + change.count
            };
            let turn = peer_reads.turn(
                now,
                &head.others_in_sync(),
                |member| head.is_following(member),
                |block, count| head.pending().any(|change| overlaps(change, block, count)),
            );
            let epoch = head.epoch();
            match turn {
                None => return,
                Some(Turn::Ask { member, read, block, count }) => {
                    self.ask_member(index, member, PeerMessage::Read { epoch, read, block, count });
                }
                Some(Turn::GiveUp { read }) => {
                    self.replication.repairs.reads_without_good_copy += 1;
                    self.end_damaged_read(index, read, |completion| completion);
                }
            }
        }
    }

    /// A member's blocks.
    pub(super) fn blocks_came(
        &mut self,
        index: usize,
        member: NodeId,
        read: u64,
        (block, count): (u32, u32),
        memory: Option<MemoryRange>,
    ) {
        let replica = &mut self.replication.replicas[index];
        let answer = replica.peer_reads.answered(member, read, block, count);
        let Some(Answer { may_repair }) = answer else { return self.drop_payload_of_peer(memory) };
        let known = replica.damaged_reads.iter().find(|(known, _)| *known == read);
        let (_, waiting) = known.expect("kept until it ends");
        let (cookie, blocks) = (waiting.cookie, waiting.read.expect("it says where to"));
        let may_repair = may_repair || self.replication.bugs.has(PlantedBug::RepairOverNewer);
        // Whoever leads another epoch has its changes appended here, and this head does not know them.
        let is_own_log = replica.leader == Leader::ThisNode && replica.member.is_some();
        self.replication.repairs.reads_from_peers += 1;
        let Some(memory) = memory else {
            self.memory.bytes_mut(blocks.memory).fill(0);
            // Where the own replica has zeroes as data, one that was filled may have holes.
            if may_repair && is_own_log {
                self.repair(index, blocks, None);
            }
            let holes = HoleMap::all(count);
            self.end_damaged_read(index, read, |completion| Completion {
                result: Ok(()),
                holes,
                read: Some(BlocksRead { damaged: BlockBits::default(), ..blocks }),
                ..completion
            });
            return self.advance_peer_reads(index);
        };
        if self.give_blocks_to_work(cookie, memory) {
            // What is damaged in the own log is left for whoever reads it next.
            self.end_damaged_read(index, read, |completion| Completion {
                result: Ok(()),
                holes: HoleMap::default(),
                read: None,
                ..completion
            });
            return self.advance_peer_reads(index);
        }
        self.memory.copy(memory.part(BLOCK_BYTES, count * BLOCK_BYTES), blocks.memory);
        // First the own log: whoever reads may be a write that changes a part of the block, and comes behind.
        if may_repair && is_own_log {
            self.repair(index, blocks, Some(memory));
        } else {
            self.give_back_for_peer(memory);
        }
        self.end_damaged_read(index, read, |completion| Completion {
            result: Ok(()),
            holes: HoleMap::default(),
            // Which of them are holes is not known.
            read: None,
            ..completion
        });
        self.advance_peer_reads(index);
    }

    fn end_damaged_read(&mut self, index: usize, read: u64, how: impl FnOnce(Completion) -> Completion) {
        let reads = &mut self.replication.replicas[index].damaged_reads;
        let position = reads.iter().position(|(known, _)| *known == read).expect("kept until it ends");
        let completion = how(reads.swap_remove(position).1);
        self.progress = true;
        if Shard::<M>::is_replication_cookie(completion.cookie) {
            self.finish_work(&completion);
        } else if !self.hold_read(&completion) {
            self.finish_piece(&completion);
        }
    }

    /// The volume is not led here any more.
    pub(super) fn fail_peer_reads(&mut self, index: usize) {
        self.replication.replicas[index].peer_reads.clear();
        while let Some((read, _)) = self.replication.replicas[index].damaged_reads.last() {
            let read = *read;
            self.end_damaged_read(index, read, |completion| Completion {
                result: Err(RequestError::ShuttingDown),
                ..completion
            });
        }
    }

    /// Appends the damaged blocks to the own log, as zeroes if nothing came with them. They are what the volume holds there after every change that the log has
    /// or is given, up to the next change of these blocks, which will come behind them.
    fn repair(&mut self, index: usize, blocks: BlocksRead, memory: Option<MemoryRange>) {
        let BlockRange { volume, block, .. } = blocks.range;
        let lane = self.served[self.replication.replicas[index].served].lane;
        let runs = blocks.damaged.runs();
        if runs.is_empty() {
            return self.drop_payload_of_peer(memory);
        }
        for (position, (first, count)) in runs.iter().copied().enumerate() {
            let last = position + 1 == runs.len();
            let pages = memory.filter(|_| last).map_or(0, |memory| memory.len / BLOCK_BYTES);
            // The page in front of a run is the payload's first, or a block that is good here.
            let payload = memory
                .map(|memory| Payload::Lent(memory.part(first * BLOCK_BYTES, (1 + count) * BLOCK_BYTES)));
            memory.into_iter().for_each(|memory| self.use_memory(memory));
            let cookie = self.begin_work(Work::Repair { replica: index, blocks: count, lent: memory, pages });
            let range = BlockRange { volume, block: block + first, count };
            self.with_lane(lane, |lane, context| lane.append_copy(context, cookie, range, payload));
        }
    }

    /// A head on another node cannot read these blocks.
    pub(super) fn read_for_head(&mut self, index: usize, leader: Leader, read: PeerPiece) {
        let served = &self.served[self.replication.replicas[index].served];
        let (lane, volume) = (served.lane, served.volume);
        if self.lies_beyond(index, (read.block, read.count)) {
            if let Leader::Link(id, _) = leader {
                self.close_link(id);
            }
            return;
        }
        // Without memory the head hears nothing, and asks another.
        let Some(memory) = self.allocate_for_peer(1 + read.count) else { return };
        let cookie = self.begin_work(Work::ReadForHead { replica: index, read, memory, leader });
        let range = BlockRange { volume, block: read.block, count: read.count };
        let blocks = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        self.with_lane(lane, |lane, context| lane.read(context, cookie, range, blocks));
    }

    /// The lane has read them, or cannot either.
    pub(super) fn finish_read_for_head(
        &mut self,
        index: usize,
        piece: PeerPiece,
        memory: MemoryRange,
        leader: Leader,
        completion: &Completion,
    ) {
        let PeerPiece { epoch, read, block, count } = piece;
        let Leader::Link(id, generation) = leader else { unreachable!("a head does not ask its own member") };
        if completion.result.is_err() {
            self.give_back_for_peer(memory);
            return self.send_answer(index, leader, PeerMessage::Unreadable { epoch, read });
        }
        if completion.holes == HoleMap::all(count) {
            self.give_back_for_peer(memory);
            return self.send_answer(index, leader, PeerMessage::Holes { epoch, read, block, count });
        }
        let blocks = self.memory.bytes(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES));
        let checksums: Vec<u32> = blocks.chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect();
        let message = PeerMessage::Blocks { epoch, read, block, count };
        self.send_fetched((id, generation), index, message, &checksums, Some(memory));
    }
}
