//! The reactor against the real kernel: sockets, with the echo engine as the counterpart. Every test runs on
//! what the kernel has and on what older ones have.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;

use datapath::reactor::echo::{self, EchoConfig, EchoEngine, EchoReport, READ, WRITE, request};
use datapath::reactor::features::Features;
use datapath::reactor::mailbox::{Mailbox, Message, mailbox};
use datapath::reactor::{Reactor, ReactorConfig, ReactorError, Snapshot};

/// What the kernels of these releases have, and the first thing that small machines lack.
const MASKS: [&str; 5] = ["", "6.1", "5.15", "registered-buffers", "5.15,registered-files"];

/// A reactor with an echo engine on its own thread.
struct Server {
    mailbox: Mailbox<EchoReport>,
    thread: Option<JoinHandle<Result<EchoEngine, ReactorError>>>,
}

impl Server {
    fn start(listener: OwnedFd, mask: &str, echo: EchoConfig) -> Server {
        let (mailbox, inbox) = mailbox().expect("an eventfd");
        let config = ReactorConfig {
            listeners: vec![Arc::new(listener)],
            connections_max: echo.connections,
            features: Features::allowed_by(mask).expect("a mask"),
            ..ReactorConfig::default()
        };
        let engine = EchoEngine::new(echo).expect("memory");
        let reactor = Reactor::new(engine, config, inbox).expect("a ring");
        let thread = std::thread::spawn(move || reactor.run());
        Server { mailbox, thread: Some(thread) }
    }

    fn inspect(&self) -> Snapshot<EchoReport> {
        let (sender, receiver) = sync_channel(1);
        self.mailbox.post(Message::Inspect(sender)).expect("a living reactor");
        receiver.recv().expect("an answer")
    }

    /// Waits until the snapshot is as wished.
    fn wait_for(&self, what: &str, wished: impl Fn(&Snapshot<EchoReport>) -> bool) -> Snapshot<EchoReport> {
        for _ in 0..100_000 {
            let snapshot = self.inspect();
            if wished(&snapshot) {
                return snapshot;
            }
            std::thread::yield_now();
        }
        panic!("never happened: {what}; last seen: {:?}", self.inspect());
    }

    fn stop(mut self, message: Message<EchoReport>) -> EchoReport {
        self.mailbox.post(message).expect("a living reactor");
        let engine = self.thread.take().expect("started").join().expect("no panic").expect("an orderly end");
        datapath::engine::ports::Engine::report(&engine)
    }
}

fn unix_server(mask: &str, echo: EchoConfig) -> (Server, PathBuf) {
    let directory = scratch_directory();
    let path = directory.join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    (Server::start(listener.into(), mask, echo), path)
}

/// A new directory for this call.
fn scratch_directory() -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("reactor-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&path).expect("a scratch directory");
    path
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .collect()
}

fn unix_client(path: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    stream
}

fn expect_reply(stream: &mut impl Read, cookie: u64) {
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).expect("a reply");
    assert_eq!(reply[0..4], echo::REPLY_MAGIC.to_be_bytes());
    assert_eq!(u64::from_be_bytes(reply[8..16].try_into().expect("eight")), cookie);
}

fn write(stream: &mut (impl Read + Write), cookie: u64, offset: u64, data: &[u8]) {
    let mut message = request(WRITE, cookie, offset, u32::try_from(data.len()).expect("short")).to_vec();
    message.extend_from_slice(data);
    stream.write_all(&message).expect("sent");
    expect_reply(stream, cookie);
}

fn read(stream: &mut (impl Read + Write), cookie: u64, offset: u64, len: usize) -> Vec<u8> {
    stream.write_all(&request(READ, cookie, offset, u32::try_from(len).expect("short"))).expect("sent");
    expect_reply(stream, cookie);
    let mut data = vec![0; len];
    stream.read_exact(&mut data).expect("the payload");
    data
}

#[test]
fn what_is_written_is_read_back_over_unix_sockets() {
    for mask in MASKS {
        let (server, path) = unix_server(mask, EchoConfig::default());
        let mut client = unix_client(&path);
        for (round, len) in [1, 4096, 4097, 16384, 65536, 300_000, 1 << 20].into_iter().enumerate() {
            let data = pattern(round as u64, len);
            write(&mut client, round as u64, 0, &data);
            assert_eq!(read(&mut client, 77, 0, len), data, "mask {mask:?}, {len} bytes");
        }
        drop(client);
        let report = server.stop(Message::Drain);
        assert_eq!((report.accepted, report.closed, report.replies), (1, 1, 14), "mask {mask:?}");
        assert!(report.exact_receives > 0, "mask {mask:?}");
    }
}

