//! Recovery: from the root, then forward through the log to the first batch that is not valid.
//!
//! Reads only, and waits for each read: nothing is served meanwhile. What it finds is made safe by the lane's first
//! checkpoint, which is written before any append, answer or read.
//!
//! A stream's batches form a chain. Where it breaks, a descriptor or a payload is torn or was never written, which
//! is what a loss of power leaves; or it has rotted. A later batch that states a flushed watermark at or beyond the
//! broken one proves rot: then a readable descriptor is applied all the same (reads of the damaged blocks fail
//! their checksums), and an unreadable one makes the pool refuse to start rather than lose acknowledged writes.

use super::batch::{BatchHeader, Descriptor, EntryKind, own_entries};
use super::bugs::{Bugs, PlantedBug};
use super::checkpoint_body::{Body, VolumeRecord};
use super::layout::{ANCHORS, Layout, LayoutError, Place, SegmentIndex};
use super::map::{FrameIndex, LEAF_BLOCKS, Map, Mapping, Presence};
use super::root::{Cursor, LOGGED_STREAMS, PlaceRun, Root, choose_root, write_order};
use super::segment::SegmentTable;
use crate::checksum::crc32c;
use crate::limits::{PIECE_BLOCKS_MAX, VOLUME_BYTES_MAX};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64, BLOCK_BYTES_USIZE};
use std::collections::BTreeSet;
use std::ops::Range;

/// Reads a pool while it is not being served.
pub trait PoolReader {
    /// Length of the pool.
    fn len_bytes(&self) -> u64;
    /// Fills `into` from the device; offset and length are multiples of the block size. False if it cannot be read.
    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool;
}

/// Why a pool cannot be opened. Every variant means: nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// No usable header.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The file is shorter than the pool.
    #[error("the pool is cut short: it has {found_bytes} bytes and had at least {needed_bytes}")]
    CutShort {
        /// Bytes that are there.
        found_bytes: u64,
        /// Bytes that were there at format time.
        needed_bytes: u64,
    },
    /// Fewer than two equal roots.
    #[error("lane {lane}: no two of its four roots agree; the pool cannot be opened without losing data")]
    NoRoot {
        /// The lane.
        lane: u32,
    },
    /// A root cannot be read. It may be the newest one, readable again at the next start: going on from an older one
    /// would write over what it refers to.
    #[error("lane {lane}: root {slot} of 4 cannot be read; the device must be repaired or copied first")]
    RootUnreadable {
        /// The lane.
        lane: u32,
        /// Which slot.
        slot: u32,
    },
    /// The end of the log cannot be read. It may be readable at the next start, and hold what was answered.
    #[error(
        "lane {lane}: block {block} of the device, in the log's end, cannot be read; the device must be repaired or copied first"
    )]
    LogUnreadable {
        /// The lane.
        lane: u32,
        /// The block.
        block: u32,
    },
    /// Both copies of the checkpoint's body are damaged.
    #[error("lane {lane}: both copies of checkpoint {checkpoint} are damaged")]
    CheckpointDamaged {
        /// The lane.
        lane: u32,
        /// Its number.
        checkpoint: u64,
    },
    /// A leaf of the map that rolling forward must change is damaged.
    #[error("volume {volume}: the map of blocks {first_block} to {last_block} is damaged", last_block = first_block + 511)]
    LeafDamaged {
        /// The volume's name.
        volume: String,
        /// First block that it maps.
        first_block: u64,
    },
    /// A batch that was flushed has an unreadable descriptor.
    #[error("lane {lane}: the log is damaged after batch {after}: changes that were flushed are lost")]
    FlushedBatchLost {
        /// The lane.
        lane: u32,
        /// The last good batch.
        after: u64,
    },
}

/// Where a logged stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// The segment of its last valid batch. An anchor, at its end, if there never was one.
    pub segment: SegmentIndex,
    /// The block behind that batch. What is there or beyond does not count.
    pub block: u32,
    /// The segment that was reserved for what comes after `segment`.
    pub next_segment: SegmentIndex,
    /// Number of that batch; 0 if there never was one.
    pub number: u64,
}

