//! A member: what one replica promises and accepts.
//!
//! ```text
//!                    promise(e), e higher              stored
//!   following e' ────────────────────────▶ promising e ───────▶ following e
//!        │ ▲                                   (takes nothing of e')
//!        ▼ │ change: the successor of the last one is appended, one that is there is acknowledged again,
//!            anything else is answered with the member's position
//! ```
//!
//! | message | of a lower epoch | of the epoch promised | of a higher epoch |
//! |---|---|---|---|
//! | promise | refused | reported again | stored, then reported |
//! | change | refused | appended, acknowledged or answered with the position | a violation: heads ask for the promise first |
//! | fetch | refused | read from the log | a violation |
//! | read | refused | read from the volume | a violation |
//! | check: ask, mend | refused | read from the volume; appended as a copy | a violation |
//! | lease | refused | granted, and room if that is asked | a violation |
//! | compare | refused | answered with what its log changed after the stamp named there | a violation |
//! | fill | refused | its order goes on after the stamp named there | a violation |
//! | copy, filled | refused | taken, if they are of the last fill | a violation |
//!
//! A member that was found half filled at its start holds no order at all: it takes changes again after the next fill has
//! begun. Until it is complete it reports what it had in common with the order when filling began: all that it has beyond
//! is compared or copied again.

use super::bugs::{Bugs, PlantedBug};
use super::fill::Filling;
use super::{LEASE_DRIFT_NS, LEASE_NS};
use crate::record::Stamp;
use crate::units::Moment;
use crate::wire::peer_message::{ChangeHeader, CopyHeader, PeerMessage, RoomQuestion};

/// What must be done about a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send this back.
    Answer(PeerMessage),
    /// Store the promise, then call [`Member::promise_stored`].
    StorePromise(u32),
    /// Append the change, in the order of these calls, then call [`Member::appended`].
    Append,
    /// Find out which blocks the log changed after `base` without its being known that they are committed; call
    /// [`Member::compared`] if that is possible, and answer.
    Compare {
        /// Which fill it is for.
        fill: u64,
        /// The last change in common.
        base: Stamp,
    },
    /// Append nothing of what came before any more: store what is in common and that the order goes on after `after`, then
    /// call [`Member::fill_stored`].
    BeginFill {
        /// Which fill.
        fill: u64,
        /// The change before the first that will come.
        after: Stamp,
        /// The last change in common. Nothing is if it is [`Stamp::default`].
        base: Stamp,
    },
    /// Append these runs of the copy (first block and count), if any, in the order of these calls; then call
    /// [`Member::copy_stored`].
    Copy {
        /// Which fill.
        fill: u64,
        /// What live changes have left of it.
        runs: Vec<(u32, u32)>,
    },
    /// Store that filling has ended, behind everything given to the log before; then call [`Member::end_stored`].
    EndFill {
        /// Which fill.
        fill: u64,
    },
    /// Read the change out of the log and answer.
    Fetch(u64),
    /// Find out which blocks the log changed, and answer.
    ListChanged,
    /// Read the blocks of the volume and answer.
    Read,
    /// Read the blocks of the volume and tell what they are, or append these as a copy, and answer.
    Check,
    /// Find out how much room there is, if that is asked, and answer with the leave to read.
    Lease {
        /// The request's own moment.
        asked_ns: u64,
        /// What is asked of the room.
        room: Option<RoomQuestion>,
    },
    /// Nothing now.
    Nothing,
    /// No correct head sends this: close the connection.
    Violation,
}

/// See the module's text.
#[derive(Debug)]
pub struct Member {
    /// On stable media.
    promised: u32,
    /// Being stored.
    promising: Option<u32>,
    /// The last change given to the log.
    last: Stamp,
    /// Changes up to here are on stable media.
    durable: u64,
    /// A report is owed as soon as everything given to the log is on stable media.
    report_due: bool,
    /// An acknowledgement is owed.
    ack_due: bool,
    /// The epoch to whose head a lease was granted, and until when it must be honoured.
    granted: (u32, Moment),
    fill: Fill,
    /// What was compared for the next fill: which one, and from which change on.
    compared: Option<(u64, Stamp)>,
    /// The head is to be told that there is no room for what it sends.
    no_room_due: bool,
}

/// Is the member being filled?
#[derive(Debug)]
enum Fill {
    /// No: it holds an order.
    None,
    /// It was once, and that was broken off by the end of the process: nobody knows which blocks are whose.
    BrokenOff {
        /// What it had in common with the order when it began.
        base: Stamp,
    },
    Now(Box<Filling>),
    /// It is complete, and owes the head that answer.
    Complete {
        fill: u64,
    },
}

