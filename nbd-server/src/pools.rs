//! From pool files to a shard: format, recover, make and grow volumes.

use std::path::{Path, PathBuf};

use datapath::engine::pool_space::PoolSpace;
use datapath::engine::ports::DeviceIndex;
use datapath::engine::shard::{NodeConfig, Shard, ShardPool, shard_of_lane, split};
use datapath::limits::VOLUME_BYTES_MAX;
use datapath::memory::Pages;
use datapath::reactor::pool_file::{PoolFile, PoolFileError};
use datapath::reactor::{Arena, ArenaLayout};
use datapath::record::VolumeNumber;
use datapath::store::bugs::Bugs;
use datapath::store::checkpoint_body::VolumeRecord;
use datapath::store::format::format_writes;
use datapath::store::lane::{AckPolicy, Lane, LaneConfig};
use datapath::store::layout::{Layout, LayoutError};
use datapath::store::recovery::{PoolReader, Recovered, RecoveryError, read_layout, recover_lane};
use datapath::units::{BLOCK_BYTES, BLOCK_BYTES_U64};
use thiserror::Error;

use crate::random::random_bytes;
use crate::serve::VolumeConfig;
use crate::size::Size;
use crate::volume_name::VolumeName;

/// Lanes of a new pool: as many threads can share it.
pub const LANES: u32 = 4;
/// Memory for the requests of one shard's clients.
const REQUEST_MEMORY_BYTES: u32 = 64 << 20;
/// Log after which a lane writes a checkpoint: a restart reads less than this of each lane.
const CHECKPOINT_LOG_BYTES: u64 = 256 << 20;
/// Memory for the map unless told otherwise: all of a volume of 4 TiB.
const MAP_CACHE_BYTES: u64 = 8 << 30;

/// Why pools cannot be served.
#[derive(Debug, Error)]
pub enum PoolsError {
    /// The pool's file.
    #[error(transparent)]
    File(#[from] PoolFileError),
    /// The pool cannot be laid out.
    #[error("{path}: {source}")]
    Layout {
        /// Which pool.
        path: PathBuf,
        /// Why.
        #[source]
        source: LayoutError,
    },
    /// The pool cannot be recovered.
    #[error("{path}: {source}")]
    Recovery {
        /// Which pool.
        path: PathBuf,
        /// Why.
        #[source]
        source: RecoveryError,
    },
    /// The pool cannot be written.
    #[error("{path}: {source}")]
    Write {
        /// Which pool.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A replica of a cluster's volume would be changed behind its head's back.
    #[error(
        "volume {name} is a replica of a cluster's volume: start the pool's node, or serve it with --read-only and the size it has"
    )]
    Replica {
        /// Its name.
        name: String,
    },
    /// A replica is half filled: what it holds is no state that the volume ever had.
    #[error("volume {name} is a replica that is half filled: only its node can make it whole")]
    HalfFilled {
        /// Its name.
        name: String,
    },
    /// A volume would shrink.
    #[error("volume {name} has {has} bytes and cannot shrink to {wanted}; give its size or more")]
    Shrink {
        /// Its name.
        name: VolumeName,
        /// Its size.
        has: u64,
        /// The size asked for.
        wanted: u64,
    },
    /// A volume's size is not usable.
    #[error("volume {name}: the size must be a multiple of {BLOCK_BYTES} bytes, above 0 and at most 16T")]
    Size {
        /// Its name.
        name: VolumeName,
    },
    /// Two pools, or two lanes, have volumes of one name.
    #[error("two volumes are named {0}")]
    TwoOfAName(String),
    /// No memory for buffers.
    #[error("no memory for the buffers of a shard: {0}")]
    Memory(std::io::Error),
    /// No randomness.
    #[error("cannot read random bytes: {0}")]
    Random(std::io::Error),
}

/// How lanes are to work.
#[derive(Clone, Copy, Debug)]
pub struct LaneSettings {
    /// When changes are answered.
    pub ack: AckPolicy,
    /// Memory for the map of all volumes.
    pub map_cache: Option<Size>,
    /// Refuse every change.
    pub read_only: bool,
}

/// Reads a pool for recovery and tools.
#[derive(Debug)]
pub struct Reader<'p>(pub &'p PoolFile);

impl PoolReader for Reader<'_> {
    fn len_bytes(&self) -> u64 {
        self.0.length_bytes()
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        self.0.read_at(offset_bytes, into).is_ok()
    }
}

