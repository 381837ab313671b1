//! The process around the volumes: how it stops, and what it tells.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use berth::bench::{self, BenchArgs};
use datapath::wire::nbd_handshake::{GREETING_BYTES, client_flag, encode_info_query, option};
use datapath::wire::nbd_transmission::{HeaderStyle, RequestHeader, command};
use system_tests::harness::Scratch;
use system_tests::harness::metrics::Page;
use system_tests::harness::server::{Options, Server};
use system_tests::harness::tools::{run, tool};

/// A stop that takes longer is taken for a failure by most supervisors.
const STOP_MAX: Duration = Duration::from_secs(10);

/// A client in transmission, which asks and does not read.
fn silent_client(server_socket: &std::path::Path) -> UnixStream {
    let mut socket = UnixStream::connect(server_socket).expect("the server listens");
    socket.read_exact(&mut [0; GREETING_BYTES]).expect("a greeting");
    let mut hello = (client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes().to_vec();
    encode_info_query(&mut hello, option::GO, "v", &[]);
    socket.write_all(&hello).expect("the server reads");
    // The first reply of GO, whatever it says, comes after the volume was chosen.
    socket.read_exact(&mut [0; 20]).expect("a reply");
    socket
}

#[test]
fn sigterm_drains_with_clients_idle_halfway_and_at_work() {
    let scratch = Scratch::new("drain");
    let options = Options::new(&scratch, 64);
    let mut server = Server::start(&options);
    let _idle = silent_client(&options.socket);
    let _halfway = UnixStream::connect(&options.socket).expect("the server listens");
    let args = BenchArgs {
        read: 30,
        write: 70,
        duration: 60.0,
        destroy_data: true,
        ..BenchArgs::new(server.uri().parse().expect("a URI"))
    };
    thread::scope(|scope| {
        let load = scope.spawn(|| bench::run(&args));
        // The first metrics would do as well: the load is at work once blocks were written.
        while server.cpu_seconds() < 0.3 && !load.is_finished() {
            thread::yield_now();
        }
        server.terminate();
        let status = server.wait_at_most(STOP_MAX).expect("the server stops by itself");
        assert!(status.success(), "{status}");
        load.join().expect("no panic").expect_err("the load was cut off");
    });
    assert!(!options.socket.exists(), "the socket is removed");
    Server::start(&options).stop();
}

#[test]
fn sigterm_ends_though_a_client_never_reads() {
    let scratch = Scratch::new("drain-deaf");
    let options = Options::new(&scratch, 64);
    let mut server = Server::start(&options);
    run(tool("qemu-io").args(["-f", "raw", "-c", "write -P 7 0 32M", server.uri()]));
    let mut deaf = silent_client(&options.socket);
    for cookie in 0..64 {
        let read = RequestHeader {
            flags: 0,
            command: command::READ,
            cookie,
            offset_bytes: 0,
            length_bytes: 1 << 20,
        };
        deaf.write_all(read.encode(HeaderStyle::Simple).as_slice()).expect("the server reads");
    }
    server.terminate();
    let status = server.wait_at_most(STOP_MAX).expect("the server stops by itself");
    assert!(status.success(), "{status}");
    let server = Server::start(&options);
    run(tool("qemu-io").args(["-f", "raw", "-c", "read -P 7 0 32M", server.uri()]));
    server.stop();
}

#[test]
fn a_second_sigterm_ends_at_once() {
    let scratch = Scratch::new("drain-twice");
    let options = Options::new(&scratch, 64);
    let mut server = Server::start(&options);
    let mut stalled = silent_client(&options.socket);
    // A write whose payload never comes keeps the drain waiting.
    let write = RequestHeader {
        flags: 0,
        command: command::WRITE,
        cookie: 1,
        offset_bytes: 0,
        length_bytes: 1 << 20,
    };
    stalled.write_all(write.encode(HeaderStyle::Simple).as_slice()).expect("the server reads");
    stalled.write_all(&[1; 100]).expect("the server reads");
    server.terminate();
    assert_eq!(server.wait_at_most(Duration::from_millis(500)), None, "the drain waits for the payload");
    server.terminate();
    assert!(server.wait_at_most(Duration::from_secs(2)).is_some(), "the second signal does not wait");
}

#[test]
fn the_metrics_tell_what_clients_did() {
    let scratch = Scratch::new("metrics");
    let mut options = Options::new(&scratch, 64);
    options.more.push("--metrics=127.0.0.1:0".to_owned());
    let server = Server::start(&options);
    let before = Page::fetch(server.metrics_url());
    for (name, part) in [
        ("berth_requests_total", ""),
        ("berth_request_bytes_total", ""),
        ("berth_client_blocks_written_total", ""),
        ("berth_rejections_total", ""),
        ("berth_lane_failed", ""),
    ] {
        assert!(before.sum(name, part).abs() < 0.5, "{name}");
    }
    run(tool("qemu-io")
        .args(["-f", "raw", "-c", "write 0 8M", "-c", "read 0 4M", "-c", "discard 0 1M"])
        .args(["-c", "flush", server.uri()]));
    let idle = silent_client(&options.socket);
    let mut wrong = silent_client(&options.socket);
    let read = RequestHeader {
        flags: 0,
        command: command::READ,
        cookie: 1,
        offset_bytes: 1 << 40,
        length_bytes: 512,
    };
    wrong.write_all(read.encode(HeaderStyle::Simple).as_slice()).expect("the server reads");
    // The rest of GO's answer and the refusal: once they are here, it was counted.
    let mut answer = Vec::new();
    while !answer.ends_with(&1_u64.to_be_bytes()) {
        let mut byte = [0];
        wrong.read_exact(&mut byte).expect("an answer");
        answer.push(byte[0]);
    }
    let after = Page::fetch(server.metrics_url());
    let least = |name: &str, part: &str, bound: f64| {
        let found = after.sum(name, part);
        assert!(found >= bound, "{name} {part}: {found}");
    };
    least("berth_requests_total", "operation=\"write\"", 1.0);
    least("berth_request_bytes_total", "operation=\"write\"", 8_388_608.0);
    least("berth_request_bytes_total", "operation=\"read\"", 4_194_304.0);
    least("berth_requests_total", "operation=\"trim\"", 1.0);
    least("berth_requests_total", "operation=\"flush\"", 1.0);
    least("berth_client_blocks_written_total", "", 2048.0);
    least("berth_device_blocks_written_total", "kind=\"log\"", 2048.0);
    least("berth_device_blocks_written_total", "kind=\"map\"", 1.0);
    least("berth_write_amplification", "", 1.0);
    least("berth_checkpoints_total", "", 1.0);
    least("berth_device_syncs_total", "", 1.0);
    least("berth_live_blocks", "", 1536.0);
    least("berth_segments_free", "", 1.0);
    least("berth_map_leaves", "", 4.0);
    least("berth_memory_pages_free", "", 1.0);
    least("berth_connections", "", 2.0);
    least("berth_connections_accepted_total", "", 3.0);
    least("berth_rejections_total", "reason=\"range\"", 1.0);
    let counted = after.sum("berth_request_duration_seconds_count", "operation=\"write\"");
    let bucket =
        after.sum("berth_request_duration_seconds_bucket", "le=\"+Inf\",shard=\"0\",operation=\"write\"");
    let requests = after.sum("berth_requests_total", "operation=\"write\"");
    assert!(
        (counted - bucket).abs() < 0.5 && (counted - requests).abs() < 0.5,
        "{counted} {bucket} {requests}"
    );
    drop(idle);
    server.stop();
}
