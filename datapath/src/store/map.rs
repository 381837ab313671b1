//! The map of a volume: where each block is and what its CRC must be.
//!
//! A leaf covers 512 blocks and is one block on the device: 512 places, then 512 CRCs, 4 bytes each. Its own
//! place and CRC are kept by its parent (here: [`LeafSlot`]), so a leaf that rotted or strayed is noticed. Leaves
//! are loaded when needed and evicted when clean; only a checkpoint cleans them. When a checkpoint has cut, dirty
//! leaves are *frozen*: the first change to one sets its old content aside for the checkpoint to write.

use super::checkpoint_body::LeafRecord;
use super::fields::{put, u32_at};
use super::layout::Place;
use crate::units::BLOCK_BYTES_USIZE;

/// Blocks that a leaf covers.
pub const LEAF_BLOCKS: u32 = 512;
const SLOTS_PER_CHUNK: usize = 512;
/// Leaves that a lane's volumes may have in all: what a checkpoint's root can refer to, with some to spare. They map
/// 9 TiB, however thinly written.
pub const LEAVES_MAX: u32 = 5_000_000;

/// A leaf in memory, by position in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameIndex(u32);

impl FrameIndex {
    const NONE: FrameIndex = FrameIndex(u32::MAX);
}

/// Where one block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its place, or [`Place::NONE`] for a hole.
    pub place: Place,
    /// CRC32C of its content; without meaning for a hole.
    pub crc: u32,
}

struct LeafContent {
    places: [u32; LEAF_BLOCKS as usize],
    crcs: [u32; LEAF_BLOCKS as usize],
}

impl LeafContent {
    fn empty() -> Box<LeafContent> {
        Box::new(LeafContent { places: [0; LEAF_BLOCKS as usize], crcs: [0; LEAF_BLOCKS as usize] })
    }

    fn encode(&self, block: &mut [u8]) {
        for (index, (place, crc)) in self.places.iter().zip(&self.crcs).enumerate() {
            put(block, 4 * index, &place.to_le_bytes());
            put(block, BLOCK_BYTES_USIZE / 2 + 4 * index, &crc.to_le_bytes());
        }
    }

    fn decode_from(&mut self, block: &[u8]) {
        for (index, (place, crc)) in self.places.iter_mut().zip(&mut self.crcs).enumerate() {
            *place = u32_at(block, 4 * index);
            *crc = u32_at(block, BLOCK_BYTES_USIZE / 2 + 4 * index);
        }
    }
}

/// What the parent knows of a leaf on the device.
#[derive(Clone, Copy, Debug)]
struct LeafSlot {
    place: Place,
    crc: u32,
    sequence_max: u64,
    frame: FrameIndex,
}

const EMPTY_SLOT: LeafSlot =
    LeafSlot { place: Place::NONE, crc: 0, sequence_max: 0, frame: FrameIndex::NONE };

/// The leaf slots of one volume. Slots come in chunks (1 GiB of the volume each), so a thin volume of many
/// TiB costs little until it is written.
#[derive(Debug, Default)]
pub struct LeafTable {
    chunks: Vec<Option<Box<[LeafSlot; SLOTS_PER_CHUNK]>>>,
}

impl LeafTable {
    fn slot(&self, leaf: u32) -> LeafSlot {
        let chunk = self.chunks.get(leaf as usize / SLOTS_PER_CHUNK).and_then(Option::as_ref);
        chunk.map_or(EMPTY_SLOT, |chunk| chunk[leaf as usize % SLOTS_PER_CHUNK])
    }

    fn slot_mut(&mut self, leaf: u32) -> &mut LeafSlot {
        let chunk = leaf as usize / SLOTS_PER_CHUNK;
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let slots = self.chunks[chunk].get_or_insert_with(|| Box::new([EMPTY_SLOT; SLOTS_PER_CHUNK]));
        &mut slots[leaf as usize % SLOTS_PER_CHUNK]
    }

    /// Takes over what a checkpoint says of a leaf.
    pub fn restore(&mut self, record: &LeafRecord) {
        let slot = self.slot_mut(record.leaf);
        *slot = LeafSlot {
            place: record.place,
            crc: record.crc,
            sequence_max: record.sequence_max,
            ..EMPTY_SLOT
        };
    }

    /// Where the leaf's block is on the device, and its CRC; [`Place::NONE`] if it has none.
    #[must_use]
    pub fn leaf_on_device(&self, leaf: u32) -> Mapping {
        let slot = self.slot(leaf);
        Mapping { place: slot.place, crc: slot.crc }
    }

