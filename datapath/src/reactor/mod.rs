//! Floor 4: drives an engine with one io_uring. The only floor with `unsafe` code.
//!
//! ```text
//!   reap ─▶ events ─▶ engine ─▶ effects ─▶ submissions ─▶ one io_uring_enter: submit, wait ─▶ reap …
//! ```
//!
//! - The kernel owns a buffer from submission to the last completion.
//! - The end comes in this order: stop accepting, drain, cancel, reap the last completion, close the ring, and
//!   only then free memory.
//! - The clock is read after the completion queue, so that no completion is judged by an earlier moment.
#![allow(unsafe_code, reason = "this floor talks to the kernel; each block says what must hold")]

pub mod affinity;
mod buffers;
mod clock;
mod connection;
mod device;
pub mod echo;
pub mod features;
mod inflight;
pub mod inherited;
mod listen;
pub mod mailbox;
mod memory;
pub mod pool_file;
mod ring;
mod siblings;

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use io_uring::{opcode, squeue};
use thiserror::Error;

use self::buffers::ReceiveBuffers;
use self::connection::Connection;
use self::device::{DeviceOperation, Transfer};
use self::features::Features;
use self::inflight::{Inflight, Ticket};
use self::listen::Listener;
use self::mailbox::{Inbox, Message};
use self::memory::Mapping;
pub use self::memory::{Arena, ArenaLayout};
pub use self::ring::RingError;
use self::ring::{Completion, Ring, Target, Wait};
use self::siblings::{POST_AGAIN_NS, Siblings};
use crate::engine::ports::{
    ConnectionId, DeviceIndex, Effect, Engine, Event, PeerAddress, ReceiveBuffer, Token,
};
use crate::limits::CONNECTIONS_MAX;
use crate::record::{NodeId, Record};
use crate::replica::check::CheckReport;
use crate::units::{MemoryRange, Moment};

/// Carried by submissions whose completions say nothing (cancellations, time limits).
const IGNORED: u64 = u64::MAX;
/// Slots beyond those of devices, connections and listeners: the mailbox.
const OTHER_SLOTS: u32 = 1;
/// How long the last completions may take when the reactor ends. A device that has not answered by then may
/// still write to memory, which is therefore never freed.
const LAST_COMPLETIONS_MS: u64 = 30_000;

/// Other threads of a node's process. Called by the reactor's: must not wait.
pub trait Outside: fmt::Debug + Send + Sync {
    /// Connects to a node; [`Message::PeerCalled`] tells the outcome.
    fn connect(&self, node: NodeId);
    /// Proposes a record to the record store; [`Message::Record`] tells what is there afterwards.
    fn propose(&self, record: Box<Record>);
    /// Takes note of how a pass over a volume's replicas stands.
    fn checked(&self, report: CheckReport);
}

/// What a reactor is started with.
#[derive(Debug)]
pub struct ReactorConfig {
    /// Sockets that listen; several reactors may share one.
    pub listeners: Vec<Arc<OwnedFd>>,
    /// Sockets on which other nodes come in.
    pub peer_listeners: Vec<Arc<OwnedFd>>,
    /// Whom a node's engine asks for what io_uring does not do.
    pub outside: Option<Arc<dyn Outside>>,
    /// The devices, in the order of [`DeviceIndex`]. Each is opened for reading and writing.
    pub devices: Vec<Arc<File>>,
    /// Connections at a time, at most `limits::CONNECTIONS_MAX`.
    pub connections_max: u32,
    /// Device operations with the kernel at a time; further ones wait in the engine.
    pub device_operations_max: u32,
    /// Submissions that are gathered before the kernel is called.
    pub submissions_max: u32,
    /// Features that may be used; see [`Features::allowed_by_environment`].
    pub features: Features,
}

impl Default for ReactorConfig {
    fn default() -> Self {
        ReactorConfig {
            listeners: Vec::new(),
            peer_listeners: Vec::new(),
            outside: None,
            devices: Vec::new(),
            connections_max: CONNECTIONS_MAX,
            device_operations_max: 1024,
            submissions_max: 512,
            features: Features::EVERY,
        }
    }
}

