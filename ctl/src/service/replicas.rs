//! Replicas that are added and forgotten: by people, and by `heal` when a node stays away.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use datapath::record::{NodeId, Record, ReplicaError, VolumeNumber};
use nbd_server::control::proto;
use nbd_server::node_name::NodeName;
use nbd_server::random::random_number;
use nbd_server::volume_name::VolumeName;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{ControlService, invalid, volume_reply};
use crate::heal::{self, Decision, Presence, Step};
use crate::record_store::{RecordStore, StoreError, VolumeKey};
use crate::tending;

/// A record that others change at the same time is tried so often.
const ATTEMPTS_MAX: usize = 16;
/// Between two looks at what must be healed, at most and at least.
const LOOK_MAX: Duration = Duration::from_secs(5);
const LOOK_MIN: Duration = Duration::from_millis(100);

/// A node is asked again to lead a volume after this time.
const TEND_AGAIN: Duration = Duration::from_secs(10);

/// When nodes that are not connected were seen last.
#[derive(Debug, Default)]
pub(super) struct Absences(Mutex<BTreeMap<NodeId, Instant>>);

/// When nodes were last asked to lead volumes.
#[derive(Debug, Default)]
pub(super) struct Asked(Mutex<BTreeMap<VolumeNumber, (NodeId, Instant)>>);

impl Absences {
    /// How all these nodes are, if those of `here` are connected.
    fn look(&self, nodes: &[NodeId], here: &[NodeId], now: Instant) -> BTreeMap<NodeId, Presence> {
        let mut since = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.retain(|node, _| nodes.contains(node) && !here.contains(node));
        let presence = |node: &NodeId| {
            if here.contains(node) {
                return (*node, Presence::Here);
            }
            // Nobody knows for how long it had been away when ctl started.
            (*node, Presence::Away(now.duration_since(*since.entry(*node).or_insert(now))))
        };
        nodes.iter().map(presence).collect()
    }
}

impl Asked {
    /// Those of the wishes that have not been told just now.
    fn due(&self, wishes: Vec<(VolumeNumber, NodeId)>) -> Vec<(VolumeNumber, NodeId)> {
        let now = Instant::now();
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let still = |volume: VolumeNumber, to: NodeId| {
            asked.get(&volume).copied().filter(|(node, at)| *node == to && now < *at + TEND_AGAIN)
        };
        let known: BTreeMap<_, _> = wishes
            .iter()
            .map(|(volume, node)| (*volume, still(*volume, *node).unwrap_or((*node, now))))
            .collect();
        let due = wishes.into_iter().filter(|(volume, node)| still(*volume, *node).is_none()).collect();
        *asked = known;
        due
    }
}

/// Changes the record, whatever others do to it meanwhile.
pub(super) fn change<E>(
    store: &dyn RecordStore,
    key: &VolumeKey,
    change: impl Fn(&Record, u64) -> Result<Record, E>,
) -> Result<Result<Record, E>, StoreError> {
    let mut record = store.get(key)?;
    for attempt in 1.. {
        let proposal = random_number().map_err(|error| StoreError::Backend(Box::new(error)))?;
        let next = match change(&record, proposal) {
            Ok(next) => next,
            Err(error) => return Ok(Err(error)),
        };
        if next == record {
            return Ok(Ok(record));
        }
        match store.compare_and_swap(record.version, &next) {
            Ok(()) => return Ok(Ok(next)),
            Err(StoreError::Conflict(present)) if attempt < ATTEMPTS_MAX => record = *present,
            Err(error) => return Err(error),
        }
    }
    unreachable!("the last attempt returns")
}

/// Somebody wants one more.
fn add(record: &Record, node: NodeId, proposal: u64) -> Result<Record, ReplicaError> {
    let mut next = record.with_replica(node, proposal)?;
    next.replicas_wanted = next.replicas_wanted.max(count(&next));
    Ok(next)
}

/// Somebody wants one less.
fn remove(record: &Record, node: NodeId, proposal: u64) -> Result<Record, ReplicaError> {
    let mut next = record.without_replica(node, proposal)?;
    next.replicas_wanted = next.replicas_wanted.min(count(&next));
    Ok(next)
}

fn count(record: &Record) -> u32 {
    u32::try_from(record.replicas().len()).expect("64 at most")
}

impl ControlService {
    pub(super) async fn add_replica_to(
        &self,
        request: Request<proto::ReplicaRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        let (key, name, node) = self.named(&request.into_inner()).await?;
        let changed =
            self.call(move |store| change(store, &key, |record, proposal| add(record, node, proposal)));
        reply(changed.await?, &name, "replica added")
    }

    pub(super) async fn remove_replica_from(
        &self,
        request: Request<proto::ReplicaRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        let (key, name, node) = self.named(&request.into_inner()).await?;
        let changed =
            self.call(move |store| change(store, &key, |record, proposal| remove(record, node, proposal)));
        reply(changed.await?, &name, "replica removed")
    }

