//! What comes in on a link: header, body, payload, message after message.

use super::super::Shard;
use super::link::Incoming;
use crate::checksum::crc32c;
use crate::engine::ports::{ConnectionId, Effect, ReceiveBuffer};
use crate::limits::EXACT_RECEIVE_BYTES_MIN;
use crate::memory::Memory;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use crate::wire::peer_message::{PEER_HEADER_BYTES, PeerFrame, PeerMessage};

impl<M: Memory> Shard<M> {
    pub(super) fn receive_on_link(&mut self, id: ConnectionId) {
        let Some(link) = self.living_link(id) else { return };
        if !std::mem::replace(&mut link.receiving, true) {
            self.effects.push_back(Effect::Receive { connection: id });
        }
    }

    pub(in crate::engine::shard) fn link_received(
        &mut self,
        id: ConnectionId,
        memory: MemoryRange,
        buffer: ReceiveBuffer,
    ) {
        let link = self.link(id);
        link.receiving = false;
        if link.closing {
            self.effects.push_back(Effect::Recycle { buffer });
            return self.drop_link_payload(id);
        }
        assert!(link.input.is_none(), "one receive at a time");
        link.input = Some((memory, buffer));
        self.pump_link(id);
    }

    pub(in crate::engine::shard) fn link_received_exact(&mut self, id: ConnectionId) {
        let link = self.link(id);
        link.receiving = false;
        if link.closing {
            return self.drop_link_payload(id);
        }
        let payload = link.payload.as_mut().expect("a payload under way");
        payload.filled = payload.memory.expect("received into it").len - BLOCK_BYTES;
        self.pump_link(id);
    }

    pub(in crate::engine::shard) fn link_receive_ended(&mut self, id: ConnectionId) {
        let link = self.link(id);
        link.receiving = false;
        if link.closing {
            return self.drop_link_payload(id);
        }
        self.close_link(id);
    }

    pub(super) fn drop_link_input(&mut self, id: ConnectionId) {
        if let Some((_, buffer)) = self.link(id).input.take() {
            self.effects.push_back(Effect::Recycle { buffer });
        }
    }

    pub(super) fn drop_link_payload(&mut self, id: ConnectionId) {
        if let Some(memory) = self.link(id).payload.take().and_then(|payload| payload.memory) {
            self.give_back_for_peer(memory);
        }
    }

    /// Links whose payload waits for memory try again.
    pub(super) fn feed_hungry_links(&mut self) {
        for _ in 0..self.replication.hungry_links.len() {
            let id = self.replication.hungry_links.pop_front().expect("counted");
            if self.replication.is_link(id) && self.living_link(id).is_some() {
                self.pump_link(id);
            }
        }
    }

    /// Takes messages from the input until it is used up or memory is lacking.
    fn pump_link(&mut self, id: ConnectionId) {
        loop {
            let Some(link) = self.living_link(id) else { return };
            let going_on = if link.payload.is_some() { self.take_payload(id) } else { self.take_message(id) };
            if !going_on {
                return;
            }
        }
    }

    /// Moves at most `count` bytes of the input; says how many.
    fn take_input(&mut self, id: ConnectionId, count: u32, take: impl FnOnce(&mut M, MemoryRange)) -> u32 {
        let Shard { replication, memory, effects, .. } = self;
        let link = replication.links[id.0 as usize].as_deref_mut().expect("an open link");
        let Some((rest, buffer)) = link.input else { return 0 };
        let count = count.min(rest.len);
        take(memory, rest.part(0, count));
        let rest = rest.part(count, rest.len - count);
        link.input = Some((rest, buffer));
        if rest.len == 0 {
            link.input = None;
            effects.push_back(Effect::Recycle { buffer });
        }
        count
    }

