//! The smallest engine that behaves like a storage server on the wire: the floor below which no engine on this
//! reactor can go, and the counterpart of the reactor's tests.
//!
//! It speaks NBD's transmission phase without a handshake (request header of 28 bytes, simple replies of 16) on
//! an area of memory per connection: WRITE fills it, READ returns it, DISC ends the connection.

use std::collections::VecDeque;

use crate::engine::ports::{ConnectionId, Effect, Engine, Event, Memory, ReceiveBuffer};
use crate::limits::EXACT_RECEIVE_BYTES_MIN;
use crate::reactor::{Arena, ArenaLayout};
use crate::units::{MemoryRange, Moment};

/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a reply.
pub const REPLY_MAGIC: u32 = 0x6744_6698;
/// Bytes of a request without its payload.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a reply without its payload.
pub const REPLY_BYTES: u32 = 16;
/// Return bytes of the area.
pub const READ: u16 = 0;
/// Store the payload in the area.
pub const WRITE: u16 = 1;
/// End the connection.
pub const DISCONNECT: u16 = 2;

/// Replies in one send; twice as many have room, so that a batch gathers while one is sent.
const BATCH_REPLIES: u32 = 32;

/// A request on the wire.
#[must_use]
pub fn request(kind: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..28].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// How large an [`EchoEngine`] is.
#[derive(Clone, Copy, Debug)]
pub struct EchoConfig {
    /// Connections; as many as the reactor allows.
    pub connections: u32,
    /// Bytes of each connection's area; a multiple of 4096.
    pub area_bytes: u32,
    /// Receive buffers.
    pub receive_buffers: u16,
    /// Bytes of each; a multiple of 4096.
    pub receive_buffer_bytes: u32,
}

impl Default for EchoConfig {
    fn default() -> Self {
        EchoConfig {
            connections: 16,
            area_bytes: 1 << 20,
            receive_buffers: 64,
            receive_buffer_bytes: 128 << 10,
        }
    }
}

/// What an [`EchoEngine`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EchoReport {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections closed.
    pub closed: u64,
    /// Requests answered.
    pub replies: u64,
    /// Receives of an exact length that were asked for.
    pub exact_receives: u64,
    /// Sends that failed.
    pub failed_sends: u64,
}

#[derive(Debug, Default)]
struct Peer {
    open: bool,
    closing: bool,
    /// No more bytes will come.
    ended: bool,
    receiving: bool,
    /// What was received and not yet looked at.
    received: Option<(ReceiveBuffer, MemoryRange)>,
    header: [u8; REQUEST_BYTES],
    header_len: usize,
    /// A write whose payload is coming in: cookie, and the part of the area still to be filled.
    filling: Option<(u64, MemoryRange)>,
    gathering: Batch,
    sending: Batch,
}

#[derive(Debug, Default)]
struct Batch {
    pieces: Vec<MemoryRange>,
    replies: u32,
    /// Refers to the area, which must not change before the batch is sent.
    holds_area: bool,
    /// Which half of the reply headers is this batch's.
    half: u32,
}

/// See the module.
#[derive(Debug)]
pub struct EchoEngine {
    arena: Arena,
    area_bytes: u32,
    peers: Vec<Peer>,
    effects: VecDeque<Effect>,
    /// Peers with replies to send at the end of the turn.
    ready: Vec<ConnectionId>,
    draining: bool,
    report: EchoReport,
}