    /// Every leaf that was ever written, in order, as a checkpoint records it.
    pub fn records(&self) -> impl Iterator<Item = LeafRecord> + '_ {
        self.chunks.iter().enumerate().filter_map(|(index, chunk)| Some((index, chunk.as_ref()?))).flat_map(
            |(index, chunk)| {
                chunk.iter().enumerate().filter(|(_, slot)| slot.sequence_max > 0).map(
                    move |(offset, slot)| {
                        let leaf =
                            u32::try_from(index * SLOTS_PER_CHUNK + offset).expect("leaves fit 32 bits");
                        LeafRecord { leaf, place: slot.place, crc: slot.crc, sequence_max: slot.sequence_max }
                    },
                )
            },
        )
    }

    /// The first leaf at or after `leaf` that is in memory or on the device, below `end`.
    #[must_use]
    pub fn next_present(&self, leaf: u32, end: u32) -> Option<u32> {
        let mut leaf = leaf;
        while leaf < end {
            let chunk = leaf as usize / SLOTS_PER_CHUNK;
            match self.chunks.get(chunk) {
                None => return None,
                Some(None) => leaf = u32::try_from((chunk + 1) * SLOTS_PER_CHUNK).ok()?,
                Some(Some(slots)) => {
                    let slot = &slots[leaf as usize % SLOTS_PER_CHUNK];
                    if slot.frame != FrameIndex::NONE || slot.place != Place::NONE {
                        return Some(leaf);
                    }
                    leaf += 1;
                }
            }
        }
        None
    }
}

struct Frame {
    volume: u32,
    leaf: u32,
    sequence_max: u64,
    pins: u32,
    loaded: bool,
    dirty: bool,
    /// Dirty at the checkpoint's cut, unchanged since, and not yet written by it.
    frozen: bool,
    recently_used: bool,
    content: Box<LeafContent>,
    /// Content and sequence at the cut, once changed since.
    set_aside: Option<(Box<LeafContent>, u64)>,
}

/// Is a leaf at hand?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// In memory.
    Here(FrameIndex),
    /// In memory soon: it is being loaded into this frame.
    Loading(FrameIndex),
    /// On the device only.
    Away(Mapping),
    /// Nowhere: all its blocks are holes.
    Nowhere,
}

/// The maps of all volumes of a lane. Volumes are named by their position in the lane, leaves in memory by frame.
#[derive(Default)]
pub struct Map {
    tables: Vec<LeafTable>,
    frames: Vec<Frame>,
    unused: Vec<FrameIndex>,
    spare: Vec<Box<LeafContent>>,
    frames_max: usize,
    hand: usize,
    dirty: usize,
    in_use: usize,
    /// Leaves that were ever written: each has a record in every checkpoint.
    recorded: u32,
    /// Loads that were needed, for the metrics.
    pub misses: u64,
    /// Leaves dropped for want of room.
    pub evictions: u64,
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Map {{ in use: {}, dirty: {}, at most: {} }}", self.in_use, self.dirty, self.frames_max)
    }
}

impl Map {
    /// No volumes yet, and a cache of at most `cache_bytes`, but at least 16 leaves.
    #[must_use]
    pub fn new(cache_bytes: u64) -> Map {
        let frame_bytes = (size_of::<LeafContent>() + size_of::<Frame>()) as u64;
        let frames_max = usize::try_from(cache_bytes / frame_bytes).unwrap_or(usize::MAX).max(16);
        Map { frames_max, ..Map::default() }
    }

    /// Adds a volume with the leaves that a checkpoint knows; its position is the number of those before it.
    pub fn add_volume(&mut self, leaves: &[LeafRecord]) {
        let mut table = LeafTable::default();
        leaves.iter().for_each(|leaf| table.restore(leaf));
        self.recorded += u32::try_from(leaves.len()).expect("leaves fit 32 bits");
        self.tables.push(table);
    }

    /// Removes a volume with its leaves; those after it move up. For tools: nothing may be under way.
    pub(super) fn remove_volume(&mut self, volume: u32) {
        for (index, frame) in (0..).zip(&mut self.frames).filter(|(_, frame)| frame.loaded) {
            if frame.volume > volume {
                frame.volume -= 1;
            } else if frame.volume == volume {
                assert!(frame.pins == 0 && !frame.frozen && frame.set_aside.is_none(), "the leaf is in use");
                self.dirty -= usize::from(std::mem::take(&mut frame.dirty));
                frame.loaded = false;
                self.unused.push(FrameIndex(index));
                self.in_use -= 1;
            }
        }
        self.tables.remove(volume as usize);
    }

