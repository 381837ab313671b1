//! READ: pieces from the lane, replies in place.
//!
//! A piece's blocks are read into memory with one page in front, so that the reply's header can be put directly
//! before the data and both are sent as one run. A hole's own memory takes the headers around it.

use super::Shard;
use super::share::Purpose;
use super::task::{PIECES_PER_TASK_MAX, PieceKind, ReadPiece};
use crate::limits::PIECE_BYTES_MAX;
use crate::memory::Memory;
use crate::request::{Operation, Request};
use crate::session::nbd::Replies;
use crate::store::lane::HoleMap;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64, MemoryRange};
use crate::wire::nbd_transmission::HeaderBytes;

/// How a read is cut: pieces end on multiples of the largest piece.
fn next_piece(request: &Request, begun_bytes: u64) -> (u64, u32) {
    let start = request.offset_bytes + begun_bytes;
    let end = request.offset_bytes + request.length_bytes;
    let piece = u64::from(PIECE_BYTES_MAX);
    let stop = end.min((start / piece + 1) * piece);
    (start, u32::try_from(stop - start).expect("at most a piece"))
}

pub(super) fn blocks_of(offset_bytes: u64, length_bytes: u32) -> (u32, u32) {
    let first = offset_bytes / BLOCK_BYTES_U64;
    let end = (offset_bytes + u64::from(length_bytes)).div_ceil(BLOCK_BYTES_U64);
    (
        u32::try_from(first).expect("volumes have fewer blocks"),
        u32::try_from(end - first).expect("at most a piece"),
    )
}

impl<M: Memory> Shard<M> {
    pub(super) fn advance_read(&mut self, task: u32) {
        if self.connection_of(task).is_none() {
            // Nobody waits for it.
            let state = self.tasks.get_mut(task);
            state.begun_bytes = state.request.length_bytes;
            return;
        }
        if !self.reserve_gathered(task) {
            return self.wait_task(task);
        }
        loop {
            let state = self.tasks.get(task);
            let request = state.request;
            if state.begun_bytes >= request.length_bytes || state.pieces >= PIECES_PER_TASK_MAX {
                return;
            }
            let (offset_bytes, length_bytes) = next_piece(&request, state.begun_bytes);
            let (block, count) = blocks_of(offset_bytes, length_bytes);
            let memory = match self.tasks.get_mut(task).reserved.pop() {
                Some(memory) => memory,
                None => {
                    let Some(memory) = self.allocate(task, count + 1, Purpose::Read) else {
                        return self.wait_task(task);
                    };
                    memory
                }
            };
            self.tasks.get_mut(task).begun_bytes += u64::from(length_bytes);
            let piece =
                self.begin_piece(task, PieceKind::Read(ReadPiece { offset_bytes, length_bytes, memory }));
            let blocks = memory.part(BLOCK_BYTES, count * BLOCK_BYTES);
            let served = self.tasks.get(task).export as usize;
            self.read_blocks(served, piece, (block, count), blocks);
        }
    }

    /// A reply that goes out as a whole must have all its memory before it begins: two of them that each hold a
    /// half would wait for each other.
    fn reserve_gathered(&mut self, task: u32) -> bool {
        let state = self.tasks.get(task);
        let request = state.request;
        let (_, first) = next_piece(&request, 0);
        let single = u64::from(first) == request.length_bytes;
        if single || state.begun_bytes > 0 || !self.is_gathered(task) {
            return true;
        }
        let mut sizes = Vec::new();
        let mut begun = 0;
        while begun < request.length_bytes {
            let (offset_bytes, length_bytes) = next_piece(&request, begun);
            sizes.push(blocks_of(offset_bytes, length_bytes).1 + 1);
            begun += u64::from(length_bytes);
        }
        sizes.reverse();
        let Some(reserved) = self.allocate_all(task, &sizes, Purpose::Read) else { return false };
        self.tasks.get_mut(task).reserved = reserved;
        true
    }

    /// Must the reply be complete before any of it is sent?
    fn is_gathered(&mut self, task: u32) -> bool {
        let one_piece = self.tasks.get(task).request.operation == Operation::Read { one_piece: true };
        let Some(id) = self.connection_of(task) else { return false };
        let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
        one_piece || !connection.session.replies().are_chunks()
    }

    pub(super) fn finish_read_piece(&mut self, task: u32, read: ReadPiece, holes: HoleMap) {
        let alive = self.connection_of(task).is_some();
        if !alive || self.tasks.get(task).error.is_some() {
            self.give_back(task, read.memory, Purpose::Read);
            // Nobody waits for the rest.
            let state = self.tasks.get_mut(task);
            state.begun_bytes = state.request.length_bytes;
            return;
        }
        let request = self.tasks.get(task).request;
        let single = u64::from(read.length_bytes) == request.length_bytes;
        if self.is_gathered(task) && !single {
            return self.tasks.get_mut(task).gathered.push(read);
        }
        self.send_piece(task, read, holes, single);
        let state = self.tasks.get_mut(task);
        // Of several pieces none is marked as the last: an empty chunk ends the reply.
        state.answered = single;
        if !single && state.begun_bytes >= state.request.length_bytes && state.pieces == 0 {
            self.end_chunks(task);
        }
    }

