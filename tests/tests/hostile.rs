//! Attacks on a live server, learned from the CVEs of other NBD servers, beside a client that works on undisturbed.
//!
//! Each attack opens its own connections, says what an honest client never would, and checks the answer. The server
//! must stay up, must not grow, and the client beside them must find every byte right.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use datapath::limits::HANDSHAKE_DEADLINE_MS;
use datapath::wire::nbd_handshake::{
    GREETING_BYTES, OPTION_REPLY_HEADER_BYTES, OptionHeader, OptionReplyHeader, client_flag,
    encode_info_query, encode_option, option, reply_type,
};
use datapath::wire::nbd_transmission::{
    HeaderStyle, ReplyHeader, RequestHeader, SIMPLE_REPLY_BYTES, command, command_flag, error_number,
};
use system_tests::harness::metrics::Page;
use system_tests::harness::server::{Options, Server};
use system_tests::harness::tools::{fio_verify, run};
use system_tests::harness::{Scratch, print_figure};

const VOLUME_MIB: u64 = 256;
const VOLUME_BYTES: u64 = VOLUME_MIB << 20;
/// A server that owes an answer longer than this has failed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// What all attacks together may add to the most memory that an honest client made the server use.
const GROWTH_KIB_MAX: u64 = 32 << 10;
/// What the server may use in all beyond its arenas and the map's cache.
const BEYOND_ARENA_KIB_MAX: u64 = 256 << 10;
const MAP_CACHE_MIB: u64 = 16;
/// Hostile clients at once: more than receive buffers, and than requests of 1 MiB that find memory.
const CROWD: u32 = 200;
/// However many of them there are, a newcomer with a short request does not wait longer.
const GREETED_WITHIN: Duration = Duration::from_secs(1);
const FLAGS: u32 = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;

type Attack = fn(&Path);

/// A client that says what it wants.
struct Attacker {
    socket: UnixStream,
}

/// How the server ended a conversation.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Closed,
    Open,
}

impl Attacker {
    fn connect(socket: &Path) -> Attacker {
        let socket = UnixStream::connect(socket).expect("the server listens");
        socket.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout");
        socket.set_write_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout");
        Attacker { socket }
    }

    /// Past the greeting, with these client flags sent.
    fn greeted(socket: &Path, flags: u32) -> Attacker {
        let mut attacker = Attacker::connect(socket);
        attacker.take(GREETING_BYTES);
        attacker.say(&flags.to_be_bytes());
        attacker
    }

    /// In transmission, with simple replies.
    fn admitted(socket: &Path) -> Attacker {
        let mut attacker = Attacker::greeted(socket, FLAGS);
        attacker.say(&go("v"));
        while attacker.option_reply().reply_type != reply_type::ACK {}
        attacker
    }

    /// The server may close at any moment, so a failure to send is no surprise here.
    fn say(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap_or_else(|error| panic!("no answer: {error}"));
        bytes
    }

    fn option_reply(&mut self) -> OptionReplyHeader {
        let bytes = self.take(OPTION_REPLY_HEADER_BYTES);
        let header = OptionReplyHeader::decode(bytes[..].try_into().expect("the length")).expect("a reply");
        assert!(header.length_bytes <= 64 << 10, "{header:?}");
        self.take(header.length_bytes as usize);
        header
    }

    fn request(&mut self, command: u16, flags: u16, offset_bytes: u64, length_bytes: u64) {
        let header = RequestHeader { flags, command, cookie: 7, offset_bytes, length_bytes };
        self.say(header.encode(HeaderStyle::Simple).as_slice());
    }

    /// The error number of the next simple reply.
    fn error(&mut self) -> u32 {
        let bytes = self.take(SIMPLE_REPLY_BYTES);
        match ReplyHeader::decode(HeaderStyle::Simple, &bytes) {
            Ok(Some((ReplyHeader::Simple { error, cookie: 7 }, _))) => error,
            other => panic!("not an answer: {other:?}"),
        }
    }

    /// Still in step: a read is answered with data.
    fn assert_in_step(&mut self) {
        self.request(command::READ, 0, 0, 512);
        assert_eq!(self.error(), 0);
        self.take(512);
    }

    /// Reads to the end of the connection, for at most `wait`.
    fn drain(&mut self, wait: Duration) -> End {
        let deadline = Instant::now() + wait;
        let mut sink = [0; 64 << 10];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return End::Open;
            }
            self.socket.set_read_timeout(Some(left)).expect("a timeout");
            match self.socket.read(&mut sink) {
                Ok(0) => return End::Closed,
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return End::Open;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return End::Closed,
            }
        }
    }

    fn assert_closed(&mut self, what: &str) {
        assert_eq!(self.drain(ANSWER_TIMEOUT), End::Closed, "{what}");
    }
}

