//! A volume is taken out while another one is served: nothing of it stays, and nothing else is touched, whenever power fails.

use super::*;

/// Position and number of the volume that goes. The one that stays is the world's.
const DOOMED: u32 = 1;
const DOOMED_NUMBER: u32 = 6;
/// What answers for it are named; answers for the other one count from 1.
const COOKIE: u32 = 0;

impl World {
    fn with_two_volumes(seed: u64) -> World {
        let mut world = World::new(AckPolicy::Durable, 60, seed);
        world.put_volume(DOOMED_NUMBER);
        world.run();
        for _ in 0..60 {
            world.append_any(2000);
            world.write_doomed();
            for _ in 0..world.random.below(20) {
                world.step();
            }
        }
        world.run();
        world
    }

    /// A change of the volume that is to go.
    fn write_doomed(&mut self) {
        let last = self.lane.last_stamp(DOOMED);
        let stamp = Stamp { epoch: 1, sequence: last.sequence + 1 };
        let range = BlockRange {
            volume: DOOMED,
            block: self.random.below(7 * 512),
            count: 1 + self.random.below(200),
        };
        let (kind, payload) = if self.random.below(6) == 0 {
            (ChangeKind::Trim, None)
        } else {
            let whole = self.pages.allocate(1 + range.count).expect("pages for a payload");
            self.memory.bytes_mut(whole).fill(0xdd);
            (ChangeKind::Data, Some(Payload::Owned(super::super::OwnedPayload { whole })))
        };
        self.with_lane(|lane, context| lane.append(context, COOKIE, kind, range, payload, stamp));
    }

    fn remove(&mut self) {
        self.lane.remove_volume(COOKIE, DOOMED);
    }

    /// The result of the removal, if it has ended.
    fn removed(&self) -> Option<Result<(), RequestError>> {
        self.answers.iter().find(|(cookie, _)| *cookie == COOKIE).map(|(_, result)| *result)
    }

    fn run_until_removed(&mut self) -> Result<(), RequestError> {
        while self.removed().is_none() {
            assert!(self.step() || self.removed().is_some(), "a removal ends");
        }
        self.removed().expect("just seen")
    }

    fn numbers_on_disk(&mut self) -> Vec<u32> {
        let recovered = recover_lane(&mut self.disk, self.layout, 0, 1 << 20, Bugs::none()).unwrap();
        recovered.volumes.iter().map(|volume| volume.number).collect()
    }
}

#[test]
fn nothing_of_it_stays_and_its_position_is_given_to_another() {
    let mut world = World::with_two_volumes(1);
    world.answers.clear();
    let live = world.lane.segments().live_total();
    world.remove();
    assert_eq!(world.run_until_removed(), Ok(()));
    assert_eq!(world.numbers_on_disk(), [5]);
    world.run();
    world.check();
    assert!(world.lane.segments().live_total() < live, "its blocks are free");
    assert!(world.lane.volumes()[1].record.kept.is_empty());

    world.put_volume(7);
    world.run();
    assert_eq!(world.lane.volume_position(7), Some(DOOMED), "the same position");
    assert!(world.lane.is_lasting(DOOMED) && world.lane.last_stamp(DOOMED) == Stamp::default());
    assert_eq!(world.numbers_on_disk(), [5, 7]);
    let mut recovered = recover_lane(&mut world.disk, world.layout, 0, 1 << 20, Bugs::none()).unwrap();
    let mut blocks = 0;
    recovered.visit_blocks(&mut world.disk, 1, |_, _| blocks += 1).unwrap();
    assert_eq!(blocks, 0, "of the volume that was here before there is nothing");
    (0..30).for_each(|_| {
        world.write_doomed();
        world.append_any(2000);
        world.run();
    });
    world.check();
}

/// A pool that can hold the volume once, but not twice, is filled again and again.
#[test]
fn what_it_held_can_be_written_anew_for_ever() {
    let mut world = World::new(AckPolicy::Durable, 60, 5);
    for number in DOOMED_NUMBER..DOOMED_NUMBER + 12 {
        world.put_volume(number);
        world.run();
        for _ in 0..40 {
            world.write_doomed();
            world.append_any(1000);
            world.run();
        }
        world.answers.retain(|(cookie, _)| *cookie != COOKIE);
        world.remove();
        assert_eq!(world.run_until_removed(), Ok(()));
    }
    world.check();
}

