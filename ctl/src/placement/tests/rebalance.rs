//! Moves: by hand, and in any cluster until they end.

use datapath::record::VolumeNumber;

use super::*;
use crate::heal::FILLS_PER_NODE_MAX;
use crate::placement::{Move, Volume, choose, rebalance};

/// A volume of so many GiB, counted on its nodes.
fn put(model: &mut Model, number: u32, size_gib: u64, holders: &[u32]) -> Volume {
    for node in model.nodes.iter_mut().filter(|node| holders.contains(&node.id.0)) {
        (node.reserved_bytes, node.replicas) = (node.reserved_bytes + size_gib * GIB, node.replicas + 1);
    }
    let request = Request { holders: ids(holders), ..Request::new(size_gib * GIB, 1) };
    Volume { number: VolumeNumber(number), request }
}

fn find(nodes: &mut [Node], id: NodeId) -> &mut Node {
    nodes.iter_mut().find(|node| node.id == id).expect("a node of the model")
}

/// The move is made, and the replica is filled.
fn apply(model: &mut Model, volumes: &mut [Volume], step: Move) {
    let volume = volumes.iter_mut().find(|volume| volume.number == step.volume).expect("one of them");
    let size_bytes = volume.request.size_bytes;
    find(&mut model.nodes, step.add).reserved_bytes += size_bytes;
    find(&mut model.nodes, step.remove).reserved_bytes -= size_bytes;
    let holder =
        volume.request.holders.iter_mut().find(|holder| **holder == step.remove).expect("it has one");
    *holder = step.add;
}

fn moves(model: &Model, volumes: &[Volume]) -> Vec<(u32, u32, u32)> {
    let moves = rebalance(model, volumes, 100);
    moves.into_iter().map(|step| (step.volume.0, step.remove.0, step.add.0)).collect()
}

#[test]
fn the_fullest_gives_its_largest_to_the_emptiest() {
    let mut model = cluster("a a a");
    let volumes = [put(&mut model, 1, 10, &[1]), put(&mut model, 2, 20, &[1]), put(&mut model, 3, 9, &[2])];
    assert_eq!(moves(&model, &volumes), [(1, 1, 3)], "20 would leave the target fuller");
    assert_eq!(rebalance(&model, &volumes, 0), []);
}

#[test]
fn nothing_moves_for_less_than_the_dead_band() {
    let mut model = cluster("a a");
    let volumes: Vec<Volume> = (1..=10).map(|number| put(&mut model, number, 1, &[1])).collect();
    assert_eq!(
        moves(&model, &volumes[..5]),
        [(1, 1, 2), (2, 1, 2), (3, 1, 2)],
        "10 to 0, 9 to 1, 8 to 2; 7 to 3 rests"
    );
    assert_eq!(rebalance(&model, &volumes, 2).len(), 2);
}

#[test]
fn spread_groups_and_the_tasks_replica_stay() {
    let mut model = cluster("a a b b c c");
    let volume = put(&mut model, 1, 20, &[1, 3]);
    assert_eq!(moves(&model, std::slice::from_ref(&volume)), []);
    let small = [put(&mut model, 2, 8, &[1, 3])];
    assert_eq!(moves(&model, &small), [(2, 1, 2)]);
    let with = |change: fn(&mut Request)| {
        let mut volumes = small.clone();
        change(&mut volumes[0].request);
        moves(&model, &volumes)
    };
    assert_eq!(with(|request| request.near = Some(id(1))), [(2, 3, 4)]);
    assert_eq!(with(|request| request.together = ids(&[1, 3])), []);
    assert_eq!(with(|request| request.apart = ids(&[2, 5, 6])), [(2, 3, 4)]);
    assert_eq!(with(|request| request.zones = vec!["b".to_owned()]), [(2, 3, 4)]);
    model.nodes[2].reserved_bytes = 90 * GIB;
    let both_other_zones = [put(&mut model, 3, 1, &[1, 3, 5])];
    model.nodes[3].cordoned = true;
    assert_eq!(moves(&model, &both_other_zones), [(3, 1, 2)], "3 may not go where 1 and 5 are");
}

