//! Checkpoints: what rolling forward starts from, and what makes emptied segments free again.
//!
//! ```text
//!   idle ──cut──▶ leaves ──▶ body ──▶ sync ──▶ two roots ──▶ sync ──▶ the other two ──▶ sync ──▶ idle
//! ```
//!
//! The cut is one instant between two events. The checkpoint holds exactly what was in effect then: leaves changed
//! later are written as they were (see [`crate::store::map`]), live counts are those of that instant, and the
//! cursors stand before the first batch that was not yet in effect. Rolling forward therefore applies every batch
//! exactly once, and the counts come out right without reading the map.

use super::stream::{Record, StreamKind};
use super::{Context, DiskEffect, Lane, Operation};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::store::batch::{Entry, EntryKind};
use crate::store::checkpoint_body::{BodyWriter, SegmentRecord, VolumeRecord};
use crate::store::layout::{Layout, Place, SegmentIndex};
use crate::store::map::FrameIndex;
use crate::store::recovery::Recovered;
use crate::store::root::{Cursor, LOGGED_STREAMS, PlaceRun, Root};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use std::collections::{BTreeSet, VecDeque};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Leaves,
    Body,
    SyncBody,
    FirstRoots,
    SyncFirst,
    SecondRoots,
    SyncSecond,
}

/// What was true at the cut.
#[derive(Debug, Default)]
struct Cut {
    /// Live blocks of every segment of the pool, without those of the old checkpoint's body.
    live: Vec<u32>,
    /// Segments that were sealed and fully in effect, and not kept. Only these can be freed: any other may hold batches
    /// that rolling forward from this cut must see, or is listed.
    settled: Vec<bool>,
    /// Segments that the cleaner had dealt with.
    cleaned: Vec<SegmentIndex>,
    /// By their positions.
    volumes: Vec<(u32, VolumeRecord)>,
    cursors: Vec<Cursor>,
    last_number: u64,
}

/// The lane's checkpoints.
#[derive(Debug, Default)]
pub(super) struct Checkpointer {
    phase: Phase,
    requested: bool,
    first_done: bool,
    /// Number of the last checkpoint begun.
    pub(super) number: u64,
    cut: Cut,
    frozen: VecDeque<FrameIndex>,
    body: Vec<u8>,
    /// Bytes of the two copies already appended.
    body_at: [usize; 2],
    new_body: [Vec<PlaceRun>; 2],
    /// Where the body of the last completed checkpoint is.
    pub(super) old_body: [Vec<PlaceRun>; 2],
    /// One page for roots, one for encoding leaves.
    pub(super) root_page: MemoryRange,
    pub(super) leaf_page: MemoryRange,
    /// The slots of the root, two and two; see [`crate::store::root::write_order`].
    root_order: [u32; 4],
    roots_left: u32,
    /// Log written when the last checkpoint cut.
    blocks_at_cut: u64,
}

impl Checkpointer {
    /// The first checkpoint after recovery must be written before anything else.
    pub(super) fn after(
        recovered: &Recovered,
        root_page: MemoryRange,
        leaf_page: MemoryRange,
    ) -> Checkpointer {
        Checkpointer {
            requested: true,
            number: recovered.checkpoint,
            old_body: recovered.body.clone(),
            root_order: recovered.root_order,
            root_page,
            leaf_page,
            ..Checkpointer::default()
        }
    }

    /// A checkpoint is wanted soon.
    pub(super) fn request(&mut self) {
        self.requested = true;
    }

    /// Blocks that the checkpoint under way, or the next one, writes besides leaves that are dirty now.
    pub(super) fn blocks_to_write(&self) -> u64 {
        let body_blocks = self.body.len().div_ceil(BLOCK_BYTES_USIZE);
        (self.frozen.len() + 2 * (body_blocks + 1)) as u64
    }

    pub(super) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle && !self.requested
    }

    /// May what a checkpoint's body is made from change otherwise than by changes that are logged?
    pub(super) fn is_between_checkpoints(&self) -> bool {
        self.phase == Phase::Idle && self.first_done
    }

    pub(super) fn first_is_done(&self) -> bool {
        self.first_done
    }

    /// A leaf of this checkpoint has moved: the counts at the cut follow.
    pub(super) fn leaf_moved(&mut self, layout: &Layout, old: Place, new: Place) {
        for (place, step) in [(old, -1), (new, 1)] {
            if place != Place::NONE {
                let slot = &mut self.cut.live[layout.segment_of(place).0 as usize];
                *slot = slot.checked_add_signed(step).expect("a leaf that was counted");
            }
        }
    }
}

