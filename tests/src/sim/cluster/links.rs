//! The network between nodes: connections that carry bytes in order, late, or no more.
//!
//! A link is two pipes, one in each node's driver, and what is on its way between them. Nothing is ever lost from the
//! middle: a link delivers, stalls, or ends, and each end may learn of the end at another time.

use std::collections::VecDeque;

use datapath::engine::ports::ConnectionId;

use crate::sim::random::Random;

/// Bytes that a network takes before it makes the sender wait.
const IN_FLIGHT_BYTES_MAX: usize = 512 << 10;

/// One side of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The call was accepted, and the caller has not heard so.
    Unheard,
    Open(ConnectionId),
    /// Its engine closed it, or was told that it is gone, or its process died.
    Gone,
}

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// When each part arrives. An empty one is the end of the stream.
    parts: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
    last_ns: u64,
    pub(super) arrival_planned: bool,
    /// The sender was told to wait.
    pub(super) held: bool,
    /// Nothing more gets through.
    broken: bool,
}

impl Flow {
    /// Sends bytes, or the end of the stream if there are none. Nothing overtakes.
    pub(super) fn send(&mut self, arrives_ns: u64, bytes: Vec<u8>) {
        if self.broken {
            return;
        }
        self.last_ns = self.last_ns.max(arrives_ns);
        self.bytes += bytes.len();
        self.parts.push_back((self.last_ns, bytes));
    }

    /// Keeps some of what is on its way, and takes no more.
    pub(super) fn break_off(&mut self, random: &mut Random) {
        self.broken = true;
        self.parts.truncate(random.index(self.parts.len() + 1));
        self.bytes = self.parts.iter().map(|(_, bytes)| bytes.len()).sum();
    }

    pub(super) fn next_ns(&self) -> Option<u64> {
        self.parts.front().map(|(arrives_ns, _)| *arrives_ns)
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes > IN_FLIGHT_BYTES_MAX
    }

    /// What has arrived by now.
    pub(super) fn take(&mut self, now_ns: u64) -> Option<Vec<u8>> {
        if self.next_ns().is_none_or(|arrives_ns| arrives_ns > now_ns) {
            return None;
        }
        let (_, bytes) = self.parts.pop_front()?;
        self.bytes -= bytes.len();
        Some(bytes)
    }
}

/// A connection between two nodes: side 0 called side 1.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) nodes: [usize; 2],
    pub(super) ends: [End; 2],
    /// From each side to the other.
    pub(super) flows: [Flow; 2],
}

impl Link {
    pub(super) fn new(caller: usize, called: usize, id: ConnectionId) -> Link {
        Link {
            nodes: [caller, called],
            ends: [End::Unheard, End::Open(id)],
            flows: [Flow::default(), Flow::default()],
        }
    }

    /// The connection on a side, if it is open.
    pub(super) fn open(&self, side: usize) -> Option<ConnectionId> {
        match self.ends[side] {
            End::Open(id) => Some(id),
            _ => None,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.ends == [End::Gone; 2]
    }
}

/// Which ways are blocked.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    nodes: usize,
    /// By the node that sends and the one that should receive; the last index is the record store.
    ways: Vec<bool>,
}

impl Blocks {
    pub(super) fn new(nodes: usize) -> Blocks {
        Blocks { nodes, ways: vec![false; (nodes + 1) * (nodes + 1)] }
    }

    /// The number under which the record store is known here.
    pub(super) fn store(&self) -> usize {
        self.nodes
    }

    pub(super) fn is_blocked(&self, from: usize, to: usize) -> bool {
        self.ways[from * (self.nodes + 1) + to]
    }

    pub(super) fn set(&mut self, from: usize, to: usize, blocked: bool) {
        self.ways[from * (self.nodes + 1) + to] = blocked;
    }
}