/// What a reactor counts. Never reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Turns of the loop.
    pub turns: u64,
    /// System calls of the loop: one per turn, and one more whenever the submission queue was full.
    pub enters: u64,
    /// Completions handled.
    pub completions: u64,
    /// Connections that the engine was told of.
    pub accepted: u64,
    /// Connections closed at once because there were too many.
    pub refused: u64,
    /// Connections that are gone.
    pub closed: u64,
    /// Failures to accept (no files, no memory).
    pub accept_failures: u64,
    /// Receives that had to wait because the engine held all buffers.
    pub buffer_shortages: u64,
    /// Sends that the kernel took in parts.
    pub short_sends: u64,
    /// Device transfers that were done in parts.
    pub short_transfers: u64,
    /// Device operations that failed.
    pub device_failures: u64,
    /// The error number of the last one that did.
    pub last_device_error: i32,
}

/// The answer to [`Message::Inspect`].
#[derive(Clone, Debug)]
pub struct Snapshot<R> {
    /// What the engine says.
    pub report: R,
    /// What the reactor counted.
    pub counters: Counters,
    /// Features in use.
    pub features: Features,
    /// Connections that are open.
    pub connections: u32,
    /// Memory for requests, lanes and receive buffers, all of it taken at the start.
    pub arena_bytes: u32,
}

/// Why a reactor could not start, or ended early.
#[derive(Debug, Error)]
pub enum ReactorError {
    /// No ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A step of the start failed.
    #[error("{step}: {source}")]
    Start {
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// io_uring_enter failed in a way that it should not.
    #[error("io_uring_enter: {0}")]
    Enter(#[source] io::Error),
    /// Operations were still with the kernel long after they were cancelled. Their memory is not freed.
    #[error("{0} operations did not end; a device may be stuck")]
    Stuck(usize),
}

/// What a slot of the in-flight table stands for.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Transfer(DeviceOperation),
    Sync { token: Token },
    Readable { connection: ConnectionId },
    HangUp { connection: ConnectionId },
    Receive { connection: ConnectionId },
    ReceiveChosen { connection: ConnectionId, buffer: ReceiveBuffer },
    ReceiveExact { connection: ConnectionId, memory: MemoryRange },
    Send { connection: ConnectionId },
    Linger { connection: ConnectionId, rounds: u32 },
    Accept { listener: usize },
    Wake,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    Draining,
    Ending,
}

#[derive(Debug)]
struct Device {
    /// Kept open as long as the ring knows it.
    _file: Arc<File>,
    target: Target,
}

/// One engine and one ring, to be run by one thread.
#[derive(Debug)]
pub struct Reactor<E: Engine<Memory = Arena>> {
    // The ring is first: fields are dropped in this order, and nothing below may go before it is closed.
    ring: Ring,
    engine: E,
    inbox: Inbox<E::Report>,
    /// Where the kernel puts the eventfd's count. Boxed: it stays in its place.
    wake_count: Box<u64>,
    inflight: Inflight<Operation>,
    buffers: ReceiveBuffers,
    waiting_for_buffer: VecDeque<ConnectionId>,
    connections: Vec<Connection>,
    free_connections: Vec<ConnectionId>,
    listeners: Vec<Listener>,
    accept_retry_at: Option<Moment>,
    devices: Vec<Device>,
    outside: Option<Arc<dyn Outside>>,
    completions: Vec<Completion>,
    /// Events that the engine has not seen yet.
    pending: VecDeque<Event>,
    /// Sends handed over with the next call of the kernel.
    sends_queued: u32,
    device_operations: u32,
    device_operations_max: u32,
    phase: Phase,
    now: Moment,
    counters: Counters,
    enter_error: Option<io::Error>,
    /// Accepted sockets for which there is no id yet, and until when they may wait.
    waiting_sockets: VecDeque<(Moment, OwnedFd, PeerAddress)>,
    siblings: Siblings<E::Report>,
    /// Threads that wait for the engine to take requests.
    tell_when_open: Vec<std::sync::mpsc::SyncSender<()>>,
    /// Last: see above.
    mapping: Arc<Mapping>,
}

fn at(step: &'static str) -> impl FnOnce(io::Error) -> ReactorError {
    move |source| ReactorError::Start { step, source }
}

impl<E: Engine<Memory = Arena>> Reactor<E> {
    /// Makes everything that the loop needs. May be called on another thread than [`Reactor::run`].
    ///
    /// # Errors
    /// If the kernel refuses io_uring or lacks what Linux 5.15 has.
    ///
    /// # Panics
    /// If the configuration exceeds `limits`.
    pub fn new(mut engine: E, config: ReactorConfig, inbox: Inbox<E::Report>) -> Result<Self, ReactorError> {
        assert!((1..=CONNECTIONS_MAX).contains(&config.connections_max));
        let mapping = engine.memory().mapping();
        let listeners = config.listeners.len() + config.peer_listeners.len();
        let listeners = u32::try_from(listeners).expect("few listeners");
        // A connection has at most one receive, one send and one watch with the kernel.
        let slots = config.device_operations_max + 3 * config.connections_max + listeners + OTHER_SLOTS;
        // Every slot may complete, and be cancelled, in one turn: the completion queue holds them all.
        let mut ring = Ring::new(config.submissions_max, (2 * slots).next_power_of_two(), config.features)?;
        let device_count = u32::try_from(config.devices.len()).expect("few devices");
        ring.register_file_table(device_count + config.connections_max);
        ring.register_memory(&mapping)?;
        let mut devices = Vec::with_capacity(config.devices.len());
        for (slot, file) in (0..).zip(config.devices) {
            let target = ring.register_file(slot, &*file).map_err(at("register a device"))?;
            devices.push(Device { _file: file, target });
        }
        let buffers = ReceiveBuffers::new(&mut ring, &mapping).map_err(at("receive buffers"))?;
        let for_clients = config.listeners.into_iter().map(|socket| (socket, false));
        let for_nodes = config.peer_listeners.into_iter().map(|socket| (socket, true));
        let listeners = for_clients.chain(for_nodes);
        let listeners = listeners.map(|(socket, for_nodes)| Listener { socket, accepting: None, for_nodes });
        Ok(Reactor {
            ring,
            engine,
            inbox,
            wake_count: Box::new(0),
            inflight: Inflight::new(slots),
            buffers,
            waiting_for_buffer: VecDeque::with_capacity(config.connections_max as usize),
            connections: (0..config.connections_max).map(|_| Connection::EMPTY).collect(),
            free_connections: (0..config.connections_max).rev().map(ConnectionId).collect(),
            listeners: listeners.collect(),
            accept_retry_at: None,
            devices,
            outside: config.outside,
            completions: Vec::with_capacity(2 * slots as usize),
            pending: VecDeque::with_capacity(4 * slots as usize),
            sends_queued: 0,
            device_operations: 0,
            device_operations_max: config.device_operations_max,
            phase: Phase::Running,
            now: clock::now(),
            counters: Counters::default(),
            enter_error: None,
            waiting_sockets: VecDeque::new(),
            siblings: Siblings::none(),
            tell_when_open: Vec::new(),
            mapping,
        })
    }

