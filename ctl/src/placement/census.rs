//! What placement knows, counted from the register of nodes and the records of all volumes.

use std::collections::BTreeMap;
use std::sync::Arc;

use datapath::record::{NodeId, Record};
use datapath::units::BLOCK_BYTES_U64;
use nbd_server::control::convert::NodeInfo;

use super::model::{Health, Model, Node};

/// The cluster with these nodes and volumes. Nodes that are in `here` are connected.
#[must_use]
pub fn census(
    nodes: &[NodeInfo],
    records: &[Arc<Record>],
    here: &[NodeId],
    overcommit_percent: u32,
) -> Model {
    let mut holdings: BTreeMap<NodeId, Holding> = BTreeMap::new();
    for record in records {
        for node in record.replicas() {
            let holding = holdings.entry(node).or_default();
            // Volumes are bounded by far less than what overflows.
            holding.reserved_bytes = holding.reserved_bytes.saturating_add(size_bytes(record));
            holding.replicas += 1;
            holding.fills += usize::from(record.fresh.contains(&node));
        }
    }
    let node = |info: &NodeInfo| {
        let holding = holdings.get(&info.node).copied().unwrap_or_default();
        Node {
            id: info.node,
            name: info.name.to_string(),
            zone: info.facts.zone.clone(),
            rack: info.facts.rack.clone(),
            labels: info.facts.labels.clone(),
            health: if here.contains(&info.node) { Health::Here } else { Health::Away },
            cordoned: false,
            draining: info.draining,
            capacity_bytes: info.facts.capacity_bytes,
            reserved_bytes: holding.reserved_bytes,
            replicas: holding.replicas,
            fills: holding.fills,
            load_permille: 0,
        }
    };
    Model { nodes: nodes.iter().map(node).collect(), overcommit_percent }
}

/// What a replica of the volume may come to.
#[must_use]
pub fn size_bytes(record: &Record) -> u64 {
    record.size_blocks.saturating_mul(BLOCK_BYTES_U64)
}

#[derive(Clone, Copy, Debug, Default)]
struct Holding {
    reserved_bytes: u64,
    replicas: usize,
    fills: usize,
}

impl Model {
    /// The node gets one more replica, which is filled from others.
    pub fn give(&mut self, node: NodeId, size_bytes: u64) {
        if let Some(node) = self.nodes.iter_mut().find(|known| known.id == node) {
            node.reserved_bytes = node.reserved_bytes.saturating_add(size_bytes);
            node.replicas += 1;
            node.fills += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use datapath::record::VolumeNumber;
    use nbd_server::control::convert::NodeFacts;

    use super::*;

    #[test]
    fn what_volumes_may_come_to_is_counted_at_each_of_their_nodes() {
        let node = |number: u32| NodeInfo {
            node: NodeId(number),
            name: format!("n{number}").parse().expect("a name"),
            boot: 1,
            nbd: None,
            peer: "h:1".to_owned(),
            facts: NodeFacts { capacity_bytes: 1 << 30, zone: Some("z".to_owned()), ..NodeFacts::default() },
            draining: false,
        };
        let record = |blocks, nodes: &[NodeId]| Record::new(VolumeNumber(1), "v", [0; 16], blocks, nodes);
        let first = record(10, &[NodeId(1), NodeId(2)]).with_replica(NodeId(3), 1).expect("it has none");
        let records = [Arc::new(first), Arc::new(record(5, &[NodeId(2), NodeId(9)]))];
        let mut model = census(&[node(1), node(2), node(3)], &records, &[NodeId(2)], 100);
        let counted = |model: &Model| -> Vec<(u64, usize, usize, Health)> {
            let it = |node: &Node| (node.reserved_bytes / 4096, node.replicas, node.fills, node.health);
            model.nodes.iter().map(it).collect()
        };
        let expected = [(10, 1, 0, Health::Away), (15, 2, 0, Health::Here), (10, 1, 1, Health::Away)];
        assert_eq!(counted(&model), expected);
        model.give(NodeId(2), 4096);
        assert_eq!(counted(&model)[1], (16, 3, 1, Health::Here));
    }
}
