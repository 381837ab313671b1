//! Connections: from accept to close, and the bytes in between.

use super::Shard;
use super::fence::Fence;
use super::input::Input;
use super::moving::Move;
use super::neighbours::ExportPlace;
use super::payload::Payload;
use crate::engine::output::{Output, SEND_PAGES};
use crate::engine::ports::{ConnectionId, Effect, PeerAddress, ReceiveBuffer};
use crate::engine::shard_message::ShardMessage;
use crate::limits::{
    BYTES_PER_CONNECTION_MAX, CONNECTIONS_MAX, HANDSHAKE_DEADLINE_MS, HANDSHAKE_GRACE_MS,
    HANDSHAKES_PER_ADDRESS_MAX, HANDSHAKES_UNIX_MAX, REQUESTS_PER_CONNECTION_MAX, REQUESTS_PER_TURN_MAX,
    REQUESTS_PER_VOLUME_MAX,
};
use crate::memory::Memory;
use crate::request::ExportIndex;
use crate::session::nbd::{Session, SessionConfig, Step};
use crate::units::{MemoryRange, Moment};

/// How far a connection's end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Requests are read.
    Not,
    /// No more requests; what is under way is finished and its replies are sent.
    Finishing,
    /// The driver was told to close it.
    Closing,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) generation: u64,
    pub(super) peer: PeerAddress,
    pub(super) session: Session,
    /// The volume, once chosen.
    pub(super) export: Option<ExportIndex>,
    pub(super) input: Option<Input>,
    /// The payload of a write that is being received.
    pub(super) payload: Option<Payload>,
    receiving: bool,
    /// The driver was asked to tell when the client closes its side.
    pub(super) watched: bool,
    /// The driver told that the client has closed its side.
    pub(super) hung_up: bool,
    /// When this process took it in.
    pub(super) accepted_at: Moment,
    pub(super) fence: Fence,
    pub(super) has_spoken: bool,
    /// It is to go to another shard.
    pub(super) moving: Option<Move>,
    pub(super) output: Output,
    pub(super) ending: Ending,
    pub(super) requests_under_way: u32,
    /// Memory that its requests and their unsent replies hold.
    pub(super) bytes_under_way: u32,
    /// Tasks that wait in line for memory or their next turn.
    pub(super) tasks_waiting: u32,
    /// When the send under way began.
    send_began: Moment,
    /// Waits in line for a limit.
    pub(super) stalled: bool,
}

impl<M: Memory> Shard<M> {
    pub(super) fn accept(&mut self, id: ConnectionId, peer: PeerAddress) {
        assert!(self.connections[id.0 as usize].is_none(), "{id:?} is in use");
        self.make_room_for_handshake(peer);
        let elsewhere =
            u32::try_from(self.neighbours.connections_elsewhere.len()).expect("bounded by limits");
        if (self.connection_pages / SEND_PAGES + elsewhere) * 4 > CONNECTIONS_MAX * 3 {
            self.tell_all(ShardMessage::CloseAbandoned);
            self.close_all_abandoned();
        } else {
            self.close_abandoned();
        }
        let session = Session::new(SessionConfig { read_only: self.read_only });
        if self.draining || !self.open_connection(id, peer, session) {
            return self.refuse(id);
        }
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("just opened");
        let session = &connection.session;
        connection.output.append(|out| session.greeting(out));
        self.deadlines.push_back((self.now.after_ms(HANDSHAKE_DEADLINE_MS), id, self.generation));
        self.to_send.push(id);
        self.ready.push_back(id);
    }

    pub(super) fn refuse(&mut self, id: ConnectionId) {
        self.connections_refused += 1;
        self.effects.push_back(Effect::Close { connection: id });
    }

    /// Gives a new connection its place and memory to send from. False if there is none.
    pub(super) fn open_connection(&mut self, id: ConnectionId, peer: PeerAddress, session: Session) -> bool {
        let room = self.connection_pages + SEND_PAGES <= self.connection_pages_max;
        let memory = if room { self.pages.allocate(SEND_PAGES) } else { None };
        let Some(memory) = memory else { return false };
        self.connection_pages += SEND_PAGES;
        self.generation += 1;
        self.connections[id.0 as usize] = Some(Box::new(Connection {
            generation: self.generation,
            peer,
            session,
            export: None,
            input: None,
            payload: None,
            receiving: false,
            watched: false,
            hung_up: false,
            accepted_at: self.now,
            fence: Fence::Passed,
            has_spoken: false,
            moving: None,
            output: Output::new(memory),
            ending: Ending::Not,
            requests_under_way: 0,
            bytes_under_way: 0,
            tasks_waiting: 0,
            send_began: self.now,
            stalled: false,
        }));
        true
    }

