//! Volumes follow their tasks: attached to one node after the other, taken from dead ones, let go by processes that end.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{self, Control};
use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::tools::{run, run_to_fail};
use system_tests::harness::{Scratch, full_tier, print_figure};

/// A planned move: from the last write on one node to the first on another. Longer than that it may take where the machine
/// stands still, but not often.
const MOVE_PAUSE_MAX: Duration = Duration::from_millis(200);
/// The holder's node is dead: from the command to the first write on another one.
const TAKEOVER_MAX: Duration = Duration::from_secs(5);

fn median_and_longest(mut durations: Vec<Duration>) -> (Duration, Duration) {
    durations.sort_unstable();
    (durations[durations.len() / 2], *durations.last().expect("some"))
}

/// Attaches the volume `probe` to a node while somebody writes to it; the longest that a write took.
fn move_under_writes(cluster: &Cluster, probe: &mut Probe, node: &str) -> Duration {
    let mut attach = cluster.ctl.command(&format!("volume attach probe --node {node} --steal"));
    thread::scope(|scope| {
        let moved = scope.spawn(|| run(&mut attach));
        let mut longest = Duration::ZERO;
        while !moved.is_finished() {
            longest = longest.max(probe.write_through_any(&cluster.nodes));
        }
        let said = moved.join().expect("no panic");
        assert!(said.starts_with(&format!("volume probe: node {node} leads it")), "{said}");
        longest.max(probe.write_through_any(&cluster.nodes))
    })
}

#[test]
fn a_volume_follows_its_task() {
    let moves = if full_tier() { 60 } else { 12 };
    let scratch = Scratch::new("follow");
    let cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 64);
    cluster.make_volume("probe", 16);
    let mut probe = Probe::new(&cluster.nodes[0], "probe");
    probe.write();
    let pauses = (0..moves).map(|number| {
        let node = format!("n{}", 1 + (number + 1) % 3);
        move_under_writes(&cluster, &mut probe, &node)
    });
    let (median, longest) = median_and_longest(pauses.collect());
    assert!(median <= MOVE_PAUSE_MAX, "half of the moves take longer than {median:?}");

    // Once more beside a load that knows each block, and is moved itself.
    let (args, control) = (cluster.verified_load("v"), Control::default());
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        for number in 0..moves / 2 {
            let before = control.reconnects();
            run(&mut cluster
                .ctl
                .command(&format!("volume attach v --steal --node n{}", 1 + (number + 1) % 3)));
            while control.reconnects() == before && !load.is_finished() {
                thread::park_timeout(Duration::from_millis(5));
            }
            thread::park_timeout(Duration::from_millis(100));
        }
        control.finish();
        load.join().expect("no panic")
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.errors(), 0, "{report}");
    print_figure(&format!(
        "{moves} moves under writes: a write waits {median:.1?} in the median, {longest:.1?} at most"
    ));
}

#[test]
fn who_holds_a_volume_is_named_to_whoever_else_wants_it() {
    let scratch = Scratch::new("holder");
    let cluster = Cluster::start(&scratch, 3, 512);
    run(&mut cluster.ctl.command("volume create v --size 16M --on n1,n2"));
    let refused = |words: &str, why: &str| {
        let said = run_to_fail(&mut cluster.ctl.command(words));
        assert!(said.contains(why), "{words}: {said}");
    };
    refused("volume attach v --node n9", "there is no node n9");
    refused("volume attach w --node n1", "there is no volume w");
    run(&mut cluster.ctl.command("volume attach v --node n1"));
    run(&mut cluster.ctl.command("volume attach v --node n1"));
    let shown = cluster.volume("v");
    assert_eq!((&shown["attached"], &shown["head"]), (&"n1".into(), &"n1".into()));
    refused("volume attach v --node n2", "volume v is attached to node n1, which lives; detach it first");
    refused("volume detach v --node n2", "volume v is attached to node n1");
    refused("volume delete v", "volume v is attached to node number 1; detach it first");
    let said = run_to_fail(std::process::Command::new("qemu-img").args(["info", &cluster.uri(1, "v")]));
    assert!(said.contains("v is attached to node number 1: connect there"), "{said}");
    run(&mut cluster.ctl.command("volume attach v --node n2 --steal"));
    run(&mut cluster.ctl.command("volume detach v"));
    run(&mut cluster.ctl.command("volume detach v --node n2"));
    cluster.wait_for_volume("v", |volume| volume["head"].is_null());
    let start = Instant::now();
    Probe::new(&cluster.nodes[0], "v").write();
    assert!(start.elapsed() < Duration::from_secs(2), "the head that had it had let go");
    refused("volume delete v", "volume v is led by node n1 and may be in use there");
    run(&mut cluster.ctl.command("volume attach v --node n1"));
    run(&mut cluster.ctl.command("volume detach v"));
    run(&mut cluster.ctl.command("volume delete v"));
}