    /// The leaf table of a volume.
    #[must_use]
    pub fn table(&self, volume: u32) -> &LeafTable {
        &self.tables[volume as usize]
    }

    /// Leaves with changes that no checkpoint has begun to write.
    #[must_use]
    pub fn dirty_count(&self) -> usize {
        self.dirty
    }

    /// Leaves in memory.
    #[must_use]
    pub fn resident_count(&self) -> usize {
        self.in_use
    }

    /// Leaves that the cache holds.
    #[must_use]
    pub fn frames_max(&self) -> usize {
        self.frames_max
    }

    /// May a leaf be written that never was?
    #[must_use]
    pub fn has_room_for_leaf(&self) -> bool {
        self.recorded < LEAVES_MAX
    }

    /// So many leaves are dirty that a checkpoint must make room for others.
    #[must_use]
    pub fn wants_checkpoint(&self) -> bool {
        self.dirty * 2 > self.frames_max
    }

    /// So many leaves are dirty that changes must wait for the checkpoint.
    #[must_use]
    pub fn is_overfull(&self) -> bool {
        self.in_use >= self.frames_max + self.frames_max / 4 + 64
    }

    /// Highest sequence of a change to the leaf's blocks; 0 if there was none.
    #[must_use]
    pub fn leaf_sequence(&self, volume: u32, leaf: u32) -> u64 {
        let slot = self.tables[volume as usize].slot(leaf);
        let in_memory = match slot.frame {
            FrameIndex::NONE => 0,
            frame => self.frames[frame.0 as usize].sequence_max,
        };
        in_memory.max(slot.sequence_max)
    }

    /// Where a leaf is.
    pub fn find(&mut self, volume: u32, leaf: u32) -> Presence {
        let slot = self.tables[volume as usize].slot(leaf);
        if slot.frame != FrameIndex::NONE {
            let frame = &mut self.frames[slot.frame.0 as usize];
            frame.recently_used = true;
            return if frame.loaded { Presence::Here(slot.frame) } else { Presence::Loading(slot.frame) };
        }
        if slot.place == Place::NONE {
            return Presence::Nowhere;
        }
        Presence::Away(Mapping { place: slot.place, crc: slot.crc })
    }

    /// A frame for a leaf that is away or nowhere. A leaf from nowhere is ready; the other one is loading until
    /// [`Self::finish_load`].
    pub fn admit(&mut self, volume: u32, leaf: u32) -> FrameIndex {
        let index = self.vacant_frame();
        let slot = self.tables[volume as usize].slot_mut(leaf);
        assert!(slot.frame == FrameIndex::NONE, "leaf {leaf} of volume {volume} is here already");
        slot.frame = index;
        let frame = &mut self.frames[index.0 as usize];
        frame.volume = volume;
        frame.leaf = leaf;
        frame.sequence_max = slot.sequence_max;
        frame.loaded = slot.place == Place::NONE;
        frame.recently_used = true;
        if frame.loaded {
            // Of the leaf that was here before nothing stays, or its CRCs would be written for holes.
            frame.content.places.fill(0);
            frame.content.crcs.fill(0);
        } else {
            self.misses += 1;
        }
        self.in_use += 1;
        index
    }

    fn vacant_frame(&mut self) -> FrameIndex {
        if self.in_use >= self.frames_max {
            self.evict_one();
        }
        if let Some(index) = self.unused.pop() {
            return index;
        }
        let index = FrameIndex(u32::try_from(self.frames.len()).expect("fewer than 2^32 leaves in memory"));
        let content = self.spare.pop().unwrap_or_else(LeafContent::empty);
        self.frames.push(Frame {
            volume: 0,
            leaf: 0,
            sequence_max: 0,
            pins: 0,
            loaded: false,
            dirty: false,
            frozen: false,
            recently_used: false,
            content,
            set_aside: None,
        });
        index
    }

