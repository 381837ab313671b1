//! What holds for any cluster and any request, with the rules written down once more, plainly.

use super::*;
use crate::heal::FILLS_PER_NODE_MAX;
use crate::placement::{Verdict, choose, largest_volume, place};

const ROUNDS: u64 = 20_000;

fn for_any(mut check: impl FnMut(&Model, &Request, &mut Draw)) {
    for seed in 0..ROUNDS {
        let mut draw = Draw(seed);
        let (model, request) = (draw.model(), draw.request());
        check(&model, &request, &mut draw);
    }
}

fn fits(model: &Model, node: &Node, size_bytes: u64) -> bool {
    let promised = u128::from(node.reserved_bytes) + u128::from(size_bytes);
    // Nothing at all fits even where too much is promised.
    size_bytes == 0
        || promised * 100 <= u128::from(node.capacity_bytes) * u128::from(model.overcommit_percent)
}

/// The hard rules but for that of zones that have one.
fn can(model: &Model, request: &Request, node: &Node) -> bool {
    let in_zone = |zone: &String| request.zones.contains(zone);
    node.health == Health::Here
        && !(node.cordoned || node.draining || request.holders.contains(&node.id))
        && (request.zones.is_empty() || node.zone.iter().any(in_zone))
        && request.labels.iter().all(|(key, value)| node.labels.get(key).is_some_and(|has| has == value))
        && fits(model, node, request.size_bytes)
        && !(request.needs_fill && node.fills >= FILLS_PER_NODE_MAX)
}

/// How many replicas are in each zone and in each rack, the most first: less is better.
fn crowding(model: &Model, request: &Request, chosen: &[NodeId]) -> [Vec<usize>; 2] {
    let has_one = |node: &&Node| request.holders.contains(&node.id) || chosen.contains(&node.id);
    let mut zones: BTreeMap<&Option<String>, usize> = BTreeMap::new();
    let mut racks: BTreeMap<(&Option<String>, &Option<String>), usize> = BTreeMap::new();
    for node in model.nodes.iter().filter(has_one) {
        *zones.entry(&node.zone).or_default() += 1;
        *racks.entry((&node.zone, &node.rack)).or_default() += 1;
    }
    let mut counts = [zones.into_values().collect::<Vec<_>>(), racks.into_values().collect()];
    counts.iter_mut().for_each(|counts| counts.sort_unstable_by(|one, other| other.cmp(one)));
    counts
}

/// Every way to choose, with the task's node in it if that can be.
fn ways(model: &Model, request: &Request) -> Vec<Vec<NodeId>> {
    let new_zone = |node: &Node, others: &[NodeId]| {
        let has_one = |other: &&Node| others.contains(&other.id) || request.holders.contains(&other.id);
        let mut others = model.nodes.iter().filter(has_one).filter(|other| other.id != node.id);
        others.all(|other| other.zone != node.zone)
    };
    let may = |node: &&Node| can(model, request, node) && (request.allow_fewer_zones || new_zone(node, &[]));
    let feasible: Vec<&Node> = model.nodes.iter().filter(may).collect();
    let near = feasible.iter().map(|node| node.id).find(|node| request.near == Some(*node));
    let mut ways = Vec::new();
    for set in 0..1_u32 << feasible.len() {
        let members = feasible.iter().enumerate().filter(|(bit, _)| set >> bit & 1 == 1);
        let way: Vec<&Node> = members.map(|(_, node)| *node).collect();
        let way_ids: Vec<NodeId> = way.iter().map(|node| node.id).collect();
        if way.len() == request.replicas
            && (request.replicas == 0 || near.is_none_or(|near| way_ids.contains(&near)))
            && (request.allow_fewer_zones || way.iter().all(|node| new_zone(node, &way_ids)))
        {
            ways.push(way_ids);
        }
    }
    ways
}

