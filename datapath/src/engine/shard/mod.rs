//! A shard: the connections, requests and lanes of one thread.
//!
//! ```text
//!   bytes ─▶ session ─▶ request = task ─▶ pieces ─▶ lane ─▶ completion ─▶ reply ─▶ output ─▶ bytes
//! ```
//!
//! A task is one request of a client. It is worked on in pieces of at most 1 MiB, and every piece is known to its lane
//! by its number here. Tasks outlive their connection: a write that was taken is finished though nobody hears of it.

mod connection;
mod input;
mod payload;
mod read;
mod release;
mod replication;
mod share;
mod status;
mod task;
mod write;

use super::device_sync::DeviceSync;
use super::export_table::ExportTable;
use super::pool_space::PoolSpace;
use super::ports::{ConnectionId, DeviceError, DeviceIndex, Effect, Engine, Event, Token};
use super::region_locks::RegionLocks;
use super::report::{LaneReport, OperationReport, ShardReport};
use crate::limits::CONNECTIONS_MAX;
use crate::memory::{Memory, Pages};
use crate::record::Record;
use crate::session::nbd::Rejections;
use crate::store::lane::{Completion, Context, DiskEffect, DiskOutcome, DiskToken, Lane, PoolShare};
use crate::store::slab::Slab;
use crate::units::{BLOCK_BYTES_U64, MemoryRange, Moment};
use connection::Connection;
use replication::Replication;
pub use replication::{NodeConfig, ReplicaState};
use share::{Hunger, PAGES_KEPT};
use std::collections::VecDeque;
use task::{Piece, Task};

/// A pool as a shard takes it over.
#[derive(Debug)]
pub struct ShardPool {
    /// The driver's number for it.
    pub device: DeviceIndex,
    /// The lanes that this shard runs.
    pub lanes: Vec<Lane>,
    /// The segments that no lane owns.
    pub space: PoolSpace,
}

#[derive(Debug)]
struct ShardLane {
    lane: Lane,
    pool: usize,
    device: DeviceIndex,
    /// Pages of writes that it has, or will have when their payload is here.
    write_pages: u32,
}

