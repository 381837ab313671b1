//! How a pool is cut into segments, and the header that says so.
//!
//! ```text
//!   pool    | segment 0 | 1 | 2 | ... | n/4 | ... | n/2 | ... | 3n/4 | ... | n-1 |
//!             anchor 0                  anchor 1     2             3
//!   anchor  | header | root of lane 0 | root of lane 1 | ... | unused |
//!   segment | batch | batch | ... | batch | unused tail |
//! ```
//!
//! `n` is the number of segments when the pool was formatted, so the anchors stay where they are when the pool
//! grows. All four headers are equal and never rewritten; a lane's four roots are (see [`super::root`]).

use super::fields::{crc32c_without, put, u32_at, u64_at};
use crate::limits::POOL_BYTES_MAX;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64, BLOCK_BYTES_USIZE};

const MAGIC: &[u8; 8] = b"BERTHPOL";
/// The one version of the format that this code reads and writes.
pub const FORMAT_VERSION: u32 = 4;
/// Copies of the header, and of each lane's root.
pub const ANCHORS: u32 = 4;
/// Lanes that fit: a root block for each, after the header, in the smallest segment.
pub const LANES_MAX: u32 = 15;
/// Smallest segment, in blocks (1 MiB): a piece of a request is cut in two parts at most.
pub const SEGMENT_BLOCKS_MIN: u32 = crate::limits::PIECE_BLOCKS_MAX;
/// Largest segment, in blocks (16 MiB).
pub const SEGMENT_BLOCKS_MAX: u32 = 4096;
/// A pool has at least this many segments: anchors, open segments of one lane, and room to clean.
pub const SEGMENTS_MIN: u32 = 32;

/// A segment of the pool, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentIndex(pub u32);

/// A block of the pool, by position. Zero is the first header and never a place of data: it stands for "none".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place(pub u32);

impl Place {
    /// No place: a hole.
    pub const NONE: Place = Place(0);

    /// The block was damaged and its place was given up: it is neither data nor a hole, reading it is an error.
    pub const LOST: Place = Place(u32::MAX);

    /// Is there a block on the device?
    #[must_use]
    pub fn is_on_device(self) -> bool {
        self != Place::NONE && self != Place::LOST
    }

    /// The place `blocks` further on.
    #[must_use]
    pub fn plus(self, blocks: u32) -> Place {
        Place(self.0 + blocks)
    }

    /// First byte on the device.
    #[must_use]
    pub fn offset_bytes(self) -> u64 {
        u64::from(self.0) * BLOCK_BYTES_U64
    }
}

/// What is fixed when a pool is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Tells this pool from every other.
    pub pool_id: [u8; 16],
    /// Blocks in a segment; a power of two.
    pub segment_blocks: u32,
    /// Segments at format time, from which the anchors' positions follow.
    pub segments_at_format: u32,
    /// Lanes of the pool.
    pub lanes: u32,
}

/// Why bytes are not the header of a pool, or a pool cannot be laid out as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Wrong magic.
    #[error("this is not a Berth pool")]
    NotAPool,
    /// Right magic, wrong checksum.
    #[error("the pool's header is damaged")]
    Damaged,
    /// A later (or never released) version of the format.
    #[error("the pool has format version {found}, this program reads version {FORMAT_VERSION}")]
    Version {
        /// The version in the header.
        found: u32,
    },
    /// Fields that contradict each other in a header with a good checksum.
    #[error("the pool's header makes no sense")]
    Senseless,
    /// Too small to work in.
    #[error("a pool needs at least {needed_bytes} bytes, this one has {found_bytes}")]
    TooSmall {
        /// What it would take.
        needed_bytes: u64,
        /// What there is.
        found_bytes: u64,
    },
    /// Too large to address.
    #[error("a pool holds at most {POOL_BYTES_MAX} bytes, this one has {found_bytes}: make several pools")]
    TooLarge {
        /// What there is.
        found_bytes: u64,
    },
}