fn go(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_info_query(&mut bytes, option::GO, name, &[]);
    bytes
}

fn option_bytes(number: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_option(&mut bytes, number, payload);
    bytes
}

/// CVE-2013-7441, CVE-2017-7539, CVE-2017-9524: leaving at every single byte of a session.
fn leave_after_every_byte(socket: &Path) {
    let mut session = FLAGS.to_be_bytes().to_vec();
    session.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    session.extend(option_bytes(option::LIST, &[]));
    session.extend(go("v"));
    let write =
        RequestHeader { flags: 0, command: command::WRITE, cookie: 1, offset_bytes: 0, length_bytes: 0 };
    session.extend(write.encode(HeaderStyle::Structured).as_slice());
    let read = RequestHeader { command: command::READ, length_bytes: 65536, ..write };
    session.extend(read.encode(HeaderStyle::Structured).as_slice());
    for len in 0..=session.len() {
        let mut attacker = Attacker::connect(socket);
        attacker.say(&session[..len]);
    }
}

/// Client flags that were never offered: the protocol asks for the connection's end.
fn unknown_client_flags(socket: &Path) {
    for flags in [4, FLAGS | 1 << 31, u32::MAX] {
        Attacker::greeted(socket, flags).assert_closed("unknown client flags");
    }
}

/// CVE-2017-15119, CVE-2022-26495: options that claim lengths up to 4 GiB, and lie about lengths inside.
fn lying_option_lengths(socket: &Path) {
    for length_bytes in [65537, 1 << 24, 1 << 31, u32::MAX] {
        let mut attacker = Attacker::greeted(socket, FLAGS);
        attacker.say(&OptionHeader { option: option::GO, length_bytes }.encode());
        attacker.assert_closed("an endless option");
    }
    for name_bytes in [1_u32, 7, 1 << 31, u32::MAX - 5, u32::MAX] {
        let mut attacker = Attacker::greeted(socket, FLAGS);
        for number in [option::INFO, option::GO] {
            attacker.say(&option_bytes(number, &[&name_bytes.to_be_bytes()[..], &[0, 0]].concat()));
            assert_eq!(attacker.option_reply().reply_type, reply_type::ERR_INVALID, "{name_bytes}");
        }
        for number in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            attacker.say(&option_bytes(option::STRUCTURED_REPLY, &[]));
            attacker.option_reply();
            attacker.say(&option_bytes(number, &[&name_bytes.to_be_bytes()[..], &[0; 4]].concat()));
            assert_eq!(attacker.option_reply().reply_type, reply_type::ERR_INVALID, "{name_bytes}");
        }
    }
}

/// CVE-2017-15118, CVE-2020-10761, CVE-2022-26496: names at the edges of buffers, in every option that takes one.
fn names_of_every_length(socket: &Path) {
    for len in [1, 63, 64, 255, 256, 257, 1024, 4095, 4096, 4097, 8000] {
        let name = "x".repeat(len);
        let mut attacker = Attacker::greeted(socket, FLAGS);
        for number in [option::INFO, option::GO] {
            let mut bytes = Vec::new();
            encode_info_query(&mut bytes, number, &name, &[]);
            attacker.say(&bytes);
            let kind = attacker.option_reply().reply_type;
            assert!(kind == reply_type::ERR_UNKNOWN || kind == reply_type::ERR_INVALID, "{len}: {kind:#x}");
        }
        attacker.say(&option_bytes(option::EXPORT_NAME, name.as_bytes()));
        attacker.assert_closed("EXPORT_NAME of an unknown export");
    }
}

/// Options with payload where none belongs, unknown ones, and TLS that is not there: refused, and in step after it.
fn options_that_are_refused(socket: &Path) {
    let mut attacker = Attacker::greeted(socket, FLAGS);
    for number in [option::LIST, option::STRUCTURED_REPLY, option::STARTTLS] {
        attacker.say(&option_bytes(number, b"x"));
        let kind = attacker.option_reply().reply_type;
        let expected = [reply_type::ERR_INVALID, reply_type::ERR_POLICY, reply_type::ERR_UNSUP];
        assert!(expected.contains(&kind), "option {number}: {kind:#x}");
    }
    for number in [0, option::PEEK_EXPORT, 12, 0x4242, u32::MAX] {
        attacker.say(&option_bytes(number, &[0x5a; 3000]));
        assert_eq!(attacker.option_reply().reply_type, reply_type::ERR_UNSUP, "option {number}");
    }
    attacker.say(&go("v"));
    while attacker.option_reply().reply_type != reply_type::ACK {}
    attacker.assert_in_step();
}

