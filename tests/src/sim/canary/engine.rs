//! The canary's engine: a queue of requests, of which the first one is being done.

use std::collections::{BTreeMap, VecDeque};

use datapath::engine::ports::{ConnectionId, DeviceIndex, Effect, Engine, Event, Token};
use datapath::memory::Memory;
use datapath::units::{BLOCK_BYTES_U64, MemoryRange, Moment};

use super::protocol::{CACHE, Command, DISC, FLUSH, Protocol, READ, STATUS, WRITE, ZEROES};
use super::{Bug, CONNECTIONS_MAX, PART_BYTES, Place, SEND_BYTES, SEND_START};
use crate::sim::memory::SimMemory;
use crate::{to_u32, to_usize};

const EIO: u32 = 5;
const FUA: u16 = 1;
/// Bytes of answers that may wait before the connection's next request is read.
const BACKLOG_BYTES_MAX: usize = 4 << 20;
const WORK: Token = Token(1);
const DRAIN_SYNC: Token = Token(2);
const START_SYNC: Token = Token(3);
const SECTOR_BYTES: usize = 512;

#[derive(Debug)]
struct Connection {
    protocol: Protocol,
    /// Tells it from an earlier one with the same number.
    generation: u64,
    receiving: bool,
    sending: Vec<MemoryRange>,
    ended: bool,
    leaving: bool,
    closing: bool,
    queued: usize,
}

#[derive(Debug)]
struct Job {
    connection: ConnectionId,
    generation: u64,
    volume: usize,
    command: Command,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Load,
    Store,
    Sync,
}

#[derive(Debug)]
struct Running {
    job: Job,
    step: Step,
    /// Bytes of the range that are done.
    done: u64,
    answer: Vec<u8>,
    answered: bool,
}

/// See the module's description.
#[derive(Debug)]
pub struct Canary {
    memory: SimMemory,
    places: Vec<Place>,
    durable_acks: bool,
    bug: Option<Bug>,
    connections: BTreeMap<u32, Connection>,
    queue: VecDeque<Job>,
    running: Option<Running>,
    effects: VecDeque<Effect>,
    generations: u64,
    answers: u64,
    failed: bool,
    draining: bool,
    /// What the last process left was made stable; before that nothing may be served.
    ready: bool,
    /// Something was written since the last sync.
    dirty: bool,
    drain_sync: bool,
    drained: bool,
    /// First sector of the last change: where it is on the disk, and what it held before.
    before: (u64, Vec<u8>),
}

impl Canary {
    pub(super) fn new(memory: SimMemory, places: Vec<Place>, durable_acks: bool, bug: Option<Bug>) -> Canary {
        Canary {
            memory,
            places,
            durable_acks,
            bug,
            connections: BTreeMap::new(),
            queue: VecDeque::new(),
            running: None,
            effects: VecDeque::from([Effect::DeviceSync { token: START_SYNC, device: DeviceIndex(0) }]),
            generations: 0,
            answers: 0,
            failed: false,
            draining: false,
            ready: false,
            dirty: false,
            drain_sync: false,
            drained: false,
            before: (0, Vec::new()),
        }
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// True for one of `count` calls, spread over the run.
    fn sometimes(&self, count: u64) -> bool {
        crate::sim::random::mix(self.answers).is_multiple_of(count)
    }

    fn take_input(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id.0) else { return };
        while !connection.leaving && !connection.ended {
            let Some(command) = connection.protocol.next(&self.places) else { break };
            if command.kind == DISC {
                connection.leaving = true;
                break;
            }
            connection.queued += 1;
            let (generation, volume) = (connection.generation, connection.protocol.volume);
            self.queue.push_back(Job { connection: id, generation, volume, command });
        }
    }

    /// Starts the next request if none is under way.
    fn work(&mut self) {
        while self.running.is_none() && self.ready && !self.drain_sync {
            let Some(job) = self.queue.pop_front() else { break };
            let step = match job.command.kind {
                FLUSH => Step::Sync,
                _ => Step::Load,
            };
            self.running = Some(Running { job, step, done: 0, answer: Vec::new(), answered: false });
            self.advance();
        }
        if self.ready
            && self.draining
            && self.running.is_none()
            && self.queue.is_empty()
            && !self.drained
            && !self.drain_sync
        {
            if self.dirty && !self.has(Bug::DrainWithoutSync) && !self.failed {
                self.drain_sync = true;
                self.effects.push_back(Effect::DeviceSync { token: DRAIN_SYNC, device: DeviceIndex(0) });
            } else {
                self.drained = true;
            }
        }
    }

