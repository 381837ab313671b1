//! Which replicas are given to other nodes, and which are forgotten, because a node stays away, or is drained. A pure function
//! of what there is: asked again and again, it comes to rest.
//!
//! ```text
//!   in sync ──away──▶ stale ──its node is gone for the grace time──▶ another node gets a fresh one
//!                       │                                               │ filled, in sync
//!                       │ it is back first: the fresh one is forgotten  ▼
//!                       └───────────────────────────────────────▶ the old one is forgotten
//!
//!   in sync ──its node is drained──▶ another node gets a fresh one ──in sync──▶ leaving ──the head takes it out──▶ forgotten
//! ```
//!
//! Who is in sync only heads change. So a member whose node is gone is replaced when a head has left it out, and a volume
//! that nobody uses is healed when somebody does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datapath::record::{NodeId, Record, VolumeNumber};

use crate::placement::{self, Model, Request};

/// Replicas that a node is filled with at a time, of all volumes.
pub const FILLS_PER_NODE_MAX: usize = 4;

/// A node, as ctl sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is connected.
    Here,
    /// It has not been for so long.
    Away(Duration),
}

/// A step, and the version of the record that it was decided on: it is for no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What is to be done.
    pub step: Step,
    /// On what.
    pub version: u64,
}

/// What is to be done for a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The node gets a replica.
    Add(VolumeNumber, NodeId),
    /// The node's replica, which is not in sync, is forgotten.
    Remove(VolumeNumber, NodeId),
    /// The node's replica, which is in sync, is to go: there are enough others.
    Leave(VolumeNumber, NodeId),
    /// It stays after all.
    Stay(VolumeNumber, NodeId),
}

impl Step {
    /// The volume and the node.
    #[must_use]
    pub fn of(self) -> (VolumeNumber, NodeId) {
        let (Step::Add(volume, node)
        | Step::Remove(volume, node)
        | Step::Leave(volume, node)
        | Step::Stay(volume, node)) = self;
        (volume, node)
    }
}

/// At most one step for each volume. A node that stays away for `grace` is gone; one that never joined is, too. Placement
/// chooses the nodes, by the model of what there is at the same moment.
#[must_use]
pub fn steps(
    records: &[Arc<Record>],
    model: Model,
    presence: &BTreeMap<NodeId, Presence>,
    grace: Duration,
) -> Vec<Decision> {
    let mut model = model;
    let mut steps = Vec::new();
    for record in records {
        let is_gone = |node: NodeId| match presence.get(&node) {
            Some(Presence::Here) => false,
            Some(Presence::Away(away)) => *away >= grace,
            None => true,
        };
        let is_drained = |node: NodeId| model.nodes.iter().any(|known| known.id == node && known.draining);
        let step = step(record, is_gone, is_drained, || {
            choose(record, &model, |node| is_gone(node) || is_drained(node))
        });
        if let Some(Step::Add(_, node)) = step {
            model.give(node, placement::size_bytes(record));
        }
        steps.extend(step.map(|step| Decision { step, version: record.version }));
    }
    steps
}

fn step(
    record: &Record,
    is_gone: impl Fn(NodeId) -> bool,
    is_drained: impl Fn(NodeId) -> bool,
    choose: impl FnOnce() -> Option<NodeId>,
) -> Option<Step> {
    let wanted = usize::try_from(record.replicas_wanted).expect("64 at most");
    if let Some(node) = record.leaving.iter().find(|node| !is_drained(**node)) {
        return Some(Step::Stay(record.volume, *node));
    }
    let out: Vec<NodeId> = record.replicas().into_iter().filter(|node| !record.is_in_sync(*node)).collect();
    if let Some(node) = out.iter().find(|node| is_drained(**node) && record.fresh.contains(node)) {
        return Some(Step::Remove(record.volume, *node));
    }
    let coming = out.iter().filter(|node| !is_gone(**node) && !is_drained(**node)).count();
    let in_sync = record.in_sync.iter().filter(|node| !is_drained(**node)).count();
    if in_sync >= wanted {
        // Whole without it. One that is only late to come back stays: it costs nothing to keep, and may be needed.
        let is_over = |node: &&NodeId| is_gone(**node) || is_drained(**node) || record.fresh.contains(node);
        if let Some(gone) = out.iter().find(is_over) {
            return Some(Step::Remove(record.volume, *gone));
        }
        let may_go = |node: &&NodeId| is_drained(**node) && !record.leaving.contains(node);
        return record.in_sync.iter().find(may_go).map(|node| Step::Leave(record.volume, *node));
    }
    if in_sync + coming > wanted {
        // What comes back lacks less than what is new.
        let fresh = out.iter().rev().find(|node| record.fresh.contains(node))?;
        return Some(Step::Remove(record.volume, *fresh));
    }
    if in_sync + coming < wanted {
        return Some(Step::Add(record.volume, choose()?));
    }
    None
}

