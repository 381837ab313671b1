//! What has no replica on a node any more does not stay in its pool: deleted volumes, also those whose deletion the node has
//! missed, and replicas that were given to another node.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::server::berth;
use system_tests::harness::tools::{run, run_to_fail, tool};
use system_tests::harness::{Scratch, print_figure};

/// More than half of what a pool of 512 MiB can hold.
const SIZE_MIB: u64 = 192;
const REMOVED_WITHIN: Duration = Duration::from_secs(20);

fn fill(cluster: &Cluster, volume: &str) {
    let mut fio = tool("fio");
    fio.args(["--name=v", "--ioengine=nbd", "--bs=256k", "--iodepth=4", "--rw=write", "--end_fsync=1"]);
    run(fio.args([format!("--size={SIZE_MIB}m"), format!("--uri={}", cluster.uri(0, volume))]));
}

/// How many volumes a node has removed since it was started.
fn removed(cluster: &Cluster, node: usize) -> f64 {
    cluster.metric(node, "berth_volumes_removed_total")
}

fn wait_until_removed(cluster: &Cluster, node: usize, count: f64) -> Duration {
    let start = Instant::now();
    while removed(cluster, node) < count {
        assert!(start.elapsed() < REMOVED_WITHIN, "node {node} keeps what was deleted");
        thread::park_timeout(Duration::from_millis(10));
    }
    start.elapsed()
}

fn volumes_in(pool: &Path) -> Vec<String> {
    let text = run(berth(&["pool", "inspect", "--output=json"]).arg(pool));
    let inspection: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let lanes = inspection["lanes"].as_array().expect("lanes").iter();
    let volumes = lanes.flat_map(|lane| lane["volumes"].as_array().expect("volumes"));
    volumes.map(|volume| volume["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn a_deleted_volume_gives_its_space_back() {
    let scratch = Scratch::new("delete");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume("kept", 8);
    let mut longest = Duration::ZERO;
    for turn in 1..=4 {
        cluster.make_volume("v", SIZE_MIB);
        fill(&cluster, "v");
        let refused = run_to_fail(&mut cluster.ctl.command("volume delete v"));
        assert!(refused.contains("is led by node n1") && refused.contains("--force"), "{refused}");
        run(&mut cluster.ctl.command("volume delete v --force"));
        for node in 0..3 {
            longest = longest.max(wait_until_removed(&cluster, node, f64::from(turn)));
        }
        let gone = run_to_fail(tool("nbdinfo").arg(cluster.uri(0, "v")));
        assert!(gone.contains("No such file or directory for export: v"), "{gone}");
    }
    print_figure(&format!(
        "{SIZE_MIB} MiB of each of three nodes given back {longest:.1?} after the deletion at the latest"
    ));

    // One that was not there hears of it when it comes back, from a ctl that has been restarted, too.
    cluster.make_volume("missed", 8);
    // What is answered is on every node.
    for volume in ["kept", "missed"] {
        Probe::new(&cluster.nodes[0], volume).write();
    }
    cluster.kill_node(2);
    run(&mut cluster.ctl.command("volume delete missed --force"));
    cluster.ctl.kill();
    cluster.ctl.restart();
    cluster.start_node(2);
    wait_until_removed(&cluster, 2, 1.0);
    for node in 0..3 {
        cluster.stop_node(node);
        let pool = scratch.file(&format!("n{}.pool", node + 1));
        assert_eq!(volumes_in(&pool), ["kept"], "node {node}");
        run(berth(&["pool", "check"]).arg(&pool));
    }
}

/// Another ctl, or one whose records are lost, knows of no volume: that is no reason to remove any.
#[test]
fn what_nobody_knows_stays() {
    let scratch = Scratch::new("delete-unknown");
    let mut cluster = Cluster::start(&scratch, 1, 128);
    run(&mut cluster.ctl.command("volume create v --size 8M --on n1"));
    Probe::new(&cluster.nodes[0], "v").write();
    cluster.kill_node(0);
    cluster.ctl.kill();
    std::fs::remove_file(scratch.file("records")).expect("the records are lost");
    cluster.ctl.restart();
    cluster.start_node(0);
    // A volume of the same number, but of another lineage, is deleted: it is not this one.
    run(&mut cluster.ctl.command("volume create other --size 8M --on n1"));
    run(&mut cluster.ctl.command("volume delete other"));
    run(&mut cluster.ctl.command("volume create marker --size 8M --on n1"));
    cluster.wait_for_volume("marker", |volume| volume["in_sync"] == serde_json::json!(["n1"]));
    // And one of the same name is another volume.
    run(&mut cluster.ctl.command("volume create v --size 8M --on n1"));
    Probe::new(&cluster.nodes[0], "v").write();
    assert!((removed(&cluster, 0)).abs() < f64::EPSILON);
    cluster.stop_node(0);
    assert!(volumes_in(&scratch.file("n1.pool")).contains(&"v".to_owned()));
}
