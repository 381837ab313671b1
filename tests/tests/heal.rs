//! A node that stays away is replaced, and one that is given a replica again shows what the others hold. That nothing counts
//! of what it had kept is proved elsewhere: datapath/src/replica/head/serve.rs.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::time::{Duration, Instant};

use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::ctl::Ctl;
use system_tests::harness::tools::{run, tool};
use system_tests::harness::{Scratch, print_figure};

const SIZE_MIB: u64 = 64;
/// Long enough for the grace time, a fill and a slow machine.
const HEALED_WITHIN: Duration = Duration::from_secs(60);

/// Writes the whole volume through a node, or checks that it reads like that. The first blocks are left to whoever probes.
fn fio(cluster: &Cluster, node: usize, how: &str, pattern: &str) {
    let mut fio = tool("fio");
    fio.args(["--name=v", "--ioengine=nbd", "--bs=64k", "--iodepth=8", "--offset=1m", "--do_verify=1"]);
    fio.args([format!("--size={}m", SIZE_MIB - 1), format!("--uri={}", cluster.uri(node, "v"))]);
    run(fio.args([&format!("--rw={how}"), "--verify=pattern", &format!("--verify_pattern={pattern}")]));
}

fn holds(volume: &serde_json::Value, nodes: &[&str]) -> bool {
    let list = |name: &str| volume[name].as_array().map_or(0, Vec::len);
    let in_sync = volume["in_sync"].as_array().into_iter().flatten().filter_map(|node| node.as_str());
    in_sync.eq(nodes.iter().copied()) && list("stale") + list("catching_up") + list("fresh") == 0
}

/// Writes go on through the head meanwhile: they are what shows it that a member is gone.
fn wait_until_healed(cluster: &Cluster, head: usize, nodes: &[&str]) -> Duration {
    let mut probe = Probe::new(&cluster.nodes[head], "v");
    let start = Instant::now();
    loop {
        probe.write();
        let volume = cluster.volume("v");
        if holds(&volume, nodes) {
            return start.elapsed();
        }
        assert!(start.elapsed() < HEALED_WITHIN, "the record stays {volume}");
    }
}

#[test]
fn what_a_lost_node_held_is_given_to_another_one() {
    let scratch = Scratch::new("heal");
    let ctl = Ctl::start_with(&scratch.file("records"), &["--replace-after=2"]);
    let mut cluster = Cluster::start_under(&scratch, ctl, 4, 512);
    run(&mut cluster.ctl.command(&format!("volume create v --size {SIZE_MIB}M --on n1,n2,n3")));
    fio(&cluster, 0, "write", "0x11");

    cluster.kill_node(1);
    let first = wait_until_healed(&cluster, 0, &["n1", "n3", "n4"]);
    // Ends with status 1 while anything is degraded.
    run(&mut cluster.ctl.command("status"));

    // What the second node has kept is older than what is written now, and nothing of it may come back.
    fio(&cluster, 0, "write", "0x5a");
    cluster.kill_node(0);
    cluster.start_node(1);
    let second = wait_until_healed(&cluster, 3, &["n2", "n3", "n4"]);
    cluster.kill_node(3);
    // Until the lost head can answer nobody any more, no other node takes its place.
    Probe::new(&cluster.nodes[1], "v").write();
    fio(&cluster, 1, "read", "0x5a");

    let error = cluster.ctl.command("volume remove-replica v --node n2").output().expect("berth runs");
    let text = String::from_utf8_lossy(&error.stderr);
    assert!(!error.status.success() && text.contains("is in sync, and is needed"), "{text}");
    print_figure(&format!(
        "a lost replica of {SIZE_MIB} MiB is made good on another node {first:.1?} and {second:.1?} after its node was \
         killed, 2 s of them the grace time"
    ));
}
