//! The simulator's driver of an [`Engine`]: the counterpart of the reactor, with the rules of
//! [`datapath::engine::ports`] as assertions.

mod events;
mod node;
mod threads;

use datapath::engine::ports::{
    ConnectionId, DeviceIndex, Effect, Engine, Event, PeerAddress, ReceiveBuffer, Token,
};
use datapath::engine::shard_message::ShardIndex;
use datapath::limits::{CONNECTIONS_MAX, SEND_PIECES_MAX};
use datapath::record::NodeId;
use datapath::units::{BLOCK_BYTES_U64, MemoryRange, Moment};

use self::events::connection_of;
use self::threads::{Mail, Post, Thread};
use super::bytes::ByteQueue;
use super::clock::Agenda;
use super::disk::{Disk, OperationIndex};
use super::memory::{Lending, SimMemory};
use super::network::{Cutting, Pipe, Progress};
use super::random::Random;
use super::subject::MemoryPlan;
use super::trace;

#[derive(Clone, Copy, Debug)]
enum Happening {
    Turn(usize),
    /// A turn whose clock was read long before.
    LateTurn(usize),
    Timeout(usize),
    Drain(usize),
    /// From one thread to another.
    Mail(usize, usize),
    Device(OperationIndex),
    Arrive(ConnectionId),
    Depart(ConnectionId),
    Deliver(ConnectionId),
    ResumeReading(ConnectionId),
    Closed(ConnectionId),
    Planned(Plan),
}

/// What the world asked to be told about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The client with this number has time to send something.
    Think(usize),
    /// Time to look whether anything is stuck.
    Watch,
    /// Time to end this life.
    End,
}

/// What a step led to, as far as the world cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Nothing of interest.
    Nothing,
    /// The engine had a turn.
    Turn,
    /// A client can read something from this connection.
    Readable(ConnectionId),
    /// What [`Driver::plan`] asked for.
    Planned(Plan),
    /// Nothing will ever happen again.
    Dead,
}

/// One connection on the driver's side.
#[derive(Debug)]
struct Connection {
    pipe: Pipe,
    /// Whose it is, and who accepted it if it has moved.
    thread: usize,
    origin: Option<usize>,
    input: ByteQueue,
    reading_paused: bool,
    arrival_planned: bool,
    departure_planned: bool,
    delivery_planned: bool,
    close_planned: bool,
    /// The engine was told that it is gone.
    closed: bool,
    /// The client has left, or has read to the end.
    client_gone: bool,
    /// The engine wants to be told when the client has left.
    watched: bool,
    client_left: bool,
}

#[derive(Clone, Copy, Debug)]
enum Purpose {
    Read,
    Write,
    Sync,
}

#[derive(Clone, Copy, Debug)]
struct DeviceOperation {
    thread: usize,
    token: Token,
    purpose: Purpose,
    memory: MemoryRange,
}

/// What the driver did.
#[derive(Clone, Copy, Debug, Default)]
pub struct DriverCounts {
    /// Turns of the engine.
    pub turns: u64,
    /// Device writes started in this life.
    pub device_writes: u64,
    /// Things that happened.
    pub happenings: u64,
}

/// Drives one life of a process: one engine for each of its threads.
#[derive(Debug)]
pub struct Driver<E> {
    /// The disk of all.
    pub disk: Disk,
    /// What happened so far in this life.
    pub counts: DriverCounts,
    threads: Vec<Thread<E>>,
    post: Post,
    moves: u64,
    agenda: Agenda<Happening>,
    /// Whichever thread they belong to, each has a number of its own.
    connections: Vec<Option<Connection>>,
    operations: Vec<Option<DeviceOperation>>,
    /// Other nodes that the engine calls; nothing if it has none, so that every call fails at once.
    calls: Option<Vec<NodeId>>,
    random: Random,
}

impl<E: Engine<Memory = SimMemory>> Driver<E> {
    /// Takes charge of engines that have just been started, one for each thread.
    pub fn new(engines: Vec<E>, disk: Disk, now: Moment, plan: &MemoryPlan, random: Random) -> Driver<E> {
        let threads = engines.into_iter().map(|engine| Thread::new(engine, now, plan));
        let mut driver = Driver {
            threads: threads.collect(),
            disk,
            counts: DriverCounts::default(),
            post: Post::default(),
            moves: 0,
            agenda: Agenda::new(now),
            connections: Vec::new(),
            operations: Vec::new(),
            calls: None,
            random,
        };
        (0..driver.threads.len()).for_each(|thread| driver.plan_turn(thread));
        driver
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.agenda.now()
    }

