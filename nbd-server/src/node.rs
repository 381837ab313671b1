//! `berth node`: a node of a cluster. Which volumes it has, and which it leads, the records of `berth ctl` say.
//!
//! ```text
//!   berth ctl ──news──▶ control thread ──▶ courier ──mailbox──▶ shard
//!        ◀──proposals── control thread ◀──────────── outside ◀── shard ──calls──▶ other nodes
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};
use datapath::engine::report::ShardReport;
use datapath::engine::shard::NodeConfig;
use datapath::reactor::Outside;
use datapath::reactor::affinity::CpuList;
use datapath::reactor::features::Features;
use datapath::reactor::mailbox::{Mailbox, Message, PostError};
use datapath::reactor::pool_file::PoolFile;
use datapath::record::{NodeId, Record};
use datapath::replica::check::{CheckReport, PassState};
use datapath::store::lane::AckPolicy;

use crate::control::convert::NodeFacts;
use crate::control::link::{Command, ControlLink, LinkError, LinkSettings, News};
use crate::listener::{ListenAddress, Listener, limit_undelivered};
use crate::metrics::start_metrics;
use crate::metrics_page::render;
use crate::node_name::NodeName;
use crate::pools::{LaneSettings, build_shards, recover_pool};
use crate::random::random_number;
use crate::serve::{ServeError, open_pool};
use crate::shards::{Shards, ShardsConfig};
use crate::size::Size;
use crate::stop::StopSignals;

/// How long a call to another node may take. It is called again.
const CALL_TIMEOUT: Duration = Duration::from_millis(500);
/// A connection between nodes is given up when what was sent has not arrived for so long. It is called anew at once: on one
/// that was cut off the kernel tries again only after about as long as the cut has lasted, and a new head would wait for that.
const UNDELIVERED_MAX: Duration = Duration::from_secs(2);

/// All that `berth node` is told.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// Its name: the number that `berth ctl` gives it stays with it.
    pub name: NodeName,
    /// File or block device of the pool.
    pub pool: PathBuf,
    /// Makes the pool with this size, or grows it.
    pub pool_size: Option<Size>,
    /// `http://HOST:PORT` of `berth ctl`.
    pub ctl: String,
    /// Where NBD clients come in.
    pub nbd: Vec<ListenAddress>,
    /// Where other nodes come in: a TCP address.
    pub peer: ListenAddress,
    /// The host name or address under which others reach this node; without it the one that `peer` names.
    pub advertise: Option<String>,
    /// What fails together with it beyond its rack.
    pub zone: Option<String>,
    /// What fails together with it within the zone.
    pub rack: Option<String>,
    /// For whoever chooses nodes by them.
    pub labels: BTreeMap<String, String>,
    /// The processor to use: a node runs one thread.
    pub cpus: Option<CpuList>,
    /// Memory for the map of all volumes.
    pub map_cache: Option<Size>,
    /// Where Prometheus comes in.
    pub metrics: Option<String>,
    /// Every block of the volumes that it leads is read and compared once in this time; zero: only on demand.
    pub scrub_period: Duration,
}

/// Where the other nodes are.
type Addresses = Arc<Mutex<BTreeMap<NodeId, String>>>;

/// What the shard asks of other threads.
#[derive(Debug)]
struct Errands {
    calls: Sender<NodeId>,
    link: Arc<ControlLink>,
}

impl Outside for Errands {
    fn connect(&self, node: NodeId) {
        // The other end lives as long as the process.
        let _ = self.calls.send(node);
    }

    fn propose(&self, record: Box<Record>) {
        tracing::info!(volume = %record.name, epoch = record.epoch, version = record.version, started = record.started,
            in_sync = ?record.in_sync, "proposing a record");
        self.link.send(Command::Propose(*record));
    }

    fn checked(&self, report: CheckReport) {
        log_check(&report);
        self.link.send(Command::Checked(report));
    }
}

/// What a pass has found wrong is told loudly, whoever else hears of it.
fn log_check(report: &CheckReport) {
    if report.state == PassState::Running {
        return;
    }
    let volume = report.volume.0;
    let CheckReport { compared_blocks, repaired_blocks, unreadable_blocks, differing_blocks, .. } = *report;
    if differing_blocks > 0 {
        tracing::error!(volume, differing_blocks, findings = ?report.findings,
            "THE REPLICAS IN SYNC DIFFER; nothing was changed, for nobody knows which of them is right");
    }
    if unreadable_blocks > 0 {
        tracing::error!(volume, unreadable_blocks, findings = ?report.findings, "blocks are damaged for good");
    }
    tracing::info!(volume, state = ?report.state, compared_blocks, repaired_blocks, "pass over a volume");
}

