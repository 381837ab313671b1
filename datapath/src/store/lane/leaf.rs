//! Loading leaves of the map, and who waits for them.

use super::{Context, DiskEffect, DiskToken, Lane, Operation};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::request::RequestError;
use crate::store::batch::Entry;
use crate::store::lane::stream::Record;
use crate::store::layout::Place;
use crate::store::map::{FrameIndex, Mapping, Presence};
use crate::units::MemoryRange;
use std::collections::VecDeque;

/// Who waits for a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Read(u32),
    Change(u32),
    Cookie(u32),
    Cleaner { volume: u32, leaf: u32 },
    Removal { volume: u32, leaf: u32 },
}

/// Loads under way and wanted.
#[derive(Debug, Default)]
pub(super) struct LeafLoads {
    /// Pages for leaves on their way in.
    pages: Vec<MemoryRange>,
    /// Leaves that wait for a page.
    queued: VecDeque<FrameIndex>,
    waiters: Vec<(FrameIndex, Waiter)>,
}

impl LeafLoads {
    pub(super) fn new(pages: Vec<MemoryRange>) -> LeafLoads {
        LeafLoads { pages, ..LeafLoads::default() }
    }
}

impl Lane {
    /// Is the leaf at hand? If not, it is loaded and `cookie` is completed when it has come.
    pub fn want_leaf<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        volume: u32,
        leaf: u32,
    ) -> Option<Option<FrameIndex>> {
        match self.map.find(volume, leaf) {
            Presence::Here(frame) => Some(Some(frame)),
            Presence::Nowhere => Some(None),
            Presence::Loading(_) | Presence::Away(_) => {
                self.load_leaf(context, volume, leaf, Waiter::Cookie(cookie));
                None
            }
        }
    }

    /// Registers a waiter for a leaf that is loading or away, and starts loading it.
    pub(super) fn load_leaf<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        volume: u32,
        leaf: u32,
        waiter: Waiter,
    ) {
        let _ = &context;
        let frame = match self.map.find(volume, leaf) {
            Presence::Loading(frame) => frame,
            Presence::Away(_) => {
                let frame = self.map.admit(volume, leaf);
                self.leaf_loads.queued.push_back(frame);
                frame
            }
            Presence::Here(_) | Presence::Nowhere => unreachable!("only leaves that are not here are loaded"),
        };
        self.leaf_loads.waiters.push((frame, waiter));
        self.start_leaf_loads();
    }

    fn start_leaf_loads(&mut self) {
        while !self.leaf_loads.queued.is_empty() {
            let Some(memory) = self.leaf_loads.pages.pop() else { return };
            let frame = self.leaf_loads.queued.pop_front().expect("not empty");
            let (volume, leaf) = self.map.owner(frame);
            let place = self.map.table(volume).leaf_on_device(leaf).place;
            self.segments.begin_read(self.config.layout.segment_of(place));
            self.start(Operation::LeafLoad { frame, memory }, |token: DiskToken| DiskEffect::Read {
                token,
                place,
                memory,
            });
        }
    }

    pub(super) fn finish_leaf_load<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        frame: FrameIndex,
        memory: MemoryRange,
        good: bool,
    ) {
        let (volume, leaf) = self.map.owner(frame);
        let Mapping { place, crc } = self.map.table(volume).leaf_on_device(leaf);
        self.segments.end_read(self.config.layout.segment_of(place));
        let block = context.memory.bytes(memory);
        let intact = good && crc32c(block) == crc;
        if intact {
            self.map.finish_load(frame, block);
            // The waiters are served one after the other; none may find that another's leaf pushed this one out.
            self.map.pin(frame);
        } else {
            self.counters.checksum_errors += u64::from(good);
            self.map.abandon_load(frame);
        }
        self.leaf_loads.pages.push(memory);
        let mut waiters = std::mem::take(&mut self.leaf_loads.waiters);
        let mut ready = Vec::new();
        waiters.retain(|(of, waiter)| {
            if *of == frame {
                ready.push(*waiter);
            }
            *of != frame
        });
        self.leaf_loads.waiters = waiters;
        for waiter in ready {
            self.wake(context, waiter, intact);
        }
        if intact {
            self.map.unpin(frame);
        }
        self.start_leaf_loads();
    }

    fn wake<M: Memory>(&mut self, context: &mut Context<'_, M>, waiter: Waiter, intact: bool) {
        match (waiter, intact) {
            (Waiter::Read(read), true) => self.try_read(context, read),
            (Waiter::Read(read), false) => self.refuse_read(read),
            (Waiter::Change(change), intact) => self.change_leaf_came(context, change, intact),
            (Waiter::Cookie(cookie), true) => self.complete(cookie, Ok(())),
            (Waiter::Cookie(cookie), false) => self.complete(cookie, Err(RequestError::Io)),
            (Waiter::Cleaner { volume, leaf }, intact) => self.cleaner_leaf_came(volume, leaf, intact),
            (Waiter::Removal { volume, leaf }, intact) => self.removal_leaf_came(volume, leaf, intact),
        }
    }

    /// A checkpoint has written a leaf to a new place.
    pub(super) fn apply_leaf(&mut self, entry: &Entry, record: &Record, place: Place, crc: u32) {
        self.segments.add_live(place);
        let new = Mapping { place, crc };
        let old = self.map.set_leaf_on_device(record.volume, entry.block, new, entry.sequence);
        self.segments.remove_live(old);
        self.checkpointer.leaf_moved(&self.config.layout, old, place);
    }

    /// Where a block of a leaf at hand is.
    #[must_use]
    pub fn mapping(&self, frame: FrameIndex, offset: u32) -> Mapping {
        self.map.get(frame, offset)
    }
}
