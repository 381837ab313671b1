//! Each rule by itself.

use super::*;
use crate::heal::FILLS_PER_NODE_MAX;
use crate::placement::{Reason, Refusal, Verdict, choose, largest_volume, place};

fn chosen(model: &Model, request: &Request) -> Vec<u32> {
    let chosen = choose(model, request).expect("enough");
    chosen.into_iter().map(|node| node.0).collect()
}

/// The refusals of node 1, if node 2 of two is chosen; nothing if node 1 is.
fn refused(change: impl FnOnce(&mut Node), request: &Request) -> Vec<Refusal> {
    let mut model = cluster("a b");
    change(&mut model.nodes[0]);
    let placement = place(&model, request).expect("one can");
    let verdict =
        placement.nodes.into_iter().find(|scored| scored.node == id(1)).expect("all are told").verdict;
    match verdict {
        Verdict::Feasible { .. } => Vec::new(),
        Verdict::Refused(refusals) => refusals,
    }
}

#[test]
fn a_node_that_is_away_cordoned_or_drained_gets_nothing() {
    assert_eq!(refused(|_| (), &request(1, &[])), []);
    assert_eq!(refused(|node| node.health = Health::Away, &request(1, &[])), [Refusal::Away]);
    assert_eq!(refused(|node| node.cordoned = true, &request(1, &[])), [Refusal::Cordoned]);
    assert_eq!(refused(|node| node.draining = true, &request(1, &[])), [Refusal::Draining]);
}

#[test]
fn every_refusal_is_told() {
    let broken =
        |node: &mut Node| (node.health, node.cordoned, node.capacity_bytes) = (Health::Away, true, 4096);
    let no_room = Refusal::NoRoom { free_bytes: 4096, needed_bytes: GIB };
    assert_eq!(refused(broken, &request(1, &[])), [Refusal::Away, Refusal::Cordoned, no_room]);
}

#[test]
fn a_node_gets_one_replica_of_a_volume() {
    assert_eq!(refused(|_| (), &request(1, &[1])), [Refusal::HoldsOne]);
    assert_eq!(choose(&cluster("a b"), &request(2, &[1])), None);
    assert_eq!(choose(&cluster("a b"), &request(3, &[])), None);
}

#[test]
fn a_node_has_the_labels_that_are_asked_for() {
    let labels = BTreeMap::from([("disk".to_owned(), "ssd".to_owned()), ("room".to_owned(), "3".to_owned())]);
    let request = Request { labels: labels.clone(), ..request(1, &[]) };
    let mut model = cluster("a b c");
    model.nodes[1].labels = BTreeMap::from([("disk".to_owned(), "hdd".to_owned())]);
    model.nodes[2].labels = labels;
    let placement = place(&model, &request).expect("n3 has them");
    assert_eq!(placement.chosen, ids(&[3]));
    let lacking = Refusal::LacksLabels(vec!["disk=ssd".to_owned(), "room=3".to_owned()]);
    assert_eq!(placement.nodes[1].verdict, Verdict::Refused(vec![lacking]));
}

#[test]
fn a_node_is_in_a_zone_that_is_allowed() {
    let request = Request { zones: vec!["c".to_owned(), "b".to_owned()], ..request(1, &[]) };
    assert_eq!(refused(|_| (), &request), [Refusal::OtherZone { zone: Some("a".to_owned()) }]);
    assert_eq!(refused(|node| node.zone = None, &request), [Refusal::OtherZone { zone: None }]);
}