#[test]
fn whenever_power_fails_it_is_there_or_not_and_the_other_one_is_whole() {
    let (mut found, mut gone) = (0, 0);
    for seed in 0..60 {
        let mut world = World::with_two_volumes(100 + seed);
        world.answers.retain(|(cookie, _)| *cookie != COOKIE);
        world.remove();
        for _ in 0..world.random.below(60) {
            if world.random.below(4) == 0 {
                world.append_any(2000);
            }
            world.step();
        }
        let was_answered = world.removed().is_some();
        world.lose_power();
        world.check();
        if world.lane.volume_position(DOOMED_NUMBER).is_some() {
            assert!(!was_answered, "it was answered, and the volume is there again");
            found += 1;
            world.answers.clear();
            world.remove();
            assert_eq!(world.run_until_removed(), Ok(()));
            world.lose_power();
            world.check();
        } else {
            gone += 1;
        }
        assert_eq!(world.numbers_on_disk(), [5]);
    }
    assert!(found > 5 && gone > 5, "{found} found, {gone} gone");
}

/// A checkpoint that has written some of the leaves makes its body from the table when it has written all.
#[test]
fn no_leaf_goes_while_a_checkpoint_writes_the_others() {
    const LEAVES: u32 = 700;
    for steps in 0..12_u32 {
        // All leaves are dirty when it begins, and it writes them in several batches.
        let mut world = World::with_map_cache(AckPolicy::Durable, 80, 7 + u64::from(steps), 16 << 20);
        world.lane.put_volume(VolumeRecord {
            number: DOOMED_NUMBER,
            size_blocks: u64::from(LEAVES * 512),
            identity: [2; 16],
            replicated: true,
            name: "large".to_owned(),
            ..VolumeRecord::default()
        });
        world.run();
        for leaf in 0..LEAVES {
            let stamp = Stamp { epoch: 1, sequence: u64::from(leaf) + 1 };
            let range = BlockRange { volume: DOOMED, block: leaf * 512, count: 1 };
            let whole = world.pages.allocate(2).expect("pages for a payload");
            let payload = Some(Payload::Owned(super::super::OwnedPayload { whole }));
            world.with_lane(|lane, context| {
                lane.append(context, COOKIE, ChangeKind::Data, range, payload, stamp);
            });
            if leaf % 16 == 0 {
                world.append_any(2000);
                world.run();
            }
        }
        world.run();
        world.answers.retain(|(cookie, _)| *cookie != COOKIE);
        world.lane.request_checkpoint();
        for _ in 0..steps {
            world.step();
        }
        world.remove();
        for _ in 0..world.random.below(40) {
            world.step();
        }
        world.lose_power();
        world.check();
    }
}

#[test]
fn a_leaf_that_cannot_be_read_keeps_the_volume() {
    for seed in 0..16 {
        let mut world = World::with_two_volumes(3 + seed);
        world.lane.request_checkpoint();
        world.run();
        world.restart();
        let place = world.lane.map().table(DOOMED).leaf_on_device(4).place;
        let at = usize::try_from(place.offset_bytes()).unwrap();
        world.disk.seen[at] ^= 1;
        world.remove();
        assert_eq!(world.run_until_removed(), Err(RequestError::Io));
        let table = world.lane.map().table(DOOMED);
        let left = [table.next_present(0, u32::MAX), table.next_present(5, u32::MAX)];
        assert_eq!(left, [Some(4), None], "only what cannot be read stays, whichever read ends first");
        world.disk.seen[at] ^= 1;
        world.answers.clear();
        world.remove();
        assert_eq!(world.run_until_removed(), Ok(()), "whoever asks again");
        world.check();
    }
}

#[test]
fn a_lane_that_fails_says_so() {
    let mut world = World::with_two_volumes(4);
    world.answers.clear();
    world.remove();
    world.with_lane(|lane, context| lane.fail(context));
    assert_eq!(world.run_until_removed(), Err(RequestError::Io));
}
