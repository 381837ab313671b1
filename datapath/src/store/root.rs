//! The root of a lane: where its last checkpoint is, and where its streams went on from there.
//!
//! ```text
//!    0  magic "BERTHROT"      8      120  body length, bytes     8
//!    8  CRC32C of the block   4      128  body CRC32C            4
//!   12  lane                  4      132  extents of copy 0      2
//!   16  pool id              16      134  extents of copy 1      2
//!   32  checkpoint number     8      136  last batch number      8
//!   40  mount number          8      144  extents: place 4, blocks 4 (copy 0, then copy 1)
//!   48  cursor of stream 0   32
//!   80  cursor of stream 1   32      cursor: segment 4, block 4, generation 8, number 8, chain 4, next segment 4
//!  112  map segment 4, block 4: where the map's stream goes on
//! ```
//!
//! Four slots far apart. A checkpoint writes two of them, brings them to stable media, then the other two, and
//! brings those to stable media too: at any moment the newest or the one before it stands in two good copies. So the
//! first two are never the last two good copies of the root that counts ([`write_order`]). What the newest no longer
//! refers to is reused only after the last of these steps, when no older root can win.

use super::fields::{crc32c_without, put, u16_at, u32_at, u64_at};
use super::layout::{ANCHORS, Place, SegmentIndex};
use crate::units::BLOCK_BYTES_USIZE;

const MAGIC: &[u8; 8] = b"BERTHROT";
const EXTENTS_AT: usize = 144;
/// Extents of both copies of the body that fit.
pub const ROOT_EXTENTS_MAX: usize = (BLOCK_BYTES_USIZE - EXTENTS_AT) / 8;
/// Streams that are rolled forward: the clients' and the cleaner's.
pub const LOGGED_STREAMS: usize = 2;

/// Where the next batch of a stream is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Segment being filled.
    pub segment: SegmentIndex,
    /// Block of the segment where the next batch starts.
    pub block: u32,
    /// The segment's generation.
    pub generation: u64,
    /// Number of the last batch that the checkpoint includes.
    pub number: u64,
    /// CRC of that batch's descriptor; 0 if it is of an earlier mount, since each begins a chain.
    pub chain: u32,
    /// Where the stream goes on after `segment`.
    pub next_segment: SegmentIndex,
}

/// Blocks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceRun {
    /// The first.
    pub place: Place,
    /// How many.
    pub blocks: u32,
}

/// The content of a root slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Which lane.
    pub lane: u32,
    /// Which pool; a root that strayed from another pool is not ours.
    pub pool_id: [u8; 16],
    /// Counts the lane's checkpoints.
    pub checkpoint: u64,
    /// Counts how often the pool was opened for writing.
    pub mount: u64,
    /// Highest batch number of the lane at the checkpoint.
    pub last_number: u64,
    /// The streams that roll forward from here.
    pub cursors: [Cursor; LOGGED_STREAMS],
    /// Where the map's stream goes on: the segment and the block after the checkpoint's last one. Nothing from there
    /// on is referred to. Segment 0 stands for nowhere.
    pub map_end: (SegmentIndex, u32),
    /// Length of the checkpoint's body.
    pub body_bytes: u64,
    /// Its CRC32C.
    pub body_crc: u32,
    /// The two copies of the body.
    pub body: [Vec<PlaceRun>; 2],
}