    /// An address with too many handshakes loses its oldest one, and first one that has said nothing yet, but none that
    /// is new: whoever only opens connections cannot keep out a neighbour that speaks.
    fn make_room_for_handshake(&mut self, peer: PeerAddress) {
        let mut count = 0;
        let mut oldest: Option<(bool, u64, ConnectionId)> = None;
        for (index, connection) in (0..).zip(&self.connections) {
            let Some(connection) = connection else { continue };
            let talking = connection.ending != Ending::Closing && connection.export.is_none();
            if talking && connection.peer == peer {
                count += 1;
                if self.now.since_ns(connection.accepted_at) < HANDSHAKE_GRACE_MS * 1_000_000 {
                    continue;
                }
                let this = (connection.has_spoken, connection.generation, ConnectionId(index));
                oldest = Some(oldest.map_or(this, |oldest| oldest.min(this)));
            }
        }
        let allowed = match peer {
            PeerAddress::Internet(_) => HANDSHAKES_PER_ADDRESS_MAX,
            PeerAddress::Unix => HANDSHAKES_UNIX_MAX,
        };
        if let (Some((_, _, id)), true) = (oldest, count >= allowed) {
            self.connections_refused += 1;
            self.close(id);
        }
    }

    /// The client has closed its side. If there are bytes of it that wait for their turn, they wait on, until somebody else
    /// wants something: they may end in a proper goodbye.
    pub(super) fn hung_up(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections[id.0 as usize].as_deref_mut() {
            connection.hung_up = true;
            if let Some(export) = connection.export {
                self.served[export.0 as usize].somebody_left = true;
            }
        }
    }

    /// When connections run short, those go whose clients have gone: nobody would hear what becomes of their requests.
    pub(super) fn close_abandoned(&mut self) {
        if self.connection_pages * 4 > self.connection_pages_max.min(CONNECTIONS_MAX * SEND_PAGES) * 3 {
            self.close_all_abandoned();
        }
    }

    /// The same, if it is the process that runs short.
    pub(super) fn close_all_abandoned(&mut self) {
        for index in 0..CONNECTIONS_MAX {
            let id = ConnectionId(index);
            let abandoned = |connection: &mut Connection| connection.hung_up && !connection.receiving;
            if self.living(id).is_some_and(abandoned) {
                self.connections_abandoned += 1;
                self.close(id);
            }
        }
    }

    /// The connection, unless it is being closed.
    pub(super) fn living(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.connections[id.0 as usize]
            .as_deref_mut()
            .filter(|connection| connection.ending != Ending::Closing)
    }

