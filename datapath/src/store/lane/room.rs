//! Room: how many blocks the heads of volumes have been promised that their changes may newly take.
//!
//! ```text
//!   capacity  ≥  live  +  on their way into effect  +  in queues  +  promised to heads
//! ```
//!
//! A change that has a number cannot be refused, so its space is promised before it gets one. What was promised is counted
//! like money: a head says how much of it it keeps, and every change that comes states how much of it it uses up. While a
//! replica is filled nobody counts on its room yet, and what does not fit is refused like a client's own write.

use super::{BlockRange, Context, Lane, Volume};
use crate::limits::ROOM_BLOCKS_MAX;
use crate::memory::Memory;
use crate::record::Stamp;
use crate::request::RequestError;
use crate::store::map::{LEAF_BLOCKS, Presence};

/// How a volume's changes come to have room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Standing {
    /// Its head numbers them within what was promised.
    #[default]
    Promised,
    /// It is being filled: nobody counts on its room.
    Filling,
    /// It has been filled, and its head has not asked for room yet.
    Filled,
}

/// What a volume's head may count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomPromised {
    /// Blocks that changes to come may newly take.
    pub blocks: u32,
    /// It is less than was needed, and there may be more soon.
    pub may_grow: bool,
}

/// How many blocks of a range would be new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewBlocks {
    /// So many at most.
    pub most: u32,
    /// A leaf of the map that must be loaded to know better.
    pub unknown_leaf: Option<u32>,
}

impl Volume {
    /// May a change be refused for want of room although somebody else has numbered it? Only where nobody counts on it.
    pub(super) fn may_refuse(&self) -> bool {
        self.order.standing != Standing::Promised
    }
}

impl Lane {
    /// Blocks that live, or may after everything that was taken in or promised.
    pub(super) fn blocks_spoken_for(&self) -> u64 {
        self.segments.live_total() + self.unapplied_new_blocks + self.queued_blocks() + self.promised_blocks()
    }

    pub(super) fn promised_blocks(&self) -> u64 {
        self.volumes.iter().map(|volume| u64::from(volume.order.promised_room)).sum()
    }

    /// What stands in the volumes' queues counts as new, whatever it overwrites.
    fn queued_blocks(&self) -> u64 {
        let queued = self.volumes.iter().flat_map(|volume| &volume.order.queue);
        let queued = queued.map(|index| self.changes.get(*index)).filter(|change| change.payload.is_some());
        queued.map(|change| u64::from(change.range.count)).sum()
    }

    /// A head asks for room for its volume: of what it was promised it keeps at most `keeps`, with less than `needs` it
    /// cannot go on, and it would like to have `wants`. Nothing if changes are not numbered within this replica's room.
    pub fn promise_room(&mut self, volume: u32, keeps: u32, needs: u32, wants: u32) -> Option<RoomPromised> {
        let order = &mut self.volumes[volume as usize].order;
        order.promised_room = order.promised_room.min(keeps);
        if order.standing == Standing::Filling {
            return None;
        }
        let free = self.capacity_blocks().checked_sub(self.blocks_spoken_for());
        let order = &mut self.volumes[volume as usize].order;
        if order.standing == Standing::Filled {
            // What has come beyond the room is refused when its turn comes.
            free?;
            order.standing = Standing::Promised;
        }
        let free = u32::try_from(free.unwrap_or(0)).unwrap_or(u32::MAX);
        // No more than a process that starts assumes.
        let needs = needs.min(ROOM_BLOCKS_MAX);
        let lacking = needs.saturating_sub(order.promised_room);
        // The less is left, the less one head may have ahead of need.
        let ahead = wants.min(ROOM_BLOCKS_MAX).saturating_sub(order.promised_room).min(free / 4);
        if lacking <= free {
            order.promised_room += lacking.max(ahead);
        }
        let blocks = order.promised_room;
        let is_in_flux = self.unapplied_new_blocks > 0
            || self.queued_blocks() > 0
            || self.promised_blocks() > u64::from(blocks)
            || self.pool_share.room_may_come;
        Some(RoomPromised { blocks, may_grow: blocks < needs && is_in_flux })
    }

    /// A change comes that was numbered within what was promised, and uses so much of it up.
    pub fn use_room(&mut self, volume: u32, blocks: u32) {
        let order = &mut self.volumes[volume as usize].order;
        order.promised_room = order.promised_room.saturating_sub(blocks);
    }

    /// What was promised before this process is not known: the most that can have been.
    pub fn assume_room_promised(&mut self, volume: u32) {
        self.volumes[volume as usize].order.promised_room = ROOM_BLOCKS_MAX;
    }

    /// Nobody counts on this replica any more: what was promised is void, and what has no place in the log yet is answered
    /// with [`RequestError::ShuttingDown`].
    pub fn leave_out<M: Memory>(&mut self, context: &mut Context<'_, M>, volume: u32) {
        self.volumes[volume as usize].order.promised_room = 0;
        while let Some(index) = self.volumes[volume as usize].order.queue.front().copied() {
            let change = self.changes.get(index);
            if change.leaves_coming > 0 || change.goes_on_in_a_broken_order() {
                return;
            }
            if change.is_blocked {
                let line = change.line();
                self.blocked[line].retain(|blocked| *blocked != index);
            }
            self.refuse_change(context, index, RequestError::ShuttingDown);
        }
    }

    /// The owner knows that changes were left out, and brings no successors of theirs. What comes after the
    /// change that this returns is taken again, once those in line are gone.
    pub fn resume_order(&mut self, volume: u32) -> Stamp {
        let order = &mut self.volumes[volume as usize].order;
        if order.queue.is_empty() && order.broken.is_some_and(|error| error != RequestError::Io) {
            order.broken = None;
        }
        order.taken
    }

    /// How many blocks of a range have no place yet. Where the map is not in memory they count as new.
    pub fn count_new(&mut self, range: BlockRange) -> NewBlocks {
        let mut new = NewBlocks { most: 0, unknown_leaf: None };
        for leaf in super::change::leaves_of(range) {
            let first = range.block.max(leaf * LEAF_BLOCKS);
            let last = (range.block + (range.count - 1)).min(leaf * LEAF_BLOCKS + (LEAF_BLOCKS - 1));
            let held = match self.map.find(range.volume, leaf) {
                Presence::Here(frame) => {
                    let is_held = |block: &u32| self.map.get(frame, block % LEAF_BLOCKS).place.is_on_device();
                    u32::try_from((first..=last).filter(is_held).count()).expect("at most a leaf")
                }
                Presence::Nowhere => 0,
                Presence::Loading(_) | Presence::Away(_) => {
                    new.unknown_leaf = Some(leaf);
                    0
                }
            };
            new.most += last - first + 1 - held;
        }
        new
    }

    /// A change was refused before it had a number.
    pub fn note_refused(&mut self) {
        self.counters.refused_no_space += 1;
    }
}