/// A lane's state after recovery.
#[derive(Debug)]
pub struct Recovered {
    /// Mount number of the root; the lane goes on with the next one.
    pub mount: u64,
    /// Number of its checkpoint.
    pub checkpoint: u64,
    /// Highest batch number given out.
    pub last_number: u64,
    /// Where the logged streams go on: behind their last valid batches. Their segments are open.
    pub log_ends: [Option<LogEnd>; LOGGED_STREAMS],
    /// Where the map's stream goes on; its segment is open.
    pub map_end: Option<(SegmentIndex, u32)>,
    /// In which order the next checkpoint writes the root's slots.
    pub root_order: [u32; ANCHORS as usize],
    /// Where the checkpoint's body is.
    pub body: [Vec<PlaceRun>; 2],
    /// The volumes.
    pub volumes: Vec<VolumeRecord>,
    /// Their maps.
    pub map: Map,
    /// The lane's segments.
    pub segments: SegmentTable,
    /// Batches applied by rolling forward.
    pub batches_rolled_forward: u64,
    /// Where those of them are that no later batch proves to have been flushed: if they rot now, the next recovery takes
    /// them for torn.
    pub unproven: Vec<PlaceRun>,
}

/// Finds and reads the pool's header.
///
/// # Errors
/// [`RecoveryError::Layout`] and [`RecoveryError::CutShort`].
pub fn read_layout(reader: &mut impl PoolReader) -> Result<Layout, RecoveryError> {
    let layout = match header_at(reader, 0) {
        Ok(layout) => layout,
        // One header in four is damaged: the others are at the starts of segments, which are 64 KiB or more.
        Err(error) => {
            (1..reader.len_bytes() >> 16).find_map(|step| header_at(reader, step << 16).ok()).ok_or(error)?
        }
    };
    let needed_bytes = u64::from(layout.segments_at_format) * u64::from(layout.segment_bytes());
    let found_bytes = reader.len_bytes();
    if found_bytes < needed_bytes {
        return Err(RecoveryError::CutShort { found_bytes, needed_bytes });
    }
    Ok(layout)
}

fn header_at(reader: &mut impl PoolReader, offset_bytes: u64) -> Result<Layout, LayoutError> {
    let mut block = [0; BLOCK_BYTES_USIZE];
    let inside = offset_bytes + BLOCK_BYTES_U64 <= reader.len_bytes();
    if inside && reader.read_at(offset_bytes, &mut block) {
        Layout::decode(&block)
    } else {
        Err(LayoutError::NotAPool)
    }
}

/// Recovers one lane of a pool.
///
/// # Errors
/// All of [`RecoveryError`] but the first two.
pub fn recover_lane(
    reader: &mut impl PoolReader,
    layout: Layout,
    lane: u32,
    map_cache_bytes: u64,
    bugs: Bugs,
) -> Result<Recovered, RecoveryError> {
    let mut slots = [const { None }; ANCHORS as usize];
    for (slot, root) in (0..).zip(&mut slots) {
        *root = read_root(reader, &layout, lane, slot)?;
    }
    let root = choose_root(slots.clone()).ok_or(RecoveryError::NoRoot { lane })?;
    let damaged = RecoveryError::CheckpointDamaged { lane, checkpoint: root.checkpoint };
    let body = read_body(reader, &layout, &root).ok_or(damaged)?;
    let mut recovered = restore(reader, layout, &root, body, map_cache_bytes);

    let mut batches = Vec::new();
    let mut log_ends = [None; LOGGED_STREAMS];
    let mut unproven = Vec::new();
    for (stream, (cursor, end)) in (0..).zip(root.cursors.iter().zip(&mut log_ends)) {
        let mut walker = Walker::new(reader, layout, &root, stream, *cursor, bugs);
        walker.walk()?;
        unproven
            .extend(walker.found.iter().filter(|batch| batch.number > walker.flushed).map(|batch| batch.run));
        let mut accepted = walker.accepted();
        *end = Some(accepted.last().map_or_else(|| cursor.log_end(), |batch| batch.log_end));
        batches.append(&mut accepted);
    }
    // Between the streams the lane's numbers give the order: a move comes after the write that it moved.
    batches.sort_unstable_by_key(|batch| batch.number);
    for batch in &batches {
        apply_batch(reader, &layout, &mut recovered, batch, bugs)?;
    }
    recovered.last_number =
        batches.last().map_or(root.last_number, |batch| batch.number.max(root.last_number));
    recovered.batches_rolled_forward = batches.len() as u64;
    recovered.unproven = unproven;
    recovered.root_order = write_order(&slots, &root);
    recovered.log_ends = log_ends.map(|end| end.filter(|end| !layout.is_anchor(end.next_segment)));
    for end in recovered.log_ends.iter().flatten() {
        reopen_log(&layout, &mut recovered.segments, end);
    }
    Ok(recovered)
}