/// CVE-2017-15119 again: options without end.
fn endless_options(socket: &Path) {
    let mut attacker = Attacker::greeted(socket, FLAGS);
    for _ in 0..10_000 {
        attacker.say(&option_bytes(0x4242, &[0; 64]));
    }
    attacker.assert_closed("ten thousand options");
}

/// CVE-2005-3534, CVE-2011-0530: payloads longer than any buffer, and headers that are none.
fn lying_request_lengths(socket: &Path) {
    for length in [(32 << 20) + 1, 1 << 31, u64::from(u32::MAX)] {
        for command in [command::READ, command::WRITE] {
            let mut attacker = Attacker::admitted(socket);
            attacker.request(command, 0, 0, length);
            // The payload never comes. The server answers or closes; it must not wait with memory in its hands.
            if command == command::READ {
                // Past the end is invalid; within the volume it is a command without payload that asks for too much.
                let beyond = length > VOLUME_BYTES;
                let expected = if beyond { error_number::EINVAL } else { error_number::EOVERFLOW };
                assert_eq!(attacker.error(), expected, "{length}");
                attacker.assert_in_step();
            }
        }
    }
    let mut attacker = Attacker::admitted(socket);
    attacker.say(&[0x5a; 28]);
    attacker.assert_closed("a request without magic number");
}

/// Beyond the end, unknown commands and flags: the right error number, and in step after it.
fn requests_that_are_refused(socket: &Path) {
    let mut attacker = Attacker::admitted(socket);
    let cases = [
        (command::READ, 0, VOLUME_BYTES, 512, error_number::EINVAL),
        (command::READ, 0, VOLUME_BYTES - 512, 1024, error_number::EINVAL),
        (command::READ, 0, u64::MAX - 511, 512, error_number::EINVAL),
        (command::READ, 0, u64::MAX, 1, error_number::EINVAL),
        (command::READ, 1 << 14, 0, 512, error_number::EINVAL),
        (command::TRIM, 0, VOLUME_BYTES, 512, error_number::EINVAL),
        (command::TRIM, 0, u64::MAX - 100, 512, error_number::EINVAL),
        (command::WRITE_ZEROES, 0, VOLUME_BYTES, 512, error_number::ENOSPC),
        (command::WRITE_ZEROES, 0, u64::MAX - 100, u64::from(u32::MAX), error_number::ENOSPC),
        (command::WRITE_ZEROES, 1 << 15, 0, 512, error_number::EINVAL),
        (command::BLOCK_STATUS, 0, 0, 512, error_number::EINVAL),
        (command::RESIZE, 0, 0, 512, error_number::EINVAL),
        (0x4242, 0, 0, 512, error_number::EINVAL),
    ];
    for (command, flags, offset, length, error) in cases {
        attacker.request(command, flags, offset, length);
        assert_eq!(attacker.error(), error, "command {command} flags {flags:#x} at {offset}+{length}");
        attacker.assert_in_step();
    }
    attacker.request(command::WRITE, command_flag::FUA, VOLUME_BYTES, 512);
    attacker.say(&[0x5a; 512]);
    assert_eq!(attacker.error(), error_number::ENOSPC);
    attacker.assert_in_step();
    for command in [command::READ, command::TRIM, command::WRITE_ZEROES, command::CACHE, command::WRITE] {
        attacker.request(command, 0, 0, 0);
        // Zero length is not defined; any answer will do, as long as there is one.
        attacker.error();
        attacker.assert_in_step();
    }
}