/// Makes a file with an empty pool. One that cannot be finished is removed.
///
/// # Errors
/// If there is something of that name, or no pool can be made of this size.
pub fn create_pool(path: &Path, size: Size, lanes: u32) -> Result<PoolFile, PoolsError> {
    let layout = Layout::for_new_pool([0; 16], size.bytes, lanes);
    layout.map_err(|source| PoolsError::Layout { path: path.to_owned(), source })?;
    let pool = PoolFile::create(path, size.bytes)?;
    if let Err(error) = format_pool(&pool, lanes) {
        // Ours, and of no use to anybody.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(pool)
}

/// Makes a file of zeroes into an empty pool.
///
/// # Errors
/// [`PoolsError::Layout`], [`PoolsError::Write`] and [`PoolsError::Random`].
pub fn format_pool(pool: &PoolFile, lanes: u32) -> Result<Layout, PoolsError> {
    let path = || pool.path().to_owned();
    let layout =
        Layout::for_new_pool(random_bytes().map_err(PoolsError::Random)?, pool.length_bytes(), lanes)
            .map_err(|source| PoolsError::Layout { path: path(), source })?;
    let write = |source| PoolsError::Write { path: path(), source };
    let writes = format_writes(&layout);
    let (first_header, others) = writes.split_last().expect("a format writes headers");
    for block in others {
        pool.write_at(block.place.offset_bytes(), &block.block[..]).map_err(write)?;
    }
    pool.sync().map_err(write)?;
    pool.write_at(first_header.place.offset_bytes(), &first_header.block[..]).map_err(write)?;
    pool.sync().map_err(write)?;
    Ok(layout)
}

/// A pool whose lanes were recovered.
#[derive(Debug)]
pub struct RecoveredPool {
    /// What its header says.
    pub layout: Layout,
    /// Its lanes.
    pub lanes: Vec<Recovered>,
    is_file: bool,
}

/// Reads a pool's header and recovers its lanes, side by side: a start waits for the slowest, not for the sum.
///
/// # Errors
/// [`PoolsError::Recovery`].
pub fn recover_pool(pool: &PoolFile, settings: &LaneSettings) -> Result<RecoveredPool, PoolsError> {
    let recovery = |source| PoolsError::Recovery { path: pool.path().to_owned(), source };
    let layout = read_layout(&mut Reader(pool)).map_err(recovery)?;
    let cache_bytes = settings.map_cache.map_or(MAP_CACHE_BYTES, |size| size.bytes) / u64::from(layout.lanes);
    let recover = |lane| recover_lane(&mut Reader(pool), layout, lane, cache_bytes, Bugs::none());
    let lanes = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..layout.lanes).map(|lane| scope.spawn(move || recover(lane).map_err(recovery))).collect();
        let joined = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        joined
            .map(|lane| lane.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<Vec<_>, _>>()
    })?;
    Ok(RecoveredPool { layout, lanes, is_file: pool.is_regular_file() })
}

impl RecoveredPool {
    /// Numbers of the volumes in it.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeNumber> + '_ {
        self.lanes.iter().flat_map(|lane| &lane.volumes).map(|volume| VolumeNumber(volume.number))
    }

    /// Bytes that volumes may use in it, if it has this length.
    #[must_use]
    pub fn capacity_bytes(&self, length_bytes: u64) -> u64 {
        Lane::capacity_blocks_of(&self.layout, self.layout.segments_in(length_bytes)) * BLOCK_BYTES_U64
    }
}

/// Makes the shards of a process that serves all pools, with new volumes in the first one. A node has one.
///
/// # Errors
/// Everything in [`PoolsError`] that concerns volumes and memory.
///
/// # Panics
/// Without shards.
pub fn build_shards(
    mut pools: Vec<RecoveredPool>,
    lengths_bytes: &[u64],
    volumes: &[VolumeConfig],
    settings: &LaneSettings,
    shards: usize,
    node: Option<NodeConfig>,
) -> Result<Vec<Shard<Arena>>, PoolsError> {
    if node.is_none() {
        refuse_replicas(&pools, settings.read_only)?;
    }
    let wishes = place_volumes(&mut pools, volumes)?;
    let mut arenas = make_arenas(&pools, shards)?;
    let mut wishes = wishes.into_iter();
    let mut shard_pools = Vec::new();
    let mut number = 0;
    for (index, (pool, length_bytes)) in (0..).zip(pools.into_iter().zip(lengths_bytes)) {
        let mut lanes = Vec::new();
        for (lane, recovered) in (0..).zip(pool.lanes) {
            let config = LaneConfig {
                lane,
                layout: pool.layout,
                ack: settings.ack,
                checkpoint_log_bytes: CHECKPOINT_LOG_BYTES,
                bugs: Bugs::none(),
            };
            let (_, pages) = &mut arenas[shard_of_lane(number, shards)];
            number += 1;
            let mut lane = Lane::new(config, recovered, pages);
            wishes
                .next()
                .expect("one list for each lane")
                .into_iter()
                .for_each(|record| lane.put_volume(record));
            lanes.push(lane);
        }
        let segments = pool.layout.segments_in(*length_bytes);
        let space = PoolSpace::new(pool.layout, segments, lanes.iter().map(Lane::segments), pool.is_file);
        shard_pools.push(ShardPool { device: DeviceIndex(index), lanes, space });
    }
    let parts = split(shard_pools, u16::try_from(shards).expect("few shards"));
    let shards = parts.into_iter().zip(arenas);
    Ok(shards
        .map(|(part, (arena, pages))| Shard::of_part(arena, pages, part, settings.read_only, node))
        .collect())
}

