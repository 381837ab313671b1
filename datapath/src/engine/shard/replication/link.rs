//! A link: a connection between two nodes. The one whose heads need the other calls; both greet.
//!
//! | | the caller's heads | the called node's members |
//! |---|---|---|
//! | send | promise, change, fetch, lease | promised, refused, ack, gap, fetched, gone, leased |
//! | to fill | fill, copy, filled | filling, copied, complete, no room |
//! | for what the head's replica cannot give | read | blocks, unreadable |
//! | to compare the replicas in sync, if both know how | check: ask, mend | check: digest, unknown, mended |
//!
//! Whatever a correct node does not send ends the link. What was on its way is lost with it; heads ask again on the next.

use super::super::Shard;
use crate::engine::output::{Output, SEND_PAGES};
use crate::engine::ports::{ConnectionId, Effect, ReceiveBuffer};
use crate::limits::HANDSHAKE_DEADLINE_MS;
use crate::memory::Memory;
use crate::record::{NodeId, VolumeNumber};
use crate::units::{BLOCK_BYTES, MemoryRange};
use crate::wire::peer_message::{FEATURE_CHECKS, Hello, PeerFrame, PeerMessage};

/// A payload on its way in.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) frame: PeerFrame,
    pub(super) checksums: Vec<u32>,
    /// A page for a descriptor, and the blocks. Nothing while there is no memory.
    pub(super) memory: Option<MemoryRange>,
    pub(super) filled: u32,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) generation: u64,
    /// The other node: known to the caller from the start, to the called one once it was greeted.
    pub(super) node: Option<NodeId>,
    pub(super) outgoing: bool,
    pub(super) greeted: bool,
    /// What the other node can do, as it said when it greeted.
    pub(super) features: u64,
    pub(super) input: Option<(MemoryRange, ReceiveBuffer)>,
    /// Header and body of the message that is coming in.
    pub(super) message: Vec<u8>,
    pub(super) payload: Option<Incoming>,
    pub(super) receiving: bool,
    pub(super) closing: bool,
    output: Output,
}

impl<M: Memory> Shard<M> {
    pub(in crate::engine::shard) fn link_accepted(&mut self, id: ConnectionId) {
        if self.open_link(id, None) {
            self.receive_on_link(id);
        }
    }

    pub(in crate::engine::shard) fn link_connected(&mut self, node: NodeId, id: ConnectionId) {
        self.replication.dials.connected(node, id);
        if self.open_link(id, Some(node)) {
            self.greet(id);
            self.receive_on_link(id);
        }
    }

    pub(in crate::engine::shard) fn link_unreachable(&mut self, node: NodeId) {
        let now = self.now;
        self.replication.dials.failed(now, node);
    }

    fn open_link(&mut self, id: ConnectionId, node: Option<NodeId>) -> bool {
        let memory = if self.draining { None } else { self.pages.allocate(SEND_PAGES) };
        let Some(memory) = memory else {
            self.effects.push_back(Effect::Close { connection: id });
            if let Some(node) = node {
                self.link_unreachable(node);
            }
            return false;
        };
        self.replication.links_opened += 1;
        self.replication.links[id.0 as usize] = Some(Box::new(Link {
            generation: self.replication.links_opened,
            node,
            outgoing: node.is_some(),
            greeted: false,
            features: 0,
            input: None,
            message: Vec::new(),
            payload: None,
            receiving: false,
            closing: false,
            output: Output::new(memory),
        }));
        let due = (self.now.after_ms(HANDSHAKE_DEADLINE_MS), id, self.replication.links_opened);
        self.replication.greetings_due.push_back(due);
        true
    }

    /// Whoever connects and does not say who it is keeps a place from others.
    pub(super) fn expire_greetings(&mut self) {
        while let Some((moment, id, generation)) = self.replication.greetings_due.front().copied() {
            if moment > self.now {
                return;
            }
            self.replication.greetings_due.pop_front();
            if self.is_same_link(id, generation) && !self.link(id).greeted {
                self.close_link(id);
            }
        }
    }

    pub(super) fn link(&mut self, id: ConnectionId) -> &mut Link {
        self.replication.links[id.0 as usize].as_deref_mut().expect("an open link")
    }

    /// The link, unless it is being closed.
    pub(super) fn living_link(&mut self, id: ConnectionId) -> Option<&mut Link> {
        self.replication.links[id.0 as usize].as_deref_mut().filter(|link| !link.closing)
    }

    /// The connection of a leader, if it is the one that it called on.
    pub(super) fn is_same_link(&mut self, id: ConnectionId, generation: u64) -> bool {
        self.replication.is_link(id) && self.living_link(id).is_some_and(|link| link.generation == generation)
    }

    fn greet(&mut self, id: ConnectionId) {
        let config = self.replication.node.expect("only nodes have links");
        let hello = Hello { node: config.node, boot: config.boot, features: FEATURE_CHECKS };
        self.send_on_link(id, VolumeNumber(0), PeerMessage::Hello(hello));
    }

    /// The other node says who it is.
    pub(super) fn link_greeted(&mut self, id: ConnectionId, hello: Hello) {
        let link = self.link(id);
        let (outgoing, known) = (link.outgoing, link.node);
        if link.greeted || outgoing && known != Some(hello.node) {
            return self.close_link(id);
        }
        link.greeted = true;
        link.features = hello.features;
        link.node = Some(hello.node);
        if !outgoing {
            self.close_older_links(id, hello.node);
            return self.greet(id);
        }
        if self.replication.dials.greeted(hello.node, id) {
            let now = self.now;
            for index in 0..self.replication.replicas.len() {
                self.replication.replicas[index].head.member_up(now, hello.node);
                self.settle_head(index);
            }
        }
    }