    /// Takes the step that the running request is at.
    fn advance(&mut self) {
        let running = self.running.as_ref().expect("a request is under way");
        let (command, step) = (&running.job.command, running.step);
        let trivial =
            matches!(command.kind, CACHE | STATUS) || (command.length == 0 && command.kind != FLUSH);
        if command.error != 0 {
            return self.answer(command.error);
        }
        if trivial {
            return self.answer(0);
        }
        if self.failed || (self.has(Bug::FalseError) && self.sometimes(500)) {
            return self.answer(EIO);
        }
        match step {
            Step::Load => {
                let (offset_bytes, memory) = self.part();
                self.effects.push_back(Effect::DeviceRead {
                    token: WORK,
                    device: DeviceIndex(0),
                    offset_bytes,
                    memory,
                });
            }
            Step::Store => self.store(),
            Step::Sync if self.has(Bug::FlushWithoutSync) => self.answer(0),
            Step::Sync => self.effects.push_back(Effect::DeviceSync { token: WORK, device: DeviceIndex(0) }),
        }
    }

    fn store(&mut self) {
        let (offset_bytes, memory) = self.part();
        let running = self.running.as_ref().expect("a request is under way");
        let fua = running.job.command.flags & FUA != 0 && !self.has(Bug::FuaWithoutSync);
        let durable = fua || self.durable_acks;
        self.dirty |= !durable;
        self.effects.push_back(Effect::DeviceWrite {
            token: WORK,
            device: DeviceIndex(0),
            offset_bytes,
            memory,
            durable,
        });
    }

    /// The blocks of the part that is being done: first byte on the disk, and where they are in memory.
    fn part(&self) -> (u64, MemoryRange) {
        let (from, to) = self.part_bytes();
        let start = from & !(BLOCK_BYTES_U64 - 1);
        let end = to.next_multiple_of(BLOCK_BYTES_U64);
        (start, MemoryRange { start: 0, len: to_u32(to_usize(end - start)) })
    }

    /// The bytes of the part, as addresses on the disk.
    fn part_bytes(&self) -> (u64, u64) {
        let running = self.running.as_ref().expect("a request is under way");
        let command = &running.job.command;
        let from = self.places[running.job.volume].1 + command.offset + running.done;
        (from, from + (command.length - running.done).min(PART_BYTES.into()))
    }

    /// The range in memory that the client asked for.
    fn wanted(&self) -> MemoryRange {
        let ((from, to), (start, _)) = (self.part_bytes(), self.part());
        MemoryRange { start: to_u32(to_usize(from - start)), len: to_u32(to_usize(to - from)) }
    }

    fn finish_load(&mut self) {
        let wanted = self.wanted();
        let (from, to) = self.part_bytes();
        let running = self.running.as_mut().expect("a request is under way");
        if running.job.command.kind == READ {
            running.answer.extend_from_slice(self.memory.bytes(wanted));
            self.spoil_read(from);
            return self.finish_part(to - from);
        }
        let sector = wanted.part(0, to_u32(SECTOR_BYTES));
        self.before = (from, self.memory.bytes(sector).to_vec());
        let running = self.running.as_ref().expect("a request is under way");
        let (command, done) = (&running.job.command, to_usize(running.done));
        match command.kind {
            WRITE => {
                let payload = &command.payload[done..done + wanted.len as usize];
                self.memory.bytes_mut(wanted).copy_from_slice(payload);
                if self.has(Bug::LostNeighbour) && wanted.start >= 512 && self.sometimes(20) {
                    self.memory.bytes_mut(MemoryRange { start: wanted.start - 512, len: 512 }).fill(0);
                }
            }
            _ => {
                let short = self.has(Bug::ShortZeroes) && command.kind == ZEROES && wanted.len > 512;
                let len = if short { wanted.len - 512 } else { wanted.len };
                self.memory.bytes_mut(wanted.part(0, len)).fill(0);
            }
        }
        self.running.as_mut().expect("a request is under way").step = Step::Store;
        self.advance();
        if self.has(Bug::EarlyAck) {
            self.answer_early();
        }
    }

