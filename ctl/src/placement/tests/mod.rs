//! What the tests share: small clusters by hand, and any by draw.

mod messages;
mod properties;
mod rebalance;
mod rules;
mod scale;

use std::collections::BTreeMap;

use datapath::record::NodeId;

use super::{Health, Model, Node, Request};

const GIB: u64 = 1 << 30;

fn id(number: u32) -> NodeId {
    NodeId(number)
}

fn ids(numbers: &[u32]) -> Vec<NodeId> {
    numbers.iter().copied().map(NodeId).collect()
}

/// An empty node of 100 GiB that is nowhere in particular.
fn node(number: u32) -> Node {
    Node {
        id: id(number),
        name: format!("n{number}"),
        zone: None,
        rack: None,
        labels: BTreeMap::new(),
        health: Health::Here,
        cordoned: false,
        draining: false,
        capacity_bytes: 100 * GIB,
        reserved_bytes: 0,
        replicas: 0,
        fills: 0,
        load_permille: 0,
    }
}

/// Empty nodes from 1 on, one for each word: a zone, or a zone and a rack as `a/1`, or `-`.
fn cluster(places: &str) -> Model {
    let mut nodes = Vec::new();
    for (number, place) in (1..).zip(places.split_whitespace()) {
        let (zone, rack) = match place.split_once('/') {
            Some((zone, rack)) => (zone, Some(rack.to_owned())),
            None => (place, None),
        };
        nodes.push(Node { zone: (zone != "-").then(|| zone.to_owned()), rack, ..node(number) });
    }
    Model { nodes, overcommit_percent: 100 }
}

/// One replica takes 1 GiB of them, those on `holders`, and the rest is to be placed.
fn request(replicas: usize, holders: &[u32]) -> Request {
    Request { holders: ids(holders), ..Request::new(GIB, replicas) }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn number(&mut self, end: u64) -> u32 {
        u32::try_from(self.below(end)).expect("a small number")
    }

    fn count(&mut self, end: u64) -> usize {
        usize::try_from(self.below(end)).expect("a small number")
    }

    fn pick(&mut self, names: &[&str]) -> Option<String> {
        let index = self.count(names.len() as u64 + 1);
        names.get(index).map(|name| (*name).to_owned())
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            let other = self.count(end as u64 + 1);
            items.swap(end, other);
        }
    }

    fn node(&mut self, number: u32) -> Node {
        let capacity_bytes = self.below(20) * GIB;
        Node {
            zone: self.pick(&["a", "b", "c"]),
            rack: self.pick(&["1", "2"]),
            labels: self.pick(&["ssd", "hdd"]).map(|disk| ("disk".to_owned(), disk)).into_iter().collect(),
            health: if self.one_in(8) { Health::Away } else { Health::Here },
            cordoned: self.one_in(12),
            draining: self.one_in(12),
            capacity_bytes,
            reserved_bytes: self.below(capacity_bytes + GIB),
            replicas: self.count(9),
            fills: self.count(6),
            load_permille: self.number(1200),
            ..node(number)
        }
    }

    /// Up to seven nodes.
    fn model(&mut self) -> Model {
        let count = 1 + self.number(7);
        let nodes = (1..=count).map(|number| self.node(number)).collect();
        Model { nodes, overcommit_percent: [100, 100, 50, 150][self.count(4)] }
    }

    fn some_nodes(&mut self, most: u64) -> Vec<NodeId> {
        let mut nodes: Vec<NodeId> = (0..self.below(most + 1)).map(|_| id(1 + self.number(8))).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    fn request(&mut self) -> Request {
        Request {
            size_bytes: self.below(8 * GIB),
            replicas: self.count(4),
            holders: if self.one_in(2) { self.some_nodes(3) } else { Vec::new() },
            near: if self.one_in(2) { Some(id(1 + self.number(8))) } else { None },
            labels: if self.one_in(4) {
                [("disk".to_owned(), "ssd".to_owned())].into()
            } else {
                BTreeMap::new()
            },
            zones: if self.one_in(4) { vec!["a".to_owned(), "b".to_owned()] } else { Vec::new() },
            together: self.some_nodes(2),
            apart: self.some_nodes(2),
            allow_fewer_zones: !self.one_in(3),
            needs_fill: self.one_in(2),
        }
    }
}
