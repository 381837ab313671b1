//! Where the records of all volumes are kept, and the register of nodes: a trait with a backend for each store.
//!
//! A backend gives: every change is on stable media before the call returns, calls seem to happen one at a time, and
//! numbers never repeat. What a change may do to a record is the same for all of them ([`rules`]).

pub mod redb;
pub mod rules;
#[cfg(test)]
mod suite;

use std::fmt;

use datapath::record::{NodeId, Record, VolumeNumber};
use nbd_server::control::convert::{MessageError, NodeFacts, NodeInfo, PassHistory};
use nbd_server::node_name::NodeName;
use nbd_server::volume_name::VolumeName;
use thiserror::Error;

use rules::RuleError;

/// What a node tells of itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joining {
    /// Its name, which stays.
    pub name: NodeName,
    /// Chosen at random when its process started.
    pub boot: u64,
    /// Where NBD clients come in, as `HOST:PORT`.
    pub nbd: Option<String>,
    /// Where other nodes come in, as `HOST:PORT`.
    pub peer: String,
    /// What placement goes by.
    pub facts: NodeFacts,
}

/// A volume to be made. The store gives it a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    /// Its name.
    pub name: VolumeName,
    /// Random.
    pub lineage: [u8; 16],
    /// Size in blocks.
    pub size_blocks: u64,
    /// Nodes of its replicas, by name.
    pub on: Vec<NodeName>,
    /// With fewer replicas in sync nothing is served; without it, what [`Record::new`] chooses.
    pub min_in_sync: Option<u32>,
}

/// What has changed, after it was made safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A record is new, or has a new version.
    Record(Box<Record>),
    /// A volume was deleted.
    Gone(VolumeNumber),
    /// All nodes, by number, because one is new or has changed.
    Nodes(Vec<NodeInfo>),
}

/// Is told of changes, in the order in which they happened. It must not call the store.
pub type Listener = Box<dyn Fn(Change) + Send + Sync>;

/// Why the store did not do something. Except for [`StoreError::Backend`], nothing has changed.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The record has another version. Boxed, because it is much larger than the others.
    #[error("the record is at version {}", .0.version)]
    Conflict(Box<Record>),
    /// The proposed record breaks a rule.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// There is no such volume.
    #[error("there is no volume {0}")]
    NoVolume(VolumeKey),
    /// Somebody uses it.
    #[error("volume {0} is attached to node number {node}; detach it first", node = .1.0)]
    Attached(String, NodeId),
    /// The name is taken.
    #[error("there is a volume {0} already; choose another name, or delete it first")]
    VolumeExists(VolumeName),
    /// A volume cannot be made on it.
    #[error("there is no node {0}; `berth node list` shows the nodes that have joined")]
    NoNode(NodeName),
    /// A record names it.
    #[error(
        "node {0} has to do with volume {1} still; drain it first with `berth node drain {0}`, and detach what is \
         attached to it"
    )]
    NodeInUse(NodeName, String),
    /// Two replicas on one node would be lost together.
    #[error("node {0} is named twice: each replica needs a node of its own")]
    NodeTwice(NodeName),
    /// Replicas of a new volume.
    #[error("{0} replicas: a volume has 1 to 64")]
    Replicas(usize),
    /// More replicas would have to be in sync than there are.
    #[error("min_in_sync {min_in_sync}: with {replicas} replicas it is 1 to {replicas}")]
    MinInSync {
        /// What was asked.
        min_in_sync: u32,
        /// What there are.
        replicas: usize,
    },
    /// The limits of the cluster.
    #[error("there are {0} {1} already, and no more are allowed")]
    Full(usize, &'static str),
    /// Numbers of 32 bits have run out.
    #[error("no number is left for another {0}")]
    Numbers(&'static str),
    /// What was read makes no sense.
    #[error("the record store is damaged: {what}: {source}")]
    Damaged {
        /// What was read.
        what: String,
        /// What is wrong with it.
        #[source]
        source: DamageError,
    },
    /// The store could not do it, or could not tell whether it did.
    #[error("the record store failed: {0}")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What can be wrong with stored bytes.
#[derive(Debug, Error)]
pub enum DamageError {
    /// Not a message.
    #[error(transparent)]
    Encoding(#[from] prost::DecodeError),
    /// A message that breaks a rule.
    #[error(transparent)]
    Content(#[from] MessageError),
    /// It points at something that is not there.
    #[error("there is nothing where it points")]
    Dangling,
}

/// How a volume is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeKey {
    /// By its number.
    Number(VolumeNumber),
    /// By its name.
    Name(VolumeName),
}

impl fmt::Display for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VolumeKey::Number(volume) => write!(f, "number {}", volume.0),
            VolumeKey::Name(name) => write!(f, "{name}"),
        }
    }
}