    /// Asks to be told in `nanoseconds`.
    pub fn plan(&mut self, nanoseconds: u64, plan: Plan) {
        self.agenda.after_ns(nanoseconds, Happening::Planned(plan));
    }

    /// A client connects.
    pub fn connect(&mut self) -> ConnectionId {
        let thread = self.random.index(self.threads.len());
        let id = self.open_pipe(thread);
        let host = u128::from(self.random.below(4));
        let peer = if host == 0 { PeerAddress::Unix } else { PeerAddress::Internet(host.into()) };
        self.tell(thread, Event::Accepted { connection: id, peer });
        id
    }

    fn open_pipe(&mut self, thread: usize) -> ConnectionId {
        // A turn's events come in any order, so an id whose end is still to be told is not free.
        let asleep = self.threads.iter().flat_map(|thread| &thread.asleep).flat_map(|(_, events)| events);
        let inboxes = self.threads.iter().flat_map(|thread| &thread.inbox);
        let untold: Vec<ConnectionId> = inboxes.chain(asleep).filter_map(connection_of).collect();
        let told = |index: usize| untold.iter().all(|id| id.0 as usize != index);
        let free =
            (0..self.connections.len()).find(|index| self.connections[*index].is_none() && told(*index));
        let index = free.unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let id = ConnectionId(crate::to_u32(index));
        assert!(id.0 < CONNECTIONS_MAX, "the world opens too many connections");
        let cutting = *self.random.pick(&[Cutting::Whole, Cutting::Anywhere, Cutting::Crumbs]);
        self.connections[index] = Some(Connection {
            pipe: Pipe::new(id, cutting),
            thread,
            origin: None,
            input: ByteQueue::default(),
            reading_paused: false,
            arrival_planned: false,
            departure_planned: false,
            delivery_planned: false,
            close_planned: false,
            closed: false,
            client_gone: false,
            watched: false,
            client_left: false,
        });
        id
    }

    /// The client of a connection writes.
    pub fn client_writes(&mut self, id: ConnectionId, bytes: &[u8]) {
        self.connection(id).pipe.client_writes(bytes);
        self.plan_arrival(id);
    }

    /// The client of a connection leaves, without a word.
    pub fn client_leaves(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_mut().expect("an open connection");
        connection.pipe.client_leaves(&mut self.random);
        connection.client_gone = true;
        connection.client_left = true;
        self.tell_hang_up(id);
        self.plan_arrival(id);
        self.plan_departure(id);
        self.forget_if_gone(id);
    }

    /// The kernel knows at once that a client has closed its side, whatever of its bytes is still to be read: whoever is
    /// told in one turn of this and of another client that came later may be told in any order, but not in a later turn.
    fn tell_hang_up(&mut self, id: ConnectionId) {
        let open = self.connections[id.0 as usize].as_ref();
        if open
            .is_some_and(|open| open.watched && open.client_left && !open.closed && !open.pipe.is_closing())
        {
            let thread = self.connection(id).thread;
            self.tell(thread, Event::HungUp { connection: id });
        }
    }

    /// The client of a connection reads nothing for a while.
    pub fn pause_reading(&mut self, id: ConnectionId, nanoseconds: u64) {
        self.connection(id).reading_paused = true;
        self.agenda.after_ns(nanoseconds, Happening::ResumeReading(id));
    }

    /// What the client has read and not parsed.
    pub fn client_input(&mut self, id: ConnectionId) -> &mut ByteQueue {
        &mut self.connection(id).input
    }

    /// Did the server close, and has the client read everything?
    pub fn is_at_end_for_client(&mut self, id: ConnectionId) -> bool {
        self.connection(id).pipe.is_at_end_for_client()
    }

