//! The payload of a WRITE: from the stream into pieces.
//!
//! A short one that has arrived whole is appended straight from the receive buffer. Any other is received into
//! pages of its own, a long one directly by the kernel, and handed to the lane without another copy. Nothing is
//! numbered or locked before all of a piece is here, so a client that stops sending holds up nobody else.

use super::Shard;
use super::input::Input;
use super::share::Purpose;
use super::task::{PieceKind, Task};
use super::write::WritePiece;
use crate::engine::ports::ConnectionId;
use crate::limits::{EXACT_RECEIVE_BYTES_MIN, PIECE_BYTES_MAX};
use crate::memory::Memory;
use crate::request::Operation;
use crate::store::lane::BlockRange;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64, MemoryRange, Moment};

/// A payload under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payload {
    pub(super) task: u32,
    /// The piece being received: what it is, and how much of it has come.
    piece: Option<(WritePiece, u32)>,
    piece_began: Moment,
}

impl Payload {
    /// When the piece that is being received was begun.
    pub(super) fn piece_began(&self) -> Option<Moment> {
        self.piece.is_some().then_some(self.piece_began)
    }
}

impl<M: Memory> Shard<M> {
    pub(super) fn begin_payload(&mut self, id: ConnectionId, task: u32) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        connection.payload = Some(Payload { task, piece: None, piece_began: self.now });
    }

    /// Is the task's payload still being received? Also while its connection is being closed: the kernel may still
    /// write to the piece's memory, and the task lives until that has ended.
    pub(super) fn payload_is_coming(&self, task: u32) -> bool {
        let Task { connection: id, generation, .. } = *self.tasks.get(task);
        let connection = self.connections[id.0 as usize].as_deref();
        connection
            .filter(|connection| connection.generation == generation)
            .is_some_and(|connection| connection.payload.is_some_and(|payload| payload.task == task))
    }

    /// Goes on with the payload. True when it is complete, false when it must wait for bytes or memory.
    pub(super) fn feed_payload(&mut self, id: ConnectionId) -> bool {
        loop {
            let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
            let payload = connection.payload.expect("a payload under way");
            let state = self.tasks.get(payload.task);
            if payload.piece.is_none() && state.begun_bytes >= state.request.length_bytes {
                let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
                connection.payload = None;
                self.settle_task(payload.task);
                return true;
            }
            if payload.piece.is_none() {
                if self.append_from_buffer(id, payload.task) {
                    continue;
                }
                if !self.begin_received_piece(id, payload.task) {
                    return false;
                }
            }
            if !self.fill_piece(id) {
                return false;
            }
        }
    }

    /// The short way: whole blocks, few of them, all here, nothing to wait for.
    fn append_from_buffer(&mut self, id: ConnectionId, task: u32) -> bool {
        let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
        // Parked bytes take the long way: the lane copies from the shard's memory only.
        let Some(&Input::Received { rest, .. }) = connection.input.as_ref() else { return false };
        if self.served[self.tasks.get(task).export as usize].replica.is_some() {
            // What is sent to other nodes must be in memory of its own.
            return false;
        }
        if self.tasks.get(task).begun_bytes > 0 {
            // An earlier piece was received: the input no longer begins with the request's first byte.
            return false;
        }
        let request = self.tasks.get(task).request;
        let aligned = (request.offset_bytes | request.length_bytes).is_multiple_of(BLOCK_BYTES_U64);
        let short = request.length_bytes < u64::from(EXACT_RECEIVE_BYTES_MIN);
        if !aligned || !short || u64::from(rest.len) < request.length_bytes {
            return false;
        }
        let length = u32::try_from(request.length_bytes).expect("short");
        let block = u32::try_from(request.offset_bytes / BLOCK_BYTES_U64).expect("volumes have fewer blocks");
        let count = length / BLOCK_BYTES;
        let write = WritePiece::whole_blocks(block, count);
        let export = self.tasks.get(task).export as usize;
        if !self.served[export].locks.try_acquire(write.claim()) {
            return false;
        }
        let Operation::Write { durable } = request.operation else {
            unreachable!("only writes have payloads")
        };
        let (volume, lane) = (self.volume_of(task), self.lane_of(task));
        let piece = self.begin_piece(task, PieceKind::Write(write));
        let from = rest.part(0, length);
        let range = BlockRange { volume, block, count };
        let done = self.with_lane(lane, |lane, context| lane.write_now(context, piece, range, from, durable));
        if !done {
            self.end_piece(piece);
            self.unlock(self.tasks.get(task).export, write.claim());
            return false;
        }
        self.tasks.get_mut(task).begun_bytes = request.length_bytes;
        self.consume(id, length);
        true
    }

    /// Takes memory for the next piece.
    fn begin_received_piece(&mut self, id: ConnectionId, task: u32) -> bool {
        let state = self.tasks.get(task);
        let request = state.request;
        let start = request.offset_bytes + state.begun_bytes;
        let end = request.offset_bytes + request.length_bytes;
        let piece_bytes = u64::from(PIECE_BYTES_MAX);
        let stop = end.min((start / piece_bytes + 1) * piece_bytes);
        let length = u32::try_from(stop - start).expect("at most a piece");
        let mut write = WritePiece::covering(start, length);
        let Some(memory) = self.allocate(task, write.memory_pages(), Purpose::Write) else {
            self.stall(id);
            return false;
        };
        write.give_memory(memory);
        self.tasks.get_mut(task).begun_bytes += u64::from(length);
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        connection.payload = Some(Payload { task, piece: Some((write, 0)), piece_began: self.now });
        true
    }

    /// Copies what has arrived and asks for the rest. True when the piece is complete and on its way.
    fn fill_piece(&mut self, id: ConnectionId) -> bool {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        let payload = connection.payload.as_mut().expect("a payload under way");
        let (write, filled) = payload.piece.as_mut().expect("a piece under way");
        let target = write.payload_bytes();
        let mut taken = 0;
        if let Some(input) = &connection.input {
            taken = input.len().min(target.len - *filled);
            input.copy_front(target.part(*filled, taken), &mut self.memory);
            *filled += taken;
        }
        let rest = target.part(*filled, target.len - *filled);
        self.consume(id, taken);
        if rest.len == 0 {
            self.submit_piece(id);
            return true;
        }
        if rest.len >= EXACT_RECEIVE_BYTES_MIN {
            self.receive_exact(id, rest);
        } else {
            self.receive(id);
        }
        false
    }

    /// An exact receive has ended: the piece is complete.
    pub(super) fn payload_arrived(&mut self, id: ConnectionId) {
        self.submit_piece(id);
    }

    fn submit_piece(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        let payload = connection.payload.as_mut().expect("a payload under way");
        let (write, _) = payload.piece.take().expect("a piece under way");
        let task = payload.task;
        self.begin_write(task, write);
    }

    /// The connection is gone: the piece that was being received is not written. Earlier pieces are.
    pub(super) fn drop_payload(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a connection");
        let Some(payload) = connection.payload.take() else { return };
        if let Some((write, _)) = payload.piece {
            let memory = write.memory();
            self.give_back(payload.task, memory, Purpose::Write);
        }
        let state = self.tasks.get_mut(payload.task);
        state.begun_bytes = state.request.length_bytes;
        self.settle_task(payload.task);
    }
}

/// Where the bytes of a payload go: behind the page for the descriptor, at their place in the first block.
pub(super) fn payload_bytes(memory: MemoryRange, start_bytes: u64, length: u32) -> MemoryRange {
    let within = u32::try_from(start_bytes % BLOCK_BYTES_U64).expect("below a block");
    memory.part(BLOCK_BYTES + within, length)
}
