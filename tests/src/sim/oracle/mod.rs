//! What a volume may answer: a model that is too simple to be wrong.
//!
//! For every 512-byte sector the oracle keeps the *changes* (writes, zeroes, trims) that it may still show. The
//! contents of writes are unique, so a read tells which change it saw. Time is a counter of the calls made
//! here: a change has a `start` and is *closed* when it was answered, or when a crash made sure that it will
//! never happen later. Everything is inferred from three facts about one sector:
//!
//! - A change that took effect is over every change that was surely applied before it started.
//! - A read shows the last change before some point between its start and its end. Whatever was surely
//!   applied before the read started is therefore under what it saw.
//! - A read may not show a change that was known to be under another one before the read started.
//!
//! The inferences are sound and not complete: the oracle never blames a correct store, and what it lets pass
//! in one run (a wrong order of two concurrent writes that nobody read) another seed sees.
//!
//! A **kill** changes nothing but that open changes are closed: what was answered stays. A **power cut** takes
//! back, under the `device` policy, all that no flush or FUA covered: changes that were under an unflushed one
//! may come back. The first read of a sector after a crash decides what the crash left, for good.

pub mod stamp;

use std::collections::BTreeSet;

use self::stamp::Content;
use super::disk::SECTOR_BYTES;
use crate::to_usize;

const NEVER: u64 = u64::MAX;
const SECTOR_BYTES_U64: u64 = SECTOR_BYTES as u64;
const BLOCK_BYTES: u64 = 4096;
/// A sector's list is searched for dead changes once it is this long.
const NODES_BEFORE_PRUNING: usize = 8;

/// What the store promises.
#[derive(Clone, Copy, Debug)]
pub struct Promises {
    /// Everything acknowledged survives a power cut (`durable`), not only what was flushed (`device`).
    pub durable_acks: bool,
    /// A write of whole blocks that crosses no multiple of this is applied wholly or not at all by a crash; 0 if
    /// nothing is promised.
    pub atomic_window_bytes: u64,
}

/// How the process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process died; the disk kept what it had.
    Kill,
    /// The disk lost what was not synced.
    PowerCut,
}

/// A change's number. The content of writes is made from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChangeId(pub u32);

/// When a read or a flush began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Start(u64);

/// What a change does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// Fills it with [`stamp`]s.
    Write,
    /// Zeroes all of it.
    Zero,
    /// Zeroes the whole blocks in it; the rest is zeroed or not.
    Trim,
}

/// How a change was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success.
    Done,
    /// An error that leaves the range old or new, sector by sector, from now on.
    Refused,
    /// An error after which a part may still surface when the store recovers.
    Failed,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    kind: ChangeKind,
    offset_bytes: u64,
    length_bytes: u64,
    start: u64,
    closed: u64,
    life: u32,
    fua: bool,
    acked: bool,
    durable: bool,
    /// Not acknowledged when a crash came, and promised to be whole or absent after it.
    atomic: bool,
    /// A read after the crash found it.
    found: bool,
    /// A read after the crash found something that it would have covered.
    missed: bool,
}

/// A change as one sector sees it.
#[derive(Clone, Copy, Debug)]
struct Node {
    change: u32,
    /// End of the first read that showed it here.
    observed: u64,
    /// When it was known to be under another change.
    superseded: u64,
    /// It was found after a crash, and recovery had made it stable.
    durable: bool,
    /// It may leave this sector alone (the edge of a trim).
    optional: bool,
}

/// See the module's description.
#[derive(Debug)]
pub struct Oracle {
    volume: u32,
    promises: Promises,
    now: u64,
    life: u32,
    /// Number 0 is the zeroes that a volume begins with.
    changes: Vec<Change>,
    /// Per sector. An empty list stands for number 0 alone.
    sectors: Vec<Vec<Node>>,
    /// Changes that are not closed.
    open: Vec<u32>,
    /// Acknowledged changes that no flush has covered.
    unflushed: Vec<u32>,
    /// Starts of the reads under way.
    reads: BTreeSet<u64>,
    genuine_only: bool,
}

