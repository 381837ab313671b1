//! The offline check reads what lies together at once, and still names single blocks.

use super::{AckPolicy, ChangeKind, Disk, World, recover_lane};
use crate::store::bugs::Bugs;
use crate::store::check::{CheckReport, check_lane};
use crate::store::recovery::PoolReader;
use crate::units::BLOCK_BYTES_U64;

/// The disk, some places of which cannot be read.
struct BadDisk<'d> {
    disk: &'d mut Disk,
    bad: Vec<u64>,
    reads: u32,
}

impl PoolReader for BadDisk<'_> {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        self.reads += 1;
        let end = offset_bytes + into.len() as u64;
        self.bad.iter().all(|bad| end <= *bad || bad + BLOCK_BYTES_U64 <= offset_bytes)
            && self.disk.read_at(offset_bytes, into)
    }
}

/// The volume's first 1024 blocks are written, the places of `bad` of them cannot be read.
fn check(bad: &[u32]) -> (CheckReport, u32) {
    let mut world = World::new(AckPolicy::Durable, 40, 3);
    for block in (0..1024).step_by(64) {
        world.append(ChangeKind::Data, block, 64, false);
    }
    world.run();
    let mut recovered = recover_lane(&mut world.disk, world.layout, 0, 1 << 20, Bugs::none()).unwrap();
    let mut places = Vec::new();
    recovered
        .visit_blocks(&mut world.disk, 0, |block, mapping| {
            places.extend(bad.contains(&block).then(|| mapping.place.offset_bytes()));
        })
        .unwrap();
    assert_eq!(places.len(), bad.len());
    let mut disk = BadDisk { disk: &mut world.disk, bad: places, reads: 0 };
    let report = check_lane(&mut disk, &world.layout, &mut recovered);
    (report, disk.reads)
}

#[test]
fn blocks_that_lie_together_are_read_together() {
    let (report, reads) = check(&[]);
    assert!(report.is_clean() && report.data_blocks == 1024, "{report:?}");
    assert!(reads <= 16, "{reads} reads of 4 MiB");
}

#[test]
fn only_blocks_that_cannot_be_read_are_named() {
    let (report, _) = check(&[77, 500, 501]);
    assert_eq!((report.data_blocks, report.problems), (1024, 3), "{report:?}");
    for block in ["block 77 ", "block 500 ", "block 501 "] {
        assert!(report.listed.iter().any(|problem| problem.contains(block)), "{report:?}");
    }
}
