//! Letting go: a volume that moves as planned, or a process that ends as it should.
//!
//! ```text
//!   serving ──release──▶ releasing ──the record says so──▶ idle
//! ```
//!
//! The next head need not wait until this one's leave to read has lapsed, for the record says that it reads nothing more.
//! So it stops before it proposes that, and there is no way back: whether the proposal has taken effect it cannot know
//! before it reads the record, and from then on another head may serve.

use super::view::proposal_of;
use super::{Head, HeadEffect, PROPOSE_AGAIN_NS, Role, Stage};
use crate::record::Record;
use crate::replica::bugs::PlantedBug;
use crate::units::Moment;

impl Head {
    /// Serves no more from now on, and has the record say so. A head that does not serve yet has nothing to let go of: it
    /// resigns, since its record must not speak for an earlier one that may still read.
    pub fn release(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return self.resign() };
        if lead.stage != Stage::Serving {
            return self.resign();
        }
        let epoch = lead.epoch;
        if self.bugs.has(PlantedBug::ReadsAfterRelease) {
            let wanted = Box::new(released(&self.record));
            lead.open = Some((wanted.clone(), now.after_ns(PROPOSE_AGAIN_NS)));
            return self.effects.push_back(HeadEffect::Propose(wanted));
        }
        self.effects.push_back(HeadEffect::Ended);
        self.propose_release(now, epoch);
    }

    /// Has it let go, without its being known whether the record says so?
    #[must_use]
    pub fn is_releasing(&self) -> bool {
        matches!(self.role, Role::Releasing { .. })
    }

    /// The process ends: whoever comes next waits until the leave to read has lapsed.
    pub fn give_up_release(&mut self) {
        if self.is_releasing() {
            self.role = Role::Idle;
        }
    }

    /// A newer record has been read: it says so, or an earlier proposal came first, or somebody else's change.
    pub(super) fn release_decided(&mut self, now: Moment) {
        let Role::Releasing { epoch, .. } = self.role else { return };
        if self.record.epoch != epoch || self.record.living_head().is_none() {
            self.role = Role::Idle;
        } else {
            self.propose_release(now, epoch);
        }
    }

    fn propose_release(&mut self, now: Moment, epoch: u32) {
        let wanted = Box::new(released(&self.record));
        let again_at = now.after_ns(PROPOSE_AGAIN_NS);
        self.effects.push_back(HeadEffect::Propose(wanted.clone()));
        self.role = Role::Releasing { epoch, wanted, again_at };
    }
}

/// The record after this one, in which the epoch's head has let go.
fn released(record: &Record) -> Record {
    // Not the name that another proposal of this head for the same version has.
    let proposal = !proposal_of(record);
    Record { version: record.version + 1, proposal, released: record.epoch, ..record.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{NodeId, Stamp, VolumeNumber};

    const START: Moment = Moment(1 << 40);
    const NODES: [NodeId; 2] = [NodeId(0), NodeId(1)];
    /// What members must still honour of an earlier head's leave to read.
    const GRANTED_NS: u64 = 2_000_000_000;

    fn effects(head: &mut Head) -> Vec<HeadEffect> {
        std::iter::from_fn(|| head.poll_effect()).collect()
    }

    fn proposal(head: &mut Head) -> Option<Box<Record>> {
        let mut found = effects(head).into_iter().filter_map(|effect| match effect {
            HeadEffect::Propose(record) => Some(record),
            _ => None,
        });
        found.next_back()
    }

    /// Node 0 takes the volume of this record and has its epoch started; whether it serves yet depends on what was granted.
    fn started(record: Record) -> Head {
        let mut head = Head::new(NODES[0], record);
        head.take(START, 1);
        let opened = proposal(&mut head).expect("asks for an epoch");
        head.handle_record(START, &opened, |_| true);
        NODES.iter().for_each(|node| {
            head.promised(START, *node, opened.epoch, Stamp::default(), GRANTED_NS);
        });
        let started = proposal(&mut head).expect("asks for its start");
        head.handle_record(START, &started, |_| true);
        head.handle_timeout(START);
        head
    }

    fn new_record() -> Record {
        Record::new(VolumeNumber(1), "v", [1; 16], 1000, &NODES)
    }

    /// One that another head has had in epoch 1.
    fn led_before(released: u32) -> Record {
        let head = Some(crate::record::HeadSession { node: NODES[1], session: 9 });
        Record { epoch: 1, started: true, last_started: 1, head, released, ..new_record() }
    }

    #[test]
    fn what_is_let_go_is_served_at_once_and_nothing_else() {
        assert!(started(new_record()).is_serving(), "nobody has ever led it");
        assert!(started(led_before(1)).is_serving(), "its head has let go");
        let mut head = started(led_before(0));
        assert!(!head.is_serving() && head.has_started(), "its head may still read");
        // An epoch that has started and not served says nothing of those before it.
        head.release(START);
        assert_eq!(effects(&mut head), [HeadEffect::Ended]);
        assert!(!head.is_releasing());
    }

    #[test]
    fn a_head_that_lets_go_ends_first_and_goes_on_until_its_record_says_so() {
        let mut head = started(new_record());
        effects(&mut head);
        let serving = head.record().clone();
        head.release(START);
        let released = released(&serving);
        assert_eq!(
            effects(&mut head),
            [HeadEffect::Ended, HeadEffect::Propose(Box::new(released.clone()))],
            "it reads nothing more before anybody could know"
        );
        assert!(head.is_releasing() && !head.is_active() && !head.may_read(START));
        head.take(START, 2);
        head.resign();
        assert!(head.is_releasing() && effects(&mut head).is_empty(), "there is no way back");
        // The answer is lost, and the proposal is sent again.
        let again = head.poll_timeout().expect("it is not known to be done");
        head.handle_timeout(again);
        assert_eq!(proposal(&mut head), Some(Box::new(released.clone())));
        // Somebody else's change came first.
        let attached = serving.with_attached(Some(NODES[1]), 7);
        head.handle_record(again, &attached, |_| true);
        let next = proposal(&mut head).expect("once more");
        assert_eq!((next.version, next.released, next.attached), (attached.version + 1, 1, Some(NODES[1])));
        head.handle_record(again, &next, |_| true);
        assert!(!head.is_releasing() && head.poll_timeout().is_none());
        head.take(again, 3);
        assert_eq!(proposal(&mut head).map(|record| record.epoch), Some(2));
    }

    #[test]
    fn a_proposal_of_its_own_that_came_first_does_not_keep_it() {
        let mut head = started(new_record());
        effects(&mut head);
        let serving = head.record().clone();
        head.release(START);
        effects(&mut head);
        let in_sync = vec![NODES[0]];
        let stale = vec![crate::record::StaleReplica { node: NODES[1], since_version: serving.version + 1 }];
        let removal = Record { version: serving.version + 1, in_sync, stale, ..serving };
        head.handle_record(START, &removal, |_| true);
        let next = proposal(&mut head).expect("it lets go of what it has");
        assert_eq!((next.released, &next.in_sync[..]), (1, &NODES[..1]));
        let later = Record { version: next.version + 3, epoch: 2, ..*next };
        head.handle_record(START, &later, |_| true);
        assert!(!head.is_releasing(), "another epoch has begun");
    }
}
