//! The segments of a lane: what lives in each, which can be written and which can be emptied.
//!
//! ```text
//!            lend                open               seal              live = 0, checkpoint, no reader
//!   foreign ------> zeroing ---> free ---> open ---------> sealed ----------------------------------> free
//!                   (first use only)                         | the cleaner moves what lives
//! ```
//!
//! A segment becomes free again only when a checkpoint without a reference to it stands in all four roots, and the
//! last read of it has ended.

use super::checkpoint_body::SegmentRecord;
use super::layout::{Layout, Place, SegmentIndex};
use std::collections::VecDeque;

/// What a segment is to this lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentState {
    /// Not lent to this lane.
    Foreign,
    /// Ready to be written.
    Free,
    /// A stream writes to it or will do so next.
    Open,
    /// Written, and not to be written again before it was freed.
    Sealed,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    state: SegmentState,
    /// Blocks that the map, a leaf's parent or a root refers to.
    live: u32,
    /// Reads under way.
    readers: u32,
    /// Batches written but not yet applied to the map.
    unapplied: u32,
    /// Volumes whose order may still need what is written in it.
    keepers: u32,
    /// The cleaner has dealt with it and it waits for that to take effect, or holds what cannot be moved.
    cleaned: bool,
    /// The cleaner found damaged blocks and left them. When space is short it looks again, and gives them up if they
    /// are still damaged.
    damaged: bool,
    /// Do the batches in it belong to the clients' stream? Nothing if that is not known.
    of_clients: Option<bool>,
    newest_number: u64,
}

/// The segments of one lane, by their position in the pool.
#[derive(Debug)]
pub struct SegmentTable {
    layout: Layout,
    segments: Vec<Segment>,
    free: VecDeque<SegmentIndex>,
    /// Unreferenced by the newest checkpoint but still being read.
    still_read: Vec<SegmentIndex>,
    live_total: u64,
    owned: u32,
    /// Sealed segments with nothing alive and not kept, including those in `still_read`.
    dead: u32,
    /// Sealed segments in which something lives.
    occupied: u32,
    /// Segments that the cleaner could not empty, because of damage, and the blocks that live in them.
    stuck: (u32, u64),
}

impl Segment {
    fn is_owned(&self) -> bool {
        self.state != SegmentState::Foreign
    }

    fn is_occupied(&self) -> bool {
        self.state == SegmentState::Sealed && self.live > 0
    }

    fn is_dead(&self) -> bool {
        self.state == SegmentState::Sealed && self.live == 0 && self.unapplied == 0 && self.keepers == 0
    }
}

const FOREIGN: Segment = Segment {
    state: SegmentState::Foreign,
    live: 0,
    readers: 0,
    unapplied: 0,
    keepers: 0,
    cleaned: false,
    damaged: false,
    of_clients: None,
    newest_number: 0,
};

impl SegmentTable {
    /// A lane that owns nothing in a pool of `segments`.
    #[must_use]
    pub fn new(layout: Layout, segments: u32) -> SegmentTable {
        SegmentTable {
            layout,
            segments: vec![FOREIGN; segments as usize],
            free: VecDeque::new(),
            still_read: Vec::new(),
            live_total: 0,
            owned: 0,
            dead: 0,
            occupied: 0,
            stuck: (0, 0),
        }
    }

    /// The pool has grown.
    pub fn grow(&mut self, segments: u32) {
        assert!(segments as usize >= self.segments.len());
        self.segments.resize(segments as usize, FOREIGN);
    }

    /// Takes over a segment that a checkpoint lists.
    pub fn restore(&mut self, record: &SegmentRecord) {
        self.change(record.segment, |segment| {
            segment.state = SegmentState::Sealed;
            segment.live = record.live_blocks;
            segment.newest_number = record.newest_number;
        });
    }

    /// Rolling forward found batches in a segment that the checkpoint may not list.
    pub fn restore_found(&mut self, segment: SegmentIndex, number: u64) {
        if self.state(segment) == SegmentState::Foreign {
            self.set_state(segment, SegmentState::Sealed);
        }
        self.note_batch(segment, number);
    }