impl Layout {
    /// The layout of a new pool of `pool_bytes`. Segments are a 1024th of the pool, between 1 MiB and 4 MiB:
    /// small pools waste little on open segments, large ones have long sequential runs.
    ///
    /// # Errors
    /// [`LayoutError::TooSmall`] and [`LayoutError::TooLarge`].
    pub fn for_new_pool(pool_id: [u8; 16], pool_bytes: u64, lanes: u32) -> Result<Layout, LayoutError> {
        let ideal = (pool_bytes / 1024 / BLOCK_BYTES_U64).clamp(u64::from(SEGMENT_BLOCKS_MIN), 1024);
        let segment_blocks = u32::try_from(ideal.next_power_of_two()).expect("clamped to 1024");
        Layout::with_segment_blocks(pool_id, pool_bytes, lanes, segment_blocks)
    }

    /// The layout of a new pool with segments of a given size.
    ///
    /// # Errors
    /// [`LayoutError::TooSmall`], [`LayoutError::TooLarge`], and [`LayoutError::Senseless`] for a segment size that
    /// is no power of two between the limits, or too many lanes.
    pub fn with_segment_blocks(
        pool_id: [u8; 16],
        pool_bytes: u64,
        lanes: u32,
        segment_blocks: u32,
    ) -> Result<Layout, LayoutError> {
        if pool_bytes > POOL_BYTES_MAX {
            return Err(LayoutError::TooLarge { found_bytes: pool_bytes });
        }
        let segment_bytes = u64::from(segment_blocks) * BLOCK_BYTES_U64;
        let segments_at_format =
            u32::try_from(pool_bytes / segment_bytes.max(1)).map_err(|_| LayoutError::Senseless)?;
        let layout = Layout { pool_id, segment_blocks, segments_at_format, lanes };
        if segments_at_format < SEGMENTS_MIN {
            let needed_bytes = u64::from(SEGMENTS_MIN) * segment_bytes;
            return Err(LayoutError::TooSmall { needed_bytes, found_bytes: pool_bytes });
        }
        layout.check()?;
        Ok(layout)
    }

    fn check(&self) -> Result<(), LayoutError> {
        let sensible = self.segment_blocks.is_power_of_two()
            && (SEGMENT_BLOCKS_MIN..=SEGMENT_BLOCKS_MAX).contains(&self.segment_blocks)
            && (1..=LANES_MAX).contains(&self.lanes)
            && self.segments_at_format >= SEGMENTS_MIN
            && self.segments_at_format <= u32::MAX / self.segment_blocks;
        if sensible { Ok(()) } else { Err(LayoutError::Senseless) }
    }

    /// Bytes in a segment.
    #[must_use]
    pub fn segment_bytes(&self) -> u32 {
        self.segment_blocks * BLOCK_BYTES
    }

    /// Blocks of a segment that can live: the cleaner's batches have one descriptor for about a hundred blocks, and
    /// a tail is lost at a segment's end.
    #[must_use]
    pub fn usable_blocks(&self) -> u32 {
        self.segment_blocks - self.segment_blocks.div_ceil(64) - 1
    }

    /// Whole segments in a pool that is now `pool_bytes` long.
    #[must_use]
    pub fn segments_in(&self, pool_bytes: u64) -> u32 {
        let blocks = (pool_bytes / BLOCK_BYTES_U64).min(u64::from(u32::MAX));
        u32::try_from(blocks).expect("bounded above") / self.segment_blocks
    }

    /// The segment of anchor `number`.
    #[must_use]
    pub fn anchor(&self, number: u32) -> SegmentIndex {
        assert!(number < ANCHORS);
        SegmentIndex(
            u32::try_from(u64::from(self.segments_at_format) * u64::from(number) / 4).expect("below n"),
        )
    }

    /// Is this segment an anchor?
    #[must_use]
    pub fn is_anchor(&self, segment: SegmentIndex) -> bool {
        (0..ANCHORS).any(|number| self.anchor(number) == segment)
    }

