//! Taking a volume out of a lane that goes on serving others.
//!
//! ```text
//!   sweeping ──no leaf left──▶ swept ──cut without it──▶ leaving ──checkpoint done──▶ gone, answered
//! ```
//!
//! A leaf goes in one step: nothing refers to its blocks any more, and the table forgets it. So a checkpoint whose cut falls
//! between two leaves is true, and a process that dies meanwhile finds the volume again with the leaves that were left:
//! whoever wanted it removed wants that again. No leaf goes while a checkpoint is being written, since its body is made from
//! the tables after the cut. Nothing is logged, and no segment is written again before a checkpoint that knows nothing of the
//! volume stands in all roots.
//!
//! A leaf that cannot be read stays, with all its blocks, and so does the volume: which segments they live in is not known.

use super::leaf::Waiter;
use super::{Context, Lane, Volume};
use crate::memory::Memory;
use crate::request::RequestError;
use crate::store::checkpoint_body::VolumeRecord;
use crate::store::layout::Place;
use crate::store::map::{FrameIndex, LEAF_BLOCKS, Mapping, Presence};
use crate::store::root::LOGGED_STREAMS;

/// Leaves that go in one turn: clients want it, too.
const LEAVES_PER_TURN: u32 = 64;
/// Leaves on their way in at a time, in a cache that is large enough.
const LEAVES_AHEAD: usize = 16;
/// No volume has more leaves.
const LEAVES_END: u32 = u32::MAX / LEAF_BLOCKS + 1;

/// How far the removal of a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// The leaves below this one are gone, but for the damaged ones.
    Sweeping { cookie: u32, next_leaf: u32, coming: u32, damaged: u32 },
    /// No leaf is left; the next checkpoint does not name it.
    Swept { cookie: u32 },
    /// The checkpoint under way does not name it.
    Leaving { cookie: u32 },
    /// Its position can be given to another one.
    Gone,
    /// The lane has failed meanwhile.
    Failed,
}

impl Volume {
    /// Is it, or is it being, taken out of the lane?
    #[must_use]
    pub fn is_being_removed(&self) -> bool {
        self.removal.is_some()
    }

    /// Do checkpoints name it?
    pub(super) fn is_recorded(&self) -> bool {
        matches!(self.removal, None | Some(Removal::Sweeping { .. }))
    }
}

impl Lane {
    /// Takes a volume out. Answered when no root knows it any more, and what it held is free or will be without further
    /// checkpoints; with [`RequestError::Io`] if the lane fails, or a leaf of it cannot be read: then the volume stays, with
    /// what could not be told, until this is asked again.
    ///
    /// The caller asks nothing of the volume from now on, and nothing that it asked for is unanswered.
    ///
    /// # Panics
    /// If changes of the volume are under way, or it is being removed already.
    pub fn remove_volume(&mut self, cookie: u32, volume: u32) {
        let known = &mut self.volumes[volume as usize];
        assert!(known.order.queue.is_empty() && known.removal.is_none(), "volume {volume} is in use");
        if self.failed {
            return self.complete(cookie, Err(RequestError::Io));
        }
        known.order.promised_room = 0;
        known.removal = Some(Removal::Sweeping { cookie, next_leaf: 0, coming: 0, damaged: 0 });
        self.removals += 1;
    }

