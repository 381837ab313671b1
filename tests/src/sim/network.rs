//! Connections as two streams of bytes that are cut anywhere, delayed, stalled and broken.
//!
//! A [`Pipe`] stands for the kernel's side of one connection: what the client wrote and the server has not
//! received, what the server sent and the client has not read. It moves bytes when the [`super::driver`] says
//! that time has passed, and returns the [`Event`] that this causes.

use datapath::engine::ports::{ConnectionId, Event, ReceiveBuffer};
use datapath::units::MemoryRange;

use super::bytes::ByteQueue;
use super::memory::{Lending, SimMemory};
use super::random::Random;
use crate::to_u32;

/// Bytes that the kernel takes from a server before its client has read any.
const SOCKET_BUFFER_BYTES: usize = 128 << 10;

/// How a connection cuts its streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cutting {
    /// As much as there is.
    Whole,
    /// Any number of bytes.
    Anywhere,
    /// Often one byte, else any number. Long payloads pass in larger pieces, or a seed would take hours.
    Crumbs,
}

impl Cutting {
    fn draw(self, available: usize, random: &mut Random) -> usize {
        match self {
            Cutting::Whole => available,
            Cutting::Crumbs if available < 4096 && random.percent(70) => 1,
            Cutting::Anywhere | Cutting::Crumbs => {
                if available < 4096 || random.percent(30) {
                    1 + random.index(available)
                } else {
                    available
                }
            }
        }
    }
}

/// The driver's receive buffers, cut from one end of the memory. Of a buffer that the engine has, it may only touch what
/// was received.
#[derive(Debug)]
pub struct ReceiveBuffers {
    first: MemoryRange,
    /// Per buffer: how much of it the engine has, if it does.
    received_bytes: Vec<Option<u32>>,
}

impl ReceiveBuffers {
    /// Takes charge of `count` buffers, of which `first` is the first one and the others follow it.
    #[must_use]
    pub fn new(first: MemoryRange, count: u16, memory: &mut SimMemory) -> ReceiveBuffers {
        let buffers = ReceiveBuffers { first, received_bytes: vec![None; usize::from(count)] };
        for number in 0..count {
            memory.lend(buffers.range(ReceiveBuffer(number)), Lending::Exclusive);
        }
        buffers
    }

    /// The engine has no more use for a buffer.
    ///
    /// # Panics
    /// If it never had it.
    pub fn recycle(&mut self, buffer: ReceiveBuffer, memory: &mut SimMemory) {
        let received_bytes = self.received_bytes[usize::from(buffer.0)].take();
        let received_bytes =
            received_bytes.unwrap_or_else(|| panic!("the engine returns {buffer:?}, which it does not have"));
        let range = self.range(buffer);
        memory.take_back(range.part(received_bytes, range.len - received_bytes), Lending::Exclusive);
        memory.lend(range, Lending::Exclusive);
    }

    /// Buffers that the engine has.
    #[must_use]
    pub fn lent_out_count(&self) -> usize {
        self.received_bytes.iter().flatten().count()
    }

    /// Buffers in all.
    #[must_use]
    pub fn count(&self) -> usize {
        self.received_bytes.len()
    }

    fn range(&self, buffer: ReceiveBuffer) -> MemoryRange {
        MemoryRange { start: self.first.start + u32::from(buffer.0) * self.first.len, len: self.first.len }
    }

    /// Puts as many of `bytes` into a buffer as fit.
    fn fill(&mut self, bytes: &[u8], memory: &mut SimMemory) -> Option<(ReceiveBuffer, MemoryRange)> {
        let number = self.received_bytes.iter().position(Option::is_none)?;
        let buffer = ReceiveBuffer(u16::try_from(number).expect("a 16-bit count"));
        let whole = self.range(buffer);
        let received = whole.part(0, to_u32(bytes.len()).min(whole.len));
        memory.driver_bytes_mut(received).copy_from_slice(&bytes[..received.len as usize]);
        memory.take_back(whole, Lending::Exclusive);
        memory.lend(whole.part(received.len, whole.len - received.len), Lending::Exclusive);
        self.received_bytes[number] = Some(received.len);
        Some((buffer, received))
    }
}

