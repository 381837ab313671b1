//! Heads and members of one volume in a world of their own: random messages, losses, crashes and clocks, thousands of
//! worlds in a second. The disk is a list, the network three queues, and what must hold is asked after every step.

mod filling;
mod room;

use super::head::{Head, HeadEffect};
use super::member::{Member, Step};
use crate::block_set::BlockSet;
use crate::record::{ChangeKind, NodeId, Record, Stamp, VolumeNumber};
use crate::units::Moment;
use crate::wire::peer_message::{ChangeHeader, PeerMessage};
use crate::wire::random::Xorshift;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const NODES: usize = 3;
const VOLUME_BLOCKS: u32 = 1000;

/// What a node holds on stable media, and its process.
struct Node {
    promised: u32,
    /// The changes after `base`.
    log: Vec<ChangeHeader>,
    base: Stamp,
    /// The blocks that hold data, and of which change.
    content: Content,
    filling: bool,
    /// While it is filled: what it had in common with the order.
    common: Stamp,
    /// What it changed before it began to be filled: all that is not sure to be of the order.
    surplus: Vec<ChangeHeader>,
    /// It was told that the changes up to here are committed: the log need not keep them.
    told: u64,
    promised_room: room::Promised,
    process: Option<Process>,
    /// Its clock runs at so many parts in a thousand of the world's.
    rate: u64,
}

struct Process {
    head: Head,
    member: Member,
    /// Given to the disk and not yet stable, in order.
    writing: VecDeque<Write>,
    reading: VecDeque<Read>,
    /// What the replica that it fills has beyond what is in common, and for which fill.
    surplus: (u64, BlockSet),
    /// Sent by clients and not answered: cookie and nothing else.
    cookies: u32,
    started: bool,
}

enum Write {
    Change(ChangeHeader),
    Promise(u32),
    BeginFill(u64, Stamp, Stamp),
    Copy(u64, Vec<Cell>),
    EndFill(u64),
}

/// What a block holds, by its number: the data of a change, or nothing.
type Cell = (u32, Option<Stamp>);
type Content = BTreeMap<u32, Stamp>;
/// A message, and what a copy brings.
type Sent = (PeerMessage, Vec<Cell>);

/// A piece that a head reads from its own replica.
struct Read {
    member: NodeId,
    epoch: u32,
    fill: u64,
    base: Stamp,
    block: u32,
}

fn put(content: &mut Content, (block, data): Cell) {
    match data {
        Some(stamp) => content.insert(block, stamp),
        None => content.remove(&block),
    };
}

fn apply(content: &mut Content, change: &ChangeHeader) {
    let data = (change.kind == ChangeKind::Data).then_some(change.stamp);
    (change.block..change.block + change.count).for_each(|block| put(content, (block, data)));
}

struct World {
    random: Xorshift,
    now_ns: u64,
    nodes: Vec<Node>,
    /// Messages on the connection from one node to another; nothing if there is none.
    links: BTreeMap<(usize, usize), VecDeque<Sent>>,
    store: Record,
    /// Proposals on their way.
    proposals: Vec<Record>,
    /// Per node: a newer record is on its way to it.
    news: BTreeSet<usize>,
    acked: BTreeSet<Stamp>,
    acked_by: BTreeMap<u32, (NodeId, u64)>,
    serving_epochs: BTreeSet<u32>,
    commits: u64,
    /// Everything that was ever numbered.
    numbered: BTreeMap<Stamp, ChangeHeader>,
    admissions: u64,
    /// A node that the record store and the other nodes cannot reach, and until when.
    alone: Option<(usize, u64)>,
    calm: bool,
}

impl Node {
    fn last(&self) -> Stamp {
        self.log.last().map_or(self.base, |change| change.stamp)
    }
}

fn id(node: usize) -> NodeId {
    NodeId(u32::try_from(node).unwrap())
}

