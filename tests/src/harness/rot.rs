//! Damage in the pool of a node that does not run: flipped bits in blocks that a volume holds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use datapath::store::bugs::Bugs;
use datapath::store::layout::Place;
use datapath::store::map::Mapping;
use datapath::store::recovery::{PoolReader, read_layout, recover_lane};

struct PoolFile(File);

impl PoolReader for PoolFile {
    fn len_bytes(&self) -> u64 {
        self.0.metadata().expect("a file").len()
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        self.0.read_exact_at(into, offset_bytes).is_ok()
    }
}

/// Where these blocks and leaves of the volume are: found as recovery finds them.
fn places(pool: &mut PoolFile, volume: &str, blocks: &[u32], leaves: &[u32]) -> Vec<Place> {
    let layout = read_layout(pool).expect("a pool");
    let mut places = Vec::new();
    for lane in 0..layout.lanes {
        let mut recovered = recover_lane(pool, layout, lane, 1 << 20, Bugs::none()).expect("a sound lane");
        let Some(position) = recovered.volumes.iter().position(|found| found.name == volume) else {
            continue;
        };
        let visit = |block, mapping: Mapping| {
            if blocks.contains(&block) {
                places.push(mapping.place);
            }
        };
        recovered.visit_blocks(pool, position, visit).expect("a sound map");
        let table = recovered.map.table(u32::try_from(position).expect("few"));
        places.extend(leaves.iter().map(|leaf| table.leaf_on_device(*leaf).place));
    }
    places
}

/// Flips a bit in each of these blocks of a volume, and of the leaves of its map. Says how many that were.
///
/// # Panics
/// If the pool cannot be read, or one of them has no place.
#[must_use]
pub fn rot(pool: &Path, volume: &str, blocks: &[u32], leaves: &[u32]) -> usize {
    let file = File::options().read(true).write(true).open(pool).expect("the pool's file");
    let mut pool = PoolFile(file);
    let places = places(&mut pool, volume, blocks, leaves);
    assert!(places.iter().all(|place| place.is_on_device()), "{places:?}");
    for (place, number) in places.iter().zip(0_u64..) {
        let mut byte = [0];
        let at = place.offset_bytes() + 64 * (number % 64);
        pool.0.read_exact_at(&mut byte, at).expect("inside");
        byte[0] ^= 1 << (number % 8);
        pool.0.write_all_at(&byte, at).expect("inside");
    }
    places.len()
}
