//! Checking a volume that is led here: its replicas in sync are read and compared piece by piece, and what is damaged at
//! one of them is written again with what another one holds.
//!
//! ```text
//!   scrub:   pass ─── piece ··· piece ··· piece ─── until half of the period is over ─── pass ···   clients first
//!   verify:  pass ─ piece ─ piece ─ piece ─ end                              somebody waits for what it finds
//! ```
//!
//! One piece at a time is under way (`piece`). A pass goes where anything was ever written at any of the replicas: each
//! tells with its answer where the next leaf is that it has. A pass of a scrub begins anywhere, so that heads that never
//! last long see everything in the end.
//!
//! A block that is sound at two replicas and differs is never repaired: nobody knows which is right. It is told.

mod judge;
mod piece;
mod report;
#[cfg(test)]
mod tests;

use super::bugs::Bugs;
use crate::record::{NodeId, VolumeNumber};
use crate::units::Moment;
use crate::wire::peer_message::CHECKED_BLOCKS_MAX;
pub use judge::Answer;
use piece::{Piece, PieceTurn};
pub use report::{CheckCounters, CheckReport, EndReason, FINDINGS_MAX, Finding, Holding, PassState, Purpose};
use std::collections::VecDeque;

/// Blocks of a leaf of the map.
const LEAF_BLOCKS: u32 = 512;
/// A verifying pass tells how far it is after this time.
const TELL_NS: u64 = 500_000_000;
/// A scrub does nothing for so many times as long as its last piece took.
const REST_TIMES: u64 = 20;
/// A scrub that finds clients at work looks again after this time ...
const YIELD_NS: u64 = 20_000_000;
/// ... until it is late by this part of its period.
const LATE_PART: u64 = 16;
/// A scrub that cannot go on tries again after this time.
const STUCK_NS: u64 = 60_000_000_000;

/// Can a replica be asked?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It follows the head.
    Follows,
    /// It does not, or not yet.
    Away,
    /// It does not know the question.
    TooOld,
}

/// How things are, for [`Checks::turn`].
pub struct View<'a> {
    /// The head's own node.
    pub own: NodeId,
    /// The replicas in sync, the own one among them.
    pub members: &'a [(NodeId, Reach)],
    /// Changes up to here are committed.
    pub committed: u64,
    /// Is a change of some of these blocks under way?
    pub is_pending: &'a dyn Fn(u32, u32) -> bool,
    /// Are blocks of the own replica being written again?
    pub repairs_under_way: bool,
    /// Do clients wait for anything?
    pub clients_are_busy: bool,
}

