//! The other reactors of the process: what is posted to them, and connections on their way from one to the other.
//!
//! ```text
//!   here:   HandOver ─▶ the watch is cancelled and reaped ─▶ Message::Moved ─▶ elsewhere: Event::Adopted
//!           the place stays taken ──────────────────────────────────────────┐        │ closed, lingered
//!           Event::Closed, the place is free  ◀────────── Message::Gone ◀───┴────────┘
//! ```
//!
//! So whoever accepts has a place for each of its connections, wherever they are, and the process never has more of them
//! than one reactor has places, if one accepts: no reactor lacks a place for what is handed to it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::mailbox::{Mailbox, Message, MovedSocket, PostError};
use super::memory::Arena;
use super::{Reactor, connection};
use crate::engine::ports::{ConnectionId, Engine, Event, PeerAddress};
use crate::engine::shard::MovedConnection;
use crate::engine::shard_message::ShardIndex;

/// A mailbox that is full is tried again after so long: its reactor is busy.
pub(super) const POST_AGAIN_NS: u64 = 1_000_000;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Siblings<R> {
    this: ShardIndex,
    mailboxes: Vec<Mailbox<R>>,
    /// What found a full mailbox, and what came behind it.
    unposted: VecDeque<(ShardIndex, Message<R>)>,
}

impl<R> Siblings<R> {
    pub(super) fn none() -> Siblings<R> {
        Siblings { this: ShardIndex(0), mailboxes: Vec::new(), unposted: VecDeque::new() }
    }

    pub(super) fn has_unposted(&self) -> bool {
        !self.unposted.is_empty()
    }
}

impl<E: Engine<Memory = Arena>> Reactor<E> {
    /// Makes the reactor number `this` of a process with the reactors that `mailboxes` lead to, itself among them.
    ///
    /// # Panics
    /// If it is not among them.
    pub fn join(&mut self, this: ShardIndex, mailboxes: Vec<Mailbox<E::Report>>) {
        assert!(usize::from(this.0) < mailboxes.len(), "{this:?} of {}", mailboxes.len());
        self.siblings = Siblings { this, mailboxes, unposted: VecDeque::new() };
    }

    /// This reactor's number.
    pub(super) fn this(&self) -> ShardIndex {
        self.siblings.this
    }

    /// Messages to one reactor arrive in the order in which they are posted here. What is for one that has ended is lost,
    /// as its connections are.
    pub(super) fn post(&mut self, to: ShardIndex, message: Message<E::Report>) {
        self.siblings.unposted.push_back((to, message));
        self.post_waiting();
    }

    /// Posts what there is room for.
    pub(super) fn post_waiting(&mut self) {
        while let Some((to, message)) = self.siblings.unposted.pop_front() {
            let moved = if let Message::Moved(moved) = &message { Some(moved.origin) } else { None };
            match self.siblings.mailboxes[usize::from(to.0)].post(message) {
                Ok(()) => {}
                Err(PostError::Full(message)) => return self.siblings.unposted.push_front((to, message)),
                Err(PostError::Ended) => moved.into_iter().for_each(|id| self.connection_gone(id)),
            }
        }
    }

    /// Hands a connection over as soon as nothing of it is with the kernel.
    pub(super) fn hand_over(&mut self, id: ConnectionId, to: ShardIndex, moved: Box<MovedConnection>) {
        if let Some(watch) = self.begin_departure(id, to, moved) {
            self.cancel(watch);
        } else {
            self.depart(id);
        }
    }

    /// Nothing of a connection that is to go is with the kernel any more.
    pub(super) fn depart(&mut self, id: ConnectionId) {
        let connection::Departed { socket, peer, to, moved } = self.take_departing(id);
        let origin = id;
        self.post(
            to,
            Message::Moved(Box::new(MovedSocket { from: self.this(), origin, socket, peer, moved })),
        );
    }

    /// A connection comes from another reactor.
    pub(super) fn adopt(&mut self, arrived: MovedSocket) {
        let MovedSocket { from, origin, socket, peer, moved } = arrived;
        match self.place_connection(socket, peer, Some((from, origin))) {
            Some(id) => self.pending.push_back(Event::Adopted { connection: id, moved }),
            None => {
                self.counters.refused += 1;
                self.post(from, Message::Gone { connection: origin });
            }
        }
    }

    /// A connection that was handed over is gone: its place here is free.
    pub(super) fn connection_gone(&mut self, id: ConnectionId) {
        self.free_connections.push(id);
        self.pending.push_back(Event::Closed { connection: id });
        self.admit_waiting();
    }

    /// A place for a socket, unless there is none, here or in the ring's table: then the socket is closed.
    pub(super) fn place_connection(
        &mut self,
        socket: OwnedFd,
        peer: PeerAddress,
        origin: Option<(ShardIndex, ConnectionId)>,
    ) -> Option<ConnectionId> {
        let id = self.free_connections.pop()?;
        let slot = u32::try_from(self.devices.len()).expect("few devices") + id.0;
        let Ok(target) = self.ring.register_file(slot, &socket) else {
            self.free_connections.push(id);
            return None;
        };
        self.connections[id.0 as usize].open(id, socket, target, peer, origin);
        Some(id)
    }
}
