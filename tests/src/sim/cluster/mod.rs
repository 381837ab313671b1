//! Several nodes in one world: real shards, joined by a network and a record store, with clients that move between them.
//!
//! ```text
//!   clients ─▶ node: driver of a shard, disk, clock ◀─ links ─▶ node ◀─ links ─▶ node
//!                        │ proposals    ▲ news                  kills, cuts of power, pauses, slow disks
//!                        └──▶ records ──┘                       lost connections, blocked ways
//! ```
//!
//! There is one order of events: the driver or the world's agenda goes next, whichever has the earliest moment. Nodes
//! know only their own clocks, which begin anywhere and run at their own pace.
//!
//! While faults come, whatever is answered must be right. When they end, every volume must be served again and show all
//! that was answered, and its replicas in sync must be equal.

mod checks;
mod clients;
mod disks;
mod faults;
mod links;
mod moves;
mod node;
mod records;
mod traffic;
mod verify;

use std::collections::{BTreeMap, BTreeSet};

use datapath::engine::ports::ConnectionId;
use datapath::limits::PIECE_BYTES_MAX;
use datapath::record::{NodeId, Record, VolumeNumber};
use datapath::replica::bugs::Bugs;
use datapath::units::{BLOCK_BYTES_U64, Moment};

use self::checks::Checks;
use self::clients::Session;
use self::faults::{Fault, Swarm};
use self::links::{Blocks, Link};
use self::moves::Moves;
use self::node::{Node, draw_nodes};
use self::records::Records;
use self::verify::Verifies;
use super::client::ClientCounts;
use super::clock::Agenda;
use super::doubts::Doubts;
use super::driver::Notice;
use super::oracle::{Crash, Oracle, Promises};
use super::random::Random;
use super::trace;

const MILLISECOND_NS: u64 = 1_000_000;
const SECOND_NS: u64 = 1_000 * MILLISECOND_NS;
/// Between two looks at whether anything is stuck.
const WATCH_NS: u64 = 250 * MILLISECOND_NS;
/// More happenings between two looks mean that an engine runs in circles.
const HAPPENINGS_PER_WATCH_MAX: u64 = 2_000_000;
/// Once faults end, everything is served, read and equal within this time.
const CALM_NS_MAX: u64 = 120 * SECOND_NS;

/// How a cluster's seeds are bent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterOptions {
    /// Mistakes planted in replication.
    pub bugs: Bugs,
    /// Clients of one volume choose nodes each for itself, so that heads fight.
    pub fights: bool,
    /// Nothing ever fails.
    pub peace: bool,
    /// In every seed a node has a disk that does more than lose power.
    pub disks: bool,
    /// The volumes do not fit into the pool of one node, or of all.
    pub full: bool,
    /// All that goes wrong is that heads are cut off, from few blocks that everybody uses.
    pub splits: bool,
    /// And that is because they stand still.
    pub stalls: bool,
    /// Blocks of one node rot, and nobody makes them good but the nodes themselves.
    pub rot: bool,
    /// Replicas are added and taken out all the time, on nodes that had one before, too.
    pub replacements: bool,
    /// Nothing happens but that volumes are attached here and there, and processes end as they should.
    pub moves: bool,
    /// Volumes are mostly attached to nodes that have no replica of them.
    pub elsewhere: bool,
}

const PLAIN: ClusterOptions = ClusterOptions {
    fights: false,
    peace: false,
    disks: false,
    full: false,
    splits: false,
    stalls: false,
    rot: false,
    replacements: false,
    moves: false,
    elsewhere: false,
    bugs: Bugs::none(),
};

