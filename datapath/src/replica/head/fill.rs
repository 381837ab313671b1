//! Filling: a replica that was left out is brought back.
//!
//! ```text
//!   marking ─▶ asking ─▶ comparing ─▶ beginning ─▶ copying ─▶ ending ─▶ following ─▶ admitting ─▶ in sync
//!      │          │          │            │           │          │          │
//!      └──────────┴──────────┴────────────┴───────────┴──────────┴──────────┴── silent or gone: anew, later
//! ```
//!
//! | state | what happens | what ends it |
//! |---|---|---|
//! | marking | the record's change that calls it catching up is under way | the record is read |
//! | asking | it is asked for its promise | it has promised, and the record tells what it has in common with the order |
//! | comparing | it tells what it has beyond that | it has told all |
//! | beginning | its order goes on where the head's is now; every change from here on is sent to it | it has stored that, and the head's own replica has all changes before |
//! | copying | what the head's own replica, or another one in sync, changed after the last change in common, and what the one that is filled has beyond that, is copied; the whole volume if nothing is in common | the last copy was sent |
//! | ending | it stores that it is complete | it has |
//! | following | it is sent changes like the others | it has all that a copy may have told it of, and all that is committed |
//! | admitting | the record's change that takes it in is under way; acknowledgements need it from now on | the record is read |
//!
//! What is copied is at least as new as the first change that is sent, so that nothing lies between; and older than what
//! was numbered when the last copy was made, so that once it has that, it holds a state of the order.

use super::peers::Phase;
use super::view::proposal_of;
use super::{Head, HeadEffect, PROPOSE_AGAIN_NS, Role, Stage};
use crate::record::{NodeId, Stamp};
use crate::replica::bugs::PlantedBug;
use crate::units::Moment;
use std::collections::VecDeque;

/// A replica that is being filled and owes an answer for so long is given up for now.
pub(super) const FILL_PATIENCE_NS: u64 = 2_000_000_000;
/// Before the next attempt after one that failed: doubles up to the most.
pub(super) const FILL_WAIT_NS: u64 = 100_000_000;
/// The most.
pub(super) const FILL_WAIT_NS_MAX: u64 = 5_000_000_000;
/// Before the next attempt with a replica whose pool had no room: doubles up to the most.
const ROOM_WAIT_NS: u64 = 5_000_000_000;
/// The most.
const ROOM_WAIT_NS_MAX: u64 = 300_000_000_000;
/// Pieces that are read, sent, or not known to be taken care of.
const PIECES_UNDER_WAY_MAX: usize = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Marking,
    Asking,
    Comparing,
    Beginning { after: Stamp, stored: bool },
    Copying,
    Ending { last: u64 },
    Following { last: u64 },
    Admitting,
}

/// The fill under way.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) member: NodeId,
    /// Tells it from all others: the epoch, and which one in it.
    number: u64,
    step: Step,
    /// The last change in common.
    base: Stamp,
    /// When something last went on.
    moved_at: Moment,
    /// All before this block was sent.
    next_block: u64,
    /// A piece is being read.
    reading: bool,
    /// Copies that were sent.
    sent: u32,
    /// Copies that are known to be taken care of.
    copied: u32,
    /// For each piece sent that is not known to be taken care of: how many copies that makes.
    sent_through: VecDeque<u32>,
}

/// What a head remembers between fills.
#[derive(Debug)]
pub(super) struct Fills {
    pub(super) now: Option<Fill>,
    /// How many there were in this epoch.
    count: u64,
    /// The one that was tried last: the others have their turn.
    last_tried: NodeId,
    again_at: Moment,
    wait_ns: u64,
    /// Replicas whose pools had no room: when they have their turn again, and how long the next wait is.
    without_room: Vec<(NodeId, Moment, u64)>,
}

impl Fills {
    pub(super) fn new(now: Moment) -> Fills {
        Fills {
            now: None,
            count: 0,
            last_tried: NodeId(0),
            again_at: now,
            wait_ns: FILL_WAIT_NS,
            without_room: Vec::new(),
        }
    }

    /// When the replica may be tried.
    fn due_at(&self, member: NodeId) -> Moment {
        let without_room = self.without_room.iter().find(|(node, ..)| *node == member);
        without_room.map_or(self.again_at, |(_, until, _)| self.again_at.max(*until))
    }

    fn note_no_room(&mut self, now: Moment, member: NodeId) {
        let before = self.without_room.iter().find(|(node, ..)| *node == member);
        let wait_ns = before.map_or(ROOM_WAIT_NS, |(.., wait_ns)| *wait_ns);
        self.without_room.retain(|(node, ..)| *node != member);
        let next_ns = (wait_ns * 2).min(ROOM_WAIT_NS_MAX);
        self.without_room.push((member, now.after_ns(wait_ns), next_ns));
    }