    /// The newest batch of the segment that counts: recovery discarded what follows it there.
    pub fn restore_newest(&mut self, segment: SegmentIndex, number: u64) {
        self.segments[segment.0 as usize].newest_number = number;
    }

    /// A stream goes on in a segment that it had begun, or reserved, before a restart.
    pub fn reopen(&mut self, segment: SegmentIndex) {
        assert!(matches!(self.state(segment), SegmentState::Foreign | SegmentState::Sealed));
        self.set_state(segment, SegmentState::Open);
    }

    /// The pool lends a segment that is ready to be written.
    pub fn receive(&mut self, segment: SegmentIndex) {
        assert_eq!(self.state(segment), SegmentState::Foreign);
        self.set_state(segment, SegmentState::Free);
        self.free.push_back(segment);
    }

    /// Gives a free segment back to the pool.
    pub fn give_back(&mut self) -> Option<SegmentIndex> {
        let segment = self.free.pop_back()?;
        self.set_state(segment, SegmentState::Foreign);
        Some(segment)
    }

    /// A free segment, to be written.
    pub fn open(&mut self) -> Option<SegmentIndex> {
        let segment = self.free.pop_front()?;
        self.set_state(segment, SegmentState::Open);
        let slot = &mut self.segments[segment.0 as usize];
        (slot.cleaned, slot.damaged, slot.of_clients) = (false, false, None);
        Some(segment)
    }

    /// A stream has left the segment.
    pub fn seal(&mut self, segment: SegmentIndex) {
        assert_eq!(self.state(segment), SegmentState::Open);
        self.set_state(segment, SegmentState::Sealed);
    }

    fn set_state(&mut self, segment: SegmentIndex, state: SegmentState) {
        self.change(segment, |slot| slot.state = state);
    }

    /// The one place where a segment changes, so that the totals follow.
    fn change(&mut self, segment: SegmentIndex, edit: impl FnOnce(&mut Segment)) {
        let slot = &mut self.segments[segment.0 as usize];
        let before = *slot;
        edit(slot);
        let after = *slot;
        assert!(after.live <= self.layout.segment_blocks);
        self.owned = self.owned + u32::from(after.is_owned()) - u32::from(before.is_owned());
        self.dead = self.dead + u32::from(after.is_dead()) - u32::from(before.is_dead());
        self.occupied = self.occupied + u32::from(after.is_occupied()) - u32::from(before.is_occupied());
        self.live_total = self.live_total + u64::from(after.live) - u64::from(before.live);
    }

    /// What a segment is.
    #[must_use]
    pub fn state(&self, segment: SegmentIndex) -> SegmentState {
        self.segments[segment.0 as usize].state
    }

    /// Segments ready to be written.
    #[must_use]
    pub fn free_count(&self) -> u32 {
        u32::try_from(self.free.len()).expect("segments fit 32 bits")
    }

    /// Segments of this lane, whatever their state.
    #[must_use]
    pub fn owned_count(&self) -> u32 {
        self.owned
    }

    /// Segments in the pool.
    #[must_use]
    pub fn pool_count(&self) -> u32 {
        u32::try_from(self.segments.len()).expect("segments fit 32 bits")
    }

    /// Blocks that something refers to.
    #[must_use]
    pub fn live_total(&self) -> u64 {
        self.live_total
    }

    /// Blocks of one segment that something refers to.
    #[must_use]
    pub fn live(&self, segment: SegmentIndex) -> u32 {
        self.segments[segment.0 as usize].live
    }

    /// Something refers to `place` from now on.
    pub fn add_live(&mut self, place: Place) {
        self.change(self.layout.segment_of(place), |slot| slot.live += 1);
    }

    /// Nothing refers to `place` any more; one that is not on the device is ignored.
    pub fn remove_live(&mut self, place: Place) {
        if place.is_on_device() {
            let segment = self.layout.segment_of(place);
            self.change(segment, |slot| slot.live = slot.live.checked_sub(1).expect("a place dies once"));
        }
    }