#[derive(Debug, Clone, Copy)]
enum Receiving {
    Idle,
    Any,
    Exact { memory: MemoryRange, filled: u32 },
}

#[derive(Debug)]
struct Sending {
    pieces: Vec<MemoryRange>,
    piece: usize,
    /// Bytes of that piece already gone.
    offset: u32,
}

/// What moving some bytes led to.
#[derive(Debug)]
pub enum Progress {
    /// Nothing can move until something else happens.
    Blocked,
    /// Some bytes moved and more can.
    Some,
    /// The engine is to be told.
    Event(Event),
}

/// See the module's description.
#[derive(Debug)]
pub struct Pipe {
    id: ConnectionId,
    cutting: Cutting,
    to_server: ByteQueue,
    to_client: ByteQueue,
    receiving: Receiving,
    sending: Option<Sending>,
    client_left: bool,
    server_closing: bool,
    receive_ended: bool,
    send_failed: bool,
}

impl Pipe {
    /// A fresh connection.
    #[must_use]
    pub fn new(id: ConnectionId, cutting: Cutting) -> Pipe {
        Pipe {
            id,
            cutting,
            to_server: ByteQueue::default(),
            to_client: ByteQueue::default(),
            receiving: Receiving::Idle,
            sending: None,
            client_left: false,
            server_closing: false,
            receive_ended: false,
            send_failed: false,
        }
    }

    /// The client writes.
    pub fn client_writes(&mut self, bytes: &[u8]) {
        assert!(!self.client_left, "a client that left writes nothing");
        self.to_server.push(bytes);
    }

    /// The client leaves. Of what it wrote, any part is still under way and arrives.
    pub fn client_leaves(&mut self, random: &mut Random) {
        self.client_left = true;
        self.to_server.truncate(random.index(self.to_server.len() + 1));
        self.to_client = ByteQueue::default();
    }

    /// The engine asks for a receive.
    ///
    /// # Panics
    /// If that is against the rules of the port.
    pub fn start_receive(&mut self, exact: Option<MemoryRange>, memory: &mut SimMemory) {
        let id = self.id;
        assert!(matches!(self.receiving, Receiving::Idle), "{id:?} has a receive under way");
        assert!(!self.receive_ended, "{id:?} was told that receiving ended, and receives");
        assert!(!self.server_closing, "{id:?} receives after it was closed");
        self.receiving = match exact {
            None => Receiving::Any,
            Some(range) => {
                assert!(range.len > 0, "{id:?} receives exactly nothing");
                memory.lend(range, Lending::Exclusive);
                Receiving::Exact { memory: range, filled: 0 }
            }
        };
    }

    /// The engine asks for a send.
    ///
    /// # Panics
    /// If that is against the rules of the port.
    pub fn start_send(&mut self, pieces: &[MemoryRange], memory: &mut SimMemory) {
        let id = self.id;
        assert!(self.sending.is_none(), "{id:?} has a send under way");
        assert!(!self.send_failed, "{id:?} was told that sending failed, and sends");
        assert!(!self.server_closing, "{id:?} sends after it was closed");
        assert!(!pieces.is_empty() && pieces.iter().all(|piece| piece.len > 0), "{id:?} sends nothing");
        for piece in pieces {
            memory.lend(*piece, Lending::Shared);
        }
        self.sending = Some(Sending { pieces: pieces.to_vec(), piece: 0, offset: 0 });
    }

    /// The engine closes the connection.
    ///
    /// # Panics
    /// If it did so before.
    pub fn start_close(&mut self) {
        assert!(!self.server_closing, "{:?} is closed twice", self.id);
        self.server_closing = true;
    }

