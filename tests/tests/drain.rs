//! A node gives away what it has, while its volumes are in use, and is forgotten.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{self, Control};
use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::tools::{run, run_to_fail};
use system_tests::harness::{Scratch, print_figure};

/// Fills of a few small volumes, on a slow machine.
const DRAINED_WITHIN: Duration = Duration::from_secs(60);

fn names(volume: &serde_json::Value, list: &str) -> Vec<String> {
    let nodes = volume[list].as_array().into_iter().flatten();
    nodes.map(|node| node["node"].as_str().or_else(|| node.as_str()).expect("a name").to_owned()).collect()
}

fn node(cluster: &Cluster, name: &str) -> serde_json::Value {
    let list = run(&mut cluster.ctl.command("node list --output json"));
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let found = list.as_array().expect("a list").iter().find(|node| node["name"] == name);
    found.unwrap_or_else(|| panic!("no node {name}")).clone()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < DRAINED_WITHIN, "{what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_node_is_drained_under_load_and_forgotten() {
    let scratch = Scratch::new("drain");
    let mut cluster = Cluster::start(&scratch, 4, 512);
    // One that is attached and in use, one that a client uses without that, and some that nobody leads.
    for volume in ["v", "w", "idle-1", "idle-2"] {
        run(&mut cluster.ctl.command(&format!("volume create {volume} --size 32M --on n1,n2,n3")));
    }
    Probe::new(&cluster.nodes[0], "idle-1").write();
    run(&mut cluster.ctl.command("volume attach v --node n1"));
    let controls = [Control::default(), Control::default()];
    let took = thread::scope(|scope| {
        let loads: Vec<_> = ["v", "w"]
            .into_iter()
            .zip(&controls)
            .map(|(volume, control)| {
                let args = cluster.verified_load(volume);
                scope.spawn(move || bench::run_with(&args, control))
            })
            .collect();
        for control in &controls {
            wait_until("the load does not begin", || control.answered() > 100);
        }
        let start = Instant::now();
        let said = run(&mut cluster.ctl.command("node drain n1"));
        let took = start.elapsed();
        assert!(said.contains("all data is safe elsewhere. 1 volume attached to it"), "{said}");
        let before: Vec<u64> = controls.iter().map(Control::answered).collect();
        for (control, before) in controls.iter().zip(before) {
            wait_until("what is led without a replica stands still", || control.answered() > before + 200);
        }
        for control in &controls {
            assert_eq!(control.reconnects(), 0, "whoever uses a volume there notices nothing");
            control.finish();
        }
        for load in loads {
            let report = load.join().expect("no panic").unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(report.errors(), 0, "{report}");
        }
        took
    });
    assert!(took < DRAINED_WITHIN, "{took:?}");
    for volume in ["v", "w", "idle-1", "idle-2"] {
        let record = cluster.volume(volume);
        assert_eq!(names(&record, "in_sync"), ["n2", "n3", "n4"], "{record}");
        assert_eq!(names(&record, "stale").len() + names(&record, "catching_up").len(), 0, "{record}");
    }
    let drained = node(&cluster, "n1");
    assert_eq!((&drained["draining"], &drained["replicas"]), (&true.into(), &0.into()));

    keep_what_no_other_node_takes(&cluster);
    remove_the_first_node(&mut cluster);
    print_figure(&format!("a node with 4 volumes of 32 MiB is drained under load after {took:.1?}"));
}

fn keep_what_no_other_node_takes(cluster: &Cluster) {
    // What goes to no other node stays where it is, and what is wanted can be taken back.
    run(&mut cluster.ctl.command("node drain n2 --no-wait"));
    let said = run_to_fail(&mut cluster.ctl.command("volume create x --size 16M --replicas 3"));
    assert!(["n1", "n2"].iter().all(|node| said.contains(&format!("{node} is being drained"))), "{said}");
    assert_eq!(node(cluster, "n2")["replicas"], 4);
    run(&mut cluster.ctl.command("node undrain n2"));
    assert_eq!(names(&cluster.volume("v"), "leaving").len(), 0);
}

fn remove_the_first_node(cluster: &mut Cluster) {
    let refused = |cluster: &Cluster, words: &str, why: &str| {
        let said = run_to_fail(&mut cluster.ctl.command(words));
        assert!(said.contains(why), "{words}: {said}");
    };
    refused(cluster, "node remove n1", "node n1 is connected; stop it first");
    refused(cluster, "node drain n9", "there is no node n9");
    refused(cluster, "node remove n9", "there is no node n9");
    refused(cluster, "node undrain n9", "there is no node n9");
    cluster.stop_node(0);
    wait_until("a node that has ended is taken for a living one", || {
        node(cluster, "n1")["connected"] == false
    });
    refused(cluster, "node remove n1", "node n1 has to do with volume v still");
    refused(cluster, "node remove n2", "node n2 is connected");
    run(&mut cluster.ctl.command("volume detach v"));
    run(&mut cluster.ctl.command("node remove n1"));
    let list = run(&mut cluster.ctl.command("node list"));
    assert!(!list.contains("n1 "), "{list}");
}
