//! Volumes replicated over nodes that are real processes, while these are killed.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{self, BenchArgs, BlockRange, Control};
use datapath::record::{NodeId, VolumeNumber};
use datapath::wire::peer_message::{Hello, PeerFrame, PeerMessage};
use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::server::berth;
use system_tests::harness::tools::{run, run_to_fail};
use system_tests::harness::{Scratch, full_tier, print_figure};

/// A member's node is gone: writes wait for at most so long.
const MEMBER_PAUSE_MAX: Duration = Duration::from_secs(2);
/// The head's node is gone: another serves after at most so long.
const HEAD_PAUSE_MAX: Duration = Duration::from_secs(5);
/// A replica of 64 MiB that was away is in sync again after at most so long, under load.
const FILL_MAX: Duration = Duration::from_secs(20);

/// Verified load on the volume `v` through the first node, and the others when that is lost.
fn load(cluster: &Cluster) -> BenchArgs {
    let uri = |index| cluster.uri(index, "v").parse().expect("a URI");
    BenchArgs {
        read: 30,
        write: 50,
        trim: 5,
        zeroes: 5,
        flush: 3,
        fua: 10,
        block: BlockRange { least: 512, most: 256 << 10 },
        duration: 24.0 * 3600.0,
        reconnect: 60.0,
        failover: (1..cluster.nodes.len()).map(uri).collect(),
        verify: true,
        destroy_data: true,
        ..BenchArgs::new(uri(0))
    }
}

/// Runs the load while `disturb` works, and returns the number of requests.
fn under_load(args: &BenchArgs, disturb: impl FnOnce(&Control)) -> u64 {
    let control = Control::default();
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(args, &control));
        disturb(&control);
        control.finish();
        load.join().expect("no panic")
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.errors(), 0, "{report}");
    report.operations.iter().map(|operation| operation.count).sum()
}

#[test]
fn writes_go_on_when_a_member_is_killed() {
    let scratch = Scratch::new("member");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 64);
    cluster.make_volume("probe", 16);
    let args = load(&cluster);
    let mut probe = Probe::new(&cluster.nodes[0], "probe");
    probe.write();
    assert!(run(&mut cluster.ctl.command("status")).contains("all replicas are in sync"));
    let mut pause = Duration::ZERO;
    let requests = under_load(&args, |control| {
        probe.write_for(Duration::from_secs(1));
        cluster.kill_node(2);
        pause = probe.write_for(Duration::from_secs(4));
        assert_eq!(control.reconnects(), 0, "clients notice nothing but a pause");
    });
    cluster.wait_for_volume("v", |volume| volume["in_sync"].as_array().map(Vec::len) == Some(2));
    assert!(run_to_fail(&mut cluster.ctl.command("status")).contains("DEGRADED: v"));
    assert!(pause <= MEMBER_PAUSE_MAX, "writes waited for {pause:?}");
    print_figure(&format!("writes waited for {pause:?}; {requests} requests verified"));
}

/// Whoever wrote to it alone would make it differ from the others, and nobody would know.
#[test]
fn a_replica_is_not_served_behind_its_heads_back() {
    let scratch = Scratch::new("behind");
    let mut cluster = Cluster::start(&scratch, 1, 256);
    cluster.make_volume("v", 16);
    Probe::new(&cluster.nodes[0], "v").write();
    cluster.kill_node(0);
    let pool = format!("--pool={}", cluster.nodes[0].pool.display());
    let socket = format!("--nbd=unix:{}", scratch.socket("behind").display());
    let said = run_to_fail(&mut berth(&["serve", &pool, "--volume=v=16M", &socket]));
    assert!(said.contains("volume v is a replica of a cluster's volume: start the pool's node"), "{said}");
    let said = run_to_fail(&mut berth(&["serve", &pool, "--volume=v=32M", &socket, "--read-only"]));
    assert!(said.contains("with --read-only and the size it has"), "{said}");
    cluster.start_node(0);
    Probe::new(&cluster.nodes[0], "v").write();
}

#[test]
fn another_node_takes_over_when_the_heads_node_is_killed() {
    let scratch = Scratch::new("head");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 64);
    cluster.make_volume("probe", 16);
    let args = load(&cluster);
    let mut probe = Probe::new(&cluster.nodes[0], "probe");
    probe.write();
    let mut pause = Duration::ZERO;
    let requests = under_load(&args, |control| {
        probe.write_for(Duration::from_secs(1));
        cluster.kill_node(0);
        probe.move_to(&cluster.nodes[1]);
        pause = probe.write();
        let before = control.reconnects();
        probe.write_for(Duration::from_secs(2));
        while control.reconnects() == before && before == 0 {
            thread::park_timeout(Duration::from_millis(10));
        }
        probe.write_for(Duration::from_secs(1));
    });
    assert!(pause <= HEAD_PAUSE_MAX, "nobody served for {pause:?}");
    print_figure(&format!("the next write was answered after {pause:?}; {requests} requests verified"));
}

