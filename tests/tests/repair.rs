//! Replicas that rot while their nodes are down.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use datapath::store::map::LEAF_BLOCKS;
use datapath::wire::nbd_transmission::command;
use system_tests::harness::client::{Answer, Client};
use system_tests::harness::cluster::Cluster;
use system_tests::harness::ctl::PATIENCE;
use system_tests::harness::rot::rot;
use system_tests::harness::tools::run;
use system_tests::harness::{Scratch, print_figure};

const BLOCK: usize = 4096;
const PIECE_BLOCKS: u32 = 256;
/// Blocks that are written: six leaves of the map.
const WRITTEN: u32 = 6 * LEAF_BLOCKS;
/// Blocks that rot, three of them in a row. The last is in a part of the volume of its own.
const ROTTEN: [u32; 6] = [5, 300, 301, 302, 1000, 2100];
/// A leaf of the map that rots, with what it maps.
const ROTTEN_LEAF: u32 = 3;
const EIO: u32 = 5;

fn content(block: u32) -> Vec<u8> {
    (block | 0xab00_0000).to_le_bytes().repeat(BLOCK / 4)
}

/// A client that looks for a node again, for as long as a takeover may take.
struct Volume<'a> {
    socket: &'a Path,
    client: Option<Client>,
}

impl Volume<'_> {
    fn call(&mut self, command: u16, block: u32, count: u32, payload: &[u8]) -> Answer {
        let start = Instant::now();
        let (offset, length) = (u64::from(block) * BLOCK as u64, u64::from(count) * BLOCK as u64);
        loop {
            assert!(start.elapsed() < 2 * PATIENCE, "nobody answers");
            let Some(client) = &mut self.client else {
                self.client = Client::connect(self.socket, "v").ok();
                thread::park_timeout(Duration::from_millis(10));
                continue;
            };
            match client.call(command, offset, length, payload) {
                Ok(answer) => return answer,
                Err(_) => self.client = None,
            }
        }
    }

    fn write(&mut self, block: u32, count: u32) {
        let payload: Vec<u8> = (block..block + count).flat_map(content).collect();
        assert_eq!(self.call(command::WRITE, block, count, &payload).error, 0);
    }

    fn expect(&mut self, block: u32, count: u32) {
        let answer = self.call(command::READ, block, count, &[]);
        assert_eq!(answer.error, 0, "blocks {block} and on");
        for (block, bytes) in (block..block + count).zip(answer.data.chunks_exact(BLOCK)) {
            assert!(bytes == content(block), "block {block} holds {:?}", &bytes[..8]);
        }
    }
}