/// Ways to bend clusters, by name.
const SCENARIOS: [(&str, ClusterOptions); 10] = [
    ("peace", ClusterOptions { peace: true, ..PLAIN }),
    // Writes, syncs and reads that fail, flipped bits, and disks that are empty all at once.
    ("disks", ClusterOptions { disks: true, ..PLAIN }),
    // Every block that rots is found and made good, while clients work.
    ("rot", ClusterOptions { rot: true, ..PLAIN }),
    // Pools that are smaller than what clients write.
    ("full", ClusterOptions { full: true, ..PLAIN }),
    // A head that is cut off goes on to read for as long as it may, and not longer.
    ("splits", ClusterOptions { splits: true, ..PLAIN }),
    // A head that stands still goes by what the clock shows when it wakes up.
    ("stalls", ClusterOptions { splits: true, stalls: true, ..PLAIN }),
    // A node that has no replica any more gets one again, and remembers the old one.
    ("replacements", ClusterOptions { replacements: true, ..PLAIN }),
    // What a head lets go of another one serves at once, and what that answers nobody misses.
    ("moves", ClusterOptions { moves: true, ..PLAIN }),
    // A head without a replica reads and fills from others, while everything goes wrong, and replicas come and go.
    ("elsewhere", ClusterOptions { elsewhere: true, ..PLAIN }),
    // Heads on all nodes take the volume from each other as fast as they can.
    ("fights", ClusterOptions { fights: true, ..PLAIN }),
];

/// The way of this name.
///
/// # Errors
/// The names there are.
pub fn find(name: &str) -> Result<ClusterOptions, String> {
    let found = SCENARIOS.into_iter().find(|(known, _)| *known == name);
    let names = SCENARIOS.map(|(known, _)| known).join(", ");
    found
        .map(|(_, options)| options)
        .ok_or_else(|| format!("no scenario {name:?} of clusters; there are: {names}"))
}

/// What a seed did.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClusterReport {
    /// What clients did.
    pub clients: ClientCounts,
    /// Epochs that began to serve.
    pub failovers: u64,
    /// Epochs that were opened.
    pub epochs: u64,
    /// Members that were left out of their volume.
    pub removals: u64,
    /// Replicas that came back.
    pub admissions: u64,
    /// Replicas that were added or taken out.
    pub replacements: u64,
    /// Volumes that lanes have taken out.
    pub departures: u64,
    /// Times a volume was attached to a node, or to none.
    pub attachments: u64,
    /// Epochs whose heads let go of them.
    pub releases: u64,
    /// Epochs that started on a node without a replica in sync.
    pub remote_heads: u64,
    /// Replicas that were to go and are in sync no more.
    pub left: u64,
    /// Moves that nothing hindered.
    pub timed_moves: u64,
    /// The slowest of them, from the change of the record to the new head.
    pub slowest_move_ns: u64,
    /// Changes that heads reported as committed.
    pub commits: u64,
    /// Parts of streams that one node received from another.
    pub messages: u64,
    /// Changes of records.
    pub record_changes: u64,
    /// Processes killed.
    pub kills: u64,
    /// Nodes that lost their power.
    pub power_cuts: u64,
    /// Times when the whole cluster was down.
    pub blackouts: u64,
    /// Links cut, ways blocked, store away.
    pub network_faults: u64,
    /// Pauses of nodes.
    pub pauses: u64,
    /// Errors that disks reported.
    pub disk_errors: u64,
    /// Writes that were refused for want of space.
    pub no_space: u64,
    /// Bits flipped.
    pub flipped_bits: u64,
    /// Starts that were refused because of that.
    pub refusals: u64,
    /// Disks that were replaced by empty ones.
    pub new_disks: u64,
    /// Comparisons of replicas, block for block.
    pub comparisons: u64,
    /// Passes over volumes that nodes made to their end.
    pub passes: u64,
    /// Blocks that these compared.
    pub compared_blocks: u64,
    /// Damaged blocks that these made good.
    pub repaired_blocks: u64,
    /// Turns of the engines.
    pub turns: u64,
    /// Virtual time.
    pub virtual_ns: u64,
    /// Two runs of a seed must have the same one.
    pub digest: u64,
}

