//! Replicated volumes of a shard: their heads and members, and what these two want of lanes, links and clients.
//!
//! ```text
//!   client's write ─▶ piece ─▶ head ─┬─▶ link ─▶ member on another node ─▶ its lane
//!                                    └─▶ own member ─▶ own lane
//!   client's answer ◀─ piece ◀─ committed ◀─ acknowledgements ─┘
//! ```
//!
//! The head's own replica is a member like any other, only that no network is between them.

mod check;
mod check_here;
mod compare;
mod content;
mod departure;
mod dial;
mod fill;
mod handover;
mod head;
mod link;
mod link_input;
mod member;
mod peer_read;
mod reads;
mod remote;
mod room;
mod tending;

use super::neighbours::ExportPlace;
use super::{Served, Shard};
use crate::engine::ports::ConnectionId;
use crate::engine::report::{PeerBytes, RepairReport};
use crate::limits::CONNECTIONS_MAX;
use crate::memory::Memory;
use crate::record::{NodeId, Record, VolumeNumber};
use crate::replica::bugs::{Bugs, PlantedBug};
use crate::replica::check::CheckReport;
use crate::replica::head::Head;
use crate::replica::member::Member;
use crate::replica::peer_reads::PeerReads;
use crate::request::ExportIndex;
use crate::store::checkpoint_body::VolumeRecord;
use crate::store::lane::Completion;
use crate::store::slab::Slab;
use crate::units::{BLOCK_BYTES_U64, MemoryRange, Moment};
use check::Checking;
use check_here::Asked;
use compare::{Comparing, Source};
use content::{Contents, Users};
use departure::Departure;
use dial::Dials;
use fill::{CopyPiece, CopyWish};
use link::Link;
use peer_read::PeerPiece;
use reads::HeldRead;
use room::WaitingWrite;
use std::collections::{BTreeMap, VecDeque};

/// Cookies of lanes' requests that are a replica's and not a piece's have this bit.
const COOKIE: u32 = 1 << 31;
/// One part in so many of the memory is for what comes from other nodes.
const PEER_PAGES_PART: u32 = 4;

/// A node of a cluster, as its shard knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Its number.
    pub node: NodeId,
    /// Random at each start of the process.
    pub boot: u64,
    /// A client makes this node the head even while another one may live: for operators who know better, and to have
    /// heads fight in simulations.
    pub steals: bool,
}

/// How a replica stands, for checks.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaState<'a> {
    /// The newest record that was read.
    pub record: &'a Record,
    /// Its epoch is this node's, and has started.
    pub leads: bool,
    /// It takes requests by that.
    pub serves: bool,
    /// If it leads: changes up to here are committed.
    pub committed: u64,
    /// Changes up to here are on this node's stable media; nothing while the member cannot work.
    pub durable: Option<u64>,
    /// The epoch that it promised; nothing while the member cannot work.
    pub promised: Option<u32>,
}

/// Who asked a member for its promise, and hears its acknowledgements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leader {
    Nobody,
    ThisNode,
    /// A head on another node, by the link that it called on.
    Link(ConnectionId, u64),
}

/// One replicated volume.
#[derive(Debug)]
struct Replica {
    volume: VolumeNumber,
    /// Its position among the served volumes, which is its export.
    served: usize,
    head: Head,
    /// Nothing before the volume lasts in its lane, and after it has failed.
    member: Option<Member>,
    failed: bool,
    /// It has no part in the volume any more, and its lane will take out what it holds.
    departs: bool,
    /// Nothing of it is left: the next one may have its place.
    is_vacant: bool,
    /// The record counts on what the replica held, and it is gone, as when the pool was made anew.
    lost: bool,
    leader: Leader,
    /// Since when no request is begun, because the volume moves to another node.
    leaving_since: Option<Moment>,
    /// Nobody but who wants something done for the replicas has this node lead the volume: until then, if nothing is done.
    tended_until: Option<Moment>,
    /// Since when it is known that the volume is attached to this node.
    attached_since: Option<Moment>,
    /// What the changes that are not committed hold.
    contents: Contents,
    /// Reads that came back from the lane and may not be answered yet.
    held: Vec<HeldRead>,
    /// Writes that have no number yet, because it is not known whether every replica has room for them.
    waiting_room: VecDeque<WaitingWrite>,
    /// What is to be copied to a replica that is filled, while there is no memory for it.
    waiting_copy: Option<CopyWish>,
    /// What the replica that is filled from here lacks.
    source: Option<Box<Source>>,
    /// What the own replica cannot give is asked of another.
    peer_reads: PeerReads,
    /// By their numbers there: how these reads ended here.
    damaged_reads: Vec<(u64, Completion)>,
    /// The replicas are compared now and then.
    checking: Checking,
}