impl Root {
    /// The slot's block.
    ///
    /// # Panics
    /// If there are more than [`ROOT_EXTENTS_MAX`] extents.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_BYTES_USIZE] {
        let mut block = [0; BLOCK_BYTES_USIZE];
        put(&mut block, 0, MAGIC);
        put(&mut block, 12, &self.lane.to_le_bytes());
        put(&mut block, 16, &self.pool_id);
        put(&mut block, 32, &self.checkpoint.to_le_bytes());
        put(&mut block, 40, &self.mount.to_le_bytes());
        for (index, cursor) in self.cursors.iter().enumerate() {
            let at = 48 + 32 * index;
            put(&mut block, at, &cursor.segment.0.to_le_bytes());
            put(&mut block, at + 4, &cursor.block.to_le_bytes());
            put(&mut block, at + 8, &cursor.generation.to_le_bytes());
            put(&mut block, at + 16, &cursor.number.to_le_bytes());
            put(&mut block, at + 24, &cursor.chain.to_le_bytes());
            put(&mut block, at + 28, &cursor.next_segment.0.to_le_bytes());
        }
        put(&mut block, 112, &self.map_end.0.0.to_le_bytes());
        put(&mut block, 116, &self.map_end.1.to_le_bytes());
        put(&mut block, 120, &self.body_bytes.to_le_bytes());
        put(&mut block, 128, &self.body_crc.to_le_bytes());
        let counts = [self.body[0].len(), self.body[1].len()];
        assert!(counts[0] + counts[1] <= ROOT_EXTENTS_MAX, "{counts:?} extents");
        for (index, count) in counts.into_iter().enumerate() {
            put(&mut block, 132 + 2 * index, &u16::try_from(count).expect("checked above").to_le_bytes());
        }
        put(&mut block, 136, &self.last_number.to_le_bytes());
        for (index, run) in self.body.iter().flatten().enumerate() {
            put(&mut block, EXTENTS_AT + 8 * index, &run.place.0.to_le_bytes());
            put(&mut block, EXTENTS_AT + 8 * index + 4, &run.blocks.to_le_bytes());
        }
        let crc = crc32c_without(&mut block, 8);
        put(&mut block, 8, &crc.to_le_bytes());
        block
    }

    /// Reads a slot, or nothing if it is damaged or belongs to another lane or pool.
    #[must_use]
    pub fn decode(block: &[u8; BLOCK_BYTES_USIZE], lane: u32, pool_id: &[u8; 16]) -> Option<Root> {
        let mine = &block[..8] == MAGIC && u32_at(block, 12) == lane && &block[16..32] == pool_id;
        if !mine || crc32c_without(&mut block.clone(), 8) != u32_at(block, 8) {
            return None;
        }
        let cursor = |index: usize| {
            let at = 48 + 32 * index;
            Cursor {
                segment: SegmentIndex(u32_at(block, at)),
                block: u32_at(block, at + 4),
                generation: u64_at(block, at + 8),
                number: u64_at(block, at + 16),
                chain: u32_at(block, at + 24),
                next_segment: SegmentIndex(u32_at(block, at + 28)),
            }
        };
        let counts = [usize::from(u16_at(block, 132)), usize::from(u16_at(block, 134))];
        if counts[0] + counts[1] > ROOT_EXTENTS_MAX {
            return None;
        }
        let run = |index: usize| PlaceRun {
            place: Place(u32_at(block, EXTENTS_AT + 8 * index)),
            blocks: u32_at(block, EXTENTS_AT + 8 * index + 4),
        };
        Some(Root {
            lane,
            pool_id: *pool_id,
            checkpoint: u64_at(block, 32),
            mount: u64_at(block, 40),
            last_number: u64_at(block, 136),
            cursors: [cursor(0), cursor(1)],
            map_end: (SegmentIndex(u32_at(block, 112)), u32_at(block, 116)),
            body_bytes: u64_at(block, 120),
            body_crc: u32_at(block, 128),
            body: [(0..counts[0]).map(run).collect(), (counts[0]..counts[0] + counts[1]).map(run).collect()],
        })
    }
}

/// The root that counts: the one with the highest checkpoint number of which two equal copies exist. One that
/// stands in a single copy was being written when the power went, and what it freed has not been reused.
#[must_use]
pub fn choose_root(slots: [Option<Root>; ANCHORS as usize]) -> Option<Root> {
    let copies = |root: &Root| slots.iter().flatten().filter(|other| *other == root).count();
    slots.iter().flatten().filter(|root| copies(root) >= 2).max_by_key(|root| root.checkpoint).cloned()
}

