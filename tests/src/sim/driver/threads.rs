//! The threads of a process, each with an engine and memory of its own, and what they post to each other.
//!
//! A message takes a random time, so that those of different pairs overtake each other; of one pair none does.

use std::collections::VecDeque;

use datapath::engine::ports::{ConnectionId, Engine, Event};
use datapath::engine::shard::MovedConnection;
use datapath::engine::shard_message::{ShardIndex, ShardMessage};
use datapath::units::Moment;

use super::events::note_event;
use super::{Driver, Happening, Notice};
use crate::sim::memory::SimMemory;
use crate::sim::network::ReceiveBuffers;
use crate::sim::random::Random;
use crate::sim::subject::MemoryPlan;
use crate::sim::trace;

/// Effects of one turn that no honest engine exceeds.
const EFFECTS_PER_TURN_MAX: u32 = 100_000;

/// One thread.
#[derive(Debug)]
pub(super) struct Thread<E> {
    pub(super) engine: E,
    pub(super) buffers: ReceiveBuffers,
    pub(super) inbox: Vec<Event>,
    pub(super) turn_planned: bool,
    pub(super) timeout_planned: Option<Moment>,
    /// The engine is at work until then; what happens meanwhile waits for its next turn.
    pub(super) busy_until: Moment,
    /// The next turn reads its clock and then sleeps for so many nanoseconds before it does anything.
    pub(super) sleep_ns: u64,
    /// What the turn that sleeps has been told, and the clock that it read.
    pub(super) asleep: Option<(Moment, Vec<Event>)>,
    /// It was told to drain.
    pub(super) draining: bool,
    /// It has drained: nobody is there any more.
    pub(super) ended: bool,
}

/// What one thread posts to another.
#[derive(Debug)]
pub(super) enum Mail {
    Message(ShardMessage),
    Moved(ConnectionId, Box<MovedConnection>),
    /// A connection that was accepted there and moved is gone.
    Gone(ConnectionId),
}

/// What is on its way, by sender and receiver.
#[derive(Debug, Default)]
pub(super) struct Post(Vec<((usize, usize), VecDeque<Mail>)>);

impl Post {
    fn line(&mut self, from: usize, to: usize) -> &mut VecDeque<Mail> {
        let position = self.0.iter().position(|(pair, _)| *pair == (from, to));
        let position = position.unwrap_or_else(|| {
            self.0.push(((from, to), VecDeque::new()));
            self.0.len() - 1
        });
        &mut self.0[position].1
    }
}

impl<E: Engine<Memory = SimMemory>> Thread<E> {
    pub(super) fn new(mut engine: E, now: Moment, plan: &MemoryPlan) -> Thread<E> {
        let buffers = ReceiveBuffers::new(plan.receive_buffer, plan.receive_buffer_count, engine.memory());
        Thread {
            engine,
            buffers,
            inbox: Vec::new(),
            turn_planned: false,
            timeout_planned: None,
            busy_until: now,
            sleep_ns: 0,
            asleep: None,
            draining: false,
            ended: false,
        }
    }
}

impl<E: Engine<Memory = SimMemory>> Driver<E> {
    pub(super) fn tell(&mut self, thread: usize, event: Event) {
        if !self.threads[thread].ended {
            self.threads[thread].inbox.push(event);
            self.plan_turn(thread);
        }
    }

    pub(super) fn plan_turn(&mut self, thread: usize) {
        let now = self.now();
        let state = &mut self.threads[thread];
        if !std::mem::replace(&mut state.turn_planned, true) {
            let moment = state.busy_until.max(now);
            self.agenda.at(moment, Happening::Turn(thread));
        }
    }

    pub(super) fn begin_turn(&mut self, thread: usize) -> Notice {
        let now = self.now();
        let state = &mut self.threads[thread];
        state.turn_planned = false;
        if state.asleep.is_some() || state.ended {
            return Notice::Nothing;
        }
        if state.busy_until > now {
            // It was planned before the thread was told to pause.
            self.plan_turn(thread);
            return Notice::Nothing;
        }
        let events = std::mem::take(&mut state.inbox);
        let sleep_ns = std::mem::take(&mut state.sleep_ns);
        if sleep_ns > 0 {
            state.asleep = Some((now, events));
            self.agenda.after_ns(sleep_ns, Happening::LateTurn(thread));
            return Notice::Nothing;
        }
        self.take_turn(thread, now, events);
        Notice::Turn
    }