/// What a lane does for a replica.
#[derive(Clone, Copy, Debug)]
enum Work {
    Append { replica: usize, sequence: u64, lent: Option<MemoryRange>, pages: u32 },
    Promise { replica: usize, epoch: u32 },
    BeginFill { replica: usize, fill: u64 },
    EndFill { replica: usize, fill: u64 },
    Copy { replica: usize, fill: u64, last: bool, lent: Option<MemoryRange>, pages: u32 },
    CopyRead { replica: usize, piece: CopyPiece, memory: Option<MemoryRange> },
    Fetch { replica: usize, epoch: u32, sequence: u64, memory: MemoryRange, leader: Leader },
    FindChanged { replica: usize, fill: u64, memory: MemoryRange },
    Compare { replica: usize, comparing: Comparing, memory: MemoryRange },
    ReadForHead { replica: usize, read: PeerPiece, memory: MemoryRange, leader: Leader },
    Repair { replica: usize, blocks: u32, lent: Option<MemoryRange>, pages: u32 },
    Leaf { replica: usize, piece: u32 },
    LookForNew { replica: usize, piece: u32, count: u32, memory: Option<MemoryRange> },
    ListChanged { replica: usize, comparing: Comparing, memory: MemoryRange },
    Check { replica: usize, asked: Asked, memory: MemoryRange, asker: Leader },
    CheckRepair { replica: usize, check: u64 },
    Mend { replica: usize, asked: Asked, asker: Leader, lent: MemoryRange, pages: u32 },
    Remove { volume: VolumeNumber },
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Replication {
    node: Option<NodeConfig>,
    pub(super) bugs: Bugs,
    /// Makes the names of heads' sessions.
    random: u64,
    replicas: Vec<Replica>,
    works: Slab<Work>,
    departures: Vec<Departure>,
    /// Volumes without a replica here: the version of the record that said so.
    departed: BTreeMap<VolumeNumber, u64>,
    /// Volumes that lanes have taken out.
    volumes_removed: u64,
    /// Volumes that they could not.
    pub(super) removals_failed: u64,
    proposals: VecDeque<Box<Record>>,
    links: Vec<Option<Box<Link>>>,
    /// Counts links, so that one is not taken for an earlier one of the same number.
    links_opened: u64,
    /// When links must have been greeted, in order.
    greetings_due: VecDeque<(Moment, ConnectionId, u64)>,
    /// Links whose next payload waits for memory.
    hungry_links: VecDeque<ConnectionId>,
    dials: Dials,
    users: Users,
    /// Pages with what came from other nodes, and how many that may be.
    peer_pages: u32,
    peer_pages_max: u32,
    /// Fills that ended because the own replica could not be read.
    copies_failed: u64,
    pub(super) repairs: RepairReport,
    /// For [`PlantedBug::StaleClock`]: what the clock showed some turns ago.
    pub(super) stale_clock: Moment,
    /// For simulations; 0 for never.
    feigns_damage_in: u32,
    /// In this time every block of every volume that is led here is read once; 0 for never.
    scrub_period_ns: u64,
    check_reports: VecDeque<CheckReport>,
    /// Sent on links.
    bytes_sent: PeerBytes,
    /// The process ends: until then it waits for records that say that its heads have let go.
    last_releases_until: Option<Moment>,
}

impl Replication {
    pub(super) fn new(node: Option<NodeConfig>, free_pages: u32, memory_bytes: u32) -> Replication {
        Replication {
            node,
            bugs: Bugs::none(),
            random: node.map_or(0, |node| node.boot),
            replicas: Vec::new(),
            works: Slab::default(),
            departures: Vec::new(),
            departed: BTreeMap::new(),
            volumes_removed: 0,
            removals_failed: 0,
            proposals: VecDeque::new(),
            links: if node.is_some() { (0..CONNECTIONS_MAX).map(|_| None).collect() } else { Vec::new() },
            links_opened: 0,
            greetings_due: VecDeque::new(),
            hungry_links: VecDeque::new(),
            dials: Dials::default(),
            users: Users::new(if node.is_some() { memory_bytes } else { 0 }),
            peer_pages: 0,
            copies_failed: 0,
            repairs: RepairReport::default(),
            stale_clock: Moment::default(),
            feigns_damage_in: 0,
            scrub_period_ns: 0,
            check_reports: VecDeque::new(),
            bytes_sent: PeerBytes::default(),
            last_releases_until: None,
            peer_pages_max: if node.is_some() { free_pages / PEER_PAGES_PART } else { 0 },
        }
    }

