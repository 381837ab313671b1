//! Becoming the head: the two compare-and-swaps and what lies between them.

use super::fill::Fills;
use super::peers::Phase;
use super::{
    GATHER_PATIENCE_NS, Head, HeadEffect, Lead, MEMBER_PATIENCE_NS, PROPOSE_AGAIN_NS, Peers, Role, Stage,
    Windowed,
};
use crate::record::{EPOCH_ENDS_KEPT, EpochEnd, HeadSession, NodeId, Record, StaleReplica, Stamp};
use crate::units::Moment;
use crate::wire::peer_message::ChangeHeader;
use std::collections::VecDeque;

impl Head {
    /// Wants this node to be the head. `random` tells this attempt from every other.
    pub fn take(&mut self, now: Moment, random: u64) {
        if self.is_active() || self.is_releasing() {
            return;
        }
        let mut wanted = Box::new(self.record.clone());
        wanted.version += 1;
        wanted.proposal = random;
        wanted.epoch += 1;
        wanted.started = false;
        wanted.head = Some(HeadSession { node: self.node, session: random });
        self.effects.push_back(HeadEffect::Propose(wanted.clone()));
        self.role = Role::Proposing { wanted, again_at: now.after_ns(PROPOSE_AGAIN_NS) };
    }

    /// The record as the store has it. Older ones than known already are ignored. `connected` says which nodes can be
    /// talked to.
    pub fn handle_record(&mut self, now: Moment, record: &Record, connected: impl Fn(NodeId) -> bool) {
        if record.version <= self.record.version {
            return;
        }
        self.record = record.clone();
        self.reachable = record.replicas().into_iter().filter(|node| connected(*node)).collect();
        match &mut self.role {
            Role::Idle => {}
            Role::Releasing { .. } => self.release_decided(now),
            Role::Proposing { wanted, .. } => {
                // Somebody who adds a replica may have changed the record since.
                if (wanted.epoch, wanted.head) == (record.epoch, record.head) {
                    self.gather(now, connected);
                } else {
                    self.resign();
                }
            }
            Role::Lead(lead) => {
                if record.epoch != lead.epoch || record.living_head().is_none() {
                    return self.resign();
                }
                // Ours, or one that came before or after it: either way it is decided.
                lead.open = None;
                if lead.stage == Stage::Starting && record.started {
                    self.wait_for_grants(now);
                } else if lead.stage == Stage::Starting {
                    self.start(now);
                } else {
                    self.record_changed(now);
                }
            }
        }
    }

    /// The epoch is open: ask everybody in sync.
    fn gather(&mut self, now: Moment, connected: impl Fn(NodeId) -> bool) {
        let record = &self.record;
        let lead = Lead {
            epoch: record.epoch,
            stage: Stage::Gathering { until: now.after_ns(GATHER_PATIENCE_NS) },
            open: None,
            last: Stamp::default(),
            committed: 0,
            window: VecDeque::new(),
            peers: Peers::new(now, &record.in_sync),
            ask_leases_at: now,
            fills: Fills::new(now),
            room_needed: 0,
            room_again_at: None,
            is_filling_space: false,
            unhindered: record.is_let_go(),
        };
        self.role = Role::Lead(Box::new(lead));
        for member in self.record.in_sync.clone() {
            if connected(member) {
                self.member_up(now, member);
            }
        }
    }

    /// A member's promise and position. `granted_ns` is how long it must honour a lease granted to an earlier head.
    pub fn promised(&mut self, now: Moment, member: NodeId, epoch: u32, last: Stamp, granted_ns: u64) {
        let Role::Lead(lead) = &mut self.role else { return };
        if lead.epoch != epoch || self.filled_promised(now, member, last) {
            return;
        }
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(peer) = lead.peers.get_mut(member) else { return };
        if last.sequence < peer.sent {
            // An answer to an earlier question: changes were sent meanwhile. It will be asked again.
            return;
        }
        peer.enter(Phase::Following, now);
        peer.reported = Some(last);
        peer.grants_until = now.after_ns(granted_ns);
        peer.sent = last.sequence;
        match lead.stage {
            Stage::Gathering { .. } => self.finish_gathering(now),
            // It has more than the others, or lacks what they have already.
            Stage::Bringing { .. } if last > lead.last || last.sequence < lead.committed => {
                self.ask_again(now);
            }
            Stage::Bringing { .. } | Stage::Starting | Stage::Waiting { .. } | Stage::Serving => {
                self.follows_again(now, member, last);
            }
        }
    }