impl EchoEngine {
    /// Takes all its memory.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn new(config: EchoConfig) -> std::io::Result<EchoEngine> {
        let headers = (config.connections * 2 * BATCH_REPLIES * REPLY_BYTES).next_multiple_of(4096);
        let arena = Arena::new(ArenaLayout {
            receive_buffers: config.receive_buffers,
            receive_buffer_bytes: config.receive_buffer_bytes,
            engine_bytes: config.connections * config.area_bytes + headers,
        })?;
        let peers = (0..config.connections)
            .map(|_| {
                let mut peer = Peer::default();
                peer.sending.half = 1;
                peer
            })
            .collect();
        Ok(EchoEngine {
            arena,
            area_bytes: config.area_bytes,
            peers,
            effects: VecDeque::with_capacity(4 * config.connections as usize),
            ready: Vec::with_capacity(config.connections as usize),
            draining: false,
            report: EchoReport::default(),
        })
    }

    fn peer(&mut self, id: ConnectionId) -> &mut Peer {
        &mut self.peers[id.0 as usize]
    }

    fn area(&self, id: ConnectionId) -> MemoryRange {
        self.arena.engine_range().part(id.0 * self.area_bytes, self.area_bytes)
    }

    fn reply_header(&self, id: ConnectionId, half: u32, reply: u32) -> MemoryRange {
        let areas = u32::try_from(self.peers.len()).expect("few peers") * self.area_bytes;
        let index = (id.0 * 2 + half) * BATCH_REPLIES + reply;
        self.arena.engine_range().part(areas + index * REPLY_BYTES, REPLY_BYTES)
    }

    fn receive_next(&mut self, id: ConnectionId) {
        let draining = self.draining;
        let peer = self.peer(id);
        if peer.closing || peer.ended || peer.receiving || draining {
            return;
        }
        peer.receiving = true;
        let effect = match peer.filling {
            Some((_, memory)) if memory.len >= EXACT_RECEIVE_BYTES_MIN => {
                self.report.exact_receives += 1;
                Effect::ReceiveExact { connection: id, memory }
            }
            _ => Effect::Receive { connection: id },
        };
        self.effects.push_back(effect);
    }

    /// Works on what was received, as far as there is room for replies.
    fn advance(&mut self, id: ConnectionId) {
        while self.peer(id).gathering.replies < BATCH_REPLIES && !self.peer(id).closing {
            let Some((buffer, bytes)) = self.peer(id).received.take() else { break };
            if bytes.len == 0 {
                self.effects.push_back(Effect::Recycle { buffer });
                break;
            }
            match self.consume(id, bytes) {
                // Nonsense: the rest is of no use.
                Some(_) if self.peer(id).closing => self.effects.push_back(Effect::Recycle { buffer }),
                Some(taken) => {
                    let rest = bytes.part(taken, bytes.len - taken);
                    self.peer(id).received = Some((buffer, rest));
                }
                None => {
                    // A write has to wait until the area was sent.
                    self.peer(id).received = Some((buffer, bytes));
                    break;
                }
            }
        }
        if self.peer(id).received.is_none() {
            self.receive_next(id);
        }
        self.close_if_done(id);
    }

    /// Takes some of the bytes; none if it has to wait.
    fn consume(&mut self, id: ConnectionId, bytes: MemoryRange) -> Option<u32> {
        if let Some((cookie, memory)) = self.peer(id).filling {
            let peer = self.peer(id);
            if peer.gathering.holds_area || peer.sending.holds_area {
                return None;
            }
            let taken = bytes.len.min(memory.len);
            self.arena.copy(bytes.part(0, taken), memory.part(0, taken));
            self.filled(id, cookie, memory.part(taken, memory.len - taken));
            return Some(taken);
        }
        let peer = &mut self.peers[id.0 as usize];
        let missing = &mut peer.header[peer.header_len..];
        let taken = missing.len().min(bytes.len as usize);
        let taken_u32 = u32::try_from(taken).expect("part of a header");
        missing[..taken].copy_from_slice(self.arena.bytes(bytes.part(0, taken_u32)));
        peer.header_len += taken;
        if peer.header_len == REQUEST_BYTES {
            peer.header_len = 0;
            self.handle_request(id);
        }
        Some(taken_u32)
    }

    fn filled(&mut self, id: ConnectionId, cookie: u64, rest: MemoryRange) {
        if rest.len > 0 {
            self.peer(id).filling = Some((cookie, rest));
        } else {
            self.peer(id).filling = None;
            self.reply(id, cookie, None);
        }
    }

    fn handle_request(&mut self, id: ConnectionId) {
        let header = self.peer(id).header;
        let word = |from: usize| u32::from_be_bytes(header[from..from + 4].try_into().expect("four bytes"));
        let long = |from: usize| u64::from_be_bytes(header[from..from + 8].try_into().expect("eight bytes"));
        let (kind, cookie, offset, length) =
            (u16::from_be_bytes([header[6], header[7]]), long(8), long(16), word(24));
        let area = self.area(id);
        let inside = u32::try_from(offset)
            .ok()
            .filter(|offset| offset.checked_add(length).is_some_and(|end| end <= area.len));
        match (word(0), kind, inside) {
            (REQUEST_MAGIC, READ, Some(offset)) => self.reply(id, cookie, Some(area.part(offset, length))),
            (REQUEST_MAGIC, WRITE, Some(offset)) => self.filled(id, cookie, area.part(offset, length)),
            _ => self.close(id),
        }
    }

    fn reply(&mut self, id: ConnectionId, cookie: u64, payload: Option<MemoryRange>) {
        let (half, reply) = (self.peer(id).gathering.half, self.peer(id).gathering.replies);
        let header = self.reply_header(id, half, reply);
        let bytes = self.arena.bytes_mut(header);
        bytes[0..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
        bytes[4..8].fill(0);
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        self.report.replies += 1;
        let peer = self.peer(id);
        if peer.gathering.replies == 0 && peer.sending.replies == 0 {
            self.ready.push(id);
        }
        let batch = &mut self.peer(id).gathering;
        batch.replies += 1;
        match batch.pieces.last_mut() {
            // Neighbours in memory go as one piece.
            Some(last) if last.end() == header.start => last.len += header.len,
            _ => batch.pieces.push(header),
        }
        if let Some(payload) = payload.filter(|payload| payload.len > 0) {
            batch.pieces.push(payload);
            batch.holds_area = true;
        }
    }

    fn send(&mut self, id: ConnectionId) {
        let peer = self.peer(id);
        if peer.closing || peer.gathering.replies == 0 {
            return;
        }
        std::mem::swap(&mut peer.gathering, &mut peer.sending);
        self.effects.push_back(Effect::Send { connection: id });
    }

    fn sent(&mut self, id: ConnectionId) {
        let batch = &mut self.peer(id).sending;
        batch.pieces.clear();
        batch.replies = 0;
        batch.holds_area = false;
    }

    /// A client that left, or a drain: close when all that was asked is answered.
    fn close_if_done(&mut self, id: ConnectionId) {
        let draining = self.draining;
        let peer = self.peer(id);
        let idle = peer.sending.replies == 0 && peer.gathering.replies == 0;
        if peer.open && idle && (peer.ended || draining) && !peer.closing {
            self.close(id);
        }
    }

    fn close(&mut self, id: ConnectionId) {
        let peer = self.peer(id);
        peer.closing = true;
        let received = peer.received.take();
        self.effects.extend(received.map(|(buffer, _)| Effect::Recycle { buffer }));
        self.effects.push_back(Effect::Close { connection: id });
    }
}

