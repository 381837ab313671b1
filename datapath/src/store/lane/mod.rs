//! A lane: the volumes of a pool that one thread appends for, their log, their map and their cleaner.
//!
//! ```text
//!   change ──▶ leaves here? ──▶ space? ──▶ open batch ──▶ device ──▶ (sync) ──▶ map, answer
//!   read   ──▶ leaves here? ──▶ device ──▶ checksums  ──▶ answer
//! ```
//!
//! Requests come in through [`Lane::write`], [`Lane::read`] and their like, device results through
//! [`Lane::handle_disk`]; [`Lane::upkeep`] runs once per turn and starts what has gathered. Effects and answers
//! are polled. One owner, one event at a time: nothing here waits, and nothing here is shared.

mod append;
mod change;
mod changed;
mod checkpoint;
mod cleaner;
mod fetch;
mod fill;
mod leaf;
mod read;
mod removal;
mod room;
mod space;
mod stamped;
mod stream;
mod sync;
#[cfg(test)]
mod tests;
mod zeroing;

use super::batch::BATCH_PAYLOAD_BLOCKS_MAX;
use super::bugs::Bugs;
use super::checkpoint_body::VolumeRecord;
use super::layout::{Layout, Place, SegmentIndex};
use super::map::{Map, Mapping};
use super::recovery::{LogEnd, Recovered};
use super::root::LOGGED_STREAMS;
use super::segment::SegmentTable;
use super::slab::Slab;
use crate::memory::{Memory, Pages};
use crate::record::Stamp;
use crate::request::RequestError;
use crate::units::{BLOCK_BYTES, MemoryRange};
use change::Change;
use changed::Walk;
use checkpoint::Checkpointer;
use cleaner::Cleaner;
use fetch::Fetch;
use leaf::LeafLoads;
use read::Read;
use removal::Removal;
use stamped::{Numbering, Order};
use std::collections::VecDeque;
use stream::{Stream, StreamKind};
use sync::Syncer;
use zeroing::{ZERO_PAGES, Zeroing};

pub use change::Release;
pub use changed::{Changed, Extent};
pub use fetch::{FetchOutcome, Fetched};
pub use read::{BlockBits, BlocksRead, HoleMap};
pub use room::{NewBlocks, RoomPromised};

/// When is a change answered?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckPolicy {
    /// When the device has completed it and all before it: what a plain disk promises. FLUSH and FUA make it last.
    Device,
    /// When it and all before it are on stable media. FLUSH is then a barrier without work.
    Durable,
}

/// What a lane is told when it starts.
#[derive(Clone, Copy, Debug)]
pub struct LaneConfig {
    /// Its number in the pool.
    pub lane: u32,
    /// The pool's layout.
    pub layout: Layout,
    /// When changes are answered.
    pub ack: AckPolicy,
    /// Log bytes after which a checkpoint is written, so that a restart has less than that to read.
    pub checkpoint_log_bytes: u64,
    /// Mistakes planted by the simulator.
    pub bugs: Bugs,
}

/// The lane's number for one of its device operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskToken(pub u32);

/// What a lane wants of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskEffect {
    /// Read blocks.
    Read {
        /// Comes back in [`Lane::handle_disk`].
        token: DiskToken,
        /// From where.
        place: Place,
        /// Into what.
        memory: MemoryRange,
    },
    /// Write blocks.
    Write {
        /// Comes back in [`Lane::handle_disk`].
        token: DiskToken,
        /// To where.
        place: Place,
        /// From what.
        memory: MemoryRange,
    },
    /// Bring all writes that have completed to stable media.
    Sync {
        /// Comes back in [`Lane::handle_disk`].
        token: DiskToken,
    },
}

/// The answer to a request.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// What the caller named the request.
    pub cookie: u32,
    /// How it ended.
    pub result: Result<(), RequestError>,
    /// For a read: which of its blocks are holes.
    pub holes: HoleMap,
    /// For a read: of what, and what is damaged of it.
    pub read: Option<BlocksRead>,
}

/// A run of memory that holds blocks to be written, with one more page in front for their descriptor.
#[derive(Clone, Copy, Debug)]
pub struct OwnedPayload {
    /// The whole run. The lane returns it to the page allocator when it is done.
    pub whole: MemoryRange,
}