    /// The clock algorithm, two rounds at most. When all leaves are dirty or pinned none goes, and the cache grows
    /// by what the requests under way need.
    fn evict_one(&mut self) {
        for _ in 0..2 * self.frames.len() {
            let hand = self.hand;
            self.hand = (hand + 1) % self.frames.len();
            let frame = &mut self.frames[hand];
            let evictable = frame.loaded && !frame.dirty && !frame.frozen && frame.pins == 0;
            if !evictable || frame.set_aside.is_some() {
                continue;
            }
            if std::mem::take(&mut frame.recently_used) {
                continue;
            }
            self.tables[frame.volume as usize].slot_mut(frame.leaf).frame = FrameIndex::NONE;
            frame.loaded = false;
            self.unused.push(FrameIndex(u32::try_from(hand).expect("frames fit 32 bits")));
            self.in_use -= 1;
            self.evictions += 1;
            return;
        }
    }

    /// The leaf's block has arrived and its CRC was right.
    pub fn finish_load(&mut self, index: FrameIndex, block: &[u8]) {
        let frame = &mut self.frames[index.0 as usize];
        assert!(!frame.loaded);
        frame.content.decode_from(block);
        frame.loaded = true;
    }

    /// The leaf cannot be read: forget the frame, keep what the parent knows.
    pub fn abandon_load(&mut self, index: FrameIndex) {
        let frame = &mut self.frames[index.0 as usize];
        assert!(!frame.loaded && frame.pins == 0);
        self.tables[frame.volume as usize].slot_mut(frame.leaf).frame = FrameIndex::NONE;
        self.unused.push(index);
        self.in_use -= 1;
    }

    /// Which leaf of which volume is in the frame.
    #[must_use]
    pub fn owner(&self, index: FrameIndex) -> (u32, u32) {
        let frame = &self.frames[index.0 as usize];
        (frame.volume, frame.leaf)
    }

    /// Does somebody need the leaf in memory?
    #[must_use]
    pub fn is_pinned(&self, index: FrameIndex) -> bool {
        self.frames[index.0 as usize].pins > 0
    }

    /// Forgets a leaf that is in memory, there and on the device: all its blocks are holes that were never anything else.
    ///
    /// # Panics
    /// If it is pinned, or a checkpoint has yet to write it.
    pub fn drop_leaf(&mut self, volume: u32, leaf: u32) {
        let slot = self.tables[volume as usize].slot_mut(leaf);
        let LeafSlot { frame: index, sequence_max, .. } = std::mem::replace(slot, EMPTY_SLOT);
        let frame = &mut self.frames[index.0 as usize];
        let is_wanted = frame.pins > 0 || frame.frozen || frame.set_aside.is_some();
        assert!(frame.loaded && !is_wanted, "leaf {leaf} of volume {volume} is in use");
        self.recorded -= u32::from(sequence_max.max(frame.sequence_max) > 0);
        self.dirty -= usize::from(std::mem::take(&mut frame.dirty));
        frame.loaded = false;
        self.unused.push(index);
        self.in_use -= 1;
    }

    /// Forgets what is left of a volume without leaves: where there once was something.
    ///
    /// # Panics
    /// If it has a leaf.
    pub fn forget_volume(&mut self, volume: u32) {
        let table = std::mem::take(&mut self.tables[volume as usize]);
        assert!(table.next_present(0, u32::MAX).is_none(), "volume {volume} has leaves");
        self.recorded -= u32::try_from(table.records().count()).expect("leaves fit 32 bits");
    }

    /// Keeps the leaf in memory until the matching [`Self::unpin`].
    pub fn pin(&mut self, index: FrameIndex) {
        self.frames[index.0 as usize].pins += 1;
    }

    /// Ends a [`Self::pin`].
    pub fn unpin(&mut self, index: FrameIndex) {
        let pins = &mut self.frames[index.0 as usize].pins;
        *pins = pins.checked_sub(1).expect("a pin to end");
    }

    /// Where block `offset` of the leaf is.
    #[must_use]
    pub fn get(&self, index: FrameIndex, offset: u32) -> Mapping {
        let frame = &self.frames[index.0 as usize];
        debug_assert!(frame.loaded);
        let offset = offset as usize;
        Mapping { place: Place(frame.content.places[offset]), crc: frame.content.crcs[offset] }
    }

    /// Block `offset` of the leaf is at `new` from now on; returns where it was.
    pub fn set(&mut self, index: FrameIndex, offset: u32, new: Mapping, sequence: u64) -> Place {
        let frame = &mut self.frames[index.0 as usize];
        assert!(frame.loaded);
        if frame.frozen {
            let mut copy = self.spare.pop().unwrap_or_else(LeafContent::empty);
            copy.places.copy_from_slice(&frame.content.places);
            copy.crcs.copy_from_slice(&frame.content.crcs);
            frame.set_aside = Some((copy, frame.sequence_max));
            frame.frozen = false;
        }
        if !frame.dirty {
            frame.dirty = true;
            self.dirty += 1;
        }
        self.recorded += u32::from(frame.sequence_max == 0);
        frame.sequence_max = frame.sequence_max.max(sequence);
        let offset = offset as usize;
        frame.content.crcs[offset] = new.crc;
        Place(std::mem::replace(&mut frame.content.places[offset], new.place.0))
    }

