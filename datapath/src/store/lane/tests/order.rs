//! Numbered changes keep their order, and what was answered is there.

use super::*;
use crate::store::lane::stream::StreamKind;
use crate::store::map::LEAF_BLOCKS;

const POLICIES: [AckPolicy; 2] = [AckPolicy::Device, AckPolicy::Durable];

fn cookies(world: &World) -> Vec<u32> {
    world.answers.iter().map(|(cookie, _)| *cookie).collect()
}

/// A world whose leaves are all on the disk and none in memory.
fn cold_world(ack: AckPolicy) -> World {
    let mut world = World::new(ack, 48, 11);
    for leaf in 0..4 {
        world.append(ChangeKind::Data, leaf * LEAF_BLOCKS + 500, 1, false);
    }
    world.run();
    world.lane.request_checkpoint();
    world.run();
    world.disk.kill();
    world.restart();
    world.run();
    world
}

#[test]
fn a_change_whose_leaf_is_here_waits_for_one_whose_leaf_is_not() {
    for ack in POLICIES {
        let mut world = cold_world(ack);
        world.disk.holds_reads = true;
        world.append(ChangeKind::Data, 3, 2, false);
        world.append(ChangeKind::Data, 6 * LEAF_BLOCKS, 1, false);
        world.append(ChangeKind::Data, LEAF_BLOCKS + 7, 30, true);
        // Across the border of two leaves, both away.
        world.append(ChangeKind::Trim, 3 * LEAF_BLOCKS - 5, 10, false);
        world.run();
        assert_eq!((world.disk.reads_pending(), world.disk.writes_pending()), (4, 0), "all leaves at once");
        assert_eq!((cookies(&world), world.lane.last_stamp(0).sequence), (vec![], 8));
        world.disk.holds_reads = false;
        world.run();
        assert_eq!(cookies(&world), [5, 6, 7, 8]);
        world.check();
    }
}

#[test]
fn whenever_power_fails_a_prefix_is_there_with_all_that_was_answered() {
    for (steps, ack) in (0..90_u32).flat_map(|steps| POLICIES.map(|ack| (steps, ack))) {
        let mut world = World::new(ack, 40, u64::from(steps) * 77 + 5);
        for _ in 0..12 {
            world.append_any(1500);
            for _ in 0..steps / 8 {
                world.step();
            }
        }
        for _ in 0..steps % 8 {
            world.step();
        }
        let answered = world.answered();
        assert!(cookies(&world).is_sorted(), "answers out of order");
        world.lose_power();
        let last = world.lane.volumes()[0].record.stamp();
        assert!(last.sequence >= answered, "{answered} were answered, {last:?} is the last");
        assert_eq!(world.lane.last_stamp(0), last);
        world.check();
    }
}

#[test]
fn rolling_forward_tells_the_epoch_of_the_last_change() {
    let mut world = World::new(AckPolicy::Durable, 40, 3);
    world.append(ChangeKind::Data, 0, 1, false);
    world.epoch = 4;
    world.append(ChangeKind::Data, 1, 20, false);
    world.run();
    world.lose_power();
    assert_eq!(world.lane.last_stamp(0), Stamp { epoch: 4, sequence: 2 });
    world.run();
    world.lose_power();
    assert_eq!(world.lane.last_stamp(0), Stamp { epoch: 4, sequence: 2 }, "from the checkpoint");
}

