//! Replicas that are compared while the volume is in use, and damage that is made good wherever it is.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use datapath::wire::nbd_transmission::command;
use serde_json::Value;
use system_tests::harness::client::Client;
use system_tests::harness::cluster::{Cluster, ClusterNode};
use system_tests::harness::ctl::PATIENCE;
use system_tests::harness::rot::rot;
use system_tests::harness::tools::{run, run_to_fail};
use system_tests::harness::{Scratch, print_figure};

const BLOCK: usize = 4096;
const PIECE_BLOCKS: u32 = 256;
/// Blocks that are written: three leaves of the map.
const WRITTEN: u32 = 3 * 512;
/// Blocks that rot at the head, and at a member; one of them at both, in a row with others.
const AT_HEAD: [u32; 4] = [5, 300, 301, 1000];
const AT_MEMBER: [u32; 5] = [7, 301, 302, 303, 1500];

fn content(block: u32) -> Vec<u8> {
    (block | 0xab00_0000).to_le_bytes().repeat(BLOCK / 4)
}

/// Connects, which makes the node the head of the volume; tries for as long as a takeover may take.
fn connect(node: &ClusterNode) -> Client {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < PATIENCE, "nobody answers at {}", node.socket.display());
        match Client::connect(&node.socket, "v") {
            Ok(client) => return client,
            Err(_) => thread::park_timeout(Duration::from_millis(10)),
        }
    }
}

fn call(client: &mut Client, command: u16, block: u32, count: u32, payload: &[u8]) -> Vec<u8> {
    let (offset, length) = (u64::from(block) * BLOCK as u64, u64::from(count) * BLOCK as u64);
    let answer = client.call(command, offset, length, payload).expect("an answer");
    assert_eq!(answer.error, 0, "blocks {block} and on");
    answer.data
}

fn fill(client: &mut Client) {
    for block in (0..WRITTEN).step_by(PIECE_BLOCKS as usize) {
        let payload: Vec<u8> = (block..block + PIECE_BLOCKS).flat_map(content).collect();
        call(client, command::WRITE, block, PIECE_BLOCKS, &payload);
    }
}

fn verify(cluster: &Cluster) -> Value {
    let text = run(&mut cluster.ctl.command("volume verify v --output json"));
    serde_json::from_str(&text).expect("JSON")
}

/// Three replicas with content in places that a checkpoint knows, and no node that runs.
fn filled(scratch: &Scratch) -> Cluster {
    let mut cluster = Cluster::start(scratch, 3, 256);
    cluster.make_volume_with("v", 64, "--min-in-sync 1");
    fill(&mut connect(&cluster.nodes[0]));
    cluster.wait_for_sync("v", 3);
    // The first start takes the log into checkpoints: flipped bits in the log's end would be a torn write.
    (0..3).for_each(|node| cluster.kill_node(node));
    (0..3).for_each(|node| cluster.start_node(node));
    (0..3).for_each(|node| cluster.kill_node(node));
    cluster
}

/// Flips bits at the replica of the first node and of the second.
fn rot_two(cluster: &Cluster) -> u64 {
    let head = rot(&cluster.nodes[0].pool, "v", &AT_HEAD, &[]);
    let member = rot(&cluster.nodes[1].pool, "v", &AT_MEMBER, &[]);
    assert_eq!((head, member), (AT_HEAD.len(), AT_MEMBER.len()));
    (head + member) as u64
}

