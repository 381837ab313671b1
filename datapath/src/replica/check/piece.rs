//! One piece of a pass: asked of all replicas in sync, judged, made good, asked again.
//!
//! ```text
//!   waiting ──▶ asking ──▶ judged: alike and sound, or no help for it ──▶ over
//!      ▲          │           │
//!      │          │           └─▶ repairing (the head's own) or mending (a member's)
//!      └──────────┴───────────────────────────┘
//!       a change of these blocks came, a member is silent or has left
//! ```
//!
//! The answers are comparable if no change of these blocks was under way when they were asked for and none was numbered
//! before the last one came: then each replica holds there what was committed when the piece was asked for, and nothing
//! later. After two attempts that a change has spoiled, changes of the piece are held up until the answers are here: by the
//! lock that a write of a part of a block takes, and for half a second at the most.

use std::collections::VecDeque;

use super::judge::{Answer, Judgement, judge, runs};
use super::report::{CheckReport, EndReason, FINDINGS_MAX};
use super::{Reach, Turn, View};
use crate::record::NodeId;
use crate::replica::bugs::{Bugs, PlantedBug};
use crate::units::Moment;

/// A member that does not answer for so long is asked again.
const ANSWER_NS: u64 = 3_000_000_000;
/// For so long changes are held up.
const HOLD_NS: u64 = 500_000_000;
/// A piece that has no answers after this time has none.
const PIECE_NS: u64 = 15_000_000_000;
/// Between two looks at changes that are under way, or at a member that is away.
const AGAIN_NS: u64 = 2_000_000;
const AWAY_NS: u64 = 50_000_000;
/// Attempts before changes are held up.
const FREE_TRIES: u32 = 2;
/// Times that a piece is made good: what is damaged again after that stays so.
const ROUNDS_MAX: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lock {
    None,
    Wanted(u64),
    Held { lock: u64, since: Moment },
}

#[derive(Debug)]
enum Stage {
    Waiting {
        at: Moment,
    },
    Asking {
        check: u64,
        until: Moment,
        sequence: u64,
        disturbed: bool,
        answers: Vec<(NodeId, Option<Answer>)>,
    },
    Repairing {
        check: u64,
        left: usize,
    },
    Mending {
        check: u64,
        until: Moment,
        unsent: VecDeque<(NodeId, u32, u32)>,
        awaited: Vec<(NodeId, u32, u32)>,
    },
}

/// What comes of a piece's turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PieceTurn {
    Nothing,
    Do(Turn),
    Over,
    GiveUp(EndReason),
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) block: u32,
    pub(super) count: u32,
    pub(super) begun: Moment,
    /// The first leaf behind it that anybody has.
    pub(super) next_leaf: Option<u32>,
    /// Attempts that a change has spoiled.
    pub(super) spoiled: u32,
    rounds: u32,
    damaged: Vec<(NodeId, u64)>,
    /// Who was not there or did not answer.
    blamed: Option<NodeId>,
    lock: Lock,
    stage: Stage,
}

impl Piece {
    pub(super) fn new(now: Moment, block: u32, count: u32) -> Piece {
        Piece {
            block,
            count,
            begun: now,
            next_leaf: None,
            spoiled: 0,
            rounds: 0,
            damaged: Vec::new(),
            blamed: None,
            lock: Lock::None,
            stage: Stage::Waiting { at: now },
        }
    }

    fn overlaps(&self, block: u32, count: u32) -> bool {
        self.block < block + count && block < self.block + self.count
    }

    pub(super) fn note_change(&mut self, block: u32, count: u32) {
        let overlaps = self.overlaps(block, count);
        if let Stage::Asking { disturbed, .. } = &mut self.stage {
            *disturbed |= overlaps;
        }
    }

    /// The lock that is held or in line, to be given back.
    pub(super) fn take_lock(&mut self) -> Option<u64> {
        match std::mem::replace(&mut self.lock, Lock::None) {
            Lock::None => None,
            Lock::Wanted(lock) | Lock::Held { lock, .. } => Some(lock),
        }
    }

    /// The lock is granted. False if nobody wants it any more.
    pub(super) fn locked(&mut self, now: Moment, granted: u64) -> bool {
        let wanted = self.lock == Lock::Wanted(granted);
        if wanted {
            self.lock = Lock::Held { lock: granted, since: now };
        }
        wanted
    }

    /// A member has answered.
    pub(super) fn answered(&mut self, member: NodeId, asked: u64, answer: Answer, next_leaf: Option<u32>) {
        let Stage::Asking { check, answers, .. } = &mut self.stage else { return };
        let fits = match &answer {
            Answer::Digest { checksums, .. } => checksums.len() == self.count as usize,
            Answer::Unknown => true,
        };
        let found = answers.iter_mut().find(|(node, known)| *node == member && known.is_none());
        if let Some((_, known)) = found.filter(|_| *check == asked && fits) {
            *known = Some(answer);
            self.next_leaf = [self.next_leaf, next_leaf].into_iter().flatten().min();
        }
    }

