//! Room that is promised to heads, and what a replica does that is filled and has none.

use super::{AckPolicy, Made, World};
use crate::limits::ROOM_BLOCKS_MAX;
use crate::record::{ChangeKind, Stamp};
use crate::request::RequestError;
use crate::store::lane::RoomPromised;

const SEGMENTS: u32 = 32;

/// All but the last `left` blocks of the capacity are written.
fn nearly_full(left: u64) -> World {
    let mut world = World::new(AckPolicy::Durable, SEGMENTS, 1);
    world.put_volume(6);
    world.run();
    let mut to_write = world.lane.capacity_blocks() - world.lane.blocks_spoken_for() - left;
    let mut block = 0;
    while to_write > 0 {
        let count = u32::try_from(to_write.min(128)).unwrap();
        world.append(ChangeKind::Data, block, count, true);
        world.run();
        block += count;
        to_write = world.lane.capacity_blocks().saturating_sub(world.lane.blocks_spoken_for() + left);
    }
    assert_eq!(world.lane.capacity_blocks() - world.lane.blocks_spoken_for(), left);
    world
}

fn promised(blocks: u32) -> Option<RoomPromised> {
    Some(RoomPromised { blocks, may_grow: false })
}

#[test]
fn no_block_is_promised_twice() {
    let mut world = nearly_full(100);
    assert_eq!(world.lane.promise_room(0, 0, 60, 60), promised(60));
    // What another volume's head has, it may give back.
    assert_eq!(world.lane.promise_room(1, 0, 60, 60), Some(RoomPromised { blocks: 0, may_grow: true }));
    assert_eq!(world.lane.promise_room(1, 0, 40, ROOM_BLOCKS_MAX), promised(40));
    assert_eq!(world.lane.promise_room(1, 40, 41, 41), Some(RoomPromised { blocks: 40, may_grow: true }));
    assert_eq!(world.lane.promise_room(0, 10, 0, 0), promised(10));
    assert_eq!(world.lane.promise_room(1, 40, 90, 90), promised(90));
    assert_eq!(world.lane.promise_room(0, 10, 11, 11), Some(RoomPromised { blocks: 10, may_grow: true }));
}

#[test]
fn what_is_used_up_is_counted_where_it_is_now() {
    let mut world = nearly_full(100);
    assert_eq!(world.lane.promise_room(0, 0, 100, 100), promised(100));
    world.lane.use_room(0, 100);
    let end = u32::try_from(super::VOLUME_BLOCKS).unwrap();
    world.append(ChangeKind::Data, end - 100, 100, true);
    assert_eq!(world.lane.promise_room(0, 0, 1, 1), Some(RoomPromised { blocks: 0, may_grow: true }));
    world.run();
    assert_eq!(world.lane.promise_room(0, 0, 1, 1), promised(0));
    world.append(ChangeKind::Trim, end - 50, 50, true);
    world.run();
    assert_eq!(world.lane.promise_room(0, 0, 50, 50), promised(50));
}

#[test]
fn ahead_of_need_a_head_has_a_part_of_what_is_left() {
    let mut world = nearly_full(100);
    assert_eq!(world.lane.promise_room(0, 0, 0, ROOM_BLOCKS_MAX), promised(25));
    assert_eq!(world.lane.promise_room(0, 25, 0, ROOM_BLOCKS_MAX), promised(25 + 18));
    world.lane.assume_room_promised(1);
    assert_eq!(world.lane.promise_room(0, 43, 44, 44), Some(RoomPromised { blocks: 43, may_grow: true }));
    assert_eq!(world.lane.promise_room(1, 0, 0, 0), promised(0));
    assert_eq!(world.lane.promise_room(0, 43, 44, 44), promised(44));
}

#[test]
fn a_replica_that_is_filled_refuses_what_does_not_fit_and_all_behind_it() {
    let mut world = nearly_full(10);
    let last = world.lane.last_stamp(0);
    world.answers.clear();
    world.with_lane(|lane, context| lane.restart_order(context, 1, 0, (last, last)));
    world.run();
    assert_eq!(world.answers, [(1, Ok(()))]);
    assert_eq!(world.lane.promise_room(0, 9, 1, 1), None, "nobody counts on it");
    let end = u32::try_from(super::VOLUME_BLOCKS).unwrap();
    world.answers.clear();
    world.append(ChangeKind::Data, end - 20, 20, true);
    let next = u32::try_from(last.sequence).unwrap() + 1;
    let stamp = Stamp { epoch: 1, sequence: last.sequence + 2 };
    world.made.push(Made { stamp, kind: ChangeKind::Data, block: 0, count: 1 });
    world.append_made(stamp.sequence, true);
    world.with_lane(|lane, context| lane.end_filling(context, 7, 0));
    world.with_lane(|lane, context| lane.promise(context, 8, 0, 3));
    world.run();
    let refused = Err(RequestError::NoSpace);
    world.answers.sort_unstable_by_key(|(cookie, _)| *cookie);
    assert_eq!(world.answers, [(7, refused), (8, Ok(())), (next, refused), (next + 1, refused)]);
    assert!(world.lane.filling_from(0).is_some(), "it is not complete");
    // Its owner knows, and fills it anew when there is room.
    assert_eq!(world.lane.resume_order(0), last);
    world.answers.clear();
    let after = Stamp { epoch: 1, sequence: last.sequence + 5 };
    world.with_lane(|lane, context| lane.restart_order(context, 1, 0, (last, after)));
    world.with_lane(|lane, context| lane.end_filling(context, 2, 0));
    world.run();
    assert_eq!(world.answers, [(1, Ok(())), (2, Ok(()))]);
    assert_eq!(world.lane.promise_room(0, 0, 10, 10), promised(10));
}

#[test]
fn what_waits_for_space_is_let_go_when_nobody_counts_on_it() {
    let mut world = World::new(AckPolicy::Durable, SEGMENTS, 1);
    // A run that fills more than a segment needs a page, and there is none.
    while world.pages.allocate(1).is_some() {}
    world.lane.split_page.take();
    world.append(ChangeKind::Data, 0, 256, true);
    world.append(ChangeKind::Data, 300, 1, true);
    world.run();
    assert!(world.lane.has_blocked_changes() && world.answers.is_empty());
    world.with_lane(|lane, context| lane.leave_out(context, 0));
    assert_eq!(world.lane.resume_order(0), Stamp::default());
    world.run();
    let left_out = Err(RequestError::ShuttingDown);
    assert_eq!(world.answers, [(1, left_out), (2, left_out)]);
    assert!(!world.lane.has_blocked_changes());
    world.append(ChangeKind::Trim, 0, 100, true);
    world.run();
    assert_eq!(world.answered(), 1);
}
