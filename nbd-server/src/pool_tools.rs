//! `berth pool`: work on a pool that nobody serves. The lock on its file keeps servers out meanwhile.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use datapath::reactor::affinity::{AffinityError, CpuList};
use datapath::reactor::features::{Features, MaskError};
use datapath::reactor::pool_file::{PoolFile, PoolFileError};
use datapath::store::format::emptied_root;
use datapath::store::lane::{AckPolicy, Lane};
use datapath::store::layout::{ANCHORS, FORMAT_VERSION, Layout, LayoutError};
use datapath::store::recovery::{PoolReader, Recovered, RecoveryError, read_layout};
use datapath::store::root::Root;
use datapath::units::{BLOCK_BYTES_U64, BLOCK_BYTES_USIZE};
use serde::Serialize;
use thiserror::Error;

use crate::pools::{
    LaneSettings, PoolsError, Reader, RecoveredPool, build_shards, create_pool, format_pool, recover_pool,
};
use crate::shards::{Shards, ShardsConfig, ShardsError};
use crate::size::Size;
use crate::stop::Stop;
use crate::volume_name::VolumeName;

/// A start of the file that is zero to here holds no pool, not even one with a damaged header.
const BLANK_BYTES: usize = 1 << 20;

/// Tools read a map once from end to end, and need no more of it at a time.
pub(crate) const SETTINGS: LaneSettings =
    LaneSettings { ack: AckPolicy::Durable, map_cache: Some(Size { bytes: 64 << 20 }), read_only: true };

/// Why a tool did not do its work.
#[derive(Debug, Error)]
pub enum PoolToolError {
    /// The pool's file.
    #[error(transparent)]
    File(#[from] PoolFileError),
    /// The pool's content.
    #[error(transparent)]
    Content(#[from] PoolsError),
    /// A new file needs a size.
    #[error("{0}: there is no such file; give --size to make it")]
    SizeNeeded(PathBuf),
    /// Formatting would destroy something.
    #[error("{path}: holds {what}; --force destroys it")]
    Occupied {
        /// Which.
        path: PathBuf,
        /// What is in it.
        what: &'static str,
    },
    /// No volume of this name.
    #[error("{path}: has no volume {name}; it has: {has}")]
    NoVolume {
        /// Which.
        path: PathBuf,
        /// The name asked for.
        name: VolumeName,
        /// The names that there are.
        has: String,
    },
    /// The processors that this process may use.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The mask of features.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The shard that writes the change.
    #[error(transparent)]
    Shards(#[from] ShardsError),
    /// A write or a sync failed.
    #[error("{0}: the device failed; whether the change was made shows when the pool is opened again")]
    DeviceFailed(PathBuf),
}

/// What `format` made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Formatted {
    /// Where.
    pub path: PathBuf,
    /// Identity of the new pool, in hexadecimal.
    pub id: String,
    /// Its length in bytes.
    pub length_bytes: u64,
    /// Its lanes.
    pub lanes: u32,
}

/// Makes an empty pool: of a new file of `size`, or of what exists if that is blank, or `force` is given.
///
/// # Errors
/// If there is something in it, or no pool can be made of it.
pub fn format(path: &Path, size: Option<Size>, lanes: u32, force: bool) -> Result<Formatted, PoolToolError> {
    let exists = path.try_exists().map_err(|source| PoolFileError::Open { path: path.to_owned(), source })?;
    let pool = if exists {
        reformat(path, size, lanes, force)?
    } else {
        let size = size.ok_or_else(|| PoolToolError::SizeNeeded(path.to_owned()))?;
        create_pool(path, size, lanes)?
    };
    let layout = layout_of(&pool)?;
    Ok(Formatted {
        path: path.to_owned(),
        id: hexadecimal(&layout.pool_id),
        length_bytes: pool.length_bytes(),
        lanes: layout.lanes,
    })
}

fn reformat(path: &Path, size: Option<Size>, lanes: u32, force: bool) -> Result<PoolFile, PoolToolError> {
    let mut pool = PoolFile::open(path)?;
    if let Some(what) = content_of(&pool)?.filter(|_| !force) {
        return Err(PoolToolError::Occupied { path: path.to_owned(), what });
    }
    let wanted = size.map_or_else(|| pool.length_bytes(), |size| size.bytes);
    // Before anything is destroyed for a pool that cannot be.
    Layout::for_new_pool([0; 16], wanted, lanes)
        .map_err(|source| PoolsError::Layout { path: path.to_owned(), source })?;
    pool.grow(wanted)?;
    pool.erase()?;
    format_pool(&pool, lanes)?;
    Ok(pool)
}

/// What would be destroyed, if anything.
fn content_of(pool: &PoolFile) -> Result<Option<&'static str>, PoolToolError> {
    let length = usize::try_from(pool.length_bytes()).unwrap_or(usize::MAX).min(BLANK_BYTES);
    let mut start = vec![0; length];
    pool.read_at(0, &mut start).map_err(|source| PoolFileError::Io {
        path: pool.path().to_owned(),
        step: "read",
        source,
    })?;
    if start.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let header = start.first_chunk::<BLOCK_BYTES_USIZE>().map(Layout::decode);
    let is_pool = header.is_some_and(|header| header != Err(LayoutError::NotAPool));
    Ok(Some(if is_pool { "a Berth pool" } else { "data that is not a Berth pool" }))
}

/// What `inspect` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Where.
    pub path: PathBuf,
    /// Identity of the pool, in hexadecimal.
    pub id: String,
    /// Version of the format.
    pub format_version: u32,
    /// Length in bytes.
    pub length_bytes: u64,
    /// Bytes in a segment.
    pub segment_bytes: u32,
    /// Segments.
    pub segments: u32,
    /// Segments that belong to no lane and hold no header.
    pub segments_free: u32,
    /// The segments of the headers and roots.
    pub anchors: Vec<u32>,
    /// Good copies of the header, of four.
    pub headers_good: u32,
    /// The lanes.
    pub lanes: Vec<LaneInspection>,
}