    /// A volume, and a node that has joined.
    pub(super) async fn named(
        &self,
        message: &proto::ReplicaRequest,
    ) -> Result<(VolumeKey, NodeName, NodeId), Status> {
        let volume: VolumeName =
            message.name.parse().map_err(|error: nbd_server::volume_name::VolumeNameError| invalid(error))?;
        let name: NodeName =
            message.node.parse().map_err(|error: nbd_server::node_name::NodeNameError| invalid(error))?;
        let nodes = self.call(|store| store.nodes()).await?;
        let node = nodes.into_iter().find(|node| node.name == name).map(|node| node.node);
        let node = node.ok_or_else(|| super::status_of(&StoreError::NoNode(name.clone())))?;
        Ok((VolumeKey::Name(volume), name, node))
    }

    /// Gives what nodes held that are gone for `grace`, or are drained, to others, until the service is closed. Without a
    /// grace time nobody is ever gone.
    pub async fn heal_for_ever(self, grace: Option<Duration>) {
        let (mut closed, mut changed) = (self.feed.watch(None).1, self.feed.watch(None).1);
        let grace = grace.unwrap_or(Duration::MAX);
        let pause = (grace / 20).clamp(LOOK_MIN, LOOK_MAX);
        let mut was_draining = false;
        loop {
            changed.borrow_and_update();
            // A drain begins at once and goes on with every step that a head has made; so does what ends it.
            let next = async {
                while changed.changed().await.is_ok() {
                    if was_draining || self.feed.is_draining() {
                        return tokio::time::sleep(LOOK_MIN).await;
                    }
                }
                std::future::pending().await
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = next => {}
                ended = super::feed::closed(&mut closed) => return ended,
            }
            was_draining = self.feed.is_draining();
            if let Err(error) = self.heal_once(grace).await {
                tracing::warn!(error = error.message(), "cannot see what must be healed");
            }
        }
    }

    async fn heal_once(&self, grace: Duration) -> Result<(), Status> {
        let nodes = self.call(|store| store.nodes()).await?;
        let known: Vec<NodeId> = nodes.iter().map(|node| node.node).collect();
        let _one_at_a_time = self.placing.lock().await;
        let presence = self.absences.look(&known, &self.passes.connected(), Instant::now());
        let (records, model) = (self.feed.records(), self.model(&nodes));
        for (volume, node) in self.asked.due(tending::wishes(&records, &model, &presence, grace)) {
            self.passes.tend(node, volume);
        }
        let steps = heal::steps(&records, model, &presence, grace);
        for decision in steps {
            let step = decision.step;
            let (volume, node) = step.of();
            let name = nodes.iter().find(|known| known.node == node).map(|known| known.name.to_string());
            let done = self.call(move |store| take(store, decision)).await;
            // The others have their turn all the same.
            let done = done.unwrap_or_else(|error| {
                tracing::warn!(volume = volume.0, node = name, error = error.message(), "cannot heal");
                None
            });
            if let Some(record) = done {
                let what = match step {
                    Step::Add(..) => "a replica was lost, or is to go: this node gets another one",
                    Step::Remove(..) => "the replica that this node had is not needed any more",
                    Step::Leave(..) => {
                        "the node is drained, and enough others have replicas: its own is to go"
                    }
                    Step::Stay(..) => "the node is not drained any more: its replica stays",
                };
                tracing::info!(volume = record.name, number = volume.0, node = name, "{what}");
            }
        }
        Ok(())
    }
}

/// What somebody is told who wanted it.
fn reply(
    outcome: Result<Record, ReplicaError>,
    node: &NodeName,
    what: &str,
) -> Result<Response<proto::VolumeReply>, Status> {
    let record = outcome.map_err(|error| {
        Status::failed_precondition(match error {
            ReplicaError::There(_) => format!("node {node} has a replica of the volume already"),
            ReplicaError::NotThere(_) => format!("node {node} has no replica of the volume"),
            ReplicaError::InSync(_) => format!(
                "the replica on node {node} is in sync, and is needed: only one that is away can be taken out"
            ),
        })
    })?;
    tracing::info!(volume = record.name, node = %node, "{what}");
    Ok(volume_reply(&record))
}

/// Does a step, unless the record has changed since.
fn take(store: &dyn RecordStore, Decision { step, version }: Decision) -> Result<Option<Record>, StoreError> {
    let (volume, _) = step.of();
    let record = match store.get(&VolumeKey::Number(volume)) {
        Err(StoreError::NoVolume(_)) => return Ok(None),
        found => found?,
    };
    if record.version != version {
        return Ok(None);
    }
    let proposal = random_number().map_err(|error| StoreError::Backend(Box::new(error)))?;
    let next = match step {
        Step::Add(_, node) => record.with_replica(node, proposal),
        Step::Remove(_, node) => record.without_replica(node, proposal),
        Step::Leave(_, node) => record.with_leaving(node, true, proposal),
        Step::Stay(_, node) => record.with_leaving(node, false, proposal),
    };
    let Ok(next) = next else { return Ok(None) };
    match store.compare_and_swap(record.version, &next) {
        Ok(()) => Ok(Some(next)),
        // The next look decides anew.
        Err(StoreError::Conflict(_)) => Ok(None),
        Err(error) => Err(error),
    }
}
