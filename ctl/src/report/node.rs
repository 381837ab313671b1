//! A node and what it holds.

use std::collections::BTreeMap;

use nbd_server::control::convert::{MessageError, NodeInfo, node_from_message};
use nbd_server::control::proto::{ListNodesReply, NodeReply, NodeState};
use serde::Serialize;
use utoipa::ToSchema;

/// A node as it is printed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct NodeReport {
    pub node: u32,
    pub name: String,
    pub nbd: Option<String>,
    pub peer: String,
    /// In hexadecimal: JavaScript has no integers of 64 bits.
    pub boot: String,
    pub version: String,
    pub zone: Option<String>,
    pub rack: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub connected: bool,
    /// What volumes may use in its pools.
    pub capacity_bytes: u64,
    /// Sum of the sizes of the volumes of which it has a replica.
    pub reserved_bytes: u64,
    pub replicas: u32,
    /// Of those: they are being filled.
    pub fills: u32,
    /// Volumes that it leads.
    pub heads: u32,
    /// Volumes that are attached to it.
    pub attached: u32,
    /// It gives away what it has, and gets nothing.
    pub draining: bool,
}

impl NodeReport {
    /// As the register and the records say.
    #[must_use]
    pub fn new(node: NodeInfo, state: NodeState) -> NodeReport {
        NodeReport {
            node: node.node.0,
            name: node.name.to_string(),
            nbd: node.nbd,
            peer: node.peer,
            boot: format!("{:016x}", node.boot),
            version: node.facts.version,
            zone: node.facts.zone,
            rack: node.facts.rack,
            labels: node.facts.labels,
            connected: state.connected,
            capacity_bytes: node.facts.capacity_bytes,
            reserved_bytes: state.reserved_bytes,
            replicas: state.replicas,
            fills: state.fills,
            heads: state.heads,
            attached: state.attached,
            draining: node.draining,
        }
    }

    /// The one of a reply.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_reply(reply: NodeReply) -> Result<NodeReport, MessageError> {
        let node = reply.node.ok_or(MessageError::Missing("node"))?;
        Ok(NodeReport::new(node_from_message(node)?, reply.state.unwrap_or_default()))
    }

    /// Nothing would be lost with it: it has no replica.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.replicas == 0
    }

    /// All nodes of a list.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn all(list: ListNodesReply) -> Result<Vec<NodeReport>, MessageError> {
        // One of an earlier version tells no states.
        let states = list.states.into_iter().chain(std::iter::repeat_with(NodeState::default));
        let nodes = list.nodes.into_iter().zip(states);
        nodes.map(|(node, state)| Ok(NodeReport::new(node_from_message(node)?, state))).collect()
    }
}
