//! Appending: entries gather in open batches, batches go to the device, and take effect in order.

use super::stream::{Batch, BatchMemory, OpenBatch, Position, Record, Stream, StreamKind};
use super::{
    AckPolicy, BATCH_BUFFER_PAGES, BATCH_BUFFERS_KEPT, Context, DiskEffect, Lane, Operation, Payload,
};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::request::RequestError;
use crate::store::batch::{BatchHeader, DescriptorWriter, Entry, EntryKind, own_entries};
use crate::store::bugs::PlantedBug;
use crate::store::layout::{Place, SegmentIndex};
use crate::store::map::{FrameIndex, LEAF_BLOCKS, Mapping};
use crate::store::recovery::LogEnd;
use crate::store::root::LOGGED_STREAMS;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};

/// Batches of clients that are being written before smaller ones begin to gather. More of them would make batches
/// smaller and descriptors more: with two, uniform overwrites at QD32 wrote a descriptor for each 5 blocks and were a
/// fifth slower than with one, which writes a descriptor for each 10.
const CLIENT_BATCHES_WRITING: usize = 1;

impl Lane {
    /// Adds an entry to the stream's open batch, copying its payload. False, with nothing changed, if there is no
    /// buffer or no segment for it now. `frames` of the record are pinned until the entry takes effect.
    pub(super) fn append_small<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        kind: StreamKind,
        entry: &Entry,
        payload: Option<MemoryRange>,
        record: Record,
    ) -> bool {
        let blocks = if entry.kind.has_payload() { entry.count } else { 0 };
        if let Some(open) = &self.streams[kind.index()].open {
            let full =
                !open.writer.has_room(blocks) || open.writer.payload_blocks() + blocks > open.capacity_blocks;
            if full {
                self.seal(context, kind, false);
            }
        }
        if self.streams[kind.index()].open.is_none() && !self.open_batch(kind, entry.kind, blocks) {
            return false;
        }
        let open = self.streams[kind.index()].open.as_mut().expect("just opened");
        let mut checksums = [0_u32; 128];
        if let Some(payload) = payload {
            let to = open.memory.part((1 + open.writer.payload_blocks()) * BLOCK_BYTES, blocks * BLOCK_BYTES);
            context.memory.copy(payload, to);
            fill_checksums(context.memory.bytes(to), &mut checksums);
        }
        let descriptor = context.memory.bytes_mut(open.memory.part(0, BLOCK_BYTES));
        open.writer.push(descriptor, entry, checksums[..blocks as usize].iter().copied());
        open.records.push(record);
        self.unapplied_leaves += record.leaf_count();
        true
    }

    /// Writes a run of blocks as a batch of its own, without copying: the descriptor goes into the page in front
    /// of the payload. At the end of a segment it is cut in two that only take effect together.
    pub(super) fn append_owned<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        entry: &Entry,
        payload: Payload,
        record: Record,
    ) -> bool {
        let kind = StreamKind::Client;
        if self.streams[kind.index()].open.is_some() {
            self.seal(context, kind, false);
        }
        if self.blocks_left(kind) < 2 {
            if !self.can_advance(kind, entry.kind) {
                return false;
            }
            self.advance_segment(kind);
        }
        let left = self.blocks_left(kind);
        if left > entry.count {
            self.write_run(context, entry, payload, record);
            return true;
        }
        if !self.can_advance(kind, entry.kind) {
            return false;
        }
        let Some(page) = context.pages.allocate(1).or_else(|| self.split_page.take()) else { return false };
        self.write_run_in_two(context, entry, payload, page, left - 1, record);
        true
    }

    fn write_run<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        entry: &Entry,
        payload: Payload,
        record: Record,
    ) {
        let mut checksums = [0_u32; 256];
        fill_checksums(context.memory.bytes(payload.blocks()), &mut checksums);
        let whole = payload.whole();
        let descriptor = whole.part(0, BLOCK_BYTES);
        let mut writer = DescriptorWriter::new();
        let block = context.memory.bytes_mut(descriptor);
        writer.push(block, entry, checksums[..entry.count as usize].iter().copied());
        let records = self.records_with(record);
        let memory = match payload {
            Payload::Owned(_) => BatchMemory::Pages(whole),
            Payload::Lent(_) => BatchMemory::Lent,
        };
        self.submit(context, StreamKind::Client, writer, descriptor, &[whole], memory, records, false);
    }

    fn write_run_in_two<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        entry: &Entry,
        payload: Payload,
        page: MemoryRange,
        first_blocks: u32,
        record: Record,
    ) {
        let mut checksums = [0_u32; 256];
        fill_checksums(context.memory.bytes(payload.blocks()), &mut checksums);
        let (head, tail) = checksums[..entry.count as usize].split_at(first_blocks as usize);
        let first = Entry { count: first_blocks, ..*entry };
        let rest = Entry { block: entry.block + first_blocks, count: entry.count - first_blocks, ..*entry };

        let whole = payload.whole();
        let front = whole.part(0, (1 + first_blocks) * BLOCK_BYTES);
        let mut writer = DescriptorWriter::new();
        writer.push(context.memory.bytes_mut(front.part(0, BLOCK_BYTES)), &first, head.iter().copied());
        let (front_record, back_record) = self.split_record(&record, &first, &rest);
        let records = self.records_with(front_record);
        let descriptor = front.part(0, BLOCK_BYTES);
        self.submit(
            context,
            StreamKind::Client,
            writer,
            descriptor,
            &[front],
            BatchMemory::Later,
            records,
            true,
        );

        self.advance_segment(StreamKind::Client);
        let back = whole.part(front.len, whole.len - front.len);
        let mut writer = DescriptorWriter::new();
        writer.push(context.memory.bytes_mut(page), &rest, tail.iter().copied());
        let records = self.records_with(back_record);
        let memory = match payload {
            Payload::Owned(_) => BatchMemory::TwoPages(whole, page),
            Payload::Lent(_) => BatchMemory::LentAndPages(page),
        };
        self.submit(context, StreamKind::Client, writer, page, &[page, back], memory, records, false);
    }

    fn records_with(&mut self, record: Record) -> Vec<Record> {
        let mut records = self.record_vectors.pop().unwrap_or_default();
        self.unapplied_leaves += record.leaf_count();
        records.push(record);
        records
    }

    /// The records of the two parts of a run: each has the leaves of its own blocks, the first of them in front, and pins
    /// them itself. The second answers.
    fn split_record(&mut self, whole: &Record, first: &Entry, rest: &Entry) -> (Record, Record) {
        let leaf = |block: u32| (block / LEAF_BLOCKS - first.block / LEAF_BLOCKS) as usize;
        let frames = |from: usize, through: usize| {
            let second = (through > from).then(|| whole.frames[through]).flatten();
            [whole.frames[from], second]
        };
        let of_first = frames(0, leaf(rest.block - 1));
        let of_rest = frames(leaf(rest.block), leaf(rest.block + rest.count - 1));
        of_first.iter().chain(&of_rest).flatten().for_each(|frame| self.map.pin(*frame));
        whole.frames.iter().flatten().for_each(|frame| self.map.unpin(*frame));
        let front = Record { frames: of_first, cookie: None, durable: false, new_blocks: 0, ..*whole };
        (front, Record { frames: of_rest, ..*whole })
    }

    /// Starts writing the open batch of a stream.
    pub(super) fn seal<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        kind: StreamKind,
        continues: bool,
    ) {
        let open = self.streams[kind.index()].open.take().expect("an open batch");
        let used = open.memory.part(0, (1 + open.writer.payload_blocks()) * BLOCK_BYTES);
        let descriptor = open.memory.part(0, BLOCK_BYTES);
        let memory = BatchMemory::Buffer(open.memory);
        self.submit(context, kind, open.writer, descriptor, &[used], memory, open.records, continues);
    }

    #[expect(clippy::too_many_arguments, reason = "the one place where a batch comes into being")]
    fn submit<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        kind: StreamKind,
        writer: DescriptorWriter,
        descriptor: MemoryRange,
        pieces: &[MemoryRange],
        memory: BatchMemory,
        records: Vec<Record>,
        continues: bool,
    ) {
        self.last_number += 1;
        let number = self.last_number;
        let stream = &mut self.streams[kind.index()];
        let position = stream.position.expect("an open stream");
        let header = BatchHeader {
            lane: u16::try_from(self.config.lane).expect("few lanes"),
            stream: kind.code(),
            continues,
            continued: stream.under_way.back().is_some_and(|batch| batch.continues),
            mount: self.mount,
            generation: position.generation,
            number,
            flushed: stream.flushed_through,
            chain: stream.chain,
            next_segment: position.next_segment,
        };
        let crc = writer.finish(context.memory.bytes_mut(descriptor), &header);
        stream.chain = crc;
        let blocks = 1 + writer.payload_blocks();
        let place = self.config.layout.place(position.segment, position.block);
        stream.position = Some(Position { block: position.block + blocks, ..position });
        assert!(position.block + blocks <= self.config.layout.segment_blocks, "a batch fits its segment");
        stream.under_way.push_back(Batch {
            number,
            crc,
            position,
            payload: place.plus(1),
            descriptor,
            memory,
            writes_left: u8::try_from(pieces.len()).expect("one or two"),
            continues,
            records,
        });
        self.segments.begin_batch(position.segment, number);
        self.counters.batches += 1;
        self.counters.device_blocks_written += u64::from(blocks);
        let mut at = place;
        for piece in pieces {
            let (place, memory) = (at, *piece);
            self.start(Operation::Batch { stream: kind, number }, |token| DiskEffect::Write {
                token,
                place,
                memory,
            });
            at = at.plus(piece.len / BLOCK_BYTES);
        }
    }

    /// Starts writing what has gathered, unless enough is being written already. Where every batch needs a sync, one that
    /// is written while another sync runs would wait for its end all the same: what comes meanwhile gathers.
    pub(super) fn seal_gathered<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        if self.config.ack == AckPolicy::Durable && self.syncer.is_running() {
            return;
        }
        let stream = &self.streams[StreamKind::Client.index()];
        if stream.open.is_some() && stream.writing_count() < CLIENT_BATCHES_WRITING {
            self.seal(context, StreamKind::Client, false);
        }
    }

    pub(super) fn open_batch(&mut self, kind: StreamKind, entry: EntryKind, blocks: u32) -> bool {
        let kept = if kind == StreamKind::Client { BATCH_BUFFERS_KEPT } else { 0 };
        if self.batch_buffers.len() <= kept {
            return false;
        }
        if self.blocks_left(kind) < 1 + blocks {
            if !self.can_advance(kind, entry) {
                return false;
            }
            self.advance_segment(kind);
        }
        let capacity_blocks = (self.blocks_left(kind) - 1).min(BATCH_BUFFER_PAGES - 1);
        let memory = self.batch_buffers.pop().expect("counted above");
        let records = self.record_vectors.pop().unwrap_or_default();
        self.streams[kind.index()].open =
            Some(OpenBatch { memory, writer: DescriptorWriter::new(), capacity_blocks, records });
        true
    }

    /// Blocks left in the stream's segment.
    pub(super) fn blocks_left(&self, kind: StreamKind) -> u32 {
        self.streams[kind.index()]
            .position
            .map_or(0, |position| self.config.layout.segment_blocks - position.block)
    }

    /// May the stream go on to its next segment for such an entry? Entries without payload release space and
    /// may use what is kept for the cleaner.
    pub(super) fn can_advance(&self, kind: StreamKind, entry: EntryKind) -> bool {
        let as_kind =
            if kind == StreamKind::Client && !entry.has_payload() { StreamKind::Survivor } else { kind };
        self.segments.free_count() > self.segments_kept(as_kind)
    }

    /// Free segments that must be left when the stream takes one. The checkpoint, which frees segments, may take
    /// the last. The cleaner leaves what the next checkpoint needs besides the rest of the map's segment, and one
    /// more. Clients leave enough besides for the cleaner to empty a few segments, whatever lives in them.
    pub(super) fn segments_kept(&self, kind: StreamKind) -> u32 {
        let checkpoint = self.segments_for_checkpoint(0);
        match kind {
            StreamKind::Client => checkpoint + 6,
            StreamKind::Survivor => checkpoint + 1,
            StreamKind::Map => 0,
        }
    }

    /// Segments that the checkpoint under way and the next one need beyond the rest of the map's segment, if so many
    /// leaves more are changed.
    fn segments_for_checkpoint(&self, more_leaves: u64) -> u32 {
        let leaves = self.map.dirty_count() as u64 + self.unapplied_leaves + more_leaves;
        let blocks = leaves + self.checkpointer.blocks_to_write();
        let with_descriptors = blocks + blocks.div_ceil(32) + 2;
        let beyond = with_descriptors.saturating_sub(u64::from(self.blocks_left(StreamKind::Map)));
        let segments = beyond.div_ceil(u64::from(self.config.layout.usable_blocks()));
        u32::try_from(segments).expect("segments fit 32 bits")
    }

    /// May these leaves be changed? Not if the next checkpoint might then lack the space to write them all: nothing
    /// could ever be freed again.
    pub(super) fn may_dirty(&self, frames: [Option<FrameIndex>; 2]) -> bool {
        let leaves = frames.iter().flatten().count() as u64;
        self.segments_for_checkpoint(leaves) <= self.segments.free_count()
    }

    /// Blocks that the cleaner can move before it lacks a segment.
    pub(super) fn survivor_room_blocks(&self) -> u32 {
        let spare = self.segments.free_count().saturating_sub(self.segments_kept(StreamKind::Survivor));
        let room = self.blocks_left(StreamKind::Survivor)
            + (spare + self.pool_share.free).saturating_mul(self.config.layout.usable_blocks());
        room.saturating_sub(room / 64 + 2)
    }

    /// The stream leaves its segment for the next one and reserves one more. The map's stream is never rolled
    /// forward, so it needs no next one named in its batches.
    ///
    /// # Panics
    /// If no segment is free, or a batch is open: callers ask [`Self::can_advance`] first.
    pub(super) fn advance_segment(&mut self, kind: StreamKind) {
        assert!(self.streams[kind.index()].open.is_none());
        let position = self.streams[kind.index()].position.expect("an open stream");
        if position.generation > 0 {
            self.segments.seal(position.segment);
        }
        let free = self.segments.open().expect("a free segment");
        let (segment, next_segment) =
            if kind == StreamKind::Map { (free, free) } else { (position.next_segment, free) };
        let generation = self.next_generation();
        self.segments.note_of_clients(segment, kind == StreamKind::Client);
        self.streams[kind.index()].position = Some(Position { segment, block: 0, generation, next_segment });
    }

    /// Puts the streams of this mount where they were when the last one ended. One that never was stands at the end
    /// of a segment that is not its own (the first anchor, where no batch is ever found), so that its first append
    /// goes on to the segment named here. False if the lane has too few.
    pub(super) fn open_streams(&mut self) -> bool {
        let new = self.log_ends.iter().filter(|end| end.is_none()).count();
        if (self.segments.free_count() as usize) < new {
            return false;
        }
        let (anchor, its_end) = (self.config.layout.anchor(0), self.config.layout.segment_blocks);
        for index in 0..LOGGED_STREAMS {
            let end = self.log_ends[index].unwrap_or_else(|| LogEnd {
                segment: anchor,
                block: its_end,
                next_segment: self.segments.open().expect("counted above"),
                number: 0,
            });
            let generation = if end.segment == anchor { 0 } else { self.next_generation() };
            let LogEnd { segment, block, next_segment, .. } = end;
            self.streams[index].position = Some(Position { segment, block, generation, next_segment });
        }
        let (segment, block) = self.map_end.unwrap_or((anchor, its_end));
        let generation = if segment == anchor { 0 } else { self.next_generation() };
        self.streams[StreamKind::Map.index()].position =
            Some(Position { segment, block, generation, next_segment: segment });
        true
    }

    fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// A device write of a batch has ended.
    pub(super) fn finish_batch_write<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        kind: StreamKind,
        number: u64,
        good: bool,
    ) {
        if !good {
            self.fail(context);
        }
        let stream = &mut self.streams[kind.index()];
        let Ok(index) = stream.under_way.binary_search_by_key(&number, |batch| batch.number) else {
            return;
        };
        stream.under_way[index].writes_left -= 1;
        if self.failed {
            self.release_failed(context, kind);
            return;
        }
        if self.config.bugs.has(PlantedBug::AckBeforeEarlierBatch) && stream.under_way[index].writes_left == 0
        {
            self.answer_out_of_order(kind, index);
        }
        self.note_written(kind);
        self.apply_ready(context, kind);
    }

    fn note_written(&mut self, kind: StreamKind) {
        let stream = &mut self.streams[kind.index()];
        let written = stream.under_way.iter().take_while(|batch| batch.writes_left == 0).last();
        if let Some(batch) = written {
            stream.written_through = batch.number;
            if self.config.ack == AckPolicy::Durable && kind == StreamKind::Client {
                self.syncer.want();
            }
        }
    }

    /// Lets batches take effect, in order: those that are written, and under the durable policy flushed.
    pub(super) fn apply_ready<M: Memory>(&mut self, context: &mut Context<'_, M>, kind: StreamKind) {
        loop {
            let stream = &self.streams[kind.index()];
            let durable = self.config.ack == AckPolicy::Durable && kind == StreamKind::Client;
            let limit = if durable { stream.flushed_through } else { stream.written_through };
            let ready = |index: usize| stream.under_way.get(index).filter(|batch| batch.number <= limit);
            let Some(front) = ready(0) else { return };
            // The two parts of a run take effect in one step: no checkpoint may fall between them.
            if front.continues && ready(1).is_none() {
                return;
            }
            self.apply_front(context, kind);
        }
    }

    fn apply_front<M: Memory>(&mut self, context: &mut Context<'_, M>, kind: StreamKind) {
        let stream = &mut self.streams[kind.index()];
        let mut batch = stream.under_way.pop_front().expect("a batch to apply");
        stream.applied = (batch.number, batch.crc);
        let segment = batch.position.segment;
        let entries = own_entries(context.memory.bytes(batch.descriptor));
        for (view, record) in entries.zip(&batch.records) {
            let place = batch.payload.plus(view.payload_index);
            match view.entry.kind {
                EntryKind::Data | EntryKind::CopyData => {
                    self.apply_change(&view.entry, record, segment, place, |index| view.checksum(index));
                }
                EntryKind::Zero | EntryKind::Trim | EntryKind::CopyZero => {
                    self.apply_change(&view.entry, record, segment, Place::NONE, |_| 0);
                }
                EntryKind::Move => {
                    let new = Mapping { place, crc: view.checksum(0) };
                    self.apply_move(&view.entry, record, new);
                }
                EntryKind::Lost => {
                    self.apply_move(&view.entry, record, Mapping { place: Place::LOST, crc: 0 });
                }
                EntryKind::Promise => self.apply_promise(&view.entry, record, batch.number),
                EntryKind::Fill => self.apply_fill(&view.entry, record, batch.number),
                EntryKind::Leaf => self.apply_leaf(&view.entry, record, place, view.checksum(0)),
                EntryKind::Checkpoint => self.apply_body(&view.entry, place),
            }
        }
        self.segments.end_batch(segment);
        for record in batch.records.drain(..) {
            record.frames.iter().flatten().for_each(|frame| self.map.unpin(*frame));
            self.unapplied_new_blocks -= u64::from(record.new_blocks);
            self.unapplied_leaves -= record.leaf_count();
            match record.cookie {
                Some(cookie) if record.durable && self.config.ack == AckPolicy::Device => {
                    self.syncer.wait(cookie)
                }
                Some(cookie) => self.complete(cookie, Ok(())),
                None => {}
            }
        }
        self.record_vectors.push(batch.records);
        self.release_batch_memory(context, batch.memory);
    }

    fn apply_change(
        &mut self,
        entry: &Entry,
        record: &Record,
        segment: SegmentIndex,
        place: Place,
        crc: impl Fn(u32) -> u32,
    ) {
        self.volumes[record.volume as usize].record.note_change(entry, segment, &mut self.segments);
        let first_leaf = entry.block / LEAF_BLOCKS;
        for index in 0..entry.count {
            let block = entry.block + index;
            let which = (block / LEAF_BLOCKS - first_leaf) as usize;
            let frame = record.frames[which].expect("a pinned leaf");
            let new = if place == Place::NONE {
                Mapping { place, crc: 0 }
            } else {
                self.segments.add_live(place.plus(index));
                Mapping { place: place.plus(index), crc: crc(index) }
            };
            let old = self.map.set(frame, block % LEAF_BLOCKS, new, entry.sequence);
            self.segments.remove_live(old);
        }
    }

    /// A block is moved or given up only if it is still where it was found.
    fn apply_move(&mut self, entry: &Entry, record: &Record, new: Mapping) {
        let frame = record.frames[0].expect("a pinned leaf");
        let offset = entry.block % LEAF_BLOCKS;
        let stale = self.map.get(frame, offset).place != entry.old_place;
        if stale && !self.config.bugs.has(PlantedBug::MoveOverNewerVersion) {
            return;
        }
        if new.place.is_on_device() {
            self.segments.add_live(new.place);
        }
        let old = self.map.set(frame, offset, new, entry.sequence);
        self.segments.remove_live(old);
    }

    pub(super) fn release_batch_memory<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        memory: BatchMemory,
    ) {
        match memory {
            BatchMemory::Buffer(buffer) => self.batch_buffers.push(buffer),
            BatchMemory::Pages(pages) => context.pages.release(pages),
            BatchMemory::TwoPages(payload, page) => {
                context.pages.release(payload);
                self.release_split_page(context, page);
            }
            BatchMemory::LentAndPages(page) => self.release_split_page(context, page),
            BatchMemory::Later | BatchMemory::Lent => {}
        }
    }

    fn release_split_page<M: Memory>(&mut self, context: &mut Context<'_, M>, page: MemoryRange) {
        if self.split_page.is_some() {
            context.pages.release(page);
        } else {
            self.split_page = Some(page);
        }
    }

    fn answer_out_of_order(&mut self, kind: StreamKind, index: usize) {
        let batch = &mut self.streams[kind.index()].under_way[index];
        let mut answered = Vec::new();
        for record in &mut batch.records {
            if let (Some(cookie), false) = (record.cookie, record.durable) {
                answered.push(cookie);
                record.cookie = None;
            }
        }
        answered.into_iter().for_each(|cookie| self.complete(cookie, Ok(())));
    }

    /// After a failure: everything under way is answered with an error; memory is released when the device lets go.
    pub(super) fn fail_streams<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        for kind in StreamKind::ALL {
            if let Some(open) = self.streams[kind.index()].open.take() {
                self.fail_records(&open.records);
                self.release_batch_memory(context, BatchMemory::Buffer(open.memory));
            }
            for index in 0..self.streams[kind.index()].under_way.len() {
                let batch = &mut self.streams[kind.index()].under_way[index];
                // Who lent memory is answered when the device has let go of it.
                if !batch.memory.is_lent() {
                    let records = std::mem::take(&mut batch.records);
                    self.fail_records(&records);
                }
            }
            self.release_failed(context, kind);
        }
    }

    fn fail_records(&mut self, records: &[Record]) {
        for record in records {
            record.frames.iter().flatten().for_each(|frame| self.map.unpin(*frame));
            self.unapplied_new_blocks -= u64::from(record.new_blocks);
            self.unapplied_leaves -= record.leaf_count();
            if let Some(cookie) = record.cookie {
                self.complete(cookie, Err(RequestError::Io));
            }
        }
    }

    fn release_failed<M: Memory>(&mut self, context: &mut Context<'_, M>, kind: StreamKind) {
        while self.streams[kind.index()].under_way.front().is_some_and(|batch| batch.writes_left == 0) {
            let batch = self.streams[kind.index()].under_way.pop_front().expect("just seen");
            self.fail_records(&batch.records);
            self.release_batch_memory(context, batch.memory);
        }
    }
}

fn fill_checksums(payload: &[u8], checksums: &mut [u32]) {
    for (block, crc) in payload.chunks_exact(BLOCK_BYTES_USIZE).zip(checksums) {
        *crc = crc32c(block);
    }
}

impl Stream {
    /// Has everything that was appended taken effect?
    pub(super) fn is_settled(&self) -> bool {
        self.open.is_none() && self.under_way.is_empty()
    }
}
