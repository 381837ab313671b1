//! A restart after kill -9 at the worst moment: how long until the first read is answered, and is everything there?
//!
//! A restart reads what the log took since the last checkpoint. So the volumes are written first in order, then in
//! random blocks, and until every lane in use is about to write its next checkpoint.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{self, BenchArgs, BlockRange, Control, Report};
use datapath::wire::nbd_transmission::command;
use system_tests::harness::client::Client;
use system_tests::harness::metrics::Page;
use system_tests::harness::server::{Options, Server};
use system_tests::harness::{Scratch, full_tier, print_figure};

/// From the start of the process to the answer of the first read.
const FIRST_READ_MAX: Duration = Duration::from_secs(2);
/// A lane writes a checkpoint at the latest after so many MiB; this test stops a good part before.
const CHECKPOINT_MIB: u64 = 256;
const STOP_MIB: u64 = CHECKPOINT_MIB * 7 / 8;
const BLOCKS_IN_MIB: u64 = 256;

/// What one lane told at one moment.
#[derive(Clone, Copy, Debug)]
struct Moment {
    client_mib: u64,
    device_mib: u64,
    checkpoints: u64,
}

impl Moment {
    fn now(url: &str, lane: usize) -> Moment {
        let page = Page::fetch(url);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters")]
        let count = |name: &str| page.sum(name, &format!("lane=\"{lane}\"")) as u64;
        Moment {
            client_mib: count("berth_client_blocks_written_total") / BLOCKS_IN_MIB,
            device_mib: count("berth_device_blocks_written_total") / BLOCKS_IN_MIB,
            checkpoints: count("berth_checkpoints_total"),
        }
    }
}

/// One volume's load. The state lets a later run know what must be there.
struct Load {
    args: BenchArgs,
    lane: usize,
    url: String,
}

impl Load {
    fn new(server: &Server, lane: usize, state: PathBuf) -> Load {
        let args = BenchArgs {
            write: 1,
            duration: 24.0 * 3600.0,
            verify: true,
            state: Some(state),
            destroy_data: true,
            ..BenchArgs::new(server.uris()[lane].parse().expect("a URI"))
        };
        Load { args, lane, url: server.metrics_url().to_owned() }
    }

    /// Writes until `enough` says so of the moment at the start, the moment of the last checkpoint, and now.
    fn write(&self, args: &BenchArgs, enough: impl Fn(Moment, Moment, Moment) -> bool) -> Report {
        let control = Control::default();
        let report = thread::scope(|scope| {
            let load = scope.spawn(|| bench::run_with(args, &control));
            let start = Moment::now(&self.url, self.lane);
            let (mut checkpoint, mut now) = (start, start);
            while !enough(start, checkpoint, now) && !load.is_finished() {
                thread::sleep(Duration::from_millis(2));
                now = Moment::now(&self.url, self.lane);
                if now.checkpoints != checkpoint.checkpoints {
                    checkpoint = now;
                }
            }
            control.finish();
            load.join().expect("no panic")
        });
        let report = report.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(report.errors(), 0, "{report}");
        report
    }

    /// Half of the volume in order, as much again in random blocks, and on until the next checkpoint is near.
    fn write_until_just_before_a_checkpoint(&self, volume_mib: u64) {
        let large = BlockRange { least: 1 << 20, most: 1 << 20 };
        let in_order = BenchArgs { sequential: true, block: large, depth: 4, ..self.args.clone() };
        self.write(&in_order, |start, _, now| now.client_mib - start.client_mib >= volume_mib / 2);
        self.write(&self.args, |start, checkpoint, now| {
            let written = now.client_mib - start.client_mib >= volume_mib - volume_mib / 2;
            // Not near the end of what is left either: the load runs on until it hears that it is enough.
            written && now.device_mib - checkpoint.device_mib >= STOP_MIB
        });
    }

    /// Reads everything and compares it with what was written.
    fn verify(&self) {
        let look = BenchArgs { write: 0, read: 1, duration: 0.0, ..self.args.clone() };
        bench::run(&look).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn the_first_read_after_kill_9_comes_within_two_seconds() {
    let (volumes, volume_mib): (usize, u64) = if full_tier() { (4, 2048) } else { (1, 512) };
    let scratch = Scratch::new("restart");
    let mut options = Options::new(&scratch, volume_mib);
    // One volume for each lane: new ones go where there are fewest.
    options.volumes = (0..volumes).map(|number| (format!("v{number}"), volume_mib)).collect();
    options.pool_mib = 2 * volume_mib * volumes as u64;
    options.more.push("--metrics=127.0.0.1:0".to_owned());
    let mut server = Server::start(&options);
    let loads: Vec<Load> =
        (0..volumes).map(|lane| Load::new(&server, lane, scratch.file(&format!("state-{lane}")))).collect();
    thread::scope(|scope| {
        for load in &loads {
            scope.spawn(|| load.write_until_just_before_a_checkpoint(volume_mib));
        }
    });
    let written: u64 = loads.iter().map(|load| Moment::now(&load.url, load.lane).client_mib).sum();
    server.kill();

    let start = Instant::now();
    let server = Server::start(&options);
    let ready = start.elapsed();
    let mut client = Client::connect(&options.socket, "v0").expect("the server listens");
    let answer = client.call(command::READ, 0, 1 << 20, &[]).expect("the server stays");
    let first_read = start.elapsed();
    assert_eq!(answer.error, 0, "the first read");
    print_figure(&format!(
        "first read {:.2} s after the start (ready after {:.2} s), {written} MiB written, {volumes} lanes",
        first_read.as_secs_f64(),
        ready.as_secs_f64()
    ));
    for load in &loads {
        load.verify();
    }
    server.stop();
    assert!(first_read < FIRST_READ_MAX, "the first read took {first_read:?}");
}