    /// A batch is being written to the segment and waits to be applied.
    pub fn begin_batch(&mut self, segment: SegmentIndex, number: u64) {
        self.change(segment, |slot| slot.unapplied += 1);
        self.note_batch(segment, number);
    }

    fn note_batch(&mut self, segment: SegmentIndex, number: u64) {
        let newest = &mut self.segments[segment.0 as usize].newest_number;
        *newest = number.max(*newest);
    }

    /// The batch was applied, or given up.
    pub fn end_batch(&mut self, segment: SegmentIndex) {
        self.change(segment, |slot| {
            slot.unapplied = slot.unapplied.checked_sub(1).expect("a batch ends once");
        });
    }

    /// The segment is not to be freed, even if nothing lives in it.
    pub fn keep(&mut self, segment: SegmentIndex) {
        assert!(
            self.state(segment) != SegmentState::Foreign,
            "segment {segment:?} is kept by a lane that owns it"
        );
        self.change(segment, |slot| slot.keepers += 1);
    }

    /// Ends one [`Self::keep`].
    pub fn stop_keeping(&mut self, segment: SegmentIndex) {
        self.change(segment, |slot| slot.keepers = slot.keepers.checked_sub(1).expect("kept before"));
    }

    /// Is the segment kept even if nothing lives in it?
    #[must_use]
    pub fn is_kept(&self, segment: SegmentIndex) -> bool {
        self.segments[segment.0 as usize].keepers > 0
    }

    /// A read of the segment begins: it must not be written meanwhile.
    pub fn begin_read(&mut self, segment: SegmentIndex) {
        self.segments[segment.0 as usize].readers += 1;
    }

    /// A read has ended.
    pub fn end_read(&mut self, segment: SegmentIndex) {
        let slot = &mut self.segments[segment.0 as usize];
        slot.readers = slot.readers.checked_sub(1).expect("a read ends once");
        if slot.readers == 0
            && let Some(position) = self.still_read.iter().position(|other| *other == segment)
        {
            self.still_read.swap_remove(position);
            self.set_state(segment, SegmentState::Free);
            self.free.push_back(segment);
        }
    }

    /// Can a checkpoint that cuts now leave the segment out?
    #[must_use]
    pub fn is_dead(&self, segment: SegmentIndex) -> bool {
        self.segments[segment.0 as usize].is_dead() && !self.still_read.contains(&segment)
    }

    /// Is everything that was written to the segment in effect, and nothing more to come?
    #[must_use]
    pub fn is_settled(&self, segment: SegmentIndex) -> bool {
        let slot = &self.segments[segment.0 as usize];
        slot.state == SegmentState::Sealed && slot.unapplied == 0
    }

    /// Sealed segments that hold nothing alive: a checkpoint would free so many.
    #[must_use]
    pub fn dead_count(&self) -> u32 {
        self.dead - u32::try_from(self.still_read.len()).expect("segments fit 32 bits")
    }

    /// The newest checkpoint, in all four roots, does not refer to the segment.
    pub fn free_after_checkpoint(&mut self, segment: SegmentIndex) {
        assert!(self.is_dead(segment), "segment {segment:?} came back to life");
        if self.segments[segment.0 as usize].readers > 0 {
            self.still_read.push(segment);
        } else {
            self.set_state(segment, SegmentState::Free);
            self.free.push_back(segment);
        }
    }

    /// Segments that will be free when the last read of them has ended.
    #[must_use]
    pub fn still_read_count(&self) -> usize {
        self.still_read.len()
    }

    /// Segments that the cleaner has dealt with and that are not empty.
    #[must_use]
    pub fn cleaned_and_live(&self) -> Vec<SegmentIndex> {
        let cleaned = |segment: &SegmentIndex| self.is_cleaned(*segment) && self.live(*segment) > 0;
        self.indices().filter(cleaned).collect()
    }

