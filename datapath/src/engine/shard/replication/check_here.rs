//! What heads want to know of this node's replicas to compare them, and what they give for damaged blocks.
//!
//! What is given is appended like a repaired block of the head's own log (`peer_read`): it changes nothing of the order,
//! and may stand anywhere before the next change of these blocks, which the head sends behind it.

use super::super::Shard;
use super::{Leader, Work};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::store::lane::{BlockRange, Completion, Payload};
use crate::store::map::LEAF_BLOCKS;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use crate::wire::peer_message::CheckMessage;

/// A question of a head, or what it is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) epoch: u32,
    pub(super) check: u64,
    pub(super) block: u32,
    pub(super) count: u32,
}

impl<M: Memory> Shard<M> {
    /// A head asks what these blocks are here, or gives them. The payload is this node's.
    pub(super) fn check_here(
        &mut self,
        index: usize,
        asker: Leader,
        message: CheckMessage,
        memory: Option<MemoryRange>,
    ) {
        let (CheckMessage::Ask { epoch, check, block, count }
        | CheckMessage::Mend { epoch, check, block, count }) = message
        else {
            unreachable!("members are asked no answers")
        };
        let asked = Asked { epoch, check, block, count };
        let served = &self.served[self.replication.replicas[index].served];
        let (lane, volume) = (served.lane, served.volume);
        if self.lies_beyond(index, (block, count)) {
            self.drop_payload_of_peer(memory);
            if let Leader::Link(id, _) = asker {
                self.close_link(id);
            }
            return;
        }
        let range = BlockRange { volume, block, count };
        if let Some(memory) = memory {
            self.use_memory(memory);
            let pages = memory.len / BLOCK_BYTES;
            let cookie = self.begin_work(Work::Mend { replica: index, asked, asker, lent: memory, pages });
            let payload = Some(Payload::Lent(memory));
            return self.with_lane(lane, |lane, context| lane.append_copy(context, cookie, range, payload));
        }
        // Without memory the head hears nothing, and asks again.
        let Some(memory) = self.allocate_for_peer(1 + count) else { return };
        let cookie = self.begin_work(Work::Check { replica: index, asked, memory, asker });
        let blocks = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        self.with_lane(lane, |lane, context| lane.read(context, cookie, range, blocks));
    }

    /// The lane has read the blocks, or as much of them as it can.
    pub(super) fn finish_check_read(
        &mut self,
        index: usize,
        asked: Asked,
        memory: MemoryRange,
        asker: Leader,
        completion: &Completion,
    ) {
        let good = completion.result.is_ok();
        let mut read = completion.read;
        if let Some(read) = read.as_mut().filter(|_| good) {
            self.feign_damage(completion, read);
        }
        let is_damaged = |offset: u32| read.is_some_and(|read| read.damaged.is_set(offset));
        let damaged = (0..asked.count).filter(|offset| is_damaged(*offset));
        let damaged = damaged.fold(0_u64, |bits, offset| bits | 1 << offset);
        let next_leaf = self.next_leaf_behind(index, asked);
        let Asked { epoch, check, block, count } = asked;
        let (answer, checksums) = if good || damaged != 0 {
            let blocks = self.memory.bytes(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES));
            let blocks = (0..).zip(blocks.chunks_exact(BLOCK_BYTES_USIZE));
            let checksum = |(offset, bytes)| if is_damaged(offset) { 0 } else { crc32c(bytes) };
            let checksums = blocks.map(checksum).collect();
            (CheckMessage::Digest { epoch, check, block, count, damaged, next_leaf }, checksums)
        } else {
            (CheckMessage::Unknown { epoch, check, next_leaf }, Vec::new())
        };
        match asker {
            Leader::ThisNode => {
                self.keep_own_blocks(index, asked, memory);
                let node = self.replication.node();
                self.check_answered(index, node, answer, checksums);
            }
            Leader::Link(id, generation) => {
                self.give_back_for_peer(memory);
                let volume = self.replication.replicas[index].volume;
                if self.is_same_link(id, generation) {
                    self.send_checksums(id, volume, answer.into(), &checksums);
                }
            }
            Leader::Nobody => unreachable!("somebody asked"),
        }
    }

    /// The first leaf behind the blocks in which anything was ever written here.
    fn next_leaf_behind(&self, index: usize, asked: Asked) -> Option<u32> {
        let served = &self.served[self.replication.replicas[index].served];
        let lane = &self.lanes[served.lane].lane;
        let size_blocks = lane.volumes()[served.volume as usize].size_blocks();
        let end = u32::try_from(size_blocks.div_ceil(u64::from(LEAF_BLOCKS))).expect("leaves fit 32 bits");
        let behind = (asked.block + (asked.count - 1)) / LEAF_BLOCKS + 1;
        lane.map().table(served.volume).next_present(behind, end)
    }

    /// What a head gave for damaged blocks is on stable media, or cannot be appended. Then the head asks again in time.
    pub(super) fn finish_mend(&mut self, index: usize, asked: Asked, asker: Leader, good: bool) {
        let Asked { epoch, check, block, count } = asked;
        if good {
            self.send_answer(index, asker, CheckMessage::Mended { epoch, check, block, count }.into());
        }
    }
}
