//! Histories with a known verdict.

use super::{Answer, ChangeId, ChangeKind, Crash, Oracle, Promises, stamp};

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;

fn oracle(durable_acks: bool) -> Oracle {
    Oracle::new(0, 1 << 20, Promises { durable_acks, atomic_window_bytes: 1 << 20 })
}

impl Oracle {
    fn begin(&mut self, offset: u64, length: u64) -> ChangeId {
        self.begin_change(ChangeKind::Write, offset, length, false)
    }

    fn done(&mut self, id: ChangeId) {
        self.finish_change(id, Answer::Done);
    }

    fn write(&mut self, offset: u64, length: u64) -> ChangeId {
        let id = self.begin(offset, length);
        self.done(id);
        id
    }

    fn flush(&mut self) {
        let start = self.begin_flush();
        self.finish_flush(start);
    }

    /// Reads one sector and finds what `id` put there; `None` for zeroes.
    fn saw(&mut self, sector: u64, id: Option<ChangeId>) {
        let start = self.begin_read();
        self.finish_read(start, sector * SECTOR, &content(sector, id));
    }

    /// Would that be refused?
    fn refuses(&mut self, sector: u64, id: Option<ChangeId>) -> bool {
        let attempt = std::panic::AssertUnwindSafe(|| self.saw(sector, id));
        std::panic::catch_unwind(attempt).is_err()
    }
}

fn content(sector: u64, id: Option<ChangeId>) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    if let Some(id) = id {
        stamp::fill(&mut bytes, 0, id.0, sector);
    }
    bytes
}

#[test]
fn an_answered_write_is_read_and_what_was_before_is_not() {
    let mut oracle = oracle(false);
    let old = oracle.write(0, BLOCK);
    let new = oracle.write(SECTOR, SECTOR);
    oracle.saw(0, Some(old));
    oracle.saw(1, Some(new));
    oracle.saw(8, None);
    assert!(oracle.refuses(1, Some(old)));
    assert!(oracle.refuses(1, None));
    assert!(oracle.refuses(8, Some(old)), "a sector in another place");
}

#[test]
fn a_write_under_way_may_be_seen_or_not_but_not_unseen_again() {
    let mut oracle = oracle(false);
    let old = oracle.write(0, SECTOR);
    let new = oracle.begin(0, SECTOR);
    oracle.saw(0, Some(old));
    oracle.saw(0, Some(new));
    assert!(oracle.refuses(0, Some(old)));
}

#[test]
fn a_read_that_overlaps_a_write_may_return_either() {
    let mut oracle = oracle(false);
    let old = oracle.write(0, SECTOR);
    let start = oracle.begin_read();
    let new = oracle.write(0, SECTOR);
    oracle.finish_read(start, 0, &content(0, Some(old)));
    oracle.saw(0, Some(new));
    assert!(oracle.refuses(0, Some(old)), "this read began after the write was answered");
}

#[test]
fn concurrent_writes_have_one_order_for_all_readers() {
    let mut oracle = oracle(false);
    let (one, other) = (oracle.begin(0, SECTOR), oracle.begin(0, SECTOR));
    oracle.done(one);
    oracle.done(other);
    oracle.saw(0, Some(one));
    assert!(oracle.refuses(0, Some(other)), "both were answered, and the first read shows which is on top");
}

#[test]
fn torn_and_foreign_sectors_are_refused() {
    let mut oracle = oracle(false);
    let (one, other) = (oracle.write(0, SECTOR), oracle.begin(0, SECTOR));
    let mut bytes = content(0, Some(one));
    bytes[256..].copy_from_slice(&content(0, Some(other))[256..]);
    let start = oracle.begin_read();
    let attempt = std::panic::AssertUnwindSafe(|| oracle.finish_read(start, 0, &bytes));
    assert!(std::panic::catch_unwind(attempt).is_err());
}

#[test]
fn parts_of_sectors_are_compared_too() {
    let mut oracle = oracle(false);
    let id = oracle.write(0, BLOCK);
    let mut bytes = content(0, Some(id));
    bytes.extend(content(1, Some(id)));
    let start = oracle.begin_read();
    oracle.finish_read(start, 100, &bytes[100..700]);
    bytes[699] ^= 1;
    let start = oracle.begin_read();
    let attempt = std::panic::AssertUnwindSafe(|| oracle.finish_read(start, 100, &bytes[100..700]));
    assert!(std::panic::catch_unwind(attempt).is_err());
}