#[test]
fn tcp_clients_are_served_and_the_last_reply_survives_unread_bytes() {
    for mask in MASKS {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let server = Server::start(listener.into(), mask, EchoConfig::default());
        let mut client = TcpStream::connect(address).expect("a connection");
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let data = pattern(5, 200_000);
        write(&mut client, 1, 4096, &data);
        assert_eq!(read(&mut client, 2, 4096, data.len()), data);

        // A read, then nonsense and more than the server will ever look at. It answers what came before the
        // nonsense or closes; in no case may a reset destroy the reply that is on its way.
        client.write_all(&request(READ, 3, 4096, 100_000)).expect("sent");
        server.wait_for("the third reply", |snapshot| snapshot.report.replies == 3);
        client.write_all(&[0xff; 28]).expect("sent");
        client.write_all(&vec![0; 500_000]).expect("swallowed while the server lingers");
        client.shutdown(Shutdown::Write).expect("open");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("an orderly end, not a reset");
        assert_eq!(answer.len(), 16 + 100_000, "mask {mask:?}");
        assert!(answer[16..] == data[..100_000]);
        let report = server.stop(Message::Drain);
        assert_eq!((report.accepted, report.closed), (1, 1), "mask {mask:?}");
    }
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    for mask in MASKS {
        let (server, path) = unix_server(mask, EchoConfig::default());
        let mut client = unix_client(&path);
        let data = pattern(9, 1 << 20);
        write(&mut client, 0, 0, &data);
        // 24 MiB of replies against a socket buffer of 200 KiB.
        for cookie in 0..24 {
            client.write_all(&request(READ, cookie, 0, 1 << 20)).expect("sent");
        }
        server.wait_for("all replies are on their way", |snapshot| snapshot.report.replies == 25);
        let mut answer = vec![0; 16 + (1 << 20)];
        for cookie in 0..24_u64 {
            client.read_exact(&mut answer).expect("a reply");
            assert_eq!(answer[8..16], cookie.to_be_bytes(), "mask {mask:?}");
            assert!(answer[16..] == data, "mask {mask:?}, reply {cookie}");
        }
        drop(client);
        server.stop(Message::Drain);
    }
}

#[test]
fn clients_that_leave_in_the_middle_cost_nothing_else() {
    for mask in MASKS {
        let (server, path) =
            unix_server(mask, EchoConfig { connections: 41, receive_buffers: 4, ..EchoConfig::default() });
        for round in 0..40_u32 {
            let mut client = unix_client(&path);
            match round % 4 {
                // In the middle of a header.
                0 => client.write_all(&[0x25, 0x60]).expect("sent"),
                // In the middle of an exact receive.
                1 => {
                    client.write_all(&request(WRITE, 1, 0, 1 << 20)).expect("sent");
                    client.write_all(&[7; 50_000]).expect("sent");
                }
                // With a send under way that nobody reads.
                2 => {
                    for cookie in 0..4 {
                        client.write_all(&request(READ, cookie, 0, 1 << 20)).expect("sent");
                    }
                }
                // Nonsense: the server closes while a send is under way.
                _ => {
                    client.write_all(&request(READ, 1, 0, 1 << 20)).expect("sent");
                    client.write_all(&[0xee; 28]).expect("sent");
                }
            }
        }
        let gone = server.wait_for("all are gone", |snapshot| snapshot.counters.closed == 40);
        assert_eq!(gone.connections, 0);
        let mut client = unix_client(&path);
        let data = pattern(1, 100_000);
        write(&mut client, 1, 0, &data);
        assert_eq!(read(&mut client, 2, 0, data.len()), data, "mask {mask:?}");
        assert_eq!(server.stop(Message::Drain).closed, 41, "mask {mask:?}");
    }
}

#[test]
fn many_connections_share_few_buffers() {
    const CLIENTS: u32 = 200;
    for mask in MASKS {
        let echo = EchoConfig {
            connections: CLIENTS,
            area_bytes: 64 << 10,
            receive_buffers: 2,
            receive_buffer_bytes: 4096,
        };
        let (server, path) = unix_server(mask, echo);
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| unix_client(&path)).collect();
        // One that is too many is closed soon, in case a place comes free, and disturbs nobody.
        server.wait_for("all are in", |snapshot| snapshot.counters.accepted == u64::from(CLIENTS));
        let mut extra = unix_client(&path);
        assert_eq!(extra.read_to_end(&mut Vec::new()).expect("closed, not reset"), 0);
        assert_eq!(server.inspect().counters.refused, 1);
        for (client, seed) in clients.iter_mut().zip(0_u64..) {
            let data = pattern(seed, 20_000);
            client.write_all(&request(WRITE, seed, 0, 20_000)).expect("sent");
            client.write_all(&data).expect("sent");
            client.write_all(&request(READ, seed, 0, 20_000)).expect("sent");
        }
        for (client, seed) in clients.iter_mut().zip(0_u64..) {
            expect_reply(client, seed);
            expect_reply(client, seed);
            let mut data = vec![0; 20_000];
            client.read_exact(&mut data).expect("the payload");
            assert!(data == pattern(seed, 20_000), "mask {mask:?}, client {seed}");
        }
        // A place is used again.
        drop(clients.pop());
        server.wait_for("one left", |snapshot| snapshot.connections == CLIENTS - 1);
        write(&mut unix_client(&path), 1, 0, b"again");
        drop(clients);
        assert_eq!(server.stop(Message::Drain).accepted, u64::from(CLIENTS) + 1);
    }
}