    /// Of `cleaned`, which a whole checkpoint has followed, those that still hold something cannot be emptied, unless
    /// it is damaged blocks that may yet be given up.
    pub fn note_stuck(&mut self, cleaned: &[SegmentIndex]) {
        let stuck = cleaned.iter().filter(|segment| {
            self.is_cleaned(**segment) && !self.is_damaged(**segment) && self.live(**segment) > 0
        });
        self.stuck =
            stuck.fold((0, 0), |(count, live), segment| (count + 1, live + u64::from(self.live(*segment))));
    }

    /// How many segments cannot be emptied, and how many blocks live in them.
    #[must_use]
    pub fn stuck(&self) -> (u32, u64) {
        self.stuck
    }

    /// Has the cleaner dealt with the segment already?
    #[must_use]
    pub fn is_cleaned(&self, segment: SegmentIndex) -> bool {
        self.segments[segment.0 as usize].cleaned
    }

    /// Did the cleaner leave damaged blocks in the segment?
    #[must_use]
    pub fn is_damaged(&self, segment: SegmentIndex) -> bool {
        self.segments[segment.0 as usize].damaged
    }

    /// The cleaner left damaged blocks in the segment, or none.
    pub fn mark_damaged(&mut self, segment: SegmentIndex, damaged: bool) {
        self.segments[segment.0 as usize].damaged = damaged;
    }

    /// The cleaner has dealt with the segment.
    pub fn mark_cleaned(&mut self, segment: SegmentIndex, cleaned: bool) {
        self.segments[segment.0 as usize].cleaned = cleaned;
    }

    /// The segment whose cleaning gains most: free space over the cost of reading it and writing what lives, times
    /// age (Rosenblum and Ousterhout, 1992). Old segments have stopped dying by themselves. With `urgent` only the
    /// free space counts: an old segment that is nearly full gains next to nothing now, and one with damaged blocks
    /// has its second turn. What lives in it must fit into `room_blocks`: a victim that cannot be emptied frees nothing.
    #[must_use]
    pub fn choose_victim(&self, now_number: u64, urgent: bool, room_blocks: u32) -> Option<SegmentIndex> {
        if self.occupied == 0 {
            // A lane without data is asked in every turn.
            return None;
        }
        let blocks = f64::from(self.layout.segment_blocks);
        let score = |segment: &Segment| {
            let live = f64::from(segment.live) / blocks;
            let age = if urgent { 0 } else { now_number.saturating_sub(segment.newest_number).min(1 << 40) };
            #[expect(clippy::cast_precision_loss, reason = "a ranking, not an account")]
            let age = (age + 64) as f64;
            (1.0 - live) / (1.0 + live) * age.sqrt()
        };
        let candidates = self.segments.iter().enumerate().filter(|(_, segment)| {
            segment.is_occupied()
                && segment.live < self.layout.usable_blocks()
                && segment.live <= room_blocks
                && segment.unapplied == 0
                && (!segment.cleaned || urgent && segment.damaged)
        });
        let scored = candidates.map(|(index, segment)| (index, score(segment)));
        let best = scored.max_by(|(_, a), (_, b)| a.total_cmp(b));
        best.map(|(index, _)| SegmentIndex(u32::try_from(index).expect("segments fit 32 bits")))
    }

    /// Every segment of the pool.
    pub fn indices(&self) -> impl Iterator<Item = SegmentIndex> + use<> {
        (0..self.pool_count()).map(SegmentIndex)
    }

    /// The live counts of all segments, to be kept by a checkpoint as they are now.
    #[must_use]
    pub fn live_counts(&self) -> Vec<u32> {
        self.segments.iter().map(|segment| segment.live).collect()
    }

    /// May the segment hold batches of the clients' stream?
    #[must_use]
    pub fn may_be_of_clients(&self, segment: SegmentIndex) -> bool {
        self.segments[segment.0 as usize].of_clients != Some(false)
    }

    /// It is known whose batches the segment holds.
    pub fn note_of_clients(&mut self, segment: SegmentIndex, of_clients: bool) {
        self.segments[segment.0 as usize].of_clients = Some(of_clients);
    }

    /// Number of the newest batch in a segment.
    #[must_use]
    pub fn newest_number(&self, segment: SegmentIndex) -> u64 {
        self.segments[segment.0 as usize].newest_number
    }
}
