//! A pool filled to the brim: how much goes in, what goes on, what survives, and how space comes back.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use datapath::wire::nbd_transmission::{command, error_number};
use system_tests::harness::blocks::{BLOCK_BYTES, Blocks};
use system_tests::harness::client::Client;
use system_tests::harness::metrics::Page;
use system_tests::harness::server::{Options, Server, berth};
use system_tests::harness::tools::run;
use system_tests::harness::{Scratch, full_tier, print_figure};

/// The part of a pool of [`LARGE_MIB`] that a single volume must be able to fill, in percent.
const SHARE_MIN_PERCENT: u64 = 80;
const LARGE_MIB: u64 = 1024;
/// Where a smaller pool shows the same, and sooner.
const SMALL_MIB: u64 = 256;
/// Blocks in a write of 1 MiB.
const LARGE_BLOCKS: u64 = 256;
/// Requests in flight while overwriting.
const DEPTH: usize = 32;
/// A server that cleans takes its time, and one that answers nothing for so long is stuck.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

fn pool_mib() -> u64 {
    if full_tier() { LARGE_MIB } else { SMALL_MIB }
}

fn blocks_of(mib: u64) -> u64 {
    (mib << 20) / BLOCK_BYTES
}

/// A pool that holds no more, its volume `v` as large as the pool itself, and a second volume `w` that is empty.
struct Brim {
    server: Server,
    options: Options,
    writer: Writer,
    /// Last, so that it goes when the server has gone.
    _scratch: Scratch,
}

/// The only one who writes to `v`.
struct Writer {
    client: Client,
    blocks: Blocks,
    random: u64,
}

impl Brim {
    /// Writes `v` from its start, in large writes as long as they go in and then block by block, until ENOSPC.
    fn new(name: &str, pool_mib: u64) -> Brim {
        let scratch = Scratch::new(name);
        let mut options = Options::new(&scratch, pool_mib);
        options.pool_mib = pool_mib;
        options.volumes.push(("w".to_owned(), pool_mib));
        options.more.push("--metrics=127.0.0.1:0".to_owned());
        let server = Server::start(&options);
        let client = Client::connect(&options.socket, "v").expect("the server listens");
        let mut writer = Writer { client, blocks: Blocks::new(blocks_of(pool_mib)), random: 1 };
        let mut next = 0;
        for step in [LARGE_BLOCKS, 1] {
            while writer.write(next, step) == 0 {
                next += step;
                assert!(next < blocks_of(pool_mib), "more went in than there is");
            }
        }
        Brim { server, options, writer, _scratch: scratch }
    }

    fn restart(&mut self) {
        self.server = Server::start(&self.options);
        self.writer.client = Client::connect(&self.options.socket, "v").expect("the server listens");
    }

    /// As an operator does it.
    fn restart_in_order(&mut self) {
        self.server.terminate();
        let status = self.server.wait_at_most(Duration::from_secs(10)).expect("the server stops by itself");
        assert!(status.success(), "{status}");
        self.restart();
    }

    fn metric(&self, name: &str) -> f64 {
        Page::fetch(self.server.metrics_url()).sum(name, "")
    }

    /// Reads the whole volume and compares.
    fn verify(&mut self) {
        self.writer.blocks.verify(&mut self.writer.client);
    }
}

impl Writer {
    /// Writes these blocks; returns the answer's error number, which may be that of no space.
    fn write(&mut self, first: u64, count: u64) -> u32 {
        let payload = self.blocks.begin(first..first + count);
        let answer = self
            .client
            .call(command::WRITE, first * BLOCK_BYTES, count * BLOCK_BYTES, &payload)
            .expect("the server stays");
        match answer.error {
            0 => self.blocks.done(first..first + count),
            error_number::ENOSPC => self.blocks.refused(first..first + count),
            error => panic!("the write at block {first} failed with error {error}, not for want of space"),
        }
        answer.error
    }