    fn end_chunks(&mut self, task: u32) {
        let request = self.tasks.get(task).request;
        self.tasks.get_mut(task).answered = true;
        let id = self.connection_of(task).expect("looked up by the caller");
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        let done = connection.session.replies().encode_done(&request);
        connection.output.append(|out| out.extend_from_slice(done.as_slice()));
        self.to_send.push(id);
    }

    /// Queues a piece's data, with headers in place.
    fn send_piece(&mut self, task: u32, read: ReadPiece, holes: HoleMap, last: bool) {
        let id = self.connection_of(task).expect("looked up by the caller");
        let request = self.tasks.get(task).request;
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        let replies = connection.session.replies();
        let one_piece = request.operation == Operation::Read { one_piece: true };
        let (start, memory) = (read.data_start(), read.memory);
        if !replies.are_chunks() || one_piece || !holes.has_holes() {
            let header = replies.read_header(&request, read.offset_bytes, read.length_bytes, last);
            let bytes = put_in_front(&mut self.memory, start, &header);
            let run = MemoryRange { start: bytes, len: start - bytes + read.length_bytes };
            connection.output.append_data(run, Some(memory));
        } else {
            let mut chunks = ChunkRuns { replies, request, read, last };
            chunks.send(&mut self.memory, holes, |run, free| connection.output.append_data(run, free));
        }
        self.to_send.push(id);
    }

    /// All pieces of a gathered read are here: one header, then the pieces in order.
    pub(super) fn answer_gathered(&mut self, task: u32) {
        let mut gathered = std::mem::take(&mut self.tasks.get_mut(task).gathered);
        gathered.sort_unstable_by_key(|piece| piece.offset_bytes);
        let request = self.tasks.get(task).request;
        let length_bytes = u32::try_from(request.length_bytes).expect("bounded by limits");
        let id = self.connection_of(task).expect("looked up by the caller");
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        let header =
            connection.session.replies().read_header(&request, request.offset_bytes, length_bytes, true);
        connection.output.append(|out| out.extend_from_slice(header.as_slice()));
        for piece in gathered {
            let data = MemoryRange { start: piece.data_start(), len: piece.length_bytes };
            connection.output.append_data(data, Some(piece.memory));
        }
        self.to_send.push(id);
    }

    pub(super) fn drop_gathered(&mut self, task: u32) {
        let state = self.tasks.get_mut(task);
        let gathered = std::mem::take(&mut state.gathered).into_iter().map(|piece| piece.memory);
        let pages: Vec<MemoryRange> = gathered.chain(std::mem::take(&mut state.reserved)).collect();
        for memory in pages {
            self.give_back(task, memory, Purpose::Read);
        }
    }
}

impl ReadPiece {
    /// Where the first requested byte is.
    fn data_start(&self) -> u32 {
        let within = u32::try_from(self.offset_bytes % BLOCK_BYTES_U64).expect("below a block");
        self.memory.start + BLOCK_BYTES + within
    }
}

/// Puts a header directly in front of `start`; returns where it begins.
fn put_in_front(memory: &mut impl Memory, start: u32, header: &HeaderBytes) -> u32 {
    let bytes = header.as_slice();
    let len = u32::try_from(bytes.len()).expect("a header");
    memory.bytes_mut(MemoryRange { start: start - len, len }).copy_from_slice(bytes);
    start - len
}

/// A piece with holes: one chunk for each run.
struct ChunkRuns {
    replies: Replies,
    request: Request,
    read: ReadPiece,
    last: bool,
}

impl ChunkRuns {
    fn send(
        &mut self,
        memory: &mut impl Memory,
        holes: HoleMap,
        mut append: impl FnMut(MemoryRange, Option<MemoryRange>),
    ) {
        let (first_block, count) = blocks_of(self.read.offset_bytes, self.read.length_bytes);
        let mut index = 0;
        while index < count {
            let hole = holes.is_hole(index);
            let mut end = index + 1;
            while end < count && holes.is_hole(end) == hole {
                end += 1;
            }
            let free = (end == count).then_some(self.read.memory);
            let run = self.run(memory, first_block, index, end, hole, end == count && self.last);
            append(run, free);
            index = end;
        }
    }

    fn run(
        &self,
        memory: &mut impl Memory,
        first_block: u32,
        index: u32,
        end: u32,
        hole: bool,
        last: bool,
    ) -> MemoryRange {
        let piece_end = self.read.offset_bytes + u64::from(self.read.length_bytes);
        let from = (u64::from(first_block + index) * BLOCK_BYTES_U64).max(self.read.offset_bytes);
        let to = (u64::from(first_block + end) * BLOCK_BYTES_U64).min(piece_end);
        let length = u32::try_from(to - from).expect("at most a piece");
        if hole {
            // The hole's first block is ours from its start; a header behind it goes to its last block's end.
            let header = self.replies.encode_hole(&self.request, from, length, last);
            let start = self.read.memory.start + BLOCK_BYTES + index * BLOCK_BYTES;
            let len = u32::try_from(header.as_slice().len()).expect("a header");
            let run = MemoryRange { start, len };
            memory.bytes_mut(run).copy_from_slice(header.as_slice());
            return run;
        }
        let header = self.replies.read_header(&self.request, from, length, last);
        let within = u32::try_from(from - u64::from(first_block) * BLOCK_BYTES_U64).expect("at most a piece");
        let data = self.read.memory.start + BLOCK_BYTES + within;
        let start = put_in_front(memory, data, &header);
        MemoryRange { start, len: data - start + length }
    }
}
