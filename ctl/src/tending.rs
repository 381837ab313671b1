//! Which volumes need a head though nobody uses them, and which node is asked: a pure function of what there is.
//!
//! Replicas are filled and taken out by heads. A volume that no client has chosen has none, so a node is asked to lead it for
//! as long as that takes (`datapath/src/engine/shard/replication/tending.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datapath::record::{NodeId, Record, VolumeNumber};

use crate::heal::Presence;
use crate::placement::Model;

/// Volumes that need a head, and for each a node that can lead it: one whose own replica stays, if there is one.
#[must_use]
pub fn wishes(
    records: &[Arc<Record>],
    model: &Model,
    presence: &BTreeMap<NodeId, Presence>,
    grace: Duration,
) -> Vec<(VolumeNumber, NodeId)> {
    let is_here = |node: NodeId| presence.get(&node) == Some(&Presence::Here);
    let is_drained = |node: NodeId| model.nodes.iter().any(|known| known.id == node && known.draining);
    let is_gone = |node: NodeId| match presence.get(&node) {
        Some(Presence::Here) => false,
        Some(Presence::Away(away)) => *away >= grace,
        None => true,
    };
    let wish = |record: &Arc<Record>| {
        let head = record.living_head().map(|head| head.node).or(record.attached);
        if head.is_some_and(is_here) || !needs_head(record, is_here, is_gone) {
            return None;
        }
        let able = || record.in_sync.iter().copied().filter(|node| is_here(*node));
        let node = able().find(|node| !is_drained(*node)).or_else(|| able().next())?;
        // Somebody else's volume: only that node leads it.
        record.attached.is_none_or(|attached| attached == node).then_some((record.volume, node))
    };
    records.iter().filter_map(wish).collect()
}

/// Would a head do something for the volume's replicas?
fn needs_head(record: &Record, is_here: impl Fn(NodeId) -> bool, is_gone: impl Fn(NodeId) -> bool) -> bool {
    let wanted = usize::try_from(record.replicas_wanted).expect("64 at most");
    let out = record.replicas().into_iter().filter(|node| !record.is_in_sync(*node));
    let fills = out.into_iter().any(|node| is_here(node) && !record.leaving.contains(&node));
    let goes = record.leaving.iter().any(|node| record.is_in_sync(*node));
    // One that is gone is replaced only once a head has left it out.
    let lost = record.in_sync.iter().any(|node| is_gone(*node));
    fills || goes && record.staying().count() >= wanted || lost
}

#[cfg(test)]
mod tests {
    use datapath::record::HeadSession;

    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    fn record() -> Record {
        let nodes = [NodeId(1), NodeId(2), NodeId(3)];
        Record::new(VolumeNumber(7), "v", [0; 16], 8, &nodes)
    }

    /// The node that is asked while all nodes but `away` are here.
    fn asked(record: &Record, away: &[(u32, Duration)]) -> Option<u32> {
        let mut presence: BTreeMap<NodeId, Presence> =
            (1..=4).map(|node| (NodeId(node), Presence::Here)).collect();
        for (node, since) in away {
            presence.insert(NodeId(*node), Presence::Away(*since));
        }
        let model = Model { nodes: Vec::new(), overcommit_percent: 100 };
        let wishes = wishes(&[Arc::new(record.clone())], &model, &presence, GRACE);
        wishes.first().map(|(_, node)| node.0)
    }

    #[test]
    fn a_volume_that_lacks_nothing_is_left_alone() {
        assert_eq!(asked(&record(), &[]), None);
        assert_eq!(asked(&record(), &[(2, Duration::ZERO)]), None, "it may come back");
    }

    #[test]
    fn what_is_to_be_filled_or_to_go_or_is_gone_takes_a_head() {
        let more = record().with_replica(NodeId(4), 1).expect("it has none");
        assert_eq!(asked(&more, &[]), Some(1));
        assert_eq!(asked(&more, &[(1, Duration::ZERO)]), Some(2));
        assert_eq!(asked(&more, &[(4, Duration::ZERO)]), None, "nothing can be done now");
        assert_eq!(asked(&record(), &[(2, GRACE)]), Some(1));
        let leaving = record().with_leaving(NodeId(1), true, 1).expect("it has one");
        assert_eq!(asked(&leaving, &[]), None, "too few would stay");
        assert_eq!(asked(&Record { replicas_wanted: 2, ..leaving }, &[]), Some(1));
    }

    #[test]
    fn a_head_that_lives_is_not_disturbed_and_a_dead_one_is_followed() {
        let mut more = record().with_replica(NodeId(4), 1).expect("it has none");
        (more.epoch, more.head) = (1, Some(HeadSession { node: NodeId(3), session: 1 }));
        assert_eq!(asked(&more, &[]), None);
        assert_eq!(asked(&more, &[(3, Duration::ZERO)]), Some(1));
        more.attached = Some(NodeId(3));
        assert_eq!(asked(&more, &[(3, Duration::ZERO)]), None, "it is attached elsewhere");
    }
}
