//! Filling in these worlds: what a replica tells of its surplus, and what a head reads and sends.

use super::{Cell, Read, VOLUME_BLOCKS, World, id};
use crate::block_set::BlockSet;
use crate::record::Stamp;
use crate::wire::peer_message::{ChangeHeader, CopyHeader, PeerMessage};

impl World {
    /// The log has only what is not known to be committed for sure: of that, all is told.
    pub(super) fn compare(&mut self, node: usize, from: usize, fill: u64, base: Stamp) {
        let known = self.calm || self.random.below(20) > 0;
        let state = &mut self.nodes[node];
        let epoch = state.promised;
        let process = state.process.as_mut().unwrap();
        if known {
            process.member.compared(fill, base);
        }
        let told = state.told;
        let open = state.log.iter().filter(|change| change.stamp.sequence > told);
        let beyond = state.surplus.iter().chain(open).filter(|change| change.stamp.sequence > base.sequence);
        for change in beyond.copied().collect::<Vec<_>>() {
            let ChangeHeader { block, count, .. } = change;
            self.send(node, id(from), PeerMessage::Surplus { epoch, fill, block, count });
        }
        self.send(node, id(from), PeerMessage::Compared { epoch, fill, known });
    }

    /// A head's own replica has been read: what lasts there now is sent, runs of data and runs of nothing.
    pub(super) fn finish_read(&mut self, node: usize) {
        let now = self.clock(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        let Some(Read { member, epoch, fill, base, block }) = process.reading.pop_front() else { return };
        if !self.calm && self.random.below(100) == 0 {
            process.head.copy_failed(now, member, epoch, fill);
            return self.settle(node);
        }
        let mut lacking = BlockSet::default();
        if base == Stamp::default() {
            lacking.insert(0, VOLUME_BLOCKS);
        } else {
            if process.surplus.0 == fill {
                lacking = process.surplus.1.clone();
            }
            let last = self.nodes[node].last();
            let order = self.order_to(last);
            let changed = order.iter().filter(|change| change.stamp.sequence > base.sequence);
            changed.for_each(|change| lacking.insert(change.block, change.count));
        }
        let first = lacking.next_from(block).unwrap_or(VOLUME_BLOCKS);
        let longest = u32::try_from(self.random.below(256)).unwrap();
        let end = (first + 1 + longest).min(VOLUME_BLOCKS).min((first / 512 + 1) * 512);
        let content = &self.nodes[node].content;
        let cells: Vec<Cell> = (first..end)
            .filter(|block| lacking.contains(*block))
            .map(|block| (block, content.get(&block).copied()))
            .collect();
        let mut copies = 0;
        for run in cells.chunk_by(|one, next| one.1.is_some() == next.1.is_some() && one.0 + 1 == next.0) {
            let count = u32::try_from(run.len()).unwrap();
            let copy = CopyHeader { data: run[0].1.is_some(), block: run[0].0, count };
            self.send_with(node, member, PeerMessage::Copy { epoch, fill, copy }, run.to_vec());
            copies += 1;
        }
        let process = self.nodes[node].process.as_mut().unwrap();
        process.head.copy_sent(now, member, (epoch, fill), end.max(block + 1).into(), copies);
        self.settle(node);
    }
}