/// The node that can take one more replica best. Those on nodes that are gone, or soon will be, protect from nothing any more.
fn choose(record: &Record, model: &Model, is_over: impl Fn(NodeId) -> bool) -> Option<NodeId> {
    let holders = record.replicas().into_iter().filter(|node| !is_over(*node)).collect();
    let request = Request { holders, needs_fill: true, ..Request::new(placement::size_bytes(record), 1) };
    placement::choose(model, &request)?.into_iter().find(|node| !record.has_replica(*node))
}

#[cfg(test)]
mod tests {
    use datapath::record::StaleReplica;

    use super::*;
    use crate::placement::{Health, Node};

    const GRACE: Duration = Duration::from_secs(600);

    fn id(number: u32) -> NodeId {
        NodeId(number)
    }

    fn volume(number: u32, on: &[u32]) -> Record {
        let nodes: Vec<NodeId> = on.iter().copied().map(NodeId).collect();
        Record::new(VolumeNumber(number), "v", [0; 16], 8, &nodes)
    }

    /// As a head does with a member that does not answer.
    fn leave_out(record: &mut Record, node: u32) {
        record.version += 1;
        record.in_sync.retain(|other| *other != id(node));
        record.stale.push(StaleReplica { node: id(node), since_version: record.version });
        record.stale.sort_by_key(|stale| stale.node);
    }

    /// As a head does with a replica that it has filled.
    fn admit(record: &mut Record, node: u32) {
        *record = record.without_replica(id(node), 0).expect("not in sync");
        record.in_sync.push(id(node));
        record.in_sync.sort_unstable();
    }

    fn all_here(nodes: u32) -> BTreeMap<NodeId, Presence> {
        (1..=nodes).map(|node| (id(node), Presence::Here)).collect()
    }

    /// Nodes with room for everything, unless it is said how many blocks are left at one.
    fn model(nodes: &BTreeMap<NodeId, Presence>, small: Option<(u32, u64)>) -> Model {
        let node = |(node, presence): (&NodeId, &Presence)| Node {
            id: *node,
            name: format!("n{}", node.0),
            zone: None,
            rack: None,
            labels: BTreeMap::new(),
            health: if *presence == Presence::Here { Health::Here } else { Health::Away },
            cordoned: false,
            draining: false,
            capacity_bytes: small.filter(|it| it.0 == node.0).map_or(1 << 40, |it| it.1 * 4096),
            reserved_bytes: 0,
            replicas: 0,
            fills: 0,
            load_permille: 0,
        };
        Model { nodes: nodes.iter().map(node).collect(), overcommit_percent: 100 }
    }

    fn one(record: &Record, nodes: &BTreeMap<NodeId, Presence>) -> Option<Step> {
        let steps = steps(&[Arc::new(record.clone())], model(nodes, None), nodes, GRACE);
        assert!(steps.len() <= 1);
        steps.first().map(|decision| decision.step)
    }

