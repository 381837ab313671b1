//! The words of replication: nodes, places in a volume's order, and the record that says who holds what.
//!
//! A record changes only by compare-and-swap in the record store, and the store is asked only when membership changes,
//! never for a write (the configuration manager of PacificA, Lin et al., 2008).

use std::fmt;

/// A node of the cluster. The record store gives the number when the node joins, and never gives it again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// A replicated volume. The record store gives the number when the volume is created, and never gives it again; the
/// pools of all its replicas know the volume by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeNumber(pub u32);

/// The place of a change in its volume's order: the epoch first. Sequences ascend by one from change to change and go
/// on through all epochs, so that those of one unbroken order can be compared without their epochs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp {
    /// The epoch whose head numbered the change. 0 only for the beginning of the order.
    pub epoch: u32,
    /// Its number. 0 is before the first change.
    pub sequence: u64,
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.sequence)
    }
}

/// What a change does to its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// New content.
    Data,
    /// They read as zeroes.
    Zero,
    /// They are no longer needed, and read as zeroes.
    Trim,
}

/// The process that takes a volume's reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeadSession {
    /// Its node.
    pub node: NodeId,
    /// Chosen at random when it proposed itself: a restarted process is another head.
    pub session: u64,
}

/// A replica that is not brought up to date now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleReplica {
    /// Where it is.
    pub node: NodeId,
    /// The version of the record that left it out.
    pub since_version: u64,
}

/// Where a started epoch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochEnd {
    /// The epoch.
    pub epoch: u32,
    /// The last sequence of the order when the next epoch started; changes of this epoch beyond it never were.
    pub sequence: u64,
}

/// Ends of epochs that a record keeps: a replica that has missed more is copied whole.
pub const EPOCH_ENDS_KEPT: usize = 64;

/// What the record store keeps of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The volume.
    pub volume: VolumeNumber,
    /// Its name: unique among the volumes that there are.
    pub name: String,
    /// Told at random when it was created, and anew when data was given up by force: replicas of different lineages
    /// have nothing in common.
    pub lineage: [u8; 16],
    /// Size in blocks.
    pub size_blocks: u64,
    /// Rises by one with every change of the record.
    pub version: u64,
    /// Told at random by whoever proposed this version, so that it knows its own when it reads it.
    pub proposal: u64,
    /// Rises by one with every head. 0: there was none yet.
    pub epoch: u32,
    /// Has the epoch begun to serve?
    pub started: bool,
    /// The last epoch that began to serve; 0: none yet.
    pub last_started: u32,
    /// The epoch's head.
    pub head: Option<HeadSession>,
    /// The replicas whose acknowledgement every change needs, ascending.
    pub in_sync: Vec<NodeId>,
    /// Replicas that are being filled, ascending.
    pub catching_up: Vec<NodeId>,
    /// All other replicas, by node.
    pub stale: Vec<StaleReplica>,
    /// Of the last two kinds: those that were added since the volume was made and have not been in sync since, ascending.
    /// Whatever such a node holds of the volume, from an earlier time perhaps, counts for nothing: the ends of epochs that
    /// are kept say nothing of it.
    pub fresh: Vec<NodeId>,
    /// Replicas that are to go, ascending: once enough others are in sync the head takes out those that are, and it fills
    /// none of them.
    pub leaving: Vec<NodeId>,
    /// Replicas that the volume should have in sync.
    pub replicas_wanted: u32,
    /// With fewer replicas in sync nothing is served.
    pub min_in_sync: u32,
    /// Ends of earlier epochs, ascending. An epoch that never started has none.
    pub epoch_ends: Vec<EpochEnd>,
    /// The node where the volume is to be led: no other node takes it, and a head elsewhere lets go of it. Nothing: the
    /// node that a client chooses.
    pub attached: Option<NodeId>,
    /// The last epoch whose head has let go of the volume: it reads nothing more, whatever leave it had.
    pub released: u32,
}

