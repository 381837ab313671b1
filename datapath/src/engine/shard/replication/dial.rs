//! Connections to other nodes that heads on this node want: who is called, and when again.

use super::super::Shard;
use crate::engine::ports::{ConnectionId, Effect};
use crate::memory::Memory;
use crate::record::NodeId;
use crate::replica::head::Head;
use crate::units::Moment;

/// Before a node is called again after a failure: doubles up to the most.
const WAIT_NS: u64 = 50_000_000;
const WAIT_NS_MAX: u64 = 800_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Calling,
    /// Connected, and greeted or not.
    Connected(ConnectionId),
    /// The other node has answered the greeting.
    Up(ConnectionId),
    Waiting(Moment),
}

#[derive(Debug)]
struct Dial {
    node: NodeId,
    state: State,
    wait_ns: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Dials(Vec<Dial>);

impl Dials {
    fn get(&mut self, node: NodeId) -> Option<&mut Dial> {
        self.0.iter_mut().find(|dial| dial.node == node)
    }

    /// The connection to a node that has been greeted.
    pub(super) fn up(&self, node: NodeId) -> Option<ConnectionId> {
        self.0.iter().find(|dial| dial.node == node).and_then(|dial| match dial.state {
            State::Up(connection) => Some(connection),
            _ => None,
        })
    }

    pub(super) fn is_up(&self, node: NodeId) -> bool {
        self.up(node).is_some()
    }

    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        let waiting = self.0.iter().filter_map(|dial| match dial.state {
            State::Waiting(until) => Some(until),
            _ => None,
        });
        waiting.min()
    }

    pub(super) fn connected(&mut self, node: NodeId, connection: ConnectionId) {
        let dial = self.get(node).expect("a node that was called");
        assert_eq!(dial.state, State::Calling);
        dial.state = State::Connected(connection);
    }

    /// The node has greeted on this connection. False if that is not the one that leads to it.
    pub(super) fn greeted(&mut self, node: NodeId, connection: ConnectionId) -> bool {
        let Some(dial) = self.get(node).filter(|dial| dial.state == State::Connected(connection)) else {
            return false;
        };
        dial.state = State::Up(connection);
        dial.wait_ns = WAIT_NS;
        true
    }

    /// There is no connection to the node (any more).
    pub(super) fn failed(&mut self, now: Moment, node: NodeId) {
        if let Some(dial) = self.get(node) {
            dial.state = State::Waiting(now.after_ns(dial.wait_ns));
            dial.wait_ns = (dial.wait_ns * 2).min(WAIT_NS_MAX);
        }
    }
}

impl<M: Memory> Shard<M> {
    /// Calls every node that an active head needs: the replicas in sync, and once it serves those that it could bring back,
    /// and one to which the volume is attached.
    pub(super) fn dial_members(&mut self) {
        let own = self.replication.node();
        let active = self.replication.replicas.iter().filter(|replica| replica.head.is_active());
        let of_head = |head: &Head| {
            let record = head.record();
            match head.is_serving() {
                true => record.replicas().into_iter().chain(record.attached).collect(),
                false => record.in_sync.clone(),
            }
        };
        let mut wanted: Vec<NodeId> = active.flat_map(|replica| of_head(&replica.head)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for node in wanted.into_iter().filter(|node| *node != own) {
            let now = self.now;
            let due = match self.replication.dials.get(node) {
                None => {
                    let dial = Dial { node, state: State::Calling, wait_ns: WAIT_NS };
                    self.replication.dials.0.push(dial);
                    true
                }
                Some(dial) => {
                    let due = matches!(dial.state, State::Waiting(until) if until <= now);
                    if due {
                        dial.state = State::Calling;
                    }
                    due
                }
            };
            if due {
                self.effects.push_back(Effect::Connect { node });
            }
        }
        // A node that nobody needs now is not waited for.
        let now = self.now;
        self.replication.dials.0.retain(|dial| !matches!(dial.state, State::Waiting(until) if until <= now));
    }
}