/// CVE-2025-47711, CVE-2025-47712: block status of nearly 4 GiB.
fn huge_block_status(socket: &Path) {
    let mut attacker = Attacker::greeted(socket, FLAGS);
    attacker.say(&option_bytes(option::STRUCTURED_REPLY, &[]));
    assert_eq!(attacker.option_reply().reply_type, reply_type::ACK);
    let mut query = Vec::new();
    for text in ["v".as_bytes(), b"base:allocation"] {
        if !query.is_empty() {
            query.extend(1_u32.to_be_bytes());
        }
        query.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
        query.extend(text);
    }
    attacker.say(&option_bytes(option::SET_META_CONTEXT, &query));
    while attacker.option_reply().reply_type != reply_type::ACK {}
    attacker.say(&go("v"));
    while attacker.option_reply().reply_type != reply_type::ACK {}
    for length in [u64::from(u32::MAX), u64::from(u32::MAX) - 511, VOLUME_BYTES] {
        attacker.request(command::BLOCK_STATUS, 0, 0, length);
        let header = attacker.take(20);
        let Ok(Some((ReplyHeader::Chunk(chunk), _))) = ReplyHeader::decode(HeaderStyle::Structured, &header)
        else {
            panic!("not a chunk");
        };
        assert!(chunk.is_last() && chunk.length_bytes < 1 << 20, "{chunk:?}");
        attacker.take(usize::try_from(chunk.length_bytes).expect("short"));
    }
}

/// A client that asks for everything and reads nothing.
fn never_reading(socket: &Path) {
    let attackers: Vec<_> = (0..8)
        .map(|_| {
            let mut attacker = Attacker::admitted(socket);
            attacker.socket.set_nonblocking(true).expect("a mode");
            for _ in 0..10_000 {
                attacker.request(command::READ, 0, 0, 1 << 20);
            }
            attacker
        })
        .collect();
    // They stay while an honest client gets its turn.
    Attacker::admitted(socket).assert_in_step();
    drop(attackers);
}

/// Someone who comes while a crowd is there, and the moment of coming: is served, soon.
fn newcomer(socket: &Path) -> (Attacker, Instant) {
    let start = Instant::now();
    let mut late = Attacker::admitted(socket);
    late.assert_in_step();
    let greeted = start.elapsed();
    assert!(greeted < GREETED_WITHIN, "a newcomer was greeted and served after {greeted:?}");
    println!("newcomer served after {greeted:?}");
    (late, start)
}

/// More clients than the server has receive buffers, that ask for more than it has memory and read nothing. Newcomers
/// are greeted at once, and once the patience with the others is over, large requests get memory too.
fn crowd_that_never_reads(socket: &Path) {
    let attackers: Vec<_> = (0..CROWD)
        .map(|number| {
            let mut attacker = Attacker::admitted(socket);
            // Some hold their memory in a few long replies, the others in many short ones.
            let length_bytes = if number % 2 == 0 { 1 << 20 } else { 4096 };
            let read =
                RequestHeader { flags: 0, command: command::READ, cookie: 7, offset_bytes: 0, length_bytes };
            let requests = read.encode(HeaderStyle::Simple).as_slice().repeat(20_000);
            attacker.socket.set_nonblocking(true).expect("a mode");
            let mut rest = &requests[..];
            while let Ok(count @ 1..) = attacker.socket.write(rest) {
                rest = &rest[count..];
            }
            attacker
        })
        .collect();
    let (mut late, start) = newcomer(socket);
    late.request(command::READ, 0, 0, 1 << 20);
    assert_eq!(late.error(), 0);
    late.take(1 << 20);
    println!("newcomer has 1 MiB after {:?}", start.elapsed());
    drop(attackers);
}

/// Long writes that are begun and never finished, more than the memory for them.
fn crowd_that_never_finishes(socket: &Path) {
    let attackers: Vec<_> = (0..CROWD)
        .map(|_| {
            let mut attacker = Attacker::admitted(socket);
            attacker.request(command::WRITE, 0, VOLUME_BYTES / 2, 1 << 20);
            attacker.say(&[0; 1000]);
            attacker
        })
        .collect();
    let (mut late, start) = newcomer(socket);
    late.request(command::WRITE, 0, 0, 1 << 20);
    late.say(&vec![0; 1 << 20]);
    assert_eq!(late.error(), 0);
    println!("newcomer's 1 MiB written after {:?}", start.elapsed());
    drop(attackers);
}

/// A write whose payload stops in the middle, with the connection left open.
fn stalled_payloads(socket: &Path) {
    let attackers: Vec<_> = (0..32)
        .map(|_| {
            let mut attacker = Attacker::admitted(socket);
            attacker.request(command::WRITE, 0, VOLUME_BYTES / 2, 1 << 20);
            attacker.say(&[0; 1000]);
            attacker
        })
        .collect();
    Attacker::admitted(socket).assert_in_step();
    drop(attackers);
}