#[test]
fn an_idle_reactor_sleeps() {
    for mask in MASKS {
        let (server, path) = unix_server(mask, EchoConfig::default());
        let mut client = unix_client(&path);
        write(&mut client, 1, 0, b"busy");
        let before = server.inspect().counters;
        // Longer than any tick would be; a condition to wait for does not exist, since nothing may happen.
        let (sender, receiver) = sync_channel::<()>(1);
        assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err());
        drop(sender);
        let after = server.inspect().counters;
        // The turn that answered before, and the one that answers now, with what they left to reap.
        assert!(after.turns - before.turns <= 3, "mask {mask:?}: {before:?} {after:?}");
        assert_eq!(after.enters - before.enters, after.turns - before.turns, "one system call per turn");
        server.stop(Message::Drain);
    }
}

#[test]
fn an_abort_does_not_wait_for_clients() {
    for mask in MASKS {
        let (server, path) = unix_server(mask, EchoConfig::default());
        let mut client = unix_client(&path);
        for cookie in 0..8 {
            client.write_all(&request(READ, cookie, 0, 1 << 20)).expect("sent");
        }
        server.wait_for("a send is stuck", |snapshot| snapshot.report.replies == 8);
        assert_eq!(server.stop(Message::Abort).closed, 0, "mask {mask:?}");
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).expect("the connection is closed with the reactor");
    }
}

#[test]
fn a_drain_refuses_newcomers_and_answers_what_was_asked() {
    let (server, path) = unix_server("", EchoConfig::default());
    let mut client = unix_client(&path);
    for cookie in 0..8 {
        client.write_all(&request(READ, cookie, 0, 1 << 20)).expect("sent");
    }
    server.wait_for("all are being answered", |snapshot| snapshot.report.replies == 8);
    server.mailbox.post(Message::Drain).expect("a living reactor");
    let mut answers = Vec::new();
    client.read_to_end(&mut answers).expect("all answers, then the end");
    assert_eq!(answers.len(), 8 * (16 + (1 << 20)));
    let engine =
        { server }.thread.take().expect("started").join().expect("no panic").expect("an orderly end");
    assert_eq!(datapath::engine::ports::Engine::report(&engine).closed, 1);
}

#[test]
fn an_adopted_socket_is_a_connection_like_any_other() {
    let (server, _path) = unix_server("", EchoConfig::default());
    let (ours, mut client) = UnixStream::pair().expect("a pair");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let peer = datapath::engine::ports::PeerAddress::Unix;
    server.mailbox.post(Message::Adopt { socket: ours.into(), peer }).expect("a living reactor");
    write(&mut client, 4, 0, b"moved");
    assert_eq!(read(&mut client, 5, 0, 5), b"moved");
    assert_eq!(server.stop(Message::Drain).accepted, 1);
}

/// Eight MiB is what many systems let a user lock: far less than the arena. Root is exempt from the limit, so a
/// child process gives up its identity first.
#[test]
fn starts_with_little_locked_memory() {
    let output = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child_with_little_locked_memory", "--ignored", "--nocapture"])
        .output()
        .expect("a child process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("served without registered buffers"), "{text}");
}

#[test]
#[ignore = "run by starts_with_little_locked_memory in a process of its own"]
fn child_with_little_locked_memory() {
    use nix::sys::resource::{Resource, setrlimit};
    use nix::unistd::{Uid, geteuid, setuid};
    setrlimit(Resource::RLIMIT_MEMLOCK, 8 << 20, 8 << 20).expect("a lower limit");
    if geteuid().is_root() {
        setuid(Uid::from_raw(65534)).expect("root may become nobody");
    }
    // An abstract or unnamed socket: nobody may not write to the build's directories.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = Server::start(listener.into(), "", EchoConfig::default());
    let mut client = TcpStream::connect(address).expect("a connection");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let data = pattern(3, 100_000);
    write(&mut client, 1, 0, &data);
    assert_eq!(read(&mut client, 2, 0, data.len()), data);
    let features = server.inspect().features;
    assert!(!features.has(datapath::reactor::features::Feature::RegisteredBuffers), "{features}");
    server.stop(Message::Drain);
    println!("served without registered buffers");
}