/// Serves until it is told to stop. To be called before the process has started a thread.
///
/// # Errors
/// If it cannot start, or its shard failed.
pub fn run_node(settings: &NodeSettings) -> Result<(), ServeError> {
    let process = |step| move |source| ServeError::Process { step, source };
    let signals = StopSignals::block().map_err(process("block signals"))?;
    let (sender, stops) = channel();
    signals
        .watch(move |stop| {
            tracing::info!(?stop, "told to stop");
            let _ = sender.send(stop);
        })
        .map_err(process("watch signals"))?;
    let features = Features::allowed_by_environment()?;
    let cpus = choose_processor(settings)?;
    // What is acknowledged to another node must be on stable media.
    let lanes = LaneSettings { ack: AckPolicy::Durable, map_cache: settings.map_cache, read_only: false };
    let file = open_pool(&settings.pool, settings.pool_size)?;
    let pool = recover_pool(&file, &lanes)?;
    let mut listeners = Listener::activated()?;
    for address in &settings.nbd {
        listeners.push(Listener::bind(address)?);
    }
    let peer = Listener::bind(&settings.peer)?;
    let boot = random_number().map_err(process("draw a random number"))?;
    let advertised = |listener: &Listener| advertised(listener, settings.advertise.as_deref());
    let peer_address = advertised(&peer).ok_or(ServeError::PeerAddress)?;
    limit_undelivered(&peer.socket(), UNDELIVERED_MAX)
        .map_err(process("set up the socket for other nodes"))?;
    let facts = NodeFacts {
        capacity_bytes: pool.capacity_bytes(file.length_bytes()),
        zone: settings.zone.clone(),
        rack: settings.rack.clone(),
        labels: settings.labels.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let link = Arc::new(ControlLink::start(LinkSettings {
        facts,
        ctl: settings.ctl.clone(),
        name: settings.name.clone(),
        boot,
        nbd: listeners.iter().find_map(&advertised),
        peer: peer_address,
        wake: Arc::new(|| ()),
    })?);
    let news = link.news().clone();
    let Some(node) = wait_to_join(&news, &settings.ctl, &stops) else { return Ok(()) };
    // What has no replica here any more is nobody's news.
    pool.volumes().for_each(|volume| link.send(Command::Read(volume)));
    let config = NodeConfig { node, boot, steals: false };
    let mut shards = build_shards(vec![pool], &[file.length_bytes()], &[], &lanes, cpus.len(), Some(config))?;
    let scrub_ns = u64::try_from(settings.scrub_period.as_nanos()).unwrap_or(u64::MAX);
    shards.iter_mut().for_each(|shard| shard.scrub_within(scrub_ns));
    let (calls, called) = unbounded();
    let outside: Arc<dyn Outside> = Arc::new(Errands { calls, link: Arc::clone(&link) });
    let metrics = settings.metrics.as_deref().map(std::net::TcpListener::bind).transpose();
    let metrics = metrics.map_err(process("listen for metrics"))?;
    let shards = Shards::start(
        shards,
        &ShardsConfig {
            listeners: &listeners,
            peer_listeners: std::slice::from_ref(&peer),
            outside: Some(outside),
            devices: vec![PoolFile::file(&file)],
            cpus,
            features,
        },
    )?;
    let mailbox = shards.mailboxes()[0].clone();
    let addresses = Addresses::default();
    start_caller(called, Arc::clone(&addresses), mailbox.clone()).map_err(process("start a thread"))?;
    start_courier(news, addresses, mailbox).map_err(process("start a thread"))?;
    if let Some(listener) = metrics {
        let mailboxes = shards.mailboxes().to_vec();
        let address = start_metrics(listener, move || render(&mailboxes));
        println!("metrics http://{}/metrics", address.map_err(process("start a thread"))?);
    }
    for listener in &listeners {
        println!("ready node {} {}", settings.name, listener.place());
    }
    shards.run(stops)?;
    Ok(())
}

/// Where others reach this listener, if it is a TCP one: at its own address, or at this host.
fn advertised(listener: &Listener, host: Option<&str>) -> Option<String> {
    let address = listener.tcp_address()?;
    Some(host.map_or_else(|| address.to_string(), |host| format!("{host}:{}", address.port())))
}

/// What nodes tell each other is one shard's, so a node has one thread.
fn choose_processor(settings: &NodeSettings) -> Result<Vec<usize>, ServeError> {
    if settings.cpus.as_ref().is_some_and(|wished| wished.count() > 1) {
        return Err(ServeError::OneProcessor);
    }
    Ok(CpuList::allowed()?.assign(settings.cpus.as_ref(), Some(1))?)
}

/// The node's number; nothing if the process was told to stop first.
fn wait_to_join(
    news: &Receiver<News>,
    ctl: &str,
    stops: &std::sync::mpsc::Receiver<crate::stop::Stop>,
) -> Option<NodeId> {
    let mut told = false;
    loop {
        match news.recv_timeout(Duration::from_millis(200)) {
            Ok(News::Joined(node)) => return Some(node),
            Ok(other) => unreachable!("{other:?} before the node has joined"),
            Err(crossbeam::channel::RecvTimeoutError::Disconnected) => return None,
            Err(crossbeam::channel::RecvTimeoutError::Timeout) => {
                if stops.try_recv().is_ok() {
                    return None;
                }
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(ctl, "berth ctl does not answer yet; waiting for it");
                }
            }
        }
    }
}