const FIRST_NODE: Node = Node { change: 0, observed: 0, superseded: NEVER, durable: true, optional: false };

impl Oracle {
    /// A volume of zeroes.
    #[must_use]
    pub fn new(volume: u32, size_bytes: u64, promises: Promises) -> Oracle {
        let zeroes = Change {
            kind: ChangeKind::Zero,
            offset_bytes: 0,
            length_bytes: size_bytes,
            start: 0,
            closed: 0,
            life: 0,
            fua: true,
            acked: true,
            durable: true,
            atomic: false,
            found: false,
            missed: false,
        };
        Oracle {
            volume,
            promises,
            now: 1,
            life: 0,
            changes: vec![zeroes],
            sectors: vec![Vec::new(); to_usize(size_bytes / SECTOR_BYTES_U64)],
            open: Vec::new(),
            unflushed: Vec::new(),
            reads: BTreeSet::new(),
            genuine_only: false,
        }
    }

    /// From now on only asks that what is read was once written there. For faults that a single replica
    /// cannot notice.
    pub fn expect_only_genuine_data(&mut self) {
        self.genuine_only = true;
    }

    /// A client sends a change. Ranges are whole sectors.
    pub fn begin_change(
        &mut self,
        kind: ChangeKind,
        offset_bytes: u64,
        length_bytes: u64,
        fua: bool,
    ) -> ChangeId {
        assert!(
            offset_bytes.is_multiple_of(SECTOR_BYTES_U64) && length_bytes.is_multiple_of(SECTOR_BYTES_U64)
        );
        let start = self.tick();
        let id = u32::try_from(self.changes.len()).expect("fewer than 2^32 changes");
        let aligned = (offset_bytes | length_bytes).is_multiple_of(BLOCK_BYTES);
        let window = self.promises.atomic_window_bytes;
        let fits = |window: u64| offset_bytes % window + length_bytes <= window;
        let atomic = kind == ChangeKind::Write && aligned && window > 0 && fits(window);
        self.changes.push(Change {
            kind,
            offset_bytes,
            length_bytes,
            start,
            closed: NEVER,
            life: self.life,
            fua,
            acked: false,
            durable: false,
            atomic,
            found: false,
            missed: false,
        });
        self.open.push(id);
        let whole =
            offset_bytes.next_multiple_of(BLOCK_BYTES)..(offset_bytes + length_bytes) & !(BLOCK_BYTES - 1);
        for sector in sectors_of(offset_bytes, length_bytes) {
            let optional = kind == ChangeKind::Trim && !whole.contains(&(sector as u64 * SECTOR_BYTES_U64));
            self.prune(sector);
            let nodes = &mut self.sectors[sector];
            if nodes.is_empty() {
                nodes.push(FIRST_NODE);
            }
            nodes.push(Node { change: id, observed: NEVER, superseded: NEVER, durable: false, optional });
        }
        ChangeId(id)
    }

    /// The client has the answer to a change.
    pub fn finish_change(&mut self, id: ChangeId, answer: Answer) {
        let now = self.tick();
        let change = &mut self.changes[id.0 as usize];
        if answer == Answer::Failed {
            // Stays open: what the device did with it is known only after a crash and recovery.
            change.atomic = false;
            return;
        }
        change.closed = now;
        change.atomic = false;
        self.open.retain(|open| *open != id.0);
        if answer == Answer::Refused {
            return;
        }
        change.acked = true;
        change.durable = change.fua || self.promises.durable_acks;
        if !change.durable {
            self.unflushed.push(id.0);
        }
        let (start, range) = (change.start, sectors_of(change.offset_bytes, change.length_bytes));
        for sector in range {
            let nodes = &mut self.sectors[sector];
            let optional = nodes.iter().any(|node| node.change == id.0 && node.optional);
            if !optional {
                supersede_before(nodes, &self.changes, start, id.0, now);
            }
        }
    }

