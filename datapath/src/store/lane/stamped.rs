//! Changes that somebody else has numbered, and promises: one queue for each volume keeps their order.
//!
//! ```text
//!   append ──▶ queue ──▶ the front: leaves here? ──▶ space? ──▶ open batch ──▶ device ──▶ sync ──▶ answer
//!                └─ those behind only ask for their leaves
//! ```
//!
//! The log holds a prefix of the volume's order at any moment. So the first change that cannot be appended breaks the
//! order: it and all behind it are refused, until it comes again.

use super::change::{Change, Verdict};
use super::room::Standing;
use super::stream::Record;
use super::{BlockRange, Context, Lane, Payload, Volume};
use crate::limits::PIECE_BLOCKS_MAX;
use crate::memory::Memory;
use crate::record::{ChangeKind, Stamp};
use crate::request::RequestError;
use crate::store::batch::{Entry, EntryKind};
use crate::store::checkpoint_body::VolumeRecord;
use crate::store::map::LEAF_BLOCKS;
use crate::units::BLOCK_BYTES;
use std::collections::VecDeque;

fn entry_kind(kind: ChangeKind) -> EntryKind {
    match kind {
        ChangeKind::Data => EntryKind::Data,
        ChangeKind::Zero => EntryKind::Zero,
        ChangeKind::Trim => EntryKind::Trim,
    }
}

/// The change that an entry of the log stands for, if it is one.
pub(super) fn change_of_entry(kind: EntryKind) -> Option<ChangeKind> {
    match kind {
        EntryKind::Data => Some(ChangeKind::Data),
        EntryKind::Zero => Some(ChangeKind::Zero),
        EntryKind::Trim => Some(ChangeKind::Trim),
        _ => None,
    }
}

/// Who numbers a volume's changes. The first one of a mount decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Numbering {
    #[default]
    Undecided,
    ByLane,
    ByStamps,
}

impl Numbering {
    /// # Panics
    /// If the other way was chosen before: numbers would be given twice.
    pub(super) fn choose(&mut self, numbering: Numbering) {
        assert!(*self == numbering || *self == Numbering::Undecided, "one volume, two who number it");
        *self = numbering;
    }
}

/// The order of a volume's numbered changes, and what it rests on.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// Changes, copies and promises that are not in the log yet.
    pub(super) queue: VecDeque<u32>,
    /// The last change taken in.
    pub(super) taken: Stamp,
    /// A change could not be appended, for this reason: none behind it can be, before it comes again.
    pub(super) broken: Option<RequestError>,
    /// How its changes come to have room, and how many blocks its head may count on.
    pub(super) standing: Standing,
    pub(super) promised_room: u32,
    /// The promise that is on stable media.
    promised: u32,
    /// Size in the checkpoint that stands in all four roots; nothing if none names the volume.
    pub(super) lasting_blocks: Option<u64>,
    /// Where the last fetch ended.
    pub(super) fetch_cursor: Option<super::fetch::FetchCursor>,
}

impl Order {
    /// Why nothing that comes now can be appended, if so. What comes while others are being left out has no room, whatever
    /// was the matter with those.
    pub(super) fn refusal(&self) -> Option<RequestError> {
        self.broken.map(|error| if error == RequestError::Io { error } else { RequestError::NoSpace })
    }
}

impl Volume {
    /// A volume that comes to be.
    pub(super) fn new(record: VolumeRecord) -> Volume {
        let (numbered, numbering) = (record.stamp(), Numbering::Undecided);
        let order = Order { taken: numbered, ..Order::default() };
        Volume { record, numbered, numbering, order, removal: None }
    }

    /// A volume as recovery found it. What it says counts once the first checkpoint is done.
    pub(super) fn recovered(record: VolumeRecord) -> Volume {
        let mut volume = Volume::new(record);
        volume.order.promised = volume.record.promise;
        volume
    }

