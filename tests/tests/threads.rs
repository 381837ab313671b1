//! `berth serve` with several threads: every connection comes to the thread that runs its volume, and a pool is opened by
//! any number of threads.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use berth::bench::{self, BenchArgs, BlockRange, Control};
use datapath::limits::CONNECTIONS_MAX;
use datapath::wire::nbd_handshake::{
    GREETING_BYTES, OPTION_REPLY_HEADER_BYTES, OptionReplyHeader, client_flag, encode_info_query, option,
    reply_type,
};
use datapath::wire::nbd_transmission::{
    HeaderStyle, ReplyHeader, RequestHeader, SIMPLE_REPLY_BYTES, command,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use system_tests::harness::client::Client;
use system_tests::harness::metrics::Page;
use system_tests::harness::server::{Options, Server};
use system_tests::harness::tools::{fio_verify, run, tool};
use system_tests::harness::{Scratch, wait_until_begun};

/// One volume for each lane of a new pool.
const VOLUMES: usize = 4;
const VOLUME_MIB: u64 = 64;

fn options(scratch: &Scratch, threads: u32) -> Options {
    let mut options = Options::new(scratch, VOLUME_MIB);
    options.volumes = (0..VOLUMES).map(|number| (format!("v{number}"), VOLUME_MIB)).collect();
    options.pool_mib = 1024;
    options.threads = threads;
    options.more.push("--metrics=127.0.0.1:0".to_owned());
    options
}

/// Requests that were answered by this thread.
fn requests_of(server: &Server, shard: u32) -> f64 {
    Page::fetch(server.metrics_url()).sum("berth_requests_total", &format!("shard=\"{shard}\""))
}

#[test]
fn several_programs_use_all_volumes_over_four_connections_each() {
    let scratch = Scratch::new("threads");
    let server = Server::start(&options(&scratch, 2));
    let image = scratch.image("image", VOLUME_MIB);
    let connections = ["--connections=4", "--requests=32", "--flush"];
    thread::scope(|scope| {
        for (number, uri) in server.uris().iter().enumerate() {
            let (image, copy) = (&image, scratch.file(&format!("copy-{number}")));
            scope.spawn(move || {
                run(fio_verify(uri, VOLUME_MIB / 4).args(["--numjobs=4", "--offset_increment=16m"]));
                run(tool("nbdcopy").args(connections).arg(image).arg(uri));
                run(tool("nbdcopy").args(connections).arg(uri).arg(&copy));
                run(tool("cmp").arg(image).arg(&copy));
            });
        }
    });
    let listed = run(tool("nbdinfo").args(["--list", server.uri()]));
    (0..VOLUMES).for_each(|number| assert!(listed.contains(&format!("export=\"v{number}\"")), "{listed}"));
    let requests = [requests_of(&server, 0), requests_of(&server, 1)];
    assert!(requests.iter().all(|requests| *requests > 0.0), "one thread did all: {requests:?}");
    server.stop();
}

#[test]
fn nothing_answered_is_lost_by_kill_9_and_another_number_of_threads() {
    let scratch = Scratch::new("threads-kill");
    let mut options = options(&scratch, 2);
    let mut server = Server::start(&options);
    let args = |uri: &String| BenchArgs {
        read: 30,
        write: 50,
        trim: 5,
        zeroes: 5,
        flush: 3,
        fua: 10,
        block: BlockRange { least: 512, most: 256 << 10 },
        connections: 4,
        duration: 24.0 * 3600.0,
        reconnect: 60.0,
        verify: true,
        destroy_data: true,
        ..BenchArgs::new(uri.parse().expect("a URI"))
    };
    let args: Vec<BenchArgs> = server.uris().iter().map(args).collect();
    let controls: Vec<Control> = args.iter().map(|_| Control::default()).collect();
    let reports = thread::scope(|scope| {
        let loads: Vec<_> = args
            .iter()
            .zip(&controls)
            .map(|(args, control)| scope.spawn(move || bench::run_with(args, control)))
            .collect();
        for (control, load) in controls.iter().zip(&loads) {
            wait_until_begun(control, || load.is_finished());
        }
        for threads in [3, 1, 2, 1, 4] {
            let before: Vec<u64> = controls.iter().map(Control::reconnects).collect();
            // Not a wait for anything: the moment of the kill, in the midst of the load.
            thread::sleep(Duration::from_millis(300));
            server.kill();
            options.threads = threads;
            server = Server::start(&options);
            // Each load has found its volume again, or has ended with an error.
            let is_back =
                |number: usize| controls[number].reconnects() > before[number] || loads[number].is_finished();
            while !(0..VOLUMES).all(is_back) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        controls.iter().for_each(Control::finish);
        loads.into_iter().map(|load| load.join().expect("no panic")).collect::<Vec<_>>()
    });
    for report in reports {
        let report = report.unwrap_or_else(|error| panic!("{error}"));
        assert!(report.reconnects >= 5 && report.errors() == 0, "{report}");
    }
    server.stop();
}

/// Room for the sockets of this test, and of the server that it starts.
fn raise_file_limit() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, most.min(8192), most).expect("up to the hard limit");
}