#[test]
fn capacity_is_kept_to_the_byte_and_no_number_is_too_large() {
    let leave = |bytes: u64| move |node: &mut Node| node.reserved_bytes = node.capacity_bytes - bytes;
    let no_room = |free_bytes| Refusal::NoRoom { free_bytes, needed_bytes: GIB };
    assert_eq!(refused(leave(GIB), &request(1, &[])), []);
    assert_eq!(refused(leave(GIB - 1), &request(1, &[])), [no_room(GIB - 1)]);
    assert_eq!(refused(|node| node.reserved_bytes = u64::MAX, &request(1, &[])), [no_room(0)]);

    let mut model = cluster("a");
    model.overcommit_percent = 150;
    assert_eq!(largest_volume(&model, &request(1, &[])), 150 * GIB);
    assert!(choose(&model, &Request::new(150 * GIB, 1)).is_some());
    assert_eq!(choose(&model, &Request::new(150 * GIB + 1, 1)), None);
    (model.nodes[0].capacity_bytes, model.overcommit_percent) = (u64::MAX, u32::MAX);
    assert!(place(&model, &Request::new(u64::MAX, 1)).is_ok());
    model.nodes[0].reserved_bytes = 1;
    assert_eq!(choose(&model, &Request::new(u64::MAX, 1)), None);
    (model.nodes[0].capacity_bytes, model.nodes[0].reserved_bytes) = (0, 0);
    assert!(place(&model, &Request::new(0, 1)).is_ok());
}

#[test]
fn a_node_is_filled_with_a_few_at_a_time() {
    let busy = |node: &mut Node| node.fills = FILLS_PER_NODE_MAX;
    let fill = Request { needs_fill: true, ..request(1, &[]) };
    assert_eq!(refused(busy, &request(1, &[])), []);
    assert_eq!(refused(busy, &fill), [Refusal::Filling { fills: FILLS_PER_NODE_MAX }]);
    assert_eq!(refused(|node| node.fills = FILLS_PER_NODE_MAX - 1, &fill), []);
}

#[test]
fn zones_then_racks_are_spread() {
    assert_eq!(chosen(&cluster("a a b b c"), &request(3, &[])), [1, 3, 5]);
    assert_eq!(chosen(&cluster("a a b b c"), &request(2, &[2])), [3, 5]);
    assert_eq!(chosen(&cluster("a a b b c"), &request(4, &[])), [1, 3, 5, 2]);
    assert_eq!(chosen(&cluster("a/1 a/1 a/2"), &request(2, &[])), [1, 3]);
    // Racks of one name in two zones are two; what is in no zone is in one.
    assert_eq!(chosen(&cluster("a/1 b/1 a/2"), &request(3, &[])), [1, 2, 3]);
    assert_eq!(chosen(&cluster("- - a"), &request(2, &[])), [1, 3]);
    // A zone counts more than a rack, and both more than space.
    let mut model = cluster("a/1 a/2 b/1");
    model.nodes[2].reserved_bytes = 98 * GIB;
    assert_eq!(chosen(&model, &request(1, &[1])), [3]);
}

#[test]
fn fewer_zones_than_replicas_only_where_that_is_allowed() {
    let strict =
        |replicas, holders: &[u32]| Request { allow_fewer_zones: false, ..request(replicas, holders) };
    assert_eq!(chosen(&cluster("a a b"), &strict(2, &[])), [1, 3]);
    assert_eq!(choose(&cluster("a a b"), &strict(3, &[])), None);
    assert_eq!(choose(&cluster("a a b"), &strict(1, &[1, 3])), None);
    assert_eq!(chosen(&cluster("a a b"), &request(1, &[1, 3])), [2]);
    let near = Request { near: Some(id(2)), ..strict(1, &[1]) };
    assert_eq!(chosen(&cluster("a a b"), &near), [3]);
}

#[test]
fn the_tasks_node_comes_first() {
    let near =
        |number, replicas, holders: &[u32]| Request { near: Some(id(number)), ..request(replicas, holders) };
    let mut model = cluster("a a b b c");
    (model.nodes[3].reserved_bytes, model.nodes[3].load_permille) = (99 * GIB, 1000);
    assert_eq!(chosen(&model, &near(4, 3, &[])), [4, 1, 5]);
    assert_eq!(chosen(&model, &near(4, 1, &[3])), [4], "even where the spread would have another");
    assert_eq!(chosen(&model, &near(4, 2, &[4])), [1, 5]);
    assert_eq!(chosen(&model, &near(9, 1, &[])), [1]);
    model.nodes[3].reserved_bytes += 1;
    assert_eq!(chosen(&model, &near(4, 1, &[])), [1]);
}