    /// Is nothing under way at the devices or on the connections?
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let unheard = self.threads.iter().any(|thread| !thread.ended && !thread.inbox.is_empty());
        !unheard && self.operations.iter().all(Option::is_none)
    }

    /// What the driver holds, for the message of a failure.
    #[must_use]
    pub fn describe(&self) -> String {
        let pipes: Vec<&Pipe> =
            self.connections.iter().flatten().map(|connection| &connection.pipe).collect();
        let operations = self.operations.iter().flatten().count();
        let buffers: Vec<_> = self
            .threads
            .iter()
            .map(|thread| (thread.buffers.lent_out_count(), thread.buffers.count(), thread.ended))
            .collect();
        format!(
            "receive buffers with the engines, in all, ended: {buffers:?}; device operations under way: {operations}\n{pipes:#?}"
        )
    }

    /// Asserts that the engine has returned what it borrowed, once it has no connections.
    pub fn assert_buffers_returned(&self) {
        if self.connections.iter().all(Option::is_none) {
            let lent = self.threads.iter().map(|thread| thread.buffers.lent_out_count()).sum::<usize>();
            assert_eq!(lent, 0, "receive buffers leak");
        }
    }

    /// Ends this life.
    pub fn dismantle(self) -> (Vec<SimMemory>, Disk, Moment, Vec<E>) {
        let mut engines: Vec<E> = self.threads.into_iter().map(|thread| thread.engine).collect();
        let memories = engines.iter_mut().map(|engine| std::mem::take(engine.memory())).collect();
        (memories, self.disk, self.agenda.now(), engines)
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) -> Notice {
        let Some(happening) = self.agenda.advance() else { return Notice::Dead };
        self.counts.happenings += 1;
        match happening {
            Happening::Turn(thread) => {
                return self.begin_turn(thread);
            }
            Happening::LateTurn(thread) => {
                let (now, events) = self.threads[thread].asleep.take().expect("a turn that sleeps");
                self.take_turn(thread, now, events);
                return Notice::Turn;
            }
            Happening::Timeout(thread) => {
                let now = self.now();
                self.threads[thread].timeout_planned = None;
                match self.threads[thread].engine.poll_timeout() {
                    Some(moment) if moment <= now => self.tell(thread, Event::Timeout),
                    Some(moment) => self.plan_timeout(thread, moment),
                    None => {}
                }
            }
            Happening::Drain(thread) => {
                self.threads[thread].draining = true;
                self.tell(thread, Event::Drain);
            }
            Happening::Mail(from, to) => self.receive_mail(from, to),
            Happening::Device(index) => self.finish_device_operation(index),
            Happening::Arrive(id) => self.arrive(id),
            Happening::Depart(id) => self.depart(id),
            Happening::Deliver(id) => return self.deliver(id),
            Happening::ResumeReading(id) => {
                if let Some(connection) = &mut self.connections[id.0 as usize] {
                    connection.reading_paused = false;
                    self.plan_delivery(id);
                }
            }
            Happening::Closed(id) => self.finish_close(id),
            Happening::Planned(plan) => return Notice::Planned(plan),
        }
        Notice::Nothing
    }

    fn connection(&mut self, id: ConnectionId) -> &mut Connection {
        self.connections[id.0 as usize].as_mut().expect("an open connection")
    }

    fn start_effect(&mut self, thread: usize, effect: Effect) {
        let now = self.now();
        match effect {
            Effect::DeviceRead { token, device, offset_bytes, memory } => {
                trace::note(
                    now,
                    "device read token, offset, length",
                    [token.0.into(), offset_bytes, memory.len.into()],
                );
                self.assert_device_range(device, offset_bytes, memory, 512);
                self.threads[thread].engine.memory().lend(memory, Lending::Exclusive);
                let started = self.disk.start_read(offset_bytes, memory.len as usize);
                self.note_operation(
                    started,
                    DeviceOperation { thread, token, purpose: Purpose::Read, memory },
                );
            }
            Effect::DeviceWrite { token, device, offset_bytes, memory, durable } => {
                trace::note(
                    now,
                    "device write token, offset, length",
                    [token.0.into(), offset_bytes, memory.len.into()],
                );
                self.assert_device_range(device, offset_bytes, memory, BLOCK_BYTES_U64);
                self.counts.device_writes += 1;
                self.threads[thread].engine.memory().lend(memory, Lending::Shared);
                let bytes = self.threads[thread].engine.memory().driver_bytes(memory);
                let started = self.disk.start_write(offset_bytes, bytes, durable);
                self.note_operation(
                    started,
                    DeviceOperation { thread, token, purpose: Purpose::Write, memory },
                );
            }
            Effect::DeviceSync { token, device } => {
                trace::note(now, "device sync token", [token.0.into(), 0, 0]);
                assert_eq!(device, DeviceIndex(0), "the world has one disk");
                let started = self.disk.start_sync();
                let memory = MemoryRange::default();
                self.note_operation(
                    started,
                    DeviceOperation { thread, token, purpose: Purpose::Sync, memory },
                );
            }
            Effect::Receive { connection } => self.start_receive(thread, connection, None),
            Effect::ReceiveExact { connection, memory } => {
                self.start_receive(thread, connection, Some(memory));
            }
            Effect::Tell { shard, message } => {
                trace::note(now, "tell: from, to", [thread as u64, shard.0.into(), 0]);
                self.post(thread, shard, Mail::Message(message));
            }
            Effect::HandOver { connection, to, moved } => self.hand_over(thread, connection, to, moved),
            Effect::WatchHangUp { connection } => {
                let watched = &mut self.open_connection(thread, connection).watched;
                assert!(!*watched, "a second watch on {connection:?}");
                *watched = true;
                self.tell_hang_up(connection);
            }
            Effect::Recycle { buffer } => self.recycle(thread, buffer),
            Effect::Send { connection } => self.start_send(thread, connection),
            Effect::Connect { node } => match &mut self.calls {
                Some(calls) => calls.push(node),
                None => self.tell(thread, Event::PeerUnreachable { node }),
            },
            Effect::Close { connection } => {
                trace::note(now, "close connection", [connection.0.into(), 0, 0]);
                self.open_connection(thread, connection).pipe.start_close();
                self.plan_arrival(connection);
                self.plan_departure(connection);
                self.plan_close(connection);
                self.plan_delivery(connection);
            }
        }
    }

    fn recycle(&mut self, thread: usize, buffer: ReceiveBuffer) {
        let state = &mut self.threads[thread];
        state.buffers.recycle(buffer, state.engine.memory());
        for index in 0..self.connections.len() {
            if self.connections[index].as_ref().is_some_and(|connection| connection.pipe.is_busy()) {
                self.plan_arrival(ConnectionId(crate::to_u32(index)));
            }
        }
    }

    fn assert_device_range(
        &self,
        device: DeviceIndex,
        offset_bytes: u64,
        memory: MemoryRange,
        alignment: u64,
    ) {
        assert_eq!(device, DeviceIndex(0), "the world has one disk");
        assert!(memory.len > 0, "an empty device operation");
        assert!(offset_bytes.is_multiple_of(BLOCK_BYTES_U64), "device offset {offset_bytes} is unaligned");
        assert!(
            u64::from(memory.len).is_multiple_of(BLOCK_BYTES_U64),
            "device length {} is unaligned",
            memory.len
        );
        assert!(u64::from(memory.start).is_multiple_of(alignment), "{memory:?} is unaligned");
        let end = offset_bytes.checked_add(memory.len.into());
        assert!(
            end.is_some_and(|end| end <= self.disk.len_bytes()),
            "{offset_bytes}+{} leaves the disk",
            memory.len
        );
    }

    fn note_operation(&mut self, (index, delay_ns): (OperationIndex, u64), operation: DeviceOperation) {
        let mut others = self.operations.iter().flatten();
        assert!(
            others.all(|other| (other.thread, other.token) != (operation.thread, operation.token)),
            "{:?} is under way twice",
            operation.token
        );
        if self.operations.len() <= index.0 {
            self.operations.resize(index.0 + 1, None);
        }
        assert!(self.operations[index.0].is_none(), "the disk reuses an operation under way");
        self.operations[index.0] = Some(operation);
        self.agenda.after_ns(delay_ns, Happening::Device(index));
    }

    fn finish_device_operation(&mut self, index: OperationIndex) {
        let operation = self.operations[index.0].take().expect("the operation is under way");
        let memory = self.threads[operation.thread].engine.memory();
        let result = match operation.purpose {
            Purpose::Read => {
                let result = self.disk.finish(index, memory.driver_bytes_mut(operation.memory));
                // A failed read may have transferred anything.
                let filled_bytes = if result.is_ok() { operation.memory.len } else { 0 };
                memory.take_back_filled(operation.memory, filled_bytes, &mut self.random);
                result
            }
            Purpose::Write => {
                memory.take_back(operation.memory, Lending::Shared);
                self.disk.finish(index, &mut [])
            }
            Purpose::Sync => self.disk.finish(index, &mut []),
        };
        self.tell(operation.thread, Event::DeviceDone { token: operation.token, result });
    }

    /// The connection of an effect: one that the engine has not been told is gone.
    fn open_connection(&mut self, thread: usize, id: ConnectionId) -> &mut Connection {
        let connection = self.connections.get_mut(id.0 as usize).and_then(Option::as_mut);
        let connection = connection.unwrap_or_else(|| panic!("{id:?} does not exist"));
        assert_eq!(connection.thread, thread, "{id:?} is another thread's");
        assert!(!connection.closed, "{id:?} is gone, and the engine was told so");
        connection
    }

    fn start_receive(&mut self, thread: usize, id: ConnectionId, exact: Option<MemoryRange>) {
        self.open_connection(thread, id);
        let connection = self.connections[id.0 as usize].as_mut().expect("checked above");
        connection.pipe.start_receive(exact, self.threads[thread].engine.memory());
        self.plan_arrival(id);
    }

    fn start_send(&mut self, thread: usize, id: ConnectionId) {
        self.open_connection(thread, id);
        let pieces = self.threads[thread].engine.send_pieces(id).to_vec();
        assert!(pieces.len() <= SEND_PIECES_MAX, "{} pieces in one send", pieces.len());
        let connection = self.connections[id.0 as usize].as_mut().expect("checked above");
        connection.pipe.start_send(&pieces, self.threads[thread].engine.memory());
        self.plan_departure(id);
    }

    fn arrive(&mut self, id: ConnectionId) {
        let Some(connection) = &mut self.connections[id.0 as usize] else { return };
        connection.arrival_planned = false;
        let thread = connection.thread;
        let Thread { engine, buffers, .. } = &mut self.threads[thread];
        match connection.pipe.arrive(engine.memory(), buffers, &mut self.random) {
            Progress::Blocked => {}
            Progress::Some => self.plan_arrival(id),
            Progress::Event(event) => self.tell(thread, event),
        }
        self.plan_close(id);
    }

    fn depart(&mut self, id: ConnectionId) {
        let Some(connection) = &mut self.connections[id.0 as usize] else { return };
        connection.departure_planned = false;
        let thread = connection.thread;
        match connection.pipe.depart(self.threads[thread].engine.memory(), &mut self.random) {
            Progress::Blocked => {}
            Progress::Some => self.plan_departure(id),
            Progress::Event(event) => self.tell(thread, event),
        }
        self.plan_delivery(id);
        self.plan_close(id);
    }

    fn deliver(&mut self, id: ConnectionId) -> Notice {
        let Some(connection) = &mut self.connections[id.0 as usize] else { return Notice::Nothing };
        connection.delivery_planned = false;
        if connection.reading_paused || connection.client_gone {
            return Notice::Nothing;
        }
        let more = connection.pipe.deliver(&mut connection.input, &mut self.random);
        if connection.pipe.is_at_end_for_client() {
            connection.client_gone = true;
        }
        if more {
            self.plan_delivery(id);
        }
        self.plan_departure(id);
        Notice::Readable(id)
    }

    /// The world has seen that the server closed and the client read to the end.
    pub fn forget(&mut self, id: ConnectionId) {
        self.connection(id).client_gone = true;
        self.forget_if_gone(id);
    }

    fn finish_close(&mut self, id: ConnectionId) {
        // The ends of its operations, which may wait for the same turn, come first.
        let thread = self.connection(id).thread;
        if self.threads[thread].inbox.iter().any(|event| connection_of(event) == Some(id)) {
            self.agenda.after_ns(1_000, Happening::Closed(id));
            return;
        }
        self.tell(thread, Event::Closed { connection: id });
        match self.connection(id).origin {
            // The place is free when the one who accepted has heard it, too.
            Some(origin) => {
                let origin = ShardIndex(u16::try_from(origin).expect("few threads"));
                self.post(thread, origin, Mail::Gone(id));
            }
            None => {
                self.connection(id).closed = true;
                self.forget_if_gone(id);
            }
        }
    }

    /// An id is free for the next connection once engine and client are both done with it.
    fn forget_if_gone(&mut self, id: ConnectionId) {
        let connection = self.connection(id);
        if connection.closed && connection.client_gone {
            self.connections[id.0 as usize] = None;
        }
    }

    fn network_delay_ns(&mut self) -> u64 {
        if self.random.percent(1) {
            self.random.range(0..=3_000_000)
        } else {
            self.random.range(500..=30_000)
        }
    }

    fn plan_arrival(&mut self, id: ConnectionId) {
        let delay = self.network_delay_ns();
        let connection = self.connection(id);
        if !std::mem::replace(&mut connection.arrival_planned, true) {
            self.agenda.after_ns(delay, Happening::Arrive(id));
        }
    }

    fn plan_departure(&mut self, id: ConnectionId) {
        let delay = self.network_delay_ns();
        let connection = self.connection(id);
        if !std::mem::replace(&mut connection.departure_planned, true) {
            self.agenda.after_ns(delay, Happening::Depart(id));
        }
    }

    fn plan_delivery(&mut self, id: ConnectionId) {
        let delay = self.network_delay_ns();
        let connection = self.connection(id);
        if !connection.client_gone && !std::mem::replace(&mut connection.delivery_planned, true) {
            self.agenda.after_ns(delay, Happening::Deliver(id));
        }
    }

    fn plan_close(&mut self, id: ConnectionId) {
        let delay = self.network_delay_ns();
        let connection = self.connection(id);
        if connection.pipe.is_closed() && !std::mem::replace(&mut connection.close_planned, true) {
            self.agenda.after_ns(delay, Happening::Closed(id));
        }
    }
}