impl Record {
    /// A new volume with empty replicas on these nodes, all in sync.
    ///
    /// # Panics
    /// If there are no nodes, or two are one.
    #[must_use]
    pub fn new(
        volume: VolumeNumber,
        name: &str,
        lineage: [u8; 16],
        size_blocks: u64,
        nodes: &[NodeId],
    ) -> Record {
        let mut in_sync = nodes.to_vec();
        in_sync.sort_unstable();
        in_sync.dedup();
        assert!(!nodes.is_empty() && in_sync.len() == nodes.len(), "replicas on {nodes:?}");
        Record {
            volume,
            name: name.to_owned(),
            lineage,
            size_blocks,
            version: 1,
            proposal: 0,
            epoch: 0,
            started: false,
            last_started: 0,
            head: None,
            min_in_sync: if in_sync.len() >= 3 { 2 } else { 1 },
            in_sync,
            catching_up: Vec::new(),
            stale: Vec::new(),
            fresh: Vec::new(),
            leaving: Vec::new(),
            replicas_wanted: u32::try_from(nodes.len()).expect("a few"),
            epoch_ends: Vec::new(),
            attached: None,
            released: 0,
        }
    }

    /// The head that may be at work: that of the epoch, unless it has let go.
    #[must_use]
    pub fn living_head(&self) -> Option<HeadSession> {
        self.head.filter(|_| self.released < self.epoch)
    }

    /// Does the node that the volume is attached to lead it, in an epoch that has started?
    #[must_use]
    pub fn is_led_as_attached(&self) -> bool {
        let head = self.living_head().filter(|_| self.started).map(|head| head.node);
        head.is_some() && head == self.attached
    }

    /// Has every head that ever served let go, so that nobody reads by an earlier leave?
    #[must_use]
    pub fn is_let_go(&self) -> bool {
        self.released >= self.last_started
    }

    /// Is the node's replica in sync?
    #[must_use]
    pub fn is_in_sync(&self, node: NodeId) -> bool {
        self.in_sync.binary_search(&node).is_ok()
    }

    /// Has the node a replica, in sync or not?
    #[must_use]
    pub fn has_replica(&self, node: NodeId) -> bool {
        self.is_in_sync(node)
            || self.catching_up.binary_search(&node).is_ok()
            || self.stale.binary_search_by_key(&node, |replica| replica.node).is_ok()
    }

    /// Every node that has a replica, ascending.
    #[must_use]
    pub fn replicas(&self) -> Vec<NodeId> {
        let stale = self.stale.iter().map(|replica| replica.node);
        let mut all: Vec<_> = self.in_sync.iter().chain(&self.catching_up).copied().chain(stale).collect();
        all.sort_unstable();
        all
    }

    /// The record with one more replica, which is to be filled from nothing. `proposal` tells this change from every other.
    /// Who is in sync does not change: that is the head's affair.
    ///
    /// # Errors
    /// [`ReplicaError::There`].
    pub fn with_replica(&self, node: NodeId, proposal: u64) -> Result<Record, ReplicaError> {
        if self.has_replica(node) {
            return Err(ReplicaError::There(node));
        }
        let mut next = self.next_version(proposal);
        next.stale.push(StaleReplica { node, since_version: next.version });
        next.stale.sort_by_key(|replica| replica.node);
        next.fresh.push(node);
        next.fresh.sort_unstable();
        Ok(next)
    }

    /// The record without a replica that is not in sync.
    ///
    /// # Errors
    /// [`ReplicaError::InSync`], [`ReplicaError::NotThere`].
    pub fn without_replica(&self, node: NodeId, proposal: u64) -> Result<Record, ReplicaError> {
        if self.is_in_sync(node) {
            return Err(ReplicaError::InSync(node));
        }
        if !self.has_replica(node) {
            return Err(ReplicaError::NotThere(node));
        }
        let mut next = self.next_version(proposal);
        next.stale.retain(|replica| replica.node != node);
        next.catching_up.retain(|other| *other != node);
        next.fresh.retain(|other| *other != node);
        next.leaving.retain(|other| *other != node);
        Ok(next)
    }

