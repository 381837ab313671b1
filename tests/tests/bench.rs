//! The verifying load generator against servers that are known to be right, and against ones that are not.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{self, BenchArgs, BenchError, BlockRange, Control, Kind, Replies};
use system_tests::harness::{Scratch, tools};

fn nbdkit(socket: &Path, arguments: &[&str]) -> Child {
    let _ = std::fs::remove_file(socket);
    let mut command = tools::tool("nbdkit");
    command.args(["-f", "-U"]).arg(socket).args(arguments);
    let child = command.stdin(Stdio::null()).spawn().expect("nbdkit starts");
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "nbdkit does not listen");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

/// `timeout` and the program under it.
fn kill(child: &mut Child, socket: &Path) {
    // nbdkit 1.32 can fall over an assertion when a client leaves in the middle of a reply.
    let script = format!("for p in $(pgrep -P {}); do kill -9 $p; done", child.id());
    tools::run(std::process::Command::new("sh").args(["-c", &script]));
    child.wait().expect("our child");
    let _ = std::fs::remove_file(socket);
}

fn mixed(socket: &Path, seconds: f64) -> BenchArgs {
    let uri = format!("nbd+unix:///v?socket={}", socket.display()).parse().expect("a URI");
    BenchArgs {
        read: 40,
        write: 40,
        trim: 4,
        zeroes: 4,
        flush: 4,
        fua: 10,
        block: BlockRange { least: 512, most: 256 << 10 },
        duration: seconds,
        connections: 2,
        verify: true,
        destroy_data: true,
        ..BenchArgs::new(uri)
    }
}

#[test]
fn a_right_server_passes_with_every_kind_of_reply_and_load() {
    let scratch = Scratch::new("bench-right");
    let socket = scratch.socket("nbd");
    let file = scratch.file("image");
    for (replies, rate) in [(Replies::Simple, 0.0), (Replies::Structured, 2000.0), (Replies::Extended, 0.0)] {
        std::fs::write(&file, []).expect("an image");
        tools::run(std::process::Command::new("truncate").args(["-s", "64M"]).arg(&file));
        let mut server = nbdkit(&socket, &["--filter=multi-conn", "memory", "64M"]);
        let args = BenchArgs { replies, rate, ..mixed(&socket, 2.0) };
        let report = bench::run(&args).unwrap_or_else(|error| panic!("{replies:?}: {error}"));
        println!("{report}");
        for kind in Kind::ALL {
            assert!(
                report.operation(kind).is_some_and(|operation| operation.count > 10),
                "{kind:?}\n{report}"
            );
        }
        assert_eq!(report.errors(), 0);
        assert!(report.sectors_verified.is_some_and(|sectors| sectors >= (64 << 20) / 512));
        if rate > 0.0 {
            let iops: f64 = report.operations.iter().map(|operation| operation.iops).sum();
            assert!((0.9 * rate..1.1 * rate).contains(&iops), "{iops} instead of {rate}");
        }
        kill(&mut server, &socket);
    }
}

#[test]
fn a_server_that_forgets_is_found_out() {
    let scratch = Scratch::new("bench-forgets");
    let socket = scratch.socket("nbd");
    let mut server = nbdkit(&socket, &["memory", "64M"]);
    let args = BenchArgs { reconnect: 20.0, ..mixed(&socket, 60.0) };
    let control = Control::default();
    let found = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        thread::sleep(Duration::from_millis(500));
        kill(&mut server, &socket);
        // The new one starts from zeroes.
        let mut server = nbdkit(&socket, &["memory", "64M"]);
        let found = load.join().expect("no panic");
        kill(&mut server, &socket);
        found
    });
    assert!(matches!(found, Err(BenchError::Mismatch { .. })), "{found:?}");
}

/// One request at a time: reads of a file may see half of a sector that is being written by somebody else.
fn file_server(socket: &Path, file: &Path) -> Child {
    let file = file.to_str().expect("UTF-8");
    nbdkit(socket, &["--filter=noparallel", "file", file, "serialize=all-requests"])
}