    pub(super) fn received(&mut self, id: ConnectionId, memory: MemoryRange, buffer: ReceiveBuffer) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a receive under way");
        connection.receiving = false;
        connection.has_spoken = true;
        if connection.ending != Ending::Not {
            let closing = connection.ending == Ending::Closing;
            self.effects.push_back(Effect::Recycle { buffer });
            return if closing { self.drop_payload(id) } else { self.settle(id) };
        }
        assert!(connection.input.is_none(), "one receive at a time");
        connection.input = Some(Input::received(memory, buffer));
        self.pump(id);
    }

    pub(super) fn received_exact(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a receive under way");
        connection.receiving = false;
        if connection.ending == Ending::Closing {
            return self.drop_payload(id);
        }
        self.payload_arrived(id);
        self.pump(id);
    }

    pub(super) fn receive_ended(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a receive under way");
        connection.receiving = false;
        if connection.ending == Ending::Closing {
            return self.drop_payload(id);
        }
        self.close(id);
    }

    pub(super) fn sent(&mut self, id: ConnectionId, good: bool) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a send under way");
        for pages in connection.output.finish_send() {
            connection.bytes_under_way -= pages.len;
            self.pages.release(pages);
        }
        if !good {
            return self.close(id);
        }
        if connection.moving.is_some() {
            self.move_if_quiet(id);
        }
        self.to_send.push(id);
        self.settle(id);
    }

    /// The driver is done with the connection.
    pub(super) fn closed(&mut self, id: ConnectionId) {
        if self.neighbours.connections_elsewhere.remove(&id) {
            return;
        }
        let Some(connection) = self.connections[id.0 as usize].take() else { return };
        assert!(!connection.output.is_sending() && !connection.receiving, "{id:?} closed with buffers lent");
        if let Some(export) = connection.export {
            self.served[export.0 as usize].connections -= 1;
        }
        self.rejections.add(connection.session.rejections());
        self.connection_pages -= SEND_PAGES;
        self.pages.release(connection.output.send_memory());
    }

    /// Parses and starts requests until bytes, limits or the turn's share are used up.
    pub(super) fn pump(&mut self, id: ConnectionId) {
        let goes_on_soon = self.pump_on(id);
        if !goes_on_soon {
            self.rest(id);
        }
    }

    /// True if the connection goes on without waiting for anything, as soon as the others had their turn.
    fn pump_on(&mut self, id: ConnectionId) -> bool {
        let mut budget = REQUESTS_PER_TURN_MAX;
        loop {
            let (opened, draining) = (self.opened, self.draining);
            let Some(connection) = self.living(id) else { return false };
            if connection.ending != Ending::Not || connection.stalled || connection.moving.is_some() {
                return false;
            }
            if connection.payload.is_some() {
                // Somebody else has looked at it in this turn, and asked for the rest.
                if connection.receiving || !self.feed_payload(id) {
                    return false;
                }
                continue;
            }
            if draining {
                self.finish(id);
                return false;
            }
            let is_on_its_way = connection.fence != Fence::Passed;
            if let Some(export) = connection.export
                && (is_on_its_way || !(opened && self.is_led_here(export.0 as usize)))
            {
                return false;
            }
            if !self.may_take_request(id) {
                self.stall(id);
                return false;
            }
            if budget == 0 {
                self.ready.push_back(id);
                return true;
            }
            budget -= 1;
            if !self.parse(id) {
                return false;
            }
        }
    }

    /// One step of the session. False if it cannot go on now.
    fn parse(&mut self, id: ConnectionId) -> bool {
        if self.living(id).is_some_and(|connection| connection.export.is_none()) {
            self.refresh_refusals();
        }
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        let bytes = connection.input.as_ref().map_or(&[][..], |input| input.bytes(&self.memory));
        let (session, exports) = (&mut connection.session, &self.exports);
        let before = connection.output.is_empty();
        let (consumed, step) = connection.output.append(|out| session.advance(bytes, exports, out));
        if before && !connection.output.is_empty() {
            self.to_send.push(id);
        }
        self.consume(id, u32::try_from(consumed).expect("at most a buffer"));
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        match step {
            Step::NeedMore => {
                self.receive(id);
                false
            }
            Step::OutputFull => {
                self.stall(id);
                false
            }
            Step::Selected(export) => match self.export_places[export.0 as usize] {
                ExportPlace::At(shard) => {
                    self.begin_move(id, shard, export);
                    false
                }
                ExportPlace::Here(served) => {
                    connection.export = Some(ExportIndex(served));
                    self.served[served as usize].connections += 1;
                    self.begin_fence(id);
                    false
                }
            },
            Step::Request(request) => {
                self.begin_request(id, request);
                true
            }
            Step::Close(_) => {
                self.finish(id);
                false
            }
        }
    }

    pub(super) fn receive(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        if !connection.receiving {
            connection.receiving = true;
            self.effects.push_back(Effect::Receive { connection: id });
        }
    }

    pub(super) fn receive_exact(&mut self, id: ConnectionId, memory: MemoryRange) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        assert!(!connection.receiving);
        connection.receiving = true;
        self.effects.push_back(Effect::ReceiveExact { connection: id, memory });
    }

    /// May one more request of this connection be worked on?
    fn may_take_request(&self, id: ConnectionId) -> bool {
        let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
        let volume_has_room = connection
            .export
            .is_none_or(|export| self.served[export.0 as usize].requests_under_way < REQUESTS_PER_VOLUME_MAX);
        volume_has_room
            && connection.tasks_waiting == 0
            && connection.requests_under_way < REQUESTS_PER_CONNECTION_MAX
            && connection.bytes_under_way < BYTES_PER_CONNECTION_MAX
            && !connection.output.is_backlogged()
    }

    /// Looks at the connection again in the next turn in which anything happens.
    pub(super) fn stall(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        if !std::mem::replace(&mut connection.stalled, true) {
            self.stalled.push_back(id);
        }
    }

    /// No more requests: finish what is under way, send it, then close.
    pub(super) fn finish(&mut self, id: ConnectionId) {
        let Some(connection) = self.living(id) else { return };
        connection.ending = Ending::Finishing;
        self.drop_input(id);
        self.settle(id);
    }

    /// Closes a finishing connection that has nothing left to do.
    pub(super) fn settle(&mut self, id: ConnectionId) {
        let Some(connection) = self.living(id) else { return };
        let done = connection.requests_under_way == 0 && connection.output.is_empty();
        if connection.ending == Ending::Finishing && done {
            self.close(id);
        }
    }

    /// Closes at once. What was begun is finished, but nobody will be told.
    pub(super) fn close(&mut self, id: ConnectionId) {
        let Some(connection) = self.living(id) else { return };
        connection.ending = Ending::Closing;
        let dropped = connection.output.abandon();
        let freed: u32 = dropped.iter().map(|pages| pages.len).sum();
        connection.bytes_under_way -= freed;
        dropped.into_iter().for_each(|pages| self.pages.release(pages));
        self.drop_input(id);
        self.abandon_changes(id);
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("looked at above");
        if !connection.receiving {
            self.drop_payload(id);
        }
        self.effects.push_back(Effect::Close { connection: id });
    }

    pub(super) fn expire_handshakes(&mut self) {
        while let Some((moment, id, generation)) = self.deadlines.front().copied() {
            let connection = self.connections[id.0 as usize].as_deref();
            let waits = connection.is_some_and(|connection| {
                connection.generation == generation
                    && connection.export.is_none()
                    && connection.ending != Ending::Closing
            });
            if waits && moment > self.now {
                return;
            }
            self.deadlines.pop_front();
            if waits {
                self.handshakes_timed_out += 1;
                self.close(id);
            }
        }
    }

    pub(super) fn start_sends(&mut self) {
        while let Some(id) = self.to_send.pop() {
            if self.replication.is_link(id) {
                self.start_link_send(id);
                continue;
            }
            let Some(connection) = self.connections[id.0 as usize].as_deref_mut() else { continue };
            if connection.ending != Ending::Closing && connection.output.begin_send(&mut self.memory) {
                connection.send_began = self.now;
                self.effects.push_back(Effect::Send { connection: id });
            }
        }
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        for index in 0..self.connections.len() {
            let id = ConnectionId(u32::try_from(index).expect("bounded by limits"));
            let Some(connection) = self.living(id) else { continue };
            connection.session.begin_shutdown();
            if connection.payload.is_none() {
                self.finish(id);
            }
        }
    }
}