    /// Nobody will hear of a change any more, and from now on it has taken effect or never will, sector by sector.
    pub fn close_change(&mut self, id: ChangeId) {
        let now = self.tick();
        if let Some(position) = self.open.iter().position(|open| *open == id.0) {
            self.open.swap_remove(position);
            let change = &mut self.changes[id.0 as usize];
            (change.closed, change.atomic) = (now, false);
        }
    }

    /// A client sends a flush.
    pub fn begin_flush(&mut self) -> Start {
        Start(self.tick())
    }

    /// A flush succeeded: what was acknowledged before it started is safe.
    pub fn finish_flush(&mut self, start: Start) {
        self.tick();
        let changes = &mut self.changes;
        self.unflushed.retain(|id| {
            let change = &mut changes[*id as usize];
            change.durable = change.closed < start.0;
            !change.durable
        });
    }

    /// A client sends a read, or asks for the status of blocks.
    pub fn begin_read(&mut self) -> Start {
        let start = self.tick();
        self.reads.insert(start);
        Start(start)
    }

    /// A read was answered with an error, or never will be.
    pub fn abandon_read(&mut self, start: Start) {
        self.reads.remove(&start.0);
    }

    /// A read was answered with `bytes`.
    ///
    /// # Panics
    /// If it should not have been.
    pub fn finish_read(&mut self, start: Start, offset_bytes: u64, bytes: &[u8]) {
        let now = self.tick();
        let mut position = 0;
        while position < bytes.len() {
            let at = offset_bytes + position as u64;
            let sector = to_usize(at / SECTOR_BYTES_U64);
            let inner = to_usize(at % SECTOR_BYTES_U64);
            let len = (SECTOR_BYTES - inner).min(bytes.len() - position);
            let part = &bytes[position..position + len];
            if len == SECTOR_BYTES {
                let content = stamp::recognise(part, self.volume, sector as u64);
                self.check_content(start.0, now, sector, content);
            } else {
                self.check_part(start.0, sector, inner, part);
            }
            position += len;
        }
        self.reads.remove(&start.0);
    }

    /// A status answer said that a range reads as zeroes. The question stays open until
    /// [`Oracle::abandon_read`].
    ///
    /// # Panics
    /// If it does not.
    pub fn check_zeroes(&mut self, start: Start, offset_bytes: u64, length_bytes: u64) {
        let now = self.tick();
        let first = to_usize(offset_bytes.div_ceil(SECTOR_BYTES_U64));
        for sector in first..to_usize((offset_bytes + length_bytes) / SECTOR_BYTES_U64) {
            self.check_content(start.0, now, sector, Content::Zero);
        }
    }

    /// The engine said that it is drained: what it acknowledged is safe on the devices.
    pub fn drain(&mut self) {
        for id in std::mem::take(&mut self.unflushed) {
            self.changes[id as usize].durable = true;
        }
    }