/// A mount that ends early must not cost a segment: the stream goes on where it was, and what it had reserved stays
/// reserved. Batches that were discarded lie there, but they are of an older mount than the root will be.
fn reopen_log(layout: &Layout, segments: &mut SegmentTable, end: &LogEnd) {
    if !layout.is_anchor(end.segment) {
        segments.restore_newest(end.segment, end.number);
        segments.reopen(end.segment);
    }
    if end.next_segment != end.segment {
        segments.reopen(end.next_segment);
    }
}

impl Cursor {
    fn log_end(&self) -> LogEnd {
        let Cursor { segment, block, next_segment, number, .. } = *self;
        LogEnd { segment, block, next_segment, number }
    }
}

fn read_root(
    reader: &mut impl PoolReader,
    layout: &Layout,
    lane: u32,
    slot: u32,
) -> Result<Option<Root>, RecoveryError> {
    let mut block = [0; BLOCK_BYTES_USIZE];
    if !reader.read_at(layout.root_place(lane, slot).offset_bytes(), &mut block) {
        return Err(RecoveryError::RootUnreadable { lane, slot });
    }
    Ok(Root::decode(&block, lane, &layout.pool_id))
}

fn read_body(reader: &mut impl PoolReader, layout: &Layout, root: &Root) -> Option<Body> {
    if root.body_bytes == 0 {
        return Some(Body::default());
    }
    let body = root.body.iter().find_map(|copy| read_body_copy(reader, root, copy))?;
    is_sensible(layout, layout.segments_in(reader.len_bytes()), root, &body).then_some(body)
}

/// Whatever wrote them with good checksums: does what root and body say fit the pool, so that it can be worked with?
fn is_sensible(layout: &Layout, segments: u32, root: &Root, body: &Body) -> bool {
    let inside = |place: Place| layout.segment_of(place).0 < segments;
    let leaves_of = |size_blocks: u64| size_blocks.div_ceil(u64::from(LEAF_BLOCKS));
    let cursors_fit = root.cursors.iter().all(|cursor| {
        cursor.segment.0.max(cursor.next_segment.0) < segments && cursor.block <= layout.segment_blocks
    });
    let leaves_fit = body.volumes.iter().flat_map(|(_, leaves)| leaves).all(|leaf| {
        inside(leaf.place) && u64::from(leaf.leaf) < leaves_of(VOLUME_BYTES_MAX / BLOCK_BYTES_U64)
    });
    let listed_segments: BTreeSet<SegmentIndex> = body.segments.iter().map(|record| record.segment).collect();
    let mut kept = body.volumes.iter().flat_map(|(record, _)| &record.kept);
    let kept_fit = kept.all(|kept| listed_segments.contains(&kept.segment));
    // What lives in a segment is in it.
    let mut live = vec![0_u64; segments as usize];
    let listed = body.segments.iter().map(|record| (record.segment, u64::from(record.live_blocks)));
    let of_body = root.body.iter().flatten().flat_map(|run| run.places());
    let counts_fit =
        listed.chain(of_body.map(|place| (layout.segment_of(place), 1))).all(|(segment, blocks)| {
            let Some(live) = live.get_mut(segment.0 as usize) else { return false };
            *live += blocks;
            *live <= u64::from(layout.segment_blocks) && !layout.is_anchor(segment)
        });
    root.map_end.0.0 < segments && cursors_fit && leaves_fit && kept_fit && counts_fit
}

