use super::*;

const OWN: NodeId = NodeId(1);
const A: NodeId = NodeId(2);
const VOLUME: VolumeNumber = VolumeNumber(9);
const SECOND_NS: u64 = 1_000_000_000;

fn at(milliseconds: u64) -> Moment {
    Moment::default().after_ms(milliseconds)
}

/// A head of two replicas, and what they hold.
struct Bench {
    checks: Checks,
    now: Moment,
    members: Vec<(NodeId, Reach)>,
    pending: bool,
    busy: bool,
    turns: Vec<Turn>,
}

impl Bench {
    fn new(size_blocks: u64, period_ns: u64) -> Bench {
        let mut checks = Checks::new(VOLUME, Bugs::none(), period_ns);
        checks.begin(at(0), size_blocks, 0);
        let members = vec![(OWN, Reach::Follows), (A, Reach::Follows)];
        Bench { checks, now: at(0), members, pending: false, busy: false, turns: Vec::new() }
    }

    fn turn(&mut self) -> Option<Turn> {
        let view = View {
            own: OWN,
            members: &self.members,
            committed: 7,
            is_pending: &|_, _| self.pending,
            repairs_under_way: false,
            clients_are_busy: self.busy,
        };
        let turn = self.checks.turn(self.now, &view);
        self.turns.extend(turn.clone());
        turn
    }

    /// The next question, whatever must be let go before.
    fn ask(&mut self) -> (u64, u32, u32) {
        for _ in 0..10 {
            match self.turn() {
                Some(Turn::Ask { check, block, count, members }) => {
                    assert_eq!(members, [OWN, A]);
                    return (check, block, count);
                }
                Some(Turn::Forget | Turn::Unlock { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        panic!("nobody is asked");
    }

    fn answer(&mut self, node: NodeId, (check, _, count): (u64, u32, u32), damaged: u64, crc: u32) {
        let answer = Answer::Digest { damaged, checksums: vec![crc; count as usize] };
        self.checks.answered(node, check, answer, None);
    }

    fn both_answer(&mut self, asked: (u64, u32, u32)) {
        self.answer(OWN, asked, 0, 1);
        self.answer(A, asked, 0, 1);
    }

    fn end(&mut self) -> CheckReport {
        while let Some(turn) = self.turn() {
            assert!(matches!(turn, Turn::Forget | Turn::Unlock { .. }), "{turn:?}");
        }
        let last = std::iter::from_fn(|| self.checks.poll_report()).last();
        last.expect("it tells of its end")
    }
}

#[test]
fn a_volume_is_compared_piece_by_piece() {
    let mut bench = Bench::new(150, 0);
    bench.checks.verify(3);
    for (first, length) in [(0, 64), (64, 64), (128, 22)] {
        let asked = bench.ask();
        assert_eq!((asked.1, asked.2), (first, length));
        assert_eq!(bench.turn(), None, "the answers are missing");
        bench.both_answer(asked);
    }
    let report = bench.end();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.purpose, report.compared_blocks), (Purpose::Verify(3), 150));
    assert_eq!((&report.members[..], report.sequences), (&[OWN, A][..], (7, 7)));
    assert_eq!((bench.checks.poll_timeout(), bench.checks.is_verifying()), (None, false));
}

#[test]
fn leaves_that_nobody_has_are_passed_over() {
    let mut bench = Bench::new(100 * 512, 0);
    bench.checks.verify(3);
    for _ in 0..8 {
        let asked = bench.ask();
        assert!(asked.1 < 512);
        let digest = || Answer::Digest { damaged: 0, checksums: vec![0; 64] };
        bench.checks.answered(OWN, asked.0, digest(), None);
        // Only the other one has it.
        bench.checks.answered(A, asked.0, digest(), Some(70));
    }
    assert_eq!(bench.ask().1, 70 * 512);
}

#[test]
fn what_a_change_has_spoiled_is_asked_again_and_then_changes_are_held_up() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    for _ in 0..2 {
        let asked = bench.ask();
        bench.answer(OWN, asked, 0, 1);
        bench.checks.note_change(63, 1);
        // It would be a difference.
        bench.answer(A, asked, 0, 2);
    }
    let Some(Turn::Lock { lock, block: 0, count: 64 }) = bench.turn() else { panic!("{:?}", bench.turns) };
    assert_eq!(bench.turn(), None, "changes are under way");
    assert!(bench.checks.locked(bench.now, lock));
    let asked = bench.ask();
    bench.both_answer(asked);
    assert!(bench.end().is_clean());
    assert!(bench.turns.contains(&Turn::Unlock { lock }));
    assert!(!bench.checks.locked(bench.now, lock), "nobody wants it any more");
    assert_eq!(bench.checks.counters().disturbed, 2);
}

#[test]
fn nobody_is_held_up_for_long_by_a_member_that_is_silent() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    bench.pending = true;
    for _ in 0..2 {
        assert_eq!(bench.turn(), None);
        bench.now = bench.checks.poll_timeout().expect("it looks again");
    }
    let Some(Turn::Lock { lock, .. }) = bench.turn() else { panic!("{:?}", bench.turns) };
    bench.pending = false;
    assert!(bench.checks.locked(bench.now, lock));
    let asked = bench.ask();
    bench.answer(OWN, asked, 0, 1);
    let held_until = bench.checks.poll_timeout().expect("it lets go");
    assert!(held_until.since_ns(bench.now) <= SECOND_NS / 2);
    bench.now = held_until;
    assert_eq!(bench.turn(), Some(Turn::Unlock { lock }));
    // An answer that comes too late is of an attempt that is over.
    bench.answer(A, asked, 0, 2);
    let mut asked = bench.ask();
    while bench.checks.is_verifying() {
        bench.now = bench.checks.poll_timeout().expect("it gives up some time");
        match bench.turn() {
            Some(Turn::Ask { check, block, count, .. }) => asked = (check, block, count),
            None | Some(Turn::Forget) => {}
            other => panic!("{other:?}"),
        }
        bench.answer(OWN, asked, 0, 1);
    }
    assert_eq!(bench.end().state, PassState::Ended(EndReason::Silent(A)));
    assert!(bench.now <= at(20_000), "{:?}", bench.now);
}