#[test]
fn nodes_that_are_away_cordoned_drained_full_or_busy_are_left_alone() {
    let with = |place: usize, change: fn(&mut Node)| {
        let mut model = cluster("a a");
        let volumes = [put(&mut model, 1, 30, &[1])];
        model.nodes[0].reserved_bytes += 50 * GIB;
        change(&mut model.nodes[place]);
        moves(&model, &volumes)
    };
    assert_eq!(with(0, |node| node.cordoned = true), [(1, 1, 2)]);
    assert_eq!(with(0, |node| node.draining = true), []);
    assert_eq!(with(0, |node| node.health = Health::Away), []);
    assert_eq!(with(1, |node| node.cordoned = true), []);
    assert_eq!(with(1, |node| node.draining = true), []);
    assert_eq!(with(1, |node| node.health = Health::Away), []);
    assert_eq!(with(1, |node| node.fills = FILLS_PER_NODE_MAX), []);
    assert_eq!(with(1, |node| node.capacity_bytes = 0), []);
    assert_eq!(with(0, |node| node.capacity_bytes = 0), [(1, 1, 2)]);
}

#[test]
fn what_is_removed_is_not_free_before_the_move_is_done() {
    let mut model = cluster("a a b");
    (model.nodes[1].capacity_bytes, model.nodes[2].capacity_bytes) = (10 * GIB, 1000 * GIB);
    (model.nodes[0].reserved_bytes, model.nodes[1].reserved_bytes) = (86 * GIB, 5 * GIB);
    let mut volumes = vec![put(&mut model, 1, 3, &[1]), put(&mut model, 2, 4, &[2])];
    volumes[0].request.zones = vec!["a".to_owned()];
    let first = rebalance(&model, &volumes, 9);
    assert_eq!(first, [Move { volume: VolumeNumber(2), add: id(3), remove: id(2) }]);
    apply(&mut model, &mut volumes, first[0]);
    assert_eq!(moves(&model, &volumes), [(1, 1, 2)]);
}

#[test]
fn a_node_is_filled_with_a_few_at_a_time() {
    let mut model = cluster("a a");
    let volumes: Vec<Volume> = (1..=30).map(|number| put(&mut model, number, 1, &[1])).collect();
    assert_eq!(moves(&model, &volumes).len(), FILLS_PER_NODE_MAX);
}

fn zones(model: &Model, volume: &Volume) -> Vec<usize> {
    let mut counts: BTreeMap<&Option<String>, usize> = BTreeMap::new();
    for node in model.nodes.iter().filter(|node| volume.request.holders.contains(&node.id)) {
        *counts.entry(&node.zone).or_default() += 1;
    }
    let mut counts: Vec<usize> = counts.into_values().collect();
    counts.sort_unstable_by(|one, other| other.cmp(one));
    counts
}

/// The least and the most that is reserved on a node that can take part, in permille of its limit.
fn extremes(model: &Model) -> (u64, u64) {
    let part = |node: &&Node| node.health == Health::Here && !node.draining && node.capacity_bytes > 0;
    let shares = model.nodes.iter().filter(part).map(|node| {
        u64::try_from(u128::from(node.reserved_bytes) * 1000 / u128::from(model.limit_bytes(node).max(1)))
            .expect("small")
    });
    let shares: Vec<u64> = shares.collect();
    (shares.iter().copied().min().unwrap_or(0), shares.iter().copied().max().unwrap_or(0))
}

/// A cluster that volumes were placed in, and that has changed since.
fn changed(draw: &mut Draw) -> (Model, Vec<Volume>) {
    let mut model = draw.model();
    for node in &mut model.nodes {
        (node.reserved_bytes, node.fills) = (0, 0);
        node.capacity_bytes = (20 + draw.below(80)) * GIB;
    }
    let mut volumes = Vec::new();
    for number in 0..draw.number(60) {
        let size_gib = 1 + draw.below(6);
        let request = Request { size_bytes: size_gib * GIB, replicas: 1 + draw.count(3), ..draw.request() };
        let Some(chosen) = choose(&model, &request) else { continue };
        let holders: Vec<u32> = request.holders.iter().chain(&chosen).map(|node| node.0).collect();
        let placed = put(&mut model, number, size_gib, &holders);
        volumes.push(Volume { request: Request { holders: placed.request.holders, ..request }, ..placed });
    }
    for node in &mut model.nodes {
        (node.cordoned, node.draining) = (draw.one_in(8), draw.one_in(8));
        if draw.one_in(3) {
            node.capacity_bytes = node.capacity_bytes * 3 / 2;
        }
    }
    (model, volumes)
}

