//! `berth serve`: one node with a fixed set of volumes.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use datapath::engine::report::ShardReport;
use datapath::engine::shard::{Shard, shard_of_lane};
use datapath::reactor::Arena;
use datapath::reactor::affinity::AffinityError;
pub use datapath::reactor::affinity::CpuList;
use datapath::reactor::features::{Features, MaskError};
use datapath::reactor::mailbox::{Mailbox, Message};
use datapath::reactor::pool_file::{PoolFile, PoolFileError};
pub use datapath::store::lane::AckPolicy;
use datapath::store::lane::Lane;
use thiserror::Error;

use crate::listener::{ListenAddress, ListenError, Listener};
use crate::metrics::start_metrics;
use crate::metrics_page::render;
use crate::pools::{LANES, LaneSettings, PoolsError, build_shards, create_pool, recover_pool};
use crate::shards::{Shards, ShardsConfig, ShardsError};
use crate::size::Size;
use crate::stop::StopSignals;
use crate::volume_name::VolumeName;

/// A volume to serve, created if the pool does not have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Its name.
    pub name: VolumeName,
    /// Its size.
    pub size: Size,
}

/// All that `berth serve` is told.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Files or block devices of the pools.
    pub pools: Vec<PathBuf>,
    /// Makes pools that do not exist, with this size, and grows those that are smaller.
    pub pool_size: Option<Size>,
    /// The volumes.
    pub volumes: Vec<VolumeConfig>,
    /// Where NBD clients come in; sockets from systemd are added.
    pub nbd: Vec<ListenAddress>,
    /// Threads, of which there are no more than lanes; without it, one for each of `cpus`, else one or two.
    pub threads: Option<usize>,
    /// Processors to use.
    pub cpus: Option<CpuList>,
    /// When a write is answered.
    pub ack: AckPolicy,
    /// Memory for the map of all volumes.
    pub map_cache: Option<Size>,
    /// Where Prometheus comes in.
    pub metrics: Option<String>,
    /// Refuse every change.
    pub read_only: bool,
}