/// A store of records. Calls block; they may come from several threads.
pub trait RecordStore: fmt::Debug + Send + Sync {
    /// The volume's record as it is now.
    ///
    /// # Errors
    /// [`StoreError::NoVolume`], or the store's.
    fn get(&self, key: &VolumeKey) -> Result<Record, StoreError>;

    /// Up to `most` records with numbers after this one, ascending.
    ///
    /// # Errors
    /// The store's.
    fn list(&self, after: VolumeNumber, most: usize) -> Result<Vec<Record>, StoreError>;

    /// Replaces the record of version `expected`. When this returns, the new one is on stable media.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with the current record if that has another version, [`StoreError::Rule`],
    /// [`StoreError::NoVolume`]; after [`StoreError::Backend`] the swap may have happened.
    fn compare_and_swap(&self, expected: u64, record: &Record) -> Result<(), StoreError>;

    /// Makes the record of a new volume, version 1, with a number that no volume ever had.
    ///
    /// # Errors
    /// What is wrong with the wish, or the store's.
    fn create(&self, volume: &NewVolume) -> Result<Record, StoreError>;

    /// The lineage of a volume with this number that was [deleted](Self::delete).
    ///
    /// # Errors
    /// The store's.
    fn deleted(&self, volume: VolumeNumber) -> Result<Option<[u8; 16]>, StoreError>;

    /// Forgets the volume, which is attached nowhere, but for its number and lineage. Returns its last record.
    ///
    /// # Errors
    /// [`StoreError::NoVolume`], [`StoreError::Attached`], or the store's.
    fn delete(&self, key: &VolumeKey) -> Result<Record, StoreError>;

    /// What is kept of the passes over a volume.
    ///
    /// # Errors
    /// [`StoreError::NoVolume`], or the store's.
    fn passes(&self, volume: VolumeNumber) -> Result<PassHistory, StoreError>;

    /// Keeps that from now on.
    ///
    /// # Errors
    /// [`StoreError::NoVolume`], or the store's.
    fn put_passes(&self, volume: VolumeNumber, history: &PassHistory) -> Result<(), StoreError>;

    /// Makes the node known under a number that no other name ever had, or notes where it is now.
    ///
    /// # Errors
    /// [`StoreError::Full`], or the store's.
    fn join(&self, joining: &Joining) -> Result<NodeInfo, StoreError>;

    /// Notes that the node gives away what it has, or does not any more.
    ///
    /// # Errors
    /// [`StoreError::NoNode`], or the store's.
    fn set_draining(&self, name: &NodeName, draining: bool) -> Result<NodeInfo, StoreError>;

    /// Forgets a node that no record names. One that joins under its name has another number.
    ///
    /// # Errors
    /// [`StoreError::NoNode`], [`StoreError::NodeInUse`], or the store's.
    fn remove_node(&self, name: &NodeName) -> Result<NodeInfo, StoreError>;

    /// All nodes, by number.
    ///
    /// # Errors
    /// The store's.
    fn nodes(&self) -> Result<Vec<NodeInfo>, StoreError>;

    /// Tells the listener the nodes and all records, and from then on every change, whoever made it. There is one
    /// listener; a later one replaces it.
    ///
    /// # Errors
    /// The store's.
    fn follow(&self, listener: Listener) -> Result<(), StoreError>;
}
