//! A thousand nodes and fifty thousand volumes.

use std::time::Instant;

use datapath::record::VolumeNumber;

use super::*;
use crate::placement::{Volume, choose, place, rebalance};

const NODES: u32 = 1000;
const VOLUMES: u32 = 50_000;

/// Five zones of nodes with 4 to 16 TiB.
fn large(draw: &mut Draw) -> Model {
    let node = |number: u32| Node {
        zone: Some(format!("zone-{}", draw.below(5))),
        rack: Some(format!("rack-{}", draw.below(10))),
        capacity_bytes: (4 + draw.below(13)) << 40,
        load_permille: draw.number(300),
        ..node(number)
    };
    Model { nodes: (0..NODES).map(node).collect(), overcommit_percent: 100 }
}

fn place_of(id: NodeId) -> usize {
    usize::try_from(id.0).expect("an index")
}

/// Permille of capacity that is reserved on the emptiest and on the fullest node.
fn extremes(model: &Model) -> (u64, u64) {
    let shares = || model.nodes.iter().map(|node| node.reserved_bytes / (node.capacity_bytes / 1000));
    (shares().min().expect("some"), shares().max().expect("some"))
}

#[test]
#[cfg_attr(debug_assertions, ignore = "it measures what is optimised")]
#[expect(clippy::disallowed_methods, reason = "it tells how fast it is")]
fn a_thousand_nodes_get_fifty_thousand_volumes() {
    let mut draw = Draw(1);
    let mut model = large(&mut draw);
    let mut volumes = Vec::new();
    let begin = Instant::now();
    for number in 0..VOLUMES {
        let size_bytes = [1, 4, 10, 20, 50, 100][draw.count(6)] * GIB;
        let request = Request::new(size_bytes, 3);
        let holders = choose(&model, &request).expect("there is room");
        let zones: Vec<_> = holders.iter().map(|id| &model.nodes[place_of(*id)].zone).collect();
        assert!(zones[0] != zones[1] && zones[0] != zones[2] && zones[1] != zones[2], "{zones:?}");
        for holder in &holders {
            let node = &mut model.nodes[place_of(*holder)];
            (node.reserved_bytes, node.replicas) = (node.reserved_bytes + size_bytes, node.replicas + 1);
            assert!(node.reserved_bytes <= node.capacity_bytes);
        }
        volumes.push(Volume { number: VolumeNumber(number), request: Request { holders, ..request } });
    }
    let elapsed = begin.elapsed();
    let per_second = u128::from(VOLUMES) * 1000 / elapsed.as_millis().max(1);
    let (least, most) = extremes(&model);
    println!("{VOLUMES} volumes on {NODES} nodes in {elapsed:.1?}: {per_second} decisions per second");
    println!("utilisation {least} to {most} permille");
    assert!(most - least <= 50, "{least} to {most} permille");
    assert!(per_second >= 1000, "{per_second} decisions per second");

    let begin = Instant::now();
    let placement = place(&model, &Request::new(GIB, 3)).expect("there is room");
    println!("one answer with all reasons, of {} nodes: {:.1?}", placement.nodes.len(), begin.elapsed());
    grown(model, &volumes);
}

/// New nodes come: what there is to move is found soon, and so is that there is nothing.
#[expect(clippy::disallowed_methods, reason = "it tells how fast it is")]
fn grown(mut model: Model, volumes: &[Volume]) {
    let begin = Instant::now();
    assert_eq!(rebalance(&model, volumes, 100), [], "it is balanced");
    println!("at rest: {:.1?}", begin.elapsed());
    for number in NODES..NODES + 50 {
        model.nodes.push(Node { zone: Some("zone-0".to_owned()), capacity_bytes: 8 << 40, ..node(number) });
    }
    let begin = Instant::now();
    let moves = rebalance(&model, volumes, 100);
    println!("{} moves to new nodes: {:.1?}", moves.len(), begin.elapsed());
    assert_eq!(moves.len(), 100);
    let mut bound = volumes.to_vec();
    bound.iter_mut().for_each(|volume| volume.request.zones = vec!["zone-5".to_owned()]);
    let begin = Instant::now();
    assert_eq!(rebalance(&model, &bound, 100), [], "none may go there");
    println!("nothing that may move to them: {:.1?}", begin.elapsed());
}
