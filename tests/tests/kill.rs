//! kill -9 under verified load: nothing that was answered is lost, and nothing comes back that was replaced.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::thread;
use std::time::Duration;

use berth::bench::{self, BenchArgs, BlockRange, Control};
use system_tests::harness::server::{Options, Server};
use system_tests::harness::{Scratch, full_tier, print_figure, wait_until_begun};

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
    let control = Control::default();
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        let mut at_last_kill = 0;
        wait_until_begun(&control, || load.is_finished());
        for round in 0..rounds {
            // Even rounds kill while the load still looks whether all is there, odd ones under full load; each at
            // another moment.
            let under_load = round % 2 == 1;
            while under_load && control.reconnects() == at_last_kill && !load.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
            let spread = 7 * (round % 20);
            thread::sleep(Duration::from_millis(if under_load { 100 + 2 * spread } else { 20 + spread }));
            if load.is_finished() {
                break;
            }
            at_last_kill = control.reconnects();
            server.kill();
            server = Server::start(&options);
        }
        control.finish();
        load.join().expect("no panic")
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    // A kill that comes before the load is back shares its reconnect with the next one.
    assert!(report.reconnects >= rounds / 4, "{report}");
    assert_eq!(report.errors(), 0, "{report}");
    server.stop();
    let requests: u64 = report.operations.iter().map(|operation| operation.count).sum();
    print_figure(&format!("{rounds} kills, {requests} requests, nothing answered lost"));
}