    /// The checkpoint must write the leaf again, because the cleaner wants its block.
    pub fn touch(&mut self, index: FrameIndex) {
        let frame = &mut self.frames[index.0 as usize];
        assert!(frame.loaded);
        if !frame.dirty && !frame.frozen && frame.set_aside.is_none() {
            frame.dirty = true;
            self.dirty += 1;
        }
    }

    /// A checkpoint cuts: all dirty leaves are frozen and listed in the order of volume and leaf.
    pub fn freeze(&mut self) -> Vec<FrameIndex> {
        let mut frozen = Vec::with_capacity(self.dirty);
        for (index, frame) in self.frames.iter_mut().enumerate() {
            if std::mem::take(&mut frame.dirty) {
                assert!(!frame.frozen && frame.set_aside.is_none(), "one checkpoint at a time");
                frame.frozen = true;
                frozen.push(FrameIndex(u32::try_from(index).expect("frames fit 32 bits")));
            }
        }
        self.dirty = 0;
        frozen.sort_unstable_by_key(|index| self.owner(*index));
        frozen
    }

    /// Writes a frozen leaf's content at the cut into `block`; returns its highest sequence, and whether it
    /// holds nothing but holes.
    pub fn encode_frozen(&mut self, index: FrameIndex, block: &mut [u8]) -> (u64, bool) {
        let frame = &mut self.frames[index.0 as usize];
        if let Some((content, sequence_max)) = frame.set_aside.take() {
            content.encode(block);
            let empty = content.places.iter().all(|place| *place == 0);
            self.spare.push(content);
            return (sequence_max, empty);
        }
        assert!(frame.frozen, "a leaf of the checkpoint is frozen or set aside");
        frame.frozen = false;
        frame.content.encode(block);
        (frame.sequence_max, frame.content.places.iter().all(|place| *place == 0))
    }