    /// The features in use. Which of them hold is final once the reactor runs.
    #[must_use]
    pub fn features(&self) -> Features {
        self.ring.features()
    }

    /// Runs on the calling thread until told to end, and gives the engine back: the kernel has no share in its
    /// memory any more.
    ///
    /// # Errors
    /// If the ring fails, or operations do not end. The memory they may still touch is leaked then.
    pub fn run(mut self) -> Result<E, ReactorError> {
        self.ring.enable()?;
        self.start_wake();
        self.start_accepting();
        while self.phase != Phase::Ending && self.enter_error.is_none() {
            self.turn();
        }
        self.end()
    }

    fn turn(&mut self) {
        self.counters.turns += 1;
        self.handle_completions();
        if self.engine.poll_timeout().is_some_and(|moment| moment <= self.now) {
            self.engine.handle_event(self.now, Event::Timeout);
        }
        if self.accept_retry_at.is_some_and(|moment| moment <= self.now) {
            self.start_accepting();
        }
        self.refuse_overdue();
        self.post_waiting();
        self.engine.finish_turn(self.now);
        if !self.tell_when_open.is_empty() && self.engine.is_open() {
            for answer in self.tell_when_open.drain(..) {
                // Who asked may have given up.
                let _ = answer.try_send(());
            }
        }
        self.start_effects();
        while let Some(record) = self.engine.poll_proposal() {
            self.outside.as_ref().expect("only nodes propose").propose(record);
        }
        while let Some(report) = self.engine.poll_check_report() {
            self.outside.as_ref().expect("only nodes check").checked(report);
        }
        let all_said = self.pending.is_empty() && !self.siblings.has_unposted();
        if self.phase == Phase::Draining && all_said && self.engine.is_drained() {
            self.phase = Phase::Ending;
        }
        if self.phase == Phase::Ending {
            return;
        }
        let wait = self.wait();
        let sends = std::mem::take(&mut self.sends_queued);
        if let Err(error) = self.ring.enter(wait, sends) {
            self.enter_error = Some(error);
        }
    }