    pub(super) fn bytes_sent(&self) -> PeerBytes {
        self.bytes_sent
    }

    /// Pages that requests of clients leave to other nodes.
    pub(super) fn pages_kept(&self) -> u32 {
        self.peer_pages_max
    }

    pub(super) fn poll_proposal(&mut self) -> Option<Box<Record>> {
        self.proposals.pop_front()
    }

    pub(super) fn is_link(&self, connection: ConnectionId) -> bool {
        self.links.get(connection.0 as usize).is_some_and(Option::is_some)
    }

    fn find(&self, volume: VolumeNumber) -> Option<usize> {
        self.replicas.iter().position(|replica| replica.volume == volume && !replica.is_vacant)
    }

    fn config(&self) -> NodeConfig {
        self.node.expect("only nodes have replicas")
    }

    fn node(&self) -> NodeId {
        self.config().node
    }

    /// SplitMix64 (Steele, Lea, Flood, 2014).
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// When a head or a dial wants its turn. `takes`: the node still takes volumes.
    pub(super) fn poll_timeout(&self, takes: bool) -> Option<Moment> {
        let heads = self.replicas.iter().filter_map(|replica| replica.head.poll_timeout());
        let greeting = self.greetings_due.front().map(|(moment, ..)| *moment);
        let reads = self.replicas.iter().filter_map(|replica| replica.peer_reads.poll_timeout());
        let checks = self.replicas.iter().filter_map(|replica| replica.checking.poll_timeout());
        let handover = self.poll_handover_timeout(takes).into_iter().chain(self.poll_search_timeout());
        let handover = handover.chain(self.poll_tending_timeout());
        let all = heads.chain(reads).chain(checks).chain(self.dials.poll_timeout());
        all.chain(greeting).chain(handover).min()
    }
}

impl Replica {
    /// Why clients cannot have the volume at this node now, if so.
    fn refusal(&self, config: NodeConfig, now: Moment) -> Option<String> {
        let node = config.node;
        let record = self.head.record();
        if self.head.is_active() && self.leaving_since.is_none() {
            return None;
        }
        if self.departs {
            return Some(format!("{} has no replica here any more; connect to another node", record.name));
        }
        if let Some(other) = record.attached.filter(|other| *other != node) {
            let name = &record.name;
            return Some(format!("{name} is attached to node number {}: connect there", other.0));
        }
        let is_attached = self.is_attached_here(node);
        if self.failed && !is_attached {
            return Some(format!("the replica of {} here has failed; connect to another node", record.name));
        }
        if self.lost && !is_attached {
            return Some(format!(
                "the replica of {} here has lost what it held; connect to another node",
                record.name
            ));
        }
        if !record.is_in_sync(node) && !is_attached {
            let others: Vec<String> = record.in_sync.iter().map(|node| node.0.to_string()).collect();
            return Some(format!(
                "the replica of {} here is not up to date; connect to node number {}",
                record.name,
                others.join(" or ")
            ));
        }
        if self.head.is_releasing() {
            return Some(format!("{} is being let go here: try again", record.name));
        }
        if is_attached {
            // It comes here.
            return None;
        }
        let head = record.living_head().filter(|head| head.node != node)?;
        let may_live = self.member.as_ref().is_none_or(|member| member.granted_until() > now);
        (may_live && !config.steals).then(|| {
            format!(
                "node number {} leads {}: connect there; if it is dead, try again in 3 seconds",
                head.node.0, record.name
            )
        })
    }
}

impl<M: Memory> Shard<M> {
    /// Plants a mistake in the replication of a shard that has just been made.
    pub fn plant(&mut self, bugs: Bugs) {
        self.replication.bugs = bugs;
    }