/// Whose memory holds the blocks to be written. Either way the lane writes their descriptor into the page in front.
#[derive(Clone, Copy, Debug)]
pub enum Payload {
    /// The lane's, which gives it back.
    Owned(OwnedPayload),
    /// The caller's: the lane reads it until the request is answered and never gives it back. It begins with the page in
    /// front. Nobody changes it meanwhile.
    Lent(MemoryRange),
}

impl Payload {
    fn whole(self) -> MemoryRange {
        match self {
            Payload::Owned(OwnedPayload { whole }) | Payload::Lent(whole) => whole,
        }
    }

    fn blocks(self) -> MemoryRange {
        self.whole().part(BLOCK_BYTES, self.whole().len - BLOCK_BYTES)
    }

    /// It was not written, or copied.
    fn let_go(self, pages: &mut Pages) {
        if let Payload::Owned(OwnedPayload { whole }) = self {
            pages.release(whole);
        }
    }
}

/// Blocks of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// The volume, by its position in the lane.
    pub volume: u32,
    /// The first block.
    pub block: u32,
    /// How many; within two leaves and one piece.
    pub count: u32,
}

/// The memory that a lane's methods work on; owned by the shard, lent for each call.
#[derive(Debug)]
pub struct Context<'a, M> {
    /// All of it.
    pub memory: &'a mut M,
    /// The allocator of its pages.
    pub pages: &'a mut Pages,
}

/// A pool as one of its lanes sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolShare {
    /// Segments of the pool, without its anchors.
    pub segments: u32,
    /// Of these, segments that no lane has borrowed.
    pub free: u32,
    /// Segments that the other lanes cannot do without.
    pub needed_elsewhere: u32,
    /// Another lane waits for segments: clean for its sake.
    pub others_are_hungry: bool,
    /// Another lane may still give segments back.
    pub others_may_give: bool,
    /// There may be more than what is left here: other shards have been, or will be, asked for what they do not need.
    pub room_may_come: bool,
}

/// What a lane has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneCounters {
    /// Blocks that clients wrote.
    pub client_blocks_written: u64,
    /// Blocks written to the device: everything.
    pub device_blocks_written: u64,
    /// Of these, blocks that the cleaner moved.
    pub moved_blocks: u64,
    /// Of these, leaves and checkpoint bodies.
    pub map_blocks_written: u64,
    /// Of these, zeroes written ahead of first use.
    pub zero_blocks_written: u64,
    /// Batches written.
    pub batches: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
    /// Segments emptied by the cleaner.
    pub cleaned_segments: u64,
    /// Syncs of the device.
    pub syncs: u64,
    /// Blocks whose checksum was wrong.
    pub checksum_errors: u64,
    /// Damaged blocks that were given up.
    pub lost_blocks: u64,
    /// Device operations that failed.
    pub device_errors: u64,
    /// Changes that had to wait for space.
    pub waits_for_space: u64,
    /// Changes refused for want of space.
    pub refused_no_space: u64,
}

/// A volume of the lane.
#[derive(Debug)]
pub struct Volume {
    /// What a checkpoint keeps of it. Epoch and sequence are those of the last change in effect.
    pub record: VolumeRecord,
    /// The last change that is on its way into the log, or there.
    numbered: Stamp,
    numbering: Numbering,
    order: Order,
    removal: Option<Removal>,
}

enum Operation {
    Read(u32),
    LeafLoad { frame: super::map::FrameIndex, memory: MemoryRange },
    Batch { stream: StreamKind, number: u64 },
    Fetch(u32),
    Walk(u32),
    Sync,
    VictimRead,
    RootWrite,
    ZeroWrite,
}

impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Operation::Read(_) => "Read",
            Operation::LeafLoad { .. } => "LeafLoad",
            Operation::Batch { .. } => "Batch",
            Operation::Fetch(_) => "Fetch",
            Operation::Walk(_) => "Walk",
            Operation::Sync => "Sync",
            Operation::VictimRead => "VictimRead",
            Operation::RootWrite => "RootWrite",
            Operation::ZeroWrite => "ZeroWrite",
        })
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Lane {
    config: LaneConfig,
    mount: u64,
    /// Number of the last batch given out.
    last_number: u64,
    /// Counts the uses of segments in this mount.
    generation: u64,
    /// Where the streams go on when this mount begins.
    log_ends: [Option<LogEnd>; LOGGED_STREAMS],
    map_end: Option<(SegmentIndex, u32)>,
    volumes: Vec<Volume>,
    map: Map,
    segments: SegmentTable,
    pool_share: PoolShare,
    streams: [Stream; 3],
    /// Buffers of small batches that are not in use.
    batch_buffers: Vec<MemoryRange>,
    /// For the second descriptor of a run that is cut in two, when requests that wait for it hold all other memory.
    split_page: Option<MemoryRange>,
    operations: Slab<Operation>,
    effects: VecDeque<DiskEffect>,
    completions: VecDeque<Completion>,
    reads: Slab<Read>,
    fetches: Slab<Fetch>,
    fetched: VecDeque<Fetched>,
    walks: Slab<Walk>,
    changed: VecDeque<Changed>,
    changes: Slab<Change>,
    /// Changes that wait for space or buffers, in order: those with payload and those without.
    blocked: [VecDeque<u32>; 2],
    /// Blocks that changes under way may add to the volumes.
    unapplied_new_blocks: u64,
    /// Leaves that changes under way will make dirty; one that several change counts several times.
    unapplied_leaves: u64,
    /// A change waits because there may be more room elsewhere.
    is_short: bool,
    /// Promises in effect that may not be on stable media: batch number, volume, epoch.
    unsynced_promises: Vec<(u64, u32, u32)>,
    leaf_loads: LeafLoads,
    syncer: Syncer,
    checkpointer: Checkpointer,
    cleaner: Cleaner,
    zeroing: Zeroing,
    /// Volumes that are being taken out.
    removals: u32,
    sweep_goes_on: bool,
    /// A write or sync failed: what the device holds is uncertain, nothing more is written until a restart has
    /// verified the log.
    failed: bool,
    /// Emptied vectors, kept for their capacity.
    record_vectors: Vec<Vec<stream::Record>>,
    spare_mappings: Vec<Vec<Mapping>>,
    counters: LaneCounters,
}

/// Pages of a buffer for small batches: a descriptor and its payload.
pub(super) const BATCH_BUFFER_PAGES: u32 = 128;
const BATCH_BUFFERS: u32 = 10;
/// Buffers that the clients' stream leaves to the cleaner and the checkpoints.
const BATCH_BUFFERS_KEPT: usize = 4;
const LEAF_PAGES: u32 = 64;
/// Segments that a lane borrows at a time, when it has fewer left.
const SEGMENTS_IN_STOCK: u32 = 8;
/// Segments that hold no client data: open and next ones of three streams, and room for the cleaner to work in.
const WORKING_SEGMENTS: u32 = 14;

const _: () = assert!(BATCH_BUFFER_PAGES <= BATCH_PAYLOAD_BLOCKS_MAX);

impl Lane {
    /// Pages that a lane takes for itself when it starts.
    #[must_use]
    pub fn pages_needed(layout: &Layout) -> u32 {
        BATCH_BUFFERS * BATCH_BUFFER_PAGES + LEAF_PAGES + ZERO_PAGES + layout.segment_blocks + 4
    }