impl Engine for EchoEngine {
    type Memory = Arena;
    type Report = EchoReport;

    fn handle_event(&mut self, _now: Moment, event: Event) {
        match event {
            Event::Accepted { connection, .. } => {
                self.report.accepted += 1;
                self.peer(connection).open = true;
                self.receive_next(connection);
                self.close_if_done(connection);
            }
            Event::Received { connection, memory, buffer } => {
                let peer = self.peer(connection);
                assert!(peer.received.is_none() && peer.receiving, "bytes that were not asked for");
                peer.receiving = false;
                if peer.closing {
                    self.effects.push_back(Effect::Recycle { buffer });
                } else {
                    peer.received = Some((buffer, memory));
                    self.advance(connection);
                }
            }
            Event::ReceivedExact { connection } => {
                let peer = self.peer(connection);
                peer.receiving = false;
                let (cookie, memory) = peer.filling.expect("a write is coming in");
                self.filled(connection, cookie, memory.part(memory.len, 0));
                self.advance(connection);
            }
            Event::ReceiveEnded { connection } => {
                let peer = self.peer(connection);
                assert!(!peer.ended, "two ends of one stream");
                (peer.receiving, peer.ended) = (false, true);
                self.close_if_done(connection);
            }
            Event::Sent { connection } => {
                self.sent(connection);
                if self.peer(connection).gathering.replies > 0 {
                    self.ready.push(connection);
                }
                self.advance(connection);
            }
            Event::SendFailed { connection } => {
                self.report.failed_sends += 1;
                self.sent(connection);
                if !self.peer(connection).closing {
                    self.close(connection);
                }
            }
            Event::Closed { connection } => {
                self.report.closed += 1;
                let peer = self.peer(connection);
                assert!(peer.closing && !peer.receiving, "closed with a receive under way");
                *peer = Peer::default();
                peer.sending.half = 1;
            }
            Event::Drain => {
                self.draining = true;
                for id in (0..).map(ConnectionId).take(self.peers.len()) {
                    self.close_if_done(id);
                }
            }
            Event::DeviceDone { .. } => panic!("an echo has no devices"),
            Event::HungUp { .. } => panic!("an echo watches nobody"),
            Event::Timeout => {}
            Event::PeerAccepted { .. }
            | Event::PeerConnected { .. }
            | Event::PeerUnreachable { .. }
            | Event::Record(_)
            | Event::Deleted { .. }
            | Event::Tend { .. }
            | Event::Verify { .. } => panic!("an echo has no peers"),
            Event::Told { .. } | Event::Adopted { .. } => panic!("echoes do not talk to each other"),
        }
    }

    fn finish_turn(&mut self, _now: Moment) {
        while let Some(id) = self.ready.pop() {
            if self.peer(id).sending.replies == 0 {
                self.send(id);
                self.advance(id);
            }
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn poll_timeout(&self) -> Option<Moment> {
        None
    }

    fn memory(&mut self) -> &mut Arena {
        &mut self.arena
    }

    fn send_pieces(&self, connection: ConnectionId) -> &[MemoryRange] {
        &self.peers[connection.0 as usize].sending.pieces
    }

    fn report(&self) -> EchoReport {
        self.report
    }

    fn is_open(&self) -> bool {
        true
    }

    fn is_drained(&self) -> bool {
        self.draining && self.effects.is_empty() && self.peers.iter().all(|peer| !peer.open)
    }
}
