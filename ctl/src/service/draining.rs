//! Nodes that give away what they have, and nodes that are forgotten.
//!
//! Only the register says that a node is drained. [`heal`](crate::heal) does the rest: others get replicas, and heads take out
//! those of the node. Volumes that are attached to it stay led by it, without a replica of its own, until they are detached.

use nbd_server::control::convert::{NodeInfo, node_to_message};
use nbd_server::control::proto;
use nbd_server::node_name::{NodeName, NodeNameError};
use tonic::{Response, Status};

use super::{ControlService, invalid};

impl ControlService {
    pub(super) async fn drain(
        &self,
        message: proto::DrainNodeRequest,
    ) -> Result<Response<proto::NodeReply>, Status> {
        let name: NodeName = message.name.parse().map_err(|error: NodeNameError| invalid(error))?;
        let drain = message.drain;
        // No volume that is being made comes to it after this.
        let _one_at_a_time = self.placing.lock().await;
        let node = self.call(move |store| store.set_draining(&name, drain)).await?;
        tracing::info!(node = %node.name, drain, "what is wanted of the node has changed");
        Ok(self.node_reply(node))
    }

    pub(super) async fn remove(
        &self,
        message: proto::RemoveNodeRequest,
    ) -> Result<Response<proto::NodeReply>, Status> {
        let name: NodeName = message.name.parse().map_err(|error: NodeNameError| invalid(error))?;
        let _one_at_a_time = self.placing.lock().await;
        let nodes = self.call(|store| store.nodes()).await?;
        let here = self.passes.connected();
        if nodes.iter().any(|node| node.name == name && here.contains(&node.node)) {
            let text = format!("node {name} is connected; stop it first, or it would join anew");
            return Err(Status::failed_precondition(text));
        }
        let node = self.call(move |store| store.remove_node(&name)).await?;
        tracing::info!(node = %node.name, "node removed");
        Ok(self.node_reply(node))
    }

    fn node_reply(&self, node: NodeInfo) -> Response<proto::NodeReply> {
        let state = self.states(std::slice::from_ref(&node)).pop();
        Response::new(proto::NodeReply { node: Some(node_to_message(&node)), state })
    }
}