    /// Reaps, reads the clock, and tells the engine what happened.
    fn handle_completions(&mut self) {
        self.ring.reap(&mut self.completions);
        self.now = clock::now();
        self.deliver();
        self.counters.completions += self.completions.len() as u64;
        for index in 0..self.completions.len() {
            self.complete(self.completions[index]);
            self.deliver();
        }
        self.completions.clear();
    }

    fn deliver(&mut self) {
        while let Some(event) = self.pending.pop_front() {
            self.engine.handle_event(self.now, event);
        }
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { user_data, result, flags } = completion;
        if user_data == IGNORED {
            return;
        }
        let ticket = Ticket::from_user_data(user_data);
        let more = io_uring::cqueue::more(flags);
        let operation = if more { *self.inflight.get_mut(ticket) } else { self.inflight.remove(ticket) };
        match operation {
            Operation::Transfer(operation) => self.complete_transfer(operation, result),
            Operation::Sync { token } => self.complete_sync(token, result),
            Operation::Readable { connection } => self.complete_readable(connection, result),
            Operation::HangUp { connection } => self.complete_hang_up(connection, result),
            Operation::Receive { connection } => self.complete_receive(connection, completion),
            Operation::ReceiveChosen { connection, buffer } => {
                self.finish_receive(connection, Some(buffer), result);
            }
            Operation::ReceiveExact { connection, memory } => {
                self.complete_receive_exact(connection, memory, result);
            }
            Operation::Send { connection } => self.complete_send(connection, result),
            Operation::Linger { connection, rounds } => self.complete_linger(connection, rounds, result),
            Operation::Accept { listener } => self.complete_accept(listener, result, more),
            Operation::Wake => self.complete_wake(result),
        }
    }

    /// Starts what the engine wants. With all device operations in use the rest stays with the engine until
    /// some have ended.
    fn start_effects(&mut self) {
        while self.device_operations < self.device_operations_max {
            let Some(effect) = self.engine.poll_effect() else { return };
            self.start(effect);
        }
    }

    fn start(&mut self, effect: Effect) {
        match effect {
            Effect::DeviceRead { token, device, offset_bytes, memory } => {
                self.start_device(token, device, Transfer::Read, offset_bytes, memory);
            }
            Effect::DeviceWrite { token, device, offset_bytes, memory, durable } => {
                let transfer = if durable { Transfer::WriteDurably } else { Transfer::Write };
                self.start_device(token, device, transfer, offset_bytes, memory);
            }
            Effect::DeviceSync { token, device } => self.start_sync(token, device),
            Effect::Receive { connection } => self.start_receive(connection),
            Effect::ReceiveExact { connection, memory } => self.start_receive_exact(connection, memory),
            Effect::WatchHangUp { connection } => self.watch_hang_up(connection),
            Effect::Recycle { buffer } => self.recycle(buffer),
            Effect::Send { connection } => self.start_send(connection),
            Effect::Connect { node } => {
                let outside = self.outside.as_ref().expect("only nodes call others");
                outside.connect(node);
            }
            Effect::Close { connection } => self.close_connection(connection),
            Effect::Tell { shard, message } => {
                self.post(shard, Message::Told { from: self.this(), message });
            }
            Effect::HandOver { connection, to, moved } => self.hand_over(connection, to, moved),
        }
    }

    fn start_device(
        &mut self,
        token: Token,
        device: DeviceIndex,
        transfer: Transfer,
        offset_bytes: u64,
        memory: MemoryRange,
    ) {
        self.device_operations += 1;
        self.start_transfer(DeviceOperation { token, device, transfer, offset_bytes, memory });
    }

    /// How long the kernel may let the thread sleep.
    fn wait(&self) -> Wait {
        if !self.pending.is_empty() {
            return Wait::No;
        }
        let overdue = self.waiting_sockets.front().map(|(until, ..)| *until);
        let moments = [self.engine.poll_timeout(), self.accept_retry_at, overdue];
        match moments.into_iter().flatten().min() {
            None if self.siblings.has_unposted() => Wait::AtMost(POST_AGAIN_NS),
            None => Wait::Forever,
            Some(moment) => match moment.since_ns(clock::now()) {
                0 => Wait::No,
                ns if self.siblings.has_unposted() => Wait::AtMost(ns.min(POST_AGAIN_NS)),
                ns => Wait::AtMost(ns),
            },
        }
    }