    /// The process ended. No request of it will ever be answered or carried out any more.
    pub fn crash(&mut self, crash: Crash) {
        let now = self.tick();
        self.life += 1;
        for id in std::mem::take(&mut self.open) {
            self.changes[id as usize].closed = now;
        }
        self.reads.clear();
        if crash == Crash::Kill || self.promises.durable_acks {
            return;
        }
        self.unflushed.clear();
        for nodes in self.sectors.iter_mut().filter(|nodes| nodes.len() > 1) {
            let all = nodes.clone();
            for node in nodes {
                if !is_doomed(node, &all, &self.changes) {
                    node.superseded = NEVER;
                }
            }
        }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Drops the changes that no read under way and no crash can show any more.
    fn prune(&mut self, sector: usize) {
        let nodes = &mut self.sectors[sector];
        if nodes.len() < NODES_BEFORE_PRUNING {
            return;
        }
        let oldest_read = self.reads.first().copied().unwrap_or(NEVER);
        let all = nodes.clone();
        nodes.retain(|node| node.superseded >= oldest_read || !is_doomed(node, &all, &self.changes));
    }

    fn check_content(&mut self, read_start: u64, now: u64, sector: usize, content: Content) {
        if self.genuine_only {
            return self.check_genuine(sector, content);
        }
        if self.sectors[sector].is_empty() {
            assert!(content == Content::Zero, "{}", self.complaint(sector, content, "was never written"));
            return;
        }
        match content {
            Content::Garbage => panic!("{}", self.complaint(sector, content, "holds what nobody wrote")),
            Content::Write(id) => {
                let node = self.sectors[sector].iter().find(|node| node.change == id);
                let fresh = node.is_some_and(|node| node.superseded > read_start);
                assert!(fresh, "{}", self.complaint(sector, content, "is older than allowed"));
                self.conclude(sector, read_start, now, id);
            }
            Content::Zero => self.check_zero(sector, read_start, now),
        }
    }

    fn check_zero(&mut self, sector: usize, read_start: u64, now: u64) {
        let (changes, life) = (&self.changes, self.life);
        let is_zero = |node: &Node| changes[node.change as usize].kind != ChangeKind::Write;
        let mut candidates =
            self.sectors[sector].iter().filter(|node| is_zero(node) && node.superseded > read_start);
        let Some(first) = candidates.next().map(|node| node.change) else {
            panic!("{}", self.complaint(sector, Content::Zero, "lost its data"));
        };
        if candidates.next().is_none() {
            return self.conclude(sector, read_start, now, first);
        }
        // Several changes could have left these zeroes. Where all of them are from before the last crash it
        // does not matter which it was; else only the writes that are surely under one of them are judged.
        let old = |node: &Node| changes[node.change as usize].life < life;
        let nodes = &mut self.sectors[sector];
        if nodes.iter().all(|node| !is_zero(node) || node.superseded <= read_start || old(node)) {
            return self.settle_zero(sector, read_start);
        }
        for node in nodes {
            if !is_zero(node) && applied(node, changes) < read_start {
                node.superseded = node.superseded.min(now);
            }
        }
    }

    /// A read showed that `seen` is on top.
    fn conclude(&mut self, sector: usize, read_start: u64, now: u64, seen: u32) {
        let seen_change = self.changes[seen as usize];
        if seen_change.life < self.life {
            self.settle(sector, seen);
        }
        let nodes = &mut self.sectors[sector];
        for node in nodes.iter_mut() {
            if node.change == seen {
                node.observed = node.observed.min(now);
            } else if applied(node, &self.changes) < read_start {
                node.superseded = node.superseded.min(now);
            }
        }
        supersede_before(nodes, &self.changes, seen_change.start, seen, now);
    }

    /// A read after a crash showed `seen`, which is from before: of all that could have survived in this
    /// sector, this did, and recovery has made it stable.
    fn settle(&mut self, sector: usize, seen: u32) {
        let nodes = std::mem::take(&mut self.sectors[sector]);
        let life = self.life;
        let is_old = |changes: &[Change], node: &Node| changes[node.change as usize].life < life;
        if nodes.iter().filter(|node| is_old(&self.changes, node)).count() > 1 {
            let seen_node = nodes.iter().find(|node| node.change == seen).expect("it was found");
            let seen_applied = applied(seen_node, &self.changes);
            self.changes[seen as usize].found = true;
            self.note_missed(sector, &nodes, seen, seen_applied);
            self.assert_atomic(sector, seen);
        }
        let changes = &self.changes;
        let mut kept = nodes;
        kept.retain(|node| node.change == seen || !is_old(changes, node));
        for node in &mut kept {
            node.durable |= node.change == seen;
        }
        self.sectors[sector] = kept;
    }

    /// Like [`Oracle::settle`] where several changes from before the crash could have left the zeroes seen.
    fn settle_zero(&mut self, sector: usize, read_start: u64) {
        let nodes = std::mem::take(&mut self.sectors[sector]);
        let last = nodes
            .iter()
            .filter(|node| self.changes[node.change as usize].kind != ChangeKind::Write)
            .filter(|node| node.superseded > read_start)
            .map(|node| applied(node, &self.changes))
            .max()
            .expect("there are candidates");
        self.note_missed(sector, &nodes, 0, last);
        let (changes, life) = (&self.changes, self.life);
        let mut kept = nodes;
        kept.retain(|node| changes[node.change as usize].life >= life);
        kept.insert(0, FIRST_NODE);
        self.sectors[sector] = kept;
    }

    /// What was seen was surely applied (at `seen_applied`) before some unacknowledged changes started, so
    /// these did not happen here.
    fn note_missed(&mut self, sector: usize, nodes: &[Node], seen: u32, seen_applied: u64) {
        for node in nodes {
            let change = &mut self.changes[node.change as usize];
            if node.change != seen && change.life < self.life && seen_applied < change.start {
                change.missed = true;
                self.assert_atomic(sector, node.change);
            }
        }
    }

    fn assert_atomic(&self, sector: usize, id: u32) {
        let change = &self.changes[id as usize];
        assert!(
            !(change.atomic && change.found && change.missed),
            "volume {} sector {sector}: write {id} survived a crash in part: {change:?}",
            self.volume
        );
    }

    /// Compares a part of a sector with everything it may hold.
    fn check_part(&self, read_start: u64, sector: usize, inner: usize, part: &[u8]) {
        if self.genuine_only {
            return;
        }
        let mut expected = [0; SECTOR_BYTES];
        let mut matches = |node: &Node| {
            expected.fill(0);
            if self.changes[node.change as usize].kind == ChangeKind::Write {
                stamp::fill(&mut expected, self.volume, node.change, sector as u64);
            }
            node.superseded > read_start && expected[inner..inner + part.len()] == *part
        };
        let nodes = &self.sectors[sector];
        let good = if nodes.is_empty() { matches(&FIRST_NODE) } else { nodes.iter().any(matches) };
        assert!(good, "{}", self.complaint(sector, Content::Garbage, "does not match in part"));
    }

    fn check_genuine(&self, sector: usize, content: Content) {
        let genuine = match content {
            Content::Zero => true,
            Content::Garbage => false,
            Content::Write(id) => self.changes.get(id as usize).is_some_and(|change| {
                change.kind == ChangeKind::Write
                    && sectors_of(change.offset_bytes, change.length_bytes).contains(&sector)
            }),
        };
        assert!(genuine, "{}", self.complaint(sector, content, "was never like this"));
    }

    #[cold]
    fn complaint(&self, sector: usize, content: Content, what: &str) -> String {
        use std::fmt::Write;
        let mut text = format!(
            "volume {} sector {sector} (byte {}) {what}: read {content:?} at {}, life {}",
            self.volume,
            sector as u64 * SECTOR_BYTES_U64,
            self.now,
            self.life
        );
        if let Content::Write(id) = content {
            write!(text, "\n  read:  {:?}", self.changes.get(id as usize)).expect("a string takes all");
        }
        for node in &self.sectors[sector] {
            write!(text, "\n  knows: {node:?} {:?}", self.changes[node.change as usize]).expect("a string");
        }
        text
    }
}

/// When the change was surely applied to this sector, if it ever was.
fn applied(node: &Node, changes: &[Change]) -> u64 {
    node.observed.min(changes[node.change as usize].closed)
}

/// A change that started at `start` is in effect: what was applied before is under it.
fn supersede_before(nodes: &mut [Node], changes: &[Change], start: u64, id: u32, now: u64) {
    for node in nodes {
        if node.change != id && applied(node, changes) < start {
            node.superseded = node.superseded.min(now);
        }
    }
}

/// Is the change under one that no crash can take back?
fn is_doomed(node: &Node, all: &[Node], changes: &[Change]) -> bool {
    all.iter().any(|other| {
        let change = &changes[other.change as usize];
        let safe = (change.durable || other.durable) && !other.optional;
        safe && other.change != node.change && applied(node, changes) < change.start
    })
}

fn sectors_of(offset_bytes: u64, length_bytes: u64) -> std::ops::Range<usize> {
    to_usize(offset_bytes / SECTOR_BYTES_U64)..to_usize((offset_bytes + length_bytes) / SECTOR_BYTES_U64)
}

#[cfg(test)]
mod tests;
