//! Connections: receives, sends, and the end.
//!
//! ```text
//!   each direction    Idle ──▶ Busy ──▶ Idle …        Busy ──▶ Ended   (failed, or end of stream)
//!                       └────▶ Waiting for a buffer ──▶ Busy
//!   the whole         open ──Close──▶ closing ──both directions at rest──▶ lingering ──▶ gone, Event::Closed
//! ```
//!
//! Lingering (TCP only): closing a socket that holds unread bytes resets the connection, and a reset may destroy
//! the last reply on its way to the client. So the sending half is shut down first, and what still comes in is
//! dropped until the client closes too, or does not within bounds.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, squeue, types};
use nix::sys::socket::{Shutdown, shutdown};

use super::buffers::BUFFER_GROUP;
use super::inflight::Ticket;
use super::mailbox::Message;
use super::memory::Arena;
use super::ring::{Completion, Target};
use super::{IGNORED, Operation, Reactor};
use crate::engine::ports::{ConnectionId, Engine, Event, PeerAddress, ReceiveBuffer};
use crate::engine::shard::MovedConnection;
use crate::engine::shard_message::ShardIndex;
use crate::limits::SEND_PIECES_MAX;
use crate::record::NodeId;
use crate::units::MemoryRange;

/// Bytes dropped in one go while lingering.
const LINGER_BYTES: u32 = 1 << 20;
/// How often, before the connection is closed regardless.
const LINGER_ROUNDS: u32 = 64;
/// How long to wait for the client, each time.
static LINGER_WAIT: types::Timespec = types::Timespec::new().sec(1);
/// Readable, or ended.
const POLL_READABLE: u32 = libc::POLLIN as u32;
/// The other side has closed, whatever is still to be read.
const POLL_HANG_UP: u32 = libc::POLLRDHUP as u32;

/// What one direction of a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Idle,
    Busy(Ticket),
    /// A receive for which there was no buffer.
    Waiting,
    Ended,
}

impl Direction {
    fn is_at_rest(self) -> bool {
        matches!(self, Direction::Idle | Direction::Ended)
    }
}

/// The kernel reads this while a send is under way: it stays in one place.
struct Outbox {
    header: libc::msghdr,
    pieces: [libc::iovec; SEND_PIECES_MAX],
    first: usize,
    end: usize,
}

/// Who is at the other end of a new connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Newcomer {
    Client(PeerAddress),
    /// A node that called, and one that was called.
    Caller(PeerAddress),
    Called(NodeId, PeerAddress),
}

impl Newcomer {
    pub(super) fn address(self) -> PeerAddress {
        match self {
            Newcomer::Client(peer) | Newcomer::Caller(peer) | Newcomer::Called(_, peer) => peer,
        }
    }

    fn event(self, connection: ConnectionId) -> Event {
        match self {
            Newcomer::Client(peer) => Event::Accepted { connection, peer },
            Newcomer::Caller(_) => Event::PeerAccepted { connection },
            Newcomer::Called(node, _) => Event::PeerConnected { node, connection },
        }
    }
}

/// One place of the connection table.
pub(super) struct Connection {
    open: Option<OpenConnection>,
    /// Made when the place is first used, and kept.
    outbox: Option<Box<Outbox>>,
}

struct OpenConnection {
    socket: OwnedFd,
    target: Target,
    peer: PeerAddress,
    receive: Direction,
    send: Direction,
    /// Waiting for the other side to close.
    watch: Option<Ticket>,
    closing: bool,
    lingering: bool,
    /// The reactor that accepted it, if that was another one, and its name there.
    origin: Option<(ShardIndex, ConnectionId)>,
    /// It is to go to another reactor.
    departure: Option<(ShardIndex, Box<MovedConnection>)>,
}

/// A connection that has left its place.
pub(super) struct Departed {
    pub(super) socket: OwnedFd,
    pub(super) peer: PeerAddress,
    pub(super) to: ShardIndex,
    pub(super) moved: Box<MovedConnection>,
}

// SAFETY: the pointers in an outbox lead into the arena's mapping and into the outbox itself, which is boxed and
// so stays where it is; only the reactor that owns the table follows them.
unsafe impl Send for Connection {}

