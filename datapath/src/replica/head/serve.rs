//! Serving: numbers, acknowledgements, leases, and members that fail.

use super::peers::Phase;
use super::view::proposal_of;
use super::{
    GATHERED_BLOCKS_MAX, GATHERED_CHANGES_MAX, Head, HeadEffect, Lead, MEMBER_PATIENCE_NS, PROPOSE_AGAIN_NS,
    Role, Stage, SubmitError, Windowed,
};
use crate::record::{ChangeKind, NodeId, StaleReplica, Stamp};
use crate::replica::{LEASE_DRIFT_NS, LEASE_EVERY_NS, LEASE_NS};
use crate::units::Moment;
use crate::wire::peer_message::ChangeHeader;

impl Head {
    /// Numbers a change; [`Self::stream`] sends it to all members. [`HeadEffect::Committed`] will name the cookie.
    /// `new_blocks` is what it newly takes at most; [`Head::find_room`] has said that there is room for it.
    ///
    /// # Errors
    /// [`SubmitError::NotServing`]: nothing was done.
    pub fn submit(
        &mut self,
        now: Moment,
        cookie: u32,
        kind: ChangeKind,
        block: u32,
        (count, new_blocks): (u32, u32),
    ) -> Result<Stamp, SubmitError> {
        let Role::Lead(lead) = &mut self.role else { return Err(SubmitError::NotServing) };
        if lead.stage != Stage::Serving {
            return Err(SubmitError::NotServing);
        }
        let previous = lead.last;
        let stamp = Stamp { epoch: lead.epoch, sequence: previous.sequence + 1 };
        let change = ChangeHeader { kind, block, count, stamp, previous, new_blocks };
        lead.last = stamp;
        if lead.window.is_empty() {
            // Nobody owed anything until now.
            lead.peers.iter_mut().for_each(|peer| peer.acked_at = now);
        }
        lead.window.push_back(Windowed { change, cookie: Some(cookie) });
        self.spend_room(now, new_blocks);
        Ok(stamp)
    }

    /// There is a connection to a member.
    pub fn member_up(&mut self, now: Moment, member: NodeId) {
        self.note_reachable(now, member, true);
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(peer) = lead.peers.get_mut(member) else { return };
        peer.reconnect(Phase::Asked, now, lead.last.sequence);
        // Whatever was sent before may never have arrived.
        peer.sent = 0;
        self.effects.push_back(HeadEffect::Promise { member, epoch: lead.epoch });
    }

    /// The connection to a member is gone, and with it whatever was on its way.
    pub fn member_down(&mut self, now: Moment, member: NodeId) {
        self.note_reachable(now, member, false);
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(peer) = lead.peers.get_mut(member) else { return };
        peer.reconnect(Phase::Away, now, lead.last.sequence);
        if matches!(lead.stage, Stage::Bringing { .. }) {
            self.lost_while_bringing(now, member);
        }
    }

