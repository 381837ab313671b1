//! Requests that change a volume: from the caller's hand into a batch.

use super::stamped::Numbering;
use super::stream::{Record, StreamKind};
use super::{BlockRange, Context, Lane, OwnedPayload, Payload};
use crate::limits::EXACT_RECEIVE_BYTES_MIN;
use crate::memory::Memory;
use crate::record::Stamp;
use crate::request::RequestError;
use crate::store::batch::{Entry, EntryKind, FILL_BEGINS, FILL_ENDS};
use crate::store::layout::Place;
use crate::store::map::{FrameIndex, LEAF_BLOCKS, Presence};
use crate::units::{BLOCK_BYTES, MemoryRange};

/// Payloads below this length share batches with others; longer ones are batches of their own.
const SHARED_BLOCKS_MAX: u32 = EXACT_RECEIVE_BYTES_MIN / BLOCK_BYTES - 1;

/// What releases blocks: a descriptor without payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// The client wants zeroes.
    Zero,
    /// The client has no more use for the content.
    Trim,
}

/// A change on its way into a batch.
#[derive(Debug)]
pub(super) struct Change {
    cookie: Option<u32>,
    pub(super) kind: EntryKind,
    pub(super) range: BlockRange,
    pub(super) payload: Option<Payload>,
    durable: bool,
    /// Given by somebody else: the change then stands in its volume's queue.
    pub(super) stamp: Option<Stamp>,
    frames: [Option<FrameIndex>; 2],
    /// Leaves on their way in, for which it must not go away.
    pub(super) leaves_coming: u8,
    leaf_is_damaged: bool,
    /// It stands among those that wait for space.
    pub(super) is_blocked: bool,
    waited_for_space: bool,
    /// Nobody wants it any more.
    is_cancelled: bool,
}

impl Change {
    pub(super) fn new(
        cookie: Option<u32>,
        kind: EntryKind,
        range: BlockRange,
        payload: Option<Payload>,
        durable: bool,
        stamp: Option<Stamp>,
    ) -> Change {
        Change {
            cookie,
            kind,
            range,
            payload,
            durable,
            stamp,
            frames: [None; 2],
            leaves_coming: 0,
            leaf_is_damaged: false,
            is_blocked: false,
            waited_for_space: false,
            is_cancelled: false,
        }
    }

    /// Does it not depend on what was to be appended before it?
    pub(super) fn goes_on_in_a_broken_order(&self) -> bool {
        self.kind.is_about_the_volume() && (self.kind == EntryKind::Promise || self.range.count != FILL_ENDS)
    }

    /// Those with payload wait for space in one line, those without in another.
    pub(super) fn line(&self) -> usize {
        usize::from(self.payload.is_none())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Appended,
    WaitForLeaf,
    WaitForSpace,
    Refused(RequestError),
}

impl Lane {
    /// Appends a short write at once, copying its payload from wherever it is. False, with nothing done, if it
    /// would have to wait for anything: the caller then hands over memory with [`Self::write`].
    pub fn write_now<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        range: BlockRange,
        payload: MemoryRange,
        durable: bool,
    ) -> bool {
        if self.failed || range.count > SHARED_BLOCKS_MAX || !self.blocked[0].is_empty() {
            return false;
        }
        let Some(frames) = self.frames_here(range) else { return false };
        let new_blocks = self.count_new_blocks(range, frames);
        if !self.has_room_for(new_blocks) || !self.may_dirty(frames) {
            return false;
        }
        let entry = self.entry(EntryKind::Data, range);
        let record = Record { volume: range.volume, frames, cookie: Some(cookie), durable, new_blocks };
        if !self.append_small(context, StreamKind::Client, &entry, Some(payload), record) {
            return false;
        }
        self.note_appended(range, &entry, frames, new_blocks);
        true
    }