fn read_body_copy(reader: &mut impl PoolReader, root: &Root, copy: &[PlaceRun]) -> Option<Body> {
    let blocks: u64 = copy.iter().map(|run| u64::from(run.blocks)).sum();
    let inside = |run: &PlaceRun| {
        run.place.offset_bytes() + u64::from(run.blocks) * BLOCK_BYTES_U64 <= reader.len_bytes()
    };
    // Before any memory is taken for it.
    if blocks != root.body_bytes.div_ceil(BLOCK_BYTES_U64)
        || root.body_bytes > reader.len_bytes()
        || !copy.iter().all(inside)
    {
        return None;
    }
    let mut bytes = Vec::new();
    for run in copy {
        let at = bytes.len();
        bytes.resize(at + run.blocks as usize * BLOCK_BYTES_USIZE, 0);
        if !reader.read_at(run.place.offset_bytes(), &mut bytes[at..]) {
            return None;
        }
    }
    bytes
        .get(..usize::try_from(root.body_bytes).ok()?)
        .filter(|body| crc32c(body) == root.body_crc)
        .and_then(Body::decode)
}

fn restore(
    reader: &impl PoolReader,
    layout: Layout,
    root: &Root,
    body: Body,
    map_cache_bytes: u64,
) -> Recovered {
    let mut map = Map::new(map_cache_bytes);
    let mut volumes = Vec::new();
    for (record, leaves) in body.volumes {
        map.add_volume(&leaves);
        volumes.push(record);
    }
    let mut segments = SegmentTable::new(layout, layout.segments_in(reader.len_bytes()));
    body.segments.iter().for_each(|record| segments.restore(record));
    for kept in volumes.iter().flat_map(|volume: &VolumeRecord| &volume.kept) {
        segments.keep(kept.segment);
    }
    for place in root.body.iter().flatten().flat_map(|run| run.places()) {
        segments.restore_found(layout.segment_of(place), 0);
        segments.add_live(place);
    }
    // A mount that ends early must not cost a segment: the map's stream goes on in the one it had.
    let (segment, block) = root.map_end;
    let has_room = segment.0 > 0 && block < layout.segment_blocks;
    let map_end = has_room.then_some(root.map_end);
    if has_room {
        segments.reopen(segment);
    }
    Recovered {
        log_ends: [None; LOGGED_STREAMS],
        root_order: [0, 1, 2, 3],
        map_end,
        mount: root.mount,
        checkpoint: root.checkpoint,
        last_number: root.last_number,
        body: root.body.clone(),
        volumes,
        map,
        segments,
        batches_rolled_forward: 0,
        unproven: Vec::new(),
    }
}

/// A batch found by rolling forward: its descriptor as far as it is filled, and where its payload is.
struct FoundBatch {
    number: u64,
    segment: SegmentIndex,
    /// Its descriptor and payload.
    run: PlaceRun,
    descriptor: Vec<u8>,
    payload_is_good: bool,
    /// A block of it that could not be read.
    unreadable: Option<u32>,
    continues: bool,
    /// Where the stream goes on after it.
    log_end: LogEnd,
}

/// Follows the chain of one stream.
struct Walker<'r, R> {
    reader: &'r mut R,
    layout: Layout,
    lane: u32,
    mount: u64,
    stream: u8,
    bugs: Bugs,
    cursor: Cursor,
    /// The segment held in `bytes`.
    loaded: Option<SegmentIndex>,
    bytes: Vec<u8>,
    /// Blocks of it that could not be read.
    unreadable: Vec<u32>,
    found: Vec<FoundBatch>,
    /// Highest flushed watermark seen.
    flushed: u64,
}