    /// Without this one the others may be equal already, or another source is needed.
    fn lost_while_bringing(&mut self, now: Moment, member: NodeId) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Stage::Bringing { source, .. } = lead.stage else { return };
        if source == member {
            self.ask_again(now);
        } else {
            self.commit(now);
        }
    }

    /// A member follows after the view was made: it goes on where it stands.
    pub(super) fn follows_again(&mut self, now: Moment, member: NodeId, last: Stamp) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(peer) = lead.peers.get_mut(member) else { return };
        if last.sequence < peer.acked || last > lead.last {
            // It lost what it had on stable media, or has what nobody sent: it is not the replica that it was. It is
            // sent nothing more, and removed for that.
            peer.enter(Phase::Asked, peer.since);
            return;
        }
        peer.acked = last.sequence;
        peer.acked_at = now;
        self.stream_to_all(now);
        self.commit(now);
    }

    /// Changes up to `through` are on a member's stable media.
    pub fn acked(&mut self, now: Moment, member: NodeId, epoch: u32, through: u64) {
        let Role::Lead(lead) = &mut self.role else { return };
        let last = lead.last.sequence;
        let Some(peer) = lead.peers.get_mut(member).filter(|_| lead.epoch == epoch) else { return };
        if through > peer.acked && through <= last {
            peer.acked = through;
            peer.acked_at = now;
            self.commit(now);
        }
    }

    /// A member lacks something between its last change and what it was sent: it is sent that again.
    pub fn gap(&mut self, now: Moment, member: NodeId, epoch: u32, last: Stamp) {
        let Role::Lead(lead) = &mut self.role else { return };
        let committed = lead.committed;
        let Some(peer) = lead.peers.get_mut(member).filter(|_| lead.epoch == epoch) else { return };
        if last.sequence >= committed.max(peer.acked) && last.sequence < peer.sent {
            peer.sent = last.sequence;
            self.stream_to_all(now);
        }
    }

    /// A lease that was asked for at `asked`.
    pub fn leased(&mut self, now: Moment, member: NodeId, epoch: u32, asked: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        if let Some(peer) = lead.peers.get_mut(member).filter(|_| lead.epoch == epoch) {
            peer.leased_until = peer.leased_until.max(asked.after_ns(LEASE_NS - LEASE_DRIFT_NS));
            self.advance_fill(now);
            // It may be the answer that was awaited before another one is removed.
            self.remove_failed(now);
            self.remove_leaving(now);
        }
    }

    /// To be called when all that has happened by `now` was handled: sends members the changes since, unless more are to
    /// gather. Small changes gather while members are at work, so that each has one message, one write and one sync for all
    /// of them: the next ones go when everybody has answered, or when there are [`GATHERED_CHANGES_MAX`].
    pub fn stream(&mut self, now: Moment) {
        if self.lead().is_some_and(|lead| !lead.gathers(now)) {
            self.stream_to_all(now);
        }
    }

    pub(super) fn stream_to_all(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let last = lead.last.sequence;
        for peer in lead.peers.iter_mut().filter(|peer| peer.phase == Phase::Following) {
            if peer.sent == peer.acked && peer.sent < last {
                peer.acked_at = now;
            }
            // What is committed, all that were needed have; one that is not cannot be served from the window.
            let first = peer.sent.max(lead.committed) + 1;
            let skipped = usize::try_from(first - (lead.committed + 1)).expect("a window in memory");
            for Windowed { change, .. } in lead.window.iter().skip(skipped) {
                let (member, epoch, change) = (peer.node, lead.epoch, *change);
                self.effects.push_back(HeadEffect::Change { member, epoch, change });
            }
            peer.sent = last;
        }
    }

    /// Lets go of what everybody needed has on stable media.
    pub(super) fn commit(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let needed = match lead.stage {
            Stage::Bringing { .. } => {
                let following = lead.peers.iter().filter(|peer| peer.phase == Phase::Following);
                following.map(|peer| peer.node).collect()
            }
            _ => {
                let mut needed = lead.needed(&self.record, self.bugs);
                needed.extend(lead.fills.awaited());
                needed
            }
        };
        let through = lead.peers.acked_by_all(&needed);
        while lead.window.front().is_some_and(|first| first.change.stamp.sequence <= through) {
            let Windowed { change, cookie, .. } = lead.window.pop_front().expect("looked at");
            lead.committed = change.stamp.sequence;
            self.effects.push_back(HeadEffect::Committed { sequence: lead.committed, cookie });
        }
        self.bring_on(now);
        self.advance_fill(now);
    }

    /// Somebody changed the record within the epoch, most often this head.
    pub(super) fn record_changed(&mut self, now: Moment) {
        self.fill_recorded(now);
        let Role::Lead(lead) = &mut self.role else { return };
        let record = &self.record;
        let Lead { peers, fills, .. } = &mut **lead;
        peers.keep(|peer| record.is_in_sync(peer.node) || fills.is_of(peer.node));
        self.commit(now);
        self.begin_fill(now);
        self.remove_leaving(now);
    }

    /// Time has passed: see [`Self::poll_timeout`].
    pub fn handle_timeout(&mut self, now: Moment) {
        self.propose_again(now);
        self.promise_again(now);
        self.finish_gathering(now);
        self.give_up_waiting(now);
        self.serve_if_waited(now);
        self.ask_for_leases(now);
        if let Role::Lead(lead) = &mut self.role {
            // Whoever waits for room looks for it again in this turn.
            lead.room_again_at = lead.room_again_at.filter(|at| *at > now);
        }
        self.remove_failed(now);
        self.give_up_fill(now);
        self.begin_fill(now);
    }

    fn propose_again(&mut self, now: Moment) {
        let (proposal, again_at) = match &mut self.role {
            Role::Proposing { wanted, again_at } | Role::Releasing { wanted, again_at, .. } => {
                (wanted, again_at)
            }
            Role::Lead(lead) => match &mut lead.open {
                Some((open, again_at)) => (open, again_at),
                None => return,
            },
            Role::Idle => return,
        };
        if *again_at <= now {
            *again_at = now.after_ns(PROPOSE_AGAIN_NS);
            self.effects.push_back(HeadEffect::Propose(proposal.clone()));
        }
    }

    /// A member that was asked for its promise may not have known the volume yet.
    fn promise_again(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        for peer in lead.peers.iter_mut().filter(|peer| peer.is_to_be_asked_at().is_some_and(|at| at <= now))
        {
            peer.asked_at = now;
            self.effects.push_back(HeadEffect::Promise { member: peer.node, epoch: lead.epoch });
        }
    }

    fn ask_for_leases(&mut self, now: Moment) {
        let Role::Lead(lead) = &mut self.role else { return };
        let suspected = lead.ask_around_at(&self.record.in_sync).is_some_and(|at| at <= now);
        if lead.stage != Stage::Serving || lead.ask_leases_at > now && !suspected {
            return;
        }
        lead.ask_leases_at = now.after_ns(LEASE_EVERY_NS);
        let following = lead.peers.iter().filter(|peer| peer.phase == Phase::Following);
        let following: Vec<NodeId> = following.map(|peer| peer.node).collect();
        following.into_iter().for_each(|member| self.ask_for_lease(now, member));
        if let Role::Lead(lead) = &mut self.role {
            lead.is_filling_space &= suspected;
        }
    }

    /// Asks for the removal of one member that has failed, if enough others remain. Nothing is acknowledged without it
    /// before the record says so.
    fn remove_failed(&mut self, now: Moment) {
        let failed = self.removals().find(|(_, at)| *at <= now);
        let Some((failed, _)) = failed else { return };
        if failed == self.node && self.record.attached != Some(self.node) {
            // Reads come from the own replica: without it another node leads better.
            return self.resign();
        }
        self.propose_without(now, failed);
    }

    /// Asks for the removal of one member that is to go, if so many stay as the volume is to have. All of those must follow:
    /// the one that goes may be what they would be brought along from.
    fn remove_leaving(&mut self, now: Moment) {
        let Some(lead) = self.lead().filter(|lead| lead.stage == Stage::Serving && lead.open.is_none())
        else {
            return;
        };
        let follows =
            |node: &NodeId| lead.peers.get(*node).is_some_and(|peer| peer.phase == Phase::Following);
        let staying = self.record.staying().filter(follows).count();
        let fewest = self.record.replicas_wanted.max(self.record.min_in_sync).max(1) as usize;
        let leaving = self.record.in_sync.iter().find(|node| self.record.leaving.contains(node));
        if let Some(leaving) = leaving.copied().filter(|_| staying >= fewest) {
            self.propose_without(now, leaving);
        }
    }

    fn propose_without(&mut self, now: Moment, member: NodeId) {
        let Role::Lead(lead) = &mut self.role else { return };
        let mut wanted = Box::new(self.record.clone());
        wanted.version += 1;
        wanted.proposal = proposal_of(&self.record);
        wanted.in_sync.retain(|node| *node != member);
        wanted.stale.push(StaleReplica { node: member, since_version: wanted.version });
        wanted.stale.sort_by_key(|replica| replica.node);
        lead.open = Some((wanted.clone(), now.after_ns(PROPOSE_AGAIN_NS)));
        self.effects.push_back(HeadEffect::Propose(wanted));
    }

    /// The members that may be removed, each from some moment on.
    fn removals(&self) -> impl Iterator<Item = (NodeId, Moment)> {
        let may = |lead: &&Lead| {
            lead.open.is_none() && matches!(lead.stage, Stage::Serving | Stage::Waiting { .. })
        };
        self.lead().filter(may).into_iter().flat_map(move |lead| {
            let failing = self.record.in_sync.iter().filter(|node| self.leaves_enough(lead, **node));
            failing.filter_map(|node| Some((*node, lead.failed_at(*node)?)))
        })
    }

    /// Would enough remain without this member? Those count that answer. A head that hears nobody must not remove anybody:
    /// the others may hear it all, and what is left in the record would be this node and one more.
    fn leaves_enough(&self, lead: &Lead, member: NodeId) -> bool {
        let others = self.record.in_sync.iter().filter(|node| **node != member);
        let answering = others.filter(|node| match lead.stage {
            Stage::Serving => lead.has_answered_since_suspicion(**node, member),
            // Leases are not asked for yet.
            _ => true,
        });
        answering.count() >= self.record.min_in_sync.max(1) as usize
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        let lead = match &self.role {
            Role::Idle => return None,
            Role::Proposing { again_at, .. } | Role::Releasing { again_at, .. } => return Some(*again_at),
            Role::Lead(lead) => lead,
        };
        let again = lead.open.as_ref().map(|(_, again_at)| *again_at);
        let stage = match lead.stage {
            Stage::Gathering { until } | Stage::Waiting { until } | Stage::Bringing { until, .. } => {
                Some(until)
            }
            Stage::Serving => {
                let suspected = lead.ask_around_at(&self.record.in_sync);
                Some(suspected.map_or(lead.ask_leases_at, |at| at.min(lead.ask_leases_at)))
            }
            Stage::Starting => None,
        };
        let removal = self.removals().map(|(_, at)| at).min();
        let ask = lead.peers.iter().filter_map(super::Peer::is_to_be_asked_at).min();
        let again = again.into_iter().chain(lead.room_again_at);
        again.chain(stage).chain(removal).chain(ask).chain(self.poll_fill_timeout()).min()
    }
}