    /// Moves bytes towards the server.
    pub fn arrive(
        &mut self,
        memory: &mut SimMemory,
        buffers: &mut ReceiveBuffers,
        random: &mut Random,
    ) -> Progress {
        if matches!(self.receiving, Receiving::Idle) {
            return Progress::Blocked;
        }
        if self.server_closing || (self.client_left && self.to_server.is_empty()) {
            return self.end_receive(memory, random);
        }
        if self.to_server.is_empty() {
            return Progress::Blocked;
        }
        let count = self.cutting.draw(self.to_server.len(), random);
        match &mut self.receiving {
            Receiving::Idle => unreachable!("handled above"),
            Receiving::Any => {
                let arriving = &self.to_server.peek()[..count];
                let Some((buffer, range)) = buffers.fill(arriving, memory) else { return Progress::Blocked };
                self.to_server.skip(range.len as usize);
                self.receiving = Receiving::Idle;
                Progress::Event(Event::Received { connection: self.id, memory: range, buffer })
            }
            Receiving::Exact { memory: range, filled } => {
                let range = *range;
                let part = range.part(*filled, to_u32(count).min(range.len - *filled));
                memory.driver_bytes_mut(part).copy_from_slice(&self.to_server.peek()[..part.len as usize]);
                self.to_server.skip(part.len as usize);
                *filled += part.len;
                if *filled < range.len {
                    return Progress::Some;
                }
                memory.take_back(range, Lending::Exclusive);
                self.receiving = Receiving::Idle;
                Progress::Event(Event::ReceivedExact { connection: self.id })
            }
        }
    }

    /// Moves bytes from the server into the socket's buffer.
    pub fn depart(&mut self, memory: &mut SimMemory, random: &mut Random) -> Progress {
        let Some(sending) = &mut self.sending else { return Progress::Blocked };
        if self.client_left || self.server_closing {
            self.send_failed = true;
            self.take_back_send(memory);
            return Progress::Event(Event::SendFailed { connection: self.id });
        }
        let mut room = SOCKET_BUFFER_BYTES.saturating_sub(self.to_client.len());
        if room == 0 {
            return Progress::Blocked;
        }
        room = self.cutting.draw(room, random);
        while let Some(piece) = sending.pieces.get(sending.piece) {
            let part = piece.part(sending.offset, to_u32(room).min(piece.len - sending.offset));
            self.to_client.push(memory.driver_bytes(part));
            room -= part.len as usize;
            sending.offset += part.len;
            if sending.offset < piece.len {
                return Progress::Some;
            }
            sending.piece += 1;
            sending.offset = 0;
        }
        self.take_back_send(memory);
        Progress::Event(Event::Sent { connection: self.id })
    }

    /// Moves bytes from the socket's buffer to the client, appending them to `input`. Returns whether there
    /// are more.
    pub fn deliver(&mut self, input: &mut ByteQueue, random: &mut Random) -> bool {
        if self.to_client.is_empty() {
            return false;
        }
        let count = self.cutting.draw(self.to_client.len(), random);
        if count == self.to_client.len() && input.is_empty() {
            std::mem::swap(input, &mut self.to_client);
            return false;
        }
        input.push(&self.to_client.peek()[..count]);
        self.to_client.skip(count);
        !self.to_client.is_empty()
    }