    /// Is no replica being filled?
    pub(super) fn is_idle(&self) -> bool {
        self.now.is_none()
    }

    pub(super) fn is_of(&self, member: NodeId) -> bool {
        self.now.as_ref().is_some_and(|fill| fill.member == member)
    }
}

impl Fills {
    /// The replica without which nothing is acknowledged although it is not in sync yet: if others went on without it, it
    /// might never have all that is committed. The slower of them sets the pace of these last moments.
    pub(super) fn awaited(&self) -> Option<NodeId> {
        self.now.as_ref().filter(|fill| matches!(fill.step, Step::Following { .. })).map(|fill| fill.member)
    }
}

impl Fill {
    /// Its admission is open: it counts like those in sync.
    fn is_admitting(&self) -> bool {
        self.step == Step::Admitting
    }
}

impl Head {
    /// A replica that was left out and can be reached is brought back, one at a time.
    pub(super) fn begin_fill(&mut self, now: Moment) {
        let Some(member) = self.fill_due_at().filter(|at| *at <= now).and_then(|_| self.candidate(now))
        else {
            return;
        };
        let Role::Lead(lead) = &mut self.role else { return };
        lead.fills.count += 1;
        lead.fills.last_tried = member;
        let marked = self.record.catching_up.contains(&member);
        lead.fills.now = Some(Fill {
            member,
            number: u64::from(lead.epoch) << 32 | lead.fills.count,
            step: if marked { Step::Asking } else { Step::Marking },
            base: Stamp::default(),
            moved_at: now,
            next_block: 0,
            reading: false,
            sent: 0,
            copied: 0,
            sent_through: VecDeque::new(),
        });
        if marked {
            return self.ask_filled(now);
        }
        let mut wanted = Box::new(self.record.clone());
        wanted.version += 1;
        wanted.proposal = proposal_of(&self.record);
        wanted.stale.retain(|replica| replica.node != member);
        wanted.catching_up.push(member);
        wanted.catching_up.sort_unstable();
        lead.open = Some((wanted.clone(), now.after_ns(PROPOSE_AGAIN_NS)));
        self.effects.push_back(HeadEffect::Propose(wanted));
    }

    /// Whose turn it is.
    fn candidate(&self, now: Moment) -> Option<NodeId> {
        let fills = &self.lead()?.fills;
        let mut out = self.to_be_filled();
        out.retain(|node| fills.due_at(*node) <= now);
        let next = out.iter().find(|node| **node > fills.last_tried);
        next.or_else(|| out.first()).copied()
    }

    fn to_be_filled(&self) -> Vec<NodeId> {
        let stale = self.record.stale.iter().map(|replica| replica.node);
        let mut out: Vec<NodeId> = self.record.catching_up.iter().copied().chain(stale).collect();
        out.retain(|node| self.reachable.contains(node) && !self.record.leaving.contains(node));
        out.sort_unstable();
        out
    }

    /// When the next fill may begin, if there is anything to fill.
    fn fill_due_at(&self) -> Option<Moment> {
        let lead = self.lead()?;
        let may = lead.stage == Stage::Serving && lead.open.is_none() && lead.fills.now.is_none();
        let due = self.to_be_filled().into_iter().map(|node| lead.fills.due_at(node)).min();
        due.filter(|_| may)
    }

    /// When the fill under way is given up, or the next one may begin.
    pub(super) fn poll_fill_timeout(&self) -> Option<Moment> {
        let lead = self.lead()?;
        match &lead.fills.now {
            Some(fill) if matches!(fill.step, Step::Marking | Step::Admitting) || fill.reading => None,
            Some(fill) => Some(fill.moved_at.after_ns(FILL_PATIENCE_NS)),
            None => self.fill_due_at(),
        }
    }

    /// The replica does not answer.
    pub(super) fn give_up_fill(&mut self, now: Moment) {
        let under_way = self.lead().is_some_and(|lead| lead.fills.now.is_some());
        if under_way && self.poll_fill_timeout().is_some_and(|at| at <= now) {
            self.end_fill(now);
            self.commit(now);
        }
    }

    /// Forgets the fill under way. The replica stays in the record as one that catches up. The caller commits what waited
    /// for it.
    fn end_fill(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(fill) = lead.fills.now.take() else { return };
        lead.peers.keep(|peer| peer.node != fill.member);
        lead.fills.again_at = now.after_ns(lead.fills.wait_ns);
        lead.fills.wait_ns = (lead.fills.wait_ns * 2).min(FILL_WAIT_NS_MAX);
    }

    fn ask_filled(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(fill) = &mut lead.fills.now else { return };
        (fill.step, fill.moved_at) = (Step::Asking, now);
        let member = fill.member;
        lead.peers.add(now, member);
        lead.peers.get_mut(member).expect("just added").enter(Phase::Asked, now);
        self.effects.push_back(HeadEffect::Promise { member, epoch: lead.epoch });
    }