impl Connection {
    pub(super) const EMPTY: Connection = Connection { open: None, outbox: None };

    /// A connection takes the place.
    pub(super) fn open(
        &mut self,
        id: ConnectionId,
        socket: OwnedFd,
        target: Target,
        peer: PeerAddress,
        origin: Option<(ShardIndex, ConnectionId)>,
    ) {
        assert!(self.open.is_none(), "{id:?} is in use");
        self.outbox.get_or_insert_with(Outbox::new);
        self.open = Some(OpenConnection {
            socket,
            target,
            peer,
            receive: Direction::Idle,
            send: Direction::Idle,
            watch: None,
            closing: false,
            lingering: false,
            origin,
            departure: None,
        });
    }

    fn expect_open(&mut self) -> &mut OpenConnection {
        self.open.as_mut().expect("an open connection")
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(open) = &self.open else { return f.write_str("free") };
        f.debug_struct("Connection")
            .field("peer", &open.peer)
            .field("receive", &open.receive)
            .field("send", &open.send)
            .field("closing", &open.closing)
            .finish_non_exhaustive()
    }
}

impl Outbox {
    fn new() -> Box<Outbox> {
        // SAFETY: both are plain C structures of integers and pointers, for which zero is a value.
        let (header, piece) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Box::new(Outbox { header, pieces: [piece; SEND_PIECES_MAX], first: 0, end: 0 })
    }

    /// Drops what was sent from the front. True if nothing is left.
    fn advance(&mut self, mut sent: usize) -> bool {
        while self.first < self.end {
            let piece = &mut self.pieces[self.first];
            if sent < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(sent);
                piece.iov_len -= sent;
                return false;
            }
            sent -= piece.iov_len;
            self.first += 1;
        }
        assert_eq!(sent, 0, "the kernel sent more than it was given");
        true
    }

    fn entry(&mut self, target: Target) -> squeue::Entry {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let pieces = &mut self.pieces[self.first..self.end];
        let entry = if let [piece] = pieces {
            let len = u32::try_from(piece.iov_len).expect("a piece of the arena");
            opcode::Send::new(target.fd(), piece.iov_base.cast(), len).flags(flags).build()
        } else {
            self.header.msg_iov = pieces.as_mut_ptr();
            self.header.msg_iovlen = pieces.len() as _;
            let flags = u32::try_from(flags).expect("flags are positive");
            opcode::SendMsg::new(target.fd(), &raw const self.header).flags(flags).build()
        };
        entry.flags(target.flags())
    }
}

impl<E: Engine<Memory = Arena>> Reactor<E> {
    fn connection(&mut self, id: ConnectionId) -> &mut OpenConnection {
        self.connections[id.0 as usize].expect_open()
    }

    /// False if there is no place, or none in the ring's table: the socket is closed.
    pub(super) fn open_connection(&mut self, socket: OwnedFd, newcomer: Newcomer) -> bool {
        let Some(id) = self.place_connection(socket, newcomer.address(), None) else { return false };
        self.pending.push_back(newcomer.event(id));
        true
    }

    pub(super) fn start_receive(&mut self, id: ConnectionId) {
        let connection = self.connection(id);
        assert!(!connection.closing, "a receive on {id:?}, which is being closed");
        assert!(
            connection.receive == Direction::Idle,
            "a receive on {id:?} while it is {:?}",
            connection.receive
        );
        if self.buffers.kernel_chooses() {
            self.receive_chosen_by_kernel(id);
        } else {
            self.wait_for_data(id);
        }
    }

    fn receive_chosen_by_kernel(&mut self, id: ConnectionId) {
        let len = self.mapping.layout().receive_buffer_bytes;
        let connection = self.connection(id);
        let target = connection.target;
        let entry = opcode::Recv::new(target.fd(), std::ptr::null_mut(), len)
            .buf_group(BUFFER_GROUP)
            .build()
            .flags(target.flags() | squeue::Flags::BUFFER_SELECT);
        let ticket = self.submit(Operation::Receive { connection: id }, entry);
        self.connection(id).receive = Direction::Busy(ticket);
    }