    /// Has the engine asked to close it?
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.server_closing
    }

    /// Has everything under way ended, so that the engine may hear that the connection is gone?
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.server_closing && matches!(self.receiving, Receiving::Idle) && self.sending.is_none()
    }

    /// Did the server close, and has the client read everything that was sent before?
    #[must_use]
    pub fn is_at_end_for_client(&self) -> bool {
        self.server_closing && self.to_client.is_empty()
    }

    /// Is a receive or a send under way?
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !matches!(self.receiving, Receiving::Idle) || self.sending.is_some()
    }

    fn end_receive(&mut self, memory: &mut SimMemory, random: &mut Random) -> Progress {
        if let Receiving::Exact { memory: range, filled } = self.receiving {
            memory.take_back_filled(range, filled, random);
        }
        self.receiving = Receiving::Idle;
        self.receive_ended = true;
        Progress::Event(Event::ReceiveEnded { connection: self.id })
    }

    fn take_back_send(&mut self, memory: &mut SimMemory) {
        let sending = self.sending.take().expect("a send is under way");
        for piece in sending.pieces {
            memory.take_back(piece, Lending::Shared);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        memory: SimMemory,
        buffers: ReceiveBuffers,
        random: Random,
        pipe: Pipe,
    }

    fn bench(cutting: Cutting) -> Bench {
        let mut memory = SimMemory::new(1 << 20);
        let first = MemoryRange { start: 0, len: 4096 };
        let buffers = ReceiveBuffers::new(first, 2, &mut memory);
        Bench { memory, buffers, random: Random::new(2), pipe: Pipe::new(ConnectionId(0), cutting) }
    }

    impl Bench {
        fn arrive(&mut self) -> Progress {
            self.pipe.arrive(&mut self.memory, &mut self.buffers, &mut self.random)
        }
    }

    #[test]
    fn a_stream_arrives_whole_however_it_is_cut() {
        for cutting in [Cutting::Whole, Cutting::Anywhere, Cutting::Crumbs] {
            let mut bench = bench(cutting);
            let sent: Vec<u8> = (0..20_000_u32).map(|at| at.to_le_bytes()[0]).collect();
            bench.pipe.client_writes(&sent);
            let mut received = Vec::new();
            let exact = MemoryRange { start: 65_536, len: 3_000 };
            while received.len() + 3_000 <= sent.len() {
                bench.pipe.start_receive(Some(exact), &mut bench.memory);
                while !matches!(bench.arrive(), Progress::Event(Event::ReceivedExact { .. })) {}
                received.extend_from_slice(bench.memory.driver_bytes(exact));
            }
            while received.len() < sent.len() {
                bench.pipe.start_receive(None, &mut bench.memory);
                let Progress::Event(Event::Received { memory, buffer, .. }) = bench.arrive() else {
                    panic!()
                };
                received.extend_from_slice(bench.memory.driver_bytes(memory));
                bench.buffers.recycle(buffer, &mut bench.memory);
            }
            assert!(sent == received);
        }
    }

    #[test]
    fn a_receive_ends_when_the_client_has_left() {
        let mut bench = bench(Cutting::Whole);
        bench.pipe.client_writes(&[1; 10]);
        bench.pipe.start_receive(Some(MemoryRange { start: 65_536, len: 100 }), &mut bench.memory);
        bench.pipe.client_leaves(&mut bench.random);
        while !matches!(bench.arrive(), Progress::Event(Event::ReceiveEnded { .. })) {}
    }

    #[test]
    fn an_engine_that_keeps_all_buffers_receives_nothing_more() {
        let mut bench = bench(Cutting::Whole);
        bench.pipe.client_writes(&[1; 10_000]);
        for _ in 0..2 {
            bench.pipe.start_receive(None, &mut bench.memory);
            assert!(matches!(bench.arrive(), Progress::Event(Event::Received { .. })));
        }
        bench.pipe.start_receive(None, &mut bench.memory);
        assert!(matches!(bench.arrive(), Progress::Blocked));
        bench.buffers.recycle(ReceiveBuffer(0), &mut bench.memory);
        assert!(matches!(bench.arrive(), Progress::Event(Event::Received { .. })));
    }

    #[test]
    fn a_client_that_does_not_read_holds_the_send_back() {
        let mut bench = bench(Cutting::Whole);
        let pieces = [MemoryRange { start: 65_536, len: 200 << 10 }];
        bench.pipe.start_send(&pieces, &mut bench.memory);
        assert!(matches!(bench.pipe.depart(&mut bench.memory, &mut bench.random), Progress::Some));
        assert!(matches!(bench.pipe.depart(&mut bench.memory, &mut bench.random), Progress::Blocked));
        let mut input = ByteQueue::default();
        bench.pipe.deliver(&mut input, &mut bench.random);
        assert!(matches!(
            bench.pipe.depart(&mut bench.memory, &mut bench.random),
            Progress::Event(Event::Sent { .. })
        ));
        bench.pipe.deliver(&mut input, &mut bench.random);
        assert_eq!(input.len(), 200 << 10);
    }
}
