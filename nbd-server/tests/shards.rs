//! The process around the data path, with the echo engine in the place of the store.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use datapath::reactor::affinity::CpuList;
use datapath::reactor::echo::{EchoConfig, EchoEngine, READ, request};
use datapath::reactor::features::Features;
use nbd_server::listener::{ListenAddress, Listener};
use nbd_server::shards::{Shards, ShardsConfig};
use nbd_server::stop::Stop;

fn ask(stream: &mut (impl Read + Write)) {
    stream.write_all(&request(READ, 1, 0, 100)).expect("sent");
    let mut reply = [0; 116];
    stream.read_exact(&mut reply).expect("a reply");
}

#[test]
fn shards_share_their_listeners_and_stop_when_told() {
    let path = std::env::temp_dir().join(format!("berth-shards-{}", std::process::id()));
    for stop in [Stop::Drain, Stop::Now] {
        let listeners = [
            Listener::bind(&"127.0.0.1:0".parse().expect("an address")).expect("a port"),
            Listener::bind(&ListenAddress::Unix(path.clone())).expect("a socket"),
        ];
        let cpus = CpuList::allowed().expect("the mask").assign(None, Some(2)).expect("processors");
        let engines = (0..2).map(|_| {
            EchoEngine::new(EchoConfig { connections: 1024, area_bytes: 4096, ..EchoConfig::default() })
        });
        let engines = engines.collect::<Result<Vec<_>, _>>().expect("memory");
        let config = ShardsConfig {
            listeners: &listeners,
            peer_listeners: &[],
            outside: None,
            devices: Vec::new(),
            cpus,
            features: Features::EVERY,
        };
        let shards = Shards::start(engines, &config).expect("rings");
        let (sender, stops) = channel();
        let address = listeners[0].tcp_address().expect("TCP");
        let clients = std::thread::spawn({
            let path = path.clone();
            move || {
                for _ in 0..20 {
                    let mut client = TcpStream::connect(address).expect("a connection");
                    client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
                    ask(&mut client);
                    let mut client = UnixStream::connect(&path).expect("a connection");
                    client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
                    ask(&mut client);
                }
                sender.send(stop).expect("shards at work");
            }
        });
        let engines = shards.run(stops).expect("an orderly end");
        clients.join().expect("every request was answered");
        let replies: u64 =
            engines.iter().map(|engine| datapath::engine::ports::Engine::report(engine).replies).sum();
        assert_eq!(replies, 40);
        drop(listeners);
        assert!(!path.exists());
    }
}
