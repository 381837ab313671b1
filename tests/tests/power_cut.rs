//! Losses of power under verified load: nothing that was flushed, or written with FUA, is lost.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::thread;
use std::time::Duration;

use berth::bench::{self, BenchArgs, BlockRange, Control, Loss};
use system_tests::harness::server::{Options, Server};
use system_tests::harness::{Scratch, print_figure, wait_until_begun};
use system_tests::power_cut_fs::{Cut, PowerCutFs};

const ROUNDS: u64 = 30;

#[test]
fn nothing_flushed_is_lost_by_a_loss_of_power() {
    let scratch = Scratch::new("power-cut");
    let disk = PowerCutFs::mount(&scratch.file("mount"), 1);
    let options = Options { pool: disk.file().to_path_buf(), ..Options::new(&scratch, 64) };
    let mut server = Server::start(&options);
    let args = BenchArgs {
        read: 20,
        write: 55,
        trim: 5,
        zeroes: 5,
        flush: 5,
        fua: 10,
        block: BlockRange { least: 512, most: 64 << 10 },
        duration: 24.0 * 3600.0,
        reconnect: 60.0,
        verify: true,
        after_loss: Loss::PowerCut,
        destroy_data: true,
        ..BenchArgs::new(server.uri().parse().expect("a URI"))
    };
    let control = Control::default();
    let (report, at_stake) = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        let mut at_stake = 0;
        wait_until_begun(&control, || load.is_finished());
        for round in 0..ROUNDS {
            while control.reconnects() < round && !load.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_millis(30 + 97 * (round % 7)));
            if load.is_finished() {
                break;
            }
            server.kill();
            let how = Cut::ALL[usize::try_from(round).expect("small") % Cut::ALL.len()];
            at_stake += disk.cut(how);
            server = Server::start(&options);
        }
        control.finish();
        (load.join().expect("no panic"), at_stake)
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    println!("{report}{at_stake} device writes were at stake");
    assert!(report.reconnects >= ROUNDS, "{report}");
    assert!(at_stake > 0, "no write was ever at stake: the cuts tested nothing");
    server.stop();
    print_figure(&format!("{ROUNDS} power cuts, {at_stake} device writes at stake, nothing flushed lost"));
}