    /// A checkpoint has a new place for a leaf; returns the old one. While it is being written the leaf
    /// must stay in memory: the caller holds a pin.
    pub fn set_leaf_on_device(&mut self, volume: u32, leaf: u32, new: Mapping, sequence_max: u64) -> Place {
        let slot = self.tables[volume as usize].slot_mut(leaf);
        slot.crc = new.crc;
        slot.sequence_max = sequence_max;
        std::mem::replace(&mut slot.place, new.place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(number: u32) -> Mapping {
        Mapping { place: Place(number), crc: !number }
    }

    fn map(cache_bytes: u64) -> Map {
        let mut map = Map::new(cache_bytes);
        map.add_volume(&[]);
        map.add_volume(&[]);
        map
    }

    #[test]
    fn a_frozen_leaf_is_written_as_it_was_at_the_cut() {
        let mut cache = map(1 << 20);
        assert_eq!(cache.find(1, 3), Presence::Nowhere);
        let frame = cache.admit(1, 3);
        cache.set(frame, 5, mapping(50), 7);
        assert_eq!(cache.freeze(), vec![frame]);
        assert_eq!(cache.set(frame, 5, mapping(51), 8), Place(50));
        let mut block = [0; BLOCK_BYTES_USIZE];
        assert_eq!(cache.encode_frozen(frame, &mut block), (7, false));
        assert_eq!((u32_at(&block, 20), u32_at(&block, 2048 + 20)), (50, !50));
        assert_eq!((cache.get(frame, 5), cache.dirty_count()), (mapping(51), 1));
    }

    #[test]
    fn the_leaf_keeps_its_bytes() {
        let mut cache = map(1 << 20);
        let frame = cache.admit(1, 3);
        let entry = |place, crc| Mapping { place: Place(place), crc };
        cache.set(frame, 0, entry(0x0403_0201, 0x1413_1211), 7);
        cache.set(frame, 1, entry(0xfffe_fdfc, 0x2423_2221), 8);
        cache.set(frame, 2, Mapping { place: Place::LOST, crc: 0 }, 9);
        cache.set(frame, 3, entry(77, 88), 10);
        cache.set(frame, 3, Mapping { place: Place::NONE, crc: 0 }, 11);
        cache.set(frame, 511, entry(0x0807_0605, 0x1817_1615), 12);
        cache.freeze();
        let mut block = [0xaa; BLOCK_BYTES_USIZE];
        assert_eq!(cache.encode_frozen(frame, &mut block), (12, false));

        let mut golden = [0; BLOCK_BYTES_USIZE];
        golden[..12].copy_from_slice(&[1, 2, 3, 4, 0xfc, 0xfd, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
        golden[2044..2048].copy_from_slice(&[5, 6, 7, 8]);
        golden[2048..2056].copy_from_slice(&[0x11, 0x12, 0x13, 0x14, 0x21, 0x22, 0x23, 0x24]);
        golden[4092..].copy_from_slice(&[0x15, 0x16, 0x17, 0x18]);
        for (at, (byte, expected)) in block.iter().zip(&golden).enumerate() {
            assert_eq!(byte, expected, "byte {at}");
        }

        let mut other = map(1 << 20);
        other.set_leaf_on_device(1, 3, mapping(9), 12);
        let read = other.admit(1, 3);
        other.finish_load(read, &golden);
        assert!((0..LEAF_BLOCKS).all(|offset| other.get(read, offset) == cache.get(frame, offset)));
    }

    #[test]
    fn a_new_leaf_has_nothing_of_the_one_before_it_in_memory() {
        let mut cache = map(0);
        for leaf in 0..16 {
            cache.set_leaf_on_device(1, leaf, mapping(100 + leaf), 1);
            let frame = cache.admit(1, leaf);
            cache.finish_load(frame, &[0xee; BLOCK_BYTES_USIZE]);
        }
        let frame = cache.admit(0, 0);
        assert_eq!(cache.evictions, 1, "its memory had another leaf");
        cache.set(frame, 5, mapping(50), 7);
        cache.freeze();
        let mut block = [0; BLOCK_BYTES_USIZE];
        cache.encode_frozen(frame, &mut block);
        let entry = [20..24, 2068..2072];
        let rest = (0..BLOCK_BYTES_USIZE).filter(|at| !entry.iter().any(|range| range.contains(at)));
        assert!(rest.into_iter().all(|at| block[at] == 0));
    }

    #[test]
    fn clean_leaves_give_way_and_dirty_or_pinned_ones_stay() {
        let mut cache = map(0);
        let mut frames = Vec::new();
        for leaf in 0..16 {
            cache.set_leaf_on_device(1, leaf, mapping(100 + leaf), 1);
            let frame = cache.admit(1, leaf);
            cache.finish_load(frame, &[0; BLOCK_BYTES_USIZE]);
            frames.push(frame);
        }
        cache.pin(frames[0]);
        cache.set(frames[1], 0, mapping(1), 1);
        for leaf in 16..64 {
            cache.admit(1, leaf);
        }
        assert!(matches!(cache.find(1, 0), Presence::Here(_)));
        assert!(matches!(cache.find(1, 1), Presence::Here(_)));
        assert!((2..16).all(|leaf| cache.find(1, leaf) == Presence::Away(mapping(100 + leaf))));
    }

    #[test]
    fn a_removed_volume_takes_its_leaves_along_and_the_next_moves_up() {
        let mut cache = map(1 << 20);
        for volume in 0..2 {
            let frame = cache.admit(volume, 7);
            cache.set(frame, 0, mapping(10 + volume), 1);
        }
        cache.remove_volume(0);
        assert_eq!((cache.resident_count(), cache.dirty_count()), (1, 1));
        let Presence::Here(frame) = cache.find(0, 7) else { panic!("the other volume's leaf stays") };
        assert_eq!((cache.owner(frame), cache.get(frame, 0)), ((0, 7), mapping(11)));
        assert_eq!(cache.freeze(), vec![frame]);
    }

    #[test]
    fn records_and_search_skip_what_never_was() {
        let mut table = LeafTable::default();
        table.restore(&LeafRecord { leaf: 1_000_000, place: Place(9), crc: 1, sequence_max: 2 });
        table.restore(&LeafRecord { leaf: 4, place: Place::NONE, crc: 0, sequence_max: 3 });
        assert_eq!(table.records().map(|record| record.leaf).collect::<Vec<_>>(), [4, 1_000_000]);
        assert_eq!(table.next_present(0, u32::MAX), Some(1_000_000));
        assert_eq!(table.next_present(0, 1_000_000), None);
    }
}
