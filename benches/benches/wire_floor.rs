//! What a request costs on the wire alone, without a store behind it: the reactor with its echo engine, beside
//! the same service on tokio-uring, the runtime that was weighed against an own loop (DESIGN.md, section 3).
//!
//! One client on a unix socket asks for 4 KiB at a time; `1` waits for each reply, `32` keeps that many under way.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use datapath::reactor::echo::{EchoConfig, EchoEngine, READ, REPLY_MAGIC, REQUEST_BYTES, request};
use datapath::reactor::features::Features;
use datapath::reactor::mailbox::{Message, mailbox};
use datapath::reactor::{Reactor, ReactorConfig};

const PAYLOAD_BYTES: usize = 4096;
const REPLY_BYTES: usize = 16 + PAYLOAD_BYTES;

/// A client with the bytes of one round ready to send.
struct Client {
    stream: UnixStream,
    requests: Vec<u8>,
    replies: Vec<u8>,
}

impl Client {
    fn new(path: &Path, depth: usize) -> Client {
        let length = u32::try_from(PAYLOAD_BYTES).expect("4096");
        Client {
            stream: UnixStream::connect(path).expect("a connection"),
            requests: (0..depth as u64).flat_map(|cookie| request(READ, cookie, 0, length)).collect(),
            replies: vec![0; depth * REPLY_BYTES],
        }
    }

    fn round(&mut self) {
        self.stream.write_all(&self.requests).expect("sent");
        self.stream.read_exact(&mut self.replies).expect("all replies");
        assert_eq!(self.replies[..4], REPLY_MAGIC.to_be_bytes());
    }
}

fn socket_path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("berth-bench-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn measure(criterion: &mut Criterion, name: &str, path: &Path) {
    let mut group = criterion.benchmark_group("echo 4 KiB");
    for depth in [1, 32] {
        let mut client = Client::new(path, depth);
        group.throughput(Throughput::Elements(depth as u64));
        group.bench_function(format!("{name}/{depth}"), |bencher| bencher.iter(|| client.round()));
    }
    group.finish();
}

fn reactor(criterion: &mut Criterion) {
    let path = socket_path("reactor");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (mailbox, inbox) = mailbox().expect("an eventfd");
    let echo = EchoConfig::default();
    let config = ReactorConfig {
        listeners: vec![Arc::new(listener.into())],
        connections_max: echo.connections,
        features: Features::allowed_by_environment().expect("a mask"),
        ..ReactorConfig::default()
    };
    let engine = EchoEngine::new(echo).expect("memory");
    let reactor = Reactor::new(engine, config, inbox).expect("a ring");
    let thread = std::thread::spawn(move || reactor.run());
    measure(criterion, "reactor", &path);
    mailbox.post(Message::Abort).expect("a living reactor");
    thread.join().expect("no panic").expect("an orderly end");
    std::fs::remove_file(&path).expect("the socket's file");
}

fn tokio_uring(criterion: &mut Criterion) {
    let path = socket_path("tokio-uring");
    // Its own listener asks for SO_REUSEPORT, which current kernels refuse on unix sockets.
    let listener = UnixListener::bind(&path).expect("a socket");
    std::thread::spawn(move || {
        // Criterion's clients come one after the other.
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            tokio_uring::start(serve(tokio_uring::net::UnixStream::from_std(stream)));
        }
    });
    measure(criterion, "tokio-uring", &path);
    std::fs::remove_file(&path).expect("the socket's file");
}

/// The same service as the echo engine's READ: all requests of a receive are answered by one write.
async fn serve(stream: tokio_uring::net::UnixStream) {
    let (mut input, mut output) = (vec![0; 128 << 10], Vec::with_capacity(64 * REPLY_BYTES));
    loop {
        let (result, buffer) = stream.read(input).await;
        input = buffer;
        let Ok(received @ 1..) = result else { return };
        output.clear();
        for header in input[..received].chunks_exact(REQUEST_BYTES) {
            output.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
            output.extend_from_slice(&[0; 4]);
            output.extend_from_slice(&header[8..16]);
            output.resize(output.len() + PAYLOAD_BYTES, 0);
        }
        let (result, buffer) = stream.write_all(output).await;
        output = buffer;
        if result.is_err() {
            return;
        }
    }
}

criterion_group!(benches, reactor, tokio_uring);
criterion_main!(benches);