/// A lane of [`Inspection`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LaneInspection {
    /// Its number.
    pub lane: u32,
    /// Number of its last checkpoint.
    pub checkpoint: u64,
    /// How often it was opened.
    pub mount: u64,
    /// Copies of the root that state that checkpoint, of four.
    pub roots_good: u32,
    /// Number of the last batch.
    pub last_batch: u64,
    /// Batches after the checkpoint.
    pub batches_after_checkpoint: u64,
    /// Its segments.
    pub segments: u32,
    /// Blocks that something refers to, leaves and checkpoint included.
    pub live_blocks: u64,
    /// Its volumes.
    pub volumes: Vec<VolumeInspection>,
}

/// A volume of [`LaneInspection`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumeInspection {
    /// Its name.
    pub name: String,
    /// Its number in the pool.
    pub number: u32,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Its identity, in hexadecimal.
    pub identity: String,
    /// Epoch of its last change.
    pub epoch: u32,
    /// Sequence of its last change.
    pub sequence: u64,
    /// Blocks that hold data.
    pub live_blocks: u64,
}

/// Describes a pool.
///
/// # Errors
/// If it is in use or cannot be recovered.
pub fn inspect(path: &Path) -> Result<Inspection, PoolToolError> {
    let pool = PoolFile::open(path)?;
    let mut recovered = recover_pool(&pool, &SETTINGS)?;
    let layout = recovered.layout;
    let mut reader = Reader(&pool);
    let mut lanes = Vec::new();
    for (number, lane) in (0..).zip(&mut recovered.lanes) {
        lanes.push(inspect_lane(&pool, &mut reader, &layout, number, lane)?);
    }
    let segments = layout.segments_in(pool.length_bytes());
    let owned: u32 = lanes.iter().map(|lane| lane.segments).sum();
    let headers_good = (0..ANCHORS).filter(|anchor| header_is_good(&mut reader, &layout, *anchor)).count();
    Ok(Inspection {
        path: path.to_owned(),
        id: hexadecimal(&layout.pool_id),
        format_version: FORMAT_VERSION,
        length_bytes: pool.length_bytes(),
        segment_bytes: layout.segment_bytes(),
        segments,
        segments_free: segments - ANCHORS - owned,
        anchors: (0..ANCHORS).map(|anchor| layout.anchor(anchor).0).collect(),
        headers_good: u32::try_from(headers_good).expect("four"),
        lanes,
    })
}