#[test]
fn a_damaged_leaf_breaks_the_order_until_the_change_comes_again() {
    let mut world = cold_world(AckPolicy::Durable);
    let place = world.lane.map().table(0).leaf_on_device(2).place;
    let at = usize::try_from(place.offset_bytes()).unwrap();
    world.disk.seen[at] ^= 1;
    world.append(ChangeKind::Data, 9, 1, true);
    world.append(ChangeKind::Data, 2 * LEAF_BLOCKS, 1, false);
    world.append(ChangeKind::Data, 10, 1, false);
    world.with_lane(|lane, context| lane.promise(context, 70, 0, 9));
    world.run();
    let io = Err(RequestError::Io);
    let mut answers = std::mem::take(&mut world.answers);
    answers.sort_unstable_by_key(|(cookie, _)| *cookie);
    assert_eq!(answers, [(5, Ok(())), (6, io), (7, io), (70, io)]);
    assert_eq!((world.lane.last_stamp(0).sequence, world.lane.promised(0)), (5, 0));
    world.append_made(7, false);
    assert_eq!(world.lane.poll_completion().map(|completion| completion.result), Some(io), "6 is missing");
    world.disk.seen[at] ^= 1;
    world.append_made(6, false);
    world.append_made(7, false);
    world.run();
    assert_eq!(world.answers, [(6, Ok(())), (7, Ok(()))]);
    world.check();
}

#[test]
fn a_lane_that_failed_refuses_all_and_holds_lent_memory_until_the_device_lets_go() {
    let mut world = World::new(AckPolicy::Durable, 40, 3);
    world.disk.holds_writes = true;
    world.append(ChangeKind::Data, 0, 100, true);
    world.append(ChangeKind::Data, 200, 1, true);
    world.append(ChangeKind::Data, 300, 40, false);
    world.run();
    assert_eq!(world.disk.writes_pending(), 3);
    world.with_lane(Lane::fail);
    world.append(ChangeKind::Data, 1, 1, false);
    world.run();
    let io = Err(RequestError::Io);
    world.answers.sort_unstable_by_key(|(cookie, _)| *cookie);
    assert_eq!(world.answers, [(2, io), (3, io), (4, io)], "the device still reads what 1 has lent");
    world.disk.holds_writes = false;
    world.run();
    assert_eq!(world.answers[3..], [(1, io)]);
}

#[test]
fn pages_of_owned_payloads_come_back_and_lent_ones_are_left_alone() {
    for ack in POLICIES {
        let mut world = World::new(ack, 48, 9);
        let free = world.pages.free_count();
        for _ in 0..60 {
            // Pages would not take back memory that is not theirs.
            world.append_any(1200);
            world.run();
        }
        assert_eq!(world.pages.free_count(), free);
        assert_eq!(world.answered(), 60);
        world.check();
    }
}

#[test]
fn a_full_pool_delays_numbered_changes_and_refuses_none() {
    let mut world = World::new(AckPolicy::Durable, 34, 21);
    let capacity = world.lane.capacity_blocks();
    for part in 0..64 {
        world.append(ChangeKind::Data, part * 64, 64, false);
        world.run();
    }
    assert!(capacity < VOLUME_BLOCKS, "a plain write would have been refused");
    for round in 0..200 {
        world.append(ChangeKind::Data, (round * 7 % 64) * 64, 64, round % 2 == 0);
        world.append(ChangeKind::Data, round, 1, false);
        if round % 25 == 24 {
            world.run();
        }
    }
    world.run();
    assert_eq!(world.answered(), u64::try_from(world.made.len()).unwrap());
    assert!(world.lane.counters().waits_for_space > 0, "the pool was never short of space");
    world.check();
}

#[test]
fn a_volume_made_at_run_time_lasts_once_it_says_so() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    world.append(ChangeKind::Data, 0, 1, false);
    world.run();
    world.put_volume(8);
    let volume = world.lane.volume_position(8).unwrap();
    assert!(!world.lane.is_lasting(volume));
    while !world.lane.is_lasting(volume) {
        assert!(world.step(), "a checkpoint comes by itself");
    }
    let range = BlockRange { volume, block: 0, count: 1 };
    let stamp = Stamp { epoch: 3, sequence: 1 };
    world.with_lane(|lane, context| lane.append(context, 50, ChangeKind::Zero, range, None, stamp));
    while world.answers.last() != Some(&(50, Ok(()))) {
        assert!(world.step());
    }
    world.lose_power();
    let volume = world.lane.volume_position(8).expect("it lasts");
    assert_eq!(world.lane.last_stamp(volume), stamp);
}

