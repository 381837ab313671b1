//! Volumes whose nodes nobody names: they come where there is room, or it is said what stands against it.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::thread;
use std::time::{Duration, Instant};

use system_tests::harness::Scratch;
use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::tools::{run, run_to_fail};

fn nodes(cluster: &Cluster) -> Vec<serde_json::Value> {
    let text = run(&mut cluster.ctl.command("node list --output json"));
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn replicas_come_to_nodes_with_room_for_them() {
    let scratch = Scratch::new("placement");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    let refused = |cluster: &Cluster, words: &str, why: &str| {
        let said = run_to_fail(&mut cluster.ctl.command(words));
        assert!(said.contains(why), "{words}: {said}");
    };
    let said = run(&mut cluster.ctl.command("volume create v --size 64M"));
    assert_eq!(said, "volume v: 64M, replicas on n1, n2, n3\n");
    Probe::new(&cluster.nodes[1], "v").write();
    run(&mut cluster.ctl.command("volume create near --size 16M --replicas 1 --near n2"));
    assert_eq!(cluster.volume("near")["in_sync"], serde_json::json!(["n2"]));
    // The others have promised less by now.
    run(&mut cluster.ctl.command("volume create two --size 16M --replicas 2"));
    assert_eq!(cluster.volume("two")["in_sync"], serde_json::json!(["n1", "n3"]));

    let capacity = nodes(&cluster)[0]["capacity_bytes"].as_u64().expect("a number");
    let left = |node: &serde_json::Value| capacity - node["reserved_bytes"].as_u64().expect("a number");
    let rooms: Vec<u64> = nodes(&cluster).iter().map(left).collect();
    let most = rooms[0].min(rooms[1]).min(rooms[2]);
    let too_large = format!("volume create large --size {}", most + 4096);
    refused(&cluster, &too_large, "3 replicas need 3 nodes, and none can take one: n1 has ");
    refused(&cluster, &too_large, "use --size ");
    run(&mut cluster.ctl.command(&format!("volume create large --size {most}")));
    refused(&cluster, "volume create more --size 4K", "3 replicas need 3 nodes, and none can take one");
    // Who names the nodes knows what he does.
    run(&mut cluster.ctl.command("volume create named --size 1G --on n1"));
    for name in ["large", "named"] {
        run(&mut cluster.ctl.command(&format!("volume delete {name}")));
    }
    refused(
        &cluster,
        "volume create w --size 1M --replicas 4",
        "4 replicas need 4 nodes, and 3 can take one",
    );
    refused(&cluster, "volume create w --size 1M --near n9", "there is no node n9");
    refused(&cluster, "volume create w --size 1M --zones moon", "none can take one: n1 is");
    refused(&cluster, "volume create w --size 1M --replicas 2 --on n1", "cannot be used with");

    cluster.kill_node(2);
    let start = Instant::now();
    while nodes(&cluster)[2]["connected"] == true {
        assert!(start.elapsed() < Duration::from_secs(10), "a killed node stays connected");
        thread::park_timeout(Duration::from_millis(20));
    }
    let why = "3 replicas need 3 nodes, and 2 can take one: n3 is away; use --replicas 2 or add a node";
    refused(&cluster, "volume create w --size 1M", why);
    run(&mut cluster.ctl.command("volume create w --size 1M --replicas 2"));
    assert!(run(&mut cluster.ctl.command("node list")).contains("AWAY"));
}
