//! `berth serve`: one node with a fixed set of volumes.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use datapath::reactor::affinity::AffinityError;
pub use datapath::reactor::affinity::CpuList;
use datapath::reactor::features::{Features, MaskError};
use datapath::reactor::pool_file::{PoolFile, PoolFileError};
use thiserror::Error;

use crate::listener::{ListenAddress, ListenError, Listener};
use crate::shards::ShardsError;
use crate::size::Size;
use crate::stop::StopSignals;
use crate::volume_name::VolumeName;

/// When a write is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckPolicy {
    /// When the device has completed it: the contract of a plain disk.
    Device,
    /// When it is on stable media.
    Durable,
}

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
    /// Shards; without it, one for each of `cpus`, else one or two.
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
    /// The engine of the shards is not joined to the process yet.
    #[error("the store is not joined to the process yet")]
    NoEngine,
}

/// Serves until it is told to stop. To be called before the process has started a thread.
///
/// # Errors
/// If it cannot start, or a shard failed.
pub fn serve(config: ServeConfig) -> Result<(), ServeError> {
    let process = |step| move |source| ServeError::Process { step, source };
    let signals = StopSignals::block().map_err(process("block signals"))?;
    let features = Features::allowed_by_environment()?;
    let cpus = CpuList::allowed()?.assign(config.cpus.as_ref(), config.threads)?;
    let pools =
        config.pools.iter().map(|path| open_pool(path, config.pool_size)).collect::<Result<Vec<_>, _>>()?;
    let mut listeners = Listener::activated()?;
    for address in &config.nbd {
        listeners.push(Listener::bind(address)?);
    }
    let (sender, stops) = channel();
    signals
        .watch(move |stop| {
            tracing::info!(?stop, "told to stop");
            // The receiver is gone when the shards have ended already.
            let _ = sender.send(stop);
        })
        .map_err(process("watch signals"))?;
    // Here the shards are built from `pools`, `config.volumes`, `config.ack` and `config.map_cache`, started with
    // `Shards::start`, announced with `announce`, and run with `Shards::run`.
    let _ = (features, cpus, pools, stops);
    Err(ServeError::NoEngine)
}

/// Opens a pool, made or grown to the wished size.
fn open_pool(path: &Path, size: Option<Size>) -> Result<PoolFile, ServeError> {
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
        (false, Some(size)) => PoolFile::create(path, size.bytes)?,
        (false, None) => return Err(ServeError::NoPool(path.to_owned())),
    };
    if !pool.is_direct() {
        tracing::warn!(pool = %path.display(), "the filesystem has no direct I/O; the page cache is in between");
    }
    let (length_bytes, volatile_cache) = (pool.length_bytes(), pool.has_volatile_cache());
    tracing::info!(pool = %path.display(), length_bytes, volatile_cache, "pool");
    Ok(pool)
}

/// Prints the URIs under which clients find the volumes.
pub fn announce(listeners: &[Listener], volumes: &[VolumeConfig]) {
    for volume in volumes {
        for listener in listeners {
            tracing::info!(volume = %volume.name, size = %volume.size, uri = %listener.uri(&volume.name), "serving");
        }
    }
}
