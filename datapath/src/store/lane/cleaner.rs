//! The cleaner: empties segments so that a checkpoint can free them.
//!
//! ```text
//!   idle ──▶ reading the victim ──▶ moving what lives ──▶ idle
//!                                     │    ▲
//!                                     ▼    │
//!                                   waiting for leaves
//! ```
//!
//! A descriptor says which block each payload block was written for; it lives if the map still points at it. What
//! lives is copied, sorted by volume and block, into the survivors' stream with its sequence unchanged. A leaf that
//! lives is not copied but marked, and the next checkpoint writes it elsewhere.

use super::leaf::Waiter;
use super::stream::{Record, StreamKind};
use super::{Context, DiskEffect, Lane, Operation, Volume};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::store::batch::{Descriptor, Entry, EntryKind};
use crate::store::bugs::PlantedBug;
use crate::store::layout::{Place, SegmentIndex};
use crate::store::map::{FrameIndex, LEAF_BLOCKS, Presence};
use crate::units::{BLOCK_BYTES, MemoryRange};

/// Blocks of one read of the victim: 512 KiB.
const READ_BLOCKS: u32 = 128;
/// Leaves that are loaded at once for one victim.
const LEAVES_AHEAD: usize = 16;
/// Batches of survivors being written at once.
const SURVIVOR_BATCHES_WRITING: usize = 2;

/// A payload block of the victim and what it was written for.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    volume: u32,
    /// The leaf that decides whether it lives, or that it is.
    leaf: u32,
    block: u32,
    is_leaf: bool,
    place: Place,
    epoch: u32,
    sequence: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// Blocks before this one are read, or being read, in so many reads.
    Reading {
        next_block: u32,
        under_way: u32,
    },
    Moving,
}

/// The cleaner of a lane.
#[derive(Debug, Default)]
pub(super) struct Cleaner {
    phase: Phase,
    victim: Option<SegmentIndex>,
    read_failed: bool,
    /// Damaged blocks were found and left for a second look.
    found_damage: bool,
    /// Space or leaves that may be changed are lacking: a checkpoint brings them.
    starved: bool,
    /// A whole segment.
    buffer: MemoryRange,
    candidates: Vec<Candidate>,
    next: usize,
    /// Leaves on their way in.
    leaves_coming: u32,
    /// Leaves that cannot be read: what they map stays where it is.
    unreadable: Vec<(u32, u32)>,
    /// The last turn ended because its budget was used up, not because anything was lacking.
    interrupted: bool,
}

impl Cleaner {
    pub(super) fn new(buffer: MemoryRange) -> Cleaner {
        Cleaner { buffer, ..Cleaner::default() }
    }
}

enum Progress {
    Done,
    Wait,
}

impl Lane {
    /// Does the cleaner, or a removal, have work that no device operation will wake it for?
    #[must_use]
    pub fn wants_turn(&self) -> bool {
        (self.cleaner.interrupted || self.sweep_goes_on) && !self.failed
    }

    /// Free segments now, and those that a checkpoint would free.
    fn segments_coming(&self) -> u32 {
        self.segments.free_count() + self.pool_share.free + self.segments.dead_count()
    }

    fn clean_below(&self) -> u32 {
        self.segments_kept(StreamKind::Client) + 4 + self.pool_share.segments / 48
    }

    fn wants_cleaning(&self) -> bool {
        let spare = self.segments.owned_count() > self.segments_needed();
        self.segments_coming() < self.clean_below() || self.pool_share.others_are_hungry && spare
    }

    /// Is there nothing, in this lane or another, that could bring space for a change that waits for it?
    pub(super) fn cleaning_is_over(&self) -> bool {
        self.map.dirty_count() == 0
            && self.pool_share.free == 0
            && !self.pool_share.others_may_give
            && self.streams.iter().all(super::stream::Stream::is_settled)
            && !self.is_space_coming()
    }

    /// Will segments become free by what is under way here, or could be begun?
    fn is_space_coming(&self) -> bool {
        self.cleaner.phase != Phase::Idle
            || !self.checkpointer.is_idle()
            || self.segments.dead_count() > 0
            || self.segments.still_read_count() > 0
            || self.zeroing.count() > 0
            || self.segments.choose_victim(self.last_number, true, self.survivor_room_blocks()).is_some()
    }

    /// May this lane still come to give segments back, for another that waits?
    #[must_use]
    pub fn may_give(&self) -> bool {
        !self.failed && self.segments.owned_count() > self.segments_needed() && self.is_space_coming()
    }