#[test]
fn a_larger_size_lasts_from_the_next_checkpoint_on() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    let record = world.lane.volumes()[0].record.clone();
    world.lane.put_volume(VolumeRecord { size_blocks: 2 * VOLUME_BLOCKS, ..record });
    assert!(!world.lane.is_lasting(0));
    // What lies within the size that lasts goes on meanwhile.
    world.append(ChangeKind::Data, 0, 1, false);
    world.run();
    assert!(world.lane.is_lasting(0));
    world.append(ChangeKind::Data, 6000, 1, false);
    world.run();
    world.lose_power();
    assert_eq!(world.lane.last_stamp(0).sequence, 2);
    world.check();
}

#[test]
#[should_panic(expected = "does not last")]
fn a_change_to_a_volume_that_no_root_names_is_a_mistake() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    world.put_volume(8);
    let range = BlockRange { volume: 1, block: 0, count: 1 };
    let stamp = Stamp { epoch: 1, sequence: 1 };
    world.with_lane(|lane, context| lane.append(context, 1, ChangeKind::Trim, range, None, stamp));
}

#[test]
#[should_panic(expected = "after 1.1")]
fn a_gap_is_a_mistake() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    world.append(ChangeKind::Data, 0, 1, false);
    let range = BlockRange { volume: 0, block: 0, count: 1 };
    let stamp = Stamp { epoch: 1, sequence: 3 };
    world.with_lane(|lane, context| lane.append(context, 1, ChangeKind::Trim, range, None, stamp));
}

#[test]
#[should_panic(expected = "after 2.2")]
fn an_epoch_that_goes_down_is_a_mistake() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    world.append(ChangeKind::Data, 0, 1, false);
    world.epoch = 2;
    world.append(ChangeKind::Data, 0, 1, false);
    world.epoch = 1;
    world.append(ChangeKind::Data, 0, 1, false);
}

#[test]
#[should_panic(expected = "two who number it")]
fn a_volume_numbered_by_stamps_takes_no_plain_write() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    world.append(ChangeKind::Data, 0, 1, false);
    world.run();
    let range = BlockRange { volume: 0, block: 0, count: 1 };
    world.with_lane(|lane, context| lane.release(context, 1, range, super::super::Release::Trim, false));
}

#[test]
#[should_panic(expected = "two who number it")]
fn a_volume_numbered_by_the_lane_takes_no_stamps() {
    let mut world = World::new(AckPolicy::Durable, 40, 5);
    let range = BlockRange { volume: 0, block: 0, count: 1 };
    world.with_lane(|lane, context| lane.release(context, 1, range, super::super::Release::Trim, false));
    world.run();
    let stamp = Stamp { epoch: 1, sequence: 2 };
    world.with_lane(|lane, context| lane.append(context, 1, ChangeKind::Trim, range, None, stamp));
}

#[test]
fn a_run_that_is_cut_at_a_segments_end_keeps_its_leaves_wherever_the_cut_lies() {
    // The cut lies before, at and behind the border of the two leaves that the run touches.
    for left in [40, 99, 100, 101, 102, 160] {
        let mut world = World::new(AckPolicy::Device, 40, 3);
        world.append(ChangeKind::Data, 3000, 1, false);
        world.run();
        while world.lane.blocks_left(StreamKind::Client) > left {
            let payload = (world.lane.blocks_left(StreamKind::Client) - left - 1).min(16);
            let kind = if payload == 0 { ChangeKind::Trim } else { ChangeKind::Data };
            world.append(kind, 3000, payload.max(1), false);
            world.run();
        }
        world.append(ChangeKind::Data, LEAF_BLOCKS - 100, 200, left % 2 == 0);
        world.run();
        assert_eq!(world.lane.blocks_left(StreamKind::Client), 256 - 1 - (200 - (left - 1)));
        world.lane.request_checkpoint();
        world.run();
        world.check();
        world.lose_power();
        world.check();
    }
}