impl<'r, R: PoolReader> Walker<'r, R> {
    fn new(reader: &'r mut R, layout: Layout, root: &Root, stream: u8, cursor: Cursor, bugs: Bugs) -> Self {
        let (lane, mount) = (root.lane, root.mount);
        let (found, bytes, unreadable) = (Vec::new(), Vec::new(), Vec::new());
        Walker {
            reader,
            layout,
            lane,
            mount,
            stream,
            bugs,
            cursor,
            loaded: None,
            bytes,
            unreadable,
            found,
            flushed: 0,
        }
    }

    fn walk(&mut self) -> Result<(), RecoveryError> {
        while self.step()? {}
        // A batch that cannot be read is not a torn one.
        let torn = self.found.iter().find(|batch| !batch.payload_is_good && batch.number > self.flushed);
        if let Some(block) = torn.and_then(|batch| batch.unreadable) {
            return Err(RecoveryError::LogUnreadable { lane: self.lane, block });
        }
        let after = self.cursor.number;
        // Is there anything behind the break that says the missing batch had been flushed?
        if self.watermark_behind()? > after {
            return Err(RecoveryError::FlushedBatchLost { lane: self.lane, after });
        }
        Ok(())
    }

    /// Takes the batch at the cursor, or the first one of the next segment.
    fn step(&mut self) -> Result<bool, RecoveryError> {
        let (segment, block) = (self.cursor.segment, self.cursor.block);
        if block < self.layout.segment_blocks
            && self.take_batch(segment, block, Some(self.cursor.generation))?
        {
            return Ok(true);
        }
        let next = self.cursor.next_segment;
        if next == segment { Ok(false) } else { self.take_batch(next, 0, None) }
    }

    fn take_batch(
        &mut self,
        segment: SegmentIndex,
        block: u32,
        generation: Option<u64>,
    ) -> Result<bool, RecoveryError> {
        self.load(segment);
        self.expect_readable(segment, block..block + 1)?;
        let at = block as usize * BLOCK_BYTES_USIZE;
        let Some(descriptor) = Descriptor::decode(&self.bytes[at..]) else { return Ok(false) };
        let header = descriptor.header;
        let follows = header.chain == self.cursor.chain
            && header.mount == self.mount
            && generation.is_none_or(|generation| header.generation == generation);
        let mine = u32::from(header.lane) == self.lane && header.stream == self.stream;
        let inside = block + descriptor.total_blocks() <= self.layout.segment_blocks
            && header.next_segment.0 < self.layout.segments_in(self.reader.len_bytes());
        let chained = follows || self.bugs.has(PlantedBug::NoChain);
        if !mine || !inside || !chained || header.number <= self.cursor.number {
            return Ok(false);
        }
        let blocks = block..block + descriptor.total_blocks();
        let unreadable = self.unreadable.iter().find(|bad| blocks.contains(bad));
        let unreadable = unreadable.map(|bad| self.layout.place(segment, *bad).0);
        let payload = &self.bytes[at + BLOCK_BYTES_USIZE..];
        let payload_is_good = descriptor.entries().all(|view| {
            (0..view.payload_blocks()).all(|index| {
                let start = (view.payload_index + index) as usize * BLOCK_BYTES_USIZE;
                crc32c(&payload[start..start + BLOCK_BYTES_USIZE]) == view.checksum(index)
            })
        });
        self.flushed = self.flushed.max(header.flushed);
        self.found.push(FoundBatch {
            number: header.number,
            segment,
            run: PlaceRun { place: self.layout.place(segment, block), blocks: descriptor.total_blocks() },
            descriptor: self.bytes[at..at + descriptor.used_bytes()].to_vec(),
            payload_is_good,
            unreadable,
            continues: header.continues,
            log_end: LogEnd {
                segment,
                block: block + descriptor.total_blocks(),
                next_segment: header.next_segment,
                number: header.number,
            },
        });
        self.cursor = Cursor {
            segment,
            block: block + descriptor.total_blocks(),
            generation: header.generation,
            number: header.number,
            chain: descriptor.crc,
            next_segment: header.next_segment,
        };
        Ok(true)
    }

