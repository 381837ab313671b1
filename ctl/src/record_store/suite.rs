//! What every backend must do. `suite!(open)` makes the tests of one; `open` gives a new, empty store.

use std::sync::{Arc, Mutex};
use std::thread;

use datapath::record::{EpochEnd, HeadSession, NodeId, Record, StaleReplica, VolumeNumber};
use nbd_server::control::convert::{MessageError, NodeFacts, NodeInfo, PassHistory};

use super::rules::RuleError;
use super::{Change, Joining, NewVolume, RecordStore, StoreError, VolumeKey};

/// The tests of a backend.
macro_rules! suite {
    ($open:expr) => {
        suite!($open, [
            a_volume_is_created_found_listed_and_deleted,
            a_wish_that_cannot_be_met_changes_nothing,
            a_swap_replaces_the_expected_version_only,
            every_rule_of_succession_holds,
            a_head_lets_go_once_and_for_all,
            of_racing_swaps_one_wins_each_version,
            a_name_keeps_its_node_number,
            numbers_are_never_given_again,
            what_is_wanted_of_a_node_outlives_its_process,
            a_node_is_forgotten_only_when_no_record_names_it,
            what_passes_found_is_kept_with_the_volume,
            the_listener_hears_everything_in_order,
        ]);
    };
    ($open:expr, [$($case:ident,)*]) => {
        $(#[test]
        fn $case() {
            let (store, _keep) = $open(stringify!($case));
            $crate::record_store::suite::$case(&store);
        })*
    };
}
pub(super) use suite;

pub(super) fn joining(name: &str) -> Joining {
    let name = name.parse().expect("a name");
    let facts = NodeFacts { capacity_bytes: 1 << 30, ..NodeFacts::default() };
    Joining { name, boot: 1, nbd: None, peer: "10.0.0.1:7441".to_owned(), facts }
}

pub(super) fn wish(name: &str, on: &[&str]) -> NewVolume {
    NewVolume {
        name: name.parse().expect("a name"),
        lineage: [7; 16],
        size_blocks: 256,
        on: on.iter().map(|name| name.parse().expect("a name")).collect(),
        min_in_sync: None,
    }
}

/// Three nodes, and a volume `v` on them.
pub(super) fn with_volume(store: &dyn RecordStore) -> Record {
    for name in ["n1", "n2", "n3"] {
        store.join(&joining(name)).expect("joined");
    }
    store.create(&wish("v", &["n1", "n2", "n3"])).expect("created")
}

/// The record with the next version.
pub(super) fn next(record: &Record) -> Record {
    Record { version: record.version + 1, proposal: record.proposal.wrapping_add(1), ..record.clone() }
}

fn name(text: &str) -> VolumeKey {
    VolumeKey::Name(text.parse().expect("a name"))
}

fn number(record: &Record) -> VolumeKey {
    VolumeKey::Number(record.volume)
}

pub(super) fn a_volume_is_created_found_listed_and_deleted(store: &dyn RecordStore) {
    let made = with_volume(store);
    let nodes = [NodeId(1), NodeId(2), NodeId(3)];
    assert_eq!(made, Record::new(VolumeNumber(1), "v", [7; 16], 256, &nodes));
    let other = store.create(&NewVolume { min_in_sync: Some(1), ..wish("w", &["n3"]) }).expect("created");
    assert_eq!((other.volume, other.min_in_sync, &*other.in_sync), (VolumeNumber(2), 1, &nodes[2..]));
    for key in [name("v"), number(&made)] {
        assert_eq!(store.get(&key).expect("there"), made);
    }
    let list = |after, most| store.list(VolumeNumber(after), most).expect("a list");
    assert_eq!(list(0, 9), [made.clone(), other.clone()]);
    assert_eq!((list(0, 1), list(1, 9)), (vec![made.clone()], vec![other.clone()]));
    assert!(list(2, 9).is_empty() && list(u32::MAX, 9).is_empty());
    assert_eq!(store.deleted(made.volume).expect("read"), None);
    assert_eq!(store.delete(&name("v")).expect("deleted"), made);
    assert_eq!(store.deleted(made.volume).expect("read"), Some(made.lineage));
    for key in [name("v"), number(&made)] {
        assert!(matches!(store.get(&key), Err(StoreError::NoVolume(_))));
        assert!(matches!(store.delete(&key), Err(StoreError::NoVolume(_))));
    }
    let late = store.compare_and_swap(1, &next(&made));
    assert!(matches!(late, Err(StoreError::NoVolume(_))), "{late:?}");
    assert_eq!(list(0, 9), [other]);
}