impl ClusterReport {
    /// Adds another seed's numbers.
    pub fn add(&mut self, other: &ClusterReport) {
        self.clients.requests += other.clients.requests;
        self.clients.answers += other.clients.answers;
        self.clients.errors += other.clients.errors;
        self.clients.written_bytes += other.clients.written_bytes;
        self.clients.read_bytes += other.clients.read_bytes;
        self.failovers += other.failovers;
        self.epochs += other.epochs;
        self.removals += other.removals;
        self.admissions += other.admissions;
        self.replacements += other.replacements;
        self.departures += other.departures;
        self.attachments += other.attachments;
        self.releases += other.releases;
        self.remote_heads += other.remote_heads;
        self.left += other.left;
        self.timed_moves += other.timed_moves;
        self.slowest_move_ns = self.slowest_move_ns.max(other.slowest_move_ns);
        self.commits += other.commits;
        self.messages += other.messages;
        self.record_changes += other.record_changes;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.blackouts += other.blackouts;
        self.network_faults += other.network_faults;
        self.pauses += other.pauses;
        self.disk_errors += other.disk_errors;
        self.no_space += other.no_space;
        self.flipped_bits += other.flipped_bits;
        self.refusals += other.refusals;
        self.new_disks += other.new_disks;
        self.comparisons += other.comparisons;
        self.passes += other.passes;
        self.compared_blocks += other.compared_blocks;
        self.repaired_blocks += other.repaired_blocks;
        self.turns += other.turns;
        self.virtual_ns += other.virtual_ns;
        self.digest ^= other.digest;
    }
}

/// What is going to happen outside of nodes.
#[derive(Debug)]
enum Happening {
    CallArrives {
        caller: usize,
        boot: u64,
        called: usize,
    },
    CallFails {
        caller: usize,
        boot: u64,
        called: usize,
    },
    CallDone {
        link: u64,
    },
    Arrive {
        link: u64,
        from: usize,
    },
    EndBreaks {
        link: u64,
        side: usize,
    },
    Proposal {
        node: usize,
        boot: u64,
        record: Box<Record>,
    },
    News {
        node: usize,
        boot: u64,
        record: Box<Record>,
    },
    Think(usize),
    Fault(u64),
    Undo(Fault),
    HoldUp {
        volume: usize,
        node: usize,
        late_ns: u64,
    },
    Split {
        volume: usize,
        node: usize,
    },
    Start {
        node: usize,
        boots: u64,
    },
    /// A process that was told to end has had time enough for it.
    EndAnyway {
        node: usize,
        boot: u64,
    },
    Verify,
    Watch,
}

/// How far a seed is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Clients work and faults come.
    Working,
    /// Faults have ended; everything is read back.
    Calm,
    /// The same after a loss of power everywhere.
    CalmAgain,
    Done,
}

/// One volume, from outside.
#[derive(Debug)]
struct Volume {
    name: String,
    size_bytes: u64,
    oracle: Oracle,
    doubts: Doubts,
    /// Nodes whose records did not name them at some time: they may not know the volume yet, or any more.
    strangers: BTreeSet<usize>,
    /// Where clients go by themselves.
    home: usize,
    /// Until then nobody changes it.
    rests_until_ns: u64,
}

struct World {
    options: ClusterOptions,
    swarm: Swarm,
    now_ns: u64,
    agenda: Agenda<Happening>,
    nodes: Vec<Node>,
    links: BTreeMap<u64, Link>,
    links_made: u64,
    /// By node and connection: the link and the side of it.
    ends: BTreeMap<(usize, u32), (u64, usize)>,
    blocks: Blocks,
    records: Records,
    store_away: bool,
    volumes: Vec<Volume>,
    sessions: Vec<Session>,
    clients_made: u64,
    stage: Stage,
    calm_since_ns: u64,
    faults_left: u64,
    faults_made: u64,
    /// The next fault comes at so many answers, if not earlier.
    fault_at_answers: u64,
    answers: u64,
    happenings: u64,
    checks: Checks,
    verifies: Verifies,
    moves: Moves,
    random: Random,
    report: ClusterReport,
}

