//! Reading blocks: leaves, then the device, then checksums.

use super::change::leaves_of;
use super::leaf::Waiter;
use super::{BlockRange, Completion, Context, DiskEffect, DiskToken, Lane, Operation};
use crate::checksum::crc32c;
use crate::limits::PIECE_BLOCKS_MAX;
use crate::memory::Memory;
use crate::request::RequestError;
use crate::store::layout::Place;
use crate::store::map::{FrameIndex, LEAF_BLOCKS, Mapping, Presence};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};

/// One bit per block of a piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockBits {
    words: [u64; PIECE_BLOCKS_MAX as usize / 64],
}

impl BlockBits {
    /// Is the bit of block `index` of the piece set?
    #[must_use]
    pub fn is_set(&self, index: u32) -> bool {
        self.words[index as usize / 64] >> (index % 64) & 1 == 1
    }

    /// Sets it.
    pub fn set(&mut self, index: u32) {
        self.words[index as usize / 64] |= 1 << (index % 64);
    }

    fn any(&self) -> bool {
        self.words.iter().any(|word| *word != 0)
    }

    /// The runs of blocks whose bits are set: first and count.
    #[must_use]
    pub fn runs(&self) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for index in (0..PIECE_BLOCKS_MAX).filter(|index| self.is_set(*index)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => runs.push((index, 1)),
            }
        }
        runs
    }
}

/// Which blocks of a piece are holes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoleMap(BlockBits);

impl HoleMap {
    /// Is block `index` of the piece a hole?
    #[must_use]
    pub fn is_hole(&self, index: u32) -> bool {
        self.0.is_set(index)
    }

    /// A piece of nothing but holes.
    #[must_use]
    pub fn all(count: u32) -> HoleMap {
        let mut holes = HoleMap::default();
        (0..count).for_each(|index| holes.mark(index));
        holes
    }

    fn mark(&mut self, index: u32) {
        self.0.set(index);
    }

    /// Is there any hole?
    #[must_use]
    pub fn has_holes(&self) -> bool {
        self.0.any()
    }
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlocksRead {
    /// Which blocks.
    pub range: BlockRange,
    /// Into what. If the read failed nothing of it counts.
    pub memory: MemoryRange,
    /// The blocks of the range that cannot be read or have wrong checksums. None of them if it is a leaf of the map that
    /// is damaged: then nobody knows what is good.
    pub damaged: BlockBits,
}

/// A read under way.
#[derive(Debug)]
pub(super) struct Read {
    cookie: u32,
    range: BlockRange,
    memory: MemoryRange,
    frames: [Option<FrameIndex>; 2],
    /// What the map said when the read went to the device.
    mappings: Vec<Mapping>,
    parts_left: u32,
    failed: bool,
}

impl Lane {
    /// Reads blocks into `memory`; holes become zeroes. What is being written shows when it has taken effect.
    pub fn read<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        range: BlockRange,
        memory: MemoryRange,
    ) {
        assert!(memory.len == range.count * BLOCK_BYTES && range.count <= PIECE_BLOCKS_MAX);
        if self.must_not_be_shown() {
            return self.complete(cookie, Err(RequestError::Io));
        }
        let mappings = self.spare_mappings.pop().unwrap_or_default();
        let read = Read { cookie, range, memory, frames: [None; 2], mappings, parts_left: 0, failed: false };
        let index = self.reads.insert(read);
        self.try_read(context, index);
    }