    fn spoil_read(&mut self, from: u64) {
        let (stale, torn) = (self.has(Bug::StaleRead), self.has(Bug::TornRead));
        if !(stale || torn) || !self.sometimes(7) {
            return;
        }
        let running = self.running.as_mut().expect("a request is under way");
        let answer = &mut running.answer;
        if torn && answer.len() >= 1024 {
            answer.copy_within(768..1024, 256);
        }
        let offset = self.before.0.checked_sub(from).map_or(usize::MAX, to_usize);
        if stale && offset < answer.len().saturating_sub(SECTOR_BYTES) {
            answer[offset..offset + SECTOR_BYTES].copy_from_slice(&self.before.1);
        }
    }

    fn finish_part(&mut self, bytes: u64) {
        let running = self.running.as_mut().expect("a request is under way");
        running.done += bytes;
        if running.done == running.job.command.length {
            return self.answer(0);
        }
        running.step = Step::Load;
        self.advance();
    }

    fn answer_early(&mut self) {
        let Some(running) = &mut self.running else { return };
        if running.done + u64::from(PART_BYTES) >= running.job.command.length && !running.answered {
            running.answered = true;
            let job = &running.job;
            let connection = self.connections.get_mut(&job.connection.0);
            if let Some(connection) = connection.filter(|connection| connection.generation == job.generation)
            {
                connection.protocol.reply(&job.command, 0, &[]);
            }
        }
    }

    /// The running request is over.
    fn answer(&mut self, error: u32) {
        let Running { job, answer, answered, .. } = self.running.take().expect("a request is under way");
        self.answers += 1;
        let (none, twice) = (self.has(Bug::NoAnswer), self.has(Bug::AnswerTwice));
        let (hole, odd) = (self.has(Bug::FalseHole), self.sometimes(300));
        let connection = self.connections.get_mut(&job.connection.0);
        let Some(connection) = connection.filter(|connection| connection.generation == job.generation) else {
            return;
        };
        connection.queued -= 1;
        if answered || (none && odd) {
            return;
        }
        let data = match job.command.kind {
            STATUS if job.command.length > 0 => {
                connection.protocol.status(job.command.length, if hole { 3 } else { 0 })
            }
            _ => answer,
        };
        connection.protocol.reply(&job.command, error, &data);
        if twice && odd {
            connection.protocol.reply(&job.command, error, &data);
        }
    }

    fn handle_device(&mut self, token: Token, failed: bool) {
        if token != WORK {
            self.failed |= failed;
            self.ready = true;
            self.drain_sync = false;
            self.dirty = false;
            return;
        }
        let running = self.running.as_ref().expect("a request is under way");
        let step = running.step;
        if failed {
            let hide = self.has(Bug::HideWriteError) && step == Step::Store;
            self.failed |= step != Step::Load && !hide;
            return self.answer(if hide { 0 } else { EIO });
        }
        match step {
            Step::Load => self.finish_load(),
            Step::Store => {
                let (from, to) = self.part_bytes();
                self.finish_part(to - from);
            }
            Step::Sync => self.answer(0),
        }
    }