#[derive(Debug)]
struct Served {
    lane: usize,
    /// Position of the volume in its lane.
    volume: u32,
    locks: RegionLocks,
    requests_under_way: u32,
    /// Clients that have chosen it.
    connections: u32,
    /// Its replica, if it is replicated.
    replica: Option<usize>,
    /// How often this node has ceased to lead it. What was asked of an earlier head is not done by a later one: what it
    /// had read of the volume may have been overwritten elsewhere meanwhile.
    terms: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Shard<M> {
    now: Moment,
    memory: M,
    pages: Pages,
    lanes: Vec<ShardLane>,
    spaces: Vec<PoolSpace>,
    /// Per pool.
    syncs: Vec<DeviceSync>,
    /// Emptied, kept for its capacity.
    synced: Vec<Token>,
    exports: ExportTable,
    served: Vec<Served>,
    read_only: bool,
    connections: Vec<Option<Box<Connection>>>,
    /// Counts connections, so that a task knows whether its own is still there.
    generation: u64,
    tasks: Slab<Task>,
    pieces: Slab<Piece>,
    effects: VecDeque<Effect>,
    /// Connections to look at again in this turn.
    ready: VecDeque<ConnectionId>,
    /// Connections that wait for a limit.
    stalled: VecDeque<ConnectionId>,
    /// Tasks that wait for memory, or for their next turn.
    waiting_tasks: VecDeque<u32>,
    /// Connections with something to send.
    to_send: Vec<ConnectionId>,
    /// Handshake deadlines, in order.
    deadlines: VecDeque<(Moment, ConnectionId, u64)>,
    draining: bool,
    /// The checkpoint that ends a drain has been asked for.
    last_checkpoint: bool,
    opened: bool,
    /// A request or piece has ended since this was last cleared: others may be able to go on.
    progress: bool,
    /// The last turn left nothing that could go on at once.
    settled_turn: bool,
    operations: [OperationReport; 6],
    rejections: Rejections,
    connections_refused: u64,
    connections_abandoned: u64,
    handshakes_timed_out: u64,
    /// Receive buffers kept by connections that cannot go on.
    buffers_kept: u32,
    /// Unparsed bytes of connections that cannot go on, in memory of their own.
    parked_bytes: u64,
    /// How often bytes were parked.
    inputs_parked: u64,
    /// Pages that connections send from, and how many that may be.
    connection_pages: u32,
    connection_pages_max: u32,
    /// What all requests together may hold.
    request_pages: u32,
    hunger: Hunger,
    replication: Replication,
    /// Pieces that no lane answers: they have ended.
    ended_pieces: VecDeque<Completion>,
}

/// One in so many pages is for connections: requests leave these alone, and connections take no more.
const CONNECTION_PAGES_SHARE: u32 = 4;
/// Rounds of lanes and waiting requests in one turn, before the driver's events are looked at again.
const ROUNDS_PER_TURN_MAX: u32 = 4;

impl<M: Memory> Shard<M> {
    /// A shard that serves all volumes of its lanes. `free` is the part of the memory that is the engine's; what
    /// the lanes took for themselves is already gone from `pages`.
    ///
    /// # Panics
    /// If two volumes have one name.
    #[must_use]
    pub fn new(
        memory: M,
        pages: Pages,
        pools: Vec<ShardPool>,
        read_only: bool,
        node: Option<NodeConfig>,
    ) -> Shard<M> {
        let (mut lanes, mut spaces) = (Vec::new(), Vec::new());
        let (mut exports, mut served) = (ExportTable::default(), Vec::new());
        for pool in pools {
            for lane in pool.lanes {
                // A node serves the volumes whose records it has read.
                let own = if node.is_none() { lane.volumes() } else { &[] };
                for (volume, known) in (0..).zip(own) {
                    exports.add(known.record.name.clone(), known.size_blocks() * BLOCK_BYTES_U64, read_only);
                    served.push(Served {
                        lane: lanes.len(),
                        volume,
                        locks: RegionLocks::default(),
                        requests_under_way: 0,
                        connections: 0,
                        replica: None,
                        terms: 0,
                    });
                }
                lanes.push(ShardLane { lane, pool: spaces.len(), device: pool.device, write_pages: 0 });
            }
            spaces.push(pool.space);
        }
        assert!(lanes.len() < 256, "tokens have room for 255 lanes");
        let syncs = spaces.iter().map(|_| DeviceSync::default()).collect();
        let connection_pages_max = pages.free_count() / CONNECTION_PAGES_SHARE;
        let replication = Replication::new(node, pages.free_count(), memory.len_bytes());
        let kept = connection_pages_max + replication.pages_kept() + PAGES_KEPT;
        let request_pages = pages.free_count().saturating_sub(kept);
        Shard {
            now: Moment::default(),
            memory,
            pages,
            lanes,
            spaces,
            syncs,
            synced: Vec::new(),
            exports,
            served,
            read_only,
            connections: (0..CONNECTIONS_MAX).map(|_| None).collect(),
            generation: 0,
            tasks: Slab::default(),
            pieces: Slab::default(),
            effects: VecDeque::new(),
            ready: VecDeque::new(),
            stalled: VecDeque::new(),
            waiting_tasks: VecDeque::new(),
            to_send: Vec::new(),
            deadlines: VecDeque::new(),
            draining: false,
            last_checkpoint: false,
            opened: false,
            progress: false,
            settled_turn: true,
            operations: Default::default(),
            rejections: Rejections::default(),
            connections_refused: 0,
            connections_abandoned: 0,
            handshakes_timed_out: 0,
            buffers_kept: 0,
            parked_bytes: 0,
            inputs_parked: 0,
            connection_pages: 0,
            connection_pages_max,
            request_pages,
            hunger: Hunger::default(),
            replication,
            ended_pieces: VecDeque::new(),
        }
    }

    /// The lanes, for checks.
    pub fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.iter().map(|shard_lane| &shard_lane.lane)
    }