    fn load(&mut self, segment: SegmentIndex) {
        if self.loaded == Some(segment) {
            return;
        }
        self.bytes.resize(self.layout.segment_bytes() as usize, 0);
        self.unreadable.clear();
        let start = self.layout.place(segment, 0).offset_bytes();
        if !self.reader.read_at(start, &mut self.bytes) {
            // A part of the segment cannot be read: what can be, is.
            for (block, bytes) in (0..).zip(self.bytes.chunks_exact_mut(BLOCK_BYTES_USIZE)) {
                if !self.reader.read_at(start + u64::from(block) * BLOCK_BYTES_U64, bytes) {
                    bytes.fill(0);
                    self.unreadable.push(block);
                }
            }
        }
        self.loaded = Some(segment);
    }

    fn expect_readable(&self, segment: SegmentIndex, blocks: Range<u32>) -> Result<(), RecoveryError> {
        let Some(bad) = self.unreadable.iter().find(|block| blocks.contains(block)) else { return Ok(()) };
        Err(RecoveryError::LogUnreadable { lane: self.lane, block: self.layout.place(segment, *bad).0 })
    }

    /// The highest flushed watermark that a later batch of this stream and mount states. The first sync may have come long
    /// after the batch that is missing: from segment to segment those that are there name the next one. Where a segment may
    /// hold a single batch, nobody else might; such pools have few segments, and how each begins is looked at.
    fn watermark_behind(&mut self) -> Result<u64, RecoveryError> {
        let Cursor { segment, block, next_segment, .. } = self.cursor;
        let segments = self.layout.segments_in(self.reader.len_bytes());
        let mut seen = BTreeSet::from([segment, next_segment]);
        let mut pending = vec![(segment, block), (next_segment, 0)];
        let mut flushed = 0;
        while let Some((segment, block)) = pending.pop() {
            for header in self.later_batches(segment, block)? {
                flushed = flushed.max(header.flushed);
                let next = header.next_segment;
                if next.0 < segments && seen.insert(next) {
                    pending.push((next, 0));
                }
            }
        }
        let may_be_alone = self.layout.segment_blocks <= PIECE_BLOCKS_MAX + 1;
        let others =
            (0..segments).map(SegmentIndex).filter(|segment| may_be_alone && !seen.contains(segment));
        let watermarks = others.filter_map(|segment| Some(self.first_batch(segment)?.flushed));
        Ok(watermarks.chain([flushed]).max().unwrap_or(0))
    }

    /// What a segment begins with, if that is a batch behind the cursor's, chained to it or not.
    fn first_batch(&mut self, segment: SegmentIndex) -> Option<BatchHeader> {
        let mut block = [0; BLOCK_BYTES_USIZE];
        let is_read = self.reader.read_at(self.layout.place(segment, 0).offset_bytes(), &mut block);
        let header = Descriptor::decode(&block).filter(|_| is_read)?.header;
        self.is_later(&header).then_some(header)
    }

    fn is_later(&self, header: &BatchHeader) -> bool {
        let mine = u32::from(header.lane) == self.lane && header.stream == self.stream;
        mine && header.mount == self.mount && header.number > self.cursor.number
    }

    /// What may be batches behind the cursor's, chained to it or not.
    fn later_batches(
        &mut self,
        segment: SegmentIndex,
        block: u32,
    ) -> Result<Vec<BatchHeader>, RecoveryError> {
        self.load(segment);
        self.expect_readable(segment, block..self.layout.segment_blocks)?;
        let blocks = self.bytes[(block * BLOCK_BYTES) as usize..].chunks_exact(BLOCK_BYTES_USIZE);
        let headers = blocks.filter_map(Descriptor::decode).map(|descriptor| descriptor.header);
        Ok(headers.filter(|header| self.is_later(header)).collect())
    }