#[test]
fn a_server_that_keeps_a_file_survives_being_killed() {
    let scratch = Scratch::new("bench-kill");
    let socket = scratch.socket("nbd");
    let file = scratch.file("image");
    std::fs::File::create(&file).and_then(|image| image.set_len(64 << 20)).expect("an image");
    let start = || file_server(&socket, &file);
    let mut server = start();
    let args = BenchArgs { reconnect: 20.0, ..mixed(&socket, 300.0) };
    let control = Control::default();
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        for round in 0..5 {
            thread::sleep(Duration::from_millis(150 + 70 * round));
            kill(&mut server, &socket);
            server = start();
        }
        control.finish();
        load.join().expect("no panic")
    });
    kill(&mut server, &socket);
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    assert!(report.reconnects >= 1, "{report}");
}

#[test]
fn the_state_tells_a_later_run_what_must_be_there() {
    let scratch = Scratch::new("bench-state");
    let socket = scratch.socket("nbd");
    let mut server = nbdkit(&socket, &["memory", "64M"]);
    let args = BenchArgs { state: Some(scratch.file("state")), ..mixed(&socket, 0.5) };
    for _ in 0..2 {
        bench::run(&args).unwrap_or_else(|error| panic!("{error}"));
    }
    kill(&mut server, &socket);
    let mut server = nbdkit(&socket, &["memory", "64M"]);
    let found = bench::run(&args);
    kill(&mut server, &socket);
    assert!(matches!(found, Err(BenchError::Mismatch { .. })), "{found:?}");
}

/// Stops nbdkit under its `timeout`.
fn freeze(child: &Child) {
    let script = format!("for p in $(pgrep -P {}); do kill -STOP $p; done", child.id());
    tools::run(std::process::Command::new("sh").args(["-c", &script]));
}

#[test]
fn a_server_that_falls_silent_is_left_for_another_one() {
    let scratch = Scratch::new("bench-silent");
    let (socket, other) = (scratch.socket("nbd"), scratch.socket("other"));
    let file = scratch.file("image");
    std::fs::File::create(&file).and_then(|image| image.set_len(64 << 20)).expect("an image");
    let start = |socket| file_server(socket, &file);
    let (mut silent, mut living) = (start(&socket), start(&other));
    let failover = vec![format!("nbd+unix:///v?socket={}", other.display()).parse().expect("a URI")];
    // One connection, so that nothing of the silent server's can be on its way to the file when the other one is asked.
    let args =
        BenchArgs { reconnect: 20.0, failover, answer_timeout: 1.0, connections: 1, ..mixed(&socket, 300.0) };
    let control = Control::default();
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run_with(&args, &control));
        thread::sleep(Duration::from_millis(500));
        freeze(&silent);
        let deadline = Instant::now() + Duration::from_secs(20);
        while control.reconnects() == 0 && !load.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        // It executes nothing more.
        kill(&mut silent, &socket);
        control.finish();
        load.join().expect("no panic")
    });
    kill(&mut living, &other);
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert!(report.reconnects >= 1, "{report}");
}

#[test]
fn without_another_one_a_silent_server_ends_the_run() {
    let scratch = Scratch::new("bench-stuck");
    let socket = scratch.socket("nbd");
    let mut server = nbdkit(&socket, &["memory", "64M"]);
    let args = BenchArgs { reconnect: 20.0, answer_timeout: 1.0, connections: 1, ..mixed(&socket, 300.0) };
    let found = thread::scope(|scope| {
        let load = scope.spawn(|| bench::run(&args));
        thread::sleep(Duration::from_millis(500));
        freeze(&server);
        load.join().expect("no panic")
    });
    kill(&mut server, &socket);
    let error = found.expect_err("a server that does not answer").to_string();
    assert!(error.contains("a request was not answered within 1 s"), "{error}");
}
