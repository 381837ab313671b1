//! Volumes that are attached to the node where their task runs, and detached from it.
//!
//! Only the record says where a volume is attached. The nodes do the rest: the head that has it lets go, and the node to which
//! it is attached takes it (`datapath/src/engine/shard/replication/handover.rs`).

use datapath::record::{NodeId, Record};
use nbd_server::control::proto;
use nbd_server::node_name::NodeName;
use nbd_server::volume_name::VolumeName;
use thiserror::Error;
use tonic::{Response, Status};

use super::replicas::change;
use super::{ControlService, invalid, volume_reply};
use crate::record_store::VolumeKey;

/// Why a volume is not attached, or not detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
enum AttachError {
    /// Whoever has it there still uses it.
    #[error("attached to another node that lives")]
    Held(NodeId),
    /// Nobody would take the volume.
    #[error("the node is not connected")]
    Away,
}

/// The record of the volume attached to `node`. `is_here`: is a node connected?
fn attached(
    record: &Record,
    node: NodeId,
    proposal: u64,
    steal: bool,
    is_here: impl Fn(NodeId) -> bool,
) -> Result<Record, AttachError> {
    if record.attached == Some(node) {
        return Ok(record.clone());
    }
    // What epochs cannot make safe is the task that still runs there, so that a node that lives is asked first.
    match record.attached {
        Some(holder) if is_here(holder) && !steal => return Err(AttachError::Held(holder)),
        _ => {}
    }
    if !is_here(node) {
        return Err(AttachError::Away);
    }
    Ok(record.with_attached(Some(node), proposal))
}

/// The record of the volume attached to no node; `from`: only from this one.
fn detached(record: &Record, from: Option<NodeId>, proposal: u64) -> Result<Record, AttachError> {
    match record.attached {
        None => Ok(record.clone()),
        Some(holder) if from.is_none_or(|from| from == holder) => Ok(record.with_attached(None, proposal)),
        Some(holder) => Err(AttachError::Held(holder)),
    }
}

impl ControlService {
    pub(super) async fn attach(
        &self,
        message: proto::AttachRequest,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        let proto::AttachRequest { name, node, steal } = message;
        let (key, name, node) = self.named(&proto::ReplicaRequest { name, node }).await?;
        let here = self.passes.connected();
        let changed = self.call({
            let key = key.clone();
            move |store| {
                change(store, &key, |record, proposal| {
                    attached(record, node, proposal, steal, |node| here.contains(&node))
                })
            }
        });
        match changed.await? {
            Ok(record) => {
                tracing::info!(volume = record.name, node = %name, steal, "volume attached");
                Ok(volume_reply(&record))
            }
            Err(error) => Err(self.why_not(&key, &name, error).await),
        }
    }

    pub(super) async fn detach(
        &self,
        message: proto::DetachRequest,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        let proto::DetachRequest { name, node } = message;
        let from = if node.is_empty() {
            let name: VolumeName =
                name.parse().map_err(|error: nbd_server::volume_name::VolumeNameError| invalid(error))?;
            (VolumeKey::Name(name), None)
        } else {
            let (key, name, node) = self.named(&proto::ReplicaRequest { name, node }).await?;
            (key, Some((name, node)))
        };
        let (key, from) = from;
        let number = from.as_ref().map(|(_, node)| *node);
        let changed = self.call({
            let key = key.clone();
            move |store| change(store, &key, |record, proposal| detached(record, number, proposal))
        });
        match changed.await? {
            Ok(record) => {
                tracing::info!(volume = record.name, "volume detached");
                Ok(volume_reply(&record))
            }
            Err(AttachError::Held(holder)) => {
                let holder = self.name_of(holder).await;
                Err(Status::failed_precondition(format!("volume {key} is attached to node {holder}")))
            }
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    pub(super) async fn name_of(&self, node: NodeId) -> String {
        let nodes = self.call(|store| store.nodes()).await.unwrap_or_default();
        let known = nodes.into_iter().find(|known| known.node == node);
        known.map_or_else(|| format!("number {}", node.0), |known| known.name.to_string())
    }

    /// What whoever wanted it is told.
    async fn why_not(&self, key: &VolumeKey, node: &NodeName, error: AttachError) -> Status {
        let text = match error {
            AttachError::Held(holder) => {
                let holder = self.name_of(holder).await;
                format!(
                    "volume {key} is attached to node {holder}, which lives; detach it first, or take it from there \
                     with --steal"
                )
            }
            AttachError::Away => format!("node {node} is not connected to berth ctl; is it running?"),
        };
        Status::failed_precondition(text)
    }
}

#[cfg(test)]
mod tests {
    use datapath::record::VolumeNumber;

    use super::*;

    fn record(attached: Option<u32>) -> Record {
        let nodes = [NodeId(1), NodeId(2)];
        Record { attached: attached.map(NodeId), ..Record::new(VolumeNumber(1), "v", [0; 16], 8, &nodes) }
    }

    fn attach(record: &Record, node: u32, steal: bool, here: &[u32]) -> Result<Option<u32>, AttachError> {
        let record = attached(record, NodeId(node), 5, steal, |node| here.contains(&node.0))?;
        Ok(record.attached.map(|node| node.0))
    }

    #[test]
    fn a_holder_that_lives_keeps_the_volume_unless_it_is_stolen() {
        assert_eq!(attach(&record(None), 1, false, &[1, 2]), Ok(Some(1)));
        assert_eq!(attach(&record(Some(1)), 1, false, &[]), Ok(Some(1)), "again, as after a lost answer");
        assert_eq!(attach(&record(Some(1)), 2, false, &[1, 2]), Err(AttachError::Held(NodeId(1))));
        assert_eq!(attach(&record(Some(1)), 2, true, &[1, 2]), Ok(Some(2)));
        assert_eq!(attach(&record(Some(1)), 2, false, &[2]), Ok(Some(2)), "a dead one is taken over");
    }

    #[test]
    fn any_node_that_is_there_may_lead() {
        let mut stale = record(None).with_replica(NodeId(3), 1).expect("it has none");
        assert_eq!(attach(&stale, 3, false, &[3]), Ok(Some(3)), "its replica is not in sync");
        assert_eq!(attach(&stale, 4, false, &[4]), Ok(Some(4)), "it has no replica");
        assert_eq!(attach(&stale, 2, true, &[1, 3]), Err(AttachError::Away));
        stale.attached = Some(NodeId(2));
        assert_eq!(detached(&stale, Some(NodeId(1)), 7), Err(AttachError::Held(NodeId(2))));
        for from in [None, Some(NodeId(2))] {
            let free = detached(&stale, from, 7).expect("it is attached there");
            assert_eq!((free.attached, free.version), (None, stale.version + 1));
            assert_eq!(detached(&free, from, 8).expect("it is free"), free, "again");
        }
    }
}