    /// Asks to be told of data (or its end) without holding a buffer meanwhile.
    fn wait_for_data(&mut self, id: ConnectionId) {
        let target = self.connection(id).target;
        let entry = opcode::PollAdd::new(target.fd(), POLL_READABLE).build().flags(target.flags());
        let ticket = self.submit(Operation::Readable { connection: id }, entry);
        self.connection(id).receive = Direction::Busy(ticket);
    }

    /// Asks to be told when the client has closed its side.
    pub(super) fn watch_hang_up(&mut self, id: ConnectionId) {
        let connection = self.connection(id);
        assert!(!connection.closing && connection.watch.is_none(), "a second watch on {id:?}");
        let target = connection.target;
        let entry = opcode::PollAdd::new(target.fd(), POLL_HANG_UP).build().flags(target.flags());
        let ticket = self.submit(Operation::HangUp { connection: id }, entry);
        self.connection(id).watch = Some(ticket);
    }

    pub(super) fn complete_hang_up(&mut self, id: ConnectionId, result: i32) {
        let connection = self.connection(id);
        connection.watch = None;
        if connection.departure.is_some() {
            self.depart(id);
        } else if connection.closing {
            self.close_if_at_rest(id);
        } else if result >= 0 {
            self.pending.push_back(Event::HungUp { connection: id });
        }
    }

    /// There is data, or the end of it.
    pub(super) fn complete_readable(&mut self, id: ConnectionId, result: i32) {
        let connection = self.connection(id);
        connection.receive = Direction::Idle;
        if result < 0 || connection.closing {
            return self.end_receive(id);
        }
        self.receive_into_free_buffer(id);
    }

    fn receive_into_free_buffer(&mut self, id: ConnectionId) {
        if !self.buffers.any_free() {
            self.counters.buffer_shortages += 1;
            self.connection(id).receive = Direction::Waiting;
            self.waiting_for_buffer.push_back(id);
            return;
        }
        if self.buffers.kernel_chooses() {
            return self.receive_chosen_by_kernel(id);
        }
        let buffer = self.buffers.choose();
        let memory = self.mapping.receive_buffer(buffer);
        let target = self.connection(id).target;
        let entry = opcode::Recv::new(target.fd(), self.mapping.pointer(memory), memory.len)
            .flags(libc::MSG_DONTWAIT)
            .build()
            .flags(target.flags());
        let ticket = self.submit(Operation::ReceiveChosen { connection: id, buffer }, entry);
        self.connection(id).receive = Direction::Busy(ticket);
    }

    /// A receive into a buffer that the kernel chose has ended.
    pub(super) fn complete_receive(&mut self, id: ConnectionId, completion: Completion) {
        let buffer = io_uring::cqueue::buffer_select(completion.flags).map(ReceiveBuffer);
        self.finish_receive(id, buffer, completion.result);
    }

    /// The same for a buffer chosen by the reactor, or by the kernel.
    pub(super) fn finish_receive(&mut self, id: ConnectionId, buffer: Option<ReceiveBuffer>, result: i32) {
        let connection = self.connection(id);
        connection.receive = Direction::Idle;
        let closing = connection.closing;
        match (u32::try_from(result), buffer) {
            (Ok(len), Some(buffer)) if len > 0 && !closing => {
                self.buffers.lend(buffer);
                let memory = self.mapping.receive_buffer(buffer).part(0, len);
                self.pending.push_back(Event::Received { connection: id, memory, buffer });
                return;
            }
            (_, Some(buffer)) => self.buffers.put_back(buffer),
            (Ok(len), None) => assert_eq!(len, 0, "bytes without a buffer"),
            (Err(_), None) => {}
        }
        match -result {
            _ if closing => self.end_receive(id),
            // The kernel says so before it has looked for data.
            libc::ENOBUFS => self.wait_for_data(id),
            libc::EINTR | libc::EAGAIN => self.start_receive(id),
            _ => self.end_receive(id),
        }
        // The buffer that this receive did not use may be what another one waits for.
        self.serve_waiting();
    }

    /// The engine gives back a buffer: the first that waits for one tries again.
    pub(super) fn recycle(&mut self, buffer: ReceiveBuffer) {
        self.buffers.recycle(buffer);
        self.serve_waiting();
    }