#[test]
fn the_choice_obeys_every_hard_rule_and_no_other_has_a_better_spread() {
    let mut decided = [0_u32; 2];
    for_any(|model, request, _| {
        let ways = ways(model, request);
        let chosen = choose(model, request);
        decided[usize::from(chosen.is_some())] += 1;
        let Some(chosen) = chosen else {
            assert!(ways.is_empty(), "{model:?} {request:?}: {ways:?}");
            return;
        };
        let mut sorted = chosen.clone();
        sorted.sort_unstable();
        let find = |way: &Vec<NodeId>| {
            let mut way = way.clone();
            way.sort_unstable();
            way == sorted
        };
        assert!(ways.iter().any(find), "{model:?} {request:?}: {chosen:?} breaks a rule");
        let best = ways.iter().map(|way| crowding(model, request, way)).min().expect("some");
        assert_eq!(crowding(model, request, &chosen), best, "{model:?} {request:?}: {chosen:?}");
    });
    assert!(decided.into_iter().all(|count| u64::from(count) > ROUNDS / 5), "{decided:?}");
}

#[test]
fn both_functions_agree_and_the_order_tells_nothing() {
    for_any(|model, request, draw| {
        let placement = place(model, request);
        let chosen = placement.as_ref().ok().map(|placement| placement.chosen.clone());
        assert_eq!(choose(model, request), chosen);
        let mut other = model.clone();
        draw.shuffle(&mut other.nodes);
        let mut shuffled = request.clone();
        draw.shuffle(&mut shuffled.holders);
        draw.shuffle(&mut shuffled.zones);
        assert_eq!(place(&other, &shuffled), placement, "{model:?} {request:?}");
        assert_eq!(choose(&other, &shuffled), chosen);
    });
}

#[test]
fn scores_descend_and_every_node_is_told_once() {
    for_any(|model, request, _| {
        let Ok(placement) = place(model, request) else { return };
        let mut told: Vec<NodeId> = placement.nodes.iter().map(|scored| scored.node).collect();
        assert_eq!(told[..request.replicas], placement.chosen);
        told.sort_unstable();
        assert_eq!(told, model.nodes.iter().map(|node| node.id).collect::<Vec<_>>());
        let scores = placement.nodes.iter().map(|scored| match &scored.verdict {
            Verdict::Feasible { score, .. } => Some(*score),
            Verdict::Refused(refusals) => {
                assert!(!refusals.is_empty());
                None
            }
        });
        assert!(scores.is_sorted_by(|one, other| one >= other), "{model:?} {request:?}");
    });
}

#[test]
fn the_tasks_node_is_chosen_whenever_it_can_be() {
    let mut seen = 0_u32;
    for_any(|model, request, draw| {
        let Some(near) = model.nodes.iter().find(|node| request.near == Some(node.id)) else { return };
        let request = Request { allow_fewer_zones: true, ..request.clone() };
        let Some(chosen) = choose(model, &request) else { return };
        if request.replicas > 0 && can(model, &request, near) {
            assert!(chosen.contains(&near.id), "{model:?} {request:?}: {chosen:?}");
            seen += 1;
        }
        // With nothing placed yet, that costs no spread.
        let request = Request { holders: Vec::new(), replicas: draw.count(4), ..request };
        let anywhere = Request { near: None, ..request.clone() };
        let both = [&request, &anywhere].map(|request| choose(model, request));
        let zones = |chosen: &Vec<NodeId>| crowding(model, &request, chosen)[0].clone();
        assert_eq!(both[0].as_ref().map(zones), both[1].as_ref().map(zones));
    });
    assert!(seen > 300, "{seen}");
}

#[test]
fn the_largest_volume_can_be_placed_and_none_larger() {
    let mut seen = 0_u32;
    for_any(|model, request, _| {
        let largest = largest_volume(model, request);
        assert_eq!(largest % 4096, 0);
        let with = |size_bytes: u64| choose(model, &Request { size_bytes, ..request.clone() }).is_some();
        if request.replicas == 0 {
            return;
        }
        assert!(!with(largest + 4096), "{model:?} {request:?}: more than {largest}");
        if largest > 0 {
            assert!(with(largest), "{model:?} {request:?}: not {largest}");
            seen += 1;
        }
        if let Err(error) = place(model, request) {
            assert_eq!(error.largest_bytes, largest);
            assert!(error.possible < error.wanted);
        }
    });
    assert!(seen > 1000, "{seen}");
}