    /// Calls `work` with a lane and the memory that it needs.
    fn with_lane<R>(&mut self, lane: usize, work: impl FnOnce(&mut Lane, &mut Context<'_, M>) -> R) -> R {
        let mut context = Context { memory: &mut self.memory, pages: &mut self.pages };
        work(&mut self.lanes[lane].lane, &mut context)
    }

    /// Gives lanes and waiting requests their turn, until there is nothing more that one does for the other. False
    /// if there may be: then the driver must come again at once.
    fn run_turn(&mut self) -> bool {
        for _ in 0..ROUNDS_PER_TURN_MAX {
            self.progress = false;
            self.open_when_ready();
            self.resume();
            self.upkeep_replication();
            for lane in 0..self.lanes.len() {
                self.upkeep_lane(lane);
            }
            while let Some(ended) = self.ended_pieces.pop_front() {
                self.finish_piece(&ended);
            }
            if !self.progress {
                return true;
            }
        }
        false
    }

    /// When the last request has ended, one more checkpoint makes everything safe.
    fn finish_drain(&mut self) {
        let done = self.tasks.is_empty() && self.connections.iter().all(Option::is_none);
        if self.draining && done && !self.replication_has_ended() {
            return;
        }
        if self.draining && done && !std::mem::replace(&mut self.last_checkpoint, true) {
            self.lanes.iter_mut().for_each(|shard_lane| shard_lane.lane.request_checkpoint());
            self.settled_turn = false;
        }
    }

    fn finish_device_operation(&mut self, token: Token, result: Result<(), DeviceError>) {
        let sync = &mut self.syncs[self.lanes[lane_of_token(token)].pool];
        let outcome = |done: DiskOutcome| if result.is_ok() { done } else { DiskOutcome::Failed };
        if !sync.is_running(token) {
            return self.finish_lane_operation(token, outcome(DiskOutcome::Done));
        }
        let mut served = std::mem::take(&mut self.synced);
        sync.finish(result.is_ok(), &mut served);
        for token in served.drain(..) {
            self.finish_lane_operation(token, outcome(DiskOutcome::Lasting));
        }
        self.synced = served;
    }

    fn finish_lane_operation(&mut self, token: Token, outcome: DiskOutcome) {
        let lane = lane_of_token(token);
        let token = DiskToken(token.0 & 0x00ff_ffff);
        self.with_lane(lane, |lane, context| lane.handle_disk(context, token, outcome));
        if outcome == DiskOutcome::Failed && self.lanes[lane].lane.has_failed() {
            self.fail_neighbours(lane);
        }
        self.take_completions(lane);
    }

    /// A failed sync is told to one caller only and may have dropped what another lane wrote, whose own next sync
    /// would then succeed: all lanes of the device stop writing.
    fn fail_neighbours(&mut self, failed: usize) {
        let device = self.lanes[failed].device;
        for lane in (0..self.lanes.len()).filter(|lane| *lane != failed) {
            if self.lanes[lane].device == device {
                self.with_lane(lane, Lane::fail);
                self.take_completions(lane);
            }
        }
    }

    fn take_completions(&mut self, lane: usize) {
        while let Some(completion) = self.lanes[lane].lane.poll_completion() {
            self.progress = true;
            if self.ask_another_replica(&completion) {
                continue;
            }
            if Shard::<M>::is_replication_cookie(completion.cookie) {
                self.finish_work(&completion);
            } else if !self.hold_read(&completion) {
                self.finish_piece(&completion);
            }
        }
        while let Some(fetched) = self.lanes[lane].lane.poll_fetched() {
            self.progress = true;
            self.finish_fetch(&fetched);
        }
        while let Some(changed) = self.lanes[lane].lane.poll_changed() {
            self.progress = true;
            self.finish_changed(changed);
        }
    }

    fn take_effects(&mut self, index: usize) {
        let ShardLane { lane, device, pool, .. } = &mut self.lanes[index];
        let (device, sync) = (*device, &mut self.syncs[*pool]);
        let token = |token: DiskToken| {
            assert!(token.0 < 1 << 24, "more device operations than tokens");
            Token(u32::try_from(index).expect("few lanes") << 24 | token.0)
        };
        while let Some(effect) = lane.poll_effect() {
            self.effects.push_back(match effect {
                DiskEffect::Sync { token: of } => {
                    sync.request(token(of));
                    continue;
                }
                DiskEffect::Read { token: of, place, memory } => Effect::DeviceRead {
                    token: token(of),
                    device,
                    offset_bytes: place.offset_bytes(),
                    memory,
                },
                DiskEffect::Write { token: of, place, memory, lasting } => Effect::DeviceWrite {
                    token: token(of),
                    device,
                    offset_bytes: place.offset_bytes(),
                    memory,
                    durable: lasting && sync.begin_lasting_write(token(of)),
                },
            });
        }
    }

    fn start_syncs(&mut self) {
        for sync in &mut self.syncs {
            if let Some(token) = sync.begin() {
                let device = self.lanes[lane_of_token(token)].device;
                self.effects.push_back(Effect::DeviceSync { token, device });
            }
        }
    }

    fn upkeep_lane(&mut self, index: usize) {
        self.lend_segments(index);
        self.with_lane(index, Lane::upkeep);
        self.take_completions(index);
    }

    fn lend_segments(&mut self, index: usize) {
        let pool = self.lanes[index].pool;
        let others =
            || self.lanes.iter().enumerate().filter(|(other, lane)| *other != index && lane.pool == pool);
        let needed_elsewhere = others().map(|(_, other)| other.lane.segments_needed()).sum();
        let others_are_hungry = others().any(|(_, other)| other.lane.is_hungry());
        let waits = self.lanes[index].lane.is_hungry();
        let others_may_give = waits && others().any(|(_, other)| other.lane.may_give());
        let (lane, space) = (&mut self.lanes[index].lane, &mut self.spaces[pool]);
        if others_are_hungry {
            while let Some(segment) = lane.spare_segment() {
                space.take_back(segment);
            }
        } else {
            for _ in 0..lane.segments_wanted() {
                let Some((segment, pristine)) = space.lend() else { break };
                lane.lend(segment, pristine);
            }
        }
        let (segments, free) = (space.segment_count(), space.free_count());
        lane.set_pool_share(PoolShare {
            segments,
            free,
            needed_elsewhere,
            others_are_hungry,
            others_may_give,
        });
    }

    /// Looks at connections and tasks that could not go on before.
    fn resume(&mut self) {
        for _ in 0..self.waiting_tasks.len() {
            let task = self.waiting_tasks.pop_front().expect("counted");
            self.end_wait(task);
            self.advance_task(task);
        }
        for _ in 0..self.stalled.len() {
            let connection = self.stalled.pop_front().expect("counted");
            if let Some(connection) = &mut self.connections[connection.0 as usize] {
                connection.stalled = false;
            }
            self.ready.push_back(connection);
        }
        for _ in 0..self.ready.len() {
            let connection = self.ready.pop_front().expect("counted");
            self.pump(connection);
        }
    }

    fn open_when_ready(&mut self) {
        if !self.opened && self.lanes.iter().all(|shard_lane| shard_lane.lane.is_open()) {
            self.opened = true;
            let waiting = (0..CONNECTIONS_MAX).map(ConnectionId);
            self.ready.extend(waiting.filter(|id| self.connections[id.0 as usize].is_some()));
        }
    }
}

/// Tokens of lanes carry the lane's position in their upper eight bits.
fn lane_of_token(token: Token) -> usize {
    (token.0 >> 24) as usize
}

impl<M: Memory> Engine for Shard<M> {
    type Memory = M;
    type Report = ShardReport;