    /// Those who wait are known to have data (or the end of it): each either uses a buffer, and serves the next
    /// when that comes back, or ends without one, and serves the next then. So none is left behind.
    fn serve_waiting(&mut self) {
        while self.buffers.any_free() {
            let Some(id) = self.waiting_for_buffer.pop_front() else { return };
            let Some(open) = &mut self.connections[id.0 as usize].open else { continue };
            // A connection that was closed meanwhile leaves its name behind.
            if open.receive == Direction::Waiting && !open.closing {
                open.receive = Direction::Idle;
                return self.receive_into_free_buffer(id);
            }
        }
    }

    pub(super) fn start_receive_exact(&mut self, id: ConnectionId, memory: MemoryRange) {
        assert!(memory.len > 0, "a receive of nothing on {id:?}");
        let pointer = self.mapping.pointer(memory);
        let connection = self.connection(id);
        assert!(!connection.closing && connection.receive == Direction::Idle, "a second receive on {id:?}");
        let target = connection.target;
        let entry = opcode::Recv::new(target.fd(), pointer, memory.len)
            .flags(libc::MSG_WAITALL)
            .build()
            .flags(target.flags());
        let ticket = self.submit(Operation::ReceiveExact { connection: id, memory }, entry);
        self.connection(id).receive = Direction::Busy(ticket);
    }

    pub(super) fn complete_receive_exact(&mut self, id: ConnectionId, memory: MemoryRange, result: i32) {
        let connection = self.connection(id);
        connection.receive = Direction::Idle;
        let closing = connection.closing;
        match u32::try_from(result) {
            Ok(len) if len == memory.len && !closing => {
                self.pending.push_back(Event::ReceivedExact { connection: id });
            }
            Ok(len) if len > 0 && len < memory.len && !closing => {
                self.start_receive_exact(id, memory.part(len, memory.len - len));
            }
            Err(_) if (result == -libc::EINTR || result == -libc::EAGAIN) && !closing => {
                self.start_receive_exact(id, memory);
            }
            _ => self.end_receive(id),
        }
    }

    fn end_receive(&mut self, id: ConnectionId) {
        self.connection(id).receive = Direction::Ended;
        self.pending.push_back(Event::ReceiveEnded { connection: id });
        self.close_if_at_rest(id);
    }

    pub(super) fn start_send(&mut self, id: ConnectionId) {
        let place = &mut self.connections[id.0 as usize];
        let outbox = place.outbox.as_mut().expect("a used place has an outbox");
        let pieces = self.engine.send_pieces(id);
        assert!(pieces.len() <= SEND_PIECES_MAX, "{} pieces in one send", pieces.len());
        let mut end = 0;
        for piece in pieces.iter().filter(|piece| piece.len > 0) {
            outbox.pieces[end] =
                libc::iovec { iov_base: self.mapping.pointer(*piece).cast(), iov_len: piece.len as usize };
            end += 1;
        }
        assert!(end > 0, "a send of nothing on {id:?}");
        (outbox.first, outbox.end) = (0, end);
        let connection = place.expect_open();
        assert!(!connection.closing && connection.send == Direction::Idle, "a second send on {id:?}");
        self.continue_send(id);
    }

    fn continue_send(&mut self, id: ConnectionId) {
        let place = &mut self.connections[id.0 as usize];
        let target = place.expect_open().target;
        let entry = place.outbox.as_mut().expect("a used place has an outbox").entry(target);
        self.sends_queued += 1;
        let ticket = self.submit(Operation::Send { connection: id }, entry);
        self.connection(id).send = Direction::Busy(ticket);
    }

    pub(super) fn complete_send(&mut self, id: ConnectionId, result: i32) {
        let place = &mut self.connections[id.0 as usize];
        let connection = place.open.as_mut().expect("an open connection");
        connection.send = Direction::Idle;
        let closing = connection.closing;
        let outbox = place.outbox.as_mut().expect("a used place has an outbox");
        match usize::try_from(result) {
            Ok(sent) if outbox.advance(sent) => {
                if closing {
                    return self.end_send(id);
                }
                self.pending.push_back(Event::Sent { connection: id });
            }
            Ok(sent) if sent > 0 && !closing => {
                self.counters.short_sends += 1;
                self.continue_send(id);
            }
            Err(_) if (result == -libc::EINTR || result == -libc::EAGAIN) && !closing => {
                self.continue_send(id)
            }
            _ => self.end_send(id),
        }
    }