#[test]
fn a_volume_that_is_led_elsewhere_is_refused_by_name() {
    let scratch = Scratch::new("elsewhere");
    let cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 16);
    let mut probe = Probe::new(&cluster.nodes[0], "v");
    probe.write();
    let refused = |cluster: &Cluster, node, why: &str| {
        let said = run_to_fail(Command::new("qemu-img").args(["info", &cluster.uri(node, "v")]));
        assert!(said.contains(why), "{said}");
    };
    refused(&cluster, 1, "node number 1 leads v");
    // One that was removed is brought back, and refuses like the others.
    cluster.freeze_node(2, true);
    probe.write_for(Duration::from_secs(2));
    cluster.freeze_node(2, false);
    cluster.wait_for_volume("v", |volume| volume["in_sync"].as_array().map(Vec::len) == Some(3));
    probe.write_for(Duration::from_millis(200));
    refused(&cluster, 2, "node number 1 leads v");
}

/// Where other nodes connect to the first node.
fn peer_address(cluster: &Cluster) -> String {
    let text = run(&mut cluster.ctl.command("node list --output json"));
    let nodes: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    nodes[0]["peer"].as_str().expect("an address").to_owned()
}

#[test]
fn nonsense_at_the_port_for_nodes_costs_its_sender_the_connection() {
    let scratch = Scratch::new("noise");
    let cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 16);
    let mut probe = Probe::new(&cluster.nodes[0], "v");
    probe.write();
    let address = peer_address(&cluster);
    let frame = |message, volume| {
        let mut bytes = Vec::new();
        PeerFrame { volume: VolumeNumber(volume), message }.encode(&[], &mut bytes);
        bytes
    };
    let hello =
        |node| frame(PeerMessage::Hello(Hello { node: NodeId(node), boot: 1, features: u64::MAX }), 0);
    let mut damaged = hello(9);
    damaged[60] ^= 1;
    let mut endless = hello(9);
    endless[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    // Each of these is wrong at its end, and answered with the end of the connection.
    let attacks: [Vec<u8>; 6] = [
        vec![0xa5; 5000],
        damaged,
        endless,
        frame(PeerMessage::Promise { epoch: 1 }, 1),
        [hello(9), hello(9)].concat(),
        [hello(9), frame(PeerMessage::Ack { epoch: 1, through: 1 << 60 }, 1)].concat(),
    ];
    let mut idle = Vec::new();
    for round in 0..60 {
        let mut socket = TcpStream::connect(&address).expect("the node listens");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        // It may be gone before all is written.
        let _ = socket.write_all(&attacks[round % attacks.len()]);
        let mut said = Vec::new();
        match socket.read_to_end(&mut said) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "attack {}", round % attacks.len())
            }
        }
        let mut silent = TcpStream::connect(&address).expect("the node listens");
        let half = hello(8);
        silent.write_all(&half[..round]).expect("room");
        idle.push(silent);
    }
    assert!(probe.write_for(Duration::from_secs(1)) < Duration::from_secs(1), "an honest client waits");
    assert!(run(&mut cluster.ctl.command("status")).contains("all replicas are in sync"));
    // Who does not say who it is is put out.
    idle[0].set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    assert_eq!(idle[0].read(&mut [0]).expect("the end of the connection"), 0);
}

/// The replica that was away is the only one left at the end: what it was filled with is all there is.
#[test]
fn a_member_that_was_away_is_filled_and_can_lead() {
    let scratch = Scratch::new("filled");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume_with("v", 64, "--min-in-sync 1");
    cluster.make_volume("probe", 16);
    let args = load(&cluster);
    let in_sync =
        |count| move |volume: &serde_json::Value| volume["in_sync"].as_array().map(Vec::len) == Some(count);
    let mut filled = Duration::ZERO;
    let requests = under_load(&args, |control| {
        thread::sleep(Duration::from_millis(500));
        cluster.kill_node(2);
        cluster.wait_for_volume("v", in_sync(2));
        // The load writes all over the volume meanwhile.
        thread::sleep(Duration::from_secs(3));
        let start = Instant::now();
        cluster.start_node(2);
        cluster.wait_for_volume("v", in_sync(3));
        filled = start.elapsed();
        assert_eq!(control.reconnects(), 0, "clients notice nothing");
        cluster.kill_node(1);
        cluster.wait_for_volume("v", in_sync(2));
        cluster.kill_node(0);
        cluster.wait_for_volume("v", |volume| volume["head"] == "n3" && volume["started"] == true);
        thread::sleep(Duration::from_secs(2));
    });
    assert!(filled <= FILL_MAX, "it took {filled:?}");
    print_figure(&format!("in sync {filled:?} after its start; {requests} requests verified"));
}

#[test]
fn nothing_answered_is_lost_when_all_nodes_are_killed_at_once() {
    let rounds = if full_tier() { 18 } else { 3 };
    let scratch = Scratch::new("all");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 64);
    let args = load(&cluster);
    let orders = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];
    let requests = under_load(&args, |control| {
        for round in 0..rounds {
            thread::sleep(Duration::from_millis(600 + 130 * (round as u64 % 5)));
            let before = control.reconnects();
            (0..3).for_each(|node| cluster.kill_node(node));
            for node in orders[round % orders.len()] {
                cluster.start_node(node);
            }
            while control.reconnects() == before {
                thread::park_timeout(Duration::from_millis(5));
            }
        }
    });
    cluster.wait_for_volume("v", |volume| volume["started"] == true);
    print_figure(&format!("{rounds} times all nodes killed, {requests} requests, nothing answered lost"));
}