#[test]
fn damage_is_made_good_and_looked_at_again() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    let asked = bench.ask();
    bench.answer(OWN, asked, 0b110, 1);
    bench.answer(A, asked, 0b1000, 1);
    assert_eq!(bench.turn(), Some(Turn::Repair { check: asked.0, runs: vec![(1, 2)] }));
    assert_eq!(bench.turn(), None);
    bench.checks.repair_ended(asked.0);
    let asked = bench.ask();
    bench.answer(OWN, asked, 0, 1);
    bench.answer(A, asked, 0b1000, 1);
    assert_eq!(bench.turn(), Some(Turn::Mend { check: asked.0, member: A, block: 3, count: 1 }));
    assert_eq!(bench.turn(), None);
    bench.checks.mended(A, asked.0, 3, 1);
    let asked = bench.ask();
    bench.both_answer(asked);
    let report = bench.end();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.repaired_blocks, report.compared_blocks), (3, 64));
}

#[test]
fn what_stays_damaged_is_told_in_the_end() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    let mut rounds = 0;
    loop {
        let asked = bench.ask();
        bench.answer(OWN, asked, 0, 1);
        bench.answer(A, asked, 1, 1);
        let Some(Turn::Mend { check, member, block, count }) = bench.turn() else { break };
        rounds += 1;
        bench.checks.mended(member, check, block, count);
    }
    let report = bench.end();
    assert_eq!((rounds, report.unreadable_blocks, report.repaired_blocks), (4, 1, 0));
    assert_eq!(report.findings[0].holdings, [(OWN, Holding::Content(1)), (A, Holding::Damaged)]);
    assert!(!report.is_clean() && report.state == PassState::Complete);
}