    /// So few segments are left that those already emptied are needed.
    pub(super) fn space_wants_checkpoint(&self) -> bool {
        let free = self.segments.free_count() + self.pool_share.free;
        let kept = self.segments_kept(StreamKind::Client);
        let waits = self.has_blocked_changes();
        let worth_it = self.segments.dead_count() >= self.clean_below().saturating_sub(kept + 2).max(1);
        self.pool_share.others_are_hungry && self.segments.dead_count() > 0
            || free <= kept + 1 && (worth_it || waits && self.segments.dead_count() > 0)
            || waits
                && (self.cleaner.phase == Phase::Idle || self.cleaner.starved)
                && self.map.dirty_count() > 0
                && free <= kept + 1
    }

    pub(super) fn upkeep_cleaner<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        if self.config.bugs.has(PlantedBug::SegmentReusedEarly) {
            let dead = self.segments.indices().find(|segment| self.segments.is_dead(*segment));
            dead.into_iter().for_each(|segment| self.segments.free_after_checkpoint(segment));
        }
        if self.cleaner.phase == Phase::Idle && self.is_open() && self.wants_cleaning() {
            self.start_cleaning();
        }
        if self.cleaner.phase == Phase::Moving && self.cleaner.leaves_coming == 0 {
            self.move_survivors(context);
            if self.is_starved_for_good() {
                self.put_victim_back();
            }
        }
    }

    /// Do clients wait for segments, or will soon?
    fn is_cleaning_urgent(&self) -> bool {
        self.segments.free_count() + self.pool_share.free <= self.segments_kept(StreamKind::Client)
    }

    fn start_cleaning(&mut self) {
        let urgent = self.is_cleaning_urgent();
        let room = self.survivor_room_blocks();
        let Some(victim) = self.segments.choose_victim(self.last_number, urgent, room) else { return };
        self.segments.mark_cleaned(victim, true);
        self.segments.begin_read(victim);
        self.cleaner.victim = Some(victim);
        self.cleaner.read_failed = false;
        self.cleaner.found_damage = false;
        self.cleaner.phase = Phase::Reading { next_block: 0, under_way: 0 };
        self.read_victim();
    }

    /// Reads on: piece by piece, since clients want the device too, or what is left at once if they wait for the segment.
    fn read_victim(&mut self) {
        let Phase::Reading { mut next_block, mut under_way } = self.cleaner.phase else {
            unreachable!("a victim is being read")
        };
        let victim = self.cleaner.victim.expect("a victim");
        let layout = self.config.layout;
        let urgent = self.is_cleaning_urgent();
        while next_block < layout.segment_blocks && (urgent || under_way == 0) {
            let blocks = READ_BLOCKS.min(layout.segment_blocks - next_block);
            let memory = self.cleaner.buffer.part(next_block * BLOCK_BYTES, blocks * BLOCK_BYTES);
            let place = layout.place(victim, next_block);
            self.start(Operation::VictimRead, |token| DiskEffect::Read { token, place, memory });
            next_block += blocks;
            under_way += 1;
        }
        self.cleaner.phase = Phase::Reading { next_block, under_way };
    }

    pub(super) fn finish_victim_read<M: Memory>(&mut self, context: &mut Context<'_, M>, good: bool) {
        let Phase::Reading { next_block, under_way } = self.cleaner.phase else {
            unreachable!("a victim is being read")
        };
        self.cleaner.read_failed |= !good;
        self.cleaner.phase = Phase::Reading { next_block, under_way: under_way - 1 };
        if next_block < self.config.layout.segment_blocks {
            self.read_victim();
        }
        if !matches!(self.cleaner.phase, Phase::Reading { under_way: 0, .. }) {
            return;
        }
        if self.cleaner.read_failed {
            // Marked as cleaned, so that others have their turn; a restart tries again. What was found in it before
            // keeps its second look.
            let victim = self.cleaner.victim.expect("a victim");
            self.cleaner.found_damage = self.segments.is_damaged(victim);
            return self.end_cleaning(false);
        }
        self.list_candidates(context.memory.bytes(self.cleaner.buffer));
        self.cleaner.phase = Phase::Moving;
        self.cleaner.next = 0;
        self.cleaner.unreadable.clear();
    }

    /// Walks the victim's descriptors. Where one is damaged, the next good one is searched for block by block.
    fn list_candidates(&mut self, segment: &[u8]) {
        let victim = self.cleaner.victim.expect("a victim");
        let layout = self.config.layout;
        let mut candidates = std::mem::take(&mut self.cleaner.candidates);
        candidates.clear();
        let mut block = 0;
        while block < layout.segment_blocks {
            let descriptor = Descriptor::decode(&segment[(block * BLOCK_BYTES) as usize..]);
            let fits = descriptor.filter(|found| block + found.total_blocks() <= layout.segment_blocks);
            let Some(descriptor) = fits else {
                block += 1;
                continue;
            };
            let movable = |kind: EntryKind| kind.has_payload() && kind != EntryKind::Checkpoint;
            for view in descriptor.entries().filter(|view| movable(view.entry.kind)) {
                let Some(volume) = self.volume_position(view.entry.volume) else { continue };
                let first = layout.place(victim, block + 1).plus(view.payload_index);
                candidates.extend((0..view.entry.count).map(|index| {
                    let is_leaf = view.entry.kind == EntryKind::Leaf;
                    let block = view.entry.block.saturating_add(index);
                    Candidate {
                        volume,
                        leaf: if is_leaf { block } else { block / LEAF_BLOCKS },
                        block,
                        is_leaf,
                        place: first.plus(index),
                        epoch: view.entry.epoch,
                        sequence: view.entry.sequence,
                    }
                }));
            }
            block += descriptor.total_blocks();
        }
        candidates.sort_unstable_by_key(|candidate| (candidate.volume, candidate.block, candidate.place.0));
        self.cleaner.candidates = candidates;
    }

    /// The position of a volume in this lane, by its number in the pool.
    #[must_use]
    pub fn volume_position(&self, number: u32) -> Option<u32> {
        let is_it = |volume: &Volume| volume.record.number == number && volume.is_recorded();
        let position = self.volumes.iter().position(is_it)?;
        u32::try_from(position).ok()
    }

    /// How many candidates to look at in this turn: more, the less space is left.
    fn cleaning_budget(&self) -> usize {
        let free = self.segments.free_count() + self.pool_share.free;
        if free <= self.segments_kept(StreamKind::Client) + 2 { 1024 } else { 128 }
    }

    fn move_survivors<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        self.cleaner.interrupted = false;
        self.cleaner.starved = false;
        for _ in 0..self.cleaning_budget() {
            let Some(candidate) = self.cleaner.candidates.get(self.cleaner.next).copied() else {
                if self.streams[StreamKind::Survivor.index()].open.is_some() {
                    self.seal(context, StreamKind::Survivor, false);
                }
                return self.end_cleaning(true);
            };
            match self.deal_with(context, candidate) {
                Progress::Done => self.cleaner.next += 1,
                Progress::Wait => return,
            }
        }
        self.cleaner.interrupted = true;
    }

    fn deal_with<M: Memory>(&mut self, context: &mut Context<'_, M>, candidate: Candidate) -> Progress {
        let on_device = self.map.table(candidate.volume).leaf_on_device(candidate.leaf);
        if candidate.is_leaf && on_device.place != candidate.place {
            return Progress::Done;
        }
        match self.map.find(candidate.volume, candidate.leaf) {
            Presence::Nowhere => Progress::Done,
            Presence::Here(frame) if candidate.is_leaf => {
                if !self.may_dirty([Some(frame), None]) {
                    return self.starve(context);
                }
                self.map.touch(frame);
                Progress::Done
            }
            Presence::Here(frame) => self.move_block(context, candidate, frame),
            Presence::Away(_) if self.cleaner.unreadable.contains(&(candidate.volume, candidate.leaf)) => {
                Progress::Done
            }
            Presence::Away(_) | Presence::Loading(_) => {
                self.ask_for_leaves(context);
                Progress::Wait
            }
        }
    }

    fn ask_for_leaves<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        // A small cache must not lose the first of them to the last.
        let ahead = (self.map.frames_max() / 8).clamp(1, LEAVES_AHEAD);
        let mut last = None;
        for index in self.cleaner.next..self.cleaner.candidates.len() {
            let Candidate { volume, leaf, .. } = self.cleaner.candidates[index];
            if last.replace((volume, leaf)) == Some((volume, leaf)) {
                continue;
            }
            if matches!(self.map.find(volume, leaf), Presence::Away(_) | Presence::Loading(_)) {
                self.cleaner.leaves_coming += 1;
                self.load_leaf(context, volume, leaf, Waiter::Cleaner { volume, leaf });
            }
            if self.cleaner.leaves_coming as usize == ahead {
                return;
            }
        }
    }

    /// A leaf has come, or cannot be read.
    pub(super) fn cleaner_leaf_came(&mut self, volume: u32, leaf: u32, intact: bool) {
        self.cleaner.leaves_coming -= 1;
        if !intact {
            self.cleaner.unreadable.push((volume, leaf));
        }
    }

    fn move_block<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        candidate: Candidate,
        frame: FrameIndex,
    ) -> Progress {
        let mapping = self.map.get(frame, candidate.block % LEAF_BLOCKS);
        if mapping.place != candidate.place {
            return Progress::Done;
        }
        let victim = self.config.layout.segment_of(candidate.place);
        let offset = candidate.place.0 - self.config.layout.place(victim, 0).0;
        let payload = self.cleaner.buffer.part(offset * BLOCK_BYTES, BLOCK_BYTES);
        let is_good = crc32c(context.memory.bytes(payload)) == mapping.crc;
        if !is_good && !self.segments.is_damaged(victim) {
            // Copying would give rot a good checksum. It stays, with its segment, until space is short.
            self.counters.checksum_errors += 1;
            self.cleaner.found_damage = true;
            return Progress::Done;
        }
        if self.streams[StreamKind::Survivor.index()].writing_count() >= SURVIVOR_BATCHES_WRITING {
            return Progress::Wait;
        }
        let entry = Entry {
            kind: if is_good { EntryKind::Move } else { EntryKind::Lost },
            volume: self.volumes[candidate.volume as usize].record.number,
            block: candidate.block,
            count: 1,
            epoch: candidate.epoch,
            old_place: candidate.place,
            sequence: candidate.sequence,
        };
        let frames = [Some(frame), None];
        let record = Record { volume: candidate.volume, frames, cookie: None, durable: false, new_blocks: 0 };
        if self.streams[StreamKind::Survivor.index()].open.is_none() && self.batch_buffers.is_empty() {
            return Progress::Wait;
        }
        let payload = is_good.then_some(payload);
        if !self.may_dirty(frames)
            || !self.append_small(context, StreamKind::Survivor, &entry, payload, record)
        {
            return self.starve(context);
        }
        self.map.pin(frame);
        self.counters.moved_blocks += u64::from(is_good);
        self.counters.lost_blocks += u64::from(!is_good);
        Progress::Done
    }

    /// The victim cannot be dealt with further before a checkpoint. If even that has brought no space, it is put back.
    fn starve<M: Memory>(&mut self, context: &mut Context<'_, M>) -> Progress {
        self.cleaner.starved = true;
        if self.streams[StreamKind::Survivor.index()].open.is_some() {
            self.seal(context, StreamKind::Survivor, false);
        }
        if self.checkpointer.is_idle() && self.map.dirty_count() + self.segments.dead_count() as usize > 0 {
            self.checkpointer.request();
        }
        Progress::Wait
    }

    /// Neither the checkpoint nor anything else under way will bring the space that the victim needs.
    fn is_starved_for_good(&self) -> bool {
        self.cleaner.starved
            && self.checkpointer.is_idle()
            && self.map.dirty_count() == 0
            && self.segments.dead_count() == 0
            && self.pool_share.free == 0
            && self.streams.iter().all(super::stream::Stream::is_settled)
    }

    fn put_victim_back(&mut self) {
        let victim = self.cleaner.victim.expect("a victim");
        let was_damaged = self.segments.is_damaged(victim);
        self.end_cleaning(false);
        self.segments.mark_cleaned(victim, was_damaged);
        self.segments.mark_damaged(victim, was_damaged);
    }

    fn end_cleaning(&mut self, emptied: bool) {
        let victim = self.cleaner.victim.take().expect("a victim");
        self.segments.mark_damaged(victim, self.cleaner.found_damage);
        self.segments.end_read(victim);
        self.cleaner.phase = Phase::Idle;
        self.counters.cleaned_segments += u64::from(emptied);
    }
}

impl Cleaner {
    /// For failing tests.
    pub(super) fn describe(&self) -> String {
        format!(
            "cleaner {:?} of {:?}, candidate {} of {}, leaves coming {}, unreadable {:?}, interrupted {}",
            self.phase,
            self.victim,
            self.next,
            self.candidates.len(),
            self.leaves_coming,
            self.unreadable,
            self.interrupted
        )
    }
}