    /// Gathers header and body. True when the message was complete.
    fn take_message(&mut self, id: ConnectionId) -> bool {
        let mut message = std::mem::take(&mut self.link(id).message);
        // The header may have come before, and only the body be missing.
        let mut wanted = whole_length(&message);
        while let Some(length) = wanted.filter(|length| message.len() < *length) {
            let missing = u32::try_from(length - message.len()).expect("bounded by the limits of messages");
            let taken = self.take_input(id, missing, |memory, part| message.extend(memory.bytes(part)));
            if taken == 0 {
                self.link(id).message = message;
                self.receive_on_link(id);
                return false;
            }
            wanted = whole_length(&message);
        }
        let decoded = wanted.map(|_| PeerFrame::decode(&message));
        let Some(Ok(frame)) = decoded else {
            self.close_link(id);
            return false;
        };
        let checksums = PeerFrame::checksums(&message).collect();
        message.clear();
        if frame.payload_blocks() == 0 {
            self.link(id).message = message;
            self.handle_peer(id, frame, checksums, None);
            return true;
        }
        let link = self.link(id);
        link.message = message;
        link.payload = Some(Incoming { frame, checksums, memory: None, filled: 0 });
        true
    }

    /// Gathers the payload. True when it was complete.
    fn take_payload(&mut self, id: ConnectionId) -> bool {
        let payload = self.link(id).payload.as_ref().expect("a payload under way");
        let (blocks, filled) = (payload.frame.payload_blocks(), payload.filled);
        let Some(memory) = payload.memory.or_else(|| self.allocate_for_peer(1 + blocks)) else {
            self.replication.hungry_links.push_back(id);
            return false;
        };
        let target = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        let taken = self.take_input(id, target.len - filled, |memory, part| {
            memory.copy(part, target.part(filled, part.len));
        });
        let filled = filled + taken;
        let payload = self.link(id).payload.as_mut().expect("a payload under way");
        (payload.memory, payload.filled) = (Some(memory), filled);
        let rest = target.part(filled, target.len - filled);
        if rest.len == 0 {
            let Incoming { frame, checksums, .. } = self.link(id).payload.take().expect("just there");
            self.check_payload(id, frame, checksums, memory);
            return true;
        }
        if rest.len >= EXACT_RECEIVE_BYTES_MIN {
            self.link(id).receiving = true;
            self.effects.push_back(Effect::ReceiveExact { connection: id, memory: rest });
        } else {
            self.receive_on_link(id);
        }
        false
    }

    /// A payload whose checksums are wrong was damaged on its way: the link is not to be trusted.
    fn check_payload(
        &mut self,
        id: ConnectionId,
        frame: PeerFrame,
        checksums: Vec<u32>,
        memory: MemoryRange,
    ) {
        let blocks = self.memory.bytes(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES));
        let mut pairs = blocks.chunks_exact(BLOCK_BYTES_USIZE).zip(&checksums);
        if pairs.all(|(block, crc)| crc32c(block) == *crc) {
            return self.handle_peer(id, frame, checksums, Some(memory));
        }
        self.give_back_for_peer(memory);
        self.close_link(id);
    }

    /// A whole message.
    fn handle_peer(
        &mut self,
        id: ConnectionId,
        frame: PeerFrame,
        checksums: Vec<u32>,
        memory: Option<MemoryRange>,
    ) {
        let link = self.link(id);
        let (outgoing, greeted, node) = (link.outgoing, link.greeted, link.node);
        let is_answer = frame.message.is_answer();
        match frame.message {
            PeerMessage::Hello(hello) => self.link_greeted(id, hello),
            message if greeted && outgoing && is_answer => {
                let node = node.expect("known to the caller");
                self.handle_answer(node, frame.volume, message, checksums, memory);
            }
            message if greeted && !outgoing && !is_answer => {
                self.handle_request_of_head(id, frame.volume, message, memory);
            }
            _ => {
                if let Some(memory) = memory {
                    self.give_back_for_peer(memory);
                }
                self.close_link(id);
            }
        }
    }
}

/// How long the message will be, as far as is known; nothing if it makes no sense.
fn whole_length(message: &[u8]) -> Option<usize> {
    match message.first_chunk() {
        None => Some(PEER_HEADER_BYTES),
        Some(header) => Some(PEER_HEADER_BYTES + PeerFrame::body_length(header).ok()? as usize),
    }
}