    /// The replicas, for checks.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaState<'_>> {
        let present = self.replication.replicas.iter().filter(|replica| !replica.departs);
        present.map(|replica| ReplicaState {
            record: replica.head.record(),
            leads: replica.head.has_started(),
            serves: replica.head.is_serving(),
            committed: replica.head.committed(),
            durable: replica.member.as_ref().map(Member::durable),
            promised: replica.member.as_ref().map(Member::promised),
        })
    }

    /// News of a volume.
    pub(super) fn handle_record(&mut self, record: Record) {
        let node = self.replication.node();
        if self.waits_for_departure(&record) {
            return;
        }
        let index = match self.replication.find(record.volume) {
            Some(index) => index,
            None if record.has_replica(node) || record.attached == Some(node) => self.add_replica(&record),
            None => return self.depart_as_recorded(&record),
        };
        let now = self.now;
        let Replication { replicas, dials, .. } = &mut self.replication;
        let Replica { head, member, .. } = &mut replicas[index];
        let member_ready = member.is_some();
        let before = if head.is_active() { head.record().in_sync.clone() } else { Vec::new() };
        let was_in_sync = head.record().is_in_sync(node);
        head.handle_record(now, &record, |to| if to == node { member_ready } else { dials.is_up(to) });
        let is_left_out = was_in_sync && !head.record().is_in_sync(node);
        let goes_on = head.record().attached == Some(node) || head.record().leaving.contains(&node);
        if head.is_active() && is_left_out && !goes_on {
            // The head has read from this node's replica, which is not kept up to date any more: others lead better.
            head.resign();
        }
        let left: Vec<NodeId> =
            before.into_iter().filter(|member| !head.record().is_in_sync(*member)).collect();
        self.note_attachment(index);
        self.settle_head(index);
        self.note_whence_is_read(index);
        if is_left_out {
            let served = &self.served[self.replication.replicas[index].served];
            let volume = served.volume;
            self.with_lane(served.lane, |lane, context| lane.leave_out(context, volume));
        }
        // What waits to be sent to members that were left out holds memory, for as long as their links stand still.
        for member in left {
            if let Some(link) = self.replication.dials.up(member) {
                self.close_link(link);
            }
        }
        self.depart_if_unnamed(index);
    }

