//! Between the messages and the values that the project works with. What comes from outside is checked here, field by
//! field, and refused with the name of the field.

mod check;
mod facts;

use datapath::limits::VOLUME_BYTES_MAX;
use datapath::record::{EpochEnd, HeadSession, NodeId, Record, StaleReplica, VolumeNumber};
use datapath::units::BLOCK_BYTES_U64;
use thiserror::Error;

use super::limits::{ADDRESS_BYTES_MAX, EPOCH_ENDS_MAX, LABELS_BYTES_MAX, REPLICAS_MAX};
use super::proto;
use crate::listener::ListenAddress;
use crate::node_name::{NodeName, NodeNameError};
use crate::volume_name::{VolumeName, VolumeNameError};

pub use check::{
    LastPass, PassHistory, check_from_message, check_to_message, history_from_message, history_to_message,
};

pub use facts::{LABEL_BYTES_MAX, NodeFacts, facts_from_message, facts_to_message, label};

/// A node of the register: where it is, and what it can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Chosen at random when its process started.
    pub boot: u64,
    /// Where NBD clients come in, as `HOST:PORT`, if they can over TCP.
    pub nbd: Option<String>,
    /// Where other nodes come in, as `HOST:PORT`.
    pub peer: String,
    /// What placement goes by.
    pub facts: NodeFacts,
    /// Somebody wants its replicas elsewhere.
    pub draining: bool,
}

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MessageError {
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Number 0 is no node.
    #[error("{0}: 0 is no node")]
    NoNode(&'static str),
    /// Number 0 is no volume.
    #[error("volume: 0 is no volume")]
    NoVolume,
    /// A number that must not be zero.
    #[error("{0} is 0")]
    Zero(&'static str),
    /// A lineage has 16 bytes.
    #[error("lineage: {0} bytes, not 16")]
    Lineage(usize),
    /// A size outside the data path's limits.
    #[error("size_blocks: {0} is not in 1 to 4294967296")]
    Size(u64),
    /// More than the limits allow.
    #[error("{list}: {count} entries, more than {most}")]
    TooMany {
        /// Which list.
        list: &'static str,
        /// Its length.
        count: usize,
        /// What is allowed.
        most: usize,
    },
    /// Lists are sorted, and have no entry twice.
    #[error("{0} is not in ascending order without duplicates")]
    Order(&'static str),
    /// A replica is in one of the three lists.
    #[error("node {0} is in two of in_sync, catching_up and stale")]
    TwoStates(u32),
    /// Nobody would hold the data.
    #[error("in_sync is empty")]
    NothingInSync,
    /// A volume with a head has an epoch, and the other way round.
    #[error("epoch {0} and the head do not belong together: epoch 0 has none, all others have one")]
    Head(u32),
    /// Epoch 0 serves nobody.
    #[error("epoch 0 is started")]
    StartedWithoutHead,
    /// Nobody can let go of what he never had.
    #[error("released: epoch {0} has never started")]
    ReleasedUnserved(u32),
    /// Only what is over has an end.
    #[error("epoch_ends: epoch {end} has an end while the epoch is {epoch}")]
    EndAhead {
        /// The epoch with an end.
        end: u32,
        /// The record's epoch.
        epoch: u32,
    },
    /// Sequences go on from epoch to epoch.
    #[error("epoch_ends: the sequence falls in epoch {0}")]
    EndFalls(u32),
    /// One in sync holds what all of them hold, and one that is not there holds nothing.
    #[error("fresh: node {0} is neither catching up nor stale")]
    FreshElsewhere(u32),
    /// Only what is there can go.
    #[error("leaving: node {0} has no replica")]
    LeavesNothing(u32),
    /// A replica cannot have been left out by a version that is still to come.
    #[error("stale: node {0} is left out since a version that is not there yet")]
    StaleAhead(u32),
    /// Not a zone, a rack, a label's key or value.
    #[error("{field}: {text:?} is not 1 to 63 of A-Z, a-z, 0-9, '.', '-', '_', '/' and '+'")]
    Label {
        /// Which text.
        field: &'static str,
        /// What was given, cut short.
        text: String,
    },
    /// All nodes must fit into one message.
    #[error("labels: {0} bytes, more than {LABELS_BYTES_MAX}")]
    Labels(usize),
    /// Not an address.
    #[error("{field}: {text:?} is not an address; write HOST:PORT")]
    Address {
        /// Which address.
        field: &'static str,
        /// What was given, cut short.
        text: String,
    },
    /// A volume's name.
    #[error(transparent)]
    VolumeName(#[from] VolumeNameError),
    /// A node's name.
    #[error(transparent)]
    NodeName(#[from] NodeNameError),
}

/// The message of a record. It is what the record store keeps, too.
#[must_use]
pub fn record_to_message(record: &Record) -> proto::Record {
    let numbers = |nodes: &[NodeId]| nodes.iter().map(|node| node.0).collect();
    proto::Record {
        volume: record.volume.0,
        name: record.name.clone(),
        lineage: record.lineage.to_vec(),
        size_blocks: record.size_blocks,
        version: record.version,
        proposal: record.proposal,
        epoch: record.epoch,
        started: record.started,
        last_started: record.last_started,
        head: record.head.map(|head| proto::HeadSession { node: head.node.0, session: head.session }),
        in_sync: numbers(&record.in_sync),
        catching_up: numbers(&record.catching_up),
        stale: record
            .stale
            .iter()
            .map(|stale| proto::StaleReplica { node: stale.node.0, since_version: stale.since_version })
            .collect(),
        min_in_sync: record.min_in_sync,
        fresh: numbers(&record.fresh),
        leaving: numbers(&record.leaving),
        replicas_wanted: record.replicas_wanted,
        attached: record.attached.map_or(0, |node| node.0),
        released: record.released,
        epoch_ends: record
            .epoch_ends
            .iter()
            .map(|end| proto::EpochEnd { epoch: end.epoch, sequence: end.sequence })
            .collect(),
    }
}

/// The record of a message, if it obeys every rule that a record alone can break.
///
/// # Errors
/// The first rule that it breaks.
pub fn record_from_message(message: proto::Record) -> Result<Record, MessageError> {
    check_counts(&message)?;
    let name: VolumeName = message.name.parse()?;
    let lineage = message.lineage.as_slice().try_into();
    let head = message.head.map(|head| {
        node_from_number("head", head.node).map(|node| HeadSession { node, session: head.session })
    });
    let nodes = |list, numbers: &[u32]| -> Result<Vec<NodeId>, MessageError> {
        numbers.iter().map(|number| node_from_number(list, *number)).collect()
    };
    let stale = message.stale.iter().map(|stale| {
        let since_version = stale.since_version;
        node_from_number("stale", stale.node).map(|node| StaleReplica { node, since_version })
    });
    let ends = message.epoch_ends.iter();
    let all = message.in_sync.len() + message.catching_up.len() + message.stale.len();
    let record = Record {
        volume: volume_from_number(message.volume)?,
        name: name.to_string(),
        lineage: lineage.map_err(|_| MessageError::Lineage(message.lineage.len()))?,
        size_blocks: size_from_number(message.size_blocks)?,
        version: message.version,
        proposal: message.proposal,
        epoch: message.epoch,
        started: message.started,
        last_started: message.last_started,
        head: head.transpose()?,
        in_sync: nodes("in_sync", &message.in_sync)?,
        catching_up: nodes("catching_up", &message.catching_up)?,
        stale: stale.collect::<Result<_, MessageError>>()?,
        min_in_sync: message.min_in_sync,
        fresh: nodes("fresh", &message.fresh)?,
        leaving: nodes("leaving", &message.leaving)?,
        // Records of a time when no replica could be added say nothing.
        replicas_wanted: match message.replicas_wanted {
            0 => u32::try_from(all).expect("checked above"),
            wanted => wanted,
        },
        attached: (message.attached != 0).then_some(NodeId(message.attached)),
        released: message.released,
        epoch_ends: ends.map(|end| EpochEnd { epoch: end.epoch, sequence: end.sequence }).collect(),
    };
    check_record(&record)?;
    Ok(record)
}

/// Before anything is copied.
fn check_counts(message: &proto::Record) -> Result<(), MessageError> {
    let replicas = message.in_sync.len() + message.catching_up.len() + message.stale.len();
    let replicas = replicas.max(message.leaving.len()).max(message.fresh.len());
    let lists =
        [("replicas", replicas, REPLICAS_MAX), ("epoch_ends", message.epoch_ends.len(), EPOCH_ENDS_MAX)];
    match lists.into_iter().find(|(_, count, most)| count > most) {
        Some((list, count, most)) => Err(MessageError::TooMany { list, count, most }),
        None => Ok(()),
    }
}

/// Does the record obey every rule that it can break by itself?
///
/// # Errors
/// The first rule that it breaks.
pub fn check_record(record: &Record) -> Result<(), MessageError> {
    record.name.parse::<VolumeName>()?;
    size_from_number(record.size_blocks)?;
    let replicas_wanted = u64::from(record.replicas_wanted);
    let numbers = [
        ("version", record.version),
        ("min_in_sync", u64::from(record.min_in_sync)),
        ("replicas_wanted", replicas_wanted),
    ];
    for (field, number) in numbers {
        if number == 0 {
            return Err(MessageError::Zero(field));
        }
    }
    check_lists(record)?;
    if record.head.is_some() != (record.epoch > 0) {
        return Err(MessageError::Head(record.epoch));
    }
    if record.started && record.head.is_none() {
        return Err(MessageError::StartedWithoutHead);
    }
    if record.released > record.last_started {
        return Err(MessageError::ReleasedUnserved(record.released));
    }
    if let Some(stale) = record.stale.iter().find(|stale| stale.since_version > record.version) {
        return Err(MessageError::StaleAhead(stale.node.0));
    }
    if let Some(end) = record.epoch_ends.iter().find(|end| end.epoch >= record.epoch) {
        return Err(MessageError::EndAhead { end: end.epoch, epoch: record.epoch });
    }
    match record.epoch_ends.windows(2).find(|pair| pair[0].sequence > pair[1].sequence) {
        Some(pair) => Err(MessageError::EndFalls(pair[1].epoch)),
        None => Ok(()),
    }
}

fn check_lists(record: &Record) -> Result<(), MessageError> {
    if record.in_sync.is_empty() {
        return Err(MessageError::NothingInSync);
    }
    let lists = [
        ("in_sync", record.in_sync.is_sorted_by(|one, next| one < next)),
        ("catching_up", record.catching_up.is_sorted_by(|one, next| one < next)),
        ("stale", record.stale.is_sorted_by(|one, next| one.node < next.node)),
        ("fresh", record.fresh.is_sorted_by(|one, next| one < next)),
        ("leaving", record.leaving.is_sorted_by(|one, next| one < next)),
        ("epoch_ends", record.epoch_ends.is_sorted_by(|one, next| one.epoch < next.epoch)),
    ];
    if let Some((list, _)) = lists.into_iter().find(|(_, sorted)| !sorted) {
        return Err(MessageError::Order(list));
    }
    let replicas = record.replicas();
    if replicas.len() > REPLICAS_MAX {
        return Err(MessageError::TooMany { list: "replicas", count: replicas.len(), most: REPLICAS_MAX });
    }
    if let Some(pair) = replicas.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(MessageError::TwoStates(pair[0].0));
    }
    if let Some(node) = record.leaving.iter().find(|node| !replicas.contains(node)) {
        return Err(MessageError::LeavesNothing(node.0));
    }
    let is_elsewhere = |node: &&NodeId| record.is_in_sync(**node) || !replicas.contains(node);
    match record.fresh.iter().find(is_elsewhere) {
        Some(node) => Err(MessageError::FreshElsewhere(node.0)),
        None => Ok(()),
    }
}

/// A node's number.
///
/// # Errors
/// If it is 0.
pub fn node_from_number(field: &'static str, number: u32) -> Result<NodeId, MessageError> {
    if number == 0 { Err(MessageError::NoNode(field)) } else { Ok(NodeId(number)) }
}

/// A volume's number.
///
/// # Errors
/// If it is 0.
pub fn volume_from_number(number: u32) -> Result<VolumeNumber, MessageError> {
    if number == 0 { Err(MessageError::NoVolume) } else { Ok(VolumeNumber(number)) }
}

/// A volume's size in blocks.
///
/// # Errors
/// If the data path has no such volumes.
pub fn size_from_number(size_blocks: u64) -> Result<u64, MessageError> {
    match size_blocks {
        1..=SIZE_BLOCKS_MAX => Ok(size_blocks),
        _ => Err(MessageError::Size(size_blocks)),
    }
}

const SIZE_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_BYTES_U64;

/// The message of a node.
#[must_use]
pub fn node_to_message(node: &NodeInfo) -> proto::Node {
    proto::Node {
        node: node.node.0,
        name: node.name.to_string(),
        boot: node.boot,
        nbd_address: node.nbd.clone().unwrap_or_default(),
        peer_address: node.peer.clone(),
        facts: Some(facts_to_message(&node.facts)),
        draining: node.draining,
    }
}

/// The node of a message.
///
/// # Errors
/// The first field that is wrong.
pub fn node_from_message(message: proto::Node) -> Result<NodeInfo, MessageError> {
    Ok(NodeInfo {
        node: node_from_number("node", message.node)?,
        name: message.name.parse()?,
        boot: message.boot,
        nbd: optional_address("nbd_address", message.nbd_address)?,
        peer: address("peer_address", message.peer_address)?,
        facts: facts_from_message(message.facts)?,
        draining: message.draining,
    })
}

/// A `HOST:PORT` that others can connect to.
///
/// # Errors
/// If it is not one.
pub fn address(field: &'static str, text: String) -> Result<String, MessageError> {
    let plain = text.len() <= ADDRESS_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic());
    match text.parse::<ListenAddress>() {
        Ok(ListenAddress::Tcp(_)) if plain && !text.ends_with(":0") => Ok(text),
        _ => Err(MessageError::Address { field, text: text.chars().take(80).collect() }),
    }
}

/// The same, or nothing.
///
/// # Errors
/// If it is something else.
pub fn optional_address(field: &'static str, text: String) -> Result<Option<String>, MessageError> {
    if text.is_empty() { Ok(None) } else { address(field, text).map(Some) }
}

#[cfg(test)]
mod tests;