/// Why `berth serve` ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A pool cannot be used.
    #[error(transparent)]
    Pool(#[from] PoolFileError),
    /// A pool does not exist and nobody said how large it shall be.
    #[error("{0}: there is no such pool; give --pool-size to make it")]
    NoPool(PathBuf),
    /// Nothing to listen on, or it is taken.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The processors asked for.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The mask of features.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The shards.
    #[error(transparent)]
    Shards(#[from] ShardsError),
    /// Signals or the metrics' address.
    #[error("{step}: {source}")]
    Process {
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        #[source]
        source: std::io::Error,
    },
    /// The content of a pool.
    #[error(transparent)]
    Content(#[from] PoolsError),
    /// The link to `berth ctl`.
    #[error(transparent)]
    Link(Box<crate::control::link::LinkError>),
    /// A node has one thread.
    #[error("a node runs one thread: --cpus must name one processor")]
    OneProcessor,
    /// Other nodes connect over TCP.
    #[error("--peer must be ADDR:PORT")]
    PeerAddress,
    /// A disk failed while the volumes were being brought up.
    #[error("a disk failed before the volumes were ready; nothing was served")]
    NotReady,
}

/// Serves until it is told to stop. To be called before the process has started a thread.
///
/// # Errors
/// If it cannot start, or a shard failed.
pub fn serve(config: ServeConfig) -> Result<(), ServeError> {
    let process = |step| move |source| ServeError::Process { step, source };
    let signals = StopSignals::block().map_err(process("block signals"))?;
    let features = Features::allowed_by_environment()?;
    let mut cpus = CpuList::allowed()?.assign(config.cpus.as_ref(), config.threads)?;
    let settings = LaneSettings { ack: config.ack, map_cache: config.map_cache, read_only: config.read_only };
    let mut files = Vec::new();
    let mut pools = Vec::new();
    for path in &config.pools {
        let file = open_pool(path, config.pool_size)?;
        pools.push(recover_pool(&file, &settings)?);
        files.push(file);
    }
    let lengths_bytes: Vec<u64> = files.iter().map(PoolFile::length_bytes).collect();
    let lanes = pools.iter().map(|pool| pool.lanes.len()).sum();
    if cpus.len() > lanes {
        tracing::warn!(
            threads = cpus.len(),
            lanes,
            "each lane is run by one thread: there are no more threads than lanes"
        );
        cpus.truncate(lanes);
    }
    let shards = build_shards(pools, &lengths_bytes, &config.volumes, &settings, cpus.len(), None)?;
    let mut listeners = Listener::activated()?;
    for address in &config.nbd {
        listeners.push(Listener::bind(address)?);
    }
    let metrics = config.metrics.as_deref().map(TcpListener::bind).transpose();
    let metrics = metrics.map_err(process("listen for metrics"))?;
    let (sender, stops) = channel();
    signals
        .watch(move |stop| {
            tracing::info!(?stop, "told to stop");
            // The receiver is gone when the shards have ended already.
            let _ = sender.send(stop);
        })
        .map_err(process("watch signals"))?;
    let names = volume_names(&shards, lanes);
    let devices = files.iter().map(PoolFile::file).collect();
    let shards = Shards::start(
        shards,
        &ShardsConfig { listeners: &listeners, peer_listeners: &[], outside: None, devices, cpus, features },
    )?;
    if !shards.wait_until_open() || has_failed(shards.mailboxes()) {
        shards.drain();
        shards.run(stops)?;
        return Err(ServeError::NotReady);
    }
    if let Some(listener) = metrics {
        let mailboxes = shards.mailboxes().to_vec();
        let address = start_metrics(listener, move || render(&mailboxes));
        println!("metrics http://{}/metrics", address.map_err(process("start a thread"))?);
    }
    announce(&listeners, &names);
    shards.run(stops)?;
    Ok(())
}

/// Opens a pool, made or grown to the wished size.
pub(crate) fn open_pool(path: &Path, size: Option<Size>) -> Result<PoolFile, ServeError> {
    let exists = path.try_exists().map_err(|source| PoolFileError::Open { path: path.to_owned(), source })?;
    let pool = match (exists, size) {
        (true, None) => PoolFile::open(path)?,
        (true, Some(size)) => {
            let mut pool = PoolFile::open(path)?;
            if pool.length_bytes() < size.bytes {
                pool.grow(size.bytes)?;
            }
            pool
        }
        (false, Some(size)) => create_pool(path, size, LANES)?,
        (false, None) => return Err(ServeError::NoPool(path.to_owned())),
    };
    if !pool.is_direct() {
        tracing::warn!(pool = %path.display(), "the filesystem has no direct I/O; the page cache is in between");
    }
    let (length_bytes, volatile_cache) = (pool.length_bytes(), pool.has_volatile_cache());
    tracing::info!(pool = %path.display(), length_bytes, volatile_cache, "pool");
    Ok(pool)
}

/// The volumes in the order of their lanes, however many shards run these.
fn volume_names(shards: &[Shard<Arena>], lanes: usize) -> Vec<String> {
    let mut by_shard: Vec<_> = shards.iter().map(Shard::lanes).collect();
    let in_order = (0..lanes).filter_map(|lane| by_shard[shard_of_lane(lane, shards.len())].next());
    in_order.flat_map(Lane::volumes).map(|volume| volume.record.name.clone()).collect()
}

/// Did a disk fail while the lanes made safe what they had recovered?
fn has_failed(mailboxes: &[Mailbox<ShardReport>]) -> bool {
    mailboxes.iter().any(|mailbox| {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let report = mailbox.post(Message::Inspect(sender)).ok().and_then(|()| receiver.recv().ok());
        report.is_none_or(|snapshot| snapshot.report.lanes.iter().any(|lane| lane.failed))
    })
}

/// Prints on standard output the URIs under which clients find the volumes.
fn announce(listeners: &[Listener], volumes: &[String]) {
    for volume in volumes {
        let Ok(name) = volume.parse() else { continue };
        for listener in listeners {
            println!("ready {}", listener.uri(&name));
        }
    }
}