    /// The record in which the node's replica is to go, or is not any more. The same record if it says so already.
    ///
    /// # Errors
    /// [`ReplicaError::NotThere`].
    pub fn with_leaving(&self, node: NodeId, leaves: bool, proposal: u64) -> Result<Record, ReplicaError> {
        if !self.has_replica(node) {
            return Err(ReplicaError::NotThere(node));
        }
        if self.leaving.contains(&node) == leaves {
            return Ok(self.clone());
        }
        let mut next = self.next_version(proposal);
        next.leaving.retain(|other| *other != node);
        if leaves {
            next.leaving.push(node);
            next.leaving.sort_unstable();
        }
        Ok(next)
    }

    /// Replicas in sync that stay.
    pub fn staying(&self) -> impl Iterator<Item = NodeId> {
        self.in_sync.iter().copied().filter(|node| !self.leaving.contains(node))
    }

    /// The record of the volume attached to this node, or to none. The head is not changed by that: it lets go by itself.
    #[must_use]
    pub fn with_attached(&self, node: Option<NodeId>, proposal: u64) -> Record {
        Record { attached: node, ..self.next_version(proposal) }
    }

    fn next_version(&self, proposal: u64) -> Record {
        Record { version: self.version + 1, proposal, ..self.clone() }
    }

    /// The last change that a replica surely has in common with the volume's order, if `last` is its own last change, or,
    /// where it was being filled, what it had in common then. Nothing: [`Stamp::default`].
    ///
    /// Where an epoch from the replica's own on has ended before the replica did, all it has beyond that end is of no
    /// order. A replica that is not in sync was so when the ends that are recorded began to be, unless they were too many
    /// to keep.
    #[must_use]
    pub fn common_point(&self, last: Stamp) -> Stamp {
        let oldest = self.epoch_ends.first().map_or(0, |end| end.epoch);
        if self.epoch_ends.len() >= EPOCH_ENDS_KEPT && last.epoch < oldest {
            return Stamp::default();
        }
        let ends = self.epoch_ends.iter().filter(|end| end.epoch >= last.epoch);
        match ends.min_by_key(|end| end.sequence) {
            Some(end) if end.sequence < last.sequence => Stamp { epoch: end.epoch, sequence: end.sequence },
            _ => last,
        }
    }

    /// The last sequence of an epoch, if it served and has ended.
    #[must_use]
    pub fn end_of(&self, epoch: u32) -> Option<u64> {
        self.epoch_ends.iter().find(|end| end.epoch == epoch).map(|end| end.sequence)
    }
}