fn wait_for_metric(cluster: &Cluster, node: usize, name: &str, wanted: f64) {
    let start = Instant::now();
    while cluster.metric(node, name) < wanted {
        assert!(start.elapsed() < PATIENCE, "{name} stays {}", cluster.metric(node, name));
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// A replica that was filled over the network has holes where its source has zeroes that were written.
#[test]
fn damaged_zeroes_are_made_good_though_the_other_replica_has_holes_there() {
    const ZEROES: u32 = 5;
    let scratch = Scratch::new("holes");
    let mut cluster = Cluster::start(&scratch, 2, 512);
    run(&mut cluster.ctl.command("volume create v --size 16M --on n1"));
    run(&mut cluster.ctl.command("volume attach v --node n2"));
    let socket = cluster.nodes[1].socket.clone();
    let mut volume = Volume { socket: &socket, client: None };
    let zeroes = vec![0; PIECE_BLOCKS as usize * BLOCK];
    assert_eq!(volume.call(command::WRITE, 0, PIECE_BLOCKS, &zeroes).error, 0);
    volume.write(PIECE_BLOCKS, PIECE_BLOCKS);
    run(&mut cluster.ctl.command("volume add-replica v --node n2"));
    cluster.wait_for_sync("v", 2);
    run(&mut cluster.ctl.command("volume attach v --node n1 --steal"));
    // The first start takes the log into a checkpoint, so that the second need not read what rots.
    cluster.kill_node(0);
    cluster.start_node(0);
    cluster.kill_node(0);
    assert_eq!(rot(&cluster.nodes[0].pool, "v", &[ZEROES], &[]), 1, "zeroes that were written have a place");
    cluster.start_node(0);
    cluster.wait_for_sync("v", 2);

    let socket = cluster.nodes[0].socket.clone();
    let mut volume = Volume { socket: &socket, client: None };
    let answer = volume.call(command::READ, 0, PIECE_BLOCKS, &[]);
    assert!(answer.error == 0 && answer.data.iter().all(|byte| *byte == 0));
    volume.expect(PIECE_BLOCKS, PIECE_BLOCKS);
    wait_for_metric(&cluster, 0, "berth_blocks_repaired_from_replicas_total", 1.0);
    assert_eq!(cluster.metric(0, "berth_reads_from_other_replicas_total"), 1.0);
    let said = run(&mut cluster.ctl.command("volume verify v"));
    assert!(said.contains("alike and sound"), "{said}");
}

#[test]
fn a_head_whose_replica_has_rotted_reads_from_another_and_repairs_its_own() {
    let scratch = Scratch::new("rot");
    let mut cluster = Cluster::start(&scratch, 3, 512);
    cluster.make_volume_with("v", 64, "--min-in-sync 1");
    let socket = cluster.nodes[0].socket.clone();
    let in_sync =
        |count| move |volume: &serde_json::Value| volume["in_sync"].as_array().map(Vec::len) == Some(count);
    let mut volume = Volume { socket: &socket, client: None };
    for block in (0..WRITTEN).step_by(PIECE_BLOCKS as usize) {
        volume.write(block, PIECE_BLOCKS);
    }
    cluster.wait_for_volume("v", in_sync(3));
    // The first start takes the log into checkpoints: with leaves that are not needed for rolling forward.
    (0..3).for_each(|node| cluster.kill_node(node));
    (0..3).for_each(|node| cluster.start_node(node));
    (0..3).for_each(|node| cluster.kill_node(node));
    let pool = cluster.nodes[0].pool.clone();
    let flipped = rot(&pool, "v", &ROTTEN, &[ROTTEN_LEAF]);
    assert_eq!(flipped, ROTTEN.len() + 1, "all of them have places");
    (0..3).for_each(|node| cluster.start_node(node));

    // A part of a damaged block is written: the rest of it comes from another replica.
    volume.client = None;
    let last = ROTTEN[ROTTEN.len() - 1];
    volume.expect(last + 1, 1);
    let client = volume.client.as_mut().expect("connected");
    let offset = u64::from(last) * BLOCK as u64 + 512;
    let part = &content(last)[..512];
    assert_eq!(client.call(command::WRITE, offset, 512, part).expect("an answer").error, 0);
    assert_eq!(cluster.metric(0, "berth_reads_from_other_replicas_total"), 1.0);
    for block in (0..WRITTEN).step_by(PIECE_BLOCKS as usize) {
        volume.expect(block, PIECE_BLOCKS);
    }
    // Three pieces with rotten blocks, and two of the leaf.
    let from_others = cluster.metric(0, "berth_reads_from_other_replicas_total");
    assert_eq!(from_others, 1.0 + 3.0 + 2.0);
    #[expect(clippy::cast_precision_loss, reason = "six")]
    wait_for_metric(&cluster, 0, "berth_blocks_repaired_from_replicas_total", ROTTEN.len() as f64);
    assert_eq!(cluster.metric(0, "berth_reads_without_good_copy_total"), 0.0);
    assert_eq!(cluster.metric(0, "berth_request_errors_total"), 0.0);
    cluster.wait_for_volume("v", in_sync(3));

    // Nobody else is left: what was repaired is good here, and lasts; what cannot be is an error.
    cluster.kill_node(1);
    cluster.wait_for_volume("v", in_sync(2));
    cluster.kill_node(2);
    cluster.wait_for_volume("v", in_sync(1));
    cluster.kill_node(0);
    cluster.start_node(0);
    volume.client = None;
    let leaf = ROTTEN_LEAF * LEAF_BLOCKS..(ROTTEN_LEAF + 1) * LEAF_BLOCKS;
    for block in (0..WRITTEN).step_by(PIECE_BLOCKS as usize) {
        if leaf.contains(&block) {
            assert_eq!(volume.call(command::READ, block, PIECE_BLOCKS, &[]).error, EIO);
        } else {
            volume.expect(block, PIECE_BLOCKS);
        }
    }
    assert_eq!(cluster.metric(0, "berth_reads_without_good_copy_total"), 2.0);
    print_figure(&format!("{from_others} reads from another replica, {} blocks repaired", ROTTEN.len()));
}
