//! A fetched change is the one that was made, or gone; never another.

use super::super::stream::StreamKind;
use super::*;
use crate::store::batch::Descriptor;

/// Changes of which a half lies in each of two segments, by the descriptors on the disk.
fn cut_in_two(world: &World) -> Vec<u64> {
    let descriptors = world.disk.seen.chunks_exact(BLOCK_BYTES_USIZE).filter_map(Descriptor::decode);
    let cut = descriptors.filter(|found| found.header.continues);
    cut.map(|found| found.entries().next().unwrap().entry.sequence).collect()
}

#[test]
fn what_the_log_holds_is_found_across_segments_and_halves() {
    let mut world = World::new(AckPolicy::Durable, 96, 4);
    world.lane.config.checkpoint_log_bytes = 1 << 30;
    for _ in 0..120 {
        world.append_any(4000);
        if world.random.below(3) == 0 {
            world.run();
        }
    }
    world.run();
    let cut = cut_in_two(&world);
    assert!(cut.len() > 3, "no change was cut in two");
    for sequence in (1..=120).chain((1..=120).rev()).chain(cut) {
        assert!(world.fetch(sequence), "{sequence} is in the log");
    }
    assert!(!world.fetch(121), "nobody made it");
    world.lose_power();
    world.run();
    let found = (1..=120).filter(|sequence| world.fetch(*sequence)).count();
    assert!(found > 100, "a restart frees what holds nothing alive, and no more: {found}");
}

#[test]
fn mounts_that_write_nothing_lose_nothing() {
    let mut world = World::new(AckPolicy::Durable, 40, 4);
    for block in 0..30 {
        world.append(ChangeKind::Data, block * 5, 4, false);
        world.run();
    }
    for _ in 0..4 {
        world.lose_power();
        world.run();
        assert!((1..=30).all(|sequence| world.fetch(sequence)));
    }
}

#[test]
fn the_next_change_costs_one_or_two_descriptors() {
    let mut world = World::new(AckPolicy::Durable, 96, 6);
    world.lane.config.checkpoint_log_bytes = 1 << 30;
    for _ in 0..100 {
        world.append_any(1000);
        world.run();
    }
    assert!(world.fetch(1));
    for sequence in 2..=100 {
        let before = world.disk.reads;
        assert!(world.fetch(sequence));
        // Two descriptors and the payload; one more at a segment's end, and two for a second half.
        assert!(world.disk.reads - before <= 6, "{} reads", world.disk.reads - before);
    }
    let before = world.disk.reads;
    for sequence in 1..=100 {
        assert!(world.fetch(sequence));
    }
    assert!(world.disk.reads - before < 400, "{} reads", world.disk.reads - before);
}

#[test]
fn neither_the_cleaner_nor_discarded_batches_make_it_find_another_change() {
    let (mut found, mut gone, mut replaced) = (0, 0, 0);
    for seed in 0..12 {
        let ack = [AckPolicy::Durable, AckPolicy::Device][seed % 2];
        let mut world = World::new(ack, 40, 1000 + seed as u64);
        for _ in 0..12 {
            for _ in 0..25 {
                world.append_any(1200);
                for _ in 0..world.random.below(8) {
                    world.step();
                }
            }
            for _ in 0..10 {
                world.append_any(1200);
            }
            for _ in 0..world.random.below(16) {
                world.step();
            }
            let before = world.lane.last_stamp(0).sequence;
            if world.random.below(4) == 0 {
                world.disk.kill();
                world.restart();
            } else {
                world.lose_power();
            }
            let last = world.lane.last_stamp(0).sequence;
            replaced += before - last;
            world.made.truncate(usize::try_from(last).unwrap());
            // What is discarded is numbered anew, with other content.
            world.epoch += 1;
            for _ in 0..30 {
                let sequence = 1 + u64::from(world.random.below(u32::try_from(last).unwrap() + 3));
                let is_found = world.fetch(sequence.min(last + 1));
                assert!(!is_found || sequence <= last);
                found += u32::from(is_found);
                gone += u32::from(!is_found);
            }
        }
        world.run();
        world.check();
        let last = world.lane.last_stamp(0).sequence;
        assert!((last - 3..=last).all(|sequence| world.fetch(sequence)), "the newest changes are in the log");
    }
    assert!(found > 100 && gone > 100 && replaced > 20, "{found} found, {gone} gone, {replaced} replaced");
}