impl std::fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("members", &self.members).finish_non_exhaustive()
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Hold up changes of these blocks; call [`Checks::locked`] when none is under way.
    Lock {
        /// Which lock.
        lock: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// Hold them up no longer, or do not begin to.
    Unlock {
        /// Which lock.
        lock: u64,
    },
    /// Ask these replicas. What the own one reads is kept until the next question, or [`Turn::Forget`].
    Ask {
        /// Which question.
        check: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
        /// Whom.
        members: Vec<NodeId>,
    },
    /// These runs of blocks (first, count) of the own replica are damaged: have them written again with what another one
    /// holds, and call [`Checks::repair_ended`] for each.
    Repair {
        /// For which question.
        check: u64,
        /// The runs.
        runs: Vec<(u32, u32)>,
    },
    /// Send a member these blocks, as they were read from the own replica. No change of them has been numbered since.
    Mend {
        /// For which question.
        check: u64,
        /// Whom.
        member: NodeId,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// What was read is needed no longer.
    Forget,
}

#[derive(Debug)]
struct Pass {
    begun: Moment,
    /// Where it began, and where it goes on.
    first: u32,
    next: u64,
    /// It has come to the end of the volume, and goes on at its beginning.
    wrapped: bool,
    /// When the next piece may begin.
    due: Moment,
    piece: Option<Piece>,
    tell_at: Moment,
    told_percent: u64,
    report: CheckReport,
}

/// Those of one volume, while this node leads it.
#[derive(Debug)]
pub struct Checks {
    volume: VolumeNumber,
    bugs: Bugs,
    /// Every block is seen once in this time; 0: only when somebody asks.
    period_ns: u64,
    /// When the next scrub begins; nothing while this node does not lead.
    next_scrub: Option<Moment>,
    /// Somebody waits for a pass that begins as soon as the piece under way has ended.
    wanted: Option<u64>,
    pass: Option<Box<Pass>>,
    size_blocks: u32,
    /// Where the next scrub begins.
    random: u32,
    /// Numbers of questions and locks; never given twice.
    numbers: u64,
    /// Locks to give back.
    unlocks: VecDeque<u64>,
    forget: bool,
    reports: VecDeque<CheckReport>,
    counters: CheckCounters,
}

impl Checks {
    /// Those of a volume that nobody leads here yet.
    #[must_use]
    pub fn new(volume: VolumeNumber, bugs: Bugs, period_ns: u64) -> Checks {
        Checks {
            volume,
            bugs,
            period_ns,
            next_scrub: None,
            wanted: None,
            pass: None,
            size_blocks: 0,
            random: 0,
            numbers: 0,
            unlocks: VecDeque::new(),
            forget: false,
            reports: VecDeque::new(),
            counters: CheckCounters::default(),
        }
    }

    /// The volume is served here from now on. A scrub begins at a block that `random` chooses.
    pub fn begin(&mut self, now: Moment, size_blocks: u64, random: u64) {
        self.size_blocks = u32::try_from(size_blocks.min(u64::from(u32::MAX))).expect("just bounded");
        self.random = u32::try_from(random % size_blocks.max(1)).unwrap_or(0);
        // Not all volumes of a node at once, right after its start.
        let wait_ns = self.period_ns / 1000 * (1 + random % 16);
        self.next_scrub = (self.period_ns > 0).then(|| now.after_ns(wait_ns));
    }

    /// It is not, or not any more.
    pub fn end(&mut self) {
        self.next_scrub = None;
        if let Some(pass) = self.pass.take() {
            self.end_pass(*pass, PassState::Ended(EndReason::HeadChanged));
        }
        if let Some(verify) = self.wanted.take() {
            self.reports.push_back(CheckReport::refused(self.volume, verify, EndReason::HeadChanged));
        }
    }

    /// Somebody wants the volume, which is served here, verified.
    pub fn verify(&mut self, verify: u64) {
        let busy = self.wanted.is_some()
            || self.pass.as_ref().is_some_and(|pass| matches!(pass.report.purpose, Purpose::Verify(_)));
        if busy {
            self.reports.push_back(CheckReport::refused(self.volume, verify, EndReason::UnderWay));
        } else {
            self.wanted = Some(verify);
        }
    }

    /// Is somebody waiting for a pass?
    #[must_use]
    pub fn is_verifying(&self) -> bool {
        let verifies = |pass: &Pass| matches!(pass.report.purpose, Purpose::Verify(_));
        self.wanted.is_some() || self.pass.as_deref().is_some_and(verifies)
    }

    /// The head has numbered a change.
    pub fn note_change(&mut self, block: u32, count: u32) {
        if let Some(piece) = self.piece() {
            piece.note_change(block, count);
        }
    }

    fn piece(&mut self) -> Option<&mut Piece> {
        self.pass.as_mut()?.piece.as_mut()
    }

    /// No change of the lock's blocks is under way, and none will be until [`Turn::Unlock`]. False if nobody wants it any
    /// more.
    pub fn locked(&mut self, now: Moment, lock: u64) -> bool {
        self.piece().is_some_and(|piece| piece.locked(now, lock))
    }

    /// A replica has answered.
    pub fn answered(&mut self, member: NodeId, check: u64, answer: Answer, next_leaf: Option<u32>) {
        if let Some(piece) = self.piece() {
            piece.answered(member, check, answer, next_leaf);
        }
    }

    /// A run of the own replica's damaged blocks was written again, or nobody could give it.
    pub fn repair_ended(&mut self, check: u64) {
        if let Some(piece) = self.piece() {
            piece.repair_ended(check);
        }
    }

    /// A member has written these blocks again.
    pub fn mended(&mut self, member: NodeId, check: u64, block: u32, count: u32) {
        if let Some(piece) = self.piece() {
            piece.mended(member, check, block, count);
        }
    }

    /// Is what the own replica has read for this question still of use?
    #[must_use]
    pub fn is_asking(&self, check: u64) -> bool {
        let piece = self.pass.as_ref().and_then(|pass| pass.piece.as_ref());
        piece.is_some_and(|piece| piece.is_asking(check))
    }

    /// May [`Self::turn`] have something to do?
    #[must_use]
    pub fn wants_turn(&self, now: Moment) -> bool {
        let due = self.poll_timeout().is_some_and(|at| at <= now);
        let piece = self.pass.as_ref().is_some_and(|pass| pass.piece.is_some());
        due || piece || self.wanted.is_some() || self.forget || !self.unlocks.is_empty()
    }

    /// The next report.
    pub fn poll_report(&mut self) -> Option<CheckReport> {
        self.reports.pop_front()
    }

    /// What all passes have done.
    #[must_use]
    pub fn counters(&self) -> CheckCounters {
        let under_way = self.pass.as_deref().map(|pass| &pass.report);
        under_way.map_or(self.counters, |report| self.counters.with(report))
    }

    /// The next thing to do.
    pub fn turn(&mut self, now: Moment, view: &View<'_>) -> Option<Turn> {
        loop {
            if let Some(lock) = self.unlocks.pop_front() {
                return Some(Turn::Unlock { lock });
            }
            if std::mem::take(&mut self.forget) {
                return Some(Turn::Forget);
            }
            let between_pieces = self.pass.as_ref().is_none_or(|pass| pass.piece.is_none());
            if between_pieces && let Some(verify) = self.wanted.take() {
                self.begin_pass(now, Purpose::Verify(verify), 0);
            }
            if self.pass.is_none() {
                if self.next_scrub.is_none_or(|at| at > now) {
                    return None;
                }
                let first = self.random / LEAF_BLOCKS * LEAF_BLOCKS;
                self.begin_pass(now, Purpose::Scrub, first);
            }
            if !self.has_piece(now, view) {
                if self.pass.is_some() {
                    return None;
                }
                continue;
            }
            let Checks { pass, numbers, bugs, .. } = self;
            let pass = pass.as_mut().expect("it has a piece");
            let Pass { piece, report, .. } = &mut **pass;
            let piece = piece.as_mut().expect("just seen");
            let before = piece.spoiled;
            let turn = piece.turn(now, view, numbers, report, *bugs);
            self.counters.disturbed += u64::from(piece.spoiled.saturating_sub(before));
            match turn {
                PieceTurn::Nothing => return None,
                PieceTurn::Do(turn) => return Some(turn),
                PieceTurn::Over => self.end_piece(now),
                PieceTurn::GiveUp(reason) => self.give_up(now, reason),
            }
        }
    }

    fn begin_pass(&mut self, now: Moment, purpose: Purpose, first: u32) {
        if let Some(pass) = self.pass.take() {
            // A scrub gives way to somebody who waits: what it would have seen is seen now.
            self.counters = self.counters.with(&pass.report);
        }
        let mut pass = Box::new(Pass {
            begun: now,
            first,
            next: u64::from(first),
            wrapped: false,
            due: now,
            piece: None,
            tell_at: now.after_ns(TELL_NS),
            told_percent: 0,
            report: CheckReport::new(self.volume, purpose, self.size_blocks.into()),
        });
        pass.report.passed_blocks = 0;
        self.reports.push_back(pass.report.clone());
        self.pass = Some(pass);
    }

    /// Is there a piece under way, or may the next one begin? If there is none left the pass ends.
    fn has_piece(&mut self, now: Moment, view: &View<'_>) -> bool {
        let (size, late_ns) = (self.size_blocks, self.period_ns / LATE_PART);
        let pass = self.pass.as_mut().expect("the caller looked");
        if pass.piece.is_some() {
            return true;
        }
        if pass.next >= u64::from(size) && !pass.wrapped {
            (pass.wrapped, pass.next) = (true, 0);
        }
        if pass.wrapped && pass.next >= u64::from(pass.first) {
            let pass = self.pass.take().expect("just seen");
            self.end_pass(*pass, PassState::Complete);
            self.next_scrub = self.next_scrub.map(|at| at.max(now));
            return false;
        }
        let scrubs = pass.report.purpose == Purpose::Scrub;
        if pass.due > now {
            return false;
        }
        if scrubs && view.clients_are_busy && pass.ideal_due(self.period_ns, size).after_ns(late_ns) > now {
            pass.due = now.after_ns(YIELD_NS);
            return false;
        }
        let block = u32::try_from(pass.next).expect("below the volume's size");
        let count = CHECKED_BLOCKS_MAX.min(size - block);
        pass.piece = Some(Piece::new(now, block, count));
        true
    }

    /// The piece is judged: on to the next, when its time comes.
    fn end_piece(&mut self, now: Moment) {
        let (period_ns, size) = (self.period_ns, self.size_blocks);
        let pass = self.pass.as_mut().expect("a piece of a pass");
        let mut piece = pass.piece.take().expect("the caller looked");
        self.unlocks.extend(piece.take_lock());
        self.forget = true;
        let end = u64::from(piece.block) + u64::from(piece.count);
        let leaf_blocks = u64::from(LEAF_BLOCKS);
        let next_leaf = piece.next_leaf.map_or(u64::MAX, |leaf| u64::from(leaf) * leaf_blocks);
        // Up to the next leaf nobody has anything.
        pass.next = if end.is_multiple_of(leaf_blocks) { next_leaf.min(size.into()) } else { end };
        pass.report.passed_blocks = pass.passed(size);
        if pass.report.purpose == Purpose::Scrub {
            let rested = now.after_ns(now.since_ns(piece.begun) * REST_TIMES);
            pass.due = pass.ideal_due(period_ns, size).max(rested);
        }
        let percent = pass.report.passed_blocks * 100 / u64::from(size.max(1));
        let tells = match pass.report.purpose {
            Purpose::Verify(_) => pass.tell_at <= now,
            Purpose::Scrub => percent > pass.told_percent,
        };
        if tells {
            (pass.tell_at, pass.told_percent) = (now.after_ns(TELL_NS), percent);
            self.reports.push_back(pass.report.clone());
        }
    }

    /// The piece has no end: whoever waits is told, and a scrub tries again later.
    fn give_up(&mut self, now: Moment, reason: EndReason) {
        let pass = self.pass.as_mut().expect("a piece of a pass");
        let mut piece = pass.piece.take().expect("the caller looked");
        self.unlocks.extend(piece.take_lock());
        self.forget = true;
        if pass.report.purpose == Purpose::Scrub {
            pass.due = now.after_ns(STUCK_NS);
        } else {
            let pass = self.pass.take().expect("just seen");
            self.end_pass(*pass, PassState::Ended(reason));
        }
    }

    fn end_pass(&mut self, mut pass: Pass, state: PassState) {
        if let Some(mut piece) = pass.piece.take() {
            self.unlocks.extend(piece.take_lock());
            self.forget = true;
        }
        if state == PassState::Complete {
            self.counters.passes += 1;
            pass.report.passed_blocks = self.size_blocks.into();
            // What was verified need not be scrubbed before its time.
            self.next_scrub = self.next_scrub.map(|_| pass.begun.after_ns(self.period_ns / 2));
        }
        pass.report.state = state;
        self.counters = self.counters.with(&pass.report);
        self.reports.push_back(pass.report);
    }

    /// When to call [`Self::turn`] though nothing has happened.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        match &self.pass {
            Some(pass) => match &pass.piece {
                Some(piece) => piece.poll_timeout(),
                None => Some(pass.due),
            },
            None => self.next_scrub,
        }
    }
}

impl Pass {
    /// Blocks of the volume that it has come by.
    fn passed(&self, size: u32) -> u64 {
        let end = if self.wrapped { u64::from(size) + self.next } else { self.next };
        (end - u64::from(self.first)).min(size.into())
    }

    /// When its next piece is due, so that it ends when half of the period is over: the other half is for what comes
    /// between.
    fn ideal_due(&self, period_ns: u64, size: u32) -> Moment {
        let whole = u128::from(size.max(1));
        let due_ns = u128::from(period_ns / 2) * u128::from(self.passed(size)) / whole;
        self.begun.after_ns(u64::try_from(due_ns).expect("less than the period"))
    }
}