    /// Goes to the device if all leaves are here, else waits for the next one.
    pub(super) fn try_read<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) {
        let range = self.reads.get(index).range;
        for (which, leaf) in leaves_of(range).enumerate() {
            if self.reads.get(index).frames[which].is_some() {
                continue;
            }
            match self.map.find(range.volume, leaf) {
                Presence::Nowhere => {}
                Presence::Here(frame) => {
                    self.map.pin(frame);
                    self.reads.get_mut(index).frames[which] = Some(frame);
                }
                Presence::Loading(_) | Presence::Away(_) => {
                    self.load_leaf(context, range.volume, leaf, Waiter::Read(index));
                    return;
                }
            }
        }
        self.look_up(context, index);
        self.start_read_parts(index);
        if self.reads.get(index).parts_left == 0 {
            self.end_read_request(context, index);
        }
    }

    fn look_up<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) {
        let read = self.reads.get_mut(index);
        let first_leaf = read.range.block / LEAF_BLOCKS;
        for offset in 0..read.range.count {
            let block = read.range.block + offset;
            let hole = Mapping { place: Place::NONE, crc: 0 };
            let frame = read.frames[(block / LEAF_BLOCKS - first_leaf) as usize];
            let mapping = frame.map_or(hole, |frame| self.map.get(frame, block % LEAF_BLOCKS));
            if !mapping.place.is_on_device() {
                context.memory.bytes_mut(read.memory.part(offset * BLOCK_BYTES, BLOCK_BYTES)).fill(0);
            }
            read.mappings.push(mapping);
        }
        for frame in &mut read.frames {
            if let Some(frame) = frame.take() {
                self.map.unpin(frame);
            }
        }
    }

    /// One device read for each run of places in a row. Runs do not cross segments, so that each pins just one.
    fn start_read_parts(&mut self, index: u32) {
        let (count, memory) = (self.reads.get(index).range.count, self.reads.get(index).memory);
        let mut first = 0;
        while first < count {
            let place = self.reads.get(index).mappings[first as usize].place;
            if !place.is_on_device() {
                first += 1;
                continue;
            }
            let segment = self.config.layout.segment_of(place);
            let mappings = &self.reads.get(index).mappings;
            let mut blocks = 1;
            while first + blocks < count
                && mappings[(first + blocks) as usize].place == place.plus(blocks)
                && self.config.layout.segment_of(place.plus(blocks)) == segment
            {
                blocks += 1;
            }
            let memory = memory.part(first * BLOCK_BYTES, blocks * BLOCK_BYTES);
            self.segments.begin_read(segment);
            self.reads.get_mut(index).parts_left += 1;
            self.start(Operation::Read(index), |token: DiskToken| DiskEffect::Read { token, place, memory });
            first += blocks;
        }
    }

    pub(super) fn finish_read_part<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
        good: bool,
    ) {
        let read = self.reads.get_mut(index);
        read.failed |= !good;
        read.parts_left -= 1;
        if read.parts_left == 0 {
            self.end_read_parts(index);
            self.end_read_request(context, index);
        }
    }

    fn end_read_parts(&mut self, index: u32) {
        let read = self.reads.get(index);
        let mut previous: Option<Place> = None;
        for mapping in &read.mappings {
            let layout = &self.config.layout;
            let follows = previous.is_some_and(|place| {
                place.is_on_device()
                    && mapping.place == place.plus(1)
                    && layout.segment_of(mapping.place) == layout.segment_of(place)
            });
            if mapping.place.is_on_device() && !follows {
                self.segments.end_read(layout.segment_of(mapping.place));
            }
            previous = Some(mapping.place);
        }
    }

    fn end_read_request<M: Memory>(&mut self, context: &mut Context<'_, M>, index: u32) {
        let mut read = self.reads.remove(index);
        let (mut holes, mut bad) = (HoleMap::default(), BlockBits::default());
        let blocks = context.memory.bytes(read.memory).chunks_exact(BLOCK_BYTES_USIZE);
        for (offset, (block, mapping)) in (0..).zip(blocks.zip(&read.mappings)) {
            if mapping.place == Place::NONE {
                holes.mark(offset);
            } else if mapping.place == Place::LOST {
                bad.set(offset);
            } else if crc32c(block) != mapping.crc {
                // Of a read that failed it is not known what came of it.
                self.counters.checksum_errors += u64::from(!read.failed);
                bad.set(offset);
            }
        }
        let failed = read.failed || bad.any();
        self.end_read(&read, holes, bad, failed);
        read.mappings.clear();
        self.spare_mappings.push(read.mappings);
    }

    fn end_read(&mut self, read: &Read, holes: HoleMap, damaged: BlockBits, failed: bool) {
        let result = if failed { Err(RequestError::Io) } else { Ok(()) };
        let blocks = BlocksRead { range: read.range, memory: read.memory, damaged };
        let completion = Completion { cookie: read.cookie, result, holes, read: Some(blocks) };
        self.completions.push_back(completion);
    }

    /// A leaf of the read cannot be read: what it maps is unknown, which is not the same as a hole.
    pub(super) fn refuse_read(&mut self, index: u32) {
        let mut read = self.reads.remove(index);
        read.frames.iter().flatten().for_each(|frame| self.map.unpin(*frame));
        self.end_read(&read, HoleMap::default(), BlockBits::default(), true);
        read.mappings.clear();
        self.spare_mappings.push(read.mappings);
    }
}