    /// A node that calls again has given up its earlier connection, or was started anew. What is still on its way on that
    /// one must not come between what it sends now.
    fn close_older_links(&mut self, newest: ConnectionId, node: NodeId) {
        for index in 0..self.replication.links.len() {
            let id = ConnectionId(u32::try_from(index).expect("bounded by limits"));
            let is_older = self
                .living_link(id)
                .is_some_and(|link| !link.outgoing && link.node == Some(node) && id != newest);
            if is_older {
                self.close_link(id);
            }
        }
    }

    /// Sends a message without payload, if the link is there.
    pub(super) fn send_on_link(&mut self, id: ConnectionId, volume: VolumeNumber, message: PeerMessage) {
        self.send_checksums(id, volume, message, &[]);
    }

    /// The same for a message that has checksums.
    pub(super) fn send_checksums(
        &mut self,
        id: ConnectionId,
        volume: VolumeNumber,
        message: PeerMessage,
        checksums: &[u32],
    ) {
        if self.living_link(id).is_some() {
            self.append_frame(id, PeerFrame { volume, message }, checksums, 0);
            self.to_send.push(id);
        }
    }

    /// Puts a frame before its payload, and counts both.
    fn append_frame(&mut self, id: ConnectionId, frame: PeerFrame, checksums: &[u32], payload_bytes: u32) {
        let frame_bytes = self.link(id).output.append(|out| {
            let before = out.len();
            frame.encode(checksums, out);
            out.len() - before
        });
        let sent = &mut self.replication.bytes_sent;
        let count = match frame.message {
            PeerMessage::Change { .. } => &mut sent.changes,
            PeerMessage::Copy { .. } => &mut sent.copies,
            PeerMessage::Fetched { .. } => &mut sent.fetched,
            _ => &mut sent.other,
        };
        *count += frame_bytes as u64 + u64::from(payload_bytes);
    }

    /// Sends a message with a payload, whose first page is for something else. It is in use until it was sent.
    pub(super) fn send_payload(
        &mut self,
        id: ConnectionId,
        frame: PeerFrame,
        checksums: &[u32],
        memory: MemoryRange,
    ) {
        let blocks = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        self.send_part(id, frame, checksums, blocks, memory);
    }

    /// Sends a message whose payload is a part of memory that others use too.
    pub(super) fn send_part(
        &mut self,
        id: ConnectionId,
        frame: PeerFrame,
        checksums: &[u32],
        blocks: MemoryRange,
        memory: MemoryRange,
    ) {
        if self.living_link(id).is_none() {
            return;
        }
        self.use_memory(memory);
        self.append_frame(id, frame, checksums, blocks.len);
        self.link(id).output.append_data(blocks, Some(memory));
        self.to_send.push(id);
    }

    pub(in crate::engine::shard) fn start_link_send(&mut self, id: ConnectionId) {
        let Shard { replication, memory, effects, .. } = self;
        let Some(link) = replication.links[id.0 as usize].as_deref_mut() else { return };
        if !link.closing && link.output.begin_send(memory) {
            effects.push_back(Effect::Send { connection: id });
        }
    }

    pub(in crate::engine::shard) fn link_pieces(&self, id: ConnectionId) -> &[MemoryRange] {
        self.replication.links[id.0 as usize].as_ref().expect("a send under way").output.pieces()
    }

    pub(in crate::engine::shard) fn link_sent(&mut self, id: ConnectionId, good: bool) {
        let sent: Vec<MemoryRange> = self.link(id).output.finish_send().collect();
        sent.into_iter().for_each(|memory| self.unuse(memory));
        if good {
            self.to_send.push(id);
        } else {
            self.close_link(id);
        }
    }

    /// Ends the link from this side.
    pub(in crate::engine::shard) fn close_link(&mut self, id: ConnectionId) {
        let Some(link) = self.living_link(id) else { return };
        link.closing = true;
        let (node, outgoing) = (link.node, link.outgoing);
        let unsent = link.output.abandon();
        unsent.into_iter().for_each(|memory| self.unuse(memory));
        self.drop_link_input(id);
        if !self.link(id).receiving {
            self.drop_link_payload(id);
        }
        self.effects.push_back(Effect::Close { connection: id });
        if let (Some(node), true) = (node, outgoing) {
            self.member_lost(node, id);
        }
    }

    /// A link that this node had called is gone.
    fn member_lost(&mut self, node: NodeId, id: ConnectionId) {
        let now = self.now;
        let was_up = self.replication.dials.up(node) == Some(id);
        self.replication.dials.failed(now, node);
        if !was_up {
            return;
        }
        for index in 0..self.replication.replicas.len() {
            self.replication.replicas[index].head.member_down(now, node);
            self.settle_head(index);
        }
    }

    /// The driver is done with it.
    pub(in crate::engine::shard) fn link_closed(&mut self, id: ConnectionId) {
        let Some(link) = self.replication.links[id.0 as usize].take() else { return };
        assert!(!link.output.is_sending() && !link.receiving, "{id:?} closed with buffers lent");
        self.pages.release(link.output.send_memory());
    }

    /// The node stops: what members have taken is finished by the lanes.
    pub(in crate::engine::shard) fn close_links(&mut self) {
        for index in 0..self.replication.links.len() {
            self.close_link(ConnectionId(u32::try_from(index).expect("bounded by limits")));
        }
    }
}