fn index(node: NodeId) -> usize {
    node.0 as usize
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Xorshift::new(seed);
        let nodes: Vec<NodeId> = (0..NODES).map(id).collect();
        let mut store = Record::new(VolumeNumber(1), "v", [1; 16], VOLUME_BLOCKS.into(), &nodes);
        store.min_in_sync = 1 + u32::from(random.below(2) == 0);
        let nodes = (0..NODES)
            .map(|_| Node {
                promised: 0,
                log: Vec::new(),
                base: Stamp::default(),
                content: Content::new(),
                filling: false,
                common: Stamp::default(),
                surplus: Vec::new(),
                told: 0,
                promised_room: room::Promised::default(),
                process: None,
                rate: 980 + random.below(41) as u64,
            })
            .collect();
        let mut world = World {
            random,
            now_ns: 1 << 40,
            nodes,
            links: BTreeMap::new(),
            store,
            proposals: Vec::new(),
            news: BTreeSet::new(),
            acked: BTreeSet::new(),
            acked_by: BTreeMap::new(),
            serving_epochs: BTreeSet::new(),
            commits: 0,
            numbered: BTreeMap::new(),
            admissions: 0,
            alone: None,
            calm: false,
        };
        (0..NODES).for_each(|node| world.start(node));
        world
    }

    fn clock(&self, node: usize) -> Moment {
        Moment(self.now_ns / 1000 * self.nodes[node].rate + 7_000_000_000 * node as u64)
    }

    fn start(&mut self, node: usize) {
        let now = self.clock(node);
        let state = &mut self.nodes[node];
        state.promised_room = room::Promised::at_start();
        let member = Member::new(now, state.promised, state.last(), state.filling.then_some(state.common));
        let head = Head::new(id(node), self.store.clone());
        state.process = Some(Process {
            head,
            member,
            writing: VecDeque::new(),
            reading: VecDeque::new(),
            surplus: (0, BlockSet::default()),
            cookies: 0,
            started: false,
        });
        self.connect(node, node);
        self.news.insert(node);
    }

    fn crash(&mut self, node: usize) {
        self.nodes[node].process = None;
        for other in 0..NODES {
            self.cut(node, other);
        }
        self.news.remove(&node);
    }

    fn connect(&mut self, one: usize, other: usize) {
        if self.nodes[one].process.is_none() || self.nodes[other].process.is_none() {
            return;
        }
        if self.links.contains_key(&(one, other)) {
            return;
        }
        self.links.insert((one, other), VecDeque::new());
        self.links.insert((other, one), VecDeque::new());
        for (a, b) in BTreeSet::from([(one, other), (other, one)]) {
            let now = self.clock(a);
            self.nodes[a].process.as_mut().unwrap().head.member_up(now, id(b));
        }
    }

    fn cut(&mut self, one: usize, other: usize) {
        if self.links.remove(&(one, other)).is_none() {
            return;
        }
        self.links.remove(&(other, one));
        for (a, b) in BTreeSet::from([(one, other), (other, one)]) {
            let now = self.clock(a);
            if let Some(process) = &mut self.nodes[a].process {
                process.head.member_down(now, id(b));
            }
        }
    }

    fn send(&mut self, from: usize, to: NodeId, message: PeerMessage) {
        self.send_with(from, to, message, Vec::new());
    }

    fn send_with(&mut self, from: usize, to: NodeId, message: PeerMessage, cells: Vec<Cell>) {
        if let Some(queue) = self.links.get_mut(&(from, index(to))) {
            queue.push_back((message, cells));
        }
    }

    /// Carries out what a head wants.
    fn settle(&mut self, node: usize) {
        let now = self.clock(node);
        self.nodes[node].process.iter_mut().for_each(|it| it.head.stream(now));
        while let Some(effect) = self.nodes[node].process.as_mut().and_then(|it| it.head.poll_effect()) {
            let process = self.nodes[node].process.as_mut().unwrap();
            match effect {
                HeadEffect::Propose(record) => self.proposals.push(*record),
                HeadEffect::Promise { member, epoch } => {
                    self.send(node, member, PeerMessage::Promise { epoch });
                }
                HeadEffect::Change { member, epoch, change } => {
                    let committed = process.head.settled();
                    self.send(node, member, PeerMessage::Change { epoch, change, committed });
                }
                HeadEffect::Fetch { member, epoch, sequence } => {
                    self.send(node, member, PeerMessage::Fetch { epoch, sequence });
                }
                HeadEffect::Lease { member, epoch, asked, room } => {
                    let committed = process.head.settled();
                    let lease = PeerMessage::Lease { epoch, asked_ns: asked.0, committed, room };
                    self.send(node, member, lease);
                }
                HeadEffect::Compare { member, epoch, fill, base } => {
                    process.surplus = (fill, BlockSet::default());
                    self.send(node, member, PeerMessage::Compare { epoch, fill, base });
                }
                HeadEffect::Fill { member, epoch, fill, after } => {
                    self.send(node, member, PeerMessage::Fill { epoch, after, fill });
                }
                HeadEffect::Copy { member, epoch, fill, base, block } => {
                    process.reading.push_back(Read { member, epoch, fill, base, block });
                }
                HeadEffect::Filled { member, epoch, fill } => {
                    self.send(node, member, PeerMessage::Filled { epoch, fill });
                }
                HeadEffect::Committed { sequence, cookie } => self.note_commit(node, sequence, cookie),
                HeadEffect::Dropped { .. } => {}
                HeadEffect::Started => self.note_start(node),
                HeadEffect::Ended => process.started = false,
            }
        }
    }

    fn note_commit(&mut self, node: usize, sequence: u64, cookie: Option<u32>) {
        self.commits += 1;
        if cookie.is_none() {
            return;
        }
        let record = self.nodes[node].process.as_ref().unwrap().head.record().clone();
        let session = record.head.unwrap().session;
        let own = (id(node), session);
        let by = self.acked_by.entry(record.epoch).or_insert(own);
        assert_eq!(*by, own, "two heads acknowledge in epoch {}", record.epoch);
        let stamp = Stamp { epoch: record.epoch, sequence };
        self.acked.insert(stamp);
        for member in &self.store.in_sync {
            let holds = self.nodes[index(*member)].log.iter().any(|change| change.stamp == stamp);
            assert!(holds, "{stamp:?} is acknowledged and {member:?}, in sync, does not have it");
        }
    }

    /// When an epoch serves, its replicas are equal and have all that was acknowledged.
    fn note_start(&mut self, node: usize) {
        let process = self.nodes[node].process.as_mut().unwrap();
        process.started = true;
        let record = process.head.record().clone();
        let last = process.head.last();
        assert!(self.serving_epochs.insert(record.epoch), "epoch {} starts twice", record.epoch);
        if record != self.store {
            return;
        }
        let first = self.nodes[index(record.in_sync[0])].last();
        assert_eq!(first.sequence, last, "{record:?} {}", self.describe());
        for member in &record.in_sync {
            let of = self.nodes[index(*member)].last();
            assert_eq!(of, first, "epoch {} starts with replicas that differ", record.epoch);
            self.check_content(*member);
        }
        let order: BTreeSet<Stamp> = self.order_to(first).iter().map(|change| change.stamp).collect();
        for stamp in &self.acked {
            assert!(order.contains(stamp), "{stamp:?} was acknowledged and is lost");
        }
    }

    /// For failures.
    fn describe(&self) -> String {
        let node = |node: &Node| {
            let process = node.process.as_ref();
            let own = process.map(|process| (process.head.describe(), format!("{:?}", process.member)));
            format!(
                "promised {}, {:?} after {:?}, filling {}: {own:#?}",
                node.promised,
                node.last(),
                node.base,
                node.filling
            )
        };
        let nodes: Vec<String> = self.nodes.iter().map(node).collect();
        nodes.join("\n")
    }

    /// The order up to this change.
    fn order_to(&self, last: Stamp) -> Vec<ChangeHeader> {
        let mut order = Vec::new();
        let mut stamp = last;
        while stamp != Stamp::default() {
            let change = self.numbered[&stamp];
            stamp = change.previous;
            order.push(change);
        }
        order.reverse();
        order
    }

    /// A replica in sync holds what the order up to its last change makes, block for block.
    fn check_content(&self, member: NodeId) {
        let node = &self.nodes[index(member)];
        assert!(!node.filling, "{member:?} is in sync and half filled");
        let order = self.order_to(node.last());
        let mut content = Content::new();
        order.iter().for_each(|change| apply(&mut content, change));
        assert_eq!(node.content, content, "{member:?} at {:?}", node.last());
        let log: Vec<Stamp> = node.log.iter().map(|change| change.stamp).collect();
        let own = order.iter().map(|change| change.stamp).filter(|stamp| stamp.sequence > node.base.sequence);
        assert!(own.eq(log), "the log of {member:?} has another order");
    }

    /// No head may read while somebody has acknowledged what it does not know.
    fn check_reads(&self) {
        let newest = self.acked.iter().map(|stamp| stamp.sequence).max().unwrap_or(0);
        for node in 0..NODES {
            let Some(process) = &self.nodes[node].process else { continue };
            if process.head.may_read(self.clock(node)) {
                assert!(process.head.committed() >= newest, "node {node} reads what is old");
            }
        }
    }

    fn deliver(&mut self, from: usize, to: usize) {
        let Some((message, cells)) = self.links.get_mut(&(from, to)).and_then(VecDeque::pop_front) else {
            return;
        };
        let now = self.clock(to);
        let process = self.nodes[to].process.as_mut().expect("connections end with the process");
        let sender = id(from);
        match message {
            PeerMessage::Promised { epoch, last, granted_ns } => {
                process.head.promised(now, sender, epoch, last, granted_ns);
            }
            PeerMessage::Ack { epoch, through } => process.head.acked(now, sender, epoch, through),
            PeerMessage::Gap { epoch, last } => process.head.gap(now, sender, epoch, last),
            PeerMessage::Fetched { epoch, change } => {
                process.head.fetched(now, sender, epoch, change);
            }
            PeerMessage::FetchGone { epoch, .. } => process.head.fetch_gone(now, sender, epoch),
            PeerMessage::Leased { epoch, asked_ns, room } => {
                process.head.leased(now, sender, epoch, Moment(asked_ns));
                process.head.granted(now, sender, epoch, Moment(asked_ns), room);
            }
            PeerMessage::Refused { .. } => {}
            PeerMessage::Surplus { fill, block, count, .. } => {
                if process.surplus.0 == fill {
                    process.surplus.1.insert(block, count);
                }
            }
            PeerMessage::Compared { epoch, fill, known } => {
                process.head.compared(now, sender, epoch, fill, known);
            }
            PeerMessage::Filling { epoch, fill } => process.head.filling(now, sender, epoch, fill),
            PeerMessage::Copied { epoch, fill, copies } => {
                process.head.copied(now, sender, epoch, fill, copies);
            }
            PeerMessage::Complete { epoch, fill } => process.head.complete(now, sender, epoch, fill),
            request => self.serve_member(to, from, request, &cells),
        }
        self.settle(to);
    }

    fn serve_member(&mut self, node: usize, from: usize, message: PeerMessage, cells: &[Cell]) {
        let now = self.clock(node);
        let process = self.nodes[node].process.as_mut().unwrap();
        let step = process.member.handle(now, message);
        let told = match (&step, message) {
            (Step::Append, PeerMessage::Change { committed, .. })
            | (Step::Lease { .. }, PeerMessage::Lease { committed, .. }) => committed,
            _ => 0,
        };
        let stored = process.member.durable();
        self.nodes[node].told = self.nodes[node].told.max(told.min(stored));
        let process = self.nodes[node].process.as_mut().unwrap();
        match step {
            Step::Answer(answer) => self.send(node, id(from), answer),
            Step::Compare { fill, base } => self.compare(node, from, fill, base),
            Step::StorePromise(epoch) => process.writing.push_back(Write::Promise(epoch)),
            Step::Append => {
                let PeerMessage::Change { epoch, change, .. } = message else { unreachable!() };
                self.nodes[node].promised_room.spend(epoch, &change);
                let process = self.nodes[node].process.as_mut().unwrap();
                process.writing.push_back(Write::Change(change));
            }
            Step::Fetch(sequence) => {
                let PeerMessage::Fetch { epoch, .. } = message else { unreachable!() };
                let gone = self.random.below(50) == 0 && !self.calm;
                let log = &self.nodes[node].log;
                let found = log.iter().find(|change| change.stamp.sequence == sequence).filter(|_| !gone);
                let answer = match found {
                    Some(change) => PeerMessage::Fetched { epoch, change: *change },
                    None => PeerMessage::FetchGone { epoch, sequence },
                };
                self.send(node, id(from), answer);
            }
            Step::Lease { asked_ns, room } => {
                let epoch = process.member.epoch();
                self.lease(node, from, (epoch, asked_ns), room);
            }
            Step::BeginFill { fill, after, base } => {
                self.nodes[node].promised_room = room::Promised::being_filled();
                let process = self.nodes[node].process.as_mut().unwrap();
                process.writing.push_back(Write::BeginFill(fill, after, base));
            }
            Step::Copy { fill, runs } => {
                let within =
                    |block: u32| runs.iter().any(|(first, count)| (*first..first + count).contains(&block));
                let kept = cells.iter().filter(|(block, _)| within(*block)).copied().collect();
                process.writing.push_back(Write::Copy(fill, kept));
            }
            Step::EndFill { fill } => process.writing.push_back(Write::EndFill(fill)),
            Step::Nothing => {}
            Step::Read | Step::Check | Step::ListChanged => {
                unreachable!("nothing is damaged in these worlds, and heads have replicas")
            }
            Step::Violation => panic!("node {from} sent {message:?}"),
        }
        self.answer_due(node, from);
    }

    fn answer_due(&mut self, node: usize, to: usize) {
        let now = self.clock(node);
        let Some(process) = &mut self.nodes[node].process else { return };
        let member = &mut process.member;
        let due = [member.poll_report(now), member.poll_ack(), member.poll_fill()];
        due.into_iter().flatten().for_each(|answer| self.send(node, id(to), answer));
    }

    fn finish_write(&mut self, node: usize) {
        let Some(write) = self.nodes[node].process.as_mut().and_then(|it| it.writing.pop_front()) else {
            return;
        };
        let process = self.nodes[node].process.as_mut().unwrap();
        match write {
            Write::Change(change) => {
                process.member.appended(change.stamp.sequence);
                apply(&mut self.nodes[node].content, &change);
                self.nodes[node].log.push(change);
            }
            Write::BeginFill(fill, after, common) => {
                process.member.fill_stored(fill);
                let state = &mut self.nodes[node];
                let told = state.told;
                let open = std::mem::take(&mut state.log).into_iter();
                state.surplus.extend(open.filter(|change| change.stamp.sequence > told));
                (state.base, state.filling, state.common) = (after, true, common);
            }
            Write::Copy(fill, cells) => {
                process.member.copy_stored(fill);
                cells.into_iter().for_each(|cell| put(&mut self.nodes[node].content, cell));
            }
            Write::EndFill(fill) => {
                process.member.end_stored(fill);
                self.nodes[node].filling = false;
                self.nodes[node].surplus.clear();
            }
            Write::Promise(epoch) => {
                process.member.promise_stored(epoch);
                self.nodes[node].promised = self.nodes[node].promised.max(epoch);
            }
        }
        // Only the head of the epoch cares; the others ignore it.
        if let Some(head) = self.store.head {
            self.answer_due(node, index(head.node));
        }
    }

    /// The record store carries out a proposal, refuses it, or never hears of it.
    fn decide(&mut self) {
        if self.proposals.is_empty() {
            return;
        }
        let position = self.random.below(self.proposals.len());
        let proposal = self.proposals.swap_remove(position);
        if !self.calm && self.random.below(8) == 0 {
            return;
        }
        if proposal.version == self.store.version + 1 {
            assert!(!proposal.in_sync.is_empty());
            let before = std::mem::replace(&mut self.store, proposal);
            let admitted: Vec<NodeId> =
                self.store.in_sync.iter().filter(|node| !before.is_in_sync(**node)).copied().collect();
            for node in admitted {
                assert!(before.catching_up.contains(&node), "{node:?} was not filled");
                self.check_content(node);
                let order = self.order_to(self.nodes[index(node)].last());
                let has = |stamp: &Stamp| order.iter().any(|change| change.stamp == *stamp);
                assert!(self.acked.iter().all(has), "{node:?} is admitted and lacks what was acknowledged");
                self.admissions += 1;
            }
            assert_eq!(self.store.replicas(), before.replicas(), "a replica is listed once");
        }
        self.news.extend((0..NODES).filter(|node| self.nodes[*node].process.is_some()));
    }

    fn tell(&mut self, node: usize) {
        self.news.remove(&node);
        let now = self.clock(node);
        let connected: Vec<bool> = (0..NODES).map(|to| self.links.contains_key(&(node, to))).collect();
        if let Some(process) = &mut self.nodes[node].process {
            process.head.handle_record(now, &self.store, |to| connected[index(to)]);
        }
        self.settle(node);
    }

    fn pass_time(&mut self, nanoseconds: u64) {
        self.now_ns += nanoseconds;
        for node in 0..NODES {
            let now = self.clock(node);
            let Some(process) = &mut self.nodes[node].process else { continue };
            if process.head.poll_timeout().is_some_and(|moment| moment <= now) {
                process.head.handle_timeout(now);
                let again = process.head.poll_timeout();
                assert!(
                    again.is_none_or(|moment| moment > now),
                    "it has nothing to do and asks at once again"
                );
            }
            self.settle(node);
        }
    }

    fn step(&mut self) {
        let (node, other) = (self.random.below(NODES), self.random.below(NODES));
        match self.random.below(100) {
            0..=39 => self.deliver(node, other),
            40..=57 => self.finish_write(node),
            58..=59 => self.finish_read(node),
            60..=72 => self.submit(node),
            73..=77 => self.decide(),
            78..=84 if self.news.contains(&node) && !self.is_alone(node) => self.tell(node),
            85..=96 => {
                let far = self.random.below(40) == 0;
                let nanoseconds = 1 + self.random.below(if far { 2_000_000_000 } else { 20_000_000 }) as u64;
                self.pass_time(nanoseconds);
            }
            97 if self.random.below(if self.alone.is_some() { 3 } else { 6 }) == 0 => self.take(node),
            98 if node != other && !self.is_alone(node) && !self.is_alone(other) => self.connect(node, other),
            99 if !self.calm => self.harm(node, other),
            _ => {}
        }
        self.check_reads();
    }

    fn take(&mut self, node: usize) {
        let (now, random) = (self.clock(node), self.random.number());
        // A replica that was left out does not try, as far as it knows.
        if let Some(process) = &mut self.nodes[node].process
            && process.head.record().is_in_sync(id(node))
        {
            process.head.take(now, random);
        }
        self.settle(node);
    }

    fn is_alone(&self, node: usize) -> bool {
        self.alone.is_some_and(|(alone, until)| alone == node && self.now_ns < until)
    }

    /// A head is alone without knowing it: others will take over while it believes that it leads.
    fn isolate(&mut self) {
        let Some(head) = self.store.head.map(|head| index(head.node)) else { return };
        self.alone = Some((head, self.now_ns + 4_000_000_000));
        (0..NODES).filter(|other| *other != head).for_each(|other| self.cut(head, other));
    }

    fn harm(&mut self, node: usize, other: usize) {
        match self.random.below(12) {
            10..=11 => self.isolate(),
            0..=1 => self.crash(node),
            2..=6 if self.nodes[node].process.is_none() => self.start(node),
            7..=8 if node != other => self.cut(node, other),
            9 if self.random.below(10) == 0 => (0..NODES).for_each(|node| self.crash(node)),
            _ => {}
        }
    }

    /// All faults end. Somebody must come to serve, with everything that was acknowledged, and go on to.
    fn heal(&mut self) {
        self.calm = true;
        self.alone = None;
        for round in 0..4000 {
            for node in 0..NODES {
                if self.nodes[node].process.is_none() {
                    self.start(node);
                }
                (0..NODES).for_each(|other| self.connect(node, other));
            }
            for _ in 0..60 {
                self.step();
            }
            let served = |node: &usize| {
                self.nodes[*node].process.as_ref().is_some_and(|it| it.started && it.head.is_serving())
            };
            let server = (0..NODES).find(|node| served(node) && id(*node) == self.store.head.unwrap().node);
            if let Some(node) = server
                && self.nodes[node].process.as_ref().unwrap().head.may_read(self.clock(node))
                && (self.store.in_sync.len() == NODES || !self.store.is_in_sync(id(node)))
            {
                return;
            }
            if round % 200 == 199 && server.is_none() {
                self.take(round % NODES);
            }
        }
        let heads: Vec<_> =
            self.nodes.iter().map(|node| node.process.as_ref().unwrap().head.describe()).collect();
        panic!("nobody serves: {heads:#?}\n{:#?}", self.store);
    }
}

fn run(seed: u64, steps: usize) -> (u64, u32, u64) {
    let mut world = World::new(seed);
    world.take(0);
    for _ in 0..steps {
        world.step();
    }
    world.heal();
    (world.commits, world.store.epoch, world.admissions)
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_old_is_read() {
    let seeds = std::env::var("BERTH_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3000);
    let (mut commits, mut epochs, mut admissions) = (0, 0, 0);
    for seed in 0..seeds {
        let outcome = std::panic::catch_unwind(|| run(seed, 4_000));
        let (more, epoch, admitted) = outcome.unwrap_or_else(|_| panic!("seed {seed} fails"));
        (commits, epochs) = (commits + more, epochs + u64::from(epoch));
        admissions += admitted;
    }
    println!("{commits} commits, {epochs} epochs, {admissions} admissions in {seeds} worlds");
    assert!(commits > seeds * 4 && epochs > seeds * 3, "{commits} commits and {epochs} epochs prove little");
    assert!(admissions > seeds / 2, "{admissions} admissions prove little");
}
