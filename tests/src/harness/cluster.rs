//! A cluster of real processes: `berth ctl` and nodes, each of which can be killed and started again.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{BenchArgs, BlockRange};
use datapath::wire::nbd_transmission::command;

use super::Scratch;
use super::client::Client;
use super::ctl::{Ctl, PATIENCE};
use super::metrics::Page;
use super::network::{Network, Place};
use super::server::{Options, Server, berth_at};
use super::tools::{run, tool};

/// A pool is preallocated at the first start.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;

/// A node's process, or the place of one.
#[derive(Debug)]
pub struct ClusterNode {
    /// Its name.
    pub name: String,
    /// Where NBD clients come in.
    pub socket: PathBuf,
    /// Its pool.
    pub pool: PathBuf,
    place: Place,
    log: PathBuf,
    child: Option<Child>,
    metrics: Option<String>,
}

/// The whole. Dropped, all of it is killed.
#[derive(Debug)]
pub struct Cluster {
    /// The keeper of records.
    pub ctl: Ctl,
    /// The nodes n1, n2 and so on.
    pub nodes: Vec<ClusterNode>,
    /// What nodes are told besides, when they are started.
    pub node_arguments: Vec<String>,
    pool_mib: u64,
    /// Last, so that it goes when nobody uses it any more.
    network: Option<Network>,
}

impl Cluster {
    /// Starts ctl and so many nodes, with pools of this size.
    ///
    /// # Panics
    /// If one of them does not get ready.
    #[must_use]
    pub fn start(scratch: &Scratch, nodes: usize, pool_mib: u64) -> Cluster {
        Cluster::start_under(scratch, Ctl::start(&scratch.file("records")), nodes, pool_mib)
    }

    /// The same under a ctl that was started.
    ///
    /// # Panics
    /// If one of them does not get ready.
    #[must_use]
    pub fn start_under(scratch: &Scratch, ctl: Ctl, nodes: usize, pool_mib: u64) -> Cluster {
        Cluster::start_nodes(scratch, ctl, nodes, pool_mib, None)
    }

    /// The same, each on a machine of its own, and one more: `client`.
    ///
    /// # Panics
    /// If the network cannot be made, or one of them does not get ready.
    #[must_use]
    pub fn start_apart(scratch: &Scratch, nodes: usize, pool_mib: u64) -> Cluster {
        let names: Vec<String> = (1..=nodes).map(|number| format!("n{number}")).collect();
        let machines: Vec<&str> = names.iter().map(String::as_str).chain(["ctl", "client"]).collect();
        let network = Network::new(&machines);
        let ctl = Ctl::start_on(&network.place("ctl"), &scratch.file("records"));
        Cluster::start_nodes(scratch, ctl, nodes, pool_mib, Some(network))
    }

    fn start_nodes(
        scratch: &Scratch,
        ctl: Ctl,
        nodes: usize,
        pool_mib: u64,
        network: Option<Network>,
    ) -> Cluster {
        let node = |number| {
            let name = format!("n{number}");
            ClusterNode {
                place: network.as_ref().map_or_else(Place::here, |network| network.place(&name)),
                socket: scratch.socket(&name),
                pool: scratch.file(&format!("{name}.pool")),
                log: scratch.file(&format!("{name}.log")),
                name,
                child: None,
                metrics: None,
            }
        };
        let nodes_made = (1..=nodes).map(node).collect();
        let mut cluster = Cluster { ctl, nodes: nodes_made, node_arguments: Vec::new(), pool_mib, network };
        (0..nodes).for_each(|index| cluster.start_node(index));
        cluster
    }

    /// Starts a node that does not run.
    ///
    /// # Panics
    /// If it does not get ready.
    pub fn start_node(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        assert!(node.child.is_none(), "{} runs", node.name);
        let address = node.place.address();
        let mut command = berth_at(&node.place, &["node", &format!("--metrics={address}:0")]);
        if node.place.is_apart() {
            command.arg(format!("--peer={address}:7441")).arg("--insecure");
            command.arg(format!("--nbd={address}:10809"));
        } else {
            command.arg(format!("--peer={address}:0"));
        }
        command
            .arg(format!("--name={}", node.name))
            .arg(format!("--pool={}", node.pool.display()))
            .arg(format!("--pool-size={}M", self.pool_mib))
            .arg(format!("--ctl={}", self.ctl.url()))
            .arg(format!("--nbd=unix:{}", node.socket.display()))
            .args(&self.node_arguments);
        let log = File::options().create(true).append(true).open(&node.log).expect("a log");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let output = child.stdout.take().expect("piped");
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        // Kept before it is ready: a test that fails here ends it, too.
        node.child = Some(child);
        loop {
            let line = told.recv_timeout(READY_TIMEOUT);
            match line.as_ref().ok().and_then(|line| line.split_once(' ')) {
                Some(("metrics", url)) => node.metrics = Some(url.to_owned()),
                Some(("ready", _)) => return,
                _ => panic!("{}: {line:?}; see {}", node.name, node.log.display()),
            }
        }
    }

