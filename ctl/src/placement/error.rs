//! What an operator is told where the replicas cannot be placed.

use std::fmt;

use datapath::record::NodeId;
use nbd_server::size::Size;

use super::largest_volume;
use super::rule::{Case, Refusal};

/// Nodes that a message names. The others are counted.
const NODES_NAMED_MAX: usize = 6;

/// A node that cannot take a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedNode {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Why not: everything that stands against it.
    pub refusals: Vec<Refusal>,
}

/// Fewer nodes can take a replica than are to be chosen. Shown, it says what the operator can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}, and {}{}; {}", self.need(), self.have(), self.why(), self.advice())]
pub struct NotEnough {
    /// Nodes that were to be chosen.
    pub wanted: usize,
    /// Nodes that could be. Fewer than are wanted.
    pub possible: usize,
    /// Replicas that the volume has already.
    pub held: usize,
    /// Each replica was to be in a zone of its own.
    pub by_zone: bool,
    /// Bytes of the largest volume for which there would have been enough; 0: for none.
    pub largest_bytes: u64,
    /// All nodes that cannot take one, by number.
    pub refusals: Vec<RefusedNode>,
}

impl NotEnough {
    pub(super) fn new(case: Case<'_>, possible: usize) -> NotEnough {
        let request = case.request;
        NotEnough {
            wanted: request.replicas,
            possible,
            held: request.holders.len(),
            by_zone: !request.allow_fewer_zones,
            largest_bytes: largest_volume(case.model, request),
            refusals: refused(case),
        }
    }

    fn need(&self) -> String {
        let (more, other) = if self.held == 0 { ("", "") } else { ("more ", "other ") };
        let place = if self.by_zone { "zone" } else { "node" };
        match self.wanted {
            1 => format!("1 {more}replica needs 1 {other}{place}"),
            wanted => format!("{wanted} {more}replicas need {wanted} {other}{place}s"),
        }
    }

    fn have(&self) -> String {
        match self.possible {
            0 => "none can take one".to_owned(),
            possible => format!("{possible} can take one"),
        }
    }

    /// Those that have a replica are not named: nobody expects another there.
    fn why(&self) -> String {
        let others = self.refusals.iter().filter(|it| !it.refusals.contains(&Refusal::HoldsOne));
        let mut texts: Vec<String> = others.map(RefusedNode::to_string).collect();
        let unnamed = texts.len().saturating_sub(NODES_NAMED_MAX);
        // To name all but one saves nothing.
        if unnamed > 1 {
            texts.truncate(NODES_NAMED_MAX);
            texts.push(format!("and {unnamed} more nodes cannot"));
        }
        if texts.is_empty() { String::new() } else { format!(": {}", texts.join(", ")) }
    }

    fn advice(&self) -> String {
        let fewer = self.held + self.possible;
        let mut ways = Vec::new();
        if fewer > 0 {
            ways.push(format!("use --replicas {fewer}"));
        }
        // A volume that has replicas has its size.
        if self.largest_bytes > 0 && self.held == 0 {
            ways.push(format!("use --size {} or less", Size { bytes: self.largest_bytes }));
        }
        ways.push(format!("add a node{}", if self.by_zone { " in another zone" } else { "" }));
        ways.join(" or ")
    }
}

impl fmt::Display for RefusedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let refusals: Vec<String> = self.refusals.iter().map(Refusal::to_string).collect();
        write!(f, "{} {}", self.name, refusals.join(" and "))
    }
}

/// Every node that is refused, by number.
pub(super) fn refused(case: Case<'_>) -> Vec<RefusedNode> {
    let mut refused = Vec::new();
    for node in &case.model.nodes {
        let refusals = case.refusals(node);
        if !refusals.is_empty() {
            refused.push(RefusedNode { node: node.id, name: node.name.clone(), refusals });
        }
    }
    refused.sort_unstable_by_key(|it| it.node);
    refused
}
