//! A node and what it holds.

use std::collections::BTreeMap;

use nbd_server::control::convert::{MessageError, NodeInfo, node_from_message};
use nbd_server::control::proto::{ListNodesReply, NodeState};
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
        }
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