/// In which order the next checkpoint writes the slots, two and two: first those that do not hold the root that counts.
/// A process that died between the two steps leaves that one in two copies only, and the other slots torn.
#[must_use]
pub fn write_order(slots: &[Option<Root>; ANCHORS as usize], counts: &Root) -> [u32; ANCHORS as usize] {
    let mut order = [0, 1, 2, 3];
    order.sort_by_key(|slot| slots[*slot as usize].as_ref() == Some(counts));
    order
}

const _: () = {
    // A body of the largest number of leaves, in batches of 127 payload blocks, with a tenth to spare for volumes,
    // segments and parts cut short at the ends of segments.
    let body_blocks = super::map::LEAVES_MAX as usize * 20 / BLOCK_BYTES_USIZE;
    assert!(2 * (body_blocks / 127 + 1) * 11 / 10 <= ROOT_EXTENTS_MAX);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn root(checkpoint: u64) -> Root {
        let cursor = Cursor {
            segment: SegmentIndex(3),
            block: 7,
            generation: 11,
            number: 13,
            chain: 17,
            next_segment: SegmentIndex(19),
        };
        let run = |place| PlaceRun { place: Place(place), blocks: 2 };
        Root {
            lane: 1,
            pool_id: [9; 16],
            checkpoint,
            mount: 2,
            last_number: 23,
            cursors: [cursor, Cursor { block: 0, ..cursor }],
            map_end: (SegmentIndex(21), 22),
            body_bytes: 5000,
            body_crc: 99,
            body: [vec![run(100)], vec![run(200), run(300)]],
        }
    }

    #[test]
    fn the_slot_keeps_its_bytes() {
        let block = root(5).encode();
        assert_eq!(&block[..8], b"BERTHROT");
        assert_eq!((u32_at(&block, 12), u64_at(&block, 32), u64_at(&block, 40)), (1, 5, 2));
        assert_eq!(&block[48..56], &[3, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!((u32_at(&block, 76), u64_at(&block, 120), u64_at(&block, 136)), (19, 5000, 23));
        assert_eq!((u32_at(&block, 112), u32_at(&block, 116)), (21, 22));
        assert_eq!(&block[132..136], &[1, 0, 2, 0]);
        assert_eq!(&block[144..152], &[100, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(Root::decode(&block, 1, &[9; 16]), Some(root(5)));
        assert_eq!(Root::decode(&block, 2, &[9; 16]), None);
        assert_eq!(Root::decode(&block, 1, &[8; 16]), None);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = root(5).encode();
        for bit in 0..good.len() * 8 {
            let mut block = good;
            block[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Root::decode(&block, 1, &[9; 16]), None, "bit {bit}");
        }
    }

    #[test]
    fn the_only_two_copies_are_written_last() {
        let (old, new) = (|| Some(root(4)), || Some(root(5)));
        let order = |slots| write_order(&slots, &root(5));
        assert_eq!(order([new(), new(), None, None]), [2, 3, 0, 1], "died while writing the second pair");
        assert_eq!(order([old(), None, new(), new()]), [0, 1, 2, 3]);
        assert_eq!(order([new(), None, None, new()]), [1, 2, 0, 3], "two slots rotted");
        assert_eq!(order([new(), new(), new(), None]), [3, 0, 1, 2]);
        assert_eq!(order([new(), new(), new(), new()]), [0, 1, 2, 3]);
    }

    #[test]
    fn the_newest_in_two_copies_wins() {
        let (old, new) = (|| Some(root(4)), || Some(root(5)));
        let chosen = |slots| choose_root(slots).map(|root| root.checkpoint);
        assert_eq!(chosen([new(), new(), new(), new()]), Some(5));
        assert_eq!(chosen([new(), None, old(), old()]), Some(4), "torn while writing the first pair");
        assert_eq!(chosen([new(), new(), old(), None]), Some(5), "torn while writing the second pair");
        assert_eq!(chosen([None, new(), None, new()]), Some(5), "two slots rotted");
        assert_eq!(chosen([None, None, None, new()]), None, "one witness is not enough");
        assert_eq!(chosen([None, None, None, None]), None);
    }
}
