//! A shard: the connections, requests and lanes of one thread.
//!
//! ```text
//!   bytes ─▶ session ─▶ request = task ─▶ pieces ─▶ lane ─▶ completion ─▶ reply ─▶ output ─▶ bytes
//! ```
//!
//! A task is one request of a client. It is worked on in pieces of at most 1 MiB, and every piece is known to its lane
//! by its number here. Tasks may outlive their connection: what was begun of a write is finished though nobody hears of it.

mod connection;
mod fence;
mod input;
mod lending;
mod moving;
mod neighbours;
mod payload;
mod read;
mod release;
mod replication;
mod share;
mod status;
mod task;
mod write;

use super::device_sync::Applicant;
use super::export_table::ExportTable;
use super::ports::{ConnectionId, DeviceError, DeviceIndex, Effect, Engine, Event, Token};
use super::region_locks::RegionLocks;
use super::report::{LaneReport, OperationReport, ShardReport};
use super::shard_message::{PoolIndex, ShardMessage};
use crate::limits::CONNECTIONS_MAX;
use crate::memory::{Memory, Pages};
use crate::record::Record;
use crate::replica::check::CheckReport;
use crate::session::nbd::Rejections;
use crate::store::lane::{Completion, Context, DiskEffect, DiskToken, Lane};
use crate::store::slab::Slab;
use crate::units::{MemoryRange, Moment};
use connection::Connection;
use lending::PoolPart;
pub use moving::MovedConnection;
use neighbours::{ExportPlace, Neighbours};
pub use neighbours::{ShardPart, ShardPool, shard_of_lane, split};
use replication::Replication;
pub use replication::{NodeConfig, ReplicaState};
use share::{Hunger, PAGES_KEPT};
use std::collections::VecDeque;
use task::{Piece, Task};

#[derive(Debug)]
struct ShardLane {
    lane: Lane,
    pool: usize,
    device: DeviceIndex,
    /// Pages of writes that it has, or will have when their payload is here.
    write_pages: u32,
    /// The pool's home, another shard, was asked for segments.
    asked_for_segments: bool,
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
    /// Counts connections that were closed amid their changes.
    deaths: u64,
    /// A client of a connection that is not closed has hung up.
    somebody_left: bool,
    /// When the youngest connection that is served, or was, had been accepted.
    newest_served: Option<Moment>,
}