impl Lead {
    /// Do changes wait for more of their kind? Not where somebody waits for the moment at which a member has all, nor where
    /// the newest is a large one: those that were held before it are small. And not for a member that is silent: should the
    /// head die, what the others have is all there is.
    fn gathers(&self, now: Moment) -> bool {
        let small = |newest: &Windowed| newest.change.payload_blocks() < GATHERED_BLOCKS_MAX;
        let following = || self.peers.iter().filter(|peer| peer.phase == Phase::Following);
        let sent = following().map(|peer| peer.sent).min();
        self.stage == Stage::Serving
            && self.open.is_none()
            && self.fills.is_idle()
            && self.window.back().is_some_and(small)
            && sent.is_some_and(|sent| self.last.sequence.saturating_sub(sent) < GATHERED_CHANGES_MAX)
            && following().any(|peer| peer.is_at_work(now))
    }

    /// Since when a member owes an answer, if it does.
    fn silent_since(&self, node: NodeId) -> Option<Moment> {
        let Some(peer) = self.peers.get(node) else { return Some(Moment::default()) };
        let owes = peer.acked < self.last.sequence;
        match peer.phase {
            Phase::Following if owes => Some(peer.acked_at),
            // What waits for its room is not numbered, so it owes nothing else.
            Phase::Following if self.room_needed > 0 => peer.credit.asking_since(),
            Phase::Following => None,
            Phase::Away | Phase::Asked => Some(peer.since),
        }
    }