    #[test]
    fn a_replica_whose_node_is_gone_is_replaced_and_then_forgotten() {
        let mut record = volume(1, &[1, 2, 3]);
        let mut nodes = all_here(4);
        assert_eq!(one(&record, &nodes), None);
        leave_out(&mut record, 2);
        nodes.insert(id(2), Presence::Away(GRACE - Duration::from_millis(1)));
        assert_eq!(one(&record, &nodes), None, "it may come back");
        nodes.insert(id(2), Presence::Away(GRACE));
        assert_eq!(one(&record, &nodes), Some(Step::Add(VolumeNumber(1), id(4))));
        record = record.with_replica(id(4), 0).expect("it has none");
        assert_eq!(one(&record, &nodes), None, "it is being filled");
        admit(&mut record, 4);
        assert_eq!(one(&record, &nodes), Some(Step::Remove(VolumeNumber(1), id(2))));
        record = record.without_replica(id(2), 0).expect("not in sync");
        assert_eq!(one(&record, &nodes), None);
    }

    #[test]
    fn one_that_comes_back_in_time_is_not_replaced_and_what_was_begun_is_given_up() {
        let mut record = volume(1, &[1, 2, 3]);
        leave_out(&mut record, 2);
        let nodes = all_here(4);
        assert_eq!(one(&record, &nodes), None, "it catches up");
        let replaced = record.with_replica(id(4), 0).expect("it has none");
        assert_eq!(one(&replaced, &nodes), Some(Step::Remove(VolumeNumber(1), id(4))));
    }

    #[test]
    fn a_node_without_room_is_passed_over() {
        let mut record = volume(1, &[1, 2]);
        leave_out(&mut record, 2);
        let mut nodes = all_here(3);
        nodes.insert(id(2), Presence::Away(GRACE));
        let records = [Arc::new(record.clone())];
        for (blocks, expected) in [(8, Some(Step::Add(VolumeNumber(1), id(3)))), (7, None)] {
            let steps = steps(&records, model(&nodes, Some((3, blocks))), &nodes, GRACE);
            assert_eq!(steps.first().map(|decision| decision.step), expected, "{blocks} blocks");
        }
    }

    /// The step while these nodes are drained.
    fn drained(record: &Record, nodes: &BTreeMap<NodeId, Presence>, which: &[u32]) -> Option<Step> {
        let mut model = model(nodes, None);
        model.nodes.iter_mut().for_each(|node| node.draining = which.contains(&node.id.0));
        let steps = steps(&[Arc::new(record.clone())], model, nodes, GRACE);
        steps.first().map(|decision| decision.step)
    }

    #[test]
    fn a_drained_node_gives_its_replica_away_once_another_is_in_sync() {
        let mut record = volume(1, &[1, 2, 3]);
        let nodes = all_here(4);
        assert_eq!(drained(&record, &nodes, &[2]), Some(Step::Add(VolumeNumber(1), id(4))));
        apply(&mut record, Some(Step::Add(VolumeNumber(1), id(4))));
        assert_eq!(drained(&record, &nodes, &[2]), None, "it is being filled");
        assert_eq!(
            drained(&record, &nodes, &[2, 4]),
            Some(Step::Remove(VolumeNumber(1), id(4))),
            "it holds nothing"
        );
        admit(&mut record, 4);
        let leave = Some(Step::Leave(VolumeNumber(1), id(2)));
        assert_eq!(drained(&record, &nodes, &[2]), leave);
        apply(&mut record, leave);
        assert_eq!(drained(&record, &nodes, &[2]), None, "the head takes it out");
        assert_eq!(drained(&record, &nodes, &[]), Some(Step::Stay(VolumeNumber(1), id(2))), "undrained");
        leave_out(&mut record, 2);
        let remove = Some(Step::Remove(VolumeNumber(1), id(2)));
        assert_eq!(drained(&record, &nodes, &[2]), remove);
        apply(&mut record, remove);
        assert_eq!(drained(&record, &nodes, &[2]), None);
        assert_eq!(record.in_sync, [id(1), id(3), id(4)]);
    }