    /// Damaged blocks of the head's own replica are written again, or nobody could give them.
    pub(super) fn repair_ended(&mut self, asked: u64) {
        if let Stage::Repairing { check, left } = &mut self.stage
            && *check == asked
        {
            *left = left.saturating_sub(1);
        }
    }

    /// A member has written these blocks again.
    pub(super) fn mended(&mut self, member: NodeId, asked: u64, block: u32, count: u32) {
        if let Stage::Mending { check, awaited, .. } = &mut self.stage
            && *check == asked
        {
            awaited.retain(|run| *run != (member, block, count));
        }
    }

    /// Is `check` the question that is asked now, so that the blocks that were read for it are of use?
    pub(super) fn is_asking(&self, asked: u64) -> bool {
        matches!(&self.stage, Stage::Asking { check, .. } if *check == asked)
    }

    pub(super) fn turn(
        &mut self,
        now: Moment,
        view: &View<'_>,
        numbers: &mut u64,
        report: &mut CheckReport,
        bugs: Bugs,
    ) -> PieceTurn {
        if let Lock::Held { since, .. } = self.lock
            && since.after_ns(HOLD_NS) <= now
        {
            if let Stage::Asking { answers, .. } = &self.stage {
                let silent = answers.iter().find(|(_, answer)| answer.is_none());
                self.blamed = silent.map(|(node, _)| *node).or(self.blamed);
                self.stage = Stage::Waiting { at: now };
            }
            // Before changes are held up again, they have had their time.
            self.spoiled = 0;
            return self.unlock();
        }
        loop {
            let turn = match &mut self.stage {
                Stage::Waiting { at } => {
                    let at = *at;
                    return self.turn_waiting(now, at, view, numbers, bugs);
                }
                Stage::Asking { .. } => self.turn_asking(now, view, report, bugs),
                Stage::Repairing { left: 0, .. } => None,
                Stage::Repairing { .. } => return PieceTurn::Nothing,
                Stage::Mending { check, until, unsent, awaited } => {
                    if let Some((member, block, count)) = unsent.pop_front() {
                        return PieceTurn::Do(Turn::Mend { check: *check, member, block, count });
                    }
                    if !awaited.is_empty() && *until > now {
                        return PieceTurn::Nothing;
                    }
                    None
                }
            };
            match turn {
                Some(turn) => return turn,
                None => self.stage = Stage::Waiting { at: now },
            }
        }
    }

    fn unlock(&mut self) -> PieceTurn {
        self.take_lock().map_or(PieceTurn::Nothing, |lock| PieceTurn::Do(Turn::Unlock { lock }))
    }

    fn turn_waiting(
        &mut self,
        now: Moment,
        at: Moment,
        view: &View<'_>,
        numbers: &mut u64,
        bugs: Bugs,
    ) -> PieceTurn {
        if self.begun.after_ns(PIECE_NS) <= now {
            let reason = self.blamed.map_or(EndReason::Changing(self.block), EndReason::Silent);
            return PieceTurn::GiveUp(reason);
        }
        if at > now {
            return PieceTurn::Nothing;
        }
        if view.repairs_under_way {
            self.stage = Stage::Waiting { at: now.after_ns(AGAIN_NS) };
            return PieceTurn::Nothing;
        }
        if let Some((node, reach)) = view.members.iter().find(|(_, reach)| *reach != Reach::Follows) {
            if *reach == Reach::TooOld {
                return PieceTurn::GiveUp(EndReason::TooOld(*node));
            }
            self.blamed = Some(*node);
            self.stage = Stage::Waiting { at: now.after_ns(AWAY_NS) };
            // Nobody is held up for somebody who is not there.
            return self.unlock();
        }
        match self.lock {
            Lock::Wanted(_) => return PieceTurn::Nothing,
            Lock::None if self.spoiled >= FREE_TRIES => {
                *numbers += 1;
                self.lock = Lock::Wanted(*numbers);
                let (lock, block, count) = (*numbers, self.block, self.count);
                return PieceTurn::Do(Turn::Lock { lock, block, count });
            }
            Lock::None | Lock::Held { .. } => {}
        }
        if (view.is_pending)(self.block, self.count) && !bugs.has(PlantedBug::CompareWhileChanging) {
            self.spoiled += 1;
            self.stage = Stage::Waiting { at: now.after_ns(AGAIN_NS) };
            return PieceTurn::Nothing;
        }
        *numbers += 1;
        self.stage = Stage::Asking {
            check: *numbers,
            until: now.after_ns(ANSWER_NS),
            sequence: view.committed,
            disturbed: false,
            answers: view.members.iter().map(|(node, _)| (*node, None)).collect(),
        };
        let members = view.members.iter().map(|(node, _)| *node).collect();
        PieceTurn::Do(Turn::Ask { check: *numbers, block: self.block, count: self.count, members })
    }