    /// Asks for what each connection needs next.
    fn serve_connections(&mut self) {
        let close_one = self.has(Bug::FalseClose) && self.sometimes(1000);
        for (number, connection) in &mut self.connections {
            let id = ConnectionId(*number);
            if connection.closing {
                continue;
            }
            let over = connection.ended || (connection.leaving && connection.queued == 0);
            let idle =
                connection.sending.is_empty() && (connection.protocol.output.is_empty() || connection.ended);
            if (over && idle) || (close_one && connection.queued > 0) {
                connection.closing = true;
                self.effects.push_back(Effect::Close { connection: id });
                continue;
            }
            let output = &mut connection.protocol.output;
            let room = output.len() < BACKLOG_BYTES_MAX && connection.queued < 256;
            if !connection.receiving && !connection.ended && !connection.leaving && room {
                connection.receiving = true;
                self.effects.push_back(Effect::Receive { connection: id });
            }
            if connection.sending.is_empty() && !output.is_empty() && !connection.ended {
                let len = output.len().min(SEND_BYTES as usize);
                let range = MemoryRange { start: SEND_START + number * SEND_BYTES, len: to_u32(len) };
                self.memory.bytes_mut(range).copy_from_slice(&output.peek()[..len]);
                output.skip(len);
                // Several pieces, because drivers must cope with them.
                let head = range.len / 3;
                connection.sending.extend([range.part(0, head), range.part(head, range.len - head)]);
                connection.sending.retain(|piece| piece.len > 0);
                self.effects.push_back(Effect::Send { connection: id });
            }
        }
    }

    fn accept(&mut self, id: ConnectionId) {
        assert!(id.0 < CONNECTIONS_MAX, "the canary serves {CONNECTIONS_MAX} connections");
        self.generations += 1;
        let connection = Connection {
            protocol: Protocol::new(),
            generation: self.generations,
            receiving: false,
            sending: Vec::new(),
            ended: false,
            leaving: false,
            closing: false,
            queued: 0,
        };
        assert!(self.connections.insert(id.0, connection).is_none(), "{id:?} is accepted twice");
    }
}

impl Engine for Canary {
    type Memory = SimMemory;
    type Report = ();

    fn handle_event(&mut self, _now: Moment, event: Event) {
        match event {
            Event::Accepted { connection, .. } => self.accept(connection),
            Event::Received { connection, memory, buffer } => {
                let state = self.connections.get_mut(&connection.0).expect("known");
                state.receiving = false;
                state.protocol.input.push(self.memory.bytes(memory));
                if !self.has(Bug::KeepBuffers) {
                    self.effects.push_back(Effect::Recycle { buffer });
                }
                self.take_input(connection);
            }
            Event::ReceivedExact { .. } | Event::HungUp { .. } => {
                unreachable!("the canary never asks for that")
            }
            Event::ReceiveEnded { connection } => {
                let state = self.connections.get_mut(&connection.0).expect("known");
                (state.receiving, state.ended) = (false, true);
            }
            Event::Sent { connection } => {
                self.connections.get_mut(&connection.0).expect("known").sending.clear();
            }
            Event::SendFailed { connection } => {
                let state = self.connections.get_mut(&connection.0).expect("known");
                state.sending.clear();
                state.ended = true;
            }
            Event::Closed { connection } => {
                self.connections.remove(&connection.0).expect("known");
                self.forget_requests(connection);
            }
            Event::DeviceDone { token, result } => self.handle_device(token, result.is_err()),
            Event::Timeout => {}
            Event::Drain => self.draining = true,
            Event::PeerAccepted { .. }
            | Event::PeerConnected { .. }
            | Event::PeerUnreachable { .. }
            | Event::Record(_)
            | Event::Deleted { .. }
            | Event::Tend { .. }
            | Event::Verify { .. } => unreachable!("the canary has no peers"),
            Event::Told { .. } | Event::Adopted { .. } => unreachable!("the canary has one thread"),
        }
    }

    fn finish_turn(&mut self, _now: Moment) {
        self.work();
        self.serve_connections();
        if self.has(Bug::TouchLentBuffer) && self.sometimes(100) {
            self.memory.bytes_mut(MemoryRange { start: 0, len: 1 });
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn poll_timeout(&self) -> Option<Moment> {
        None
    }

    fn memory(&mut self) -> &mut SimMemory {
        &mut self.memory
    }

    fn send_pieces(&self, connection: ConnectionId) -> &[MemoryRange] {
        &self.connections[&connection.0].sending
    }

    fn report(&self) {}

    fn is_open(&self) -> bool {
        self.ready
    }

    fn is_drained(&self) -> bool {
        self.drained
    }
}

impl Canary {
    /// Requests of a connection that is gone are not started any more; the running one goes on.
    fn forget_requests(&mut self, id: ConnectionId) {
        self.queue.retain(|job| job.connection != id);
    }
}