    /// When a member counts as failed if nothing more is heard of it; never while it owes nothing.
    fn failed_at(&self, node: NodeId) -> Option<Moment> {
        Some(self.silent_since(node)?.after_ns(MEMBER_PATIENCE_NS))
    }

    /// Half way there the head asks all others for a sign of life: the leave to read that they are asked for anyway.
    fn suspected_at(&self, node: NodeId) -> Option<Moment> {
        Some(self.silent_since(node)?.after_ns(MEMBER_PATIENCE_NS / 2))
    }

    /// When to ask because of a suspicion that is newer than what was asked last.
    fn ask_around_at(&self, nodes: &[NodeId]) -> Option<Moment> {
        let suspected = nodes.iter().filter_map(|node| self.suspected_at(*node));
        suspected.filter(|at| at.after_ns(LEASE_EVERY_NS) > self.ask_leases_at).min()
    }

    /// Has `node` answered what it was asked when `member` was suspected, or later?
    fn has_answered_since_suspicion(&self, node: NodeId, member: NodeId) -> bool {
        let Some(suspected) = self.suspected_at(member) else { return true };
        let leased = suspected.after_ns(LEASE_NS - LEASE_DRIFT_NS);
        self.peers.get(node).is_some_and(|peer| peer.leased_until >= leased)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Record, VolumeNumber};