    /// The node has, or is to have, a replica of the volume.
    fn add_replica(&mut self, record: &Record) -> usize {
        let number = record.volume.0;
        let known =
            self.lanes.iter().position(|shard_lane| shard_lane.lane.volume_position(number).is_some());
        let lane = known.unwrap_or(number as usize % self.lanes.len());
        let put = VolumeRecord {
            number,
            epoch: 0,
            size_blocks: record.size_blocks,
            sequence: 0,
            identity: record.lineage,
            name: record.name.clone(),
            replicated: true,
            // Whoever had a part in an epoch that started knew the volume: what is not known here was lost, or never came,
            // and the volume's order must not seem to begin here. Nor must it where there is no replica.
            filling: (record.last_started > 0 || !record.has_replica(self.replication.node()))
                && !self.replication.bugs.has(PlantedBug::LossUnnoticed),
            ..VolumeRecord::default()
        };
        let own = &mut self.lanes[lane].lane;
        if known.is_none() {
            own.put_volume(put);
        }
        let volume = own.volume_position(number).expect("just put there");
        let own_lineage = own.volumes()[volume as usize].record.identity == record.lineage;
        let size_bytes = record.size_blocks * BLOCK_BYTES_U64;
        let (index, served) = self.place_for_replica(record.name.clone(), size_bytes);
        self.served[served] = Served { replica: Some(index), ..Served::new(lane, volume) };
        // The head's version is of the time before the record was read, so that it takes note of this one.
        let unread = Record { version: 0, ..record.clone() };
        let mut head = Head::new(self.replication.node(), unread);
        head.plant(self.replication.bugs);
        let replica = Replica {
            volume: record.volume,
            served,
            head,
            member: None,
            // A replica of another lineage has nothing in common with this volume.
            failed: !own_lineage,
            departs: false,
            is_vacant: false,
            lost: false,
            leader: Leader::Nobody,
            leaving_since: None,
            tended_until: None,
            attached_since: None,
            contents: Contents::default(),
            held: Vec::new(),
            waiting_room: VecDeque::new(),
            waiting_copy: None,
            source: None,
            peer_reads: PeerReads::default(),
            damaged_reads: Vec::new(),
            checking: Checking::new(record.volume, self.replication.bugs, self.replication.scrub_period_ns),
        };
        if index == self.replication.replicas.len() {
            self.replication.replicas.push(replica);
        } else {
            self.replication.replicas[index] = replica;
        }
        index
    }

    /// Positions among the replicas and among the served volumes, and its export: those of one that has gone, if there is one.
    fn place_for_replica(&mut self, name: String, size_bytes: u64) -> (usize, usize) {
        if let Some(index) = self.replication.replicas.iter().position(|replica| replica.is_vacant) {
            let served = self.replication.replicas[index].served;
            let export = ExportIndex(u32::try_from(served).expect("exports fit 32 bits"));
            self.exports.replace(export, name, size_bytes);
            return (index, served);
        }
        self.exports.add_newest(name, size_bytes, self.read_only);
        let served = self.served.len();
        self.export_places.push(ExportPlace::Here(u32::try_from(served).expect("exports fit 32 bits")));
        // Its lane and volume are filled in by the caller.
        self.served.push(Served::new(0, 0));
        (self.replication.replicas.len(), served)
    }

    /// Once per turn: members that can begin, timeouts of heads, links that waited, acknowledgements.
    pub(super) fn upkeep_replication(&mut self) {
        if self.replication.node.is_none() {
            return;
        }
        self.feed_hungry_links();
        self.expire_greetings();
        self.advance_departures();
        for index in 0..self.replication.replicas.len() {
            if self.replication.replicas[index].departs {
                self.settle_head(index);
                continue;
            }
            self.start_member(index);
            self.start_copy(index);
            self.take_over_if_asked(index);
            self.tend(index);
            let now = self.now;
            let head = &mut self.replication.replicas[index].head;
            if head.poll_timeout().is_some_and(|moment| moment <= now) {
                head.handle_timeout(now);
            }
            self.settle_head(index);
            self.hand_over_if_asked(index);
            self.let_go_if_unwanted(index);
            self.advance_waiting(index);
            self.advance_peer_reads(index);
            self.answer_held(index);
            self.advance_checks(index);
            // Last: what was numbered in this turn goes on its way in it.
            self.replication.replicas[index].head.stream(now);
            self.settle_head(index);
        }
        self.dial_members();
    }

