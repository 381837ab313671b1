//! The disk keeps what a disk must keep, and loses everything else in some seed.

use super::{Disk, OperationIndex};
use crate::sim::random::Random;

const BLOCK: usize = 4096;

fn disk(seed: u64) -> Disk {
    Disk::new(1 << 20, Random::new(seed))
}

fn start(disk: &mut Disk, block: u64, value: u8) -> OperationIndex {
    disk.start_write(block * BLOCK as u64, &[value; BLOCK], false).0
}

fn write(disk: &mut Disk, block: u64, value: u8) {
    let index = start(disk, block, value);
    disk.finish(index, &mut []).unwrap();
}

fn sync(disk: &mut Disk) {
    let (index, _) = disk.start_sync();
    disk.finish(index, &mut []).unwrap();
}

fn read(disk: &mut Disk, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    disk.read_now(block * BLOCK as u64, &mut bytes).unwrap();
    bytes
}

/// How often `good` holds over many seeds of `run`.
fn count(run: impl Fn(u64) -> bool) -> usize {
    (0..200).filter(|seed| run(*seed)).count()
}

#[test]
fn synced_writes_survive_every_power_cut() {
    for seed in 0..200 {
        let mut disk = disk(seed);
        write(&mut disk, 3, 7);
        sync(&mut disk);
        write(&mut disk, 4, 8);
        disk.cut_power();
        assert_eq!(read(&mut disk, 3), [7; BLOCK]);
    }
}

#[test]
fn a_sync_covers_only_what_had_completed_before_it_started() {
    let lost = count(|seed| {
        let mut disk = disk(seed);
        let late = start(&mut disk, 3, 7);
        let (index, _) = disk.start_sync();
        disk.finish(late, &mut []).unwrap();
        disk.finish(index, &mut []).unwrap();
        disk.cut_power();
        read(&mut disk, 3) != [7; BLOCK]
    });
    assert!((20..180).contains(&lost), "{lost} of 200");
}

#[test]
fn later_unsynced_writes_may_survive_earlier_ones_and_be_torn() {
    let cut = |seed| {
        let mut disk = disk(seed);
        write(&mut disk, 1, 1);
        write(&mut disk, 2, 2);
        disk.cut_power();
        (read(&mut disk, 1), read(&mut disk, 2))
    };
    assert!(count(|seed| cut(seed) == (vec![0; BLOCK], vec![2; BLOCK])) > 0);
    assert!(count(|seed| cut(seed).0.contains(&0) && cut(seed).0.contains(&1)) > 0);
}

#[test]
fn a_kill_keeps_completed_writes_and_any_part_of_those_in_flight() {
    let kill = |seed| {
        let mut disk = disk(seed);
        write(&mut disk, 1, 1);
        start(&mut disk, 2, 2);
        disk.kill();
        assert_eq!(read(&mut disk, 1), [1; BLOCK]);
        read(&mut disk, 2)
    };
    assert!(count(|seed| kill(seed) == [0; BLOCK]) > 0);
    assert!(count(|seed| kill(seed).contains(&0) && kill(seed).contains(&2)) > 0);
}

#[test]
fn a_durable_write_survives_and_older_cached_data_does_not_come_over_it() {
    for seed in 0..200 {
        let mut disk = disk(seed);
        write(&mut disk, 1, 1);
        let (index, _) = disk.start_write(BLOCK as u64, &[2; BLOCK], true);
        disk.finish(index, &mut []).unwrap();
        disk.cut_power();
        assert_eq!(read(&mut disk, 1), [2; BLOCK]);
    }
}

#[test]
fn a_durable_write_does_not_put_older_cached_data_over_newer() {
    for seed in 0..200 {
        let mut disk = disk(seed);
        write(&mut disk, 1, 1);
        let (index, _) = disk.start_write(BLOCK as u64, &[2; 2 * BLOCK], false);
        disk.finish(index, &mut []).unwrap();
        let (index, _) = disk.start_write(2 * BLOCK as u64, &[3; BLOCK], true);
        disk.finish(index, &mut []).unwrap();
        sync(&mut disk);
        disk.cut_power();
        assert_eq!((read(&mut disk, 1), read(&mut disk, 2)), (vec![2; BLOCK], vec![3; BLOCK]));
    }
}

#[test]
fn a_failed_sync_may_lose_what_it_covered_and_a_second_one_does_not_bring_it_back() {
    let lost = count(|seed| {
        let mut disk = disk(seed);
        write(&mut disk, 1, 1);
        disk.faults.sync_errors = 1_000_000;
        let (index, _) = disk.start_sync();
        disk.finish(index, &mut []).unwrap_err();
        disk.faults.sync_errors = 0;
        sync(&mut disk);
        disk.cut_power();
        read(&mut disk, 1) == [0; BLOCK]
    });
    assert!((50..150).contains(&lost), "{lost} of 200");
}

/// The ranges on both sides of the page that starts here.
fn all_but(page_start: u64) -> [std::ops::Range<u64>; 2] {
    [0..page_start, page_start + BLOCK as u64..u64::MAX]
}

#[test]
fn bits_flip_only_in_old_pages_and_can_be_flipped_back() {
    // Small, so that the few draws for a page hit the wanted one.
    let mut disk = Disk::new(1 << 15, Random::new(1));
    write(&mut disk, 1, 1);
    sync(&mut disk);
    assert_eq!(disk.flip_bits(1, &[]), 0, "no later sync proves that the page was once whole");
    for block in 2..7 {
        write(&mut disk, block, 2);
        sync(&mut disk);
    }
    assert_eq!(disk.flip_bits(1, &all_but(BLOCK as u64)), 1);
    assert_ne!(read(&mut disk, 1), [1; BLOCK]);
    disk.repair_rot();
    assert_eq!(read(&mut disk, 1), [1; BLOCK]);
    assert_eq!(disk.flip_bits(1, &all_but(BLOCK as u64)), 1);
    write(&mut disk, 1, 9);
    assert!(disk.is_rotten(), "a power cut could bring the bad page back");
    sync(&mut disk);
    assert!(!disk.is_rotten());
    disk.repair_rot();
    assert_eq!(read(&mut disk, 1), [9; BLOCK]);
}

#[test]
fn lost_and_misdirected_writes_report_success() {
    let mut disk = disk(1);
    disk.faults.lost_writes = 1_000_000;
    write(&mut disk, 1, 1);
    assert_eq!(read(&mut disk, 1), [0; BLOCK]);
    disk.faults.lost_writes = 0;
    disk.faults.misdirected_writes = 1_000_000;
    write(&mut disk, 1, 1);
    assert_eq!((0..256).filter(|block| read(&mut disk, *block).contains(&1)).count(), 1);
    assert_eq!(disk.counts.lies, 2);
}