    /// The replica being filled has promised, and `last` is what it can have in common with the order. True if the answer
    /// was that and needs nothing more.
    pub(super) fn filled_promised(&mut self, now: Moment, member: NodeId, last: Stamp) -> bool {
        let wrong = self.bugs.has(PlantedBug::WrongCommonPoint);
        // The ends of epochs that the record keeps begin after a replica was left out, not before one was added.
        let fresh = self.record.fresh.contains(&member);
        let base = if fresh {
            Stamp::default()
        } else if wrong {
            last
        } else {
            self.record.common_point(last)
        };
        let Role::Lead(lead) = &mut self.role else { return false };
        let Some(fill) = lead.fills.now.as_mut().filter(|fill| fill.member == member) else { return false };
        if fill.is_admitting() {
            return false;
        }
        if fill.step == Step::Asking && base == Stamp::default() {
            self.begin_order(now);
        } else if fill.step == Step::Asking {
            (fill.step, fill.base, fill.moved_at) = (Step::Comparing, base, now);
            let (epoch, fill) = (lead.epoch, fill.number);
            self.effects.push_back(HeadEffect::Compare { member, epoch, fill, base });
        }
        true
    }

    /// The replica has told all that it has beyond what is in common, or cannot tell.
    pub fn compared(&mut self, now: Moment, member: NodeId, epoch: u32, number: u64, known: bool) {
        let Some(fill) = self.fill_of(member, epoch, number) else { return };
        if fill.step == Step::Comparing {
            if !known {
                fill.base = Stamp::default();
            }
            self.begin_order(now);
        }
    }

    /// The replica's order goes on where the head's is now.
    fn begin_order(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(fill) = &mut lead.fills.now else { return };
        let (after, member) = (lead.last, fill.member);
        (fill.step, fill.moved_at) = (Step::Beginning { after, stored: false }, now);
        let peer = lead.peers.get_mut(member).expect("asked");
        peer.enter(Phase::Following, now);
        (peer.acked, peer.sent, peer.acked_at) = (after.sequence, after.sequence, now);
        let (epoch, fill) = (lead.epoch, fill.number);
        self.effects.push_back(HeadEffect::Fill { member, epoch, fill, after });
    }

    /// There is a connection to a replica, or not any more.
    pub(super) fn note_reachable(&mut self, now: Moment, node: NodeId, reachable: bool) {
        self.reachable.retain(|other| *other != node);
        if reachable {
            self.reachable.push(node);
        }
        let Role::Lead(lead) = &mut self.role else { return };
        let lost = lead.fills.is_of(node)
            && lead
                .fills
                .now
                .as_ref()
                .is_some_and(|fill| !matches!(fill.step, Step::Admitting | Step::Marking));
        if lost {
            // What was on its way is lost. While its admission is open it counts like those in sync.
            self.end_fill(now);
            self.commit(now);
        }
        self.begin_fill(now);
    }

    fn fill_of(&mut self, member: NodeId, epoch: u32, number: u64) -> Option<&mut Fill> {
        let Role::Lead(lead) = &mut self.role else { return None };
        let fill = lead.fills.now.as_mut()?;
        (lead.epoch == epoch && fill.member == member && fill.number == number).then_some(fill)
    }

    /// The replica has stored that it is being filled.
    pub fn filling(&mut self, now: Moment, member: NodeId, epoch: u32, number: u64) {
        let Some(fill) = self.fill_of(member, epoch, number) else { return };
        if let Step::Beginning { stored, .. } = &mut fill.step {
            *stored = true;
            fill.moved_at = now;
            // It may lead to a wait for its leave to read.
            self.ask_for_lease(now, member);
            self.advance_fill(now);
        }
    }

    /// The piece asked for with [`HeadEffect::Copy`] was sent, as so many copies: all that was lacking before `next_block`.
    pub fn copy_sent(
        &mut self,
        now: Moment,
        member: NodeId,
        (epoch, number): (u32, u64),
        next_block: u64,
        copies: u32,
    ) {
        let Some(fill) = self.fill_of(member, epoch, number).filter(|fill| fill.reading) else { return };
        assert!(next_block > fill.next_block, "copying goes on");
        (fill.reading, fill.moved_at, fill.next_block) = (false, now, next_block);
        if copies > 0 {
            fill.sent += copies;
        }
        // Those for the own replica may be taken care of already.
        if copies > 0 && fill.sent > fill.copied {
            fill.sent_through.push_back(fill.sent);
        }
        self.advance_fill(now);
    }