    const START: Moment = Moment(1 << 40);
    const NODES: [NodeId; 3] = [NodeId(0), NodeId(1), NodeId(2)];

    fn proposal(head: &mut Head) -> Option<Box<Record>> {
        let mut found = None;
        while let Some(effect) = head.poll_effect() {
            if let HeadEffect::Propose(record) = effect {
                found = Some(record);
            }
        }
        found
    }

    /// Node 0 leads all three, of which two must be in sync.
    fn serving() -> Head {
        let mut record = Record::new(VolumeNumber(1), "v", [1; 16], 1000, &NODES);
        record.min_in_sync = 2;
        let mut head = Head::new(NODES[0], record);
        head.take(START, 1);
        let opened = proposal(&mut head).expect("asks for an epoch");
        head.handle_record(START, &opened, |_| true);
        for node in NODES {
            head.promised(START, node, opened.epoch, Stamp::default(), 0);
        }
        let started = proposal(&mut head).expect("asks for its start");
        head.handle_record(START, &started, |_| true);
        head.handle_timeout(START);
        assert!(head.is_serving(), "{}", head.describe());
        head
    }

    /// Lets time pass until the head asks for a removal, at most until `end`. Only these nodes answer.
    fn removal(
        head: &mut Head,
        now: &mut Moment,
        end: Moment,
        answering: &[NodeId],
    ) -> Option<(Moment, Box<Record>)> {
        for _ in 0..1000 {
            while let Some(effect) = head.poll_effect() {
                match effect {
                    HeadEffect::Lease { member, epoch, .. } if answering.contains(&member) => {
                        head.leased(*now, member, epoch, *now);
                    }
                    HeadEffect::Change { member, epoch, change } if answering.contains(&member) => {
                        head.acked(*now, member, epoch, change.stamp.sequence);
                    }
                    HeadEffect::Propose(record) => return Some((*now, record)),
                    _ => {}
                }
            }
            let next = head.poll_timeout().expect("a head that serves asks for leases").max(*now);
            if next > end {
                *now = end;
                return None;
            }
            *now = next;
            head.handle_timeout(next);
        }
        panic!("it does nothing but look at the clock: {}", head.describe());
    }

    #[test]
    fn a_silent_member_is_removed_after_its_time() {
        let (mut head, mut now) = (serving(), START);
        head.submit(now, 1, ChangeKind::Data, 0, (1, 0)).expect("it serves");
        head.stream(now);
        let end = START.after_ns(10 * MEMBER_PATIENCE_NS);
        let (at, record) = removal(&mut head, &mut now, end, &NODES[..2]).expect("it is removed");
        assert_eq!((at, &record.in_sync[..]), (START.after_ns(MEMBER_PATIENCE_NS), &NODES[..2]));
    }

    /// The record in which this replica is to go.
    fn leaving(head: &Head, node: NodeId, wanted: u32) -> Record {
        let next = head.record().with_leaving(node, true, 77).expect("it has one");
        Record { replicas_wanted: wanted, ..next }
    }

    #[test]
    fn one_that_is_to_go_is_taken_out_once_enough_stay_and_is_not_brought_back() {
        let mut head = serving();
        let unwanted = leaving(&head, NODES[2], 3);
        head.handle_record(START, &unwanted, |_| true);
        assert_eq!(proposal(&mut head), None, "two of three would stay");
        let unwanted = Record { version: unwanted.version + 1, replicas_wanted: 2, ..unwanted };
        head.handle_record(START, &unwanted, |_| true);
        let out = proposal(&mut head).expect("it is taken out");
        assert_eq!((&out.in_sync[..], &out.leaving[..]), (&NODES[..2], &NODES[2..]));
        // Until that is known its acknowledgement counts.
        head.submit(START, 5, ChangeKind::Data, 0, (1, 0)).expect("it serves");
        head.stream(START);
        head.acked(START, NODES[0], 1, 1);
        head.acked(START, NODES[1], 1, 1);
        assert_eq!(head.committed(), 0);
        head.handle_record(START, &out, |_| true);
        assert_eq!(head.committed(), 1);
        let later = START.after_ns(20_000_000_000);
        head.handle_timeout(later);
        assert!(!head.is_filling() && proposal(&mut head).is_none(), "{}", head.describe());
        let stays = out.with_leaving(NODES[2], false, 78).expect("it has one");
        head.handle_record(later, &stays, |_| true);
        assert!(head.is_filling(), "it stays after all");
    }