/// Memory for each shard: for its clients, and for the lanes that it runs.
fn make_arenas(pools: &[RecoveredPool], shards: usize) -> Result<Vec<(Arena, Pages)>, PoolsError> {
    let mut bytes = vec![REQUEST_MEMORY_BYTES; shards];
    let lanes = pools.iter().flat_map(|pool| pool.lanes.iter().map(|_| Lane::pages_needed(&pool.layout)));
    for (lane, pages) in lanes.enumerate() {
        bytes[shard_of_lane(lane, shards)] += pages * BLOCK_BYTES;
    }
    let arena = |engine_bytes| {
        let layout = ArenaLayout { engine_bytes, ..ArenaLayout::default() };
        let arena = Arena::new(layout).map_err(PoolsError::Memory)?;
        let pages = Pages::new(arena.engine_range());
        Ok((arena, pages))
    };
    bytes.into_iter().map(arena).collect()
}

/// What a head numbers must not be numbered by somebody else: the replicas would differ, and nobody would know.
fn refuse_replicas(pools: &[RecoveredPool], read_only: bool) -> Result<(), PoolsError> {
    let lanes = pools.iter().flat_map(|pool| &pool.lanes);
    for record in lanes.flat_map(|lane| &lane.volumes).filter(|record| record.replicated) {
        let name = record.name.clone();
        if record.filling {
            return Err(PoolsError::HalfFilled { name });
        }
        if !read_only {
            return Err(PoolsError::Replica { name });
        }
    }
    Ok(())
}

/// For each lane of each pool: the volumes to make or grow there.
fn place_volumes(
    pools: &mut [RecoveredPool],
    volumes: &[VolumeConfig],
) -> Result<Vec<Vec<VolumeRecord>>, PoolsError> {
    let lanes: Vec<_> = pools.iter().flat_map(|pool| &pool.lanes).collect();
    let mut names = std::collections::BTreeSet::new();
    for record in lanes.iter().flat_map(|lane| &lane.volumes) {
        if !names.insert(record.name.clone()) {
            return Err(PoolsError::TwoOfAName(record.name.clone()));
        }
    }
    let mut wishes: Vec<Vec<VolumeRecord>> = lanes.iter().map(|_| Vec::new()).collect();
    let numbers = lanes.iter().flat_map(|lane| &lane.volumes).map(|record| record.number);
    let mut number = numbers.max().unwrap_or(0);
    let new_lanes = pools.first().map_or(0, |pool| pool.lanes.len());
    for volume in volumes {
        let bytes = volume.size.bytes;
        if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES_U64) || bytes > VOLUME_BYTES_MAX {
            return Err(PoolsError::Size { name: volume.name.clone() });
        }
        let size_blocks = bytes / BLOCK_BYTES_U64;
        let named = |record: &&VolumeRecord| record.name == volume.name.as_str();
        let existing = lanes
            .iter()
            .enumerate()
            .find_map(|(lane, known)| Some((lane, known.volumes.iter().find(named)?)));
        if let Some((lane, record)) = existing {
            if size_blocks < record.size_blocks {
                let has = record.size_blocks * BLOCK_BYTES_U64;
                return Err(PoolsError::Shrink { name: volume.name.clone(), has, wanted: bytes });
            }
            if record.replicated && size_blocks != record.size_blocks {
                return Err(PoolsError::Replica { name: record.name.clone() });
            }
            wishes[lane].push(VolumeRecord { size_blocks, ..record.clone() });
            continue;
        }
        if wishes.iter().flatten().any(|record| record.name == volume.name.as_str()) {
            return Err(PoolsError::TwoOfAName(volume.name.to_string()));
        }
        number += 1;
        let load = |lane: &usize| lanes[*lane].volumes.len() + wishes[*lane].len();
        let lane = (0..new_lanes).min_by_key(load).expect("a pool has lanes");
        wishes[lane].push(VolumeRecord {
            number,
            epoch: 1,
            size_blocks,
            sequence: 0,
            identity: random_bytes().map_err(PoolsError::Random)?,
            name: volume.name.to_string(),
            ..VolumeRecord::default()
        });
    }
    Ok(wishes)
}
