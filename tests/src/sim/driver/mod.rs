//! The simulator's driver of an [`Engine`]: the counterpart of the reactor, with the rules of
//! [`datapath::engine::ports`] as assertions.

mod events;
mod node;

use datapath::engine::ports::{ConnectionId, DeviceIndex, Effect, Engine, Event, PeerAddress, Token};
use datapath::limits::{CONNECTIONS_MAX, SEND_PIECES_MAX};
use datapath::record::NodeId;
use datapath::units::{BLOCK_BYTES_U64, MemoryRange, Moment};

use self::events::{connection_of, note_event};
use super::bytes::ByteQueue;
use super::clock::Agenda;
use super::disk::{Disk, OperationIndex};
use super::memory::{Lending, SimMemory};
use super::network::{Cutting, Pipe, Progress, ReceiveBuffers};
use super::random::Random;
use super::subject::MemoryPlan;
use super::trace;

/// Effects of one turn that no honest engine exceeds.
const EFFECTS_PER_TURN_MAX: u32 = 100_000;

#[derive(Clone, Copy, Debug)]
enum Happening {
    Turn,
    /// A turn whose clock was read long before.
    LateTurn,
    Timeout,
    Device(OperationIndex),
    Arrive(ConnectionId),
    Depart(ConnectionId),
    Deliver(ConnectionId),
    ResumeReading(ConnectionId),
    HangUp(ConnectionId),
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

/// Drives one life of an engine.
#[derive(Debug)]
pub struct Driver<E> {
    /// The engine.
    pub engine: E,
    /// Its disk.
    pub disk: Disk,
    /// What happened so far in this life.
    pub counts: DriverCounts,
    agenda: Agenda<Happening>,
    connections: Vec<Option<Connection>>,
    buffers: ReceiveBuffers,
    inbox: Vec<Event>,
    operations: Vec<Option<DeviceOperation>>,
    turn_planned: bool,
    timeout_planned: Option<Moment>,
    /// The engine is at work until then; what happens meanwhile waits for its next turn.
    busy_until: Moment,
    /// The next turn reads its clock and then sleeps for so many nanoseconds before it does anything.
    sleep_ns: u64,
    /// What the turn that sleeps has been told, and the clock that it read.
    asleep: Option<(Moment, Vec<Event>)>,
    /// Other nodes that the engine calls; nothing if it has none, so that every call fails at once.
    calls: Option<Vec<NodeId>>,
    random: Random,
}

impl<E: Engine<Memory = SimMemory>> Driver<E> {
    /// Takes charge of an engine that has just been started.
    pub fn new(mut engine: E, disk: Disk, now: Moment, plan: &MemoryPlan, random: Random) -> Driver<E> {
        let buffers = ReceiveBuffers::new(plan.receive_buffer, plan.receive_buffer_count, engine.memory());
        let mut driver = Driver {
            engine,
            disk,
            counts: DriverCounts::default(),
            agenda: Agenda::new(now),
            connections: Vec::new(),
            buffers,
            inbox: Vec::new(),
            operations: Vec::new(),
            turn_planned: false,
            timeout_planned: None,
            busy_until: now,
            sleep_ns: 0,
            asleep: None,
            calls: None,
            random,
        };
        driver.plan_turn();
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
        let id = self.open_pipe();
        let host = u128::from(self.random.below(4));
        let peer = if host == 0 { PeerAddress::Unix } else { PeerAddress::Internet(host.into()) };
        self.tell(Event::Accepted { connection: id, peer });
        id
    }

    fn open_pipe(&mut self) -> ConnectionId {
        // A turn's events come in any order, so an id whose end is still to be told is not free.
        let asleep = self.asleep.iter().flat_map(|(_, events)| events);
        let untold: Vec<ConnectionId> = self.inbox.iter().chain(asleep).filter_map(connection_of).collect();
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
        self.plan_hang_up(id);
        self.plan_arrival(id);
        self.plan_departure(id);
        self.forget_if_gone(id);
    }

    fn plan_hang_up(&mut self, id: ConnectionId) {
        if self.connections[id.0 as usize].as_ref().is_some_and(|open| open.watched && open.client_left) {
            let delay = self.random.range(1_000..=50_000);
            self.agenda.after_ns(delay, Happening::HangUp(id));
        }
    }

