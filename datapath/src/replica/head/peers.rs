//! What the head knows of each member.

use super::room::Credit;
use super::{GATHER_SILENCE_NS, PROMISE_AGAIN_NS};
use crate::record::{NodeId, Stamp};
use crate::units::Moment;

/// How far the head is with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is no connection.
    Away,
    /// Asked for its promise.
    Asked,
    /// It follows this epoch and is sent changes.
    Following,
}

/// A member.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) node: NodeId,
    pub(super) phase: Phase,
    /// Unless it follows: since when nothing of use was heard of it.
    pub(super) since: Moment,
    /// When it was last asked for its promise.
    pub(super) asked_at: Moment,
    /// Its last change when it promised.
    pub(super) reported: Option<Stamp>,
    /// Until when it honours a lease that it granted to an earlier head.
    pub(super) grants_until: Moment,
    /// Changes up to here are on its stable media.
    pub(super) acked: u64,
    /// When it last acknowledged something new.
    pub(super) acked_at: Moment,
    /// Changes up to here were sent on its connection.
    pub(super) sent: u64,
    /// Until when it gave leave to read.
    pub(super) leased_until: Moment,
    /// The room that it has granted.
    pub(super) credit: Credit,
}

/// All members, by node.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers(Vec<Peer>);

impl Peers {
    pub(super) fn new(now: Moment, nodes: &[NodeId]) -> Peers {
        Peers(nodes.iter().map(|node| Peer::new(now, *node)).collect())
    }

    pub(super) fn add(&mut self, now: Moment, node: NodeId) {
        assert!(self.get(node).is_none(), "{node:?} is a peer");
        self.0.push(Peer::new(now, node));
    }

    pub(super) fn get(&self, node: NodeId) -> Option<&Peer> {
        self.0.iter().find(|peer| peer.node == node)
    }

    pub(super) fn get_mut(&mut self, node: NodeId) -> Option<&mut Peer> {
        self.0.iter_mut().find(|peer| peer.node == node)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.0.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.0.iter_mut()
    }

    /// Forgets all others.
    pub(super) fn keep(&mut self, keep: impl Fn(&Peer) -> bool) {
        self.0.retain(keep);
    }

    /// Up to where all of `nodes` have everything on stable media.
    pub(super) fn acked_by_all(&self, nodes: &[NodeId]) -> u64 {
        let acked = |node: &NodeId| self.get(*node).map_or(0, |peer| peer.acked);
        nodes.iter().map(acked).min().unwrap_or(0)
    }

    /// Have all of `nodes` given leave to read?
    pub(super) fn all_leased(&self, nodes: &[NodeId], now: Moment) -> bool {
        let leased = |node: &NodeId| self.get(*node).is_some_and(|peer| peer.leased_until > now);
        !nodes.is_empty() && nodes.iter().all(leased)
    }
}

impl Peer {
    fn new(now: Moment, node: NodeId) -> Peer {
        Peer {
            node,
            phase: Phase::Away,
            since: now,
            asked_at: now,
            reported: None,
            grants_until: Moment::default(),
            acked: 0,
            acked_at: now,
            sent: 0,
            leased_until: Moment::default(),
            credit: Credit::default(),
        }
    }

    /// When to ask it once more for its promise, if that is awaited.
    pub(super) fn is_to_be_asked_at(&self) -> Option<Moment> {
        (self.phase == Phase::Asked).then(|| self.asked_at.after_ns(PROMISE_AGAIN_NS))
    }

    /// Will it soon answer what it was sent?
    pub(super) fn is_at_work(&self, now: Moment) -> bool {
        self.sent > self.acked && now < self.acked_at.after_ns(GATHER_SILENCE_NS)
    }

    /// Its connection is gone, or new. Neither is an answer: a member that fell silent, and whose connection was given up
    /// for that, has been silent since before.
    pub(super) fn reconnect(&mut self, phase: Phase, now: Moment, last: u64) {
        let since = match self.phase {
            Phase::Following if self.acked < last => self.acked_at,
            Phase::Following => now,
            Phase::Away | Phase::Asked => self.since,
        };
        self.enter(phase, now);
        self.since = since;
        self.credit.note_lost();
    }

    pub(super) fn enter(&mut self, phase: Phase, now: Moment) {
        self.phase = phase;
        self.since = now;
        self.asked_at = now;
    }
}