impl Served {
    fn new(lane: usize, volume: u32) -> Served {
        Served {
            lane,
            volume,
            locks: RegionLocks::default(),
            requests_under_way: 0,
            connections: 0,
            replica: None,
            terms: 0,
            deaths: 0,
            somebody_left: false,
            newest_served: None,
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Shard<M> {
    now: Moment,
    memory: M,
    pages: Pages,
    lanes: Vec<ShardLane>,
    pools: Vec<PoolPart>,
    /// Emptied, kept for its capacity.
    synced: Vec<Applicant>,
    exports: ExportTable,
    /// Where each export is served, by its index.
    export_places: Vec<ExportPlace>,
    neighbours: Neighbours,
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
    /// Connections that have chosen a volume and are not served yet.
    arriving: Vec<ConnectionId>,
    /// Counts turns.
    turns: u64,
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
/// A planted bug looks at the clock so seldom.
const STALE_TURNS: u64 = 256;
/// Rounds of lanes and waiting requests in one turn, before the driver's events are looked at again.
const ROUNDS_PER_TURN_MAX: u32 = 4;

impl<M: Memory> Shard<M> {
    /// The only shard of its process, which serves all volumes of its lanes. `pages` is the part of the memory that is
    /// the engine's, without what the lanes took for themselves.
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
        let only = split(pools, 1).pop().expect("one part");
        Shard::of_part(memory, pages, only, read_only, node)
    }

    /// One of the shards of a process.
    ///
    /// # Panics
    /// If two volumes have one name, or a node is split.
    #[must_use]
    pub fn of_part(
        memory: M,
        pages: Pages,
        part: ShardPart,
        read_only: bool,
        node: Option<NodeConfig>,
    ) -> Shard<M> {
        assert!(node.is_none() || part.shards == 1, "what nodes tell each other is for one shard");
        let neighbours = Neighbours::new(&part);
        let (exports, export_places) = match node {
            None => part.exports(read_only),
            Some(_) => (ExportTable::default(), Vec::new()),
        };
        let (lanes, pools) = part.into_lanes();
        // A node serves the volumes whose records it has read.
        let own = lanes.iter().enumerate().filter(|_| node.is_none());
        let volumes = |(lane, shard_lane): (usize, &ShardLane)| {
            let count = u32::try_from(shard_lane.lane.volumes().len()).expect("volumes fit 32 bits");
            (0..count).map(move |volume| Served::new(lane, volume))
        };
        let served = own.flat_map(volumes).collect();
        assert!(
            lanes.len() < 255,
            "tokens have room for 255 lanes, one of which stands for the pools' syncs"
        );
        let connection_pages_max = pages.free_count() / CONNECTION_PAGES_SHARE;
        let replication = Replication::new(node, pages.free_count(), memory.len_bytes());
        let kept = connection_pages_max + replication.pages_kept() + PAGES_KEPT;
        let request_pages = pages.free_count().saturating_sub(kept);
        Shard {
            now: Moment::default(),
            memory,
            pages,
            lanes,
            pools,
            synced: Vec::new(),
            exports,
            export_places,
            neighbours,
            served,
            read_only,
            connections: (0..CONNECTIONS_MAX).map(|_| None).collect(),
            generation: 0,
            tasks: Slab::default(),
            pieces: Slab::default(),
            effects: VecDeque::new(),
            ready: VecDeque::new(),
            arriving: Vec::new(),
            turns: 0,
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
            self.pass_fences();
            self.resume();
            self.upkeep_replication();
            for lane in 0..self.lanes.len() {
                // The others may have ended: a lane that began something would wait for them in vain.
                if !self.neighbours.told_finished() {
                    self.upkeep_lane(lane);
                }
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
        match pool_of_sync(token) {
            Some(pool) => self.finish_sync(pool, result.is_ok()),
            None => self.finish_lane_operation(token, result.is_ok()),
        }
    }

    fn finish_lane_operation(&mut self, token: Token, good: bool) {
        let lane = lane_of_token(token);
        let token = DiskToken(token.0 & 0x00ff_ffff);
        self.with_lane(lane, |lane, context| lane.handle_disk(context, token, good));
        if !good && self.lanes[lane].lane.has_failed() {
            self.fail_pool(self.lanes[lane].pool, true);
        }
        self.take_completions(lane);
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
        let (device, pool) = (*device, *pool);
        let token = |token: DiskToken| {
            assert!(token.0 < 1 << 24, "more device operations than tokens");
            Token(u32::try_from(index).expect("few lanes") << 24 | token.0)
        };
        while let Some(effect) = lane.poll_effect() {
            let effect = match effect {
                DiskEffect::Sync { token: of } => {
                    let (applicant, token) = (self.neighbours.this(), token(of));
                    match &mut self.pools[pool].home {
                        Ok(home) => home.sync.request(Applicant { shard: applicant, token }),
                        Err(home) => self.effects.push_back(Effect::Tell {
                            shard: *home,
                            message: ShardMessage::SyncWanted { pool: pool_index(pool), token },
                        }),
                    }
                    continue;
                }
                DiskEffect::Read { token: of, place, memory } => Effect::DeviceRead {
                    token: token(of),
                    device,
                    offset_bytes: place.offset_bytes(),
                    memory,
                },
                DiskEffect::Write { token: of, place, memory } => Effect::DeviceWrite {
                    token: token(of),
                    device,
                    offset_bytes: place.offset_bytes(),
                    memory,
                    durable: false,
                },
            };
            self.effects.push_back(effect);
        }
    }

    fn upkeep_lane(&mut self, index: usize) {
        self.lend_segments(index);
        self.with_lane(index, Lane::upkeep);
        self.take_completions(index);
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

/// The upper eight bits of tokens of syncs, which are a pool's and no lane's.
const SYNC_TOKENS: u32 = 0xff << 24;

fn sync_token(pool: usize) -> Token {
    Token(SYNC_TOKENS | u32::from(pool_index(pool).0))
}

fn pool_of_sync(token: Token) -> Option<usize> {
    (token.0 & SYNC_TOKENS == SYNC_TOKENS).then_some((token.0 & !SYNC_TOKENS) as usize)
}

fn pool_index(pool: usize) -> PoolIndex {
    PoolIndex(u16::try_from(pool).expect("few pools"))
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
            Event::Told { from, message } => self.told(from, message),
            Event::Adopted { connection, moved } => self.adopt(connection, *moved),
            Event::PeerAccepted { connection } => self.link_accepted(connection),
            Event::PeerConnected { node, connection } => self.link_connected(node, connection),
            Event::PeerUnreachable { node } => self.link_unreachable(node),
            Event::Record(record) => self.handle_record(*record),
            Event::Deleted { volume, lineage } => self.handle_deletion(volume, lineage),
            Event::Tend { volume } => self.begin_tending(volume),
            Event::Verify { volume, verify } => self.begin_verify(volume, verify),
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
        self.upkeep_pools();
        for lane in 0..self.lanes.len() {
            self.take_effects(lane);
        }
        self.start_syncs();
        self.start_sends();
        self.finish_last();
        self.turns += 1;
        if self.turns.is_multiple_of(STALE_TURNS) {
            self.replication.stale_clock = now;
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn poll_proposal(&mut self) -> Option<Box<Record>> {
        self.replication.poll_proposal()
    }

    fn poll_check_report(&mut self) -> Option<CheckReport> {
        self.replication.poll_check_report()
    }

    fn poll_timeout(&self) -> Option<Moment> {
        let busy = !self.settled_turn
            || !self.ready.is_empty()
            || self.is_watching_somebody()
            || !self.neighbours.told_finished()
                && self.lanes.iter().any(|shard_lane| shard_lane.lane.wants_turn());
        if busy {
            return Some(self.now);
        }
        let handshake = self.deadlines.front().map(|(moment, ..)| *moment);
        let others = handshake.into_iter().chain(self.hunger.look_again_at());
        others.chain(self.replication.poll_timeout(!self.draining)).min()
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
        self.is_finished() && self.effects.is_empty() && self.others_need_nothing()
    }

    fn report(&self) -> ShardReport {
        let lane = |(position, shard_lane): (usize, &ShardLane)| {
            let (lane, segments) = (&shard_lane.lane, shard_lane.lane.segments());
            LaneReport {
                number: self.neighbours.lane_number(position),
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
            lanes: self.lanes.iter().enumerate().map(lane).collect(),
            rejections,
            connections_refused: self.connections_refused,
            connections_abandoned: self.connections_abandoned,
            handshakes_timed_out: self.handshakes_timed_out,
            repairs: self.replication.repairs,
            volumes_removed: self.volumes_removed(),
            removals_failed: self.replication.removals_failed,
            checks: self.replication.check_counters(),
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
