//! kill -9 under verified load: nothing that was answered is lost, and nothing comes back that was replaced.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use berth::bench::{self, BenchArgs, BlockRange};
use system_tests::harness::server::{Options, Server};
use system_tests::harness::{Scratch, full_tier};

#[test]
fn nothing_answered_is_lost_by_kill_9() {
    let rounds: u64 = if full_tier() { 100 } else { 10 };
    let scratch = Scratch::new("kill");
    let options = Options::new(&scratch, 256);
    let mut server = Server::start(&options);
    let args = BenchArgs {
        read: 30,
        write: 50,
        trim: 5,
        zeroes: 5,
        flush: 3,
        fua: 10,
        block: BlockRange { least: 512, most: 256 << 10 },
        connections: 2,
        duration: 24.0 * 3600.0,
        reconnect: 60.0,
        verify: true,
        destroy_data: true,
        ..BenchArgs::new(server.uri().parse().expect("a URI"))
    };
    let finish = AtomicBool::new(false);
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_until(&args, &finish));
        for round in 0..rounds {
            // A different moment each time; every second one right after the start, in the midst of recovery's wake.
            thread::sleep(Duration::from_millis(if round % 2 == 0 {
                20 + 7 * round
            } else {
                400 + 31 * (round % 10)
            }));
            if load.is_finished() {
                break;
            }
            server.kill();
            server = Server::start(&options);
        }
        finish.store(true, Ordering::Relaxed);
        load.join().expect("no panic")
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    // Kills that come before the load is back share one reconnect.
    assert!(report.reconnects >= rounds / 2, "{report}");
    assert_eq!(report.errors(), 0, "{report}");
    server.stop();
}