impl Lane {
    /// Asks for a checkpoint as soon as possible.
    pub fn request_checkpoint(&mut self) {
        self.checkpointer.request();
    }

    /// Is everything in effect also in a checkpoint, and nothing under way?
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let wanted = self.checkpointer.requested && !self.volumes.is_empty();
        let idle = self.checkpointer.phase == Phase::Idle && !wanted;
        idle && self.is_idle() && self.streams.iter().all(super::stream::Stream::is_settled)
    }

    pub(super) fn upkeep_checkpoint<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        match self.checkpointer.phase {
            Phase::Idle if self.wants_checkpoint() => {
                if self.streams[0].position.is_none() && !self.open_streams() {
                    return;
                }
                self.cut();
                self.write_leaves(context);
            }
            Phase::Leaves => self.write_leaves(context),
            Phase::Body => self.write_body(context),
            _ => {}
        }
    }

    fn wants_checkpoint(&self) -> bool {
        if self.volumes.is_empty() {
            return false;
        }
        let log_blocks = self.counters.device_blocks_written - self.checkpointer.blocks_at_cut;
        let log_bytes = log_blocks * u64::from(BLOCK_BYTES);
        self.checkpointer.requested
            || self.map.wants_checkpoint()
            || log_bytes >= self.config.checkpoint_log_bytes.max(32 * self.checkpointer.body.len() as u64)
            || self.space_wants_checkpoint()
    }

    fn cut(&mut self) {
        let volumes = self.volumes_at_cut();
        let checkpointer = &mut self.checkpointer;
        checkpointer.requested = false;
        checkpointer.number += 1;
        checkpointer.blocks_at_cut = self.counters.device_blocks_written;
        checkpointer.frozen = self.map.freeze().into();
        let cut = &mut checkpointer.cut;
        cut.live = self.segments.live_counts();
        for place in checkpointer.old_body.iter().flatten().flat_map(|run| run.places()) {
            cut.live[self.config.layout.segment_of(place).0 as usize] -= 1;
        }
        let may_go = |segment| self.segments.is_settled(segment) && !self.segments.is_kept(segment);
        cut.settled = self.segments.indices().map(may_go).collect();
        cut.cleaned = self.segments.cleaned_and_live();
        cut.volumes = volumes;
        cut.last_number = self.last_number;
        cut.cursors = self.streams[..LOGGED_STREAMS]
            .iter()
            .zip(&self.log_ends)
            .map(|(stream, end)| {
                let position = stream.first_unapplied();
                Cursor {
                    segment: position.segment,
                    block: position.block,
                    generation: position.generation,
                    // Nothing of this mount yet: the last one of those before.
                    number: stream.applied.0.max(end.map_or(0, |end| end.number)),
                    chain: stream.applied.1,
                    next_segment: position.next_segment,
                }
            })
            .collect();
        checkpointer.phase = Phase::Leaves;
    }

    fn write_leaves<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        while let Some(frame) = self.checkpointer.frozen.front().copied() {
            if self.streams[StreamKind::Map.index()].writing_count() > 1 || !self.can_append_map_block() {
                return;
            }
            self.checkpointer.frozen.pop_front();
            self.append_leaf(context, frame);
        }
        if self.streams[StreamKind::Map.index()].open.is_some() {
            self.seal(context, StreamKind::Map, false);
        }
        if self.streams[StreamKind::Map.index()].is_settled() {
            self.encode_body();
            self.checkpointer.phase = Phase::Body;
            self.write_body(context);
        }
    }

    /// Is there surely a buffer and a place for one more block of the map's stream?
    fn can_append_map_block(&self) -> bool {
        if self.open_map_batch_has_room() {
            return true;
        }
        let open = self.streams[StreamKind::Map.index()].open.as_ref();
        let taken = open.map_or(0, |open| 1 + open.writer.payload_blocks());
        let room = self.blocks_left(StreamKind::Map) >= taken + 2 || self.segments.free_count() > 0;
        room && !self.batch_buffers.is_empty()
    }

    fn open_map_batch_has_room(&self) -> bool {
        let open = self.streams[StreamKind::Map.index()].open.as_ref();
        open.is_some_and(|open| {
            open.writer.has_room(1) && open.writer.payload_blocks() < open.capacity_blocks
        })
    }

    fn append_leaf<M: Memory>(&mut self, context: &mut Context<'_, M>, frame: FrameIndex) {
        let (volume, leaf) = self.map.owner(frame);
        let page = self.checkpointer.leaf_page;
        let (sequence, is_empty) = self.map.encode_frozen(frame, context.memory.bytes_mut(page));
        if is_empty {
            let none = crate::store::map::Mapping { place: Place::NONE, crc: 0 };
            let old = self.map.set_leaf_on_device(volume, leaf, none, sequence);
            self.segments.remove_live(old);
            self.checkpointer.leaf_moved(&self.config.layout, old, Place::NONE);
            return;
        }
        let entry = Entry {
            kind: EntryKind::Leaf,
            volume: self.volumes[volume as usize].record.number,
            block: leaf,
            count: 1,
            epoch: 0,
            old_place: Place::NONE,
            sequence,
        };
        self.map.pin(frame);
        let frames = [Some(frame), None];
        let record = Record { volume, frames, cookie: None, durable: false, new_blocks: 0 };
        let appended = self.append_small(context, StreamKind::Map, &entry, Some(page), record);
        assert!(appended, "room was checked");
        self.counters.map_blocks_written += 1;
    }

    /// All leaves are on the device (though not yet safe): the body is the state at the cut with their new places.
    fn encode_body(&mut self) {
        let cut = &self.checkpointer.cut;
        let kept: BTreeSet<u32> =
            cut.volumes.iter().flat_map(|(_, volume)| &volume.kept).map(|kept| kept.segment.0).collect();
        let listed: Vec<SegmentRecord> = (0..)
            .zip(&cut.live)
            .filter(|(index, live)| **live > 0 || kept.contains(index))
            .map(|(index, live)| SegmentRecord {
                segment: SegmentIndex(index),
                live_blocks: *live,
                newest_number: self.segments.newest_number(SegmentIndex(index)),
            })
            .collect();
        let count = |length: usize| u32::try_from(length).expect("volumes and segments fit 32 bits");
        let mut writer = BodyWriter::new(count(cut.volumes.len()), count(listed.len()));
        for (volume, record) in &cut.volumes {
            writer.volume(record);
            self.map.table(*volume).records().for_each(|leaf| writer.leaf(&leaf));
        }
        listed.iter().for_each(|segment| writer.segment(segment));
        self.checkpointer.body = writer.finish();
        self.checkpointer.body_at = [0; 2];
        self.checkpointer.new_body = [Vec::new(), Vec::new()];
    }

    fn write_body<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for copy in 0..2 {
            while self.checkpointer.body_at[copy] < self.checkpointer.body.len() {
                if self.streams[StreamKind::Map.index()].writing_count() > 1 || !self.open_batch_for_body() {
                    return;
                }
                self.append_body_part(context, copy);
            }
        }
        if self.streams[StreamKind::Map.index()].is_settled() {
            self.checkpointer.phase = Phase::SyncBody;
            self.syncer.wait_for_checkpoint();
        }
    }

    fn append_body_part<M: Memory>(&mut self, context: &mut Context<'_, M>, copy: usize) {
        let checkpointer = &mut self.checkpointer;
        let stream = &mut self.streams[StreamKind::Map.index()];
        let position = stream.position.expect("an open stream");
        let open = stream.open.as_mut().expect("opened by the caller");
        let rest = &checkpointer.body[checkpointer.body_at[copy]..];
        let bytes = rest.len().min(open.capacity_blocks as usize * BLOCK_BYTES_USIZE);
        let blocks = u32::try_from(bytes.div_ceil(BLOCK_BYTES_USIZE)).expect("bounded by the batch");
        let memory = context.memory.bytes_mut(open.memory.part(BLOCK_BYTES, blocks * BLOCK_BYTES));
        memory[..bytes].copy_from_slice(&rest[..bytes]);
        memory[bytes..].fill(0);
        let checksums: Vec<u32> = memory.chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect();
        let entry = Entry {
            kind: EntryKind::Checkpoint,
            volume: 0,
            block: 0,
            count: blocks,
            epoch: 0,
            old_place: Place::NONE,
            sequence: checkpointer.number,
        };
        let descriptor = context.memory.bytes_mut(open.memory.part(0, BLOCK_BYTES));
        open.writer.push(descriptor, &entry, checksums.into_iter());
        open.records.push(Record {
            volume: 0,
            frames: [None; 2],
            cookie: None,
            durable: false,
            new_blocks: 0,
        });
        checkpointer.body_at[copy] += bytes;
        let place = self.config.layout.place(position.segment, position.block + 1);
        checkpointer.new_body[copy].push(PlaceRun { place, blocks });
        self.counters.map_blocks_written += u64::from(blocks);
        self.seal(context, StreamKind::Map, false);
    }

    /// A part of a checkpoint's body is on the device.
    pub(super) fn apply_body(&mut self, entry: &Entry, place: Place) {
        (0..entry.count).for_each(|index| self.segments.add_live(place.plus(index)));
    }

    /// A sync that the checkpoint waited for is done.
    pub(super) fn checkpoint_synced<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        match self.checkpointer.phase {
            Phase::SyncBody => {
                let root = self.encode_root();
                context.memory.bytes_mut(self.checkpointer.root_page).copy_from_slice(&root);
                let [first, second, ..] = self.checkpointer.root_order;
                self.write_roots([first, second]);
                self.checkpointer.phase = Phase::FirstRoots;
            }
            Phase::SyncFirst => {
                let [.., third, fourth] = self.checkpointer.root_order;
                self.write_roots([third, fourth]);
                self.checkpointer.phase = Phase::SecondRoots;
            }
            Phase::SyncSecond => self.end_checkpoint(),
            phase => unreachable!("no sync is waited for in {phase:?}"),
        }
    }

    fn encode_root(&self) -> [u8; BLOCK_BYTES_USIZE] {
        let checkpointer = &self.checkpointer;
        let map = self.streams[StreamKind::Map.index()].position.expect("the body was written");
        let root = Root {
            map_end: (map.segment, map.block),
            lane: self.config.lane,
            pool_id: self.config.layout.pool_id,
            checkpoint: checkpointer.number,
            mount: self.mount,
            last_number: checkpointer.cut.last_number,
            cursors: [checkpointer.cut.cursors[0], checkpointer.cut.cursors[1]],
            body_bytes: checkpointer.body.len() as u64,
            body_crc: crc32c(&checkpointer.body),
            body: checkpointer.new_body.clone(),
        };
        root.encode()
    }

    fn write_roots(&mut self, slots: [u32; 2]) {
        let memory = self.checkpointer.root_page;
        for slot in slots {
            let place = self.config.layout.root_place(self.config.lane, slot);
            self.start(Operation::RootWrite, |token| DiskEffect::Write { token, place, memory });
            self.counters.device_blocks_written += 1;
            self.counters.map_blocks_written += 1;
        }
        self.checkpointer.roots_left = 2;
    }

    pub(super) fn finish_root_write<M: Memory>(&mut self, context: &mut Context<'_, M>, good: bool) {
        if !good {
            return self.fail(context);
        }
        self.checkpointer.roots_left -= 1;
        if self.checkpointer.roots_left > 0 || self.failed {
            return;
        }
        self.checkpointer.phase = match self.checkpointer.phase {
            Phase::FirstRoots => Phase::SyncFirst,
            Phase::SecondRoots => Phase::SyncSecond,
            phase => unreachable!("no roots are written in {phase:?}"),
        };
        self.syncer.wait_for_checkpoint();
    }

    /// No root refers to the old checkpoint any more: what only it needed is free.
    fn end_checkpoint(&mut self) {
        let new_body = std::mem::take(&mut self.checkpointer.new_body);
        let old_body = std::mem::replace(&mut self.checkpointer.old_body, new_body);
        for place in old_body.iter().flatten().flat_map(|run| run.places()) {
            self.segments.remove_live(place);
        }
        let cut = std::mem::take(&mut self.checkpointer.cut);
        for (segment, settled) in self.segments.indices().zip(&cut.settled) {
            if *settled && cut.live[segment.0 as usize] == 0 && self.segments.is_dead(segment) {
                self.segments.free_after_checkpoint(segment);
            }
        }
        self.segments.note_stuck(&cut.cleaned);
        for (position, record) in &cut.volumes {
            self.volumes[*position as usize].note_lasting(record);
        }
        self.end_removals();
        self.checkpointer.phase = Phase::Idle;
        self.checkpointer.first_done = true;
        self.counters.checkpoints += 1;
    }

    fn open_batch_for_body(&mut self) -> bool {
        assert!(self.streams[StreamKind::Map.index()].open.is_none());
        self.open_batch(StreamKind::Map, EntryKind::Checkpoint, 1)
    }
}

impl PlaceRun {
    /// Its blocks.
    pub(in crate::store) fn places(&self) -> impl Iterator<Item = Place> + use<> {
        let first = self.place;
        (0..self.blocks).map(move |index| first.plus(index))
    }
}

impl Checkpointer {
    /// For failing tests.
    pub(super) fn describe(&self) -> String {
        format!(
            "checkpoint {} {:?}, requested {}, frozen {}",
            self.number,
            self.phase,
            self.requested,
            self.frozen.len()
        )
    }
}