    /// Is nothing under way?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.operations.is_empty()
            && self.reads.is_empty()
            && self.changes.is_empty()
            && self.effects.is_empty()
    }

    /// A lane as recovery found it. Before it takes requests it writes a checkpoint.
    ///
    /// # Panics
    /// If there are fewer than [`Self::pages_needed`] pages.
    #[must_use]
    pub fn new(config: LaneConfig, recovered: Recovered, pages: &mut Pages) -> Lane {
        let mut take = |count| pages.allocate(count).expect("pages for a lane");
        let leaf_loads = LeafLoads::new((0..LEAF_PAGES).map(|_| take(1)).collect());
        let batch_buffers = (0..BATCH_BUFFERS).map(|_| take(BATCH_BUFFER_PAGES)).collect();
        let cleaner = Cleaner::new(take(config.layout.segment_blocks));
        let checkpointer = Checkpointer::after(&recovered, take(1), take(1));
        let split_page = Some(take(1));
        let zeroing = Zeroing::new(take(ZERO_PAGES));
        let volumes = recovered.volumes.into_iter();
        Lane {
            config,
            mount: recovered.mount + 1,
            last_number: recovered.last_number,
            generation: 0,
            log_ends: recovered.log_ends,
            map_end: recovered.map_end,
            volumes: volumes.map(Volume::recovered).collect(),
            map: recovered.map,
            segments: recovered.segments,
            pool_share: PoolShare::default(),
            streams: std::array::from_fn(|_| Stream::new()),
            batch_buffers,
            split_page,
            operations: Slab::default(),
            effects: VecDeque::new(),
            completions: VecDeque::new(),
            reads: Slab::default(),
            fetches: Slab::default(),
            fetched: VecDeque::new(),
            walks: Slab::default(),
            changed: VecDeque::new(),
            changes: Slab::default(),
            blocked: Default::default(),
            unapplied_new_blocks: 0,
            unapplied_leaves: 0,
            is_short: false,
            unsynced_promises: Vec::new(),
            leaf_loads,
            syncer: Syncer::default(),
            checkpointer,
            cleaner,
            zeroing,
            removals: 0,
            sweep_goes_on: false,
            failed: false,
            record_vectors: Vec::new(),
            spare_mappings: Vec::new(),
            counters: LaneCounters::default(),
        }
    }

    /// Is the first checkpoint of this mount done, so that requests are taken? If it failed they are taken too, and
    /// all refused: what was recovered may not be there after another loss of power.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.volumes.is_empty() || self.checkpointer.first_is_done() || self.failed
    }

    /// Did the first checkpoint fail? What was recovered may then be gone after another loss of power, and nothing of
    /// it may be shown.
    #[must_use]
    pub fn must_not_be_shown(&self) -> bool {
        self.failed && !self.checkpointer.first_is_done()
    }

    /// Did a write or sync fail, so that the lane is read-only?
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> LaneCounters {
        self.counters
    }

    /// The volumes, in the order in which requests name them, with those that are [being taken out](Volume::is_being_removed).
    #[must_use]
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// The map, for the metrics.
    #[must_use]
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The segments, for the metrics and the pool's lender.
    #[must_use]
    pub fn segments(&self) -> &SegmentTable {
        &self.segments
    }

    /// Blocks that can live in this lane at most, given what the pool's other lanes need.
    #[must_use]
    pub fn capacity_blocks(&self) -> u64 {
        let segments = self.pool_share.segments.saturating_sub(self.pool_share.needed_elsewhere);
        let (stuck, live_in_stuck) = self.segments.stuck();
        let segments = segments.saturating_sub(self.working_segments() + stuck);
        u64::from(segments) * u64::from(self.config.layout.usable_blocks()) + live_in_stuck
    }

    /// Adds a volume, or changes the size of the one with this number. It lasts from the next checkpoint on:
    /// [`Self::is_lasting`].
    pub fn put_volume(&mut self, record: VolumeRecord) {
        let is_it =
            |volume: &&mut Volume| volume.record.number == record.number && !volume.is_being_removed();
        if let Some(volume) = self.volumes.iter_mut().find(is_it) {
            volume.record.size_blocks = record.size_blocks;
        } else if let Some(position) = self.vacant_position() {
            self.volumes[position] = Volume::new(record);
        } else {
            self.map.add_volume(&[]);
            self.volumes.push(Volume::new(record));
        }
        self.checkpointer.request();
    }

    /// How many segments the lane would like to borrow now.
    #[must_use]
    pub fn segments_wanted(&self) -> u32 {
        let stock = self.segments.free_count() + self.zeroing.count();
        // What must be kept free is of no use to clients: they need more than that.
        let enough = SEGMENTS_IN_STOCK.max(self.segments_kept(StreamKind::Client) + 2);
        // A lane without volumes writes nothing.
        if stock < enough && !self.volumes.is_empty() { SEGMENTS_IN_STOCK } else { 0 }
    }

    /// The pool lends a segment; a pristine one is zeroed first.
    pub fn lend(&mut self, segment: SegmentIndex, pristine: bool) {
        if pristine {
            self.zeroing.push(segment);
        } else {
            self.segments.receive(segment);
        }
    }

    /// How the pool stands.
    pub fn set_pool_share(&mut self, share: PoolShare) {
        self.pool_share = share;
    }

    /// The next thing that the device should do.
    pub fn poll_effect(&mut self) -> Option<DiskEffect> {
        self.effects.pop_front()
    }

    /// The next answer.
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// A device operation has ended.
    pub fn handle_disk<M: Memory>(&mut self, context: &mut Context<'_, M>, token: DiskToken, good: bool) {
        if !good {
            self.counters.device_errors += 1;
        }
        match self.operations.remove(token.0) {
            Operation::Read(read) => self.finish_read_part(context, read, good),
            Operation::LeafLoad { frame, memory } => self.finish_leaf_load(context, frame, memory, good),
            Operation::Batch { stream, number } => self.finish_batch_write(context, stream, number, good),
            Operation::Fetch(fetch) => self.finish_fetch_read(context, fetch, good),
            Operation::Walk(walk) => self.finish_walk_read(context, walk, good),
            Operation::Sync => self.finish_sync(context, good),
            Operation::VictimRead => self.finish_victim_read(context, good),
            Operation::RootWrite => self.finish_root_write(context, good),
            Operation::ZeroWrite => self.finish_zero_write(context, good),
        }
    }

    /// Once per turn, after all events: writes what has gathered, and works in the background.
    pub fn upkeep<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        self.is_short = false;
        if self.failed {
            return;
        }
        self.retry_blocked(context);
        self.refuse_hopeless(context);
        self.upkeep_zeroing();
        self.upkeep_cleaner(context);
        self.upkeep_removals(context);
        self.upkeep_checkpoint(context);
        self.upkeep_sync();
        self.seal_gathered(context);
    }

    fn start(&mut self, operation: Operation, effect: impl FnOnce(DiskToken) -> DiskEffect) {
        let token = DiskToken(self.operations.insert(operation));
        self.effects.push_back(effect(token));
    }

    fn complete(&mut self, cookie: u32, result: Result<(), RequestError>) {
        self.completions.push_back(Completion { cookie, result, holes: HoleMap::default(), read: None });
    }

    /// A write or sync of the device failed, this lane's or another's. What waits will never be safe: it is answered with an error, and so is all that
    /// comes. Nothing is retried in hope: after a failed sync the kernel may have dropped what it could not write.
    pub fn fail<M: Memory>(&mut self, context: &mut Context<'_, M>) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        self.fail_streams(context);
        self.fail_changes(context);
        self.fail_syncs();
        self.fail_removals();
    }
}

