//! Damaged blocks of a volume that is served: what a read says of them, and what a copy from another replica does.

use super::*;
use crate::store::lane::{BlocksRead, Completion, OwnedPayload};
use crate::store::map::LEAF_BLOCKS;
use crate::units::BLOCK_BYTES;

/// Reads blocks and gives the lane's answer and what came.
fn read(world: &mut World, block: u32, count: u32) -> (Completion, Vec<u8>) {
    let memory = MemoryRange { start: PAGES_BYTES, len: count * BLOCK_BYTES };
    let range = BlockRange { volume: 0, block, count };
    world.with_lane(|lane, context| lane.read(context, 77, range, memory));
    loop {
        if let Some(completion) = world.lane.poll_completion() {
            assert_eq!(completion.cookie, 77);
            return (completion, world.memory.bytes(memory).to_vec());
        }
        assert!(step_without_answers(world), "a read ends");
    }
}

/// A turn that leaves the lane's answers where they are.
fn step_without_answers(world: &mut World) -> bool {
    world.with_lane(Lane::upkeep);
    while let Some(effect) = world.lane.poll_effect() {
        world.disk.submit(&world.memory, effect);
    }
    let done = world.disk.complete_one(&mut world.memory, &mut world.random);
    if let Some(token) = done {
        world.with_lane(|lane, context| lane.handle_disk(context, token, true));
    }
    done.is_some() || world.lane.wants_turn()
}

/// Flips a bit of a block on the device, whatever holds it: a block of the volume, or the leaf that maps it.
fn rot(world: &mut World, block: u32, leaf: bool) {
    let mut recovered = recover_lane(&mut world.disk, world.layout, 0, 1 << 20, Bugs::none()).unwrap();
    let mut place = recovered.map.table(0).leaf_on_device(block / LEAF_BLOCKS).place;
    if !leaf {
        let visit = |found, mapping: crate::store::map::Mapping| {
            if found == block {
                place = mapping.place;
            }
        };
        recovered.visit_blocks(&mut world.disk, 0, visit).unwrap();
    }
    let at = usize::try_from(place.offset_bytes()).unwrap();
    let mut bytes = world.disk.seen[at..at + BLOCK_BYTES_USIZE].to_vec();
    bytes[99] ^= 4;
    world.disk.put(place, &bytes);
}

fn copy(world: &mut World, block: u32, count: u32) {
    let whole = world.pages.allocate(1 + count).unwrap();
    for index in 0..count {
        let newest = world.made.iter().rev().find(|made| {
            (made.block..made.block + made.count).contains(&(block + index)) && made.kind == ChangeKind::Data
        });
        let bytes = newest.expect("it was written").content(block + index);
        world.memory.bytes_mut(whole.part((1 + index) * BLOCK_BYTES, BLOCK_BYTES)).copy_from_slice(&bytes);
    }
    let payload = Some(Payload::Owned(OwnedPayload { whole }));
    let range = BlockRange { volume: 0, block, count };
    world.with_lane(|lane, context| lane.append_copy(context, 1000, range, payload));
}

fn written(seed: u64) -> World {
    let mut world = World::new(AckPolicy::Durable, 40, seed);
    world.append(ChangeKind::Data, 10, 30, false);
    world.append(ChangeKind::Data, 600, 3, false);
    world.run();
    world.lane.request_checkpoint();
    world.run();
    world.restart();
    world
}

#[test]
fn a_read_names_the_damaged_blocks_and_no_others() {
    let mut world = written(1);
    rot(&mut world, 12, false);
    rot(&mut world, 20, false);
    rot(&mut world, 21, false);
    let (completion, _) = read(&mut world, 8, 20);
    let BlocksRead { range, memory, damaged } = completion.read.unwrap();
    assert_eq!(completion.result, Err(RequestError::Io));
    assert_eq!(
        (range, damaged.runs()),
        (BlockRange { volume: 0, block: 8, count: 20 }, vec![(4, 1), (12, 2)])
    );
    assert_eq!(memory.len, 20 * BLOCK_BYTES);
    let (completion, _) = read(&mut world, 22, 8);
    assert_eq!((completion.result, completion.read.unwrap().damaged.runs()), (Ok(()), vec![]));
    // A leaf that is damaged says nothing of single blocks.
    rot(&mut world, 600, true);
    world.restart();
    let (completion, _) = read(&mut world, 598, 10);
    assert_eq!((completion.result, completion.read.unwrap().damaged.runs()), (Err(RequestError::Io), vec![]));
}

#[test]
fn a_copy_repairs_them_whenever_power_fails_and_changes_nothing_else() {
    let (mut repaired, mut still_bad) = (0, 0);
    for round in 0..60_u32 {
        let steps = round % 6;
        let mut world = written(u64::from(round) * 13 + 7);
        rot(&mut world, 20, false);
        let before = world.lane.last_stamp(0);
        copy(&mut world, 20, 1);
        assert_eq!(world.lane.last_stamp(0), before, "a copy is no change of the order");
        world.append(ChangeKind::Data, 500, 2, false);
        (0..steps).for_each(|_| _ = world.step());
        let answered = world.answers.contains(&(1000, Ok(())));
        world.lose_power();
        let expected = world.made[0].content(20);
        let (completion, bytes) = read(&mut world, 20, 1);
        match completion.result {
            Ok(()) => assert!(bytes == expected),
            Err(_) => assert!(!answered, "it was repaired"),
        }
        repaired += u32::from(completion.result.is_ok());
        still_bad += u32::from(completion.result.is_err());
        if completion.result.is_ok() {
            world.check();
        }
    }
    assert!(repaired > 5 && still_bad > 5, "{repaired} and {still_bad} crashes prove little");
}

#[test]
fn a_change_given_after_a_copy_wins() {
    let mut world = written(5);
    rot(&mut world, 20, false);
    copy(&mut world, 18, 5);
    world.append(ChangeKind::Data, 19, 2, true);
    world.run();
    world.check();
    world.restart();
    world.check();
}
