//! Replicas that rot while their nodes are down.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use datapath::store::bugs::Bugs;
use datapath::store::layout::Place;
use datapath::store::map::LEAF_BLOCKS;
use datapath::store::recovery::{PoolReader, read_layout, recover_lane};
use datapath::wire::nbd_transmission::command;
use system_tests::harness::client::{Answer, Client};
use system_tests::harness::cluster::Cluster;
use system_tests::harness::ctl::PATIENCE;
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

struct PoolFile(File);

impl PoolReader for PoolFile {
    fn len_bytes(&self) -> u64 {
        self.0.metadata().expect("a file").len()
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        self.0.read_exact_at(into, offset_bytes).is_ok()
    }
}

/// Where the rotten blocks of the volume are, and the leaf: found as recovery finds them.
fn places_to_rot(pool: &mut PoolFile, volume: &str) -> Vec<Place> {
    let layout = read_layout(pool).expect("a pool");
    let mut places = Vec::new();
    for lane in 0..layout.lanes {
        let mut recovered = recover_lane(pool, layout, lane, 1 << 20, Bugs::none()).expect("a sound lane");
        let Some(position) = recovered.volumes.iter().position(|found| found.name == volume) else {
            continue;
        };
        let visit = |block, mapping: datapath::store::map::Mapping| {
            if ROTTEN.contains(&block) {
                places.push(mapping.place);
            }
        };
        recovered.visit_blocks(pool, position, visit).expect("a sound map");
        let table = recovered.map.table(u32::try_from(position).expect("few"));
        places.push(table.leaf_on_device(ROTTEN_LEAF).place);
    }
    places
}

/// Flips a bit in each of the blocks and in the leaf.
fn rot(pool: &Path, volume: &str) {
    let file = File::options().read(true).write(true).open(pool).expect("the pool's file");
    let mut pool = PoolFile(file);
    let places = places_to_rot(&mut pool, volume);
    assert_eq!(places.len(), ROTTEN.len() + 1, "all of them have places");
    assert!(places.iter().all(|place| place.is_on_device()), "{places:?}");
    for (place, bit) in places.into_iter().zip(0_u8..) {
        let mut byte = [0];
        let at = place.offset_bytes() + 64 * u64::from(bit);
        pool.0.read_exact_at(&mut byte, at).expect("inside");
        byte[0] ^= 1 << bit;
        pool.0.write_all_at(&byte, at).expect("inside");
    }
}

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
    rot(&pool, "v");
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
