//! Tasks and pieces: requests under way and what lanes do for them.

use super::Shard;
use super::connection::Connection;
use super::write::WritePiece;
use crate::engine::ports::ConnectionId;
use crate::engine::region_locks::RegionClaim;
use crate::engine::report::OperationClass;
use crate::memory::Memory;
use crate::request::{Extent, Operation, Request, RequestError};
use crate::store::lane::Completion;
use crate::units::{MemoryRange, Moment};

/// Pieces of one task that are worked on at once.
pub(super) const PIECES_PER_TASK_MAX: u32 = 4;

/// A request under way.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) connection: ConnectionId,
    pub(super) generation: u64,
    pub(super) request: Request,
    pub(super) export: u32,
    /// The head's term in which it was asked.
    pub(super) term: u64,
    started: Moment,
    /// How far pieces were begun, in bytes from the request's offset.
    pub(super) begun_bytes: u64,
    /// Pieces begun and not ended.
    pub(super) pieces: u32,
    pub(super) error: Option<RequestError>,
    /// For a read that is answered as a whole: the pieces that have come, by their offset.
    pub(super) gathered: Vec<ReadPiece>,
    /// Memory set aside for the pieces of such a read.
    pub(super) reserved: Vec<MemoryRange>,
    /// For a status: what was found so far.
    pub(super) extents: Vec<Extent>,
    /// Waits in line for memory or for its next turn.
    pub(super) waiting: bool,
    /// The whole reply is in the connection's output already.
    pub(super) answered: bool,
    /// Its connection is gone: which of the volume's deaths that was.
    pub(super) died: Option<u64>,
}

/// A part of a read.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadPiece {
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u32,
    /// A page for the header, then the blocks.
    pub(super) memory: MemoryRange,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum PieceKind {
    Read(ReadPiece),
    Write(WritePiece),
    Release(RegionClaim),
    /// Flushes, and leaves that a status waits for.
    Plain,
}

/// What one lane request is about; its number is the lane's cookie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) task: u32,
    pub(super) kind: PieceKind,
}

impl<M: Memory> Shard<M> {
    /// A request has been parsed.
    pub(super) fn begin_request(&mut self, id: ConnectionId, request: Request) {
        let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
        let export = connection.export.expect("requests follow the choice of an export").0;
        self.close_those_who_left(export, id);
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        connection.requests_under_way += 1;
        let generation = connection.generation;
        self.served[export as usize].requests_under_way += 1;
        let task = self.tasks.insert(Task {
            connection: id,
            generation,
            request,
            export,
            term: self.served[export as usize].terms,
            started: self.now,
            begun_bytes: 0,
            pieces: 0,
            error: None,
            gathered: Vec::new(),
            reserved: Vec::new(),
            extents: Vec::new(),
            waiting: false,
            answered: false,
            died: None,
        });
        match request.operation {
            Operation::Write { .. } => self.begin_payload(id, task),
            Operation::WriteZeroes { provisioned: true, only_if_fast: true, .. } => {
                self.fail_task(task, RequestError::NotSupported);
                self.settle_task(task);
            }
            _ => self.advance_task(task),
        }
    }

    /// Begins as many pieces as may be under way, and ends the task when nothing is left.
    pub(super) fn advance_task(&mut self, task: u32) {
        if self.tasks.get(task).waiting {
            // It is in line; its turn will come.
            return;
        }
        if self.tasks.get(task).error.is_none() {
            match self.tasks.get(task).request.operation {
                Operation::Read { .. } => self.advance_read(task),
                Operation::Flush => self.advance_flush(task),
                Operation::Trim { .. } => self.advance_release(task, false),
                Operation::WriteZeroes { provisioned: false, .. } => self.advance_release(task, true),
                Operation::WriteZeroes { provisioned: true, .. } => self.advance_zeroes(task),
                Operation::BlockStatus { one_extent } => self.advance_status(task, one_extent),
                // Blocks are not kept in memory: there is nothing to read ahead into.
                Operation::Cache => self.tasks.get_mut(task).begun_bytes = u64::MAX,
                Operation::Write { .. } => {}
            }
        }
        self.settle_task(task);
    }

    fn advance_flush(&mut self, task: u32) {
        if self.tasks.get(task).begun_bytes > 0 {
            return;
        }
        self.tasks.get_mut(task).begun_bytes = u64::MAX;
        let piece = self.begin_piece(task, PieceKind::Plain);
        if self.is_remote(self.tasks.get(task).export as usize) {
            // What was answered is on stable media.
            return self.finish_later(piece, Ok(()));
        }
        let lane = self.lane_of(task);
        self.lanes[lane].lane.flush(piece);
    }

    /// The task waits in line for memory or its next turn.
    pub(super) fn wait_task(&mut self, task: u32) {
        if !std::mem::replace(&mut self.tasks.get_mut(task).waiting, true) {
            self.waiting_tasks.push_back(task);
            if let Some(connection) = self.any_connection_of(task) {
                connection.tasks_waiting += 1;
            }
        }
    }

    /// The task's turn has come.
    pub(super) fn end_wait(&mut self, task: u32) {
        self.tasks.get_mut(task).waiting = false;
        if let Some(connection) = self.any_connection_of(task) {
            connection.tasks_waiting -= 1;
        }
    }

    /// The task's connection, even if it is being closed.
    pub(super) fn any_connection_of(&mut self, task: u32) -> Option<&mut Connection> {
        let Task { connection: id, generation, .. } = *self.tasks.get(task);
        self.connections[id.0 as usize]
            .as_deref_mut()
            .filter(|connection| connection.generation == generation)
    }