fn inspect_lane(
    pool: &PoolFile,
    reader: &mut Reader<'_>,
    layout: &Layout,
    number: u32,
    lane: &mut Recovered,
) -> Result<LaneInspection, PoolToolError> {
    let mut volumes = Vec::new();
    for (position, record) in lane.volumes.clone().into_iter().enumerate() {
        let mut live_blocks = 0;
        lane.visit_blocks(reader, position, |_, _| live_blocks += 1).map_err(recovery_error(pool))?;
        volumes.push(VolumeInspection {
            name: record.name,
            number: record.number,
            size_bytes: record.size_blocks * BLOCK_BYTES_U64,
            identity: hexadecimal(&record.identity),
            epoch: record.epoch,
            sequence: record.sequence,
            live_blocks,
        });
    }
    let roots = (0..ANCHORS).filter_map(|slot| read_root(reader, layout, number, slot));
    let roots_good = roots.filter(|root| root.checkpoint == lane.checkpoint).count();
    Ok(LaneInspection {
        lane: number,
        checkpoint: lane.checkpoint,
        mount: lane.mount,
        roots_good: u32::try_from(roots_good).expect("four"),
        last_batch: lane.last_number,
        batches_after_checkpoint: lane.batches_rolled_forward,
        segments: lane.segments.owned_count(),
        live_blocks: lane.segments.live_total(),
        volumes,
    })
}

/// Is this copy of the header what all should be?
pub(crate) fn header_is_good(reader: &mut Reader<'_>, layout: &Layout, anchor: u32) -> bool {
    let mut block = [0; BLOCK_BYTES_USIZE];
    let place = layout.place(layout.anchor(anchor), 0);
    reader.read_at(place.offset_bytes(), &mut block) && block == layout.encode()
}

/// One of the four roots of a lane.
pub(crate) fn read_root(reader: &mut Reader<'_>, layout: &Layout, lane: u32, slot: u32) -> Option<Root> {
    let mut block = [0; BLOCK_BYTES_USIZE];
    let readable = reader.read_at(layout.root_place(lane, slot).offset_bytes(), &mut block);
    if readable { Root::decode(&block, lane, &layout.pool_id) } else { None }
}

/// What `grow` did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Grown {
    /// Where.
    pub path: PathBuf,
    /// Length before, in bytes.
    pub from_bytes: u64,
    /// Length now, in bytes.
    pub to_bytes: u64,
}

/// Makes a pool's file longer. The new segments are there from the next start on.
///
/// # Errors
/// If it would shrink, is no pool, or there is no space.
pub fn grow(path: &Path, size: Size) -> Result<Grown, PoolToolError> {
    let mut pool = PoolFile::open(path)?;
    layout_of(&pool)?;
    Layout::for_new_pool([0; 16], size.bytes.max(pool.length_bytes()), 1)
        .map_err(|source| PoolsError::Layout { path: path.to_owned(), source })?;
    let from_bytes = pool.length_bytes();
    pool.grow(size.bytes)?;
    Ok(Grown { path: path.to_owned(), from_bytes, to_bytes: pool.length_bytes() })
}

/// What `rm-volume` did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// From where.
    pub path: PathBuf,
    /// The volume.
    pub name: String,
    /// Its identity, in hexadecimal.
    pub identity: String,
    /// Blocks of data that it held.
    pub released_blocks: u64,
}