    /// `now` is what the engine's thread read on its clock after the last of these events.
    pub(super) fn take_turn(&mut self, thread: usize, now: Moment, mut events: Vec<Event>) {
        self.counts.turns += 1;
        let unheard = !self.threads[thread].inbox.is_empty();
        if self.random.percent(50) {
            shuffle(&mut events, &mut self.random);
        }
        let state = &mut self.threads[thread];
        for event in events.drain(..) {
            note_event(now, &event);
            state.engine.handle_event(now, event);
        }
        if !unheard {
            state.inbox = events;
        }
        state.engine.finish_turn(now);
        let mut effects = 0;
        while let Some(effect) = self.threads[thread].engine.poll_effect() {
            effects += 1;
            assert!(effects < EFFECTS_PER_TURN_MAX, "the engine never runs out of effects");
            self.start_effect(thread, effect);
        }
        let busy_until = self.now().after_ns(self.random.range(500..=20_000));
        let state = &mut self.threads[thread];
        state.busy_until = busy_until;
        if state.draining && state.engine.is_drained() {
            state.ended = true;
            return;
        }
        let timeout = state.engine.poll_timeout();
        if unheard {
            self.plan_turn(thread);
        }
        if let Some(moment) = timeout {
            self.plan_timeout(thread, moment.max(busy_until));
        }
    }

    pub(super) fn plan_timeout(&mut self, thread: usize, moment: Moment) {
        let planned = &mut self.threads[thread].timeout_planned;
        if planned.is_none_or(|planned| moment < planned) {
            *planned = Some(moment);
            self.agenda.at(moment, Happening::Timeout(thread));
        }
    }

    pub(super) fn post(&mut self, from: usize, to: ShardIndex, mail: Mail) {
        let to = usize::from(to.0);
        assert!(to != from && to < self.threads.len(), "thread {from} posts to thread {to}");
        self.post.line(from, to).push_back(mail);
        let delay = if self.random.percent(2) {
            self.random.range(0..=3_000_000)
        } else {
            self.random.skewed(500..=100_000)
        };
        self.agenda.after_ns(delay, Happening::Mail(from, to));
    }

    /// As many come as were posted: each time the oldest of the pair.
    pub(super) fn receive_mail(&mut self, from: usize, to: usize) {
        let mail = self.post.line(from, to).pop_front().expect("one for each that was posted");
        match mail {
            Mail::Message(message) => {
                let from = ShardIndex(u16::try_from(from).expect("few threads"));
                self.tell(to, Event::Told { from, message });
            }
            Mail::Moved(id, _) if self.threads[to].ended => {
                // The socket is closed with the message that nobody reads: nobody else is going to end it.
                let connection = self.connection(id);
                connection.pipe.start_close();
                connection.close_planned = true;
                self.post(to, ShardIndex(u16::try_from(from).expect("few threads")), Mail::Gone(id));
                self.plan_delivery(id);
            }
            Mail::Moved(id, moved) => self.tell(to, Event::Adopted { connection: id, moved }),
            Mail::Gone(id) => {
                self.connection(id).closed = true;
                self.tell(to, Event::Closed { connection: id });
                self.forget_if_gone(id);
            }
        }
    }

    /// Nothing but a watch is under way on a connection that is handed over.
    pub(super) fn hand_over(
        &mut self,
        from: usize,
        id: ConnectionId,
        to: ShardIndex,
        moved: Box<MovedConnection>,
    ) {
        trace::note(self.now(), "hand over connection, to", [id.0.into(), to.0.into(), 0]);
        let connection = self.open_connection(from, id);
        assert!(!connection.pipe.is_busy() && !connection.pipe.is_closing(), "{id:?} is moved amid its work");
        assert!(connection.origin.is_none(), "{id:?} is moved twice");
        connection.watched = false;
        (connection.thread, connection.origin) = (usize::from(to.0), Some(from));
        self.moves += 1;
        self.post(from, to, Mail::Moved(id, moved));
    }

    /// Tells all threads to stop, one after the other.
    pub fn drain(&mut self) {
        for thread in 0..self.threads.len() {
            let delay = if thread == 0 { 0 } else { self.random.skewed(1..=5_000_000) };
            self.agenda.after_ns(delay, Happening::Drain(thread));
        }
    }

    /// Have all threads drained?
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.threads.iter().all(|thread| thread.ended)
    }

    /// The engines, one for each thread.
    pub fn engines(&self) -> impl Iterator<Item = &E> {
        self.threads.iter().map(|thread| &thread.engine)
    }

    /// The engine of a process with one thread.
    #[must_use]
    pub fn engine(&self) -> &E {
        assert_eq!(self.threads.len(), 1, "there are several");
        &self.threads[0].engine
    }

    /// The same, to change it.
    pub fn engine_mut(&mut self) -> &mut E {
        assert_eq!(self.threads.len(), 1, "there are several");
        &mut self.threads[0].engine
    }

    /// Connections that were handed over.
    #[must_use]
    pub fn move_count(&self) -> u64 {
        self.moves
    }
}

/// Any order, but what other threads sent stays in the order in which it came.
fn shuffle(events: &mut Vec<Event>, random: &mut Random) {
    let is_mail = |event: &Event| matches!(event, Event::Told { .. } | Event::Adopted { .. });
    let (mail, mut others): (Vec<Event>, Vec<Event>) = events.drain(..).partition(is_mail);
    random.shuffle(&mut others);
    let mut mail = VecDeque::from(mail);
    while !mail.is_empty() || !others.is_empty() {
        let which = random.index(mail.len() + others.len());
        events.extend(if which < mail.len() { mail.pop_front() } else { others.pop() });
    }
}
