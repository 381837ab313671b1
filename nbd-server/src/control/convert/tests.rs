//! Every rule of a record, broken once.

use super::*;

fn full_record() -> Record {
    let nodes = [NodeId(1), NodeId(3)];
    Record {
        version: 9,
        proposal: u64::MAX,
        epoch: 5,
        started: true,
        head: Some(HeadSession { node: NodeId(7), session: 77 }),
        catching_up: vec![NodeId(2)],
        stale: vec![StaleReplica { node: NodeId(4), since_version: 8 }],
        fresh: vec![NodeId(2), NodeId(4)],
        replicas_wanted: 3,
        last_started: 5,
        attached: Some(NodeId(3)),
        released: 4,
        epoch_ends: vec![EpochEnd { epoch: 2, sequence: 10 }, EpochEnd { epoch: 4, sequence: 10 }],
        ..Record::new(VolumeNumber(6), "data", [9; 16], 1 << 32, &nodes)
    }
}

#[test]
fn a_record_comes_back_as_it_went() {
    for record in [full_record(), Record::new(VolumeNumber(1), "v", [0; 16], 1, &[NodeId(1)])] {
        assert_eq!(record_from_message(record_to_message(&record)), Ok(record));
    }
}

#[test]
fn a_record_without_a_wish_wants_the_replicas_that_it_has() {
    let message = proto::Record { replicas_wanted: 0, ..record_to_message(&full_record()) };
    assert_eq!(record_from_message(message).expect("a record").replicas_wanted, 4);
}

#[test]
fn every_broken_rule_is_named() {
    type Break = fn(&mut proto::Record);
    let cases: &[(Break, &str)] = &[
        (|m| m.volume = 0, "volume: 0 is no volume"),
        (|m| m.name = "Data".to_owned(), "volume \"Data\": 'D' is not one of a-z"),
        (|m| m.name = "x".repeat(60_000), "a volume's name has 1 to 63 characters, not 60000"),
        (|m| m.lineage.push(1), "lineage: 17 bytes, not 16"),
        (|m| m.lineage.clear(), "lineage: 0 bytes, not 16"),
        (|m| m.size_blocks = 0, "size_blocks: 0 is not in 1 to 4294967296"),
        (|m| m.size_blocks += 1, "size_blocks: 4294967297 is not in 1 to 4294967296"),
        (|m| m.version = 0, "version is 0"),
        (|m| m.min_in_sync = 0, "min_in_sync is 0"),
        (|m| m.head = None, "epoch 5 and the head do not belong together"),
        (|m| m.epoch = 0, "epoch 0 and the head do not belong together"),
        (|m| m.head.as_mut().expect("given").node = 0, "head: 0 is no node"),
        (|m| m.in_sync.clear(), "in_sync is empty"),
        (|m| m.in_sync.reverse(), "in_sync is not in ascending order without duplicates"),
        (|m| m.in_sync = vec![3, 3], "in_sync is not in ascending order without duplicates"),
        (|m| m.in_sync = vec![0, 3], "in_sync: 0 is no node"),
        (|m| m.catching_up = vec![6, 5], "catching_up is not in ascending order without duplicates"),
        (|m| m.stale.push(m.stale[0]), "stale is not in ascending order without duplicates"),
        (|m| m.catching_up.push(3), "node 3 is in two of in_sync, catching_up and stale"),
        (|m| m.stale[0].node = 2, "node 2 is in two of in_sync, catching_up and stale"),
        (
            |m| m.stale[0].since_version = 10,
            "stale: node 4 is left out since a version that is not there yet",
        ),
        (|m| m.fresh = vec![3], "fresh: node 3 is neither catching up nor stale"),
        (|m| m.fresh = vec![5], "fresh: node 5 is neither catching up nor stale"),
        (|m| m.fresh.reverse(), "fresh is not in ascending order without duplicates"),
        (|m| m.in_sync = (1..=63).collect(), "replicas: 65 entries, more than 64"),
        (|m| m.epoch_ends = vec![m.epoch_ends[0]; 1025], "epoch_ends: 1025 entries, more than 1024"),
        (|m| m.released = 6, "released: epoch 6 has never started"),
        (|m| m.epoch_ends.reverse(), "epoch_ends is not in ascending order without duplicates"),
        (|m| m.epoch_ends[1].epoch = 5, "epoch_ends: epoch 5 has an end while the epoch is 5"),
        (|m| m.epoch_ends[1].sequence = 9, "epoch_ends: the sequence falls in epoch 4"),
        (
            |m| {
                m.epoch = 0;
                m.head = None;
            },
            "epoch 0 is started",
        ),
    ];
    for (break_it, expected) in cases {
        let mut message = record_to_message(&full_record());
        break_it(&mut message);
        let error = record_from_message(message).expect_err(expected).to_string();
        assert!(error.starts_with(expected), "{error}, not {expected}");
    }
}

#[test]
fn addresses_are_those_that_others_can_connect_to() {
    for good in ["10.0.0.1:1", "[::1]:65535", "node-1.example.org:10809"] {
        assert_eq!(address("peer_address", good.to_owned()), Ok(good.to_owned()));
    }
    let long = format!("{}:1", "x".repeat(ADDRESS_BYTES_MAX));
    for bad in ["", "10.0.0.1", "unix:/run/x", "a b:1", "h:0", "h:70000", "h\n:1", &long] {
        let error = address("peer_address", bad.to_owned()).expect_err(bad).to_string();
        assert!(error.starts_with("peer_address: ") && error.len() < 200, "{error}");
    }
    assert_eq!(optional_address("nbd_address", String::new()), Ok(None));
}

#[test]
fn a_node_comes_back_as_it_went() {
    let name = "n1".parse().expect("a name");
    let facts = NodeFacts { capacity_bytes: 7, ..NodeFacts::default() };
    let (nbd, peer) = (Some("h:1".to_owned()), "h:2".to_owned());
    let node = NodeInfo { node: NodeId(1), name, boot: 5, nbd, peer, facts, draining: true };
    assert_eq!(node_from_message(node_to_message(&node)), Ok(node.clone()));
    let nameless = proto::Node { name: String::new(), ..node_to_message(&node) };
    assert!(matches!(node_from_message(nameless), Err(MessageError::NodeName(_))));
    let unknown = proto::Node { node: 0, ..node_to_message(&node) };
    assert_eq!(node_from_message(unknown), Err(MessageError::NoNode("node")));
}