pub(super) fn a_wish_that_cannot_be_met_changes_nothing(store: &dyn RecordStore) {
    with_volume(store);
    let many: Vec<String> = (0..65).map(|number| format!("m{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let with_min = |min| NewVolume { min_in_sync: Some(min), ..wish("x", &["n1", "n2"]) };
    let cases = [
        (wish("v", &["n1"]), "there is a volume v already; choose another name, or delete it first"),
        (wish("x", &["n1", "n9"]), "there is no node n9; `berth node list` shows the nodes that have joined"),
        (wish("x", &["n1", "n1"]), "node n1 is named twice: each replica needs a node of its own"),
        (wish("x", &[]), "0 replicas: a volume has 1 to 64"),
        (wish("x", &many), "65 replicas: a volume has 1 to 64"),
        (with_min(0), "min_in_sync 0: with 2 replicas it is 1 to 2"),
        (with_min(3), "min_in_sync 3: with 2 replicas it is 1 to 2"),
        (
            NewVolume { size_blocks: 0, ..wish("x", &["n1"]) },
            "the proposed record: size_blocks: 0 is not in 1 to 4294967296",
        ),
    ];
    for (volume, expected) in cases {
        assert_eq!(store.create(&volume).expect_err(expected).to_string(), expected);
    }
    assert_eq!(store.list(VolumeNumber(0), 9).expect("a list").len(), 1);
    assert_eq!(store.create(&wish("x", &["n1"])).expect("created").volume, VolumeNumber(2));
}

pub(super) fn a_swap_replaces_the_expected_version_only(store: &dyn RecordStore) {
    let first = with_volume(store);
    let second = next(&first);
    store.compare_and_swap(1, &second).expect("swapped");
    assert_eq!(store.get(&number(&first)).expect("there"), second);
    // Again, as after a lost answer; late; and early.
    for expected in [1, 0, 3] {
        let proposed = Record { version: expected + 1, ..second.clone() };
        match store.compare_and_swap(expected, &proposed) {
            Err(StoreError::Conflict(current)) => assert_eq!(*current, second),
            other => panic!("{expected}: {other:?}"),
        }
    }
    assert_eq!(store.get(&name("v")).expect("there"), second);
}

pub(super) fn every_rule_of_succession_holds(store: &dyn RecordStore) {
    let first = with_volume(store);
    let led = |session| Some(HeadSession { node: NodeId(2), session });
    let current = Record { epoch: 3, head: led(5), started: true, ..next(&first) };
    // Epochs rise by one, so it takes three steps to get there.
    let mut record = first;
    for epoch in 1..=3 {
        let last_started = if epoch == 3 { 3 } else { 0 };
        let proposed = Record { epoch, head: led(5), started: epoch == 3, last_started, ..next(&record) };
        store.compare_and_swap(record.version, &proposed).expect("swapped");
        record = proposed;
    }
    assert_eq!((record.epoch, record.head, record.started), (current.epoch, current.head, true));
    type Break = fn(&mut Record);
    let head = |session| Some(HeadSession { node: NodeId(2), session });
    assert_eq!(head(5), record.head);
    let cases: &[(Break, RuleError)] = &[
        (|r| r.version += 1, RuleError::Version { proposed: 6, expected: 4 }),
        (|r| r.version -= 1, RuleError::Version { proposed: 4, expected: 4 }),
        (|r| r.name = "w".to_owned(), RuleError::Changed("name")),
        (|r| r.lineage[0] ^= 1, RuleError::Changed("lineage")),
        (|r| r.epoch = 2, RuleError::EpochFalls { from: 3, to: 2 }),
        (|r| r.epoch = 5, RuleError::EpochJumps { from: 3, to: 5 }),
        (|r| r.head = Some(HeadSession { node: NodeId(2), session: 6 }), RuleError::SecondHead(3)),
        (|r| r.started = false, RuleError::Unstarted(3)),
        (|r| r.released = 1, RuleError::Released { current: 0, proposed: 1, epoch: 3 }),
        (|r| r.released = 4, MessageError::ReleasedUnserved(4).into()),
        (|r| r.last_started = 2, RuleError::LastStarted { proposed: 2, expected: 3 }),
        (|r| r.head = None, MessageError::Head(3).into()),
        (|r| r.in_sync.clear(), MessageError::NothingInSync.into()),
        (|r| r.in_sync.reverse(), MessageError::Order("in_sync").into()),
        (|r| r.in_sync.push(NodeId(3)), MessageError::Order("in_sync").into()),
        (|r| r.catching_up = vec![NodeId(9), NodeId(4)], MessageError::Order("catching_up").into()),
        (
            |r| r.stale = vec![StaleReplica { node: NodeId(4), since_version: 1 }; 2],
            MessageError::Order("stale").into(),
        ),
        (|r| r.catching_up.push(NodeId(1)), MessageError::TwoStates(1).into()),
        (
            |r| r.epoch_ends = vec![EpochEnd { epoch: 1, sequence: 0 }; 2],
            MessageError::Order("epoch_ends").into(),
        ),
        (|r| r.min_in_sync = 0, MessageError::Zero("min_in_sync").into()),
        (|r| r.catching_up.push(NodeId(7)), RuleError::NotFresh(NodeId(7))),
        (|r| r.in_sync.push(NodeId(7)), RuleError::NotFresh(NodeId(7))),
    ];
    for (break_it, expected) in cases {
        let mut proposed = next(&record);
        break_it(&mut proposed);
        match store.compare_and_swap(record.version, &proposed) {
            Err(StoreError::Rule(rule)) => assert_eq!(rule, *expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let kept = store.get(&name("v")).expect("there");
    assert_eq!(kept, record, "a refused proposal has no effect");
    let allowed = Record {
        epoch: 4,
        started: false,
        head: Some(HeadSession { node: NodeId(9), session: 1 }),
        in_sync: vec![NodeId(1)],
        catching_up: vec![NodeId(3)],
        stale: vec![StaleReplica { node: NodeId(2), since_version: 5 }],
        fresh: vec![NodeId(3)],
        epoch_ends: vec![EpochEnd { epoch: 3, sequence: 8 }],
        size_blocks: 512,
        ..next(&record)
    };
    store.compare_and_swap(4, &allowed).expect("swapped");
    assert_eq!(store.get(&name("v")).expect("there"), allowed);
    let trusted = Record { fresh: Vec::new(), ..next(&allowed) };
    let refused = store.compare_and_swap(5, &trusted).expect_err("it was never in sync");
    assert!(matches!(refused, StoreError::Rule(RuleError::FreshTrusted(NodeId(3)))), "{refused}");
    let admitted = Record { catching_up: Vec::new(), in_sync: vec![NodeId(1), NodeId(3)], ..trusted };
    store.compare_and_swap(5, &admitted).expect("it is in sync now");
    let crowd = (10..72).map(NodeId).collect();
    let crowded = Record { catching_up: crowd, fresh: (10..72).map(NodeId).collect(), ..next(&admitted) };
    let refused = store.compare_and_swap(6, &crowded).expect_err("it could not be read again");
    assert!(refused.to_string().contains("replicas: 65 entries, more than 64"), "{refused}");
}

pub(super) fn a_head_lets_go_once_and_for_all(store: &dyn RecordStore) {
    let made = with_volume(store);
    let head = Some(HeadSession { node: made.in_sync[0], session: 5 });
    let opened = Record { epoch: 1, head, ..next(&made) };
    store.compare_and_swap(1, &opened).expect("swapped");
    let early = Record { released: 1, ..next(&opened) };
    store.compare_and_swap(2, &early).expect_err("it does not serve yet");
    let started = Record { started: true, last_started: 1, ..next(&opened) };
    store.compare_and_swap(2, &started).expect("swapped");
    let released = Record { released: 1, ..next(&started) };
    store.compare_and_swap(3, &released).expect("swapped");
    let taken_back = Record { released: 0, ..next(&released) };
    let refused = store.compare_and_swap(4, &taken_back).expect_err("another head may serve");
    assert!(matches!(refused, StoreError::Rule(RuleError::Released { .. })), "{refused}");
    let in_sync = made.in_sync[1..].to_vec();
    let stale = vec![StaleReplica { node: made.in_sync[0], since_version: 5 }];
    let removal = Record { in_sync, stale, min_in_sync: 1, ..next(&released) };
    let refused = store.compare_and_swap(4, &removal).expect_err("nobody leads");
    assert!(matches!(refused, StoreError::Rule(RuleError::InSyncWithoutHead(1))), "{refused}");
    let attached = released.with_attached(Some(made.in_sync[1]), 9);
    store.compare_and_swap(4, &attached).expect("swapped");
    let refused = store.delete(&name("v")).expect_err("somebody uses it");
    assert!(matches!(refused, StoreError::Attached(..)), "{refused}");
    store.compare_and_swap(5, &attached.with_attached(None, 10)).expect("swapped");
    store.delete(&name("v")).expect("nobody uses it");
}

pub(super) fn of_racing_swaps_one_wins_each_version(store: &dyn RecordStore) {
    const ROUNDS: u64 = 20;
    let first = with_volume(store);
    let race = |racer: u64| {
        let mut won = Vec::new();
        let mut current = first.clone();
        while current.version < ROUNDS {
            let proposal = racer << 32 | current.version;
            let proposed = Record { proposal, ..next(&current) };
            current = match store.compare_and_swap(current.version, &proposed) {
                Ok(()) => {
                    won.push(proposed.version);
                    proposed
                }
                Err(StoreError::Conflict(winner)) => {
                    assert!(winner.version >= proposed.version, "{winner:?}");
                    assert_ne!(winner.proposal, proposal, "one's own proposal is no conflict");
                    *winner
                }
                Err(error) => panic!("{error}"),
            };
        }
        won
    };
    let mut won: Vec<u64> = thread::scope(|scope| {
        let racers: Vec<_> = (0..4).map(|racer| scope.spawn(move || race(racer))).collect();
        racers.into_iter().flat_map(|racer| racer.join().expect("no panic")).collect()
    });
    won.sort_unstable();
    assert_eq!(won, (2..=ROUNDS).collect::<Vec<_>>());
}

pub(super) fn a_name_keeps_its_node_number(store: &dyn RecordStore) {
    let first = store.join(&joining("n1")).expect("joined");
    assert_eq!(first.node, NodeId(1));
    assert_eq!(store.join(&joining("n2")).expect("joined").node, NodeId(2));
    assert_eq!(store.join(&joining("n1")).expect("joined"), first);
    let moved = Joining {
        boot: 2,
        nbd: Some("10.0.0.2:10809".to_owned()),
        peer: "10.0.0.2:7441".to_owned(),
        facts: NodeFacts { capacity_bytes: 2 << 30, ..NodeFacts::default() },
        ..joining("n1")
    };
    let moved = store.join(&moved).expect("joined");
    assert_eq!(moved.facts.capacity_bytes, 2 << 30);
    assert_eq!((moved.node, moved.boot, &*moved.peer), (NodeId(1), 2, "10.0.0.2:7441"));
    let all: Vec<NodeInfo> = store.nodes().expect("a list");
    assert_eq!((all.len(), &all[0], all[1].name.as_str()), (2, &moved, "n2"));
}

pub(super) fn numbers_are_never_given_again(store: &dyn RecordStore) {
    with_volume(store);
    for expected in 2..=4 {
        let made = store.create(&wish("w", &["n1"])).expect("created");
        assert_eq!(made.volume, VolumeNumber(expected));
        store.delete(&name("w")).expect("deleted");
    }
    store.delete(&name("v")).expect("deleted");
    assert_eq!(store.create(&wish("v", &["n1"])).expect("created").volume, VolumeNumber(5));
    assert_eq!(store.join(&joining("n4")).expect("joined").node, NodeId(4));
}

pub(super) fn what_is_wanted_of_a_node_outlives_its_process(store: &dyn RecordStore) {
    let n1 = "n1".parse().expect("a name");
    let unknown = store.set_draining(&n1, true).expect_err("it has not joined");
    assert!(matches!(unknown, StoreError::NoNode(_)), "{unknown}");
    let joined = store.join(&joining("n1")).expect("joined");
    assert!(!joined.draining);
    assert!(store.set_draining(&n1, true).expect("it is there").draining);
    assert!(store.set_draining(&n1, true).expect("again").draining);
    let again = store.join(&Joining { boot: 2, ..joining("n1") }).expect("joined");
    assert!(again.draining && again.boot == 2);
    assert_eq!(store.nodes().expect("a list"), [again]);
    assert!(!store.set_draining(&n1, false).expect("it is there").draining);
}

pub(super) fn a_node_is_forgotten_only_when_no_record_names_it(store: &dyn RecordStore) {
    let first = with_volume(store);
    let n1 = "n1".parse().expect("a name");
    let used = |what: &str| {
        let error = store.remove_node(&n1).expect_err(what);
        assert!(matches!(error, StoreError::NodeInUse(..)), "{what}: {error}");
    };
    used("it has a replica");
    let mut without = next(&first);
    without.in_sync.remove(0);
    without.attached = Some(NodeId(1));
    store.compare_and_swap(1, &without).expect("swapped");
    used("a volume is attached to it");
    let mut led = Record { attached: None, ..next(&without) };
    (led.epoch, led.head) = (1, Some(HeadSession { node: NodeId(1), session: 1 }));
    store.compare_and_swap(2, &led).expect("swapped");
    used("it leads one");
    let mut free = next(&led);
    (free.started, free.last_started, free.released) = (true, 1, 0);
    store.compare_and_swap(3, &free).expect("swapped");
    let free = Record { released: 1, ..next(&free) };
    store.compare_and_swap(4, &free).expect("swapped");
    assert_eq!(store.remove_node(&n1).expect("nobody names it").node, NodeId(1));
    let gone = store.remove_node(&n1).expect_err("it is gone");
    assert!(matches!(gone, StoreError::NoNode(_)), "{gone}");
    assert_eq!(store.join(&joining("n1")).expect("joined").node, NodeId(4), "it is another one");
}

pub(super) fn the_listener_hears_everything_in_order(store: &dyn RecordStore) {
    let first = with_volume(store);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let take = || std::mem::take(&mut *heard.lock().expect("no panic"));
    let hear = Arc::clone(&heard);
    store.follow(Box::new(move |change| hear.lock().expect("no panic").push(change))).expect("followed");
    let nodes = store.nodes().expect("a list");
    assert_eq!(take(), [Change::Nodes(nodes), Change::Record(Box::new(first.clone()))]);
    let second = next(&first);
    store.compare_and_swap(1, &second).expect("swapped");
    store.compare_and_swap(1, &second).expect_err("a conflict");
    let other = store.create(&wish("w", &["n1"])).expect("created");
    store.join(&joining("n3")).expect("no change");
    store.delete(&name("v")).expect("deleted");
    store.join(&joining("n4")).expect("joined");
    let nodes = store.nodes().expect("a list");
    let expected = [
        Change::Record(Box::new(second)),
        Change::Record(Box::new(other)),
        Change::Gone(first.volume),
        Change::Nodes(nodes),
    ];
    assert_eq!(take(), expected);

    let record = store.create(&wish("x", &["n1"])).expect("created");
    take();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let current = store.get(&number(&record)).expect("there");
                    match store.compare_and_swap(current.version, &next(&current)) {
                        Ok(()) | Err(StoreError::Conflict(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    let versions: Vec<u64> = take()
        .iter()
        .map(|change| match change {
            Change::Record(record) => record.version,
            other => panic!("{other:?}"),
        })
        .collect();
    let last = store.get(&number(&record)).expect("there").version;
    assert_eq!(versions, (2..=last).collect::<Vec<_>>());
}

pub(super) fn what_passes_found_is_kept_with_the_volume(store: &dyn RecordStore) {
    let volume = with_volume(store).volume;
    assert_eq!(store.passes(volume).expect("a volume"), PassHistory::default());
    let history = PassHistory { began_at: Some(77), last: None };
    store.put_passes(volume, &history).expect("kept");
    assert_eq!(store.passes(volume).expect("a volume"), history);
    store.delete(&VolumeKey::Number(volume)).expect("deleted");
    let missing = |result: Result<(), StoreError>| matches!(result, Err(StoreError::NoVolume(_)));
    assert!(missing(store.passes(volume).map(drop)) && missing(store.put_passes(volume, &history)));
}
