//! Room in these worlds: what members promise, and that no change is ever numbered beyond it.

use super::{World, id};
use crate::limits::ROOM_BLOCKS_MAX;
use crate::record::ChangeKind;
use crate::replica::head::Room;
use crate::wire::peer_message::{ChangeHeader, PeerMessage, RoomAnswer, RoomQuestion};

/// What a node has promised the head that it follows.
#[derive(Debug, Default)]
pub(super) struct Promised {
    blocks: u32,
    /// It is being filled, and nobody counts on its room.
    is_filled: bool,
}

impl Promised {
    /// What a process that starts must assume.
    pub(super) fn at_start() -> Promised {
        Promised { blocks: ROOM_BLOCKS_MAX, is_filled: false }
    }

    pub(super) fn being_filled() -> Promised {
        Promised { blocks: 0, is_filled: true }
    }

    /// A change of this epoch's head arrives.
    pub(super) fn spend(&mut self, epoch: u32, change: &ChangeHeader) {
        if change.stamp.epoch == epoch && !self.is_filled {
            let left = self.blocks.checked_sub(change.new_blocks);
            self.blocks = left.unwrap_or_else(|| panic!("{change:?} is beyond {self:?}"));
        }
    }
}

impl World {
    /// Room is short, and now and then there is none.
    pub(super) fn lease(
        &mut self,
        node: usize,
        from: usize,
        (epoch, asked_ns): (u32, u64),
        question: Option<RoomQuestion>,
    ) {
        let free = if self.calm { 8 } else { u32::try_from(self.random.below(5)).unwrap() };
        let promised = &mut self.nodes[node].promised_room;
        let room = question.map(|RoomQuestion { keeps, needs, wants }| {
            promised.is_filled = false;
            promised.blocks = promised.blocks.min(keeps);
            let more = needs.saturating_sub(promised.blocks);
            if more <= free {
                promised.blocks += more.max(wants.saturating_sub(promised.blocks).min(free));
            }
            RoomAnswer { granted: promised.blocks, may_grow: promised.blocks < needs && free % 2 == 0 }
        });
        self.send(node, id(from), PeerMessage::Leased { epoch, asked_ns, room });
    }

    pub(super) fn submit(&mut self, node: usize) {
        let now = self.clock(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        if process.head.pending().count() > 8 {
            return;
        }
        process.cookies += 1;
        let kind = match self.random.below(6) {
            0 => ChangeKind::Zero,
            1 => ChangeKind::Trim,
            _ => ChangeKind::Data,
        };
        let block = 256 * self.random.below(4) + self.random.below(3);
        let (block, count) = (u32::try_from(block).unwrap(), 1 + u32::from(self.random.below(2) == 0));
        let is_new = kind == ChangeKind::Data && self.random.below(2) == 0;
        let new_blocks = if is_new { count } else { 0 };
        let has_room = process.head.find_room(now, now, new_blocks) == Room::Granted;
        if has_room && process.head.submit(now, process.cookies, kind, block, (count, new_blocks)).is_ok() {
            let change = *process.head.pending().last().expect("not committed yet");
            self.numbered.insert(change.stamp, change);
        }
        self.settle(node);
    }
}