    pub(super) fn lane_of(&self, task: u32) -> usize {
        self.served[self.tasks.get(task).export as usize].lane
    }

    pub(super) fn volume_of(&self, task: u32) -> u32 {
        self.served[self.tasks.get(task).export as usize].volume
    }

    pub(super) fn begin_piece(&mut self, task: u32, kind: PieceKind) -> u32 {
        self.tasks.get_mut(task).pieces += 1;
        self.pieces.insert(Piece { task, kind })
    }

    /// Ends a piece that its lane is done with.
    pub(super) fn end_piece(&mut self, piece: u32) -> u32 {
        let task = self.pieces.remove(piece).task;
        self.tasks.get_mut(task).pieces -= 1;
        task
    }

    pub(super) fn fail_task(&mut self, task: u32, error: RequestError) {
        self.tasks.get_mut(task).error.get_or_insert(error);
    }

    /// A lane has answered.
    pub(super) fn finish_piece(&mut self, completion: &Completion) {
        let piece = completion.cookie;
        let Piece { task, kind } = *self.pieces.get(piece);
        if let Err(error) = completion.result {
            self.fail_task(task, error);
        }
        match kind {
            PieceKind::Read(read) => {
                self.end_piece(piece);
                self.finish_read_piece(task, read, completion.holes);
            }
            PieceKind::Write(write) => {
                if !self.finish_write_step(piece, write, completion.result) {
                    return;
                }
                self.end_piece(piece);
            }
            PieceKind::Release(claim) => {
                self.end_piece(piece);
                self.unlock(self.tasks.get(task).export, claim);
            }
            PieceKind::Plain => {
                self.end_piece(piece);
            }
        }
        self.advance_task(task);
    }

    /// Ends the task if all was begun (or an error ends it early) and nothing is under way.
    pub(super) fn settle_task(&mut self, task: u32) {
        let state = self.tasks.get(task);
        let all_begun = state.begun_bytes >= state.request.length_bytes;
        if state.pieces > 0 || state.waiting || !(all_begun || state.error.is_some()) {
            return;
        }
        if self.payload_is_coming(task) {
            return;
        }
        self.end_task(task);
    }

    fn end_task(&mut self, task: u32) {
        if self.connection_of(task).is_some() {
            self.answer(task);
        } else {
            self.drop_gathered(task);
        }
        let ended = self.tasks.remove(task);
        // Somebody may wait for that.
        self.progress |= ended.died.is_some();
        self.served[ended.export as usize].requests_under_way -= 1;
        self.count_operation(&ended);
        let connection = self.connections[ended.connection.0 as usize].as_deref_mut();
        if let Some(connection) = connection.filter(|connection| connection.generation == ended.generation) {
            connection.requests_under_way -= 1;
            self.settle(ended.connection);
        }
    }

    /// The task's connection, if it is still there and can be sent to.
    pub(super) fn connection_of(&mut self, task: u32) -> Option<ConnectionId> {
        let Task { connection: id, generation, .. } = *self.tasks.get(task);
        self.living(id).filter(|connection| connection.generation == generation).map(|_| id)
    }

    fn answer(&mut self, task: u32) {
        let state = self.tasks.get(task);
        let (id, request, error, answered) = (state.connection, state.request, state.error, state.answered);
        let is_read = matches!(request.operation, Operation::Read { .. });
        if is_read && error.is_none() && !answered {
            return self.answer_gathered(task);
        }
        if is_read {
            self.drop_gathered(task);
        }
        if answered && error.is_none() {
            return;
        }
        let extents = std::mem::take(&mut self.tasks.get_mut(task).extents);
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("looked up by the caller");
        let replies = connection.session.replies();
        connection.output.append(|out| match error {
            Some(error) => out.extend_from_slice(replies.encode_error(&request, error).as_slice()),
            None if matches!(request.operation, Operation::BlockStatus { .. }) => {
                replies.encode_block_status(&request, &extents, out);
            }
            None => out.extend_from_slice(replies.encode_done(&request).as_slice()),
        });
        self.to_send.push(id);
    }

    fn count_operation(&mut self, ended: &Task) {
        let class = match ended.request.operation {
            Operation::Read { .. } => OperationClass::Read,
            Operation::Write { .. } => OperationClass::Write,
            Operation::Flush => OperationClass::Flush,
            Operation::Trim { .. } => OperationClass::Trim,
            Operation::WriteZeroes { .. } => OperationClass::WriteZeroes,
            Operation::Cache | Operation::BlockStatus { .. } => OperationClass::Other,
        };
        let report = &mut self.operations[class.index()];
        report.requests += 1;
        report.errors += u64::from(ended.error.is_some());
        report.bytes += ended.request.length_bytes;
        report.latency_us.saturating_record(self.now.since_ns(ended.started) / 1000);
    }

    /// Releases a lock on a range and lets those in line go on.
    pub(super) fn unlock(&mut self, export: u32, claim: RegionClaim) {
        self.served[export as usize].locks.release(claim);
        while let Some(piece) = self.served[export as usize].locks.grant_next() {
            self.lock_granted(piece);
        }
    }

    fn lock_granted(&mut self, piece: u32) {
        if Shard::<M>::is_replication_cookie(piece) {
            return self.check_lock_granted(piece);
        }
        match self.pieces.get(piece).kind {
            PieceKind::Write(_) => self.start_write(piece),
            PieceKind::Release(claim) => self.start_release(piece, claim),
            PieceKind::Read(_) | PieceKind::Plain => unreachable!("only changes take locks"),
        }
    }
}
