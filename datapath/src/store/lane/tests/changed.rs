//! Whatever changed after a point is found, through cleaning, checkpoints and restarts.

use super::*;
use crate::block_set::BlockSet;
use crate::store::lane::Extent;
use crate::store::map::LEAF_BLOCKS;

impl World {
    fn find_changed(&mut self, after: u64, extent: Extent) -> Option<BlockSet> {
        // Less than a batch, so that it takes several reads to come through one.
        let memory = MemoryRange { start: PAGES_BYTES, len: 3 * BLOCK_BYTES };
        self.lane.find_changed(5, 0, after, extent, memory);
        loop {
            let moved = self.step();
            if let Some(changed) = self.lane.poll_changed() {
                assert_eq!(changed.cookie, 5);
                return changed.blocks;
            }
            assert!(moved, "the log is read");
        }
    }

    /// By block: the newest change up to the last one in effect.
    fn newest(&self) -> BTreeMap<u32, Made> {
        let last = usize::try_from(self.lane.volumes()[0].record.sequence).unwrap();
        let mut newest = BTreeMap::new();
        for made in &self.made[..last] {
            newest.extend((made.block..made.block + made.count).map(|block| (block, *made)));
        }
        newest
    }

    fn check_changed(&mut self, after: u64) -> u32 {
        let found = self.find_changed(after, Extent::All).expect("the log is sound");
        let newest = self.newest();
        for (block, made) in newest.iter().filter(|(_, made)| made.stamp.sequence > after) {
            if made.kind == ChangeKind::Data {
                assert!(found.contains(*block), "block {block} of {made:?}, after {after}");
            } else {
                let leaf = block / LEAF_BLOCKS;
                assert!(
                    self.lane.may_have_changed(0, leaf, after),
                    "block {block} of {made:?}, after {after}"
                );
            }
        }
        // Nothing is found that only older changes wrote.
        let ever = |block: u32| {
            self.made[usize::try_from(after).unwrap()..]
                .iter()
                .any(|made| (made.block..made.block + made.count).contains(&block))
        };
        let mut next = found.next_from(0);
        let mut count = 0;
        while let Some(block) = next {
            assert!(ever(block), "block {block} did not change after {after}");
            count += 1;
            next = found.next_from(block + 1);
        }
        count
    }
}

#[test]
fn what_changed_is_found_and_nothing_else() {
    let mut cleaned = false;
    for seed in 0..10 {
        let ack = [AckPolicy::Durable, AckPolicy::Device][seed % 2];
        let mut world = World::new(ack, 34, 500 + seed as u64);
        let (mut some, mut none) = (0, 0);
        for _ in 0..30 {
            for _ in 0..12 {
                world.append_any(4000);
                for _ in 0..world.random.below(20) {
                    world.step();
                }
            }
            world.run();
            cleaned |= world.lane.counters().moved_blocks > 0;
            match world.random.below(6) {
                0 => world.lose_power(),
                1 => world.lane.request_checkpoint(),
                _ => {}
            }
            world.made.truncate(usize::try_from(world.lane.last_stamp(0).sequence).unwrap());
            let last = u32::try_from(world.lane.volumes()[0].record.sequence).unwrap();
            for _ in 0..3 {
                let after = u64::from(world.random.below(last + 1));
                let found = world.check_changed(after);
                some += u32::from(found > 0);
            }
            none += u32::from(world.check_changed(last.into()) == 0);
        }
        assert!(some > 60 && none == 30, "{some} and {none}");
        world.check();
    }
    assert!(cleaned, "the cleaner moved nothing");
}

#[test]
fn what_is_kept_tells_of_every_change_that_may_not_be_committed() {
    let mut world = World::new(AckPolicy::Durable, 60, 8);
    for _ in 0..40 {
        world.append_any(1500);
    }
    world.run();
    world.commits = false;
    let committed = world.lane.last_stamp(0).sequence;
    for round in 0..40 {
        world.append_any(1500);
        if round % 9 == 0 {
            world.lane.request_checkpoint();
        }
        world.run();
    }
    world.lose_power();
    world.run();
    let last = world.lane.last_stamp(0).sequence;
    assert!(last > committed + 30);
    let kept = world.find_changed(committed, Extent::Kept).expect("the log is sound");
    for made in &world.made[usize::try_from(committed).unwrap()..usize::try_from(last).unwrap()] {
        assert!((made.block..made.block + made.count).all(|block| kept.contains(block)), "{made:?}");
    }
}

#[test]
fn a_damaged_log_tells_nothing() {
    let mut world = World::new(AckPolicy::Durable, 40, 9);
    for block in 0..30 {
        world.append(ChangeKind::Data, block * 20, 10, false);
        world.run();
    }
    assert!(world.find_changed(3, Extent::All).is_some());
    let content = world.made[20].content(world.made[20].block);
    let blocks: Vec<&[u8]> = world.disk.seen.chunks_exact(BLOCK_BYTES_USIZE).collect();
    let payload = blocks.iter().position(|block| *block == content).expect("written");
    // The block in front of a payload is its descriptor.
    world.disk.seen[(payload - 1) * BLOCK_BYTES_USIZE + 40] ^= 1;
    assert_eq!(world.find_changed(3, Extent::All), None);
    assert!(world.find_changed(30, Extent::All).is_some(), "nothing changed since");
}
