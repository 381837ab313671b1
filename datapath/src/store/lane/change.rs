//! Requests that change a volume: from the caller's hand into a batch.

use super::stream::{Record, StreamKind};
use super::{BlockRange, Context, Lane, OwnedPayload};
use crate::limits::EXACT_RECEIVE_BYTES_MIN;
use crate::memory::Memory;
use crate::request::RequestError;
use crate::store::batch::{Entry, EntryKind};
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
    cookie: u32,
    kind: EntryKind,
    range: BlockRange,
    payload: Option<OwnedPayload>,
    durable: bool,
    frames: [Option<FrameIndex>; 2],
    waited_for_space: bool,
}

enum Verdict {
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
        payload: Option<OwnedPayload>,
        durable: bool,
    ) {
        let frames = [None; 2];
        let change = Change { cookie, kind, range, payload, durable, frames, waited_for_space: false };
        let index = self.changes.insert(change);
        self.try_change(context, index);
    }

    /// Takes a change as far as it can go now. Called again when a leaf has come, or space.
    pub(super) fn try_change<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) {
        let queue = usize::from(self.changes.get(index).payload.is_none());
        if !self.blocked[queue].is_empty() && !self.failed {
            self.blocked[queue].push_back(index);
            return;
        }
        if matches!(self.advance_change(context, index), Verdict::WaitForSpace) {
            self.blocked[queue].push_back(index);
        }
    }

    /// Space, buffers or segments may have come: changes go on in the order in which they came.
    pub(super) fn retry_blocked<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for queue in [1, 0] {
            while let Some(index) = self.blocked[queue].front().copied() {
                if matches!(self.advance_change(context, index), Verdict::WaitForSpace) {
                    break;
                }
                self.blocked[queue].pop_front();
            }
        }
    }

    /// A change waits for space and none can come, as when all garbage lies in segments that damage keeps from being
    /// emptied: it is refused rather than left to wait for ever.
    pub(super) fn refuse_hopeless<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        if !self.blocked[0].is_empty() && self.cleaning_is_over() {
            let index = self.blocked[0].pop_front().expect("not empty");
            self.counters.refused_no_space += 1;
            self.refuse_change(context, index, RequestError::NoSpace);
        }
    }

    fn advance_change<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) -> Verdict {
        let verdict = self.judge_change(context, index);
        match verdict {
            Verdict::Appended => {
                self.changes.remove(index);
            }
            Verdict::Refused(error) => self.refuse_change(context, index, error),
            Verdict::WaitForLeaf | Verdict::WaitForSpace => {}
        }
        verdict
    }

    fn judge_change<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) -> Verdict {
        if self.failed {
            return Verdict::Refused(RequestError::Io);
        }
        let range = self.changes.get(index).range;
        if let Err(verdict) = self.gather_leaves(context, index, range) {
            return verdict;
        }
        let change = self.changes.get(index);
        let (kind, frames, payload) = (change.kind, change.frames, change.payload);
        let new_blocks = if payload.is_some() { self.count_new_blocks(range, frames) } else { 0 };
        if !self.has_room_for(new_blocks) {
            if self.unapplied_new_blocks == 0 {
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
        let change = self.changes.get(index);
        let (cookie, durable) = (Some(change.cookie), change.durable);
        let record = Record { volume: range.volume, frames, cookie, durable, new_blocks };
        let entry = self.entry(kind, range);
        let appended = match payload {
            Some(payload) if range.count > SHARED_BLOCKS_MAX => {
                self.append_owned(context, &entry, payload, record)
            }
            Some(payload) => {
                let done =
                    self.append_small(context, StreamKind::Client, &entry, Some(payload.blocks()), record);
                if done {
                    context.pages.release(payload.whole);
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

    /// Brings in and pins the leaves of the range.
    fn gather_leaves<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
        range: BlockRange,
    ) -> Result<(), Verdict> {
        for (which, leaf) in leaves_of(range).enumerate() {
            if self.changes.get(index).frames[which].is_some() {
                continue;
            }
            if self.map.is_overfull() && self.map.dirty_count() > 0 {
                self.checkpointer.request();
            }
            let frame = match self.map.find(range.volume, leaf) {
                Presence::Here(frame) => frame,
                Presence::Nowhere if !self.map.has_room_for_leaf() => {
                    self.counters.refused_no_space += 1;
                    return Err(Verdict::Refused(RequestError::NoSpace));
                }
                Presence::Nowhere => self.map.admit(range.volume, leaf),
                Presence::Loading(_) | Presence::Away(_) => {
                    self.load_leaf(context, range.volume, leaf, super::leaf::Waiter::Change(index));
                    return Err(Verdict::WaitForLeaf);
                }
            };
            self.map.pin(frame);
            self.changes.get_mut(index).frames[which] = Some(frame);
        }
        Ok(())
    }

    /// Ends a change with an error: its leaf cannot be read, or the lane has failed.
    pub(super) fn refuse_change<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
        error: RequestError,
    ) {
        let change = self.changes.remove(index);
        change.frames.iter().flatten().for_each(|frame| self.map.unpin(*frame));
        if let Some(payload) = change.payload {
            context.pages.release(payload.whole);
        }
        self.complete(change.cookie, Err(error));
    }

    /// The lane has failed: what waits for space waits in vain. What waits for a leaf is refused when that comes.
    pub(super) fn fail_changes<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for queue in [0, 1] {
            while let Some(index) = self.blocked[queue].pop_front() {
                self.refuse_change(context, index, RequestError::Io);
            }
        }
    }

    fn entry(&self, kind: EntryKind, range: BlockRange) -> Entry {
        let volume = &self.volumes[range.volume as usize];
        Entry {
            kind,
            volume: volume.record.number,
            block: range.block,
            count: range.count,
            epoch: volume.record.epoch,
            old_place: Place::NONE,
            sequence: volume.numbered + 1,
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
        self.volumes[range.volume as usize].numbered = entry.sequence;
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
        let wanted = self.segments.live_total() + self.unapplied_new_blocks + u64::from(new_blocks);
        wanted <= self.capacity_blocks()
    }
}

/// The leaves that a range touches: one or two.
pub(super) fn leaves_of(range: BlockRange) -> impl Iterator<Item = u32> {
    let last = range.block + (range.count - 1);
    range.block / LEAF_BLOCKS..=last / LEAF_BLOCKS
}