    /// A checkpoint with this record stands in all four roots.
    pub(super) fn note_lasting(&mut self, record: &VolumeRecord) {
        self.order.lasting_blocks = Some(record.size_blocks);
        self.order.promised = self.order.promised.max(record.promise);
    }
}

impl Lane {
    /// Appends a change that somebody else has numbered. The changes of a volume enter the log in the order of the
    /// calls, whatever they wait for. Each is answered when it and all before it are on stable media, under either
    /// policy. None is refused for want of space, it waits, unless the volume is being filled: then it and all that follow
    /// are answered with [`RequestError::NoSpace`] until the owner [knows](Self::resume_order).
    ///
    /// A change that cannot be appended (its leaf is damaged, or the lane has failed) is answered with
    /// [`RequestError::Io`], and so are all that follow it, until the one after [`Self::last_stamp`] comes again with
    /// none waiting.
    ///
    /// # Panics
    /// If the volume is not [lasting](Self::is_lasting) or the range leaves its lasting size, the lane numbers the
    /// volume's changes itself, the sequence is not the successor of the last one, the epoch is lower than the last
    /// one, or the payload is not that of the range and kind.
    pub fn append<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        kind: ChangeKind,
        range: BlockRange,
        payload: Option<Payload>,
        stamp: Stamp,
    ) {
        let payload_bytes = payload.map(|payload| payload.blocks().len);
        assert_eq!(payload_bytes, (kind == ChangeKind::Data).then_some(range.count * BLOCK_BYTES));
        let piece = if payload.is_some() { PIECE_BLOCKS_MAX } else { LEAF_BLOCKS };
        assert!((1..=piece).contains(&range.count), "{range:?} is more than a piece");
        let end = u64::from(range.block) + u64::from(range.count);
        let volume = &mut self.volumes[range.volume as usize];
        assert!(volume.order.lasting_blocks.is_some_and(|size| end <= size), "{range:?} does not last");
        volume.numbering.choose(Numbering::ByStamps);
        let order = &mut volume.order;
        let follows = stamp.sequence == order.taken.sequence + 1;
        order.broken = order.broken.filter(|_| !(follows && order.queue.is_empty()));
        if let Some(error) = order.refusal().or_else(|| self.failed.then_some(RequestError::Io)) {
            if let Some(payload) = payload {
                payload.let_go(context.pages);
            }
            return self.complete(cookie, Err(error));
        }
        assert!(follows && stamp.epoch >= order.taken.epoch, "{stamp:?} after {:?}", order.taken);
        order.taken = stamp;
        self.enqueue(context, Change::new(Some(cookie), entry_kind(kind), range, payload, true, Some(stamp)));
    }

    /// Raises the volume's promise to `epoch`: it takes part in no epoch below. Answered when that and all changes
    /// taken in before are on stable media, under either policy; with [`RequestError::Io`] if one of these cannot be
    /// appended, or the lane fails.
    ///
    /// # Panics
    /// If the volume is not [lasting](Self::is_lasting), or the lane numbers its changes itself.
    pub fn promise<M: Memory>(&mut self, context: &mut Context<'_, M>, cookie: u32, volume: u32, epoch: u32) {
        let known = &mut self.volumes[volume as usize];
        assert!(known.order.lasting_blocks.is_some(), "volume {volume} does not last");
        known.numbering.choose(Numbering::ByStamps);
        if self.failed || known.order.broken == Some(RequestError::Io) {
            return self.complete(cookie, Err(RequestError::Io));
        }
        let stamp = Some(Stamp { epoch, sequence: known.order.taken.sequence });
        let range = BlockRange { volume, block: 0, count: 1 };
        self.enqueue(context, Change::new(Some(cookie), EntryKind::Promise, range, None, true, stamp));
    }

    /// The last change of the volume that was taken in: it is in the log, or on its way there. After one was refused,
    /// the last before it.
    #[must_use]
    pub fn last_stamp(&self, volume: u32) -> Stamp {
        let volume = &self.volumes[volume as usize];
        if volume.numbering == Numbering::ByStamps { volume.order.taken } else { volume.numbered }
    }

    /// The volume's promise that is on stable media. Before the lane [is open](Self::is_open): what recovery found.
    #[must_use]
    pub fn promised(&self, volume: u32) -> u32 {
        self.volumes[volume as usize].order.promised
    }

    /// Does a checkpoint with the volume and its present size stand in all four roots? Changes to a volume that no
    /// root names would be lost with it.
    #[must_use]
    pub fn is_lasting(&self, volume: u32) -> bool {
        let volume = &self.volumes[volume as usize];
        volume.order.lasting_blocks == Some(volume.record.size_blocks)
    }

    /// The volume's changes through this one are committed, as its head told: the log need not keep them any more.
    pub fn note_committed(&mut self, volume: u32, sequence: u64) {
        self.volumes[volume as usize].record.note_committed(sequence, &mut self.segments);
    }

    pub(super) fn enqueue<M: Memory>(&mut self, context: &mut Context<'_, M>, change: Change) {
        let volume = change.range.volume;
        let index = self.changes.insert(change);
        let queue = &mut self.volumes[volume as usize].order.queue;
        queue.push_back(index);
        if queue.len() == 1 {
            self.advance_order(context, volume);
        } else {
            // Whatever this finds out is looked at again when the change is the front.
            let _ = self.gather_leaves(context, index);
        }
    }

    /// Takes the front of the volume's queue as far as it can go, then the next one.
    pub(super) fn advance_order<M: Memory>(&mut self, context: &mut Context<'_, M>, volume: u32) {
        while let Some(index) = self.volumes[volume as usize].order.queue.front().copied() {
            if self.changes.get(index).is_blocked {
                return;
            }
            let verdict = self.advance_or_block(context, index);
            if matches!(verdict, Verdict::WaitForLeaf | Verdict::WaitForSpace) {
                return;
            }
        }
    }

    /// The front of the queue has been appended or refused.
    pub(super) fn leave_order(&mut self, volume: u32, index: u32) {
        let front = self.volumes[volume as usize].order.queue.pop_front();
        assert_eq!(front, Some(index), "changes leave in order");
    }

    /// A change was refused: what is behind it must not be appended.
    pub(super) fn break_order(&mut self, volume: u32, error: RequestError) {
        let volume = &mut self.volumes[volume as usize];
        volume.order.broken = Some(error);
        volume.order.taken = volume.numbered;
    }

    /// Why a change must not be appended, if one before it was not. Where it was left out, promises go on, and
    /// so does the beginning of the next fill. The end of this one does not: it would state that everything is here.
    pub(super) fn order_is_broken(&self, volume: u32, change: &Change) -> Option<RequestError> {
        let broken = self.volumes[volume as usize].order.broken;
        broken.filter(|error| *error == RequestError::Io || !change.goes_on_in_a_broken_order())
    }

    /// A promise takes effect. It counts once it is on stable media, which may be so already.
    pub(super) fn apply_promise(&mut self, entry: &Entry, record: &Record, number: u64) {
        let promise = &mut self.volumes[record.volume as usize].record.promise;
        *promise = entry.epoch.max(*promise);
        self.unsynced_promises.push((number, record.volume, entry.epoch));
        self.note_kept_promises();
    }

    /// More of the log may be on stable media.
    pub(super) fn note_kept_promises(&mut self) {
        let flushed = self.streams[super::StreamKind::Client.index()].flushed_through;
        let volumes = &mut self.volumes;
        self.unsynced_promises.retain(|(number, volume, epoch)| {
            if *number <= flushed {
                let promised = &mut volumes[*volume as usize].order.promised;
                *promised = (*promised).max(*epoch);
            }
            *number > flushed
        });
    }
}