#[test]
fn verify_makes_damage_good_at_every_replica() {
    let scratch = Scratch::new("verify");
    let mut cluster = filled(&scratch);
    let rotten = rot_two(&cluster);
    let refused = run_to_fail(&mut cluster.ctl.command("volume verify v"));
    assert!(refused.contains("no node with a replica in sync of v is connected"), "{refused}");
    (0..3).for_each(|node| cluster.start_node(node));

    // Nobody leads the volume now: whoever was the last head does, for as long as this takes.
    let report = verify(&cluster);
    assert_eq!(report["clean"], true, "{report:#}");
    assert_eq!(report["members"], serde_json::json!(["n1", "n2", "n3"]), "{report:#}");
    assert_eq!(report["repaired_blocks"], rotten, "{report:#}");
    assert!(report["compared_blocks"].as_u64() >= Some(WRITTEN.into()), "{report:#}");
    let again = verify(&cluster);
    assert!(again["clean"] == true && again["repaired_blocks"] == 0, "{again:#}");
    let shown = cluster.volume("v");
    assert!(shown["last_pass"]["complete"] == true && shown["last_pass"]["ended_at"].is_u64(), "{shown:#}");
    run(&mut cluster.ctl.command("status"));
    let text = run(&mut cluster.ctl.command("volume verify v"));
    assert!(text.contains("all replicas in sync are alike and sound"), "{text}");

    // What was made good is good without the others, and stays so.
    for node in [0, 1] {
        (0..3).for_each(|node| cluster.kill_node(node));
        cluster.start_node(node);
        let mut client = connect(&cluster.nodes[node]);
        for block in 0..WRITTEN {
            assert!(call(&mut client, command::READ, block, 1, &[]) == content(block), "block {block}");
        }
        assert_eq!(cluster.metric(node, "berth_reads_from_other_replicas_total"), 0.0);
        drop(client);
        (0..3).filter(|other| *other != node).for_each(|other| cluster.start_node(other));
        cluster.wait_for_sync("v", 3);
    }
    print_figure(&format!("{rotten} blocks of two replicas made good"));
}

#[test]
fn a_volume_that_is_written_to_verifies() {
    let scratch = Scratch::new("verify-load");
    let mut cluster = Cluster::start(&scratch, 3, 256);
    cluster.make_volume("v", 64);
    fill(&mut connect(&cluster.nodes[0]));
    cluster.wait_for_sync("v", 3);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for number in 0..2_u32 {
            let (node, stop, writes) = (&cluster.nodes[0], &stop, &writes);
            scope.spawn(move || {
                let mut client = connect(node);
                let mut count = number;
                while !stop.load(Ordering::Relaxed) {
                    // Every second write goes to the same few blocks: there is always a change of these under way.
                    let block = if count.is_multiple_of(2) {
                        count / 2 % 4
                    } else {
                        count.wrapping_mul(0x9e37) % WRITTEN
                    };
                    call(&mut client, command::WRITE, block, 1, &count.to_le_bytes().repeat(BLOCK / 4));
                    writes.fetch_add(1, Ordering::Relaxed);
                    count = count.wrapping_add(2_654_435);
                }
            });
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..5 {
                let before = writes.load(Ordering::Relaxed);
                let report = verify(&cluster);
                assert!(report["clean"] == true && report["repaired_blocks"] == 0, "{report:#}");
                assert!(writes.load(Ordering::Relaxed) > before, "clients were held up");
                let sequences = (report["lowest_sequence"].as_u64(), report["highest_sequence"].as_u64());
                assert!(sequences.0 <= sequences.1 && sequences.1 > Some(0), "{report:#}");
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    let repeated = cluster.metric(0, "berth_scrub_repeated_comparisons_total");
    print_figure(&format!("5 passes beside {} writes, {repeated} comparisons repeated", writes.into_inner()));
    cluster.compare_replicas(&scratch, "v", 64);
}

#[test]
fn a_scrub_finds_damage_by_itself() {
    let scratch = Scratch::new("scrub");
    let mut cluster = filled(&scratch);
    let rotten = rot_two(&cluster);
    // A pass in about four seconds.
    cluster.node_arguments = vec!["--scrub-days=0.0001".to_owned()];
    (0..3).for_each(|node| cluster.start_node(node));
    let client = connect(&cluster.nodes[0]);
    let start = Instant::now();
    #[expect(clippy::cast_precision_loss, reason = "a few")]
    while cluster.metric(0, "berth_scrub_repaired_blocks_total") < rotten as f64 {
        assert!(start.elapsed() < 2 * PATIENCE, "{}", cluster.volume("v"));
        thread::park_timeout(Duration::from_millis(50));
    }
    cluster.wait_for_volume("v", |volume| volume["last_pass"]["complete"] == true);
    run(&mut cluster.ctl.command("status"));
    assert_eq!(cluster.metric(0, "berth_scrub_differing_blocks_total"), 0.0);
    drop(client);
}
