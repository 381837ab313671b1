//! A promise that was answered holds whatever happens.

use super::*;
use crate::store::map::LEAF_BLOCKS;

const POLICIES: [AckPolicy; 2] = [AckPolicy::Device, AckPolicy::Durable];

#[test]
fn a_promise_that_was_answered_survives_and_it_covers_what_came_before() {
    let mut lost = 0;
    for (steps, ack) in (0..60_u32).flat_map(|steps| POLICIES.map(|ack| (steps, ack))) {
        let mut world = World::new(ack, 40, u64::from(steps) * 31 + 1);
        world.append(ChangeKind::Data, 10, 60, true);
        world.append(ChangeKind::Data, 20, 1, false);
        world.with_lane(|lane, context| lane.promise(context, 1000, 0, 6));
        world.append(ChangeKind::Data, 30, 2, false);
        for _ in 0..steps / 4 {
            world.step();
        }
        let (known, answered) = (world.lane.promised(0), world.answers.contains(&(1000, Ok(()))));
        assert!(!answered || known == 6, "answered, and not counted as kept");
        world.lose_power();
        let record = &world.lane.volumes()[0].record;
        assert!(record.promise >= known && [0, 6].contains(&record.promise));
        assert!(!answered || record.sequence >= 2, "the promise was answered before what it covers");
        assert_eq!(world.lane.promised(0), record.promise);
        lost += u32::from(record.promise == 0);
        world.check();
    }
    assert!(lost > 0, "power never failed before the promise was kept");
}

#[test]
fn a_promise_waits_for_a_change_that_waits_for_its_leaf() {
    for ack in POLICIES {
        let mut world = World::new(ack, 40, 8);
        world.append(ChangeKind::Data, 3 * LEAF_BLOCKS, 1, false);
        world.run();
        world.lane.request_checkpoint();
        world.run();
        world.disk.kill();
        world.restart();
        world.run();
        world.disk.holds_reads = true;
        world.append(ChangeKind::Data, 3 * LEAF_BLOCKS + 1, 1, false);
        world.with_lane(|lane, context| lane.promise(context, 1000, 0, 2));
        world.run();
        assert_eq!((world.answers.len(), world.lane.promised(0)), (0, 0));
        world.disk.holds_reads = false;
        world.run();
        assert_eq!(world.answers, [(2, Ok(())), (1000, Ok(()))]);
        assert_eq!(world.lane.promised(0), 2);
    }
}

#[test]
fn a_checkpoint_keeps_the_promise_and_a_lower_one_changes_nothing() {
    let mut world = World::new(AckPolicy::Device, 40, 8);
    world.with_lane(|lane, context| lane.promise(context, 1000, 0, 5));
    world.with_lane(|lane, context| lane.promise(context, 1001, 0, 3));
    world.run();
    assert_eq!(world.answers, [(1000, Ok(())), (1001, Ok(()))]);
    world.lane.request_checkpoint();
    world.run();
    for _ in 0..3 {
        world.lose_power();
        assert_eq!((world.lane.promised(0), world.lane.last_stamp(0)), (5, Stamp::default()));
        world.run();
    }
}

#[test]
fn a_promise_does_not_forbid_to_replay_what_was_numbered_before() {
    let mut world = World::new(AckPolicy::Durable, 40, 8);
    world.append(ChangeKind::Data, 0, 1, false);
    world.with_lane(|lane, context| lane.promise(context, 1000, 0, 5));
    world.append(ChangeKind::Data, 1, 1, false);
    world.run();
    world.lose_power();
    assert_eq!((world.lane.promised(0), world.lane.last_stamp(0)), (5, Stamp { epoch: 1, sequence: 2 }));
}