/// Runs one seed to its end.
///
/// # Panics
/// When a promise is broken. The thread's [`trace`] tells how it came to that.
#[must_use]
pub fn run_seed(seed: u64, options: ClusterOptions, verbose: bool) -> ClusterReport {
    trace::begin(seed, verbose);
    let mut world = World::new(seed, options);
    world.begin();
    while world.stage != Stage::Done {
        world.step();
    }
    world.finish()
}

fn id(node: usize) -> NodeId {
    NodeId(crate::to_u32(node))
}

fn index(node: NodeId) -> usize {
    node.0 as usize
}

fn number(volume: usize) -> VolumeNumber {
    VolumeNumber(crate::to_u32(volume + 1))
}

fn position(volume: VolumeNumber) -> usize {
    volume.0 as usize - 1
}

impl World {
    fn new(seed: u64, options: ClusterOptions) -> World {
        // Not the streams of the single node's world.
        let random = Random::new(seed).fork("cluster", 0);
        let mut draw = random.fork("setup", 0);
        let swarm = Swarm::draw(&mut random.fork("swarm", 0), options);
        let nodes = draw_nodes(&mut draw, &random, options, &swarm);
        let (mut volumes, mut records) = (Vec::new(), Vec::new());
        for volume in 0..crate::to_usize(draw.range(1..=2)) {
            let size_blocks = match options {
                ClusterOptions { splits: true, .. } | ClusterOptions { moves: true, .. } => {
                    draw.range(16..=24)
                }
                ClusterOptions { full: true, .. } => draw.range(3_000..=6_000),
                _ => draw.skewed(16..=400),
            };
            let mut replicas: Vec<NodeId> = (0..nodes.len()).map(id).collect();
            draw.shuffle(&mut replicas);
            let most = (replicas.len() - usize::from(options.elsewhere)).min(3);
            let three = most > 2 && draw.percent(if options.replacements { 30 } else { 70 });
            replicas.truncate(if three { 3 } else { 2 });
            let name = format!("volume-{volume}");
            let mut record = Record::new(number(volume), &name, [9; 16], size_blocks, &replicas);
            record.min_in_sync = if draw.percent(50) { 1 } else { 2 };
            let promises = Promises { durable_acks: true, atomic_window_bytes: u64::from(PIECE_BYTES_MAX) };
            let size_bytes = size_blocks * BLOCK_BYTES_U64;
            let oracle = Oracle::new(crate::to_u32(volume), size_bytes, promises);
            let (doubts, home) = (Doubts::default(), index(replicas[0]));
            let strangers = (0..nodes.len()).filter(|node| !record.has_replica(id(*node))).collect();
            volumes.push(Volume { name, size_bytes, oracle, doubts, strangers, home, rests_until_ns: 0 });
            records.push(record);
        }
        World {
            options,
            now_ns: SECOND_NS,
            agenda: Agenda::new(Moment(SECOND_NS)),
            blocks: Blocks::new(nodes.len()),
            checks: Checks::new(nodes.len(), volumes.len()),
            verifies: Verifies::new(nodes.len(), volumes.len(), random.fork("verifies", 0)),
            moves: Moves::new(volumes.len()),
            nodes,
            links: BTreeMap::new(),
            links_made: 0,
            ends: BTreeMap::new(),
            records: Records::new(records),
            store_away: false,
            volumes,
            sessions: Vec::new(),
            clients_made: 0,
            stage: Stage::Working,
            calm_since_ns: 0,
            faults_left: swarm.faults,
            faults_made: 0,
            fault_at_answers: 0,
            answers: 0,
            happenings: 0,
            swarm,
            random,
            report: ClusterReport::default(),
        }
    }

    fn begin(&mut self) {
        for node in 0..self.nodes.len() {
            self.start(node);
        }
        self.add_workers();
        self.plan_fault();
        self.plan_verify();
        self.after(WATCH_NS, Happening::Watch);
    }