    /// The batches that count: up to the first one with a torn payload, and no first half without its second.
    fn accepted(self) -> Vec<FoundBatch> {
        let flushed = self.flushed;
        let mut accepted: Vec<FoundBatch> = self
            .found
            .into_iter()
            .take_while(|batch| batch.payload_is_good || batch.number <= flushed)
            .collect();
        if accepted.last().is_some_and(|batch| batch.continues) {
            accepted.pop();
        }
        accepted
    }
}

fn apply_batch(
    reader: &mut impl PoolReader,
    layout: &Layout,
    recovered: &mut Recovered,
    batch: &FoundBatch,
    bugs: Bugs,
) -> Result<(), RecoveryError> {
    recovered.segments.restore_found(batch.segment, batch.number);
    for view in own_entries(&batch.descriptor) {
        let entry = view.entry;
        let position = recovered.volumes.iter().position(|volume| volume.number == entry.volume);
        let Some(volume) = position else { continue };
        if entry.kind == EntryKind::Promise {
            let promise = &mut recovered.volumes[volume].promise;
            *promise = entry.epoch.max(*promise);
            continue;
        }
        if entry.kind == EntryKind::Fill {
            recovered.volumes[volume].note_fill(&entry, batch.number, &mut recovered.segments);
            continue;
        }
        let end = u64::from(entry.block) + u64::from(entry.count);
        if end > recovered.volumes[volume].size_blocks {
            continue;
        }
        recovered.volumes[volume].note_change(&entry, batch.segment, &mut recovered.segments);
        for index in 0..entry.count {
            let block = entry.block + index;
            let frame = leaf_at_hand(reader, recovered, volume, block / LEAF_BLOCKS)?;
            let place = batch.run.place.plus(1 + view.payload_index + index);
            let new = match entry.kind {
                EntryKind::Data | EntryKind::Move | EntryKind::CopyData => {
                    Mapping { place, crc: view.checksum(index) }
                }
                EntryKind::Zero | EntryKind::Trim | EntryKind::CopyZero => {
                    Mapping { place: Place::NONE, crc: 0 }
                }
                EntryKind::Lost => Mapping { place: Place::LOST, crc: 0 },
                EntryKind::Promise | EntryKind::Fill | EntryKind::Leaf | EntryKind::Checkpoint => continue,
            };
            let offset = block % LEAF_BLOCKS;
            let conditional = matches!(entry.kind, EntryKind::Move | EntryKind::Lost);
            let stale = conditional && recovered.map.get(frame, offset).place != entry.old_place;
            if stale && !bugs.has(PlantedBug::MoveOverNewerVersion) {
                continue;
            }
            if new.place.is_on_device() {
                recovered.segments.add_live(new.place);
            }
            let old = recovered.map.set(frame, offset, new, entry.sequence);
            assert!(!old.is_on_device() || layout.segment_of(old).0 < recovered.segments.pool_count());
            recovered.segments.remove_live(old);
        }
    }
    Ok(())
}

/// The leaf, loaded if need be.
pub(super) fn leaf_at_hand(
    reader: &mut impl PoolReader,
    recovered: &mut Recovered,
    volume: usize,
    leaf: u32,
) -> Result<FrameIndex, RecoveryError> {
    let position = u32::try_from(volume).expect("volumes fit 32 bits");
    match recovered.map.find(position, leaf) {
        Presence::Here(frame) | Presence::Loading(frame) => Ok(frame),
        Presence::Nowhere => Ok(recovered.map.admit(position, leaf)),
        Presence::Away(Mapping { place, crc }) => {
            let mut block = [0; BLOCK_BYTES_USIZE];
            let good = reader.read_at(place.offset_bytes(), &mut block) && crc32c(&block) == crc;
            if !good {
                return Err(RecoveryError::LeafDamaged {
                    volume: recovered.volumes[volume].name.clone(),
                    first_block: u64::from(leaf) * u64::from(LEAF_BLOCKS),
                });
            }
            let frame = recovered.map.admit(position, leaf);
            recovered.map.finish_load(frame, &block);
            Ok(frame)
        }
    }
}