/// Noise, before and after the handshake.
fn noise(socket: &Path) {
    let mut state = 1_u64;
    for round in 0..200 {
        let mut attacker =
            if round % 2 == 0 { Attacker::greeted(socket, FLAGS) } else { Attacker::admitted(socket) };
        let bytes: Vec<u8> = (0..1 + round * 37 % 4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        attacker.say(&bytes);
        // Reads nothing: the next one comes at once.
    }
}

/// CVE-2015-0847: connections that come and go as fast as they can.
fn connection_storm(socket: &Path) {
    for _ in 0..3000 {
        drop(Attacker::connect(socket));
    }
}

/// CVE-2024-7409: clients that never finish their handshake are put out, and others get in meanwhile.
fn half_open(socket: &Path) {
    let mut attackers: Vec<_> = (0..50).map(|_| Attacker::connect(socket)).collect();
    for attacker in attackers.iter_mut().step_by(2) {
        attacker.say(&FLAGS.to_be_bytes()[..3]);
    }
    let wait = Duration::from_millis(HANDSHAKE_DEADLINE_MS) + Duration::from_secs(5);
    let start = Instant::now();
    for attacker in &mut attackers {
        let left = wait.saturating_sub(start.elapsed()).max(Duration::from_millis(100));
        assert_eq!(attacker.drain(left), End::Closed, "a client that does not finish its handshake");
    }
}

#[test]
#[expect(clippy::cast_precision_loss, reason = "KiB of memory are far below 2^52")]
fn attacks_cost_the_attacker_and_nobody_else() {
    let scratch = Scratch::new("hostile");
    let mut options = Options::new(&scratch, VOLUME_MIB);
    options.volumes.push(("w".to_owned(), VOLUME_MIB));
    options.pool_mib = 4 * VOLUME_MIB;
    options.more.push(format!("--map-cache={MAP_CACHE_MIB}M"));
    options.more.push("--metrics=127.0.0.1:0".to_owned());
    let mut server = Server::start(&options);
    let honest = server.uris()[1].clone();
    run(&mut fio_verify(&honest, VOLUME_MIB));
    let usual_kib = server.peak_memory_kib();

    let attacks: [(&str, Attack); 17] = [
        ("leave after every byte", leave_after_every_byte),
        ("unknown client flags", unknown_client_flags),
        ("lying option lengths", lying_option_lengths),
        ("names of every length", names_of_every_length),
        ("options that are refused", options_that_are_refused),
        ("endless options", endless_options),
        ("lying request lengths", lying_request_lengths),
        ("requests that are refused", requests_that_are_refused),
        ("huge block status", huge_block_status),
        ("never reading", never_reading),
        ("a crowd that never reads", crowd_that_never_reads),
        ("stalled payloads", stalled_payloads),
        ("a crowd that never finishes", crowd_that_never_finishes),
        ("noise", noise),
        ("connection storm", connection_storm),
        ("half-open handshakes", half_open),
        ("noise again", noise),
    ];
    let attacked = AtomicBool::new(false);
    thread::scope(|scope| {
        let beside = scope.spawn(|| {
            // As often as needed, so that every attack has it beside.
            while !attacked.load(Ordering::Relaxed) {
                run(&mut fio_verify(&honest, VOLUME_MIB / 4));
            }
        });
        let attackers = scope.spawn(|| {
            let socket: PathBuf = options.socket.clone();
            for (name, attack) in attacks {
                let start = Instant::now();
                attack(&socket);
                println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
            }
        });
        let ended = attackers.join();
        attacked.store(true, Ordering::Relaxed);
        beside.join().expect("the honest client found every byte right");
        ended.expect("every attack was answered as it must be");
    });
    assert!(server.is_running(), "the server fell");
    let attacked_kib = server.peak_memory_kib();
    let arena_kib = Page::fetch(server.metrics_url()).sum("berth_memory_arena_bytes", "") / 1024.0;
    let allowed_kib = arena_kib + ((MAP_CACHE_MIB << 10) + BEYOND_ARENA_KIB_MAX) as f64;
    print_figure(&format!(
        "peak memory {attacked_kib} KiB after all attacks, {usual_kib} KiB with an honest client; allowed {allowed_kib} \
         KiB: arenas {arena_kib}, map cache {}, and {BEYOND_ARENA_KIB_MAX}",
        MAP_CACHE_MIB << 10
    ));
    assert!(attacked_kib as f64 <= allowed_kib, "{attacked_kib} KiB are more than {allowed_kib} KiB");
    assert!(attacked_kib <= usual_kib + GROWTH_KIB_MAX, "{usual_kib} KiB grew to {attacked_kib} KiB");
    server.stop();
}
