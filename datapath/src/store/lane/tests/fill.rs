//! A replica that is being filled: whatever happens, it holds a prefix of what it was given, and says so.

use super::*;
use crate::store::map::LEAF_BLOCKS;

#[derive(Clone, Copy, Debug)]
enum Op {
    Change(ChangeKind, u32, u32),
    Begin(Stamp),
    Copy { data: bool, block: u32, count: u32 },
    End,
}

/// What a volume should hold after some of the operations: of which operation each block is, and the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Expected {
    blocks: BTreeMap<u32, u64>,
    stamp: Stamp,
    filling: bool,
}

impl Expected {
    fn apply(&mut self, tag: u64, op: Op, epoch: u32) {
        let mut put = |block: u32, count: u32, data: bool| {
            for block in block..block + count {
                self.blocks.remove(&block);
                if data {
                    self.blocks.insert(block, tag);
                }
            }
        };
        match op {
            Op::Change(kind, block, count) => {
                put(block, count, kind == ChangeKind::Data);
                self.stamp = Stamp { epoch, sequence: self.stamp.sequence + 1 };
            }
            Op::Copy { data, block, count } => put(block, count, data),
            Op::Begin(stamp) => (self.stamp, self.filling) = (stamp, true),
            Op::End => self.filling = false,
        }
    }
}

fn content(tag: u64, block: u32) -> [u8; BLOCK_BYTES_USIZE] {
    let word = tag << 32 | u64::from(block) | 1 << 63;
    let mut bytes = [0; BLOCK_BYTES_USIZE];
    bytes.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&word.to_le_bytes()));
    bytes
}

struct Filled {
    world: World,
    ops: Vec<(Op, u32)>,
}

impl Filled {
    fn new(ack: AckPolicy, seed: u64) -> Filled {
        Filled { world: World::new(ack, 60, seed), ops: Vec::new() }
    }

    fn payload(&mut self, block: u32, count: u32) -> Payload {
        let tag = self.ops.len() as u64;
        let world = &mut self.world;
        let len = (1 + count) * BLOCK_BYTES;
        // None is put over another that the lane may still read.
        let lent = world.random.below(2) == 0 && world.lent_at + len <= PAGES_BYTES + LENT_BYTES;
        let whole = if lent {
            let start = world.lent_at;
            world.lent_at += len;
            MemoryRange { start, len }
        } else {
            world.pages.allocate(1 + count).expect("pages for a payload")
        };
        for index in 0..count {
            let part = whole.part((1 + index) * BLOCK_BYTES, BLOCK_BYTES);
            world.memory.bytes_mut(part).copy_from_slice(&content(tag, block + index));
        }
        if lent { Payload::Lent(whole) } else { Payload::Owned(super::super::OwnedPayload { whole }) }
    }

    /// Hands it to the lane; its cookie is its position, from 1 on.
    fn give(&mut self, op: Op) {
        let epoch = self.world.epoch;
        let payload = match op {
            Op::Change(ChangeKind::Data, block, count) | Op::Copy { data: true, block, count } => {
                Some(self.payload(block, count))
            }
            _ => None,
        };
        self.ops.push((op, epoch));
        let cookie = u32::try_from(self.ops.len()).unwrap();
        self.world.with_lane(|lane, context| match op {
            Op::Change(kind, block, count) => {
                let sequence = lane.last_stamp(0).sequence + 1;
                let range = BlockRange { volume: 0, block, count };
                lane.append(context, cookie, kind, range, payload, Stamp { epoch, sequence });
            }
            Op::Begin(stamp) => lane.restart_order(context, cookie, 0, (Stamp::default(), stamp)),
            Op::Copy { block, count, .. } => {
                lane.append_copy(context, cookie, BlockRange { volume: 0, block, count }, payload);
            }
            Op::End => lane.end_filling(context, cookie, 0),
        });
    }

    fn give_any_change(&mut self) {
        let random = &mut self.world.random;
        let (kind, longest) = match random.below(6) {
            0 => (ChangeKind::Zero, 300),
            1 => (ChangeKind::Trim, 40),
            2 => (ChangeKind::Data, 60),
            _ => (ChangeKind::Data, 4),
        };
        let count = 1 + random.below(longest);
        let block = random.below(3 * LEAF_BLOCKS - count);
        self.give(Op::Change(kind, block, count));
    }

    fn give_any_copy(&mut self) {
        let random = &mut self.world.random;
        let data = random.below(2) == 0;
        let count = 1 + random.below(if data { 100 } else { LEAF_BLOCKS });
        let leaf = random.below(8);
        let block = leaf * LEAF_BLOCKS + random.below(LEAF_BLOCKS - count + 1);
        self.give(Op::Copy { data, block, count });
    }

    fn turn(&mut self, turns: u32) {
        (0..turns).for_each(|_| {
            self.world.step();
        });
    }

    /// What recovery finds on the device.
    fn found(&mut self) -> Expected {
        let World { disk, layout, .. } = &mut self.world;
        let mut recovered = recover_lane(disk, *layout, 0, 1 << 20, Bugs::none()).unwrap();
        let record = &recovered.volumes[0];
        let mut found = Expected { stamp: record.stamp(), filling: record.filling, ..Expected::default() };
        let mut places = BTreeMap::new();
        recovered.visit_blocks(disk, 0, |block, mapping| _ = places.insert(block, mapping)).unwrap();
        for (block, mapping) in places {
            let at = usize::try_from(mapping.place.offset_bytes()).unwrap();
            let bytes = &disk.seen[at..at + BLOCK_BYTES_USIZE];
            let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let tag = (word & !(1 << 63)) >> 32;
            assert!(bytes == content(tag, block), "block {block} is of no operation");
            found.blocks.insert(block, tag);
        }
        let report = check_lane(disk, layout, &mut recovered);
        assert!(report.is_clean(), "{report:?}");
        found
    }

