//! Filling a replica from another one: copies enter the log among the changes, in the order of the calls.
//!
//! ```text
//!   queue:  fill begins (stamp) │ change │ copy │ copy │ change │ copy │ fill ends
//!                               └─ recovery finds a prefix of this: filling, with the stamp of its last change
//! ```
//!
//! What such a replica holds is no state that the volume ever had, until filling ends: some blocks are copied and some are
//! not. Its stamp says only which changes it was given since filling began.

use super::change::Change;
use super::room::Standing;
use super::stamped::Numbering;
use super::stream::Record;
use super::{BlockRange, Context, Lane, Payload};
use crate::limits::PIECE_BLOCKS_MAX;
use crate::memory::Memory;
use crate::record::Stamp;
use crate::request::RequestError;
use crate::store::batch::{Entry, EntryKind, FILL_BASE, FILL_BEGINS, FILL_ENDS};
use crate::store::map::LEAF_BLOCKS;
use crate::units::BLOCK_BYTES;

impl Lane {
    /// The volume is filled from now on, and its order goes on after `stamp`, wherever it was before. Up to `base` it has
    /// everything in common with the order; nothing if that is [`Stamp::default`]. Answered like a
    /// [promise](Self::promise).
    ///
    /// # Panics
    /// If the volume is not [lasting](Self::is_lasting), or the lane numbers its changes itself.
    pub fn restart_order<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        volume: u32,
        (base, stamp): (Stamp, Stamp),
    ) {
        let order = &mut self.volumes[volume as usize].order;
        // What could not be appended is of no importance any more.
        order.broken = order.broken.filter(|_| !order.queue.is_empty());
        (order.standing, order.promised_room) = (Standing::Filling, 0);
        let taken = std::mem::replace(&mut order.taken, stamp);
        let begun = self.may_enqueue(volume) && {
            self.enqueue_fill(context, None, volume, FILL_BASE, base);
            self.may_enqueue(volume)
        };
        if begun {
            self.enqueue_fill(context, Some(cookie), volume, FILL_BEGINS, stamp);
        } else {
            self.volumes[volume as usize].order.taken = taken;
            self.complete(cookie, Err(RequestError::Io));
        }
    }

    /// The volume has been filled. Answered when that and all that was taken in before are on stable media, like a
    /// [promise](Self::promise).
    ///
    /// # Panics
    /// If the volume is not [lasting](Self::is_lasting), or the lane numbers its changes itself.
    pub fn end_filling<M: Memory>(&mut self, context: &mut Context<'_, M>, cookie: u32, volume: u32) {
        let stamp = self.last_stamp(volume);
        let order = &mut self.volumes[volume as usize].order;
        if let Some(error) = order.refusal() {
            // It cannot be complete.
            self.complete(cookie, Err(error));
        } else if self.may_enqueue(volume) {
            self.volumes[volume as usize].order.standing = Standing::Filled;
            self.enqueue_fill(context, Some(cookie), volume, FILL_ENDS, stamp);
        } else {
            self.complete(cookie, Err(RequestError::Io));
        }
    }

    fn may_enqueue(&self, volume: u32) -> bool {
        !self.failed && self.volumes[volume as usize].order.broken != Some(RequestError::Io)
    }

    fn enqueue_fill<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: Option<u32>,
        volume: u32,
        count: u32,
        stamp: Stamp,
    ) {
        let known = &mut self.volumes[volume as usize];
        assert!(known.order.lasting_blocks.is_some(), "volume {volume} does not last");
        known.numbering.choose(Numbering::ByStamps);
        let range = BlockRange { volume, block: 0, count };
        self.enqueue(context, Change::new(cookie, EntryKind::Fill, range, None, true, Some(stamp)));
    }

    /// Appends blocks copied from another replica: `payload` if they hold data there, zeroes if not. They enter the log
    /// behind the changes and copies taken in before, and are answered like [`Self::append`], also when none of them was
    /// ever written here and zeroes need no place.
    ///
    /// # Panics
    /// If the range touches two leaves or leaves the volume's lasting size, the lane numbers the volume's changes itself,
    /// or the payload is not that of the range.
    pub fn append_copy<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        range: BlockRange,
        payload: Option<Payload>,
    ) {
        let fits = payload.is_none_or(|payload| {
            payload.blocks().len == range.count * BLOCK_BYTES && range.count <= PIECE_BLOCKS_MAX
        });
        let end = u64::from(range.block) + u64::from(range.count);
        let one_leaf = range.count > 0 && range.block % LEAF_BLOCKS + range.count <= LEAF_BLOCKS;
        let volume = &mut self.volumes[range.volume as usize];
        let inside = volume.order.lasting_blocks.is_some_and(|size| end <= size);
        assert!(fits && one_leaf && inside, "a copy of {range:?}");
        volume.numbering.choose(Numbering::ByStamps);
        if let Some(error) = volume.order.refusal().or_else(|| self.failed.then_some(RequestError::Io)) {
            if let Some(payload) = payload {
                payload.let_go(context.pages);
            }
            return self.complete(cookie, Err(error));
        }
        let kind = if payload.is_some() { EntryKind::CopyData } else { EntryKind::CopyZero };
        // A leaf with sequence 0 would count as one that never was.
        let taken = volume.order.taken;
        let stamp = Stamp { sequence: taken.sequence.max(1), ..taken };
        self.enqueue(context, Change::new(Some(cookie), kind, range, payload, true, Some(stamp)));
    }

    /// If the volume is being filled, so that what it holds is no state that it ever had: what it had in common with the
    /// order when that began.
    #[must_use]
    pub fn filling_from(&self, volume: u32) -> Option<Stamp> {
        let record = &self.volumes[volume as usize].record;
        record.filling.then_some(record.base)
    }

    /// The beginning or end of filling takes effect.
    pub(super) fn apply_fill(&mut self, entry: &Entry, record: &Record, number: u64) {
        let volume = &mut self.volumes[record.volume as usize];
        volume.record.note_fill(entry, number, &mut self.segments);
        // The log before the beginning is of another order.
        volume.order.fetch_cursor = None;
    }
}