#[test]
fn what_differs_is_told_loudly_and_not_touched() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    let asked = bench.ask();
    bench.answer(OWN, asked, 0, 1);
    bench.answer(A, asked, 0, 2);
    let report = bench.end();
    assert_eq!((report.differing_blocks, report.findings.len()), (64, 64));
    assert!(!report.is_clean());
}

#[test]
fn a_change_of_members_begins_the_piece_anew() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    let first = bench.ask();
    bench.answer(OWN, first, 0, 1);
    bench.members[1].1 = Reach::Away;
    assert_eq!(bench.turn(), None);
    bench.answer(A, first, 0, 2);
    bench.members[1].1 = Reach::Follows;
    bench.now = bench.now.after_ms(100);
    let second = bench.ask();
    assert_ne!(first.0, second.0);
    bench.both_answer(second);
    assert!(bench.end().is_clean());
}

#[test]
fn a_member_of_an_older_version_is_named() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    bench.members[1].1 = Reach::TooOld;
    assert_eq!(bench.end().state, PassState::Ended(EndReason::TooOld(A)));
}

#[test]
fn one_verifies_at_a_time_and_the_end_of_the_head_ends_it() {
    let mut bench = Bench::new(64, 0);
    bench.checks.verify(3);
    bench.checks.verify(4);
    let refused = bench.checks.poll_report().expect("told at once");
    assert_eq!((refused.purpose, refused.state), (Purpose::Verify(4), PassState::Ended(EndReason::UnderWay)));
    bench.ask();
    bench.checks.end();
    let ended = bench.end();
    assert_eq!((ended.purpose, ended.state), (Purpose::Verify(3), PassState::Ended(EndReason::HeadChanged)));
}

#[test]
fn a_scrub_takes_half_of_its_period_and_lets_clients_go_first() {
    let period_ns = 1_000 * SECOND_NS;
    let mut bench = Bench::new(8 * 64, period_ns);
    let mut times = Vec::new();
    for piece in 0..8 {
        while bench.checks.poll_timeout().expect("it goes on") > bench.now {
            bench.now = bench.checks.poll_timeout().expect("it goes on");
            if piece == 5 && times.len() == 5 && !bench.busy {
                bench.busy = true;
                assert_eq!(bench.turn(), None, "a client is at work");
            }
        }
        bench.busy = false;
        let asked = bench.ask();
        times.push(bench.now);
        bench.both_answer(asked);
        while bench.turn().is_some() {}
    }
    let report = bench.end();
    assert_eq!((report.purpose, report.state.clone()), (Purpose::Scrub, PassState::Complete));
    let took_ns = times[7].since_ns(times[0]);
    assert!((400 * SECOND_NS..=500 * SECOND_NS).contains(&took_ns), "{took_ns}");
    // The next one.
    let next = bench.checks.poll_timeout().expect("another pass");
    assert_eq!(next.since_ns(times[0]), period_ns / 2);
}

#[test]
fn a_scrub_begins_anywhere_and_sees_everything() {
    let mut checks = Checks::new(VOLUME, Bugs::none(), 100 * SECOND_NS);
    checks.begin(at(0), 3 * 512, 700);
    let members = vec![(OWN, Reach::Follows), (A, Reach::Follows)];
    let mut bench = Bench { checks, now: at(0), members, pending: false, busy: false, turns: Vec::new() };
    let mut blocks = Vec::new();
    for _ in 0..24 {
        bench.now = bench.now.max(bench.checks.poll_timeout().expect("it goes on"));
        let asked = bench.ask();
        blocks.push(asked.1);
        let leaf = asked.1 / 512 + 1;
        for node in [OWN, A] {
            let answer = Answer::Digest { damaged: 0, checksums: vec![1; 64] };
            bench.checks.answered(node, asked.0, answer, Some(leaf).filter(|leaf| *leaf < 3));
        }
        while bench.turn().is_some() {}
    }
    assert_eq!(blocks[0], 512);
    blocks.sort_unstable();
    assert_eq!(blocks, (0..24).map(|piece| piece * 64).collect::<Vec<_>>());
    let report = bench.end();
    assert!(report.is_clean() && report.compared_blocks == 3 * 512, "{report:?}");
}