    #[test]
    fn nobody_is_let_go_while_one_of_those_that_stay_does_not_follow() {
        let mut head = serving();
        head.member_down(START, NODES[1]);
        let record = leaving(&head, NODES[2], 2);
        head.handle_record(START, &record, |node| node != NODES[1]);
        assert_eq!(proposal(&mut head), None);
        head.member_up(START, NODES[1]);
        head.promised(START, NODES[1], 1, Stamp::default(), 0);
        head.leased(START, NODES[1], 1, START);
        assert!(proposal(&mut head).is_some(), "{}", head.describe());
    }

    #[test]
    fn a_head_whose_own_replica_goes_leads_on_and_fills_that_again_if_it_stays() {
        let mut head = serving();
        let record = leaving(&head, NODES[0], 2);
        head.handle_record(START, &record, |_| true);
        let out = proposal(&mut head).expect("its own is taken out");
        assert_eq!(out.in_sync, NODES[1..]);
        head.handle_record(START, &out, |_| true);
        assert!(head.is_serving());
        head.submit(START, 5, ChangeKind::Data, 0, (1, 0)).expect("it serves");
        head.stream(START);
        let sent = std::iter::from_fn(|| head.poll_effect()).filter_map(|effect| match effect {
            HeadEffect::Change { member, .. } => Some(member),
            _ => None,
        });
        assert_eq!(sent.collect::<Vec<_>>(), NODES[1..]);
        let stays = out.with_leaving(NODES[0], false, 78).expect("it has one");
        head.handle_record(START, &stays, |_| true);
        let marked = proposal(&mut head).expect("its own is filled");
        assert_eq!((&marked.catching_up[..], &marked.in_sync[..]), (&NODES[..1], &NODES[1..]));
    }

    /// The driver gives up a connection on which nothing arrives. That, and calling anew, is no sign of life.
    #[test]
    fn a_member_whose_connection_was_given_up_for_silence_gets_no_more_time_for_it() {
        let (mut head, mut now) = (serving(), START);
        head.submit(now, 1, ChangeKind::Data, 0, (1, 0)).expect("it serves");
        head.stream(now);
        let end = START.after_ns(MEMBER_PATIENCE_NS - 2);
        assert_eq!(removal(&mut head, &mut now, end, &NODES[..2]), None);
        head.member_down(now, NODES[2]);
        head.member_up(now.after_ns(1), NODES[2]);
        let end = START.after_ns(10 * MEMBER_PATIENCE_NS);
        let (at, record) = removal(&mut head, &mut now, end, &NODES[..2]).expect("it is removed");
        assert_eq!((at, &record.in_sync[..]), (START.after_ns(MEMBER_PATIENCE_NS), &NODES[..2]));
    }

    /// What it proposes may reach the record store although no answer reaches it: then a member that nothing is wrong with
    /// would be out of the record, and with this node away there would be too few to go on.
    #[test]
    fn a_head_that_hears_nobody_removes_nobody() {
        let (mut head, mut now) = (serving(), START);
        // The second owed nothing when the silence began.
        head.submit(now, 1, ChangeKind::Data, 0, (1, 0)).expect("it serves");
        head.stream(now);
        head.acked(now, NODES[1], head.lead().expect("it leads").epoch, 1);
        let end = START.after_ns(10 * MEMBER_PATIENCE_NS);
        assert_eq!(removal(&mut head, &mut now, end, &NODES[..1]), None);
        // The third stays away when the second is heard again.
        let again = end.after_ns(2 * MEMBER_PATIENCE_NS);
        let (_, record) = removal(&mut head, &mut now, again, &NODES[..2]).expect("it is removed");
        assert_eq!(record.in_sync, NODES[..2]);
    }

    /// What each node is sent, in order.
    fn sent(head: &mut Head) -> [Vec<u64>; 3] {
        let mut sent: [Vec<u64>; 3] = Default::default();
        while let Some(effect) = head.poll_effect() {
            if let HeadEffect::Change { member, change, .. } = effect {
                sent[member.0 as usize].push(change.stamp.sequence);
            }
        }
        sent
    }