/// Passes on what the control thread tells.
fn start_courier(
    news: Receiver<News>,
    addresses: Addresses,
    mailbox: Mailbox<ShardReport>,
) -> io::Result<()> {
    std::thread::Builder::new().name("courier".to_owned()).spawn(move || {
        for piece in news {
            match piece {
                News::Joined(_) => {}
                News::Nodes(nodes) => {
                    let mut known = addresses.lock().unwrap_or_else(PoisonError::into_inner);
                    *known = nodes.into_iter().map(|node| (node.node, node.peer)).collect();
                }
                News::Record(record) => {
                    tracing::info!(volume = %record.name, version = record.version, epoch = record.epoch,
                        head = ?record.head.map(|head| head.node), in_sync = ?record.in_sync, "record");
                    post(&mailbox, Message::Record(record));
                }
                News::Tend { volume } => {
                    tracing::info!(
                        volume = volume.0,
                        "something has to be done for the replicas of a volume"
                    );
                    post(&mailbox, Message::Tend { volume });
                }
                News::Verify { volume, verify } => {
                    tracing::info!(volume = volume.0, "somebody wants a volume verified");
                    post(&mailbox, Message::Verify { volume, verify });
                }
                News::Gone(volume) => tracing::warn!(volume = volume.0, "there is no record of this volume"),
                News::Deleted { volume, lineage } => {
                    tracing::info!(volume = volume.0, "deleted: what is left of it is removed");
                    post(&mailbox, Message::Deleted { volume, lineage });
                }
            }
        }
    })?;
    Ok(())
}

/// Calls other nodes, each on a thread of its own: one that does not answer keeps nobody waiting.
fn start_caller(
    calls: Receiver<NodeId>,
    addresses: Addresses,
    mailbox: Mailbox<ShardReport>,
) -> io::Result<()> {
    std::thread::Builder::new().name("caller".to_owned()).spawn(move || {
        for node in calls {
            let address = addresses.lock().unwrap_or_else(PoisonError::into_inner).get(&node).cloned();
            let to = mailbox.clone();
            let call = move || {
                let socket = address.and_then(|address| call(&address));
                post(&to, Message::PeerCalled { node, socket });
            };
            if std::thread::Builder::new().name(format!("call-{}", node.0)).spawn(call).is_err() {
                post(&mailbox, Message::PeerCalled { node, socket: None });
            }
        }
    })?;
    Ok(())
}

fn call(address: &str) -> Option<OwnedFd> {
    let addresses = address.to_socket_addrs().ok()?;
    addresses
        .into_iter()
        .find_map(|address| TcpStream::connect_timeout(&address, CALL_TIMEOUT).ok())
        // Without it the connection works, too.
        .inspect(|socket| drop(limit_undelivered(socket, UNDELIVERED_MAX)))
        .map(OwnedFd::from)
}

/// A full mailbox is a busy shard: the message waits for its turn. A shard that has ended needs none.
fn post(mailbox: &Mailbox<ShardReport>, message: Message<ShardReport>) {
    let mut message = message;
    while let Err(PostError::Full(back)) = mailbox.post(message) {
        message = back;
        std::thread::yield_now();
    }
}

impl From<LinkError> for ServeError {
    fn from(error: LinkError) -> ServeError {
        ServeError::Link(Box::new(error))
    }
}