    /// What a node that runs tells of itself.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn metrics(&self, index: usize) -> Page {
        let node = &self.nodes[index];
        let url = node.metrics.as_deref().expect("a node that was started");
        node.place.visit(|| Page::fetch(url))
    }

    /// The network of [`Cluster::start_apart`].
    ///
    /// # Panics
    /// If the nodes are not apart.
    #[must_use]
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("a cluster that was started apart")
    }

    /// What a running node counts under this name.
    ///
    /// # Panics
    /// If it does not say.
    #[must_use]
    pub fn metric(&self, index: usize, name: &str) -> f64 {
        self.metrics(index).sum(name, "")
    }

    /// Kill -9.
    ///
    /// # Panics
    /// If the node had ended by itself.
    pub fn kill_node(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let mut child = node.child.take().unwrap_or_else(|| panic!("{} does not run", node.name));
        let ended = child.try_wait().expect("our child");
        assert!(ended.is_none(), "{} ended by itself: {ended:?}; see {}", node.name, node.log.display());
        child.kill().expect("our child");
        child.wait().expect("our child");
    }

    /// Tells a node to end, and waits until it has; says how long that took.
    ///
    /// # Panics
    /// If it does not end as it should.
    pub fn stop_node(&mut self, index: usize) -> Duration {
        use nix::sys::signal::{Signal, kill};
        let node = &mut self.nodes[index];
        let mut child = node.child.take().unwrap_or_else(|| panic!("{} does not run", node.name));
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        let start = Instant::now();
        kill(pid, Signal::SIGTERM).expect("our child");
        let status = child.wait().expect("our child");
        assert!(status.success(), "{} ends with {status}; see {}", node.name, node.log.display());
        start.elapsed()
    }

    /// Stops a node's process, or lets it go on: SIGSTOP and SIGCONT.
    ///
    /// # Panics
    /// If it does not run.
    pub fn freeze_node(&self, index: usize, frozen: bool) {
        use nix::sys::signal::{Signal, kill};
        let child = self.nodes[index].child.as_ref().expect("a running node");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        kill(pid, if frozen { Signal::SIGSTOP } else { Signal::SIGCONT }).expect("our child");
    }

    /// Makes a volume with a replica on every node.
    ///
    /// # Panics
    /// If that is refused.
    pub fn make_volume(&self, name: &str, size_mib: u64) {
        self.make_volume_with(name, size_mib, "");
    }

    /// The same with more arguments for the command.
    ///
    /// # Panics
    /// If that is refused.
    pub fn make_volume_with(&self, name: &str, size_mib: u64, more: &str) {
        let on: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        let on = on.join(",");
        let words = format!("volume create {name} --size {size_mib}M --on {on} {more}");
        run(&mut self.ctl.command(words.trim_end()));
    }

    /// Verified load on a volume, through the first node until another one serves it.
    ///
    /// # Panics
    /// If it has no such nodes.
    #[must_use]
    pub fn verified_load(&self, volume: &str) -> BenchArgs {
        let uri = |index| self.uri(index, volume).parse().expect("a URI");
        BenchArgs {
            read: 40,
            write: 50,
            trim: 5,
            zeroes: 5,
            block: BlockRange { least: 512, most: 64 << 10 },
            duration: 24.0 * 3600.0,
            reconnect: 60.0,
            failover: (1..self.nodes.len()).map(uri).collect(),
            verify: true,
            destroy_data: true,
            ..BenchArgs::new(uri(0))
        }
    }

    /// The URI of a volume on a node.
    #[must_use]
    pub fn uri(&self, index: usize, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.nodes[index].socket.display())
    }

    /// The URI of a volume on a node, for those that have no part in its disk: over TCP.
    #[must_use]
    pub fn tcp_uri(&self, index: usize, volume: &str) -> String {
        format!("nbd://{}/{volume}", self.nodes[index].place.address())
    }

    /// Waits until all replicas of the volume are in sync, kills all nodes, which must run, and checks that every replica has
    /// the same bytes. Nothing may be on its way to it.
    ///
    /// # Panics
    /// If they differ.
    pub fn compare_replicas(&mut self, scratch: &Scratch, volume: &str, size_mib: u64) {
        self.wait_for_sync(volume, self.nodes.len());
        (0..self.nodes.len()).for_each(|index| self.kill_node(index));
        let sum = |node: &ClusterNode| {
            let options = Options {
                pool: node.pool.clone(),
                pool_mib: self.pool_mib,
                volumes: vec![(volume.to_owned(), size_mib)],
                socket: scratch.socket(&format!("{}-replica", node.name)),
                threads: 1,
                more: vec!["--read-only".to_owned()],
            };
            let server = Server::start(&options);
            let script = format!("set -o pipefail; nbdcopy '{}' - | sha256sum", server.uri());
            // For the message that names the package.
            let _ = tool("nbdcopy");
            let sum = run(tool("bash").args(["-c", &script]));
            server.stop();
            sum
        };
        let sums: Vec<String> = self.nodes.iter().map(sum).collect();
        assert!(sums.windows(2).all(|two| two[0] == two[1]), "the replicas of {volume} differ: {sums:?}");
    }

    /// What ctl says of a volume, as JSON.
    ///
    /// # Panics
    /// If it says nothing.
    #[must_use]
    pub fn volume(&self, name: &str) -> serde_json::Value {
        let text = run(&mut self.ctl.command(&format!("volume show {name} --output json")));
        serde_json::from_str(&text).expect("JSON")
    }

    /// Waits until so many replicas of a volume are in sync; says how long that took.
    pub fn wait_for_sync(&self, volume: &str, replicas: usize) -> Duration {
        let start = Instant::now();
        self.wait_for_volume(volume, |volume| volume["in_sync"].as_array().map(Vec::len) == Some(replicas));
        start.elapsed()
    }

    /// Waits until a volume's record is as wanted.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn wait_for_volume(&self, name: &str, wanted: impl Fn(&serde_json::Value) -> bool) {
        self.wait_for_volume_within(name, PATIENCE, wanted);
    }

    /// The same, for as long as `patience`.
    ///
    /// # Panics
    /// If it does not come to that.
    pub fn wait_for_volume_within(
        &self,
        name: &str,
        patience: Duration,
        wanted: impl Fn(&serde_json::Value) -> bool,
    ) {
        let start = Instant::now();
        loop {
            let volume = self.volume(name);
            if wanted(&volume) {
                return;
            }
            assert!(start.elapsed() < patience, "the record stays {volume}");
            thread::park_timeout(Duration::from_millis(20));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// Writes block after block through one node, and notes how long each took: what a database with one log would see.
#[derive(Debug)]
pub struct Probe {
    client: Option<Client>,
    socket: PathBuf,
    volume: String,
    written: u64,
}

impl Probe {
    /// Of a volume through a node.
    #[must_use]
    pub fn new(node: &ClusterNode, volume: &str) -> Probe {
        Probe { client: None, socket: node.socket.clone(), volume: volume.to_owned(), written: 0 }
    }

    /// Goes to another node.
    pub fn move_to(&mut self, node: &ClusterNode) {
        self.client = None;
        self.socket.clone_from(&node.socket);
    }

    /// Writes one block; tries again, connecting anew, until it is answered.
    ///
    /// # Panics
    /// If that takes too long or ends in an error.
    pub fn write(&mut self) -> Duration {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < PATIENCE * 2, "nobody answers at {}", self.socket.display());
            if let Some(client) = &mut self.client {
                let offset = self.written % 64 * BLOCK;
                match client.call(command::WRITE, offset, BLOCK, &[7; 4096]) {
                    Ok(answer) => {
                        assert_eq!(answer.error, 0, "a write fails");
                        self.written += 1;
                        return start.elapsed();
                    }
                    Err(_) => self.client = None,
                }
            } else {
                self.client = Client::connect(&self.socket, &self.volume).ok();
                if self.client.is_none() {
                    thread::park_timeout(Duration::from_millis(10));
                }
            }
        }
    }

    /// Writes one block through whichever of these nodes serves the volume, beginning with the one that did.
    ///
    /// # Panics
    /// If that takes too long or ends in an error.
    pub fn write_through_any(&mut self, nodes: &[ClusterNode]) -> Duration {
        let start = Instant::now();
        let mut others = nodes.iter().cycle();
        loop {
            assert!(start.elapsed() < PATIENCE * 2, "no node serves {}", self.volume);
            let offset = self.written % 64 * BLOCK;
            if let Some(client) = &mut self.client
                && let Ok(answer) = client.call(command::WRITE, offset, BLOCK, &[7; 4096])
            {
                assert_eq!(answer.error, 0, "a write fails");
                self.written += 1;
                return start.elapsed();
            }
            self.client = Client::connect(&self.socket, &self.volume).ok();
            if self.client.is_none() {
                self.socket.clone_from(&others.next().expect("there are nodes").socket);
                thread::park_timeout(Duration::from_millis(1));
            }
        }
    }

    /// Writes for so long; the longest that a write took.
    pub fn write_for(&mut self, duration: Duration) -> Duration {
        let start = Instant::now();
        let mut longest = Duration::ZERO;
        while start.elapsed() < duration {
            longest = longest.max(self.write());
        }
        longest
    }
}
