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