#[test]
fn then_space_load_replicas_and_the_group_count() {
    let full = |node: &mut Node| node.reserved_bytes = 10 * GIB;
    let busy = |node: &mut Node| node.load_permille = 200;
    let crowded = |node: &mut Node| node.replicas = 8;
    let first = |change: &[&dyn Fn(&mut Node)], request: &Request| {
        let mut model = cluster("a a");
        change.iter().zip(&mut model.nodes).for_each(|(change, node)| change(node));
        chosen(&model, request)[0]
    };
    let group = |together: &[u32], apart: &[u32]| Request {
        together: ids(together),
        apart: ids(apart),
        ..request(1, &[])
    };
    assert_eq!(first(&[], &request(1, &[])), 1, "ties go by number");
    assert_eq!(first(&[&full, &busy], &request(1, &[])), 2);
    assert_eq!(first(&[&busy, &crowded], &request(1, &[])), 2);
    assert_eq!(first(&[&crowded], &group(&[1], &[])), 2);
    assert_eq!(first(&[], &group(&[2], &[])), 2);
    assert_eq!(first(&[], &group(&[], &[1])), 2);
    assert_eq!(first(&[], &group(&[2], &[2])), 1);
    // Less than a step of space lets the others speak, and speaks last.
    let hardly = |node: &mut Node| node.reserved_bytes = GIB / 2;
    assert_eq!(first(&[&hardly], &group(&[1], &[])), 1);
    assert_eq!(first(&[&hardly], &request(1, &[])), 2);
}

#[test]
fn what_is_chosen_comes_first_and_tells_why() {
    let mut model = cluster("a/1 a/2 b -");
    model.nodes[3].health = Health::Away;
    let request = Request { near: Some(id(2)), together: ids(&[3]), apart: ids(&[1]), ..request(2, &[]) };
    let placement = place(&model, &request).expect("there are three");
    assert_eq!(placement.chosen, ids(&[2, 3]));
    let order: Vec<NodeId> = placement.nodes.iter().map(|scored| scored.node).collect();
    assert_eq!(order, ids(&[2, 3, 1, 4]));
    let reasons = |index: usize| match &placement.nodes[index].verdict {
        Verdict::Feasible { reasons, .. } => {
            reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join(", ")
        }
        Verdict::Refused(refusals) => format!("{refusals:?}"),
    };
    let texts = [
        "the task runs here, the first in zone a, the first in rack 2, 99 % stays free, load 0.0 %, 0 replicas",
        "the first in zone b, 99 % stays free, load 0.0 %, 0 replicas, with a volume of its group",
        "zone a has 1 already, the first in rack 1, 99 % stays free, load 0.0 %, 0 replicas, \
         beside a volume that it should be apart from",
        "[Away]",
    ];
    for (index, text) in texts.into_iter().enumerate() {
        assert_eq!(reasons(index), text);
    }
}

#[test]
fn the_largest_volume_is_that_of_the_last_node_that_is_needed() {
    let mut model = cluster("a a b");
    model.nodes[0].reserved_bytes = 10 * GIB + 1;
    model.nodes[1].reserved_bytes = 20 * GIB;
    model.nodes[2].reserved_bytes = 70 * GIB;
    let largest = |request: &Request| largest_volume(&model, request);
    assert_eq!(largest(&request(1, &[])), 90 * GIB - 4096);
    assert_eq!(largest(&request(2, &[])), 80 * GIB);
    assert_eq!(largest(&request(3, &[])), 30 * GIB);
    assert_eq!(largest(&request(4, &[])), 0);
    assert_eq!(largest(&Request { allow_fewer_zones: false, ..request(2, &[]) }), 30 * GIB);
    assert_eq!(largest(&Request { zones: vec!["b".to_owned()], ..request(1, &[]) }), 30 * GIB);
}
