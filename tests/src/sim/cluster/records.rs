//! The record store: compare-and-swap, and rules that no correct head breaks.

use datapath::record::{NodeId, Record};

/// Records by volume, and what is true of them over time.
#[derive(Debug)]
pub(super) struct Records {
    records: Vec<Record>,
    /// Changes that took effect.
    pub(super) accepted: u64,
    /// Members that were left out.
    pub(super) removals: u64,
    pub(super) admissions: u64,
    /// Epochs that started.
    pub(super) started: u64,
    /// Replicas that somebody added or took out.
    pub(super) replaced: u64,
    /// Epochs whose heads let go of them.
    pub(super) released: u64,
    /// Replicas that were to go and are in sync no more.
    pub(super) left: u64,
    /// Epochs that started on a node without a replica in sync.
    pub(super) remote_heads: u64,
}

impl Records {
    pub(super) fn new(records: Vec<Record>) -> Records {
        Records {
            records,
            accepted: 0,
            removals: 0,
            admissions: 0,
            started: 0,
            replaced: 0,
            released: 0,
            left: 0,
            remote_heads: 0,
        }
    }

    pub(super) fn get(&self, volume: usize) -> &Record {
        &self.records[volume]
    }

    pub(super) fn all(&self) -> &[Record] {
        &self.records
    }

    /// Somebody adds a replica, or takes one out, that is not in sync.
    pub(super) fn replace(&mut self, volume: usize, record: Record) {
        let present = &self.records[volume];
        assert_eq!((record.version, &record.in_sync), (present.version + 1, &present.in_sync));
        self.accepted += 1;
        self.replaced += 1;
        self.records[volume] = record;
    }

    /// Somebody attaches the volume to a node, or to none.
    pub(super) fn attach(&mut self, volume: usize, node: Option<NodeId>, proposal: u64) -> Record {
        let next = self.records[volume].with_attached(node, proposal);
        self.accepted += 1;
        self.records[volume] = next.clone();
        next
    }

    /// A proposal has arrived: it takes effect if it replaces the present record. Says whether it did.
    pub(super) fn propose(&mut self, volume: usize, proposed: &Record) -> bool {
        let present = &self.records[volume];
        if proposed.version != present.version + 1 {
            return false;
        }
        assert_succession(present, proposed);
        self.accepted += 1;
        let (before, after) = (present.in_sync.len(), proposed.in_sync.len());
        let left =
            present.leaving.iter().filter(|node| present.is_in_sync(**node) && !proposed.is_in_sync(**node));
        self.left += left.count() as u64;
        self.removals += before.saturating_sub(after) as u64;
        self.admissions += after.saturating_sub(before) as u64;
        self.released += u64::from(proposed.released != present.released);
        let starts = proposed.started && proposed.epoch != present.last_started;
        let is_remote = proposed.head.is_some_and(|head| !proposed.is_in_sync(head.node));
        self.started += u64::from(starts);
        self.remote_heads += u64::from(starts && is_remote);
        self.records[volume] = proposed.clone();
        true
    }
}

/// A store refuses what breaks these rules; a head that is correct never tries.
fn assert_succession(present: &Record, proposed: &Record) {
    let what = || format!("{proposed:#?}\nshould replace\n{present:#?}");
    assert_eq!(
        (present.volume, &present.name, present.lineage, present.size_blocks, present.min_in_sync),
        (proposed.volume, &proposed.name, proposed.lineage, proposed.size_blocks, proposed.min_in_sync),
        "what a volume is never changes"
    );
    let (from, to) = (present.epoch, proposed.epoch);
    assert!(to == from || to == from + 1, "epochs rise by one: {}", what());
    if to == from {
        assert_eq!(present.head, proposed.head, "an epoch has one head: {}", what());
        assert!(proposed.started || !present.started, "a started epoch stays so: {}", what());
    } else {
        assert!(!proposed.started, "an epoch opens before it starts: {}", what());
        assert_eq!(present.in_sync, proposed.in_sync, "opening an epoch leaves nobody out: {}", what());
    }
    assert_eq!(present.leaving, proposed.leaving, "heads do not say who is to go: {}", what());
    assert_eq!(present.attached, proposed.attached, "heads do not say where they ought to be: {}", what());
    if proposed.released != present.released {
        assert!(to == from && present.started && proposed.released == to, "let go of nothing: {}", what());
    }
    if to == from && to > 0 && present.living_head().is_none() {
        assert_eq!(present.in_sync, proposed.in_sync, "nobody leads: {}", what());
    }
    let last_started = if proposed.started { to } else { present.last_started };
    assert_eq!(proposed.last_started, last_started, "{}", what());
    assert!(!proposed.in_sync.is_empty(), "the last replica is never removed: {}", what());
    let fewest = proposed.min_in_sync as usize;
    assert!(
        proposed.in_sync.len() >= fewest || proposed.in_sync.len() == present.in_sync.len(),
        "fewer than min_in_sync: {}",
        what()
    );
    let ascending = |nodes: &[NodeId]| nodes.windows(2).all(|pair| pair[0] < pair[1]);
    assert!(ascending(&proposed.in_sync) && ascending(&proposed.catching_up), "{}", what());
    for joiner in proposed.in_sync.iter().filter(|node| !present.is_in_sync(**node)) {
        let was_filled = to == from && present.started && present.catching_up.contains(joiner);
        assert!(was_filled, "{joiner:?} comes back without having been filled: {}", what());
    }
    assert_eq!(present.replicas(), proposed.replicas(), "every replica is somewhere: {}", what());
    let trusted =
        present.fresh.iter().filter(|node| !proposed.fresh.contains(node) && !proposed.is_in_sync(**node));
    assert_eq!(trusted.count(), 0, "fresh until in sync: {}", what());
    assert!(proposed.fresh.iter().all(|node| present.fresh.contains(node)), "{}", what());
    let ends = &proposed.epoch_ends;
    assert!(ends.windows(2).all(|pair| pair[0].epoch < pair[1].epoch), "{}", what());
    assert!(ends.windows(2).all(|pair| pair[0].sequence <= pair[1].sequence), "{}", what());
    assert!(ends.iter().all(|end| end.epoch < to), "the end of an epoch that goes on: {}", what());
}