impl Member {
    /// A member as its log was found at a start. What it had granted is forgotten, so it assumes that it granted a lease
    /// just now, to a head of some earlier epoch. `filling`: it was being filled, and had this in common with the order.
    #[must_use]
    pub fn new(now: Moment, promised: u32, last: Stamp, filling: Option<Stamp>) -> Member {
        Member {
            promised,
            promising: None,
            last,
            durable: last.sequence,
            report_due: false,
            ack_due: false,
            granted: (0, now.after_ns(LEASE_NS + LEASE_DRIFT_NS)),
            fill: filling.map_or(Fill::None, |base| Fill::BrokenOff { base }),
            compared: None,
            no_room_due: false,
        }
    }

    /// Plants a mistake in a member that has just begun.
    pub fn plant(&mut self, now: Moment, bugs: Bugs) {
        if bugs.has(PlantedBug::LeaseForgotten) {
            self.granted = (0, now);
        }
    }

    /// The epoch that it promised, on stable media.
    #[must_use]
    pub fn promised(&self) -> u32 {
        self.promised
    }

    /// Changes up to here are on stable media.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// The last change given to the log.
    #[must_use]
    pub fn last(&self) -> Stamp {
        self.last
    }

    /// The epoch that it follows: no lower one is accepted.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.promising.unwrap_or(self.promised)
    }

    /// Was it found half filled, or without anything that an earlier epoch has left here?
    #[must_use]
    pub fn holds_no_order(&self) -> bool {
        matches!(self.fill, Fill::BrokenOff { .. })
    }

    /// Until when there is perhaps a head that reads by this member's leave. For so long another one need not try.
    #[must_use]
    pub fn granted_until(&self) -> Moment {
        self.granted.1
    }

    /// A message for the member. Changes and fetches of an epoch come from the head of that epoch, over one connection in
    /// order.
    pub fn handle(&mut self, now: Moment, message: PeerMessage) -> Step {
        match message {
            PeerMessage::Promise { epoch } => self.handle_promise(now, epoch),
            PeerMessage::Change { epoch, change, .. } => self.under(epoch, |member| member.take(change)),
            PeerMessage::Fetch { epoch, sequence } => self.under(epoch, |_| Step::Fetch(sequence)),
            PeerMessage::Read { epoch, .. } => self.under(epoch, |member| member.if_whole(Step::Read)),
            PeerMessage::ListChanged { epoch, .. } => {
                self.under(epoch, |member| member.if_whole(Step::ListChanged))
            }
            PeerMessage::Check(check) if !check.is_answer() => {
                self.under(check.epoch(), |member| member.if_whole(Step::Check))
            }
            PeerMessage::Lease { epoch, asked_ns, room, .. } => self.under(epoch, |member| {
                member.granted = (epoch, now.after_ns(LEASE_NS + LEASE_DRIFT_NS));
                Step::Lease { asked_ns, room: room.filter(|_| matches!(member.fill, Fill::None)) }
            }),
            PeerMessage::Compare { epoch, fill, base } => self.under(epoch, |member| {
                member.compared = None;
                Step::Compare { fill, base }
            }),
            PeerMessage::Fill { epoch, after, fill } => {
                self.under(epoch, |member| member.begin_fill(epoch, fill, after))
            }
            PeerMessage::Copy { epoch, fill, copy } => self.under(epoch, |member| member.copy(fill, copy)),
            PeerMessage::Filled { epoch, fill } => self.under(epoch, |member| member.end_fill(fill)),
            _ => Step::Violation,
        }
    }

    /// Only a member in sync is asked, and that one is not being filled.
    fn if_whole(&self, step: Step) -> Step {
        if matches!(self.fill, Fill::None) { step } else { Step::Nothing }
    }

    /// Whatever it holds is given up for what the head will send.
    fn begin_fill(&mut self, epoch: u32, fill: u64, after: Stamp) -> Step {
        if after.epoch > epoch {
            return Step::Violation;
        }
        self.last = after;
        self.ack_due = false;
        let compared = self.compared.take().filter(|(other, _)| *other == fill);
        let base = compared.map_or_else(Stamp::default, |(_, base)| base);
        self.fill = Fill::Now(Box::new(Filling::new(fill, after, base)));
        Step::BeginFill { fill, after, base }
    }

    /// It is known which blocks the log changed after `base`.
    pub fn compared(&mut self, fill: u64, base: Stamp) {
        self.compared = Some((fill, base));
    }

    /// What the member has in common with an order that has its last change.
    fn claim(&self) -> Stamp {
        match &self.fill {
            Fill::None | Fill::Complete { .. } => self.last,
            Fill::BrokenOff { base } => *base,
            Fill::Now(filling) => filling.base,
        }
    }

    /// The fill with this number, if it is the one under way. What an earlier one sent may still come in.
    fn filling(&mut self, fill: u64) -> Option<&mut Filling> {
        match &mut self.fill {
            Fill::Now(filling) if filling.fill == fill => Some(filling),
            _ => None,
        }
    }

    fn copy(&mut self, fill: u64, copy: CopyHeader) -> Step {
        match self.filling(fill) {
            Some(filling) if filling.ending => Step::Violation,
            Some(filling) => Step::Copy { fill, runs: filling.uncovered(copy) },
            None => Step::Nothing,
        }
    }

    fn end_fill(&mut self, fill: u64) -> Step {
        match self.filling(fill) {
            Some(filling) if filling.ending => Step::Violation,
            Some(filling) => {
                filling.end();
                Step::EndFill { fill }
            }
            None => Step::Nothing,
        }
    }

    /// The beginning of a fill is on stable media.
    pub fn fill_stored(&mut self, fill: u64) {
        let Some(filling) = self.filling(fill) else { return };
        assert!(!filling.stored, "a fill begins once");
        (filling.stored, filling.filling_due) = (true, true);
        let lacks_room = filling.lacks_room;
        self.durable = filling.after.sequence;
        if let Some(last) = lacks_room {
            self.lacks_room(last);
        }
    }

    /// A copy is on stable media, or nothing of it was needed.
    pub fn copy_stored(&mut self, fill: u64) {
        if let Some(filling) = self.filling(fill) {
            filling.copies += 1;
            filling.copied_due = true;
        }
    }

    /// The end of a fill is on stable media, and so is everything before it.
    pub fn end_stored(&mut self, fill: u64) {
        if self.filling(fill).is_some() {
            self.fill = Fill::Complete { fill };
        }
    }

    /// Is the beginning of a fill being stored? Then nobody knows yet where the order stands on stable media.
    fn is_beginning_fill(&self) -> bool {
        matches!(&self.fill, Fill::Now(filling) if !filling.stored)
    }

    /// Up to where the log need not be kept for the sake of others if this much is committed. What is not stored here may
    /// still have to come from them. And while the beginning of a fill is being stored, what is on stable media is of the
    /// order that is being left: should the fill be broken off, it is the log that tells what must be undone.
    #[must_use]
    pub fn may_let_go(&self, committed: u64) -> u64 {
        if self.is_beginning_fill() { 0 } else { committed.min(self.durable) }
    }

    /// The log has no room for what a head sends that does not count on this replica yet, and has left it out: `last` is the
    /// last change that it took.
    pub fn lacks_room(&mut self, last: Stamp) {
        if let Some(filling) = self.fill_being_begun() {
            // What is on its way into the log is of the order that is being left. It is broken off when that is stored.
            filling.lacks_room = Some(last);
        } else {
            self.cut_back(last);
            self.no_room_due = true;
        }
    }

    /// The log has left out what came after `last`: nobody counts on this replica.
    pub fn cut_back(&mut self, last: Stamp) {
        if self.is_beginning_fill() {
            // Of the order that is being left.
            return;
        }
        self.fill = match &self.fill {
            Fill::Now(filling) => Fill::BrokenOff { base: filling.base },
            Fill::BrokenOff { base } => Fill::BrokenOff { base: *base },
            Fill::None | Fill::Complete { .. } => Fill::None,
        };
        self.last = last;
    }

    fn fill_being_begun(&mut self) -> Option<&mut Filling> {
        match &mut self.fill {
            Fill::Now(filling) if !filling.stored => Some(filling),
            _ => None,
        }
    }

    /// What is owed to the head that fills this member.
    pub fn poll_fill(&mut self) -> Option<PeerMessage> {
        let epoch = self.promised;
        if self.promising.is_none() && std::mem::take(&mut self.no_room_due) {
            return Some(PeerMessage::NoRoom { epoch });
        }
        match &mut self.fill {
            _ if self.promising.is_some() => None,
            Fill::None | Fill::BrokenOff { .. } => None,
            Fill::Now(filling) => {
                let (fill, copies) = (filling.fill, filling.copies);
                if std::mem::take(&mut filling.filling_due) {
                    return Some(PeerMessage::Filling { epoch, fill });
                }
                std::mem::take(&mut filling.copied_due).then_some(PeerMessage::Copied { epoch, fill, copies })
            }
            Fill::Complete { fill } => {
                let fill = *fill;
                self.fill = Fill::None;
                Some(PeerMessage::Complete { epoch, fill })
            }
        }
    }

    fn handle_promise(&mut self, now: Moment, epoch: u32) -> Step {
        if epoch < self.epoch() {
            return Step::Answer(PeerMessage::Refused { promised: self.epoch() });
        }
        self.report_due = true;
        if epoch > self.epoch() {
            self.promising = Some(epoch);
            return Step::StorePromise(epoch);
        }
        self.poll_report(now).map_or(Step::Nothing, Step::Answer)
    }

    /// Does what the head of the epoch asks for, if that is whom the member follows.
    fn under(&mut self, epoch: u32, act: impl FnOnce(&mut Member) -> Step) -> Step {
        if epoch < self.epoch() {
            return Step::Answer(PeerMessage::Refused { promised: self.epoch() });
        }
        if epoch > self.promised {
            return Step::Violation;
        }
        act(self)
    }

    fn take(&mut self, change: ChangeHeader) -> Step {
        let lacks_room = matches!(&self.fill, Fill::Now(filling) if filling.lacks_room.is_some());
        if lacks_room || matches!(self.fill, Fill::BrokenOff { .. }) {
            return Step::Nothing;
        }
        if change.previous == self.last {
            self.last = change.stamp;
            if let Fill::Now(filling) = &mut self.fill {
                filling.note_change(change.block, change.count);
            }
            return Step::Append;
        }
        if change.stamp.sequence > self.last.sequence {
            return Step::Answer(PeerMessage::Gap { epoch: self.promised, last: self.last });
        }
        if change.stamp.sequence == self.last.sequence && change.stamp != self.last {
            return Step::Violation;
        }
        self.ack_due = true;
        Step::Nothing
    }

    /// The promise is on stable media, and so is everything that was appended before.
    pub fn promise_stored(&mut self, epoch: u32) {
        self.promised = self.promised.max(epoch);
        if self.promising == Some(epoch) {
            self.promising = None;
        }
    }

    /// The change is on stable media, and so is everything before it.
    pub fn appended(&mut self, sequence: u64) {
        if self.is_beginning_fill() {
            // It is of the order that is being left.
            return;
        }
        assert!(
            sequence == self.durable + 1 && sequence <= self.last.sequence,
            "changes become durable in order"
        );
        self.durable = sequence;
        self.ack_due = true;
    }

    /// The answer to a promise, when it is due: once per question.
    pub fn poll_report(&mut self, now: Moment) -> Option<PeerMessage> {
        let settled =
            self.promising.is_none() && self.durable == self.last.sequence && !self.is_beginning_fill();
        if !self.report_due || !settled {
            return None;
        }
        self.report_due = false;
        let (epoch, until) = self.granted;
        let granted_ns = if epoch < self.promised { until.since_ns(now) } else { 0 };
        Some(PeerMessage::Promised { epoch: self.promised, last: self.claim(), granted_ns })
    }

    /// The acknowledgement that is due: one for all that became durable since the last.
    pub fn poll_ack(&mut self) -> Option<PeerMessage> {
        if self.is_beginning_fill() {
            return None;
        }
        let due = std::mem::take(&mut self.ack_due) && self.promising.is_none();
        due.then_some(PeerMessage::Ack { epoch: self.promised, through: self.durable })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::ChangeKind;

    fn stamp(epoch: u32, sequence: u64) -> Stamp {
        Stamp { epoch, sequence }
    }

    fn change(epoch: u32, stamp: Stamp, previous_epoch: u32) -> PeerMessage {
        let previous = Stamp { epoch: previous_epoch, sequence: stamp.sequence - 1 };
        let change =
            ChangeHeader { kind: ChangeKind::Data, block: 0, count: 1, stamp, previous, new_blocks: 1 };
        PeerMessage::Change { epoch, change, committed: 0 }
    }

    fn following(epoch: u32) -> Member {
        let mut member = Member::new(Moment(0), 0, Stamp::default(), None);
        assert_eq!(member.handle(Moment(0), PeerMessage::Promise { epoch }), Step::StorePromise(epoch));
        assert_eq!(member.poll_report(Moment(0)), None, "not stored yet");
        member.promise_stored(epoch);
        assert!(member.poll_report(Moment(0)).is_some());
        member
    }

    #[test]
    fn only_the_successor_is_appended() {
        let mut member = following(1);
        assert_eq!(member.handle(Moment(1), change(1, stamp(1, 1), 0)), Step::Append);
        let gap = Step::Answer(PeerMessage::Gap { epoch: 1, last: stamp(1, 1) });
        assert_eq!(member.handle(Moment(1), change(1, stamp(1, 3), 1)), gap);
        assert_eq!(
            (member.handle(Moment(1), change(1, stamp(1, 1), 0)), member.poll_ack()),
            (Step::Nothing, Some(PeerMessage::Ack { epoch: 1, through: 0 }))
        );
        member.appended(1);
        assert_eq!(member.poll_ack(), Some(PeerMessage::Ack { epoch: 1, through: 1 }));
        assert_eq!(member.poll_ack(), None);
        // The right number after another predecessor: another order.
        assert_ne!(member.handle(Moment(1), change(1, stamp(1, 2), 0)), Step::Append);
    }

    fn fill(fill: u64, after: Stamp) -> PeerMessage {
        PeerMessage::Fill { epoch: 2, after, fill }
    }

    #[test]
    fn a_fill_sets_the_order_back_and_changes_win_over_copies() {
        let mut member = following(1);
        (1..=5).for_each(|sequence| {
            assert_eq!(
                member.handle(Moment(1), change(1, stamp(1, sequence), u32::from(sequence > 1))),
                Step::Append
            );
        });
        member.appended(1);
        member.handle(Moment(1), PeerMessage::Promise { epoch: 2 });
        member.promise_stored(2);
        assert_eq!(
            member.handle(Moment(2), PeerMessage::Compare { epoch: 2, fill: 7, base: stamp(1, 2) }),
            Step::Compare { fill: 7, base: stamp(1, 2) }
        );
        member.compared(7, stamp(1, 2));
        let begun = Step::BeginFill { fill: 7, after: stamp(1, 3), base: stamp(1, 2) };
        assert_eq!(member.handle(Moment(2), fill(7, stamp(1, 3))), begun);
        // What was on its way into the log is of no account any more.
        member.appended(2);
        assert_eq!(
            (member.poll_ack(), member.poll_report(Moment(2)), member.poll_fill()),
            (None, None, None)
        );
        assert_eq!(member.handle(Moment(2), change(2, stamp(2, 4), 1)), Step::Append);
        assert_eq!(member.may_let_go(3), 0, "the second change of epoch 1 may have to be undone");
        member.fill_stored(7);
        assert_eq!((member.may_let_go(2), member.may_let_go(4)), (2, 3));
        assert_eq!(member.poll_fill(), Some(PeerMessage::Filling { epoch: 2, fill: 7 }));
        member.appended(4);
        assert_eq!(member.poll_ack(), Some(PeerMessage::Ack { epoch: 2, through: 4 }));
        let copy = |fill, count| {
            let copy = CopyHeader { data: true, block: 0, count };
            PeerMessage::Copy { epoch: 2, fill, copy }
        };
        assert_eq!(member.handle(Moment(3), copy(7, 2)), Step::Copy { fill: 7, runs: vec![(1, 1)] });
        assert_eq!(member.handle(Moment(3), copy(6, 2)), Step::Nothing, "of an earlier fill");
        member.copy_stored(7);
        assert_eq!(member.poll_fill(), Some(PeerMessage::Copied { epoch: 2, fill: 7, copies: 1 }));
        let filled = PeerMessage::Filled { epoch: 2, fill: 7 };
        assert_eq!(member.handle(Moment(4), filled), Step::EndFill { fill: 7 });
        assert_eq!(member.handle(Moment(4), copy(7, 1)), Step::Violation);
        member.end_stored(7);
        assert_eq!(member.poll_fill(), Some(PeerMessage::Complete { epoch: 2, fill: 7 }));
        assert_eq!(member.poll_fill(), None);
        assert_eq!(member.last(), stamp(2, 4));
    }

    #[test]
    fn a_fill_that_was_broken_off_must_begin_anew() {
        let mut member = Member::new(Moment(0), 2, stamp(2, 9), Some(stamp(2, 4)));
        let report = member.handle(Moment(1), PeerMessage::Promise { epoch: 2 });
        assert!(
            matches!(report, Step::Answer(PeerMessage::Promised { last, .. }) if last == stamp(2, 4)),
            "{report:?}"
        );
        member.compared(2, stamp(2, 4));
        assert_eq!(member.handle(Moment(1), change(2, stamp(2, 10), 2)), Step::Nothing);
        let copy = CopyHeader { data: false, block: 0, count: 4 };
        assert_eq!(member.handle(Moment(1), PeerMessage::Copy { epoch: 2, fill: 1, copy }), Step::Nothing);
        assert_eq!(member.handle(Moment(1), PeerMessage::Filled { epoch: 2, fill: 1 }), Step::Nothing);
        let begun = Step::BeginFill { fill: 3, after: stamp(2, 9), base: Stamp::default() };
        assert_eq!(member.handle(Moment(1), fill(3, stamp(2, 9))), begun);
        assert_eq!(member.handle(Moment(1), change(2, stamp(2, 10), 2)), Step::Append);
        assert_eq!(member.handle(Moment(1), fill(4, stamp(3, 9))), Step::Violation);
    }

    #[test]
    fn a_report_waits_for_what_is_being_written() {
        let mut member = following(1);
        member.handle(Moment(1), change(1, stamp(1, 1), 0));
        assert_eq!(member.handle(Moment(2), PeerMessage::Promise { epoch: 3 }), Step::StorePromise(3));
        let refused = Step::Answer(PeerMessage::Refused { promised: 3 });
        assert_eq!(member.handle(Moment(2), change(1, stamp(1, 2), 1)), refused);
        assert_eq!(member.handle(Moment(2), PeerMessage::Promise { epoch: 2 }), refused);
        member.promise_stored(3);
        assert_eq!(member.poll_report(Moment(3)), None);
        member.appended(1);
        let report = member.poll_report(Moment(3)).unwrap();
        assert!(matches!(report, PeerMessage::Promised { epoch: 3, last: Stamp { sequence: 1, .. }, .. }));
        assert_eq!(member.handle(Moment(4), change(4, stamp(4, 2), 1)), Step::Violation);
    }

    #[test]
    fn a_grant_is_told_to_the_next_head_and_assumed_after_a_start() {
        let mut member = following(1);
        let room = Some(RoomQuestion { keeps: 1, needs: 2, wants: 3 });
        let lease = PeerMessage::Lease { epoch: 1, asked_ns: 5, committed: 0, room };
        assert_eq!(member.handle(Moment(1_000), lease), Step::Lease { asked_ns: 5, room });
        member.handle(Moment(2_000), PeerMessage::Promise { epoch: 2 });
        member.promise_stored(2);
        let left = |report| match report {
            Some(PeerMessage::Promised { granted_ns, .. }) => granted_ns,
            other => panic!("{other:?}"),
        };
        assert_eq!(left(member.poll_report(Moment(2_000))), LEASE_NS + LEASE_DRIFT_NS - 1_000);
        let mut restarted = Member::new(Moment(9_000), 2, Stamp::default(), None);
        restarted.handle(Moment(9_000), PeerMessage::Promise { epoch: 3 });
        restarted.promise_stored(3);
        assert_eq!(left(restarted.poll_report(Moment(10_000))), LEASE_NS + LEASE_DRIFT_NS - 1_000);
    }

    #[test]
    fn a_fill_without_room_is_broken_off_once_it_has_begun() {
        let mut member = following(1);
        member.handle(Moment(1), PeerMessage::Promise { epoch: 2 });
        member.promise_stored(2);
        member.handle(Moment(1), fill(7, stamp(1, 3)));
        assert_eq!(member.handle(Moment(2), change(2, stamp(2, 4), 1)), Step::Append);
        // Before that is stored, what it held before is not known to be left.
        member.lacks_room(stamp(1, 3));
        assert_eq!((member.poll_fill(), member.holds_no_order()), (None, false));
        assert_eq!(member.handle(Moment(2), change(2, stamp(2, 5), 2)), Step::Nothing);
        member.fill_stored(7);
        assert_eq!(member.poll_fill(), Some(PeerMessage::NoRoom { epoch: 2 }));
        assert_eq!((member.poll_fill(), member.holds_no_order()), (None, true));
        // Nobody counts on its room while it is filled.
        let room = Some(RoomQuestion::default());
        let lease = PeerMessage::Lease { epoch: 2, asked_ns: 5, committed: 0, room };
        assert_eq!(member.handle(Moment(3), lease), Step::Lease { asked_ns: 5, room: None });
        assert_eq!(
            member.handle(Moment(3), fill(8, stamp(1, 3))),
            Step::BeginFill { fill: 8, after: stamp(1, 3), base: Stamp::default() }
        );
    }
}
