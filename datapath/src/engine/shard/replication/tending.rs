//! A volume that nobody uses is led for a while, because something has to be done for its replicas: one is to be filled, or
//! to go. Whoever keeps the records sees that, and asks a node.

use super::super::Shard;
use super::{NodeConfig, Replica};
use crate::memory::Memory;
use crate::record::VolumeNumber;
use crate::units::Moment;

/// So long nothing has to happen before the volume is let go. More than a head waits between two attempts to fill a replica.
const TENDED_NS: u64 = 10_000_000_000;

impl Replica {
    /// Is the head, which serves, at something that it would not do without being asked?
    fn has_work(&self) -> bool {
        let record = self.head.record();
        let goes = record.leaving.iter().any(|node| record.is_in_sync(*node));
        let may_go = goes && record.staying().count() >= record.replicas_wanted as usize;
        self.head.is_filling() || may_go
    }
}

impl super::Replication {
    /// When a volume that is tended wants its turn.
    pub(super) fn poll_tending_timeout(&self) -> Option<Moment> {
        self.replicas.iter().filter_map(|replica| replica.tended_until).min()
    }
}

impl<M: Memory> Shard<M> {
    /// Somebody wants the volume led, if nobody else leads it.
    pub(in crate::engine::shard) fn begin_tending(&mut self, volume: VolumeNumber) {
        if let Some(index) = self.replication.find(volume) {
            let until = self.now.after_ns(TENDED_NS);
            self.replication.replicas[index].tended_until = Some(until);
            self.progress = true;
        }
    }

    /// Once per turn.
    pub(super) fn tend(&mut self, index: usize) {
        let Some(until) = self.replication.replicas[index].tended_until else { return };
        // It is no reason to take the volume from a head that lives.
        let config = NodeConfig { steals: false, ..self.replication.config() };
        let now = self.now;
        let replica = &mut self.replication.replicas[index];
        if replica.head.is_serving() && replica.has_work() {
            replica.tended_until = Some(now.after_ns(TENDED_NS));
            return;
        }
        if until <= now || self.draining {
            replica.tended_until = None;
            let is_used = self.served[replica.served].connections > 0 || replica.attached_since.is_some();
            if replica.head.is_serving() && !is_used && !replica.checking.leads_for_it() {
                replica.head.release(now);
            }
        } else if !replica.head.is_active()
            && replica.refusal(config, now).is_none()
            && replica.may_take(config, now)
        {
            let random = self.replication.random();
            self.replication.replicas[index].head.take(now, random);
        }
        self.settle_head(index);
    }
}