impl Volume {
    /// Size in blocks.
    #[must_use]
    pub fn size_blocks(&self) -> u64 {
        self.record.size_blocks
    }
}

impl Lane {
    /// What is under way and what it waits for, in a few lines: for failing tests.
    #[must_use]
    pub fn describe(&self) -> String {
        let streams = self.streams.iter().map(|stream| {
            format!(
                "[{:?}, open {}, under way {}, writing {}]",
                stream.position,
                stream.open.as_ref().map_or(0, |open| open.records.len()),
                stream.under_way.len(),
                stream.writing_count()
            )
        });
        format!(
            "{:?}\nlane {}: failed {}, segments free {} dead {} owned {}, {:?}, live {} of {}, new {}, blocked {:?}, \
             changes {}, reads {}, operations {:?}, buffers {}\n  sealed: {:?}\n  {}\n  {:?}\n  {:?}\n  {:?}\n  {:?}",
            self.counters,
            self.config.lane,
            self.failed,
            self.segments.free_count(),
            self.segments.dead_count(),
            self.segments.owned_count(),
            self.pool_share,
            self.segments.live_total(),
            self.capacity_blocks(),
            self.unapplied_new_blocks,
            self.blocked,
            self.changes.len(),
            self.reads.len(),
            self.operations.iter().map(|(_, operation)| operation).collect::<Vec<_>>(),
            self.batch_buffers.len(),
            self.segments
                .indices()
                .filter(|segment| self.segments.state(*segment) == super::segment::SegmentState::Sealed)
                .map(|segment| (segment.0, self.segments.live(segment), self.segments.is_cleaned(segment)))
                .collect::<Vec<_>>(),
            streams.collect::<Vec<_>>().join(" "),
            self.map,
            self.syncer,
            self.checkpointer.describe(),
            self.cleaner.describe(),
        )
    }
}