    fn hang_up(&mut self, id: ConnectionId) {
        let open = self.connections[id.0 as usize].as_ref();
        // It may have been closed meanwhile, and its place be another's.
        if open
            .is_some_and(|open| open.watched && open.client_left && !open.closed && !open.pipe.is_closing())
        {
            self.tell(Event::HungUp { connection: id });
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

    /// Tells the engine to stop.
    pub fn drain(&mut self) {
        self.tell(Event::Drain);
    }

    /// Is nothing under way at the devices or on the connections?
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.inbox.is_empty() && self.operations.iter().all(Option::is_none)
    }

    /// What the driver holds, for the message of a failure.
    #[must_use]
    pub fn describe(&self) -> String {
        let pipes: Vec<&Pipe> =
            self.connections.iter().flatten().map(|connection| &connection.pipe).collect();
        let operations = self.operations.iter().flatten().count();
        format!(
            "receive buffers with the engine: {} of {}; device operations under way: {operations}\n{pipes:#?}",
            self.buffers.lent_out_count(),
            self.buffers.count()
        )
    }

    /// Asserts that the engine has returned what it borrowed, once it has no connections.
    pub fn assert_buffers_returned(&self) {
        if self.connections.iter().all(Option::is_none) {
            assert_eq!(self.buffers.lent_out_count(), 0, "receive buffers leak");
        }
    }

    /// Ends this life.
    pub fn dismantle(mut self) -> (SimMemory, Disk, Moment, E) {
        let memory = std::mem::take(self.engine.memory());
        (memory, self.disk, self.agenda.now(), self.engine)
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) -> Notice {
        let Some(happening) = self.agenda.advance() else { return Notice::Dead };
        self.counts.happenings += 1;
        match happening {
            Happening::Turn => {
                return self.begin_turn();
            }
            Happening::LateTurn => {
                let (now, events) = self.asleep.take().expect("a turn that sleeps");
                self.take_turn(now, events);
                return Notice::Turn;
            }
            Happening::Timeout => {
                let now = self.now();
                self.timeout_planned = None;
                match self.engine.poll_timeout() {
                    Some(moment) if moment <= now => self.tell(Event::Timeout),
                    Some(moment) => self.plan_timeout(moment),
                    None => {}
                }
            }
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
            Happening::HangUp(id) => self.hang_up(id),
            Happening::Closed(id) => self.finish_close(id),
            Happening::Planned(plan) => return Notice::Planned(plan),
        }
        Notice::Nothing
    }

    fn connection(&mut self, id: ConnectionId) -> &mut Connection {
        self.connections[id.0 as usize].as_mut().expect("an open connection")
    }

    fn tell(&mut self, event: Event) {
        self.inbox.push(event);
        self.plan_turn();
    }

    fn plan_turn(&mut self) {
        if !self.turn_planned {
            self.turn_planned = true;
            let moment = self.busy_until.max(self.now());
            self.agenda.at(moment, Happening::Turn);
        }
    }

    fn begin_turn(&mut self) -> Notice {
        self.turn_planned = false;
        let now = self.now();
        if self.asleep.is_some() {
            return Notice::Nothing;
        }
        if self.busy_until > now {
            // It was planned before the thread was told to pause.
            self.plan_turn();
            return Notice::Nothing;
        }
        let events = std::mem::take(&mut self.inbox);
        let sleep_ns = std::mem::take(&mut self.sleep_ns);
        if sleep_ns > 0 {
            self.asleep = Some((now, events));
            self.agenda.after_ns(sleep_ns, Happening::LateTurn);
            return Notice::Nothing;
        }
        self.take_turn(now, events);
        Notice::Turn
    }

    /// `now` is what the engine's thread read on its clock after the last of these events.
    fn take_turn(&mut self, now: Moment, mut events: Vec<Event>) {
        self.counts.turns += 1;
        let unheard = !self.inbox.is_empty();
        if self.random.percent(50) {
            self.random.shuffle(&mut events);
        }
        for event in events.drain(..) {
            note_event(now, &event);
            self.engine.handle_event(now, event);
        }
        if !unheard {
            self.inbox = events;
        }
        self.engine.finish_turn(now);
        let mut effects = 0;
        while let Some(effect) = self.engine.poll_effect() {
            effects += 1;
            assert!(effects < EFFECTS_PER_TURN_MAX, "the engine never runs out of effects");
            self.start_effect(effect);
        }
        self.busy_until = self.now().after_ns(self.random.range(500..=20_000));
        if unheard {
            self.plan_turn();
        }
        if let Some(moment) = self.engine.poll_timeout() {
            self.plan_timeout(moment.max(self.busy_until));
        }
    }

    fn plan_timeout(&mut self, moment: Moment) {
        if self.timeout_planned.is_none_or(|planned| moment < planned) {
            self.timeout_planned = Some(moment);
            self.agenda.at(moment, Happening::Timeout);
        }
    }

    fn start_effect(&mut self, effect: Effect) {
        let now = self.now();
        match effect {
            Effect::DeviceRead { token, device, offset_bytes, memory } => {
                trace::note(
                    now,
                    "device read token, offset, length",
                    [token.0.into(), offset_bytes, memory.len.into()],
                );
                self.assert_device_range(device, offset_bytes, memory, 512);
                self.engine.memory().lend(memory, Lending::Exclusive);
                let started = self.disk.start_read(offset_bytes, memory.len as usize);
                self.note_operation(started, DeviceOperation { token, purpose: Purpose::Read, memory });
            }
            Effect::DeviceWrite { token, device, offset_bytes, memory, durable } => {
                trace::note(
                    now,
                    "device write token, offset, length",
                    [token.0.into(), offset_bytes, memory.len.into()],
                );
                self.assert_device_range(device, offset_bytes, memory, BLOCK_BYTES_U64);
                self.counts.device_writes += 1;
                self.engine.memory().lend(memory, Lending::Shared);
                let bytes = self.engine.memory().driver_bytes(memory);
                let started = self.disk.start_write(offset_bytes, bytes, durable);
                self.note_operation(started, DeviceOperation { token, purpose: Purpose::Write, memory });
            }
            Effect::DeviceSync { token, device } => {
                trace::note(now, "device sync token", [token.0.into(), 0, 0]);
                assert_eq!(device, DeviceIndex(0), "the world has one disk");
                let started = self.disk.start_sync();
                let memory = MemoryRange::default();
                self.note_operation(started, DeviceOperation { token, purpose: Purpose::Sync, memory });
            }
            Effect::Receive { connection } => self.start_receive(connection, None),
            Effect::ReceiveExact { connection, memory } => self.start_receive(connection, Some(memory)),
            Effect::WatchHangUp { connection } => {
                let watched = &mut self.open_connection(connection).watched;
                assert!(!*watched, "a second watch on {connection:?}");
                *watched = true;
                self.plan_hang_up(connection);
            }
            Effect::Recycle { buffer } => {
                self.buffers.recycle(buffer, self.engine.memory());
                for index in 0..self.connections.len() {
                    if self.connections[index].as_ref().is_some_and(|connection| connection.pipe.is_busy()) {
                        self.plan_arrival(ConnectionId(crate::to_u32(index)));
                    }
                }
            }
            Effect::Send { connection } => self.start_send(connection),
            Effect::Connect { node } => match &mut self.calls {
                Some(calls) => calls.push(node),
                None => self.tell(Event::PeerUnreachable { node }),
            },
            Effect::Close { connection } => {
                trace::note(now, "close connection", [connection.0.into(), 0, 0]);
                self.open_connection(connection).pipe.start_close();
                self.plan_arrival(connection);
                self.plan_departure(connection);
                self.plan_close(connection);
                self.plan_delivery(connection);
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
            others.all(|other| other.token != operation.token),
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
        let memory = self.engine.memory();
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
        self.tell(Event::DeviceDone { token: operation.token, result });
    }

    /// The connection of an effect: one that the engine has not been told is gone.
    fn open_connection(&mut self, id: ConnectionId) -> &mut Connection {
        let connection = self.connections.get_mut(id.0 as usize).and_then(Option::as_mut);
        let connection = connection.unwrap_or_else(|| panic!("{id:?} does not exist"));
        assert!(!connection.closed, "{id:?} is gone, and the engine was told so");
        connection
    }

    fn start_receive(&mut self, id: ConnectionId, exact: Option<MemoryRange>) {
        self.open_connection(id);
        let connection = self.connections[id.0 as usize].as_mut().expect("checked above");
        connection.pipe.start_receive(exact, self.engine.memory());
        self.plan_arrival(id);
    }

    fn start_send(&mut self, id: ConnectionId) {
        self.open_connection(id);
        let pieces = self.engine.send_pieces(id).to_vec();
        assert!(pieces.len() <= SEND_PIECES_MAX, "{} pieces in one send", pieces.len());
        let connection = self.connections[id.0 as usize].as_mut().expect("checked above");
        connection.pipe.start_send(&pieces, self.engine.memory());
        self.plan_departure(id);
    }

    fn arrive(&mut self, id: ConnectionId) {
        let Some(connection) = &mut self.connections[id.0 as usize] else { return };
        connection.arrival_planned = false;
        match connection.pipe.arrive(self.engine.memory(), &mut self.buffers, &mut self.random) {
            Progress::Blocked => {}
            Progress::Some => self.plan_arrival(id),
            Progress::Event(event) => self.tell(event),
        }
        self.plan_close(id);
    }

    fn depart(&mut self, id: ConnectionId) {
        let Some(connection) = &mut self.connections[id.0 as usize] else { return };
        connection.departure_planned = false;
        match connection.pipe.depart(self.engine.memory(), &mut self.random) {
            Progress::Blocked => {}
            Progress::Some => self.plan_departure(id),
            Progress::Event(event) => self.tell(event),
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
        if self.inbox.iter().any(|event| connection_of(event) == Some(id)) {
            self.agenda.after_ns(1_000, Happening::Closed(id));
            return;
        }
        self.connection(id).closed = true;
        self.tell(Event::Closed { connection: id });
        self.forget_if_gone(id);
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