#[test]
fn connections_are_counted_over_all_threads() {
    raise_file_limit();
    let scratch = Scratch::new("threads-limit");
    let options = options(&scratch, 2);
    let server = Server::start(&options);
    let connect = |number: u32| Client::connect(&options.socket, &format!("v{}", number as usize % VOLUMES));
    let mut clients: Vec<Client> =
        (0..CONNECTIONS_MAX).map(|number| connect(number).expect("a place")).collect();
    assert!(connect(1).is_err(), "there are more than {CONNECTIONS_MAX} connections");
    // One of each thread: their places are for whoever comes.
    for number in [0, 1] {
        drop(clients.swap_remove(number));
        clients.push(connect(3).expect("a place has come free"));
    }
    assert!(connect(0).is_err(), "there are more than {CONNECTIONS_MAX} connections");
    drop(clients);
    connect(2).expect("all places have come free");
    server.stop();
}

/// Writes of a client that does not wait for the answer to its choice: sizes below and above what is received at once.
const LENGTHS: [u32; 6] = [4096, 512, 64 << 10, 300 << 10, 4096, 1000];

fn content(seed: u32, length: u32) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13).to_le_bytes()[0]).collect()
}

/// Chooses a volume and writes to it in one breath, cut into pieces of `cut` bytes.
fn choose_and_write(socket: &Path, volume: &str, seed: u32, cut: usize) {
    let mut stream = UnixStream::connect(socket).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let mut said = (client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes().to_vec();
    encode_info_query(&mut said, option::INFO, volume, &[]);
    encode_info_query(&mut said, option::GO, volume, &[]);
    for (number, length) in (0_u32..).zip(LENGTHS) {
        let header = RequestHeader {
            flags: 0,
            command: command::WRITE,
            cookie: number.into(),
            offset_bytes: u64::from(number) << 20,
            length_bytes: length.into(),
        };
        said.extend_from_slice(header.encode(HeaderStyle::Simple).as_slice());
        said.extend(content(seed + number, length));
    }
    let mut sender = stream.try_clone().expect("another handle");
    thread::scope(|scope| {
        scope.spawn(move || {
            said.chunks(cut).for_each(|part| sender.write_all(part).expect("the server reads"))
        });
        stream.read_exact(&mut [0; GREETING_BYTES]).expect("a greeting");
        let mut acknowledged = 0;
        while acknowledged < 2 {
            let mut bytes = [0; OPTION_REPLY_HEADER_BYTES];
            stream.read_exact(&mut bytes).expect("a reply");
            let header = OptionReplyHeader::decode(&bytes).expect("a reply to an option");
            stream.read_exact(&mut vec![0; header.length_bytes as usize]).expect("the whole reply");
            assert!(matches!(header.reply_type, reply_type::ACK | reply_type::INFO), "{header:?}");
            acknowledged += u32::from(header.reply_type == reply_type::ACK);
        }
        let mut answered = [false; LENGTHS.len()];
        while answered.contains(&false) {
            let mut bytes = [0; SIMPLE_REPLY_BYTES];
            stream.read_exact(&mut bytes).expect("an answer");
            let Ok(Some((ReplyHeader::Simple { error: 0, cookie }, _))) =
                ReplyHeader::decode(HeaderStyle::Simple, &bytes)
            else {
                panic!("not a success: {bytes:?}");
            };
            let answered = &mut answered[usize::try_from(cookie).expect("one of ours")];
            assert!(!std::mem::replace(answered, true), "cookie {cookie} is answered twice");
        }
    });
}

#[test]
fn requests_behind_the_choice_of_a_volume_move_with_the_connection() {
    let scratch = Scratch::new("threads-pipelined");
    for threads in [3, 2] {
        let options = options(&scratch, threads);
        let server = Server::start(&options);
        for (round, cut) in (0_u32..).zip([usize::MAX, 1 << 17, 4097, 333]) {
            thread::scope(|scope| {
                for number in 0..VOLUMES {
                    let socket = &options.socket;
                    scope.spawn(move || {
                        let volume = format!("v{number}");
                        let seed = 1000 * round + threads;
                        choose_and_write(socket, &volume, seed, cut);
                        let mut client = Client::connect(socket, &volume).expect("the server listens");
                        for (number, length) in (0_u32..).zip(LENGTHS) {
                            let offset = u64::from(number) << 20;
                            let read =
                                client.call(command::READ, offset, length.into(), &[]).expect("an answer");
                            assert_eq!(read.error, 0);
                            assert!(
                                read.data == content(seed + number, length),
                                "write {number} of {volume}"
                            );
                        }
                    });
                }
            });
        }
        assert!(requests_of(&server, threads - 1) > 0.0, "the last thread had nothing to do");
        server.stop();
    }
}