#[test]
fn a_kill_loses_no_answered_write_and_settles_the_others() {
    let mut oracle = oracle(false);
    let answered = oracle.write(0, SECTOR);
    let open = oracle.begin(SECTOR, SECTOR);
    oracle.crash(Crash::Kill);
    assert!(oracle.refuses(0, None));
    oracle.saw(0, Some(answered));
    oracle.saw(1, None);
    assert!(oracle.refuses(1, Some(open)), "it was not there after the crash and cannot come later");
}

#[test]
fn a_power_cut_takes_back_what_no_flush_covered() {
    for durable_acks in [false, true] {
        let mut oracle = oracle(durable_acks);
        let flushed = oracle.write(0, SECTOR);
        oracle.flush();
        let late = oracle.write(0, SECTOR);
        oracle.crash(Crash::PowerCut);
        assert_eq!(oracle.refuses(0, Some(flushed)), durable_acks);
        assert_eq!(oracle.refuses(0, Some(late)), !durable_acks, "the first read has decided");
        assert!(oracle.refuses(0, None));
    }
}

#[test]
fn a_flush_does_not_cover_a_write_that_was_answered_after_it_began() {
    let mut oracle = oracle(false);
    let start = oracle.begin_flush();
    oracle.write(0, SECTOR);
    oracle.finish_flush(start);
    oracle.crash(Crash::PowerCut);
    oracle.saw(0, None);
}

#[test]
fn fua_and_an_orderly_stop_are_as_good_as_a_flush() {
    let mut oracle = oracle(false);
    let id = oracle.begin_change(ChangeKind::Write, 0, SECTOR, true);
    oracle.done(id);
    oracle.write(SECTOR, SECTOR);
    oracle.drain();
    oracle.crash(Crash::PowerCut);
    assert!(oracle.refuses(0, None));
    assert!(oracle.refuses(1, None));
}

#[test]
fn what_was_read_after_a_crash_survives_the_next_one() {
    let mut oracle = oracle(false);
    let id = oracle.write(0, SECTOR);
    oracle.crash(Crash::PowerCut);
    oracle.saw(0, Some(id));
    oracle.crash(Crash::PowerCut);
    assert!(oracle.refuses(0, None), "recovery had made it stable");
}

#[test]
fn an_unanswered_block_write_is_whole_or_absent_after_a_crash() {
    for (first, second, good) in
        [(true, true, true), (false, false, true), (true, false, false), (false, true, false)]
    {
        let mut oracle = oracle(false);
        let old = oracle.write(0, 2 * BLOCK);
        let new = oracle.begin(0, 2 * BLOCK);
        oracle.crash(Crash::Kill);
        let pick = |seen: bool| Some(if seen { new } else { old });
        oracle.saw(0, pick(first));
        assert_eq!(!oracle.refuses(15, pick(second)), good);
    }
}

#[test]
fn atomicity_is_not_asked_where_a_later_write_lies_over_it() {
    let mut oracle = oracle(false);
    let first = oracle.begin(0, 2 * BLOCK);
    let second = oracle.begin(BLOCK, BLOCK);
    oracle.crash(Crash::Kill);
    oracle.saw(0, Some(first));
    oracle.saw(15, Some(second));
}

#[test]
fn a_failed_write_may_surface_after_a_crash_and_only_then_for_good() {
    let mut oracle = oracle(false);
    let failed = oracle.begin(0, SECTOR);
    oracle.finish_change(failed, Answer::Failed);
    oracle.saw(0, None);
    oracle.crash(Crash::Kill);
    oracle.saw(0, Some(failed));
    assert!(oracle.refuses(0, None));
}

#[test]
fn the_edges_of_a_trim_may_stay() {
    let mut oracle = oracle(false);
    let id = oracle.write(0, 3 * BLOCK);
    let trim = oracle.begin_change(ChangeKind::Trim, SECTOR, 2 * BLOCK, false);
    oracle.done(trim);
    oracle.saw(1, Some(id));
    oracle.saw(2, None);
    assert!(oracle.refuses(8, Some(id)));
    oracle.saw(8, None);
}

#[test]
fn status_may_call_only_zeroes_a_hole() {
    let mut oracle = oracle(false);
    oracle.write(BLOCK, BLOCK);
    let start = oracle.begin_read();
    oracle.check_zeroes(start, 0, BLOCK);
    let attempt = std::panic::AssertUnwindSafe(|| oracle.check_zeroes(start, 0, 2 * BLOCK));
    assert!(std::panic::catch_unwind(attempt).is_err());
}

#[test]
fn long_histories_of_one_sector_stay_short_lists() {
    let mut oracle = oracle(true);
    for _ in 0..1_000 {
        oracle.write(0, SECTOR);
    }
    assert!(oracle.sectors[0].len() <= super::NODES_BEFORE_PRUNING + 1, "{}", oracle.sectors[0].len());
}