impl Connection {
    /// A connection that moves has asked for nothing yet.
    pub(super) fn assert_only_shaken_hands(&self, id: ConnectionId) {
        let untouched = self.requests_under_way == 0 && self.bytes_under_way == 0 && self.payload.is_none();
        assert!(untouched && !self.receiving && self.export.is_none(), "{id:?} is moved amid its work");
    }

    /// Since when its client has not taken what is sent, or not sent what it promised.
    pub(super) fn waits_for_client_since(&self) -> Option<Moment> {
        let sending = self.output.is_sending().then_some(self.send_began);
        let receiving = self.payload.as_ref().and_then(Payload::piece_began);
        sending.into_iter().chain(receiving).min()
    }

    /// Is memory of its requests coming back soon, because the driver is giving up what it does for it?
    pub(super) fn is_giving_back(&self) -> bool {
        self.ending == Ending::Closing && (self.output.is_sending() || self.receiving)
    }

    /// One line for failing tests.
    pub(super) fn describe(&self) -> String {
        format!(
            "connection: export {:?}, input {:?}, payload {:?}, receiving {}, sending {}, output empty {}, {:?}, \
             requests {}, bytes {}, waiting {}, stalled {}, waits for its client since {:?}",
            self.export,
            self.input,
            self.payload,
            self.receiving,
            self.output.is_sending(),
            self.output.is_empty(),
            self.ending,
            self.requests_under_way,
            self.bytes_under_way,
            self.tasks_waiting,
            self.stalled,
            self.waits_for_client_since(),
        )
    }
}