    fn end_send(&mut self, id: ConnectionId) {
        self.connection(id).send = Direction::Ended;
        self.pending.push_back(Event::SendFailed { connection: id });
        self.close_if_at_rest(id);
    }

    /// The connection is to go; returns what must end before.
    pub(super) fn begin_departure(
        &mut self,
        id: ConnectionId,
        to: ShardIndex,
        moved: Box<MovedConnection>,
    ) -> Option<Ticket> {
        let connection = self.connection(id);
        let idle = connection.receive == Direction::Idle && connection.send == Direction::Idle;
        assert!(idle && !connection.closing, "{id:?} is moved amid its work");
        connection.departure = Some((to, moved));
        connection.watch
    }

    /// Nothing of it is with the kernel: it leaves its place, which stays taken.
    pub(super) fn take_departing(&mut self, id: ConnectionId) -> Departed {
        let open = self.connections[id.0 as usize].open.take().expect("an open connection");
        self.ring.unregister_file(open.target);
        let (to, moved) = open.departure.expect("a connection that is to go");
        Departed { socket: open.socket, peer: open.peer, to, moved }
    }

    /// Ends what is under way, each in its own event, then the connection.
    pub(super) fn close_connection(&mut self, id: ConnectionId) {
        let connection = self.connection(id);
        assert!(!connection.closing, "{id:?} is closed twice");
        connection.closing = true;
        let (receive, send, watch) = (connection.receive, connection.send, connection.watch);
        if let Some(ticket) = watch {
            self.cancel(ticket);
        }
        for direction in [receive, send] {
            if let Direction::Busy(ticket) = direction {
                self.cancel(ticket);
            }
        }
        if receive == Direction::Waiting {
            self.end_receive(id);
        } else {
            self.close_if_at_rest(id);
        }
    }

    fn close_if_at_rest(&mut self, id: ConnectionId) {
        let connection = self.connection(id);
        let at_rest =
            connection.receive.is_at_rest() && connection.send.is_at_rest() && connection.watch.is_none();
        if !connection.closing || !at_rest {
            return;
        }
        let heard_the_end = connection.receive == Direction::Ended && !connection.lingering;
        let internet = matches!(connection.peer, PeerAddress::Internet(_));
        let _ = shutdown(connection.socket.as_raw_fd(), Shutdown::Write);
        if internet && !heard_the_end {
            self.linger(id, LINGER_ROUNDS);
        } else {
            self.forget_connection(id);
        }
    }

    fn linger(&mut self, id: ConnectionId, rounds: u32) {
        let target = self.connection(id).target;
        // With MSG_TRUNC TCP drops the bytes and touches no memory.
        let entry = opcode::Recv::new(target.fd(), std::ptr::null_mut(), LINGER_BYTES)
            .flags(libc::MSG_TRUNC)
            .build()
            .flags(target.flags() | squeue::Flags::IO_LINK);
        let limit = opcode::LinkTimeout::new(&raw const LINGER_WAIT).build().user_data(IGNORED);
        let ticket = self.submit(Operation::Linger { connection: id, rounds }, entry);
        self.push(&limit);
        let connection = self.connection(id);
        connection.lingering = true;
        connection.receive = Direction::Busy(ticket);
    }

    pub(super) fn complete_linger(&mut self, id: ConnectionId, rounds: u32, result: i32) {
        if result > 0 && rounds > 1 {
            self.linger(id, rounds - 1);
        } else {
            self.forget_connection(id);
        }
    }

    fn forget_connection(&mut self, id: ConnectionId) {
        let open = self.connections[id.0 as usize].open.take().expect("an open connection");
        self.ring.unregister_file(open.target);
        let origin = open.origin;
        drop(open);
        self.free_connections.push(id);
        self.counters.closed += 1;
        self.pending.push_back(Event::Closed { connection: id });
        if let Some((shard, connection)) = origin {
            self.post(shard, Message::Gone { connection });
        }
        self.admit_waiting();
    }
}
