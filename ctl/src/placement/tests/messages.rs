//! What operators read.

use super::*;
use crate::placement::place;

fn message(model: &Model, request: &Request) -> String {
    place(model, request).expect_err("too few").to_string()
}

#[test]
fn too_few_nodes() {
    let mut model = cluster("a b c");
    model.nodes[2].health = Health::Away;
    assert_eq!(
        message(&model, &request(3, &[])),
        "3 replicas need 3 nodes, and 2 can take one: n3 is away; use --replicas 2 or add a node"
    );
    assert_eq!(
        message(&cluster("a b"), &request(3, &[])),
        "3 replicas need 3 nodes, and 2 can take one; use --replicas 2 or add a node"
    );
    assert_eq!(
        message(&cluster(""), &request(1, &[])),
        "1 replica needs 1 node, and none can take one; add a node"
    );
}

#[test]
fn too_little_space() {
    let mut model = cluster("a b c");
    model.nodes[1].reserved_bytes = 95 * GIB;
    assert_eq!(
        message(&model, &Request::new(10 * GIB, 3)),
        "3 replicas need 3 nodes, and 2 can take one: n2 has 5G left of the 10G that it takes; \
         use --replicas 2 or use --size 5G or less or add a node"
    );
}

#[test]
fn replicas_that_are_there_are_not_named_and_the_size_is_what_it_is() {
    let mut model = cluster("a b c d");
    (model.nodes[2].cordoned, model.nodes[3].draining) = (true, true);
    model.nodes[3].capacity_bytes = 0;
    assert_eq!(
        message(&model, &request(1, &[1, 2])),
        "1 more replica needs 1 other node, and none can take one: n3 is cordoned, \
         n4 is being drained and has 0 left of the 1G that it takes; use --replicas 2 or add a node"
    );
}

#[test]
fn too_few_zones() {
    let strict = Request { allow_fewer_zones: false, ..request(2, &[1]) };
    assert_eq!(
        message(&cluster("a a b -"), &Request { replicas: 3, ..strict.clone() }),
        "3 more replicas need 3 other zones, and 2 can take one: n2 is in zone a, which has a replica; \
         use --replicas 3 or add a node in another zone"
    );
    assert_eq!(
        message(&cluster("- - b"), &strict),
        "2 more replicas need 2 other zones, and 1 can take one: n2 is in no zone, like a node that has one; \
         use --replicas 2 or add a node in another zone"
    );
}

#[test]
fn labels_zones_and_fills() {
    let mut model = cluster("a - c");
    model.nodes[2].fills = 4;
    model.nodes[2].labels.insert("disk".to_owned(), "ssd".to_owned());
    let request = Request {
        zones: vec!["b".to_owned(), "c".to_owned()],
        labels: [("disk".to_owned(), "ssd".to_owned())].into(),
        needs_fill: true,
        ..request(1, &[])
    };
    assert_eq!(
        message(&model, &request),
        "1 replica needs 1 node, and none can take one: n1 is in zone a (not allowed) and lacks disk=ssd, \
         n2 is in no zone and lacks disk=ssd, n3 is being filled with 4 replicas; add a node"
    );
}

#[test]
fn many_nodes_are_counted() {
    let mut model = cluster(&"a ".repeat(20));
    model.nodes.iter_mut().for_each(|node| node.health = Health::Away);
    let names = (1..=6).map(|number| format!("n{number} is away, ")).collect::<String>();
    assert_eq!(
        message(&model, &request(1, &[])),
        format!("1 replica needs 1 node, and none can take one: {names}and 14 more nodes cannot; add a node")
    );
}