    /// The piece asked for with [`HeadEffect::Copy`] cannot be read.
    pub fn copy_failed(&mut self, now: Moment, member: NodeId, epoch: u32, number: u64) {
        if self.fill_of(member, epoch, number).is_some() {
            self.end_fill(now);
            self.commit(now);
        }
    }

    /// The replica's pool has no room for what it lacks. It is tried again, but not soon.
    pub fn no_room(&mut self, now: Moment, member: NodeId, epoch: u32) {
        let Role::Lead(lead) = &mut self.role else { return };
        if lead.epoch == epoch && lead.fills.is_of(member) {
            lead.fills.note_no_room(now, member);
            self.end_fill(now);
            self.commit(now);
        }
    }

    /// So many copies have been taken care of.
    pub fn copied(&mut self, now: Moment, member: NodeId, epoch: u32, number: u64, copies: u32) {
        let Some(fill) = self.fill_of(member, epoch, number) else { return };
        fill.moved_at = now;
        fill.copied = fill.copied.max(copies);
        while fill.sent_through.front().is_some_and(|through| *through <= copies) {
            fill.sent_through.pop_front();
        }
        self.advance_fill(now);
    }

    /// The replica has stored that it is complete.
    pub fn complete(&mut self, now: Moment, member: NodeId, epoch: u32, number: u64) {
        let Some(fill) = self.fill_of(member, epoch, number) else { return };
        if let Step::Ending { last } = fill.step {
            (fill.step, fill.moved_at) = (Step::Following { last }, now);
            // From now on changes are numbered only within its room, too.
            self.ask_for_lease(now, member);
            self.advance_fill(now);
        }
    }

    /// Takes the fill as far as it can go now. Called whenever something was acknowledged.
    pub(super) fn advance_fill(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(fill) = &mut lead.fills.now else { return };
        let (member, epoch, number) = (fill.member, lead.epoch, fill.number);
        let early = self.bugs.has(PlantedBug::ClaimWhileFilling) && fill.sent > 0;
        match fill.step {
            // Between what is copied and what is sent nothing may lie.
            Step::Beginning { after, stored: true } if lead.committed >= after.sequence => {
                (fill.step, fill.moved_at) = (Step::Copying, now);
                self.advance_fill(now);
            }
            Step::Copying if (fill.next_block >= self.record.size_blocks || early) && !fill.reading => {
                // What was read last may show anything that is numbered now.
                fill.step = Step::Ending { last: lead.last.sequence };
                self.effects.push_back(HeadEffect::Filled { member, epoch, fill: number });
            }
            Step::Copying if !fill.reading && fill.sent_through.len() < PIECES_UNDER_WAY_MAX => {
                let block = u32::try_from(fill.next_block).expect("volumes have less than 2^32 blocks");
                let base = fill.base;
                fill.reading = true;
                self.effects.push_back(HeadEffect::Copy { member, epoch, fill: number, base, block });
            }
            Step::Following { last } => self.admit_filled(now, last),
            _ => {}
        }
    }

    /// Asks for the replica's admission once it has everything that it must have.
    fn admit_filled(&mut self, now: Moment, last: u64) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(fill) = &mut lead.fills.now else { return };
        let Some(peer) = lead.peers.get(fill.member) else { return };
        // Without its leave clients would wait for their reads, and without its room for their writes.
        let leased = peer.leased_until > now && peer.credit.is_known;
        if peer.acked < last.max(lead.committed) || !leased || lead.open.is_some() {
            return;
        }
        fill.step = Step::Admitting;
        let member = fill.member;
        let mut wanted = Box::new(self.record.clone());
        wanted.version += 1;
        wanted.proposal = proposal_of(&self.record);
        wanted.catching_up.retain(|node| *node != member);
        wanted.fresh.retain(|node| *node != member);
        wanted.in_sync.push(member);
        wanted.in_sync.sort_unstable();
        if wanted.stale.is_empty() && wanted.catching_up.is_empty() {
            // Nobody is left who could have come to another end.
            wanted.epoch_ends.clear();
        }
        lead.open = Some((wanted.clone(), now.after_ns(PROPOSE_AGAIN_NS)));
        self.effects.push_back(HeadEffect::Propose(wanted));
    }

    /// The record has changed within the epoch: the fill may have gone a step further, or have no more sense.
    pub(super) fn fill_recorded(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(fill) = &lead.fills.now else { return };
        let (member, step) = (fill.member, fill.step.clone());
        if self.record.is_in_sync(member) {
            lead.fills.now = None;
            lead.fills.wait_ns = FILL_WAIT_NS;
            lead.fills.again_at = now;
            lead.fills.without_room.retain(|(node, ..)| *node != member);
        } else if step == Step::Admitting || !self.record.catching_up.contains(&member) {
            self.end_fill(now);
        } else if step == Step::Marking {
            if self.reachable.contains(&member) { self.ask_filled(now) } else { self.end_fill(now) }
        }
    }
}
