//! A head whose node has no replica in sync of its own: it reads from those that have one.
//!
//! ```text
//!   the volume is attached here ─▶ head ─┬─ own replica in sync: its lane reads
//!                                        └─ none: a question to a member, as where the own replica is damaged
//! ```
//!
//! The node knows such a volume like one that it is going to have a replica of: its lane has an empty one, which nobody asks
//! for anything until the record names it.
//!
//! Nothing is known here of the volume's map. So whatever depends on holes goes by what members say, or does without: a write
//! counts as taking new blocks until a member has shown that there is something to overwrite, a trim is numbered leaf by leaf,
//! and BLOCK_STATUS calls everything data.

use super::super::Shard;
use super::{COOKIE, Replica, Work};
use crate::memory::Memory;
use crate::record::NodeId;
use crate::replica::bugs::{Bugs, PlantedBug};
use crate::request::RequestError;
use crate::store::lane::{BlockBits, BlockRange, BlocksRead, Completion, HoleMap};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};

impl Replica {
    /// Does this node's replica hold all that is committed, so that the head here may read from it?
    pub(super) fn reads_here(&self, node: NodeId, bugs: Bugs) -> bool {
        let is_there = bugs.has(PlantedBug::ReadsOwnStale) && self.head.record().has_replica(node);
        self.member.is_some() && (is_there || self.head.record().is_in_sync(node))
    }

    /// Is the volume to be led here, whatever replica the node has?
    pub(super) fn is_attached_here(&self, node: NodeId) -> bool {
        self.head.record().attached == Some(node)
    }

    /// Has the node anything to do with the volume?
    pub(super) fn is_named(&self, node: NodeId) -> bool {
        self.is_attached_here(node) || self.head.record().has_replica(node)
    }
}

impl<M: Memory> Shard<M> {
    /// Is nothing of the served volume in its lane here?
    pub(in crate::engine::shard) fn is_remote(&self, served: usize) -> bool {
        let replica = self.served[served].replica.map(|index| &self.replication.replicas[index]);
        replica.is_some_and(|replica| !replica.reads_here(self.replication.node(), self.replication.bugs))
    }

    /// A head without a replica in sync leads for as long as the volume is attached here, or somebody uses it. And what the
    /// node has nothing to do with any more, it gives up.
    pub(super) fn let_go_if_unwanted(&mut self, index: usize) {
        let (now, node) = (self.now, self.replication.node());
        let replica = &mut self.replication.replicas[index];
        let is_used = self.served[replica.served].connections > 0;
        let is_remote = !replica.head.record().is_in_sync(node);
        if replica.head.is_serving() && is_remote && !replica.is_attached_here(node) && !is_used {
            replica.head.release(now);
            self.settle_head(index);
        }
        self.depart_if_unnamed(index);
    }

    /// Reads blocks of a served volume, wherever they are.
    pub(in crate::engine::shard) fn read_blocks(
        &mut self,
        served: usize,
        cookie: u32,
        (block, count): (u32, u32),
        memory: MemoryRange,
    ) {
        let (lane, volume) = (self.served[served].lane, self.served[served].volume);
        let range = BlockRange { volume, block, count };
        match self.served[served].replica.filter(|_| self.is_remote(served)) {
            Some(index) => self.read_elsewhere(index, cookie, range, memory),
            None => self.with_lane(lane, |lane, context| lane.read(context, cookie, range, memory)),
        }
    }

    /// It ends like a read of a lane, but not within this call.
    fn read_elsewhere(&mut self, index: usize, cookie: u32, range: BlockRange, memory: MemoryRange) {
        let now = self.now;
        let replica = &mut self.replication.replicas[index];
        self.progress = true;
        if !replica.head.is_serving() {
            assert!(!Shard::<M>::is_replication_cookie(cookie), "only a head reads for others");
            return self.finish_later(cookie, Err(RequestError::ShuttingDown));
        }
        let read = replica.peer_reads.begin_elsewhere(now, range.block, range.count);
        let blocks = BlocksRead { range, memory, damaged: BlockBits::default() };
        let result = Err(RequestError::Io);
        let completion = Completion { cookie, result, holes: HoleMap::default(), read: Some(blocks) };
        replica.damaged_reads.push((read, completion));
    }

    /// Reads blocks of another replica for some work. Its memory will be the one that they come in: if it held any meanwhile,
    /// there might be none left for them to come in.
    pub(super) fn read_elsewhere_for(&mut self, index: usize, cookie: u32, (block, count): (u32, u32)) {
        let volume = self.served[self.replication.replicas[index].served].volume;
        self.read_elsewhere(index, cookie, BlockRange { volume, block, count }, MemoryRange::default());
    }

    /// Such blocks have come. True if it was work that they are for.
    pub(super) fn give_blocks_to_work(&mut self, cookie: u32, blocks: MemoryRange) -> bool {
        if !Shard::<M>::is_replication_cookie(cookie) {
            return false;
        }
        match self.replication.works.get_mut(cookie & !COOKIE) {
            Work::CopyRead { memory, .. } | Work::LookForNew { memory, .. } => {
                assert!(memory.replace(blocks).is_none(), "work that reads elsewhere holds no memory");
                true
            }
            _ => false,
        }
    }

    /// The own replica has read for some work and found damage: its memory is not needed until others have answered.
    pub(super) fn take_memory_of_work(&mut self, cookie: u32) -> bool {
        if !Shard::<M>::is_replication_cookie(cookie) {
            return false;
        }
        let Work::CopyRead { memory, .. } = self.replication.works.get_mut(cookie & !COOKIE) else {
            return false;
        };
        if let Some(memory) = memory.take() {
            self.give_back_for_peer(memory);
        }
        true
    }

    /// Looks whether a write overwrites something: members read its blocks.
    pub(super) fn look_for_new_blocks(&mut self, index: usize, piece: u32, blocks: (u32, u32)) {
        let cookie =
            self.begin_work(Work::LookForNew { replica: index, piece, count: blocks.1, memory: None });
        self.read_elsewhere_for(index, cookie, blocks);
    }

    /// The blocks have come: those that hold nothing but zeroes may be new, and all if nothing came.
    pub(super) fn finish_look_for_new(
        &mut self,
        index: usize,
        (piece, count): (u32, u32),
        memory: Option<MemoryRange>,
        completion: &Completion,
    ) {
        let new = memory.map_or(count, |memory| {
            let blocks = self.memory.bytes(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES));
            let blocks = blocks.chunks_exact(BLOCK_BYTES_USIZE);
            let empty = blocks.filter(|block| block.iter().all(|byte| *byte == 0)).count();
            u32::try_from(empty).expect("at most a piece")
        });
        self.drop_payload_of_peer(memory);
        self.new_blocks_found(index, piece, completion.result.is_ok().then_some(new));
    }
}
