//! Makes the image of a small pool by a program of bytes, with a real lane, and keeps what each block may hold.

use super::{Input, VecMemory};
use crate::limits::PIECE_BLOCKS_MAX;
use crate::memory::{Memory, Pages};
use crate::record::{ChangeKind, Stamp};
use crate::store::bugs::Bugs;
use crate::store::checkpoint_body::VolumeRecord;
use crate::store::format::format_writes;
use crate::store::lane::{
    AckPolicy, BlockRange, Context, DiskEffect, Lane, LaneConfig, OwnedPayload, Payload, PoolShare, Release,
};
use crate::store::layout::{Layout, Place};
use crate::store::map::LEAF_BLOCKS;
use crate::store::recovery::{PoolReader, recover_lane};
use crate::store::segment::SegmentState;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const SEGMENTS: u32 = 40;
const SEGMENT_BLOCKS: u32 = 256;
const MEMORY_BYTES: u32 = 14 << 20;
/// Size in blocks of the volume whose changes are numbered by somebody else, and of the one whose changes the lane
/// numbers.
const VOLUME_BLOCKS: [u32; 2] = [4 * LEAF_BLOCKS, 2 * LEAF_BLOCKS + 100];
/// Programs are cut short here.
const OPERATIONS_MAX: usize = 80;
/// Overwritten blocks that are kept, for damage that brings one back.
const OLD_BLOCKS_MAX: usize = 4000;

/// The disk: it does what it is asked for in the order in which it was asked.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    /// Blocks that cannot be read.
    pub(super) unreadable: BTreeSet<u32>,
    /// What was written over, oldest first.
    pub(super) old: Vec<(Place, Vec<u8>)>,
    /// Reads since the count was last cleared.
    pub(super) bytes_read: u64,
}

impl Image {
    pub(super) fn block_mut(&mut self, place: u32) -> Option<&mut [u8]> {
        let at = place as usize * BLOCK_BYTES_USIZE;
        self.bytes.get_mut(at..at + BLOCK_BYTES_USIZE)
    }

    pub(super) fn block(&self, place: u32) -> &[u8] {
        let at = place as usize * BLOCK_BYTES_USIZE;
        &self.bytes[at..at + BLOCK_BYTES_USIZE]
    }

    fn write(&mut self, place: Place, bytes: &[u8]) {
        for (index, block) in (0..).zip(bytes.chunks_exact(BLOCK_BYTES_USIZE)) {
            let place = place.plus(index);
            if self.old.len() < OLD_BLOCKS_MAX {
                self.old.push((place, self.block(place.0).to_vec()));
            }
            self.block_mut(place.0).expect("inside").copy_from_slice(block);
        }
    }
}

impl PoolReader for Image {
    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        self.bytes_read += into.len() as u64;
        // Each lane reads the log and the body once, and the check every block.
        let enough = 8 * u64::from(SEGMENTS * SEGMENT_BLOCKS * BLOCK_BYTES);
        assert!(self.bytes_read < enough, "{} bytes read and no end", self.bytes_read);
        let at = usize::try_from(offset_bytes).expect("fits");
        let first = u32::try_from(at / BLOCK_BYTES_USIZE).expect("fits");
        let blocks = u32::try_from(into.len() / BLOCK_BYTES_USIZE).expect("fits");
        if self.unreadable.range(first..first + blocks).next().is_some() {
            return false;
        }
        let Some(bytes) = self.bytes.get(at..at + into.len()) else { return false };
        into.copy_from_slice(bytes);
        true
    }
}

/// Everything that a block ever held, by the number of the operation that put it there, and from where on it may hold
/// it: what is older was followed by something that was answered.
#[derive(Clone, Debug)]
pub(super) struct History {
    /// Operation, and whether it put data there or zeroes.
    versions: Vec<(u32, bool)>,
    since: usize,
}

impl Default for History {
    fn default() -> History {
        History { versions: vec![(0, false)], since: 0 }
    }
}

impl History {
    fn tags(versions: &[(u32, bool)]) -> impl Iterator<Item = u32> + '_ {
        versions.iter().map(|(operation, data)| if *data { *operation } else { 0 })
    }

    /// May the block hold what the operation `tag` wrote, or zeroes if that is 0?
    pub(super) fn may_hold(&self, tag: u32) -> bool {
        History::tags(&self.versions[self.since..]).any(|other| other == tag)
    }

    /// Did it ever?
    pub(super) fn ever_held(&self, tag: u32) -> bool {
        History::tags(&self.versions).any(|other| other == tag)
    }
}