/// Removes a volume and its data. After a loss of power it is there in full or gone.
///
/// # Errors
/// If there is no such volume, or its map is damaged.
pub fn remove_volume(path: &Path, name: &VolumeName) -> Result<Removed, PoolToolError> {
    let pool = PoolFile::open(path)?;
    let mut recovered = recover_pool(&pool, &SETTINGS)?;
    let found = recovered.lanes.iter().enumerate().find_map(|(lane, known)| {
        Some((lane, known.volumes.iter().position(|record| record.name == name.as_str())?))
    });
    let Some((lane, volume)) = found else {
        let names = recovered.lanes.iter().flat_map(|lane| &lane.volumes).map(|record| record.name.as_str());
        let has = names.collect::<Vec<_>>().join(", ");
        let has = if has.is_empty() { "none".to_owned() } else { has };
        return Err(PoolToolError::NoVolume { path: path.to_owned(), name: name.clone(), has });
    };
    let identity = hexadecimal(&recovered.lanes[lane].volumes[volume].identity);
    let released_blocks =
        recovered.lanes[lane].remove_volume(&mut Reader(&pool), volume).map_err(recovery_error(&pool))?;
    if recovered.lanes[lane].volumes.is_empty() {
        empty_lane(&pool, &recovered, lane)?;
    } else {
        write_checkpoints(&pool, recovered)?;
    }
    Ok(Removed { path: path.to_owned(), name: name.to_string(), identity, released_blocks })
}

/// A lane without volumes writes no checkpoints: its roots become those of a new lane, in the order of a checkpoint's.
fn empty_lane(pool: &PoolFile, recovered: &RecoveredPool, lane: usize) -> Result<(), PoolToolError> {
    let layout = &recovered.layout;
    let number = u32::try_from(lane).expect("few lanes");
    let root = emptied_root(layout, number, &recovered.lanes[lane]).encode();
    let write = |source| PoolsError::Write { path: pool.path().to_owned(), source };
    // What was rolled forward may not be on stable media yet; the old root needs it until the new one stands.
    pool.sync().map_err(write)?;
    let order = recovered.lanes[lane].root_order;
    for slots in order.chunks_exact(2) {
        for slot in slots.iter().copied() {
            pool.write_at(layout.root_place(number, slot).offset_bytes(), &root).map_err(write)?;
        }
        pool.sync().map_err(write)?;
    }
    Ok(())
}

/// Does what a server does at its start and end, without a client in between.
fn write_checkpoints(pool: &PoolFile, recovered: RecoveredPool) -> Result<(), PoolToolError> {
    let shards = build_shards(vec![recovered], &[pool.length_bytes()], &[], &SETTINGS, 1, None)?;
    let features = Features::allowed_by_environment()?;
    let cpus = CpuList::allowed()?.assign(None, Some(1))?;
    let config = ShardsConfig {
        listeners: &[],
        peer_listeners: &[],
        outside: None,
        devices: vec![pool.file()],
        cpus,
        features,
    };
    let shards = Shards::start(shards, &config)?;
    let (sender, stops) = channel();
    sender.send(Stop::Drain).expect("the receiver is here");
    drop(sender);
    let shards = shards.run(stops)?;
    if shards.iter().flat_map(|shard| shard.lanes()).any(Lane::has_failed) {
        return Err(PoolToolError::DeviceFailed(pool.path().to_owned()));
    }
    Ok(())
}

pub(crate) fn layout_of(pool: &PoolFile) -> Result<Layout, PoolToolError> {
    read_layout(&mut Reader(pool)).map_err(recovery_error(pool))
}

fn recovery_error(pool: &PoolFile) -> impl FnOnce(RecoveryError) -> PoolToolError {
    |source| PoolsError::Recovery { path: pool.path().to_owned(), source }.into()
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all");
        text
    })
}