    fn handle_event(&mut self, now: Moment, event: Event) {
        self.now = now;
        match event {
            Event::Accepted { connection, peer } => self.accept(connection, peer),
            Event::Received { connection, memory, buffer } if self.replication.is_link(connection) => {
                self.link_received(connection, memory, buffer);
            }
            Event::ReceivedExact { connection } if self.replication.is_link(connection) => {
                self.link_received_exact(connection);
            }
            Event::ReceiveEnded { connection } if self.replication.is_link(connection) => {
                self.link_receive_ended(connection);
            }
            Event::Sent { connection } if self.replication.is_link(connection) => {
                self.link_sent(connection, true);
            }
            Event::SendFailed { connection } if self.replication.is_link(connection) => {
                self.link_sent(connection, false);
            }
            Event::Closed { connection } if self.replication.is_link(connection) => {
                self.link_closed(connection);
            }
            Event::Received { connection, memory, buffer } => self.received(connection, memory, buffer),
            Event::ReceivedExact { connection } => self.received_exact(connection),
            Event::ReceiveEnded { connection } => self.receive_ended(connection),
            Event::HungUp { connection } => self.hung_up(connection),
            Event::Sent { connection } => self.sent(connection, true),
            Event::SendFailed { connection } => self.sent(connection, false),
            Event::Closed { connection } => self.closed(connection),
            Event::DeviceDone { token, result } => self.finish_device_operation(token, result),
            Event::PeerAccepted { connection } => self.link_accepted(connection),
            Event::PeerConnected { node, connection } => self.link_connected(node, connection),
            Event::PeerUnreachable { node } => self.link_unreachable(node),
            Event::Record(record) => self.handle_record(*record),
            Event::Timeout => {}
            Event::Drain => self.drain(),
        }
    }