    /// Loses power. What is found is what some first operations make, and all that were answered are among them: their
    /// number.
    fn crash(&mut self) -> usize {
        let answered = self.world.answers.iter().map(|(cookie, result)| {
            assert_eq!(*result, Ok(()));
            *cookie as usize
        });
        // Zeroes for what was never written are answered at once.
        let in_order = |cookie: &usize| !matches!(self.ops[cookie - 1].0, Op::Copy { data: false, .. });
        let answered = answered.filter(in_order).max().unwrap_or(0);
        self.world.lose_power();
        let found = self.found();
        let mut expected = Expected::default();
        let mut equal = if found == expected { Some(0) } else { None };
        for (index, (op, epoch)) in self.ops.iter().enumerate() {
            expected.apply(index as u64, *op, *epoch);
            if expected == found {
                equal = Some(index + 1);
            }
        }
        let equal =
            equal.unwrap_or_else(|| panic!("no first operations make {:?}", (found.stamp, found.filling)));
        assert!(equal >= answered, "{answered} operations were answered, {equal} are there");
        let lane = &self.world.lane;
        assert_eq!((lane.last_stamp(0), lane.filling_from(0).is_some()), (found.stamp, found.filling));
        equal
    }
}

const POLICIES: [AckPolicy; 2] = [AckPolicy::Device, AckPolicy::Durable];

#[test]
fn power_lost_at_any_point_of_a_fill_leaves_a_prefix() {
    let (mut filling, mut done) = (0, 0);
    for (seed, ack) in (0..80_u64).flat_map(|seed| POLICIES.map(|ack| (seed, ack))) {
        let mut filled = Filled::new(ack, seed * 77 + 5);
        (0..6).for_each(|_| filled.give_any_change());
        if seed % 3 == 0 {
            filled.world.run();
            filled.world.lane.request_checkpoint();
        }
        filled.world.epoch = 4;
        filled.give(Op::Begin(Stamp { epoch: 3, sequence: 2 }));
        let until = seed % 40;
        for _ in 0..until.min(25) {
            if filled.world.random.below(2) == 0 {
                filled.give_any_change()
            } else {
                filled.give_any_copy()
            }
            let turns = filled.world.random.below(6);
            filled.turn(turns);
            if filled.world.random.below(20) == 0 {
                filled.world.lane.request_checkpoint();
            }
        }
        if until > 20 {
            filled.give(Op::End);
        }
        let more = filled.world.random.below(30);
        filled.turn(more);
        filled.crash();
        let is_filling = filled.world.lane.filling_from(0).is_some();
        filling += u32::from(is_filling);
        done += u32::from(!is_filling && filled.world.lane.last_stamp(0).epoch >= 3);
        // A checkpoint keeps it, and so does the next start.
        filled.world.run();
        filled.world.lose_power();
        assert_eq!(filled.world.lane.filling_from(0).is_some(), is_filling);
    }
    assert!(filling > 25 && done > 5, "{filling} and {done} crashes prove little");
}

#[test]
fn a_fill_begins_and_ends_behind_what_came_before() {
    for ack in POLICIES {
        let mut filled = Filled::new(ack, 3);
        filled.give(Op::Change(ChangeKind::Data, 10, 3));
        filled.give(Op::Begin(Stamp { epoch: 7, sequence: 100 }));
        filled.world.epoch = 8;
        filled.give(Op::Copy { data: true, block: 10, count: 3 });
        filled.give(Op::Change(ChangeKind::Data, 11, 1));
        filled.give(Op::Copy { data: false, block: 12, count: 500 });
        filled.give(Op::Copy { data: false, block: 5 * LEAF_BLOCKS, count: 512 });
        assert!(filled.world.lane.filling_from(0).is_none(), "not in effect yet");
        filled.world.run();
        assert!(filled.world.lane.filling_from(0).is_some());
        filled.give(Op::End);
        filled.world.run();
        let mut answers: Vec<u32> = filled.world.answers.iter().map(|(cookie, _)| *cookie).collect();
        answers.sort_unstable();
        assert_eq!(answers, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(filled.crash(), 7);
        assert_eq!(filled.world.lane.last_stamp(0), Stamp { epoch: 8, sequence: 101 });
        let leaves = filled.world.lane.map().table(0).next_present(5, 6);
        assert_eq!(leaves, None, "zeroes make no leaf");
    }
}

/// The same numbers were given twice: by the order that the replica left, and by the one that it follows.
#[test]
fn a_fetch_finds_nothing_of_the_order_that_was_left() {
    for restarts in [false, true] {
        let mut world = World::new(AckPolicy::Durable, 60, 9);
        (0..10).for_each(|_| world.append(ChangeKind::Data, 40, 30, true));
        world.with_lane(|lane, context| {
            lane.restart_order(context, 1000, 0, (Stamp::default(), Stamp { epoch: 2, sequence: 4 }))
        });
        world.epoch = 3;
        for sequence in 5..=8 {
            let stamp = Stamp { epoch: 3, sequence };
            world.made[usize::try_from(sequence).unwrap() - 1] =
                Made { stamp, kind: ChangeKind::Data, block: 7, count: 2 };
            world.append_made(sequence, false);
        }
        world.run();
        if restarts {
            world.lose_power();
            world.run();
        }
        for sequence in [8, 5, 6, 7, 8, 6] {
            assert!(world.fetch(sequence), "{sequence} is there");
        }
        for sequence in [1, 4, 9, 10] {
            assert!(!world.fetch(sequence), "{sequence} is of another order, or was never there");
        }
    }
}