/// Why a replica is not added or taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplicaError {
    /// It has one.
    #[error("{0:?} has a replica of the volume already")]
    There(NodeId),
    /// It has none.
    #[error("{0:?} has no replica of the volume")]
    NotThere(NodeId),
    /// Only the head may change who is in sync.
    #[error("the replica on {0:?} is in sync")]
    InSync(NodeId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_is_added_is_fresh_and_one_in_sync_stays() {
        let record = Record::new(VolumeNumber(7), "data", [1; 16], 100, &[NodeId(1), NodeId(3)]);
        assert_eq!(record.replicas_wanted, 2);
        let more = record.with_replica(NodeId(2), 5).expect("it has none");
        let stale = StaleReplica { node: NodeId(2), since_version: 2 };
        assert_eq!(
            (more.version, more.proposal, &more.fresh[..], &more.stale[..]),
            (2, 5, &[NodeId(2)][..], &[stale][..])
        );
        assert_eq!((&more.in_sync, more.replicas_wanted), (&record.in_sync, 2));
        assert_eq!([1, 2, 3, 4].map(|node| more.has_replica(NodeId(node))), [true, true, true, false]);
        let filled = Record { stale: Vec::new(), catching_up: vec![NodeId(2)], ..more.clone() };
        assert_eq!([2, 4].map(|node| filled.has_replica(NodeId(node))), [true, false]);
        assert_eq!(more.with_replica(NodeId(3), 6), Err(ReplicaError::There(NodeId(3))));
        assert_eq!(more.without_replica(NodeId(3), 6), Err(ReplicaError::InSync(NodeId(3))));
        assert_eq!(more.without_replica(NodeId(4), 6), Err(ReplicaError::NotThere(NodeId(4))));
        let less = more.without_replica(NodeId(2), 6).expect("not in sync");
        assert_eq!(less, Record { version: 3, proposal: 6, ..record });
    }

    #[test]
    fn a_replica_that_is_to_go_is_marked_until_it_is_gone() {
        let record = Record::new(VolumeNumber(7), "data", [1; 16], 100, &[NodeId(1), NodeId(3)]);
        let leaving = record.with_leaving(NodeId(3), true, 5).expect("it is there");
        assert_eq!((leaving.version, &leaving.leaving[..]), (2, &[NodeId(3)][..]));
        assert_eq!(leaving.staying().collect::<Vec<_>>(), [NodeId(1)]);
        assert_eq!(leaving.with_leaving(NodeId(3), true, 6).as_ref(), Ok(&leaving), "again");
        assert_eq!(record.with_leaving(NodeId(4), true, 6), Err(ReplicaError::NotThere(NodeId(4))));
        let stays = leaving.with_leaving(NodeId(3), false, 6).expect("it is there");
        assert_eq!(stays, Record { version: 3, proposal: 6, ..record });
        let mut out = leaving;
        out.in_sync.pop();
        out.stale.push(StaleReplica { node: NodeId(3), since_version: 2 });
        assert_eq!(out.without_replica(NodeId(3), 7).expect("not in sync").leaving, []);
    }

    #[test]
    fn a_new_record_knows_its_replicas() {
        let record = Record::new(VolumeNumber(7), "data", [1; 16], 100, &[NodeId(3), NodeId(1), NodeId(2)]);
        assert_eq!(record.in_sync, [NodeId(1), NodeId(2), NodeId(3)]);
        assert_eq!((record.min_in_sync, record.epoch, record.started), (2, 0, false));
        assert!(record.is_in_sync(NodeId(2)) && !record.is_in_sync(NodeId(4)));
        assert_eq!(record.replicas(), record.in_sync);
    }

    #[test]
    fn what_is_common_ends_where_an_epoch_did() {
        let stamp = |epoch, sequence| Stamp { epoch, sequence };
        let mut record = Record::new(VolumeNumber(7), "data", [1; 16], 100, &[NodeId(1), NodeId(2)]);
        assert_eq!(record.common_point(stamp(3, 9)), stamp(3, 9), "the epoch goes on");
        let end = |epoch, sequence| EpochEnd { epoch, sequence };
        record.epoch_ends = vec![end(2, 10), end(5, 20), end(6, 20)];
        assert_eq!(record.common_point(stamp(2, 8)), stamp(2, 8));
        assert_eq!(record.common_point(stamp(2, 13)), stamp(2, 10));
        assert_eq!(record.common_point(stamp(1, 13)), stamp(2, 10));
        // A failed attempt at epoch 3 left nothing; the surplus is of epoch 2 all the same.
        assert_eq!(record.common_point(stamp(4, 21)), stamp(5, 20));
        assert_eq!(record.common_point(stamp(7, 30)), stamp(7, 30));
        record.epoch_ends = (0..64).map(|index| end(10 + index, 100 + u64::from(index))).collect();
        assert_eq!(record.common_point(stamp(9, 50)), stamp(0, 0), "older than what is known");
        assert_eq!(record.common_point(stamp(10, 50)), stamp(10, 50));
    }

    #[test]
    fn stamps_order_by_epoch_first() {
        let stamp = |epoch, sequence| Stamp { epoch, sequence };
        assert!(stamp(2, 1) > stamp(1, 9) && stamp(1, 9) > stamp(1, 8) && stamp(0, 0) == Stamp::default());
    }
}