    fn finish_turn(&mut self, now: Moment) {
        self.now = now;
        self.expire_handshakes();
        self.hunger.begin_turn();
        self.settled_turn = self.run_turn();
        self.relieve_hunger();
        self.finish_drain();
        for lane in 0..self.lanes.len() {
            self.take_effects(lane);
        }
        self.start_syncs();
        self.start_sends();
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn poll_proposal(&mut self) -> Option<Box<Record>> {
        self.replication.poll_proposal()
    }

    fn poll_timeout(&self) -> Option<Moment> {
        let busy = !self.settled_turn
            || !self.ready.is_empty()
            || self.lanes.iter().any(|shard_lane| shard_lane.lane.wants_turn());
        if busy {
            return Some(self.now);
        }
        let handshake = self.deadlines.front().map(|(moment, ..)| *moment);
        let others = handshake.into_iter().chain(self.hunger.look_again_at());
        others.chain(self.replication.poll_timeout()).min()
    }

    fn memory(&mut self) -> &mut M {
        &mut self.memory
    }

    fn send_pieces(&self, connection: ConnectionId) -> &[MemoryRange] {
        if self.replication.is_link(connection) {
            return self.link_pieces(connection);
        }
        let connection = self.connections[connection.0 as usize].as_ref().expect("a send under way");
        connection.output.pieces()
    }

    fn is_open(&self) -> bool {
        self.opened
    }

    fn is_drained(&self) -> bool {
        self.last_checkpoint
            && self
                .lanes
                .iter()
                .all(|shard_lane| shard_lane.lane.is_settled() || shard_lane.lane.has_failed())
    }

    fn report(&self) -> ShardReport {
        let lane = |shard_lane: &ShardLane| {
            let (lane, segments) = (&shard_lane.lane, shard_lane.lane.segments());
            LaneReport {
                counters: lane.counters(),
                leaves_resident: lane.map().resident_count(),
                leaves_dirty: lane.map().dirty_count(),
                leaf_misses: lane.map().misses,
                leaf_evictions: lane.map().evictions,
                segments_free: segments.free_count(),
                segments_owned: segments.owned_count(),
                live_blocks: segments.live_total(),
                capacity_blocks: lane.capacity_blocks(),
                failed: lane.has_failed(),
            }
        };
        let mut rejections = self.rejections;
        self.connections
            .iter()
            .flatten()
            .for_each(|connection| rejections.add(connection.session.rejections()));
        let count = |length: usize| u32::try_from(length).expect("bounded by limits");
        ShardReport {
            operations: self.operations.clone(),
            lanes: self.lanes.iter().map(lane).collect(),
            rejections,
            connections_refused: self.connections_refused,
            connections_abandoned: self.connections_abandoned,
            handshakes_timed_out: self.handshakes_timed_out,
            repairs: self.replication.repairs,
            connections_put_out: self.hunger.put_out,
            receive_buffers_kept: self.buffers_kept,
            parked_bytes: self.parked_bytes,
            inputs_parked: self.inputs_parked,
            connections: count(self.connections.iter().flatten().count()),
            peer_bytes_sent: self.replication.bytes_sent(),
            requests_under_way: count(self.tasks.len()),
            pages_free: self.pages.free_count(),
            pages: self.pages.count(),
        }
    }
}

impl<M: Memory> Shard<M> {
    /// What is under way and what it waits for, in a few lines: for failing tests.
    #[must_use]
    pub fn describe(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!(
            "pages free {} of {}, tasks {}, pieces {}, waiting tasks {:?}, ready {:?}, stalled {:?}\n",
            self.pages.free_count(),
            self.pages.count(),
            self.tasks.len(),
            self.pieces.len(),
            self.waiting_tasks,
            self.ready,
            self.stalled,
        );
        for connection in self.connections.iter().flatten() {
            let _ = writeln!(text, "{}", connection.describe());
        }
        for (index, task) in self.tasks.iter() {
            let _ = writeln!(text, "task {index}: {task:?}");
        }
        for (index, piece) in self.pieces.iter() {
            let _ = writeln!(text, "piece {index}: {piece:?}");
        }
        for shard_lane in &self.lanes {
            let _ = writeln!(text, "{}", shard_lane.lane.describe());
        }
        self.describe_replication(&mut text);
        text
    }
}