    /// Once per turn.
    pub(super) fn upkeep_removals<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        self.sweep_goes_on = false;
        // The lane's first checkpoint comes first, and every other one is of one instant.
        if self.removals == 0 || !self.checkpointer.is_between_checkpoints() {
            return;
        }
        for volume in (0..).take(self.volumes.len()) {
            if let Some(Removal::Sweeping { .. }) = self.volumes[volume as usize].removal {
                self.sweep(context, volume);
            }
        }
    }

    fn sweep<M: Memory>(&mut self, context: &mut Context<'_, M>, volume: u32) {
        for _ in 0..LEAVES_PER_TURN {
            let Some(Removal::Sweeping { next_leaf, coming, .. }) = self.volumes[volume as usize].removal
            else {
                return;
            };
            let Some(leaf) = self.map.table(volume).next_present(next_leaf, LEAVES_END) else {
                assert_eq!(coming, 0, "a leaf on its way in is present");
                return self.end_sweep(volume);
            };
            match self.map.find(volume, leaf) {
                Presence::Here(frame) if self.map.is_pinned(frame) => return,
                Presence::Here(frame) => self.drop_leaf(volume, leaf, frame),
                Presence::Loading(_) | Presence::Away(_) if coming > 0 => return,
                Presence::Loading(_) | Presence::Away(_) => return self.load_ahead(context, volume, leaf),
                Presence::Nowhere => unreachable!("it is present"),
            }
        }
        self.sweep_goes_on = true;
    }

    fn drop_leaf(&mut self, volume: u32, leaf: u32, frame: FrameIndex) {
        for offset in 0..LEAF_BLOCKS {
            self.segments.remove_live(self.map.get(frame, offset).place);
        }
        let Mapping { place, .. } = self.map.table(volume).leaf_on_device(leaf);
        if place != Place::NONE {
            self.segments.remove_live(place);
        }
        self.map.drop_leaf(volume, leaf);
        *self.sweeping(volume).1 = leaf + 1;
    }

    /// Of a removal under way: leaves on their way in, the next leaf, and damaged ones.
    fn sweeping(&mut self, volume: u32) -> (&mut u32, &mut u32, &mut u32) {
        match &mut self.volumes[volume as usize].removal {
            Some(Removal::Sweeping { next_leaf, coming, damaged, .. }) => (coming, next_leaf, damaged),
            other => unreachable!("volume {volume} is not swept: {other:?}"),
        }
    }

    fn load_ahead<M: Memory>(&mut self, context: &mut Context<'_, M>, volume: u32, first: u32) {
        // A small cache must not lose the first of them to the last.
        let ahead = (self.map.frames_max() / 8).clamp(1, LEAVES_AHEAD);
        let mut next = first;
        for _ in 0..ahead {
            let Some(leaf) = self.map.table(volume).next_present(next, LEAVES_END) else { return };
            next = leaf + 1;
            if matches!(self.map.find(volume, leaf), Presence::Away(_) | Presence::Loading(_)) {
                *self.sweeping(volume).0 += 1;
                self.load_leaf(context, volume, leaf, Waiter::Removal { volume, leaf });
            }
        }
    }

    /// A leaf has come, or cannot be read.
    pub(super) fn removal_leaf_came(&mut self, volume: u32, leaf: u32, intact: bool) {
        if !matches!(self.volumes[volume as usize].removal, Some(Removal::Sweeping { .. })) {
            // The lane has failed.
            return;
        }
        let from = *self.sweeping(volume).1;
        let is_next = self.map.table(volume).next_present(from, LEAVES_END) == Some(leaf);
        let (coming, next_leaf, damaged) = self.sweeping(volume);
        *coming -= 1;
        // Reads end in any order: one that is not the next is asked for again when it is, and none before it is passed over.
        if !intact && is_next {
            *damaged += 1;
            *next_leaf = leaf + 1;
        }
    }

    fn end_sweep(&mut self, volume: u32) {
        if self.is_in_use(volume) {
            return;
        }
        let Some(Removal::Sweeping { cookie, damaged, .. }) = self.volumes[volume as usize].removal else {
            unreachable!("it is swept")
        };
        let known = &mut self.volumes[volume as usize];
        known.record.keep_nothing(&mut self.segments);
        self.unsynced_promises.retain(|(_, of, _)| *of != volume);
        if damaged > 0 {
            known.removal = None;
            self.removals -= 1;
            return self.complete(cookie, Err(RequestError::Io));
        }
        known.removal = Some(Removal::Swept { cookie });
        self.map.forget_volume(volume);
        self.checkpointer.request();
    }

    /// May something of the volume still take effect? The cleaner's moves are nobody's request.
    fn is_in_use(&self, volume: u32) -> bool {
        self.streams[..LOGGED_STREAMS].iter().any(|stream| {
            let open = stream.open.iter().flat_map(|open| &open.records);
            let under_way = stream.under_way.iter().flat_map(|batch| &batch.records);
            open.chain(under_way).any(|record| record.volume == volume)
        })
    }

    /// The process ends: whatever is not swept yet stays as it is. Its removal is answered with
    /// [`RequestError::ShuttingDown`].
    pub fn stop_removals(&mut self) {
        for position in 0..self.volumes.len() {
            if let Some(Removal::Sweeping { cookie, .. }) = self.volumes[position].removal {
                self.volumes[position].removal = None;
                self.removals -= 1;
                self.complete(cookie, Err(RequestError::ShuttingDown));
            }
        }
        self.sweep_goes_on = false;
    }

    /// A checkpoint cuts: what it records, by position.
    pub(super) fn volumes_at_cut(&mut self) -> Vec<(u32, VolumeRecord)> {
        for volume in &mut self.volumes {
            if let Some(Removal::Swept { cookie }) = volume.removal {
                volume.removal = Some(Removal::Leaving { cookie });
            }
        }
        let recorded = (0..).zip(&self.volumes).filter(|(_, volume)| volume.is_recorded());
        recorded.map(|(position, volume)| (position, volume.record.clone())).collect()
    }

    /// A checkpoint stands in all roots.
    pub(super) fn end_removals(&mut self) {
        for position in 0..self.volumes.len() {
            if let Some(Removal::Leaving { cookie }) = self.volumes[position].removal {
                self.volumes[position].removal = Some(Removal::Gone);
                self.removals -= 1;
                self.complete(cookie, Ok(()));
            }
        }
    }

    /// The lane has failed: nothing is removed any more.
    pub(super) fn fail_removals(&mut self) {
        for position in 0..self.volumes.len() {
            match self.volumes[position].removal {
                Some(
                    Removal::Sweeping { cookie, .. }
                    | Removal::Swept { cookie }
                    | Removal::Leaving { cookie },
                ) => {
                    self.volumes[position].removal = Some(Removal::Failed);
                    self.removals -= 1;
                    self.complete(cookie, Err(RequestError::Io));
                }
                Some(Removal::Gone | Removal::Failed) | None => {}
            }
        }
    }

    /// The position of a volume that went, for one that comes.
    pub(super) fn vacant_position(&self) -> Option<usize> {
        self.volumes.iter().position(|volume| volume.removal == Some(Removal::Gone))
    }
}
