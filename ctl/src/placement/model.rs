//! What placement knows of the cluster, and what it is asked.

use std::collections::BTreeMap;

use datapath::record::NodeId;

/// The cluster, as ctl sees it at one moment. The order of its nodes means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Every node that has joined, each once.
    pub nodes: Vec<Node>,
    /// How much may be promised of a node's capacity, in percent; 100: no more than there is.
    pub overcommit_percent: u32,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its name, for messages.
    pub name: String,
    /// What fails together beyond racks. All nodes without one count as one zone: nothing is known of what
    /// parts them.
    pub zone: Option<String>,
    /// What fails together within the zone. Racks of the same name in two zones are two racks.
    pub rack: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Is it connected?
    pub health: Health,
    /// It keeps what it has, and gets nothing.
    pub cordoned: bool,
    /// It gives away what it has, and gets nothing.
    pub draining: bool,
    /// Bytes that volumes may use, in all of its pools.
    pub capacity_bytes: u64,
    /// Bytes that are promised: the provisioned sizes of all replicas that it has or is getting.
    pub reserved_bytes: u64,
    /// Replicas that it has or is getting.
    pub replicas: usize,
    /// Those of them that are being filled.
    pub fills: usize,
    /// How busy it is, in permille. What exceeds 1000 counts as 1000.
    pub load_permille: u32,
}

/// Whether a node can be given something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is connected.
    Here,
    /// It is not.
    Away,
}

impl Model {
    /// Bytes that may be promised of the node: its capacity with the overcommit, and at most [`u64::MAX`].
    #[must_use]
    pub fn limit_bytes(&self, node: &Node) -> u64 {
        let hundredfold = u128::from(node.capacity_bytes) * u128::from(self.overcommit_percent);
        u64::try_from(hundredfold / 100).unwrap_or(u64::MAX)
    }

    /// Bytes that may still be promised of the node; 0 if it has promised too much already.
    #[must_use]
    pub fn room_bytes(&self, node: &Node) -> u64 {
        self.limit_bytes(node).saturating_sub(node.reserved_bytes)
    }
}

/// Which replicas are to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Provisioned size of the volume. Each replica takes as much.
    pub size_bytes: u64,
    /// Nodes to be chosen now, those in `holders` not counted.
    pub replicas: usize,
    /// Nodes that have a replica already, or are getting one. They count for the spread, and are not chosen
    /// again. The cluster may not know them any more.
    pub holders: Vec<NodeId>,
    /// The node of the volume's task. It is chosen if it is feasible, even where the spread would have
    /// another: who would rather keep the spread of what there is says no node, or does not allow fewer
    /// zones.
    pub near: Option<NodeId>,
    /// Labels that a node must have.
    pub labels: BTreeMap<String, String>,
    /// Zones that a node may be in; none: it may be in any, or without.
    pub zones: Vec<String>,
    /// Nodes of the other volumes of the group that this one should be with.
    pub together: Vec<NodeId>,
    /// Nodes of the other volumes of the group that this one should not be with.
    pub apart: Vec<NodeId>,
    /// Two replicas may be in one zone where no other can take one. Otherwise the request fails.
    pub allow_fewer_zones: bool,
    /// The replicas must be filled from others, which a node does only with
    /// [`FILLS_PER_NODE_MAX`](crate::heal::FILLS_PER_NODE_MAX) at a time. Those of a new volume need not.
    pub needs_fill: bool,
}

impl Request {
    /// So many replicas of a new volume, anywhere. The spread is kept as far as it can be.
    #[must_use]
    pub fn new(size_bytes: u64, replicas: usize) -> Request {
        Request {
            size_bytes,
            replicas,
            holders: Vec::new(),
            near: None,
            labels: BTreeMap::new(),
            zones: Vec::new(),
            together: Vec::new(),
            apart: Vec::new(),
            allow_fewer_zones: true,
            needs_fill: false,
        }
    }
}