    /// A lane has done something for a replica.
    pub(super) fn finish_work(&mut self, completion: &Completion) {
        let work = self.replication.works.remove(completion.cookie & !COOKIE);
        match work {
            Work::Append { replica, sequence, lent, pages } => {
                self.replication.peer_pages -= pages;
                if let Some(memory) = lent {
                    self.unuse(memory);
                }
                self.finish_append(replica, sequence, completion.result);
            }
            Work::Promise { replica, epoch } => {
                self.finish_promise(replica, epoch, completion.result.is_ok());
            }
            Work::BeginFill { replica, fill } => {
                self.finish_fill_mark(replica, fill, true, completion.result);
            }
            Work::EndFill { replica, fill } => {
                self.finish_fill_mark(replica, fill, false, completion.result);
            }
            Work::Copy { replica, fill, last, lent, pages } => {
                self.replication.peer_pages -= pages;
                if let Some(memory) = lent {
                    self.unuse(memory);
                }
                self.finish_copy(replica, fill, last, completion.result);
            }
            Work::CopyRead { replica, piece, memory } => {
                self.finish_copy_read(replica, piece, memory, completion);
            }
            Work::Remove { volume } => self.finish_departure(volume, completion.result),
            Work::Fetch { .. }
            | Work::FindChanged { .. }
            | Work::Compare { .. }
            | Work::ListChanged { .. } => unreachable!("these are polled"),
            Work::ReadForHead { replica, read, memory, leader } => {
                self.finish_read_for_head(replica, read, memory, leader, completion);
            }
            Work::LookForNew { replica, piece, count, memory } => {
                self.finish_look_for_new(replica, (piece, count), memory, completion);
            }
            Work::Leaf { replica, piece } => self.leaf_for_room_came(replica, piece),
            Work::Check { replica, asked, memory, asker } => {
                self.finish_check_read(replica, asked, memory, asker, completion);
            }
            Work::CheckRepair { replica, check } => {
                self.replication.replicas[replica].checking.checks.repair_ended(check);
            }
            Work::Mend { replica, asked, asker, lent, pages } => {
                self.replication.peer_pages -= pages;
                self.unuse(lent);
                self.finish_mend(replica, asked, asker, completion.result.is_ok());
            }
            Work::Repair { blocks, lent, pages, .. } => {
                self.replication.peer_pages -= pages;
                lent.into_iter().for_each(|memory| self.unuse(memory));
                self.replication.repairs.blocks_repaired +=
                    if completion.result.is_ok() { u64::from(blocks) } else { 0 };
            }
        }
    }

    /// The node stops, and its clients are gone: heads let go and links are closed. True when nothing is left.
    pub(super) fn replication_has_ended(&mut self) -> bool {
        self.stop_departures();
        if !self.have_heads_let_go() {
            return false;
        }
        self.close_links();
        self.replication.links.iter().all(Option::is_none) && self.replication.works.is_empty()
    }

    pub(super) fn is_replication_cookie(cookie: u32) -> bool {
        cookie & COOKIE != 0
    }

    fn begin_work(&mut self, work: Work) -> u32 {
        self.replication.works.insert(work) | COOKIE
    }

    /// May clients' requests to this served volume go on? One that is not replicated is open with its lane.
    pub(super) fn is_led_here(&self, served: usize) -> bool {
        match self.served[served].replica {
            Some(replica) => {
                self.replication.replicas[replica].head.is_serving() && !self.is_leaving(replica)
            }
            None => true,
        }
    }

    /// Before a client chooses: which volumes it cannot have here now, and why.
    pub(super) fn refresh_refusals(&mut self) {
        for replica in &self.replication.replicas {
            let export = ExportIndex(u32::try_from(replica.served).expect("exports fit 32 bits"));
            self.exports.set_refusal(export, replica.refusal(self.replication.config(), self.now));
        }
    }

    /// Was the task's request made to the head that is here now?
    fn is_of_this_term(&self, task: u32) -> bool {
        let task = self.tasks.get(task);
        task.term == self.served[task.export as usize].terms
    }

    /// For failing tests.
    pub(super) fn describe_replication(&self, out: &mut String) {
        use std::fmt::Write;
        for replica in &self.replication.replicas {
            let Replica { volume, head, member, leader, held, contents, peer_reads, waiting_room, .. } =
                replica;
            let _ = writeln!(
                out,
                "{volume:?}: {}\n  member {member:?} of {leader:?}, held {}, contents {}, {peer_reads:?}, waiting {waiting_room:?}",
                head.describe(),
                held.len(),
                contents.len()
            );
        }
        for (index, link) in self.replication.links.iter().enumerate() {
            if let Some(link) = link {
                let _ = writeln!(out, "link {index}: {link:?}");
            }
        }
        let Replication { dials, peer_pages, copies_failed, .. } = &self.replication;
        let _ = writeln!(out, "{dials:?}, peer pages {peer_pages}, copies failed {copies_failed}");
    }
}
