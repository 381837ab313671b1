//! What a change may do to a record. Nodes propose changes; these rules keep a node's mistake out of the store.

use datapath::record::{NodeId, Record};
use nbd_server::control::convert::{MessageError, check_record};
use nbd_server::control::limits::REPLICAS_MAX;
use nbd_server::node_name::NodeName;
use thiserror::Error;

use super::{NewVolume, StoreError};

/// A rule that a proposed record breaks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RuleError {
    /// By itself.
    #[error("the proposed record: {0}")]
    Record(#[from] MessageError),
    /// Versions rise by one.
    #[error("the proposed record has version {proposed}, and version {expected} is to be replaced")]
    Version {
        /// Of the proposed record.
        proposed: u64,
        /// Of the record that it would replace.
        expected: u64,
    },
    /// What a volume is never changes.
    #[error("the proposed record changes the volume's {0}")]
    Changed(&'static str),
    /// An epoch once passed must stay passed.
    #[error("the epoch falls from {from} to {to}")]
    EpochFalls {
        /// The epoch of the record.
        from: u32,
        /// That of the proposed one.
        to: u32,
    },
    /// Epochs rise by one.
    #[error("the epoch jumps from {from} to {to}")]
    EpochJumps {
        /// The epoch of the record.
        from: u32,
        /// That of the proposed one.
        to: u32,
    },
    /// Two heads could get acknowledgements in one epoch.
    #[error("epoch {0} gets another head")]
    SecondHead(u32),
    /// The last epoch that started is the present one once that has started.
    #[error("last_started is {proposed}, not {expected}")]
    LastStarted {
        /// What was proposed.
        proposed: u32,
        /// What it must be.
        expected: u32,
    },
    /// What a node holds that has no replica may be of any time.
    #[error("node {} gets a replica that does not count as fresh", .0.0)]
    NotFresh(NodeId),
    /// It counts for nothing until it has been in sync.
    #[error("the replica on node {} is taken for one that has been in sync", .0.0)]
    FreshTrusted(NodeId),
    /// A head lets go of the epoch that it serves, once and for all.
    #[error("released is {proposed} after {current} in epoch {epoch}")]
    Released {
        /// In the record.
        current: u32,
        /// In the proposed one.
        proposed: u32,
        /// The record's epoch.
        epoch: u32,
    },
    /// Who is in sync is the affair of a head, and there is none.
    #[error("the head of epoch {0} has let go, and who is in sync changes")]
    InSyncWithoutHead(u32),
    /// A started epoch may have acknowledged writes.
    #[error("epoch {0} has started, and the proposed record takes that back")]
    Unstarted(u32),
}

/// May `proposed` replace `current`?
///
/// # Errors
/// The first rule that it breaks.
pub fn check_succession(current: &Record, proposed: &Record) -> Result<(), RuleError> {
    check_record(proposed)?;
    if current.version.checked_add(1) != Some(proposed.version) {
        return Err(RuleError::Version { proposed: proposed.version, expected: current.version });
    }
    let kept = [
        ("number", current.volume == proposed.volume),
        ("name", current.name == proposed.name),
        ("lineage", current.lineage == proposed.lineage),
    ];
    if let Some((what, _)) = kept.into_iter().find(|(_, kept)| !kept) {
        return Err(RuleError::Changed(what));
    }
    check_fresh(current, proposed)?;
    let (from, to) = (current.epoch, proposed.epoch);
    if to < from {
        return Err(RuleError::EpochFalls { from, to });
    }
    if to - from > 1 {
        return Err(RuleError::EpochJumps { from, to });
    }
    if to == from && current.head != proposed.head {
        return Err(RuleError::SecondHead(to));
    }
    if to == from && current.started && !proposed.started {
        return Err(RuleError::Unstarted(to));
    }
    check_release(current, proposed)?;
    let last_started = if proposed.started { to } else { current.last_started };
    if proposed.last_started != last_started {
        return Err(RuleError::LastStarted { proposed: proposed.last_started, expected: last_started });
    }
    Ok(())
}

/// The head of the present epoch, which serves, may let go of it; that is the last thing it does.
fn check_release(current: &Record, proposed: &Record) -> Result<(), RuleError> {
    let (epoch, goes_on) = (current.epoch, proposed.epoch == current.epoch);
    let lets_go = goes_on && current.started && proposed.released == epoch;
    if proposed.released != current.released && !lets_go {
        return Err(RuleError::Released { current: current.released, proposed: proposed.released, epoch });
    }
    if goes_on && epoch > 0 && current.living_head().is_none() && proposed.in_sync != current.in_sync {
        return Err(RuleError::InSyncWithoutHead(epoch));
    }
    Ok(())
}

/// Who has no replica gets a fresh one, and that stays so until it is in sync.
fn check_fresh(current: &Record, proposed: &Record) -> Result<(), RuleError> {
    let (before, after) = (current.replicas(), proposed.replicas());
    let stranger = after.iter().find(|node| !before.contains(node) && !proposed.fresh.contains(node));
    if let Some(node) = stranger {
        return Err(RuleError::NotFresh(*node));
    }
    let is_trusted = |node: &&NodeId| {
        after.contains(node) && !proposed.fresh.contains(node) && !proposed.is_in_sync(**node)
    };
    match current.fresh.iter().find(is_trusted) {
        Some(node) => Err(RuleError::FreshTrusted(*node)),
        None => Ok(()),
    }
}

/// Nodes of the replicas, by what `find` knows of names, and how many of them must be in sync.
///
/// # Errors
/// What is wrong with the wish.
pub fn check_new_volume(
    volume: &NewVolume,
    find: impl Fn(&NodeName) -> Result<Option<NodeId>, StoreError>,
) -> Result<Vec<NodeId>, StoreError> {
    let replicas = volume.on.len();
    if replicas == 0 || replicas > REPLICAS_MAX {
        return Err(StoreError::Replicas(replicas));
    }
    let mut nodes = Vec::with_capacity(replicas);
    for name in &volume.on {
        let node = find(name)?.ok_or_else(|| StoreError::NoNode(name.clone()))?;
        if nodes.contains(&node) {
            return Err(StoreError::NodeTwice(name.clone()));
        }
        nodes.push(node);
    }
    match volume.min_in_sync {
        Some(min_in_sync) if usize::try_from(min_in_sync).map_or(true, |min| min == 0 || min > replicas) => {
            Err(StoreError::MinInSync { min_in_sync, replicas })
        }
        _ => Ok(nodes),
    }
}
