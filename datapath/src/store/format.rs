//! Making a new pool.

use super::layout::{ANCHORS, Layout, Place, SegmentIndex};
use super::recovery::Recovered;
use super::root::{Cursor, Root};
use crate::units::BLOCK_BYTES_USIZE;

/// A block to be written when a pool is formatted.
#[derive(Clone, Debug)]
pub struct FormatWrite {
    /// Where.
    pub place: Place,
    /// What.
    pub block: Box<[u8; BLOCK_BYTES_USIZE]>,
}

/// All writes that make a pool of zeroes into an empty Berth pool. The first header comes last: a format that was
/// interrupted leaves no pool.
#[must_use]
pub fn format_writes(layout: &Layout) -> Vec<FormatWrite> {
    let mut writes = Vec::new();
    let mut add = |place, block| writes.push(FormatWrite { place, block: Box::new(block) });
    for anchor in (0..ANCHORS).rev() {
        for lane in 0..layout.lanes {
            add(layout.root_place(lane, anchor), empty_root(layout, lane).encode());
        }
        add(layout.place(layout.anchor(anchor), 0), layout.encode());
    }
    writes
}

/// The root of a lane that has lost its last volume: as in a new pool, but older roots and batches stay older. Its
/// segments belong to the pool again.
#[must_use]
pub fn emptied_root(layout: &Layout, lane: u32, recovered: &Recovered) -> Root {
    assert!(recovered.volumes.is_empty(), "the lane has volumes");
    Root {
        checkpoint: recovered.checkpoint + 1,
        mount: recovered.mount + 1,
        last_number: recovered.last_number,
        ..empty_root(layout, lane)
    }
}

/// A root without volumes. Its cursors stand on the anchor, where no batch is ever found.
fn empty_root(layout: &Layout, lane: u32) -> Root {
    let anchor = SegmentIndex(0);
    let cursor =
        Cursor { segment: anchor, block: 0, generation: 0, number: 0, chain: 0, next_segment: anchor };
    Root {
        lane,
        pool_id: layout.pool_id,
        checkpoint: 0,
        mount: 0,
        last_number: 0,
        cursors: [cursor; 2],
        map_end: (anchor, 0),
        body_bytes: 0,
        body_crc: 0,
        body: [Vec::new(), Vec::new()],
    }
}