    #[test]
    fn a_drained_node_keeps_what_no_other_can_take() {
        let mut record = volume(1, &[1, 2, 3]);
        let nodes = all_here(3);
        assert_eq!(drained(&record, &nodes, &[2]), None);
        // Nor does it give away what is needed to bring the volume back.
        leave_out(&mut record, 2);
        assert_eq!(drained(&record, &nodes, &[2]), None);
    }

    #[test]
    fn where_no_node_is_left_nothing_is_done() {
        let mut record = volume(1, &[1, 2, 3]);
        leave_out(&mut record, 2);
        let mut nodes = all_here(4);
        nodes.insert(id(2), Presence::Away(GRACE));
        nodes.insert(id(4), Presence::Away(Duration::ZERO));
        assert_eq!(one(&record, &nodes), None);
    }

    #[test]
    fn who_is_in_sync_is_the_affair_of_heads() {
        let record = volume(1, &[1, 2, 3]);
        let mut nodes = all_here(4);
        nodes.insert(id(2), Presence::Away(GRACE * 9));
        assert_eq!(one(&record, &nodes), None);
    }

    #[test]
    fn the_replicas_of_a_lost_node_are_spread_and_no_node_is_overrun() {
        let mut records: Vec<Record> = (1..=20).map(|number| volume(number, &[1, 2])).collect();
        records.iter_mut().for_each(|record| leave_out(record, 2));
        let mut nodes = all_here(5);
        nodes.insert(id(2), Presence::Away(GRACE));
        let shared: Vec<Arc<Record>> = records.iter().cloned().map(Arc::new).collect();
        let steps = steps(&shared, model(&nodes, None), &nodes, GRACE);
        let given = |node: u32| {
            steps.iter().filter(|it| matches!(it.step, Step::Add(_, to) if to == id(node))).count()
        };
        let counts: Vec<usize> = (3..=5).map(given).collect();
        assert_eq!((steps.len(), counts), (12, vec![FILLS_PER_NODE_MAX; 3]));
    }

    /// Whatever comes and goes: once it stays as it is, the steps end, and every volume has what it wants if there are nodes
    /// for it.
    #[test]
    fn it_comes_to_rest() {
        let mut state = 7_u64;
        let mut draw = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..300 {
            let count = u32::try_from(3 + draw(4)).expect("a few");
            let mut record = volume(1, &[1, 2, 3]);
            let mut nodes = all_here(count);
            for _ in 0..draw(12) {
                let node = 1 + u32::try_from(draw(count.into())).expect("a few");
                let presence = if draw(2) == 0 { Presence::Here } else { Presence::Away(GRACE) };
                nodes.insert(id(node), presence);
                if presence != Presence::Here && record.is_in_sync(id(node)) && record.in_sync.len() > 1 {
                    leave_out(&mut record, node);
                }
                let step = one(&record, &nodes);
                apply(&mut record, step);
            }
            let is_here = |node: &NodeId| nodes[node] == Presence::Here;
            let mut left = 40;
            loop {
                let step = one(&record, &nodes);
                apply(&mut record, step);
                let coming =
                    record.replicas().into_iter().find(|node| !record.is_in_sync(*node) && is_here(node));
                match (step, coming) {
                    (None, None) => break,
                    (None, Some(node)) => admit(&mut record, node.0),
                    _ => {}
                }
                left -= 1;
                assert!(left > 0, "{record:?}, {nodes:?}");
            }
            let in_sync_or_here = nodes.keys().filter(|node| is_here(node) || record.is_in_sync(**node));
            assert!(record.in_sync.len() >= in_sync_or_here.count().min(3), "{record:?}, {nodes:?}");
        }
    }

    fn apply(record: &mut Record, step: Option<Step>) {
        match step {
            Some(Step::Add(_, node)) => *record = record.with_replica(node, 0).expect("it has none"),
            Some(Step::Remove(_, node)) => *record = record.without_replica(node, 0).expect("not in sync"),
            Some(Step::Leave(_, node)) => *record = record.with_leaving(node, true, 0).expect("it has one"),
            Some(Step::Stay(_, node)) => *record = record.with_leaving(node, false, 0).expect("it has one"),
            None => {}
        }
    }
}