    fn after(&mut self, nanoseconds: u64, happening: Happening) {
        self.agenda.at(Moment(self.now_ns + nanoseconds), happening);
    }

    /// Lets the next thing happen, wherever that is.
    fn step(&mut self) {
        self.happenings += 1;
        let nodes = self.nodes.iter().enumerate();
        let next = nodes.filter_map(|(node, state)| Some((state.next_ns()?, node))).min();
        let outside = self.agenda.next_moment().expect("the next watch").0;
        match next {
            Some((at_ns, node)) if at_ns <= outside => {
                self.now_ns = self.now_ns.max(at_ns);
                let life = self.nodes[node].life.as_mut().expect("it has something to do");
                trace::set_place(Some(node));
                let notice = life.driver.step();
                trace::set_place(None);
                self.heed(node, notice);
            }
            _ => {
                let happening = self.agenda.advance().expect("looked at");
                self.now_ns = self.now_ns.max(self.agenda.now().0);
                self.happen(happening);
            }
        }
    }

    fn heed(&mut self, node: usize, notice: Notice) {
        match notice {
            Notice::Nothing => {}
            Notice::Turn => self.after_turn(node),
            Notice::Readable(connection) => self.readable(node, connection),
            Notice::Planned(plan) => panic!("the driver was not asked for {plan:?}"),
            Notice::Dead => unreachable!("it had something to do"),
        }
    }

    fn readable(&mut self, node: usize, connection: ConnectionId) {
        match self.ends.get(&(node, connection.0)).copied() {
            Some((link, side)) => self.send_on(link, side),
            None => self.client_can_read(node, connection),
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::CallArrives { caller, boot, called } => self.call_arrives(caller, boot, called),
            Happening::CallFails { caller, boot, called } => self.call_fails(caller, boot, called),
            Happening::CallDone { link } => self.call_done(link),
            Happening::Arrive { link, from } => self.arrive(link, from),
            Happening::EndBreaks { link, side } => self.end_breaks(link, side),
            Happening::Proposal { node, boot, record } => self.proposal_arrives(node, boot, &record),
            Happening::News { node, boot, record } => self.news_arrives(node, boot, record),
            Happening::Think(session) => self.think(session),
            Happening::Fault(number) if number == self.faults_made => self.fault(),
            Happening::Fault(_) => {}
            Happening::Undo(fault) => self.undo(fault),
            Happening::HoldUp { volume, node, late_ns } => self.hold_up(volume, node, late_ns),
            Happening::Split { volume, node } => self.cut_off(volume, node),
            Happening::Start { node, boots } => {
                if self.nodes[node].life.is_none() && self.nodes[node].boots == boots {
                    self.start(node);
                }
            }
            Happening::EndAnyway { node, boot } => self.end_anyway(node, boot),
            Happening::Verify => self.want_verify(),
            Happening::Watch => self.watch(),
        }
    }

    /// The engine of a node had a turn.
    fn after_turn(&mut self, node: usize) {
        self.check_node(node);
        self.watch_moves_to(node);
        let boot = self.nodes[node].boots;
        let Some(driver) = self.nodes[node].at(self.now_ns) else { return };
        let calls = driver.take_calls();
        let mut proposals = Vec::new();
        while let Some(record) = datapath::engine::ports::Engine::poll_proposal(driver.engine_mut()) {
            proposals.push(record);
        }
        let engine = driver.engine_mut();
        let poll = || datapath::engine::ports::Engine::poll_check_report(engine);
        let reports: Vec<_> = std::iter::from_fn(poll).collect();
        reports.iter().for_each(|report| self.heed_report(report));
        for called in calls {
            let delay = self.network_delay_ns();
            self.after(delay, Happening::CallArrives { caller: node, boot, called: index(called) });
        }
        for record in proposals {
            trace::note(
                self.moment(),
                "node proposes version, epoch",
                [node as u64, record.version, record.epoch.into()],
            );
            let delay = self.store_delay_ns();
            self.after(delay, Happening::Proposal { node, boot, record });
        }
        self.end_if_drained(node);
    }