    /// All have answered, or there has been time enough for it.
    pub(super) fn finish_gathering(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Stage::Gathering { until } = &mut lead.stage else { return };
        let answered = lead.peers.iter().filter(|peer| peer.phase == Phase::Following).count();
        let all = answered == self.record.in_sync.len();
        let enough = answered >= self.record.min_in_sync.max(1) as usize;
        let patient = now < *until;
        if !patient {
            *until = now.after_ns(GATHER_PATIENCE_NS);
        }
        if all || enough && !patient {
            self.bring(now);
        }
    }

    /// Somebody came or went while others were being brought along. What was sent to them may have arrived or not, so
    /// only they can tell where they stand now.
    pub(super) fn ask_again(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let epoch = lead.epoch;
        let dropped = lead.window.drain(..).map(|windowed| windowed.change.stamp.sequence);
        self.effects.extend(dropped.map(|sequence| HeadEffect::Dropped { sequence }));
        lead.stage = Stage::Gathering { until: now.after_ns(GATHER_PATIENCE_NS) };
        for peer in lead.peers.iter_mut().filter(|peer| peer.phase == Phase::Following) {
            peer.enter(Phase::Asked, now);
            self.effects.push_back(HeadEffect::Promise { member: peer.node, epoch });
        }
    }

    /// Begins to bring those who answered to one position: the highest among them. What the others lack is not
    /// acknowledged, for they are in sync and do not have it; but it may have been seen on its way, and the order must
    /// be one.
    fn bring(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let answers = || lead.peers.iter().filter(|peer| peer.phase == Phase::Following);
        let position = |peer: &super::Peer| peer.reported.expect("reported with its promise");
        let highest = answers().map(position).max().expect("somebody answered");
        let lowest = answers().map(position).min().expect("somebody answered");
        let own = |peer: &&super::Peer| position(peer) == highest;
        let source =
            answers().filter(own).max_by_key(|peer| peer.node == self.node).expect("the highest").node;
        assert!(lead.window.is_empty(), "what was fetched before was dropped");
        lead.last = lowest;
        lead.committed = lowest.sequence;
        let until = now.after_ns(MEMBER_PATIENCE_NS);
        lead.stage = Stage::Bringing { source, highest, fetching: false, until };
        for peer in lead.peers.iter_mut().filter(|peer| peer.phase == Phase::Following) {
            let reported = peer.reported.expect("reported with its promise");
            (peer.acked, peer.sent) = (reported.sequence, reported.sequence);
        }
        self.bring_on(now);
    }

    /// Fetches the next change, or starts the epoch when all are equal.
    pub(super) fn bring_on(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Stage::Bringing { source, highest, fetching, .. } = &mut lead.stage else { return };
        if lead.last < *highest {
            if !std::mem::replace(fetching, true) {
                let (member, epoch, sequence) = (*source, lead.epoch, lead.last.sequence + 1);
                self.effects.push_back(HeadEffect::Fetch { member, epoch, sequence });
            }
        } else if lead.committed == highest.sequence {
            self.start(now);
        }
    }

    /// Is this the change that was asked for with [`HeadEffect::Fetch`], and still of use?
    #[must_use]
    pub fn expects(&self, member: NodeId, epoch: u32, change: ChangeHeader) -> bool {
        let Role::Lead(lead) = &self.role else { return false };
        let Stage::Bringing { source, fetching, .. } = lead.stage else { return false };
        source == member
            && lead.epoch == epoch
            && fetching
            && change.stamp.sequence == lead.last.sequence + 1
            && change.stamp >= lead.last
    }

