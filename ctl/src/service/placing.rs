//! Volumes that are made: on the nodes that somebody names, or on those that placement chooses. And how full nodes are.

use std::sync::Arc;

use datapath::record::{NodeId, Record};
use datapath::units::BLOCK_BYTES_U64;
use nbd_server::control::convert::{MessageError, NodeInfo, label, node_to_message, size_from_number};
use nbd_server::control::limits::REPLICAS_MAX;
use nbd_server::control::proto;
use nbd_server::node_name::{NodeName, NodeNameError};
use nbd_server::random::random_bytes;
use nbd_server::volume_name::{VolumeName, VolumeNameError};
use tonic::{Response, Status};

use super::{ControlService, invalid, status_of, volume_reply};
use crate::placement::{self, Health, Model, Request};
use crate::record_store::{NewVolume, StoreError};

/// Replicas of a volume for which nobody says how many.
const REPLICAS_DEFAULT: usize = 3;

impl ControlService {
    pub(super) async fn create(
        &self,
        message: proto::CreateVolumeRequest,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        let name: VolumeName = message.name.parse().map_err(|error: VolumeNameError| invalid(error))?;
        let size_blocks = size_from_number(message.size_blocks).map_err(invalid)?;
        let replicas = usize::try_from(message.replicas).expect("32 bits");
        if message.on.len().max(replicas) > REPLICAS_MAX {
            return Err(status_of(&StoreError::Replicas(message.on.len().max(replicas))));
        }
        if !message.on.is_empty() && replicas != 0 && replicas != message.on.len() {
            let text = format!("{replicas} replicas on {} nodes: name as many, or none", message.on.len());
            return Err(Status::invalid_argument(text));
        }
        let lineage = random_bytes().map_err(|error| Status::internal(error.to_string()))?;
        // What one gets is counted before the next one is placed.
        let _one_at_a_time = self.placing.lock().await;
        let on = match message.on.as_slice() {
            [] => self.choose_nodes(&message, size_blocks * BLOCK_BYTES_U64, replicas).await?,
            named => named.iter().map(|name| parse(name)).collect::<Result<_, _>>()?,
        };
        let min_in_sync = (message.min_in_sync != 0).then_some(message.min_in_sync);
        let volume = NewVolume { name, lineage, size_blocks, on, min_in_sync };
        let record = self.call(move |store| store.create(&volume)).await?;
        tracing::info!(volume = record.name, number = record.volume.0, "volume created");
        Ok(volume_reply(&record))
    }

    async fn choose_nodes(
        &self,
        message: &proto::CreateVolumeRequest,
        size_bytes: u64,
        replicas: usize,
    ) -> Result<Vec<NodeName>, Status> {
        let nodes = self.call(|store| store.nodes()).await?;
        let replicas = if replicas == 0 { REPLICAS_DEFAULT } else { replicas };
        let zones = message.zones.iter().map(|zone| label("zones", zone.clone()));
        let mut request = Request {
            zones: zones.collect::<Result<_, _>>().map_err(invalid)?,
            ..Request::new(size_bytes, replicas)
        };
        if !message.near.is_empty() {
            let near = parse(&message.near)?;
            let known = nodes.iter().find(|node| node.name == near);
            request.near = Some(known.ok_or_else(|| status_of(&StoreError::NoNode(near)))?.node);
        }
        let placed = placement::place(&self.model(&nodes), &request);
        let placed = placed.map_err(|error| Status::failed_precondition(error.to_string()))?;
        let name =
            |chosen: NodeId| nodes.iter().find(|node| node.node == chosen).map(|node| node.name.clone());
        Ok(placed.chosen.into_iter().map(|chosen| name(chosen).expect("of these nodes")).collect())
    }

    /// The cluster as it is now.
    pub(super) fn model(&self, nodes: &[NodeInfo]) -> Model {
        placement::census(nodes, &self.feed.records(), &self.passes.connected(), self.overcommit_percent)
    }

    pub(super) async fn nodes_and_states(&self) -> Result<proto::ListNodesReply, Status> {
        let nodes = self.call(|store| store.nodes()).await?;
        let states = self.states(&nodes);
        Ok(proto::ListNodesReply { nodes: nodes.iter().map(node_to_message).collect(), states })
    }

    pub(super) fn states(&self, nodes: &[NodeInfo]) -> Vec<proto::NodeState> {
        let records = self.feed.records();
        self.model(nodes).nodes.iter().map(|node| state(node, &records)).collect()
    }
}

fn state(node: &placement::Node, records: &[Arc<Record>]) -> proto::NodeState {
    let heads = records.iter().filter(|it| it.living_head().is_some_and(|head| head.node == node.id)).count();
    let count = |count: usize| u32::try_from(count).expect("bounded by the volumes");
    proto::NodeState {
        connected: node.health == Health::Here,
        reserved_bytes: node.reserved_bytes,
        replicas: count(node.replicas),
        fills: count(node.fills),
        heads: count(heads),
        attached: count(records.iter().filter(|record| record.attached == Some(node.id)).count()),
    }
}

fn parse(name: &str) -> Result<NodeName, Status> {
    name.parse().map_err(|error: NodeNameError| invalid(MessageError::from(error)))
}