#[test]
fn a_discarded_batch_at_a_segments_end_is_never_found() {
    let mut world = World::new(AckPolicy::Device, 40, 2);
    world.append(ChangeKind::Data, 0, 1, false);
    world.run();
    // What is written here stays alive, so that the segment is kept.
    let mut block = 0;
    while world.lane.blocks_left(StreamKind::Client) > 3 {
        let kind =
            if world.lane.blocks_left(StreamKind::Client) > 4 { ChangeKind::Data } else { ChangeKind::Trim };
        world.append(kind, block, 1, false);
        block += u32::from(kind == ChangeKind::Data);
        world.run();
    }
    assert_eq!(world.lane.blocks_left(StreamKind::Client), 3);
    // Two batches that fill the segment. The payload of the first is torn, so that both are discarded.
    world.disk.holds_syncs = true;
    let last = world.lane.last_stamp(0).sequence;
    world.append(ChangeKind::Data, 3000, 1, false);
    world.run();
    world.append(ChangeKind::Trim, 1, 1, false);
    world.run();
    let content = world.made.iter().find(|made| made.block == 3000).unwrap().content(3000);
    world.disk.kill();
    let mut blocks = world.disk.seen.chunks_exact_mut(BLOCK_BYTES_USIZE);
    blocks.find(|block| **block == content).expect("written")[5] ^= 1;
    world.disk.holds_syncs = false;
    world.restart();
    assert_eq!(world.lane.last_stamp(0).sequence, last);
    // Other changes get their numbers. They do not fit there, and their segment is written anew in time.
    world.epoch = 2;
    world.append(ChangeKind::Data, 2000, 3, false);
    world.run();
    world.append(ChangeKind::Data, 2000, 3, false);
    world.run();
    assert!(world.fetch(last + 2));
    for _ in 0..10 {
        world.append(ChangeKind::Data, 2000, 200, false);
        world.run();
    }
    world.lane.request_checkpoint();
    world.run();
    assert!(!world.fetch(last + 2) && !world.fetch(last + 1), "they were discarded, or are gone");
    assert!(world.fetch(last), "the segment is still there");
    world.lose_power();
    assert!(!world.fetch(last + 2) && world.fetch(last));
}

#[test]
fn a_segment_that_is_read_is_not_written_again() {
    let mut world = World::new(AckPolicy::Durable, 40, 2);
    for _ in 0..10 {
        world.append(ChangeKind::Data, 0, 200, false);
    }
    world.run();
    let memory = MemoryRange { start: PAGES_BYTES, len: PIECE_BYTES_MAX };
    assert!(world.fetch(1));
    // The reads of the log stand still while its segments die and are written again.
    world.disk.holds_reads = true;
    world.with_lane(|lane, context| lane.fetch(context, 9, 0, 1, memory));
    for round in 0..60 {
        world.append(ChangeKind::Data, 0, 200, false);
        if round % 10 == 9 {
            world.lane.request_checkpoint();
        }
        world.run();
    }
    world.disk.holds_reads = false;
    world.run();
    let (_, outcome) = world.fetched.pop_front().unwrap();
    let Made { stamp, kind, block, count } = world.made[0];
    assert_eq!(outcome, FetchOutcome::Found { stamp, kind, block, count });
    assert!(world.memory.bytes(memory.part(0, BLOCK_BYTES)) == world.made[0].content(0));
    assert!(!world.fetch(1), "it was free to be written when the fetch had ended");
    assert!(world.fetch(70));
}

#[test]
fn what_may_not_be_committed_stays_in_the_log() {
    for ack in [AckPolicy::Durable, AckPolicy::Device] {
        let mut world = World::new(ack, 60, 31);
        for sequence in 1..=5 {
            world.append(ChangeKind::Data, 0, 200, sequence % 2 == 0);
        }
        world.append(ChangeKind::Trim, 0, 200, false);
        world.run();
        world.commits = false;
        // All of it is overwritten, and checkpoints that name none of it follow, also after restarts.
        for round in 0..30 {
            world.append(if round % 3 == 0 { ChangeKind::Trim } else { ChangeKind::Data }, 0, 200, false);
            world.lane.request_checkpoint();
            world.run();
            if round % 8 == 5 {
                world.lose_power();
            }
        }
        let last = world.lane.last_stamp(0).sequence;
        assert!(last >= 36 - 4, "what was answered is there");
        assert!((7..=last).all(|sequence| world.fetch(sequence)));
        assert!(!world.fetch(1), "what was committed made room");
        world.check();
        world.lane.note_committed(0, last - 1);
        world.lane.request_checkpoint();
        world.run();
        assert!(!world.fetch(last - 8) && world.fetch(last));
    }
}

#[test]
fn a_rotten_payload_is_gone_and_small_memory_is_told() {
    let mut world = World::new(AckPolicy::Durable, 40, 2);
    world.append(ChangeKind::Data, 0, 50, false);
    world.append(ChangeKind::Data, 60, 2, false);
    world.run();
    let small = MemoryRange { start: PAGES_BYTES, len: 4 * BLOCK_BYTES };
    for (sequence, outcome) in [(1, FetchOutcome::MemoryTooSmall), (0, FetchOutcome::Gone)] {
        world.with_lane(|lane, context| lane.fetch(context, 9, 0, sequence, small));
        world.run();
        assert_eq!(world.fetched.pop_front(), Some((9, outcome)));
    }
    let content = world.made[0].content(7);
    let mut blocks = world.disk.seen.chunks_exact_mut(BLOCK_BYTES_USIZE);
    blocks.find(|block| **block == content).unwrap()[9] ^= 1;
    assert!(!world.fetch(1));
    assert!(world.fetch(2));
}

#[test]
fn a_volume_is_not_taken_for_another() {
    let mut world = World::new(AckPolicy::Durable, 48, 2);
    world.put_volume(8);
    world.run();
    for sequence in 1..=300 {
        let range = BlockRange { volume: 1, block: 0, count: 1 };
        let stamp = Stamp { epoch: 1, sequence };
        world.with_lane(|lane, context| lane.append(context, 5000, ChangeKind::Trim, range, None, stamp));
        if sequence % 3 == 0 {
            world.append(ChangeKind::Data, 0, 5, true);
        }
        world.run();
    }
    for sequence in 1..=100 {
        assert!(world.fetch(sequence));
    }
}
