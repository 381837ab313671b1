//! What a driver does besides when its one engine is a node among several: the world decides about calls and records, and
//! about whose turn it is.

use datapath::engine::ports::{ConnectionId, Engine, Event};
use datapath::record::{NodeId, Record, VolumeNumber};
use datapath::units::Moment;

use super::Driver;
use crate::sim::memory::SimMemory;

impl<E: Engine<Memory = SimMemory>> Driver<E> {
    /// There is a connection to another node: to the one that the engine called, or from one that called.
    pub fn connect_node(&mut self, called: Option<NodeId>) -> ConnectionId {
        let id = self.open_pipe(0);
        self.tell(
            0,
            match called {
                Some(node) => Event::PeerConnected { node, connection: id },
                None => Event::PeerAccepted { connection: id },
            },
        );
        id
    }

    /// The node that the engine called cannot be reached.
    pub fn refuse_call(&mut self, node: NodeId) {
        self.tell(0, Event::PeerUnreachable { node });
    }

    /// The engine reads a record.
    pub fn tell_record(&mut self, record: Record) {
        self.tell(0, Event::Record(Box::new(record)));
    }

    /// Somebody wants something done for the replicas of a volume.
    pub fn tell_tend(&mut self, volume: VolumeNumber) {
        self.tell(0, Event::Tend { volume });
    }

    /// Somebody wants a volume verified.
    pub fn tell_verify(&mut self, volume: VolumeNumber, verify: u64) {
        self.tell(0, Event::Verify { volume, verify });
    }

    /// From now on calls of other nodes are the caller's to answer.
    pub fn allow_calls(&mut self) {
        self.calls = Some(Vec::new());
    }

    /// Whom the engine has called since the last time.
    pub fn take_calls(&mut self) -> Vec<NodeId> {
        self.calls.as_mut().map_or_else(Vec::new, std::mem::take)
    }

    /// When the next thing happens here, if the world does nothing before.
    #[must_use]
    pub fn next_moment(&self) -> Option<Moment> {
        self.agenda.next_moment()
    }

    /// Time passes, but nothing happens before `moment`.
    pub fn advance_to(&mut self, moment: Moment) {
        self.agenda.advance_to(moment);
    }

    /// The engine's thread gets no time for so long. If `late`, it has just read its clock for a turn.
    pub fn pause(&mut self, nanoseconds: u64, late: bool) {
        if late {
            self.threads[0].sleep_ns = nanoseconds;
            return self.plan_turn(0);
        }
        let until = self.now().after_ns(nanoseconds);
        self.threads[0].busy_until = self.threads[0].busy_until.max(until);
    }

    /// Whoever is on the other side of a connection takes no bytes, or takes them again.
    pub fn hold_reading(&mut self, id: ConnectionId, held: bool) {
        let was_held = std::mem::replace(&mut self.connection(id).reading_paused, held);
        if was_held && !held {
            self.plan_delivery(id);
        }
    }
}