    /// Where root slot `number` of a lane is.
    #[must_use]
    pub fn root_place(&self, lane: u32, number: u32) -> Place {
        assert!(lane < self.lanes);
        self.place(self.anchor(number), 1 + lane)
    }

    /// Where block `block` of a segment is.
    #[must_use]
    pub fn place(&self, segment: SegmentIndex, block: u32) -> Place {
        debug_assert!(block < self.segment_blocks);
        Place(segment.0 * self.segment_blocks + block)
    }

    /// The segment of a place.
    #[must_use]
    pub fn segment_of(&self, place: Place) -> SegmentIndex {
        SegmentIndex(place.0 / self.segment_blocks)
    }

    /// The header block.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_BYTES_USIZE] {
        let mut block = [0; BLOCK_BYTES_USIZE];
        put(&mut block, 0, MAGIC);
        put(&mut block, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut block, 16, &self.pool_id);
        put(&mut block, 32, &self.segment_blocks.to_le_bytes());
        put(&mut block, 36, &self.segments_at_format.to_le_bytes());
        put(&mut block, 40, &self.lanes.to_le_bytes());
        let crc = crc32c_without(&mut block, 12);
        put(&mut block, 12, &crc.to_le_bytes());
        block
    }

    /// Reads a header block.
    ///
    /// # Errors
    /// Every [`LayoutError`] but the two about sizes.
    pub fn decode(block: &[u8; BLOCK_BYTES_USIZE]) -> Result<Layout, LayoutError> {
        if &block[..8] != MAGIC {
            return Err(LayoutError::NotAPool);
        }
        if crc32c_without(&mut block.clone(), 12) != u32_at(block, 12) {
            return Err(LayoutError::Damaged);
        }
        let found = u32_at(block, 8);
        if found != FORMAT_VERSION {
            return Err(LayoutError::Version { found });
        }
        let mut pool_id = [0; 16];
        put(&mut pool_id, 0, &u64_at(block, 16).to_le_bytes());
        put(&mut pool_id, 8, &u64_at(block, 24).to_le_bytes());
        let layout = Layout {
            pool_id,
            segment_blocks: u32_at(block, 32),
            segments_at_format: u32_at(block, 36),
            lanes: u32_at(block, 40),
        };
        layout.check()?;
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_keeps_its_bytes() {
        let layout = Layout {
            pool_id: *b"0123456789abcdef",
            segment_blocks: 1024,
            segments_at_format: 2048,
            lanes: 4,
        };
        let block = layout.encode();
        assert_eq!(&block[..12], b"BERTHPOL\x04\0\0\0");
        assert_eq!(&block[16..44], b"0123456789abcdef\0\x04\0\0\0\x08\0\0\x04\0\0\0");
        assert!(block[44..].iter().all(|byte| *byte == 0));
        assert_eq!(Layout::decode(&block), Ok(layout));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let layout = Layout::for_new_pool([7; 16], 8 << 30, 2).unwrap();
        let good = layout.encode();
        for bit in 0..44 * 8 {
            let mut block = good;
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(Layout::decode(&block).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn anchors_are_apart_and_inside() {
        for pool_bytes in [32 << 20, 64 << 20, 1 << 30, 8 << 30, 1 << 40, POOL_BYTES_MAX] {
            let layout = Layout::for_new_pool([0; 16], pool_bytes, LANES_MAX).unwrap();
            let anchors: Vec<u32> = (0..ANCHORS).map(|number| layout.anchor(number).0).collect();
            assert_eq!(anchors[0], 0);
            assert!(anchors.is_sorted_by(|a, b| a + 8 <= *b) && anchors[3] < layout.segments_at_format);
            assert!(layout.segment_blocks > LANES_MAX, "a root for each lane fits into an anchor");
        }
        assert!(Layout::for_new_pool([0; 16], 31 << 20, 1).is_err());
    }
}
