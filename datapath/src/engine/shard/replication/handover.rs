//! A volume moves from one node to another as planned, and heads let go of theirs when the process ends.
//!
//! ```text
//!   old head:  attached elsewhere ─▶ begins no request more ─▶ those under way are answered ─▶ releases ─▶ record
//!   new head:  attached here ─▶ waits for that, but not long ─▶ takes the volume, with nothing to wait for
//! ```
//!
//! That the volume is attached to a node is what its record says. Who attached it there knows why: the new head waits for the
//! old one for the sake of those whom it serves, and because what it has let go can be served at once.

use super::super::Shard;
use super::{NodeConfig, Replica, Replication};
use crate::memory::Memory;
use crate::record::NodeId;
use crate::replica::bugs::PlantedBug;
use crate::units::Moment;

/// Requests that are under way when a volume moves are answered if they end within this time.
const LEAVING_NS_MAX: u64 = 100_000_000;
/// An old head from which nothing is heard for so long is not waited for any longer.
const HANDOVER_NS_MAX: u64 = 1_000_000_000;
/// So long a process that ends waits for its records to say that its heads have let go.
const LAST_RELEASES_NS_MAX: u64 = 500_000_000;

impl Replica {
    /// Where the volume is to be led instead of here, if that node is ready for it: its replica follows, or it can be talked
    /// to and will lead without one.
    fn is_wanted_by(&self, node: NodeId, is_up: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        let record = self.head.record();
        let ready = |other: &NodeId| match record.is_in_sync(*other) {
            true => self.head.is_following(*other),
            false => is_up(*other),
        };
        record.attached.filter(|other| *other != node).filter(ready)
    }

    /// Could this node lead the volume, which is attached to it, though it has no replica to lead it with?
    fn leads_without(&self, node: NodeId) -> bool {
        let record = self.head.record();
        self.is_attached_here(node) && (!record.is_in_sync(node) || self.failed || self.lost)
    }

    /// Until when this node, to which the volume is attached, waits for the head that has it now.
    pub(super) fn waits_for_release_until(&self, config: NodeConfig) -> Option<Moment> {
        let record = self.head.record();
        let since = self.attached_since?;
        record.living_head().filter(|head| head.node != config.node)?;
        let until = since.after_ns(HANDOVER_NS_MAX);
        // Where no head reads by this member's leave any more, none lives that it could wait for.
        let member = self.member.as_ref().filter(|_| record.is_in_sync(config.node));
        Some(member.map_or(until, |member| member.granted_until().min(until)))
    }

    /// May this node take the volume, which it does not refuse to its clients?
    pub(super) fn may_take(&self, config: NodeConfig, now: Moment) -> bool {
        let can = self.member.is_some() || self.leads_without(config.node);
        can && self.waits_for_release_until(config).is_none_or(|until| until <= now)
    }

    /// A record was read. True if the volume was attached here, and is attached nowhere any more.
    pub(super) fn note_attachment(&mut self, node: NodeId, now: Moment) -> bool {
        let attached = self.head.record().attached;
        let before = self.attached_since;
        self.attached_since = (attached == Some(node)).then(|| before.unwrap_or(now));
        before.is_some() && attached.is_none()
    }
}

impl<M: Memory> Shard<M> {
    /// A record was read: the volume is attached here, or not any more.
    pub(super) fn note_attachment(&mut self, index: usize) {
        let (now, node) = (self.now, self.replication.node());
        let replica = &mut self.replication.replicas[index];
        let is_detached = replica.note_attachment(node, now);
        let is_used = self.served[replica.served].connections > 0 || replica.head.is_filling();
        if is_detached && replica.head.is_serving() && !is_used {
            // Whoever wants it next, elsewhere perhaps, has it at once.
            replica.head.release(now);
        }
    }

    /// Lets go of a volume that is attached to another node, once that node is ready and what was begun is answered.
    pub(super) fn hand_over_if_asked(&mut self, index: usize) {
        let (now, node) = (self.now, self.replication.node());
        let Replication { replicas, dials, .. } = &mut self.replication;
        let replica = &mut replicas[index];
        if !replica.head.is_serving() {
            return;
        }
        let wanted = replica.is_wanted_by(node, |other| dials.is_up(other)).is_some();
        match replica.leaving_since {
            None if wanted => replica.leaving_since = Some(now),
            Some(_) if !wanted => {
                replica.leaving_since = None;
                let served = replica.served;
                self.wake_connections(served);
            }
            _ => {}
        }
        let Some(since) = self.replication.replicas[index].leaving_since else { return };
        if now >= since.after_ns(LEAVING_NS_MAX) || self.is_all_answered(index) {
            self.replication.replicas[index].head.release(now);
            self.settle_head(index);
        }
    }

    /// Has every request that clients made of the volume been answered, and is the answer on its way?
    fn is_all_answered(&mut self, index: usize) -> bool {
        let served = self.replication.replicas[index].served;
        let export = u32::try_from(served).expect("exports fit 32 bits");
        if self.tasks.iter().any(|(_, task)| task.export == export) {
            return false;
        }
        let chosen = self.connections_of(served);
        chosen.into_iter().all(|id| {
            let connection = self.connections[id.0 as usize].as_deref().expect("listed just now");
            connection.output.is_empty() && !connection.output.is_sending() && connection.payload.is_none()
        })
    }

    /// Does a volume move away, so that nothing more is begun?
    pub(super) fn is_leaving(&self, index: usize) -> bool {
        let replica = &self.replication.replicas[index];
        replica.leaving_since.is_some() && !self.replication.bugs.has(PlantedBug::ReadsAfterRelease)
    }

    /// The process ends: heads let go. True when that is known to be so, or has taken too long.
    pub(super) fn have_heads_let_go(&mut self) -> bool {
        let now = self.now;
        let until =
            *self.replication.last_releases_until.get_or_insert_with(|| now.after_ns(LAST_RELEASES_NS_MAX));
        for index in 0..self.replication.replicas.len() {
            let head = &mut self.replication.replicas[index].head;
            head.release(now);
            if now >= until {
                head.give_up_release();
                head.resign();
            }
            self.settle_head(index);
        }
        self.replication
            .replicas
            .iter()
            .all(|replica| !replica.head.is_active() && !replica.head.is_releasing())
    }
}

impl Replication {
    /// When a volume that moves wants its turn. `takes`: the node still takes volumes.
    pub(super) fn poll_handover_timeout(&self, takes: bool) -> Option<Moment> {
        let leaving = self.replicas.iter().filter_map(|replica| replica.leaving_since);
        let leaving = leaving.map(|since| since.after_ns(LEAVING_NS_MAX));
        let config = self.node?;
        let idle = |replica: &&Replica| takes && !replica.head.is_active() && !replica.head.is_releasing();
        let waiting = self.replicas.iter().filter(idle);
        let taking = waiting.filter_map(|replica| replica.waits_for_release_until(config));
        let releases = self.replicas.iter().any(|replica| replica.head.is_releasing());
        let last = self.last_releases_until.filter(|_| releases);
        leaving.chain(taking).chain(last).min()
    }
}