    fn moment(&self) -> Moment {
        Moment(self.now_ns)
    }

    fn start(&mut self, node: usize) {
        self.moves.disturb(self.now_ns);
        self.sicken(node);
        if let Err(error) = self.nodes[node].start(self.now_ns, self.volumes.len()) {
            return self.start_refused(node, &error);
        }
        trace::note(self.moment(), "node starts: node, boot", [node as u64, self.nodes[node].boots, 0]);
        for volume in 0..self.volumes.len() {
            let record = self.records.get(volume).clone();
            // A node asks about what it holds, too.
            if traffic::concerned_by(&record).contains(&node) || self.nodes[node].holds(record.volume) {
                self.send_news(node, record);
            }
        }
    }

    /// A node's process ends, and its power perhaps.
    fn stop(&mut self, node: usize, power_cut: bool) {
        trace::note(self.moment(), "node stops: node, power cut", [node as u64, power_cut.into(), 0]);
        self.moves.disturb(self.now_ns);
        if self.nodes[node].life.is_some() {
            self.report.turns += self.nodes[node].report_turns();
            self.report.departures += self.nodes[node].volumes_removed();
            self.report.no_space += self.nodes[node].report_no_space();
            if self.nodes[node].feigns_damage() {
                self.verifies.note_feigned(self.now_ns);
            }
            self.clients_lose(node);
            self.links_lose(node, power_cut);
        }
        self.nodes[node].stop(power_cut);
        self.checks.forget_node(node);
        if self.nodes.iter().all(|node| node.life.is_none()) {
            // Nothing that was asked is on its way any more, so what was not done by now never will be.
            self.report.blackouts += 1;
            self.volumes.iter_mut().for_each(|volume| volume.oracle.crash(Crash::PowerCut));
        }
    }

    fn watch(&mut self) {
        assert!(
            self.happenings < HAPPENINGS_PER_WATCH_MAX,
            "{} things happened in {WATCH_NS} ns: an engine runs in circles\n{}",
            self.happenings,
            self.describe()
        );
        self.happenings = 0;
        self.watch_clients();
        self.watch_disks();
        self.watch_verifies();
        self.watch_attachments();
        self.watch_leaving();
        self.end_if_all_is_well();
        if self.stage != Stage::Working {
            assert!(
                self.now_ns - self.calm_since_ns < CALM_NS_MAX,
                "there are no faults any more, and not everything is served\n{}",
                self.describe()
            );
        }
        if self.stage != Stage::Done {
            self.after(WATCH_NS, Happening::Watch);
        }
    }

    fn describe(&self) -> String {
        let nodes: Vec<String> = self.nodes.iter().map(Node::describe).collect();
        let sessions: Vec<String> = self.sessions.iter().map(Session::describe).collect();
        format!(
            "at {:?}, {:?}\n{}\n{:#?}\n{}\nlinks {:#?}",
            self.moment(),
            self.stage,
            sessions.join("\n"),
            self.records.all(),
            nodes.join("\n"),
            self.links
        )
    }

    fn finish(mut self) -> ClusterReport {
        for node in &self.nodes {
            self.report.turns += node.report_turns();
            self.report.departures += node.volumes_removed();
            self.report.no_space += node.report_no_space();
            self.report.disk_errors += node.disk().counts.errors;
        }
        self.report.failovers = self.records.started;
        self.report.epochs = self.records.all().iter().map(|record| u64::from(record.epoch)).sum();
        self.report.removals = self.records.removals;
        self.report.admissions = self.records.admissions;
        self.report.replacements = self.records.replaced;
        self.report.releases = self.records.released;
        self.report.remote_heads = self.records.remote_heads;
        self.report.left = self.records.left;
        self.report.record_changes = self.records.accepted;
        self.report.virtual_ns = self.now_ns - SECOND_NS;
        self.report.digest = trace::digest();
        self.report
    }
}