/// The bytes that operation `tag` writes to a block.
pub(super) fn content(tag: u32, volume: u32, block: u32) -> [u8; BLOCK_BYTES_USIZE] {
    let word = u64::from(tag) << 32 | u64::from(volume) << 28 | u64::from(block);
    let mut bytes = [0; BLOCK_BYTES_USIZE];
    bytes.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&word.to_le_bytes()));
    bytes
}

/// The operation whose bytes these are; 0 for zeroes.
pub(super) fn tag_of(bytes: &[u8], volume: u32, block: u32) -> Option<u32> {
    let tag = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
    let expected = if tag == 0 { [0; BLOCK_BYTES_USIZE] } else { content(tag, volume, block) };
    (bytes == expected).then_some(tag)
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Builder {
    pub(super) layout: Layout,
    pub(super) image: Image,
    /// By volume number and block.
    pub(super) histories: BTreeMap<(u32, u32), History>,
    memory: VecMemory,
    pages: Pages,
    lane: Lane,
    pending: VecDeque<(DiskEffect, Vec<u8>)>,
    /// Of each operation: the range that it changes.
    operations: Vec<Option<BlockRange>>,
    epoch: u32,
}

fn config(layout: Layout) -> LaneConfig {
    // Short logs, so that few operations make several checkpoints.
    LaneConfig { lane: 0, layout, ack: AckPolicy::Durable, checkpoint_log_bytes: 3 << 20, bugs: Bugs::none() }
}

/// The numbers of the volumes, by position: none is its position.
pub(super) fn volumes() -> impl Iterator<Item = (u32, u32)> {
    (0..).zip(VOLUME_BLOCKS).map(|(position, blocks)| (position + 5, blocks))
}

impl Builder {
    /// A new pool with two volumes.
    pub(super) fn new() -> Builder {
        let pool_bytes = u64::from(SEGMENTS * SEGMENT_BLOCKS * BLOCK_BYTES);
        let layout = Layout::with_segment_blocks([7; 16], pool_bytes, 1, SEGMENT_BLOCKS).expect("sizes fit");
        let bytes = vec![0; usize::try_from(pool_bytes).expect("fits")];
        let mut image = Image { bytes, unreadable: BTreeSet::new(), old: Vec::new(), bytes_read: 0 };
        format_writes(&layout).iter().for_each(|write| image.write(write.place, &write.block[..]));
        let mut builder = Builder::open(layout, image).expect("a new pool");
        for (position, (number, blocks)) in volumes().enumerate() {
            builder.lane.put_volume(VolumeRecord {
                number,
                size_blocks: u64::from(blocks),
                identity: [1; 16],
                // The changes of the first are numbered by the program.
                replicated: position == 0,
                name: format!("volume {number}"),
                ..VolumeRecord::default()
            });
        }
        builder.run();
        assert!(builder.lane.is_lasting(0) && builder.lane.is_lasting(1));
        builder
    }

    /// Takes a pool over as a new process does, if it can be recovered.
    fn open(layout: Layout, mut image: Image) -> Option<Builder> {
        let mut pages = Pages::new(MemoryRange { start: 0, len: MEMORY_BYTES });
        image.bytes_read = 0;
        let recovered = recover_lane(&mut image, layout, 0, 0, Bugs::none()).ok()?;
        Some(Builder {
            layout,
            image,
            histories: BTreeMap::new(),
            memory: VecMemory(vec![0; MEMORY_BYTES as usize]),
            lane: Lane::new(config(layout), recovered, &mut pages),
            pages,
            pending: VecDeque::new(),
            operations: vec![None],
            epoch: 1,
        })
    }

    /// Opens a pool and waits for the first checkpoint of the mount, which makes safe what was recovered. Says what the
    /// image holds then, if that succeeds.
    pub(super) fn next_life(layout: Layout, image: Image) -> Option<Image> {
        let mut builder = Builder::open(layout, image)?;
        builder.run();
        builder.lane.is_open().then_some(builder.image)
    }

    /// Works off a program, to its end or to the byte with which damage begins.
    pub(super) fn run_program(&mut self, input: &mut Input<'_>) {
        while let Some(code) = input.next() {
            if code >= super::DAMAGE || self.operations.len() >= OPERATIONS_MAX {
                break;
            }
            self.operate(code, input);
        }
    }

    fn operate(&mut self, code: u8, input: &mut Input<'_>) {
        match code % 16 {
            0..=3 => self.change(0, ChangeKind::Data, input),
            4 => self.change(0, ChangeKind::Trim, input),
            5 => self.change(1, ChangeKind::Zero, input),
            6 | 7 => self.change(1, ChangeKind::Data, input),
            8 => self.copy(true, input),
            9 => self.copy(false, input),
            10 => self.begin_or_end_filling(input),
            11 => {
                self.epoch += 1;
                let (cookie, epoch) = (self.begin(None), self.epoch);
                self.with_lane(|lane, context| lane.promise(context, cookie, 0, epoch));
            }
            12 => (0..input.next_or(0)).for_each(|_| _ = self.step()),
            13 => self.run(),
            14 => self.lane.request_checkpoint(),
            _ => self.restart(),
        }
    }

    /// An operation begins; its number is its cookie.
    fn begin(&mut self, range: Option<BlockRange>) -> u32 {
        self.operations.push(range);
        u32::try_from(self.operations.len() - 1).expect("few")
    }

    /// A range of a volume out of three bytes.
    fn range(volume: u32, input: &mut Input<'_>) -> BlockRange {
        let blocks = VOLUME_BLOCKS[volume as usize];
        let at = u32::from(input.next_or(0)) << 8 | u32::from(input.next_or(0));
        let size = u32::from(input.next_or(0));
        let block = at % blocks;
        // Mostly short, some a few segments' worth.
        let count = if size < 0xf0 { 1 + size % 24 } else { PIECE_BLOCKS_MAX - (size - 0xf0) };
        BlockRange { volume, block, count: count.min(blocks - block) }
    }

    fn payload(&mut self, tag: u32, range: BlockRange) -> Option<OwnedPayload> {
        let whole = self.pages.allocate(1 + range.count)?;
        let number = range.volume + 5;
        for index in 0..range.count {
            let block = self.memory.bytes_mut(whole.part((1 + index) * BLOCK_BYTES, BLOCK_BYTES));
            block.copy_from_slice(&content(tag, number, range.block + index));
        }
        Some(OwnedPayload { whole })
    }

    fn note(&mut self, operation: u32, range: BlockRange, data: bool) {
        for block in range.block..range.block + range.count {
            let history = self.histories.entry((range.volume + 5, block)).or_default();
            history.versions.push((operation, data));
        }
    }

    fn change(&mut self, volume: u32, kind: ChangeKind, input: &mut Input<'_>) {
        let range = Builder::range(volume, input);
        let data = kind == ChangeKind::Data;
        let cookie = self.begin(Some(range));
        let owned = if data { self.payload(cookie, range) } else { None };
        if data && owned.is_none() {
            // Too much waits for space already.
            return;
        }
        self.note(cookie, range, data);
        let last = self.lane.last_stamp(volume);
        let stamp = Stamp { epoch: self.epoch.max(last.epoch), sequence: last.sequence + 1 };
        self.with_lane(|lane, context| match (volume, owned) {
            (0, owned) => {
                lane.append(context, cookie, kind, range, owned.map(Payload::Owned), stamp);
            }
            (_, Some(owned)) => lane.write(context, cookie, range, owned, true),
            (_, None) => lane.release(context, cookie, range, Release::Zero, true),
        });
    }

    fn copy(&mut self, data: bool, input: &mut Input<'_>) {
        let mut range = Builder::range(0, input);
        range.count = range.count.min(LEAF_BLOCKS - range.block % LEAF_BLOCKS);
        let cookie = self.begin(Some(range));
        let owned = if data { self.payload(cookie, range) } else { None };
        if data && owned.is_none() {
            return;
        }
        self.note(cookie, range, data);
        let payload = owned.map(Payload::Owned);
        self.with_lane(|lane, context| lane.append_copy(context, cookie, range, payload));
    }

    fn begin_or_end_filling(&mut self, input: &mut Input<'_>) {
        let (cookie, step) = (self.begin(None), input.next_or(0));
        let last = self.lane.last_stamp(0);
        let stamp = Stamp { sequence: last.sequence.max(3) + u64::from(step % 8) - 3, ..last };
        let base = if step & 0x40 == 0 { Stamp::default() } else { last };
        self.with_lane(|lane, context| {
            if step & 0x80 == 0 {
                lane.restart_order(context, cookie, 0, (base, stamp));
            } else {
                lane.end_filling(context, cookie, 0);
            }
        });
    }

    fn with_lane<R>(&mut self, work: impl FnOnce(&mut Lane, &mut Context<'_, VecMemory>) -> R) -> R {
        let mut context = Context { memory: &mut self.memory, pages: &mut self.pages };
        work(&mut self.lane, &mut context)
    }

    /// The process is killed, and the next one takes over what had reached the disk.
    fn restart(&mut self) {
        let image = std::mem::replace(
            &mut self.image,
            Image { bytes: Vec::new(), unreadable: BTreeSet::new(), old: Vec::new(), bytes_read: 0 },
        );
        let next = Builder::open(self.layout, image).expect("an undamaged pool is recovered");
        let Builder { image, memory, pages, lane, .. } = next;
        (self.image, self.memory, self.pages, self.lane) = (image, memory, pages, lane);
        self.pending.clear();
        while !self.lane.is_open() {
            assert!(self.step(), "the first checkpoint needs nobody's help");
        }
    }

    fn run(&mut self) {
        while self.step() {}
        // All but the last change is committed, so that the log of most need not be kept.
        let sequence = self.lane.volumes().first().map_or(0, |volume| volume.record.sequence);
        if sequence > 0 {
            self.lane.note_committed(0, sequence - 1);
        }
    }

    /// One turn and the end of one operation of the disk. False if nothing is left to do.
    fn step(&mut self) -> bool {
        self.lend_segments();
        self.with_lane(Lane::upkeep);
        let mut moved = self.lane.wants_turn();
        while let Some(effect) = self.lane.poll_effect() {
            let bytes = match effect {
                DiskEffect::Write { memory, .. } => self.memory.bytes(memory).to_vec(),
                _ => Vec::new(),
            };
            self.pending.push_back((effect, bytes));
            moved = true;
        }
        if let Some((effect, bytes)) = self.pending.pop_front() {
            self.complete(effect, &bytes);
            moved = true;
        }
        while let Some(completion) = self.lane.poll_completion() {
            if completion.result.is_ok() {
                self.note_answered(completion.cookie);
            }
        }
        moved
    }

    fn complete(&mut self, effect: DiskEffect, bytes: &[u8]) {
        let (token, good) = match effect {
            DiskEffect::Read { token, place, memory } => {
                let into = self.memory.bytes_mut(memory);
                (token, self.image.read_at(place.offset_bytes(), into))
            }
            DiskEffect::Write { token, place, .. } => {
                self.image.write(place, bytes);
                (token, true)
            }
            DiskEffect::Sync { token } => (token, true),
        };
        self.image.bytes_read = 0;
        self.with_lane(|lane, context| lane.handle_disk(context, token, good));
    }

    fn lend_segments(&mut self) {
        let is_free = |lane: &Lane, segment| {
            lane.segments().state(segment) == SegmentState::Foreign && !self.layout.is_anchor(segment)
        };
        let all = self.lane.segments().indices();
        let free: Vec<_> = all.filter(|segment| is_free(&self.lane, *segment)).collect();
        let lent = free.len().min(self.lane.segments_wanted() as usize);
        free[..lent].iter().for_each(|segment| self.lane.lend(*segment, false));
        self.lane.set_pool_share(PoolShare {
            segments: self.lane.segments().pool_count() - 4,
            free: u32::try_from(free.len() - lent).expect("few"),
            ..PoolShare::default()
        });
    }

    fn note_answered(&mut self, operation: u32) {
        let Some(range) = self.operations[operation as usize] else { return };
        for block in range.block..range.block + range.count {
            let history = self.histories.get_mut(&(range.volume + 5, block)).expect("noted");
            let found = history.versions.iter().position(|(other, _)| *other == operation);
            history.since = history.since.max(found.expect("noted"));
        }
    }
}