    #[test]
    fn small_changes_gather_while_members_are_at_work() {
        let mut head = serving();
        let epoch = head.epoch();
        let submit = |head: &mut Head, count| {
            head.submit(START, 1, ChangeKind::Data, 0, (count, 0)).expect("it serves");
        };
        let everybody = |sequences: Vec<u64>| [sequences.clone(), sequences.clone(), sequences];
        submit(&mut head, 1);
        submit(&mut head, 1);
        head.stream(START);
        assert_eq!(sent(&mut head), everybody(vec![1, 2]), "nobody is at work: what came in a turn goes");
        submit(&mut head, 1);
        head.stream(START);
        submit(&mut head, GATHERED_BLOCKS_MAX - 1);
        NODES[..2].iter().for_each(|node| head.acked(START, *node, epoch, 2));
        head.stream(START);
        assert_eq!(sent(&mut head), everybody(vec![]), "one is at work");
        head.acked(START, NODES[2], epoch, 2);
        head.stream(START);
        assert_eq!(sent(&mut head), everybody(vec![3, 4]));
        submit(&mut head, 1);
        submit(&mut head, GATHERED_BLOCKS_MAX);
        head.stream(START);
        assert_eq!(
            sent(&mut head),
            everybody(vec![5, 6]),
            "a large one does not wait, nor what is before it"
        );
        (1..GATHERED_CHANGES_MAX).for_each(|_| submit(&mut head, 1));
        head.stream(START);
        assert_eq!(sent(&mut head), everybody(vec![]));
        submit(&mut head, 1);
        head.stream(START);
        assert_eq!(sent(&mut head), everybody((7..7 + GATHERED_CHANGES_MAX).collect()), "enough for a batch");
        submit(&mut head, 1);
        head.stream(START.after_ns(super::super::GATHER_SILENCE_NS));
        assert_eq!(sent(&mut head)[1], [7 + GATHERED_CHANGES_MAX], "nobody waits for who is silent");
    }

    /// It may have had a replica before, left at a time of which the ends of epochs are forgotten.
    #[test]
    fn nothing_that_an_added_node_holds_counts() {
        let newcomer = NodeId(3);
        for fresh in [true, false] {
            let mut head = serving();
            let mut record = head.record().with_replica(newcomer, 9).expect("it has none");
            if !fresh {
                record.fresh.clear();
            }
            head.handle_record(START, &record, |_| true);
            let marked = proposal(&mut head).expect("it is to catch up");
            assert_eq!((&marked.catching_up[..], marked.fresh.len()), (&[newcomer][..], usize::from(fresh)));
            head.handle_record(START, &marked, |_| true);
            while head.poll_effect().is_some() {}
            head.promised(START, newcomer, head.epoch(), Stamp { epoch: 1, sequence: 0 }, 0);
            let asked = std::iter::from_fn(|| head.poll_effect()).next();
            match asked {
                Some(HeadEffect::Fill { member, .. }) if fresh => assert_eq!(member, newcomer),
                Some(HeadEffect::Compare { base, .. }) if !fresh => assert_eq!(base.epoch, 1),
                other => panic!("fresh {fresh}: {other:?}"),
            }
        }
    }

    /// Somebody adds a replica while this node becomes the head: the news of that may come first, and alone.
    #[test]
    fn a_record_that_somebody_changed_since_still_tells_what_became_of_the_own_proposal() {
        let mut record = Record::new(VolumeNumber(1), "v", [1; 16], 1000, &NODES);
        record.min_in_sync = 2;
        let mut head = Head::new(NODES[0], record);
        head.take(START, 1);
        let opened = proposal(&mut head).expect("asks for an epoch");
        let opened = opened.with_replica(NodeId(3), 7).expect("it has none");
        head.handle_record(START, &opened, |_| true);
        NODES.iter().for_each(|node| head.promised(START, *node, opened.epoch, Stamp::default(), 0));
        let started = proposal(&mut head).expect("asks for its start");
        let started = started.without_replica(NodeId(3), 8).expect("not in sync");
        head.handle_record(START, &started, |_| true);
        head.handle_timeout(START);
        assert!(head.is_serving(), "{}", head.describe());
    }
}