    /// The change asked for with [`HeadEffect::Fetch`]; ignored if it is not [expected](Self::expects).
    pub fn fetched(&mut self, now: Moment, member: NodeId, epoch: u32, change: ChangeHeader) {
        if !self.expects(member, epoch, change) {
            return;
        }
        let Role::Lead(lead) = &mut self.role else { return };
        let Stage::Bringing { fetching, until, .. } = &mut lead.stage else { return };
        *fetching = false;
        *until = now.after_ns(MEMBER_PATIENCE_NS);
        // Its predecessor is the last one whatever the source stated: sequences of one order ascend by one.
        let change = ChangeHeader { previous: lead.last, ..change };
        lead.last = change.stamp;
        lead.window.push_back(Windowed { change, cookie: None });
        self.stream_to_all(now);
        self.commit(now);
    }

    /// Nothing has moved for a while: all are asked anew, and the view goes on without those who do not answer.
    pub(super) fn give_up_waiting(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        if matches!(lead.stage, Stage::Bringing { until, .. } if until <= now) {
            self.ask_again(now);
        }
    }

    /// The source has it no more. Whoever lacks it cannot be brought along: without them, if enough remain.
    pub fn fetch_gone(&mut self, now: Moment, member: NodeId, epoch: u32) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Stage::Bringing { source, highest, fetching: true, .. } = lead.stage else { return };
        if source != member || lead.epoch != epoch {
            return;
        }
        lead.peers.keep(|peer| peer.phase == Phase::Following && peer.reported == Some(highest));
        self.ask_again(now);
    }

    /// Proposes to start the epoch with exactly those that are equal now.
    fn start(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let mut wanted = self.record.clone();
        let equal = |node: &NodeId| {
            lead.peers
                .get(*node)
                .is_some_and(|peer| peer.phase == Phase::Following && peer.acked >= lead.committed)
        };
        wanted.in_sync.retain(equal);
        if wanted.in_sync.len() < wanted.min_in_sync.max(1) as usize {
            // Not before more of them are here: `promised` begins anew.
            lead.stage = Stage::Gathering { until: now.after_ns(GATHER_PATIENCE_NS) };
            return;
        }
        let left = self.record.in_sync.iter().filter(|node| !wanted.in_sync.contains(node));
        let since_version = self.record.version + 1;
        wanted.stale.extend(left.map(|node| StaleReplica { node: *node, since_version }));
        wanted.stale.sort_by_key(|replica| replica.node);
        if wanted.stale.is_empty() && wanted.catching_up.is_empty() {
            // Nobody is left who could have come to another end.
            wanted.epoch_ends.clear();
        }
        if wanted.last_started > 0 {
            // A replica older than the oldest end is copied whole.
            let surplus = (wanted.epoch_ends.len() + 1).saturating_sub(EPOCH_ENDS_KEPT);
            wanted.epoch_ends.drain(..surplus);
            wanted.epoch_ends.push(EpochEnd { epoch: wanted.last_started, sequence: lead.committed });
        }
        wanted.version = since_version;
        wanted.proposal = proposal_of(&self.record);
        wanted.started = true;
        wanted.last_started = lead.epoch;
        let wanted = Box::new(wanted);
        lead.stage = Stage::Starting;
        lead.open = Some((wanted.clone(), now.after_ns(PROPOSE_AGAIN_NS)));
        self.effects.push_back(HeadEffect::Propose(wanted));
    }

    /// The epoch has started. An earlier head reads as long as all its members let it: the first grant that lapses ends
    /// that.
    fn wait_for_grants(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let grants = lead.peers.iter().filter(|peer| peer.reported.is_some());
        let until = grants.map(|peer| peer.grants_until).min().expect("somebody promised");
        let until = if lead.unhindered { now } else { until };
        let record = &self.record;
        lead.peers.keep(|peer| record.is_in_sync(peer.node));
        lead.stage = Stage::Waiting { until };
        self.handle_timeout(now);
    }

    pub(super) fn serve_if_waited(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        if matches!(lead.stage, Stage::Waiting { until } if until <= now) {
            lead.stage = Stage::Serving;
            lead.ask_leases_at = now;
            self.effects.push_back(HeadEffect::Started);
        }
    }
}

/// Names the next proposal of this head: its session, and the version that it makes.
pub(super) fn proposal_of(record: &Record) -> u64 {
    let session = record.head.map_or(0, |head| head.session);
    session.wrapping_add(record.version.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
