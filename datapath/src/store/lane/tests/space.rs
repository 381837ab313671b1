//! A change that waits for memory is not refused for want of space.

use super::{AckPolicy, BlockRange, SegmentState, World};
use crate::store::lane::OwnedPayload;
use crate::units::{BLOCK_BYTES, MemoryRange};

/// Blocks of the longest run.
const RUN: u32 = 256;

impl World {
    /// A client's write of `count` blocks, numbered by the lane.
    fn write(&mut self, cookie: u32, block: u32, whole: MemoryRange) {
        let range = BlockRange { volume: 0, block, count: whole.len / BLOCK_BYTES - 1 };
        let payload = OwnedPayload { whole };
        self.with_lane(|lane, context| lane.write(context, cookie, range, payload, false));
    }

    fn allocate(&mut self, count: u32) -> MemoryRange {
        self.pages.allocate(1 + count).expect("pages for a payload")
    }
}

/// Everything is clean and settled, nothing can be cleaned, and the pool has lent all it had: the state in which a write
/// that lacks a segment is refused. Only a part of the clients' segment is left.
fn settled() -> World {
    let mut world = World::new(AckPolicy::Device, 32, 1);
    let foreign: Vec<_> = world.lane.segments().indices().collect();
    for segment in foreign {
        if world.lane.segments().state(segment) == SegmentState::Foreign && !world.layout.is_anchor(segment) {
            world.lane.lend(segment, false);
        }
    }
    let whole = world.allocate(200);
    world.write(1, 0, whole);
    world.run();
    world.lane.request_checkpoint();
    world.run();
    assert_eq!(world.answers, [(1, Ok(()))]);
    world.answers.clear();
    world
}

#[test]
fn a_run_is_cut_in_two_though_others_hold_all_memory() {
    let mut world = settled();
    let payloads: Vec<_> = (0..2).map(|_| world.allocate(RUN)).collect();
    while world.pages.allocate(1).is_some() {}
    // Each is cut: the second waits until the first is written.
    for (cookie, whole) in (1..).zip(payloads) {
        world.write(cookie, RUN * cookie, whole);
    }
    world.run();
    assert_eq!(world.answers, [(1, Ok(())), (2, Ok(()))]);
}

#[test]
fn a_write_that_lacks_only_memory_is_not_refused() {
    let mut world = settled();
    let whole = world.allocate(RUN);
    while world.pages.allocate(1).is_some() {}
    let kept = world.lane.split_page.take().expect("not in use");
    world.write(1, RUN, whole);
    for _ in 0..10 {
        world.step();
    }
    assert_eq!(world.answers, [], "it waits");
    world.lane.split_page = Some(kept);
    world.run();
    assert_eq!(world.answers, [(1, Ok(()))]);
}