/// All moves at once are allowed: what they add fits beside what they have not removed yet.
fn begin(model: &Model, volumes: &[Volume], moves: &[Move]) {
    let mut under_way = model.clone();
    for step in moves {
        let volume = volumes.iter().find(|volume| volume.number == step.volume).expect("one of them");
        assert!(volume.request.holders.contains(&step.remove) && volume.request.near != Some(step.remove));
        assert!(!volume.request.holders.contains(&step.add));
        let limit_bytes = model.limit_bytes(find(&mut under_way.nodes, step.add));
        let node = find(&mut under_way.nodes, step.add);
        (node.reserved_bytes, node.fills) = (node.reserved_bytes + volume.request.size_bytes, node.fills + 1);
        assert!(node.health == Health::Here && !node.cordoned && !node.draining);
        assert!(node.fills <= FILLS_PER_NODE_MAX);
        assert!(node.reserved_bytes <= limit_bytes, "{step:?} exceeds it");
    }
    let mut moved: Vec<VolumeNumber> = moves.iter().map(|step| step.volume).collect();
    moved.sort_unstable();
    moved.dedup();
    assert_eq!(moved.len(), moves.len(), "one for each volume");
}

#[test]
fn it_comes_to_rest_and_breaks_no_rule_on_the_way() {
    let mut most = 0;
    let mut moved = 0;
    for seed in 0..3000 {
        let mut draw = Draw(seed);
        let (mut model, mut volumes) = changed(&mut draw);
        let budget = 1 + draw.count(10);
        let mut rounds = 0;
        loop {
            let moves = rebalance(&model, &volumes, budget);
            let mut other = (model.clone(), volumes.clone());
            draw.shuffle(&mut other.0.nodes);
            draw.shuffle(&mut other.1);
            assert_eq!(rebalance(&other.0, &other.1, budget), moves, "the order tells nothing");
            if moves.is_empty() {
                break;
            }
            assert!(moves.len() <= budget);
            begin(&model, &volumes, &moves);
            let before =
                (extremes(&model), volumes.iter().map(|volume| zones(&model, volume)).collect::<Vec<_>>());
            moves.iter().for_each(|step| apply(&mut model, &mut volumes, *step));
            let after =
                (extremes(&model), volumes.iter().map(|volume| zones(&model, volume)).collect::<Vec<_>>());
            assert!(after.0.0 >= before.0.0 && after.0.1 <= before.0.1, "{before:?}, {after:?}");
            for (before, after) in before.1.iter().zip(&after.1) {
                assert!(after <= before, "a volume lost spread");
            }
            moved += moves.len();
            rounds += 1;
            assert!(rounds <= 1000, "no rest: seed {seed}");
        }
        most = most.max(rounds);
    }
    println!("at rest after {most} rounds at most, {moved} moves in all");
    assert!(moved > 3000, "{moved}");
}

#[test]
fn a_new_node_is_used_until_it_is_as_full_as_the_others() {
    let mut model = cluster("a a b b c c");
    model.nodes.iter_mut().for_each(|node| node.capacity_bytes = 1000 * GIB);
    let mut volumes: Vec<Volume> = Vec::new();
    for number in 0..300 {
        let chosen = choose(&model, &Request::new(5 * GIB, 3)).expect("there is room");
        let holders: Vec<u32> = chosen.into_iter().map(|node| node.0).collect();
        volumes.push(put(&mut model, number, 5, &holders));
    }
    model.nodes.push(Node { zone: Some("a".to_owned()), capacity_bytes: 1000 * GIB, ..node(7) });
    let mut rounds = 0;
    loop {
        let moves = rebalance(&model, &volumes, 8);
        moves.iter().for_each(|step| apply(&mut model, &mut volumes, *step));
        rounds += 1;
        if moves.is_empty() {
            break;
        }
    }
    let reserved = |place: usize| model.nodes[place].reserved_bytes / GIB;
    println!("{rounds} rounds: {:?} GiB", [0, 1, 6].map(reserved));
    let in_a = [0, 1, 6].map(reserved);
    assert!(in_a.iter().max().expect("three") - in_a.iter().min().expect("three") <= 50, "{in_a:?}");
    assert!(volumes.iter().all(|volume| zones(&model, volume) == [1, 1, 1]));
}