    /// None: it is to be asked again.
    fn turn_asking(
        &mut self,
        now: Moment,
        view: &View<'_>,
        report: &mut CheckReport,
        bugs: Bugs,
    ) -> Option<PieceTurn> {
        let Stage::Asking { check, until, sequence, disturbed, answers } = &self.stage else {
            unreachable!("the caller looked")
        };
        let (check, sequence, disturbed) = (*check, *sequence, *disturbed);
        let same = answers.iter().map(|(node, _)| (*node, Reach::Follows)).eq(view.members.iter().copied());
        if !same {
            return None;
        }
        if let Some((silent, _)) = answers.iter().find(|(_, answer)| answer.is_none()) {
            if *until > now {
                return Some(PieceTurn::Nothing);
            }
            self.blamed = Some(*silent);
            return None;
        }
        let known =
            |(node, answer): &(NodeId, Option<Answer>)| (*node, answer.clone().expect("all are here"));
        let answers: Vec<(NodeId, Answer)> = answers.iter().map(known).collect();
        let judgement = judge((self.block, self.count), view.own, &answers, FINDINGS_MAX);
        if disturbed && !bugs.has(PlantedBug::CompareWhileChanging) {
            self.spoiled += 1;
            let mends = bugs.has(PlantedBug::MendOverNewer) && !judgement.to_mend.is_empty();
            return if mends { Some(self.begin_mending(now, check, judgement)) } else { None };
        }
        report.note_sequence(sequence);
        report.note_members(answers.iter().map(|(node, _)| *node));
        report.repaired_blocks += self.count_repaired(&judgement);
        self.damaged.clone_from(&judgement.damaged);
        let may_help = self.rounds < ROUNDS_MAX;
        if may_help && judgement.to_repair != 0 {
            self.rounds += 1;
            let runs = self.places(judgement.to_repair);
            self.stage = Stage::Repairing { check, left: runs.len() };
            return Some(PieceTurn::Do(Turn::Repair { check, runs }));
        }
        if may_help && !judgement.to_mend.is_empty() {
            self.rounds += 1;
            return Some(self.begin_mending(now, check, judgement));
        }
        report.compared_blocks += u64::from(self.count);
        report.differing_blocks += u64::from(judgement.differing.count_ones());
        report.unreadable_blocks += u64::from(judgement.unreadable.count_ones());
        judgement.findings.into_iter().for_each(|finding| report.note_finding(finding));
        Some(PieceTurn::Over)
    }

    /// What was damaged when the piece was judged before, and is sound now.
    fn count_repaired(&self, judgement: &Judgement) -> u64 {
        let before =
            |node| self.damaged.iter().find(|(known, _)| *known == node).map_or(0, |(_, bits)| *bits);
        let repaired = judgement.damaged.iter().map(|(node, bits)| (before(*node) & !bits).count_ones());
        repaired.map(u64::from).sum()
    }

    fn places(&self, bits: u64) -> Vec<(u32, u32)> {
        runs(bits).into_iter().map(|(first, count)| (self.block + first, count)).collect()
    }

    fn begin_mending(&mut self, now: Moment, check: u64, judgement: Judgement) -> PieceTurn {
        let runs = |(node, bits): &(NodeId, u64)| {
            let node = *node;
            self.places(*bits).into_iter().map(move |(block, count)| (node, block, count))
        };
        let awaited: Vec<(NodeId, u32, u32)> = judgement.to_mend.iter().flat_map(runs).collect();
        let mut unsent: VecDeque<_> = awaited.iter().copied().collect();
        let (member, block, count) = unsent.pop_front().expect("the caller looked");
        self.stage = Stage::Mending { check, until: now.after_ns(ANSWER_NS), unsent, awaited };
        PieceTurn::Do(Turn::Mend { check, member, block, count })
    }

    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        let stage = match &self.stage {
            // Whoever has the lock gives it back some time.
            Stage::Waiting { .. } if matches!(self.lock, Lock::Wanted(_)) => {
                Some(self.begun.after_ns(PIECE_NS))
            }
            Stage::Waiting { at } => Some(*at),
            Stage::Asking { until, .. } | Stage::Mending { until, .. } => Some(*until),
            Stage::Repairing { .. } => None,
        };
        let hold = match self.lock {
            Lock::Held { since, .. } => Some(since.after_ns(HOLD_NS)),
            _ => None,
        };
        stage.into_iter().chain(hold).min()
    }
}