#[test]
fn a_volume_goes_where_no_replica_is() {
    let scratch = Scratch::new("elsewhere");
    let mut cluster = Cluster::start(&scratch, 4, 512);
    run(&mut cluster.ctl.command("volume create v --size 64M --on n1,n2,n3"));
    run(&mut cluster.ctl.command("volume create probe --size 16M --on n1,n2,n3"));
    let mut probe = Probe::new(&cluster.nodes[0], "probe");
    probe.write();
    let pauses: Vec<Duration> =
        ["n4", "n2", "n4"].into_iter().map(|node| move_under_writes(&cluster, &mut probe, node)).collect();
    let (_, longest) = median_and_longest(pauses);

    let (args, control) = (cluster.verified_load("v"), Control::default());
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        run(&mut cluster.ctl.command("volume attach v --node n4 --steal"));
        wait_for_requests(&control, &load);
        // A replica that was away is filled by a head that has none, from one of the others.
        cluster.kill_node(1);
        cluster.wait_for_sync("v", 2);
        wait_for_requests(&control, &load);
        cluster.start_node(1);
        cluster.wait_for_sync("v", 3);
        // Its own is filled by it, and read from then on; and it goes on when that is taken out again.
        run(&mut cluster.ctl.command("volume add-replica v --node n4"));
        cluster.wait_for_sync("v", 4);
        wait_for_requests(&control, &load);
        run(&mut cluster.ctl.command("volume attach v --node n1 --steal"));
        wait_for_requests(&control, &load);
        control.finish();
        load.join().expect("no panic")
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.errors(), 0, "{report}");

    // What it has nothing to do with any more it does not keep.
    let removed = cluster.metric(3, "berth_volumes_removed_total");
    run(&mut cluster.ctl.command("volume detach probe"));
    let start = Instant::now();
    drop(probe);
    while cluster.metric(3, "berth_volumes_removed_total") < removed + 1.0 {
        assert!(start.elapsed() < Duration::from_secs(10), "node n4 keeps what it has no replica of");
        thread::park_timeout(Duration::from_millis(10));
    }
    print_figure(&format!("moves to a node without a replica: a write waits {longest:.1?} at most"));
}

/// Until the load has had some more requests answered.
fn wait_for_requests<T>(control: &Control, load: &thread::ScopedJoinHandle<'_, T>) {
    let before = control.answered();
    while control.answered() < before + 200 && !load.is_finished() {
        thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn a_dead_holder_is_taken_over_from() {
    let rounds = if full_tier() { 20 } else { 3 };
    let scratch = Scratch::new("takeover");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 64);
    run(&mut cluster.ctl.command("volume attach v --node n1"));
    let (args, control) = (cluster.verified_load("v"), Control::default());
    let mut pauses = Vec::new();
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        for round in 0..rounds {
            let (holder, next) = (round % 3, (round + 1) % 3);
            thread::park_timeout(Duration::from_millis(500));
            let before = control.reconnects();
            cluster.kill_node(holder);
            let start = Instant::now();
            // It may be a moment before ctl has seen that the node is gone.
            let attach = format!("volume attach v --node n{}", next + 1);
            while !cluster.ctl.command(&attach).output().expect("berth runs").status.success() {
                assert!(start.elapsed() < TAKEOVER_MAX, "the dead node is taken for a living one");
                thread::park_timeout(Duration::from_millis(10));
            }
            while control.reconnects() == before && !load.is_finished() {
                thread::park_timeout(Duration::from_millis(5));
            }
            pauses.push(start.elapsed());
            cluster.start_node(holder);
            cluster.wait_for_sync("v", 3);
        }
        control.finish();
        load.join().expect("no panic")
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.errors(), 0, "{report}");
    let (median, longest) = median_and_longest(pauses);
    assert!(longest <= TAKEOVER_MAX, "nobody served for {longest:?}");
    print_figure(&format!(
        "{rounds} holders killed: served elsewhere after {median:.1?} in the median, {longest:.1?} at most"
    ));
}

#[test]
fn a_node_that_is_told_to_end_keeps_nobody_waiting() {
    let scratch = Scratch::new("polite");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("v", 16);
    let mut probe = Probe::new(&cluster.nodes[0], "v");
    probe.write();
    let mut pauses = Vec::new();
    for round in 0..3 {
        probe.move_to(&cluster.nodes[round]);
        probe.write();
        cluster.stop_node(round);
        probe.move_to(&cluster.nodes[(round + 1) % 3]);
        pauses.push(probe.write());
        cluster.start_node(round);
        cluster.wait_for_sync("v", 3);
        // Whoever leads it now has to let go for the next round.
        cluster.stop_node((round + 1) % 3);
        cluster.start_node((round + 1) % 3);
        cluster.wait_for_sync("v", 3);
    }
    let (median, longest) = median_and_longest(pauses);
    assert!(longest < Duration::from_secs(2), "{longest:?}: until its leave to read has lapsed takes 3 s");
    print_figure(&format!(
        "a node ends: another serves after {median:.1?} in the median, {longest:.1?} at most"
    ));
}