    /// Overwrites blocks at random places below `below`, all written before, until `count` are answered or the
    /// connection is lost; counts the answers.
    fn overwrite(&mut self, below: u64, count: u64, answered: &AtomicU64) -> io::Result<()> {
        let mut asked = std::collections::BTreeMap::new();
        let mut sent = 0;
        while sent < count || !asked.is_empty() {
            if sent < count && asked.len() < DEPTH {
                let block = self.random_below(below);
                if self.blocks.is_open(block) {
                    continue;
                }
                assert!(self.blocks.is_written(block), "an overwrite needs something to overwrite");
                let payload = self.blocks.begin(block..block + 1);
                let cookie = self.client.ask(command::WRITE, block * BLOCK_BYTES, BLOCK_BYTES, &payload)?;
                asked.insert(cookie, block);
                sent += 1;
                continue;
            }
            let answer = self.client.answer()?;
            let block = asked.remove(&answer.cookie).expect("one of ours");
            assert_eq!(answer.error, 0, "the overwriting of block {block} was refused");
            self.blocks.done(block..block + 1);
            answered.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn random_below(&mut self, bound: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }
}

#[test]
fn a_volume_fills_most_of_its_pool_and_every_block_reads_back() {
    let mut brim = Brim::new("brim-fill", LARGE_MIB);
    let (written, all) = (brim.writer.blocks.written(), blocks_of(LARGE_MIB));
    // Another volume has no more room than this one.
    let mut other = Client::connect(&brim.options.socket, "w").expect("the server listens");
    let answer = other.call(command::WRITE, 0, 1 << 20, &vec![1; 1 << 20]).expect("the server stays");
    assert_eq!(answer.error, error_number::ENOSPC, "a full pool is full for all");
    brim.verify();
    assert!(brim.metric("berth_refused_no_space_total") >= 3.0, "refusals are counted");
    brim.restart_in_order();
    brim.verify();
    let tenths = 1000 * written / all;
    print_figure(&format!("{}.{} % of {LARGE_MIB} MiB filled", tenths / 10, tenths % 10));
    assert!(100 * written >= SHARE_MIN_PERCENT * all, "{written} of {all} blocks went in");
    brim.server.stop();
}

#[test]
fn overwriting_a_full_pool_waits_for_the_cleaner_and_goes_on() {
    let mut brim = Brim::new("brim-overwrite", pool_mib());
    let (written, answered) = (brim.writer.blocks.written(), AtomicU64::new(0));
    let cleaned = brim.metric("berth_segments_cleaned_total");
    // A quarter of the pool again is more than all of what a full pool has in reserve.
    let count = blocks_of(pool_mib()) / 4;
    let start = Instant::now();
    brim.writer.overwrite(written, count, &answered).expect("the server stays");
    let seconds = start.elapsed().as_secs_f64();
    assert!(
        brim.metric("berth_segments_cleaned_total") > cleaned,
        "nothing was cleaned: the pool was not full"
    );
    brim.verify();
    let waits = brim.metric("berth_waits_for_space_total");
    #[expect(clippy::cast_precision_loss, reason = "a count of blocks")]
    let rate = count as f64 / seconds;
    print_figure(&format!("{count} overwrites at the brim, {rate:.0} a second, {waits} waited for space"));
    brim.server.stop();
}

#[test]
fn nothing_answered_is_lost_by_kills_of_a_full_pool() {
    let kills: u64 = if full_tier() { 10 } else { 4 };
    let mut brim = Brim::new("brim-kill", pool_mib());
    let written = brim.writer.blocks.written();
    let mut total = 0;
    for round in 0..kills {
        let answered = AtomicU64::new(0);
        // Each round comes a little further, the first ones end while the first checkpoint is hardly over.
        let wanted = 1 + 900 * round;
        let deadline = Instant::now() + KILL_TIMEOUT;
        let (server, writer) = (&mut brim.server, &mut brim.writer);
        thread::scope(|scope| {
            let load = scope.spawn(|| writer.overwrite(written, u64::MAX, &answered));
            while answered.load(Ordering::Relaxed) < wanted
                && !load.is_finished()
                && Instant::now() < deadline
            {
                thread::park_timeout(Duration::from_micros(200));
            }
            server.kill();
            load.join().expect("no refused overwrite").expect_err("the load ends when the server does");
        });
        let came = answered.load(Ordering::Relaxed);
        assert!(came >= wanted, "round {round}: only {came} overwrites in a minute");
        total += came;
        brim.restart();
        brim.verify();
    }
    print_figure(&format!("{kills} kills at the brim, {total} overwrites, none lost"));
    brim.server.stop();
    run(berth(&["pool", "check"]).arg(&brim.options.pool));
}

#[test]
fn a_trimmed_half_is_room_for_others() {
    let mut brim = Brim::new("brim-trim", pool_mib());
    let written = brim.writer.blocks.written();
    let live_before = brim.metric("berth_live_blocks");
    let half = written / 2;
    let answer =
        brim.writer.client.call(command::TRIM, 0, half * BLOCK_BYTES, &[]).expect("the server stays");
    assert_eq!(answer.error, 0, "a full pool takes trims");
    brim.writer.blocks.trimmed(0..half);
    let freed = live_before - brim.metric("berth_live_blocks");
    #[expect(clippy::cast_precision_loss, reason = "a count of blocks")]
    let expected = half as f64;
    assert!(
        (0.98 * expected..1.02 * expected).contains(&freed),
        "{freed} blocks are free after a trim of {half}"
    );

    // In the same volume, where nothing was before and where the brim stopped it.
    let start = written.next_multiple_of(LARGE_BLOCKS);
    let mut here = 0;
    while here < half / 2 && start + here + LARGE_BLOCKS <= blocks_of(pool_mib()) {
        assert_eq!(
            brim.writer.write(start + here, LARGE_BLOCKS),
            0,
            "there is room again at block {}",
            start + here
        );
        here += LARGE_BLOCKS;
    }
    // And in another one, whose lane must first be given the segments.
    let mut other = Client::connect(&brim.options.socket, "w").expect("the server listens");
    let mut others = Blocks::new(blocks_of(pool_mib()));
    let mut there = 0;
    while there < (half - here) * 3 / 4 {
        let payload = others.begin(there..there + LARGE_BLOCKS);
        let offset = there * BLOCK_BYTES;
        let answer = other
            .call(command::WRITE, offset, LARGE_BLOCKS * BLOCK_BYTES, &payload)
            .expect("the server stays");
        assert_eq!(answer.error, 0, "there is room for another volume at block {there}");
        others.done(there..there + LARGE_BLOCKS);
        there += LARGE_BLOCKS;
    }
    brim.verify();
    others.verify(&mut other);
    brim.server.stop();
    let shown = run(berth(&["pool", "inspect"]).arg(&brim.options.pool));
    for live in [brim.writer.blocks.written(), others.written()] {
        assert!(shown.contains(&format!("{live} live blocks")), "{live} blocks of a volume live:\n{shown}");
    }
    print_figure(&format!("{half} blocks trimmed, {} written again", here + there));
}