    /// Writes the blocks of `payload`, whose memory the lane gives back when it is done.
    pub fn write<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        range: BlockRange,
        payload: OwnedPayload,
        durable: bool,
    ) {
        let payload = Payload::Owned(payload);
        assert_eq!(payload.blocks().len, range.count * BLOCK_BYTES);
        self.begin_change(context, cookie, EntryKind::Data, range, Some(payload), durable);
    }

    /// Lets the blocks read as zeroes.
    pub fn release<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        range: BlockRange,
        why: Release,
        durable: bool,
    ) {
        let kind = match why {
            Release::Zero => EntryKind::Zero,
            Release::Trim => EntryKind::Trim,
        };
        self.begin_change(context, cookie, kind, range, None, durable);
    }

    fn begin_change<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        kind: EntryKind,
        range: BlockRange,
        payload: Option<Payload>,
        durable: bool,
    ) {
        let index = self.changes.insert(Change::new(Some(cookie), kind, range, payload, durable, None));
        self.try_change(context, index);
    }

    /// Nobody wants this change any more: if it is in no batch yet, it is answered with [`RequestError::ShuttingDown`] and never
    /// will be. One that somebody else has numbered must go on.
    pub fn cancel<M: Memory>(&mut self, context: &mut Context<'_, M>, cookie: u32) {
        let is_it = |change: &Change| change.cookie == Some(cookie) && change.stamp.is_none();
        let found = self.changes.iter().find(|(_, change)| is_it(change));
        let Some((index, line)) = found.map(|(index, change)| (index, change.line())) else { return };
        if let Some(position) = self.blocked[line].iter().position(|blocked| *blocked == index) {
            self.blocked[line].remove(position);
            self.refuse_change(context, index, RequestError::ShuttingDown);
        } else {
            // It waits for a leaf.
            self.changes.get_mut(index).is_cancelled = true;
        }
    }

    /// Takes a change as far as it can go now. Called again when a leaf has come, or space.
    pub(super) fn try_change<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) {
        let change = self.changes.get(index);
        if change.stamp.is_some() {
            self.advance_order(context, change.range.volume);
        } else {
            self.advance_or_block(context, index);
        }
    }

    /// Lets the change go on unless others wait for space before it. If it lacks space too, it waits behind them.
    pub(super) fn advance_or_block<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
    ) -> Verdict {
        let line = self.changes.get(index).line();
        let must_wait = !self.blocked[line].is_empty() && !self.failed;
        let verdict = if must_wait { Verdict::WaitForSpace } else { self.advance_change(context, index) };
        if verdict == Verdict::WaitForSpace {
            self.changes.get_mut(index).is_blocked = true;
            self.blocked[line].push_back(index);
        }
        verdict
    }

    /// Space, buffers or segments may have come: changes go on in the order in which they came.
    pub(super) fn retry_blocked<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for line in [1, 0] {
            while let Some(index) = self.blocked[line].front().copied() {
                let change = self.changes.get(index);
                let ordered = change.stamp.map(|_| change.range.volume);
                let verdict = self.advance_change(context, index);
                if verdict == Verdict::WaitForSpace {
                    break;
                }
                self.blocked[line].pop_front();
                if verdict == Verdict::WaitForLeaf {
                    self.changes.get_mut(index).is_blocked = false;
                }
                if let Some(volume) = ordered {
                    self.advance_order(context, volume);
                }
            }
        }
    }

    /// A change waits for space and none can come, as when all garbage lies in segments that damage keeps from being
    /// emptied: it is refused rather than left to wait for ever. One that was numbered elsewhere cannot fail singly: it
    /// waits, unless nobody counts on it. So does one that lacks a buffer or a page while there are segments: somebody gives
    /// those back.
    pub(super) fn refuse_hopeless<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for (line, kind) in [(0, EntryKind::Data), (1, EntryKind::Trim)] {
            let has_segments = self.can_advance(StreamKind::Client, kind);
            let room_may_come = kind.has_payload() && self.is_short;
            if self.blocked[line].is_empty() || has_segments || room_may_come || !self.cleaning_is_over() {
                continue;
            }
            let may_refuse = |index: &u32| {
                let change = self.changes.get(*index);
                let volume = &self.volumes[change.range.volume as usize];
                change.stamp.is_none() || volume.may_refuse() && !change.goes_on_in_a_broken_order()
            };
            let first = self.blocked[line].iter().position(may_refuse);
            if let Some(index) = first.and_then(|position| self.blocked[line].remove(position)) {
                self.counters.refused_no_space += 1;
                let change = self.changes.get(index);
                let ordered = change.stamp.map(|_| change.range.volume);
                self.refuse_change(context, index, RequestError::NoSpace);
                ordered.into_iter().for_each(|volume| self.advance_order(context, volume));
            }
        }
    }

    fn advance_change<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) -> Verdict {
        let verdict = self.judge_change(context, index);
        match verdict {
            Verdict::Appended => {
                let change = self.changes.remove(index);
                if change.stamp.is_some() {
                    self.leave_order(change.range.volume, index);
                }
            }
            Verdict::Refused(error) => self.refuse_change(context, index, error),
            Verdict::WaitForLeaf | Verdict::WaitForSpace => {}
        }
        verdict
    }

    fn judge_change<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) -> Verdict {
        let change = self.changes.get(index);
        let (kind, range, stamp) = (change.kind, change.range, change.stamp);
        if change.leaves_coming > 0 {
            return Verdict::WaitForLeaf;
        }
        if change.is_cancelled {
            return Verdict::Refused(RequestError::ShuttingDown);
        }
        if self.failed || change.leaf_is_damaged {
            return Verdict::Refused(RequestError::Io);
        }
        if let (Some(_), Some(error)) = (stamp, self.order_is_broken(range.volume, change)) {
            return Verdict::Refused(error);
        }
        if let Err(verdict) = self.gather_leaves(context, index) {
            return verdict;
        }
        let change = self.changes.get(index);
        let (cookie, durable, frames, payload) =
            (change.cookie, change.durable, change.frames, change.payload);
        if kind == EntryKind::CopyZero && frames[0].is_none() {
            // Nothing was ever there.
            cookie.into_iter().for_each(|cookie| self.complete(cookie, Ok(())));
            return Verdict::Appended;
        }
        let new_blocks = if payload.is_some() { self.count_new_blocks(range, frames) } else { 0 };
        let may_refuse = stamp.is_none() || self.volumes[range.volume as usize].may_refuse();
        if may_refuse && !self.has_room_for(new_blocks) {
            self.is_short |= self.pool_share.room_may_come;
            if self.unapplied_new_blocks == 0 && !self.pool_share.room_may_come {
                self.counters.refused_no_space += 1;
                return Verdict::Refused(RequestError::NoSpace);
            }
            return self.wait_for_space(index);
        }
        if !self.may_dirty(frames) {
            if self.checkpointer.is_idle() {
                self.checkpointer.request();
            }
            return self.wait_for_space(index);
        }
        let record = Record { volume: range.volume, frames, cookie, durable, new_blocks };
        let entry = match stamp {
            Some(stamp) => self.entry_with(kind, range, stamp),
            None => self.entry(kind, range),
        };
        let appended = match payload {
            Some(payload) if range.count > SHARED_BLOCKS_MAX => {
                self.append_owned(context, &entry, payload, record)
            }
            Some(payload) => {
                let done =
                    self.append_small(context, StreamKind::Client, &entry, Some(payload.blocks()), record);
                if done {
                    payload.let_go(context.pages);
                }
                done
            }
            None => self.append_small(context, StreamKind::Client, &entry, None, record),
        };
        if !appended {
            return self.wait_for_space(index);
        }
        // The pins pass from the change to the batch.
        self.note_numbered(range, &entry, new_blocks);
        Verdict::Appended
    }

    fn wait_for_space(&mut self, index: u32) -> Verdict {
        let change = self.changes.get_mut(index);
        if !std::mem::replace(&mut change.waited_for_space, true) {
            self.counters.waits_for_space += 1;
        }
        Verdict::WaitForSpace
    }

    /// Brings in and pins the leaves of the change, all at once.
    pub(super) fn gather_leaves<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
    ) -> Result<(), Verdict> {
        let Change { range, kind, stamp, .. } = *self.changes.get(index);
        if kind.is_about_the_volume() {
            return Ok(());
        }
        for (which, leaf) in leaves_of(range).enumerate() {
            if self.changes.get(index).frames[which].is_some() {
                continue;
            }
            if self.map.is_overfull() && self.map.dirty_count() > 0 {
                self.checkpointer.request();
            }
            let frame = match self.map.find(range.volume, leaf) {
                Presence::Here(frame) => frame,
                Presence::Nowhere if kind == EntryKind::CopyZero => continue,
                // No checkpoint will ever make room for it: a replica that cannot take a change has failed.
                Presence::Nowhere if !self.map.has_room_for_leaf() && stamp.is_some() => {
                    return Err(Verdict::Refused(RequestError::Io));
                }
                Presence::Nowhere if !self.map.has_room_for_leaf() => {
                    self.counters.refused_no_space += 1;
                    return Err(Verdict::Refused(RequestError::NoSpace));
                }
                Presence::Nowhere => self.map.admit(range.volume, leaf),
                Presence::Loading(_) | Presence::Away(_) => {
                    self.changes.get_mut(index).leaves_coming += 1;
                    self.load_leaf(context, range.volume, leaf, super::leaf::Waiter::Change(index));
                    continue;
                }
            };
            self.map.pin(frame);
            self.changes.get_mut(index).frames[which] = Some(frame);
        }
        if self.changes.get(index).leaves_coming > 0 { Err(Verdict::WaitForLeaf) } else { Ok(()) }
    }

    /// A leaf of the change has come, or cannot be read. With the last one the change goes on.
    pub(super) fn change_leaf_came<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
        intact: bool,
    ) {
        let change = self.changes.get_mut(index);
        change.leaves_coming -= 1;
        change.leaf_is_damaged |= !intact;
        let (range, frames) = (change.range, change.frames);
        // The first to come must not be pushed out before the second.
        for (which, leaf) in leaves_of(range).enumerate() {
            if let (None, Presence::Here(frame)) = (frames[which], self.map.find(range.volume, leaf)) {
                self.map.pin(frame);
                self.changes.get_mut(index).frames[which] = Some(frame);
            }
        }
        if self.changes.get(index).leaves_coming == 0 {
            self.try_change(context, index);
        }
    }

    /// Ends a change with an error: its leaf cannot be read, or the lane has failed. What is numbered after it cannot be
    /// appended either: there would be a gap.
    pub(super) fn refuse_change<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
        error: RequestError,
    ) {
        let change = self.changes.remove(index);
        change.frames.iter().flatten().for_each(|frame| self.map.unpin(*frame));
        if change.stamp.is_some() {
            self.leave_order(change.range.volume, index);
            self.break_order(change.range.volume, error);
        }
        if let Some(payload) = change.payload {
            payload.let_go(context.pages);
        }
        change.cookie.into_iter().for_each(|cookie| self.complete(cookie, Err(error)));
    }

    /// The lane has failed: what waits for space waits in vain. What waits for a leaf is refused when that comes.
    pub(super) fn fail_changes<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for line in [0, 1] {
            while let Some(index) = self.blocked[line].pop_front() {
                self.changes.get_mut(index).is_blocked = false;
                self.try_change(context, index);
            }
        }
    }

    fn entry(&mut self, kind: EntryKind, range: BlockRange) -> Entry {
        let volume = &mut self.volumes[range.volume as usize];
        volume.numbering.choose(Numbering::ByLane);
        let Stamp { epoch, sequence } = volume.numbered;
        self.entry_with(kind, range, Stamp { epoch, sequence: sequence + 1 })
    }

    fn entry_with(&self, kind: EntryKind, range: BlockRange, stamp: Stamp) -> Entry {
        Entry {
            kind,
            volume: self.volumes[range.volume as usize].record.number,
            block: range.block,
            count: range.count,
            epoch: stamp.epoch,
            old_place: Place::NONE,
            sequence: stamp.sequence,
        }
    }

    fn note_appended(
        &mut self,
        range: BlockRange,
        entry: &Entry,
        frames: [Option<FrameIndex>; 2],
        new_blocks: u32,
    ) {
        frames.iter().flatten().for_each(|frame| self.map.pin(*frame));
        self.note_numbered(range, entry, new_blocks);
    }

    fn note_numbered(&mut self, range: BlockRange, entry: &Entry, new_blocks: u32) {
        let begins_to_fill = entry.kind == EntryKind::Fill && entry.count == FILL_BEGINS;
        if entry.kind.is_change() || begins_to_fill {
            let stamp = Stamp { epoch: entry.epoch, sequence: entry.sequence };
            let volume = &mut self.volumes[range.volume as usize];
            volume.numbered = stamp;
            if begins_to_fill && volume.order.broken.take().is_some() {
                // What was left out for want of room is not of this order.
                volume.order.taken = stamp;
            }
        }
        self.unapplied_new_blocks += u64::from(new_blocks);
        if entry.kind.has_payload() {
            self.counters.client_blocks_written += u64::from(entry.count);
        }
    }

    /// The leaves of the range, if all are in memory.
    fn frames_here(&mut self, range: BlockRange) -> Option<[Option<FrameIndex>; 2]> {
        let mut frames = [None; 2];
        for (which, leaf) in leaves_of(range).enumerate() {
            match self.map.find(range.volume, leaf) {
                Presence::Here(frame) => frames[which] = Some(frame),
                _ => return None,
            }
        }
        Some(frames)
    }

    /// How many blocks of the range have no place on the device yet.
    fn count_new_blocks(&self, range: BlockRange, frames: [Option<FrameIndex>; 2]) -> u32 {
        let first_leaf = range.block / LEAF_BLOCKS;
        let is_new = |block: &u32| {
            let frame = frames[(block / LEAF_BLOCKS - first_leaf) as usize].expect("gathered");
            !self.map.get(frame, block % LEAF_BLOCKS).place.is_on_device()
        };
        let new = (range.block..range.block + range.count).filter(is_new).count();
        u32::try_from(new).expect("at most a piece")
    }

    /// Would so many more live blocks leave the cleaner enough to work with? Overwriting adds none.
    fn has_room_for(&self, new_blocks: u32) -> bool {
        if new_blocks == 0 {
            return true;
        }
        let taken = self.segments.live_total() + self.unapplied_new_blocks + self.promised_blocks();
        let wanted = taken + u64::from(new_blocks);
        wanted <= self.capacity_blocks()
    }
}

/// The leaves that a range touches: one or two.
pub(super) fn leaves_of(range: BlockRange) -> impl Iterator<Item = u32> {
    let last = range.block + (range.count - 1);
    range.block / LEAF_BLOCKS..=last / LEAF_BLOCKS
}