    fn is_accepting(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Takes a slot and queues the submission under its ticket.
    fn submit(&mut self, operation: Operation, entry: squeue::Entry) -> Ticket {
        let ticket = self.inflight.insert(operation);
        self.push(&entry.user_data(ticket.to_user_data()));
        ticket
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: entries point into the arena's mapping (in ranges that the contract of the ports gives to the
        // driver), into outboxes and the wake count (boxed, and reused only after the completion), or to a
        // static; all of these are kept until the last completion was reaped.
        if let Err(error) = unsafe { self.ring.push(entry) } {
            self.enter_error.get_or_insert(error);
        }
    }

    /// Asks the kernel to end an operation early. Its completion comes all the same.
    fn cancel(&mut self, ticket: Ticket) {
        self.push(&opcode::AsyncCancel::new(ticket.to_user_data()).build().user_data(IGNORED));
    }

    fn start_wake(&mut self) {
        let target = Target::plain(&self.inbox.wake_file());
        let len = u32::try_from(size_of::<u64>()).expect("eight");
        let entry = opcode::Read::new(target.fd(), (&raw mut *self.wake_count).cast(), len).build();
        self.submit(Operation::Wake, entry);
    }

    fn complete_wake(&mut self, result: i32) {
        if self.phase == Phase::Ending {
            return;
        }
        assert!(result == 8 || result == -libc::EINTR || result == -libc::EAGAIN, "eventfd: {result}");
        self.inbox.woken();
        while let Some(message) = self.inbox.take() {
            self.handle_message(message);
        }
        self.start_wake();
    }

    fn handle_message(&mut self, message: Message<E::Report>) {
        match message {
            Message::Drain if self.phase == Phase::Running => {
                self.phase = Phase::Draining;
                self.stop_accepting();
                self.pending.push_back(Event::Drain);
            }
            Message::Drain => {}
            Message::Abort => self.phase = Phase::Ending,
            Message::Adopt { socket, peer } if self.is_accepting() => self.admit(socket, peer),
            Message::Adopt { .. } => {}
            Message::PeerCalled { node, socket } => self.admit_called(node, socket),
            Message::Told { from, message } => self.pending.push_back(Event::Told { from, message }),
            Message::Moved(arrived) => self.adopt(*arrived),
            Message::Gone { connection } => self.connection_gone(connection),
            Message::Record(record) => self.pending.push_back(Event::Record(record)),
            Message::Deleted { volume, lineage } => {
                self.pending.push_back(Event::Deleted { volume, lineage });
            }
            Message::Tend { volume } => self.pending.push_back(Event::Tend { volume }),
            Message::Verify { volume, verify } => {
                self.pending.push_back(Event::Verify { volume, verify });
            }
            Message::TellWhenOpen(answer) => self.tell_when_open.push(answer),
            Message::Inspect(answer) => {
                // Who asked may have given up.
                let _ = answer.try_send(self.snapshot());
            }
        }
    }

    fn snapshot(&self) -> Snapshot<E::Report> {
        let open = self.connections.len() - self.free_connections.len();
        Snapshot {
            report: self.engine.report(),
            counters: Counters { enters: self.ring.enters, ..self.counters },
            features: self.ring.features(),
            connections: u32::try_from(open).expect("below CONNECTIONS_MAX"),
            arena_bytes: self.mapping.len_bytes(),
        }
    }

    /// Cancels what is left, reaps the last completion, closes the ring, and lets go of the memory.
    fn end(mut self) -> Result<E, ReactorError> {
        self.phase = Phase::Ending;
        let live: Vec<Ticket> = self.inflight.live().map(|(ticket, _)| ticket).collect();
        for ticket in live {
            self.cancel(ticket);
        }
        let deadline = clock::now().after_ms(LAST_COMPLETIONS_MS);
        while !self.inflight.is_empty() && self.enter_error.is_none() {
            let left_ns = deadline.since_ns(clock::now());
            if left_ns == 0 {
                break;
            }
            if let Err(error) = self.ring.enter(Wait::AtMost(left_ns), 0) {
                self.enter_error = Some(error);
            }
            self.ring.reap(&mut self.completions);
            for completion in self.completions.drain(..) {
                if completion.user_data != IGNORED && !io_uring::cqueue::more(completion.flags) {
                    self.inflight.remove(Ticket::from_user_data(completion.user_data));
                }
            }
        }
        let stuck = self.inflight.live().count();
        if stuck > 0 {
            // The kernel may still write there: these must outlive the process's interest in them.
            std::mem::forget((self.mapping, self.buffers, self.connections, self.wake_count));
        }
        match self.enter_error {
            Some(error) => Err(ReactorError::Enter(error)),
            None if stuck > 0 => Err(ReactorError::Stuck(stuck)),
            None => Ok(self.engine),
        }
    }
}
