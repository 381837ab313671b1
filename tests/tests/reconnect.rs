//! A client that goes amid its requests and comes again: what it had asked before it went is never done over what it was
//! answered since.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use datapath::wire::nbd_transmission::command;
use system_tests::harness::Scratch;
use system_tests::harness::client::Client;
use system_tests::harness::metrics::Page;
use system_tests::harness::server::{Options, Server};
use system_tests::to_usize;

const MIB: u64 = 1 << 20;
const VOLUME_MIB: u64 = 256;
const ROUNDS: u8 = 30;
/// Those of its requests that are still in the socket when the client goes are among the last.
const REQUESTS: u64 = 96;

/// Asks for much, hears of nothing, and is gone.
fn ask_and_go(socket: &Path, filling: u8) {
    let mut client = Client::connect(socket, "v").expect("the server listens");
    let payload = vec![filling; to_usize(MIB)];
    for number in 0..REQUESTS {
        let asked = match number % 4 {
            0 => client.ask(command::TRIM, number * MIB, 2 * MIB, &[]),
            1 => client.ask(command::WRITE_ZEROES, number * MIB, 32 * MIB, &[]),
            // Cut blocks are locked for themselves.
            2 => client.ask(command::WRITE, number * MIB + 512, MIB - 1024, &payload[1024..]),
            _ => client.ask(command::WRITE, number * MIB, MIB, &payload),
        };
        asked.expect("the server reads on");
    }
}

/// Waits until nothing more becomes of what the other one had asked: only one connection is left, and nothing is under way.
fn wait_for_quiet(server: &Server) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let page = Page::fetch(server.metrics_url());
        let [connections, requests] =
            ["berth_connections", "berth_requests_under_way"].map(|name| page.sum(name, ""));
        if connections <= 1.0 && requests == 0.0 {
            return;
        }
        assert!(Instant::now() < deadline, "{connections} connections, {requests} requests");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_was_asked_before_is_not_done_over_what_is_answered_later() {
    let scratch = Scratch::new("reconnect");
    let mut options = Options::new(&scratch, VOLUME_MIB);
    options.more.push("--metrics=127.0.0.1:0".to_owned());
    let server = Server::start(&options);
    for round in 0..ROUNDS {
        let (old, new) = (2 * round + 1, 2 * round + 2);
        ask_and_go(&options.socket, old);
        let mut client = Client::connect(&options.socket, "v").expect("the server listens");
        let block = vec![new; 4096];
        let offsets = (0..REQUESTS).map(|number| number * MIB + u64::from(round) * 4096);
        let mut write = |offset| client.call(command::WRITE, offset, 4096, &block).expect("an answer");
        // Those last that the other one had asked for first.
        offsets.clone().rev().for_each(|offset| assert_eq!(write(offset).error, 0));
        wait_for_quiet(&server);
        for offset in offsets {
            let answer = client.call(command::READ, offset, 4096, &[]).expect("an answer");
            let seen = answer.data.first().copied();
            assert!(answer.data == block, "round {round}, byte {offset}: {seen:?} in place of {new}");
        }
    }
    server.stop();
}
