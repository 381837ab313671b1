//! Accepting connections.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::opcode;
use nix::sys::socket::{SockaddrLike, SockaddrStorage, getpeername, setsockopt, sockopt};

use super::connection::Newcomer;
use super::features::Feature;
use super::inflight::Ticket;
use super::memory::Arena;
use super::ring::Target;
use super::{Operation, Reactor};
use crate::engine::ports::{Engine, Event, PeerAddress};
use crate::record::NodeId;

/// After an error that will not pass by itself at once (no files, no memory), the next attempt waits this long.
const ACCEPT_RETRY_MS: u64 = 100;

/// A listening socket of this reactor; others may listen on the same one.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) accepting: Option<Ticket>,
    /// Other nodes come in here, not clients.
    pub(super) for_nodes: bool,
}

/// Accepted sockets that wait for a connection's place, and for how long they may. Long enough for those that left
/// to be noticed; a client that finds all places taken by others that stay shall know it soon.
const SOCKETS_WAITING_MAX: usize = 4096;
const SOCKET_WAIT_MS: u64 = 1000;
/// Places that clients leave to other nodes, where there are any.
const PLACES_FOR_NODES: usize = 64;

impl<E: Engine<Memory = Arena>> Reactor<E> {
    /// Has every listener accept that does not.
    pub(super) fn start_accepting(&mut self) {
        self.accept_retry_at = None;
        for index in 0..self.listeners.len() {
            if self.listeners[index].accepting.is_none() {
                self.start_accept(index);
            }
        }
    }

    fn start_accept(&mut self, listener: usize) {
        let fd = Target::plain(&*self.listeners[listener].socket).fd();
        let entry = if self.ring.features().has(Feature::MultishotAccept) {
            opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build()
        } else {
            let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
            opcode::Accept::new(fd, address, length).flags(libc::SOCK_CLOEXEC).build()
        };
        let ticket = self.submit(Operation::Accept { listener }, entry);
        self.listeners[listener].accepting = Some(ticket);
    }

    /// Ends accepting for good; what comes in meanwhile is closed at once.
    pub(super) fn stop_accepting(&mut self) {
        self.accept_retry_at = None;
        for index in 0..self.listeners.len() {
            if let Some(ticket) = self.listeners[index].accepting {
                self.cancel(ticket);
            }
        }
    }

    /// A connection came in, or accepting failed. `more`: the submission goes on accepting.
    pub(super) fn complete_accept(&mut self, listener: usize, result: i32, more: bool) {
        if !more {
            self.listeners[listener].accepting = None;
        }
        if result >= 0 {
            // SAFETY: the kernel made this descriptor for us just now; nobody else knows it.
            let socket = unsafe { OwnedFd::from_raw_fd(result as RawFd) };
            match peer_address(&socket) {
                Some(peer) if self.is_accepting() && self.listeners[listener].for_nodes => {
                    self.admit_now(socket, Newcomer::Caller(peer));
                }
                Some(peer) if self.is_accepting() => self.admit(socket, peer),
                // Gone already, or too late.
                _ => drop(socket),
            }
        }
        if more || !self.is_accepting() {
            return;
        }
        match -result {
            // Connections that broke before they were accepted say nothing about the next one.
            error
                if error <= 0
                    || matches!(error, libc::ECONNABORTED | libc::EINTR | libc::EAGAIN | libc::EPROTO) =>
            {
                self.start_accept(listener);
            }
            _ => {
                self.counters.accept_failures += 1;
                self.accept_retry_at = Some(self.now.after_ms(ACCEPT_RETRY_MS));
            }
        }
    }

    /// Gives a connected socket an id and tells the engine. With all ids in use it waits in line, because those of
    /// clients that left come free by themselves; past [`SOCKETS_WAITING_MAX`], or in vain, it is closed.
    pub(super) fn admit(&mut self, socket: OwnedFd, peer: PeerAddress) {
        if self.has_place_for_client() {
            self.admit_now(socket, Newcomer::Client(peer));
        } else if self.waiting_sockets.len() < SOCKETS_WAITING_MAX {
            self.waiting_sockets.push_back((self.now.after_ms(SOCKET_WAIT_MS), socket, peer));
        } else {
            self.counters.refused += 1;
        }
    }

    /// However many clients there are, nodes find a place: a volume would stop otherwise.
    fn has_place_for_client(&self) -> bool {
        let kept =
            if self.listeners.iter().any(|listener| listener.for_nodes) { PLACES_FOR_NODES } else { 0 };
        self.free_connections.len() > kept
    }

    /// A connection to a node that was called, if it was reached.
    pub(super) fn admit_called(&mut self, node: NodeId, socket: Option<OwnedFd>) {
        let peer = socket.as_ref().and_then(peer_address);
        let admitted = match (socket, peer) {
            (Some(socket), Some(peer)) => self.admit_now(socket, Newcomer::Called(node, peer)),
            _ => false,
        };
        if !admitted {
            self.pending.push_back(Event::PeerUnreachable { node });
        }
    }

    /// An id has come free.
    pub(super) fn admit_waiting(&mut self) {
        if !self.has_place_for_client() {
            return;
        }
        if let Some((_, socket, peer)) = self.waiting_sockets.pop_front() {
            self.admit_now(socket, Newcomer::Client(peer));
        }
    }

    /// Closes sockets that have waited too long.
    pub(super) fn refuse_overdue(&mut self) {
        while self.waiting_sockets.front().is_some_and(|(until, ..)| *until <= self.now) {
            self.waiting_sockets.pop_front();
            self.counters.refused += 1;
        }
    }

    fn admit_now(&mut self, socket: OwnedFd, newcomer: Newcomer) -> bool {
        if matches!(newcomer.address(), PeerAddress::Internet(_)) {
            // Replies are sent whole; waiting for more bytes would only delay them.
            let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        }
        let opened = self.open_connection(socket, newcomer);
        self.counters.accepted += u64::from(opened);
        self.counters.refused += u64::from(!opened);
        opened
    }
}

/// None if the peer is gone already.
fn peer_address(socket: &OwnedFd) -> Option<PeerAddress> {
    let address: SockaddrStorage = getpeername(socket.as_raw_fd()).ok()?;
    if let Some(address) = address.as_sockaddr_in() {
        return Some(PeerAddress::Internet(address.ip().to_ipv6_mapped()));
    }
    if let Some(address) = address.as_sockaddr_in6() {
        return Some(PeerAddress::Internet(address.ip()));
    }
    (address.family() == Some(nix::sys::socket::AddressFamily::Unix)).then_some(PeerAddress::Unix)
}
