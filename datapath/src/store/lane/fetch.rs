//! Finding a change again in the log, for a replica that missed it.
//!
//! ```text
//!   search: newest segment ──▶ its first change of the volume is later? ──▶ next older segment
//!                                    └─ no: descriptor by descriptor to the change
//!   follow: from the change fetched last, descriptor by descriptor, also into the next segment
//! ```
//!
//! A block counts as a descriptor only where one must be: at the start of a segment that is in use, or right behind a
//! batch that counts, and chained to it or the first of a later mount; and up to the newest batch that the segment is
//! known to hold. What recovery discarded, and what an earlier
//! use of the segment left behind, is therefore never taken for the log.

use super::stamped::change_of_entry;
use super::stream::StreamKind;
use super::{Context, DiskEffect, DiskToken, Lane, Operation};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::record::{ChangeKind, Stamp};
use crate::store::batch::{BatchHeader, Descriptor, Entry, EntryKind, EntryView, FILL_BEGINS};
use crate::store::layout::{Place, SegmentIndex};
use crate::store::segment::SegmentState;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};

/// Changes further on than this are searched for anew rather than by following the log.
const FOLLOW_CHANGES_MAX: u64 = 256;

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchOutcome {
    /// The change. Its payload, if it has one, stands in the memory from the start.
    Found {
        /// Its place in the volume's order.
        stamp: Stamp,
        /// What it does.
        kind: ChangeKind,
        /// First block.
        block: u32,
        /// How many blocks.
        count: u32,
    },
    /// It is not in effect, or the log does not hold it any more, or it is damaged.
    Gone,
    /// The memory does not hold the payload. A piece ([`crate::limits::PIECE_BYTES_MAX`]) always fits.
    MemoryTooSmall,
}

/// The answer to [`Lane::fetch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// What the caller named the fetch.
    pub cookie: u32,
    /// How it ended.
    pub outcome: FetchOutcome,
}

/// Where a change was found: the next one is probably in the same batch or behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct FetchCursor {
    sequence: u64,
    segment: SegmentIndex,
    block: u32,
    crc: u32,
}

/// The batch before the one that is looked for.
#[derive(Clone, Copy, Debug)]
struct Link {
    header: BatchHeader,
    crc: u32,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Descriptor,
    Payload,
    SecondDescriptor,
    SecondPayload,
}

/// A change that was found and whose payload is being read.
#[derive(Clone, Copy, Debug)]
struct Find {
    stamp: Stamp,
    kind: ChangeKind,
    block: u32,
    count: u32,
    link: Link,
}

/// A fetch under way: it has one read under way.
#[derive(Debug)]
pub(super) struct Fetch {
    cookie: u32,
    /// Position in the lane.
    volume: u32,
    sequence: u64,
    memory: MemoryRange,
    step: Step,
    /// From the change fetched last onwards, not segment by segment backwards.
    follows: bool,
    /// Segments still to be searched, the newest last.
    older: Vec<SegmentIndex>,
    /// Where the descriptor is that is being read.
    segment: SegmentIndex,
    block: u32,
    /// The fetch counts as a reader of `segment`.
    reads: bool,
    /// CRC of the descriptor that must be here, when following begins.
    expected: Option<u32>,
    link: Option<Link>,
    /// An earlier change of the volume was seen in this segment.
    saw_earlier: bool,
    find: Option<Find>,
    checksums: Vec<u32>,
}

/// What a descriptor says about the change.
enum Sighting<'a> {
    Here(EntryView<'a>),
    /// It comes later than all changes of the volume in the batch; `earlier`: there are such.
    Later {
        earlier: bool,
    },
    /// It comes earlier than a change in the batch.
    Passed,
}

impl Lane {
    /// Finds the change of this volume with this sequence in the log and reads it into `memory`, one block at least.
    /// The change must be on stable media. The answer comes with [`Self::poll_fetched`]. Fetching the next change
    /// after one costs one or two reads of descriptors besides that of the payload; any other jump about one for each
    /// segment of the log in between.
    pub fn fetch<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        cookie: u32,
        volume: u32,
        sequence: u64,
        memory: MemoryRange,
    ) {
        assert!(memory.len >= BLOCK_BYTES && memory.len.is_multiple_of(BLOCK_BYTES));
        let known = &self.volumes[volume as usize];
        let in_effect = (1..=known.record.sequence).contains(&sequence) && !self.must_not_be_shown();
        let near = |cursor: &FetchCursor| {
            (cursor.sequence..=cursor.sequence.saturating_add(FOLLOW_CHANGES_MAX)).contains(&sequence)
        };
        let cursor = known.order.fetch_cursor.filter(near);
        let index = self.fetches.insert(Fetch {
            cookie,
            volume,
            sequence,
            memory,
            step: Step::Descriptor,
            follows: false,
            older: Vec::new(),
            segment: SegmentIndex(0),
            block: 0,
            reads: false,
            expected: None,
            link: None,
            saw_earlier: false,
            find: None,
            checksums: Vec::new(),
        });
        let _ = &context;
        match cursor.filter(|cursor| self.is_searchable(cursor.segment)) {
            _ if !in_effect => self.end_fetch(index, FetchOutcome::Gone),
            Some(cursor) => {
                let fetch = self.fetches.get_mut(index);
                (fetch.follows, fetch.expected) = (true, Some(cursor.crc));
                self.enter_segment(index, cursor.segment, cursor.block);
                self.read_descriptor(index);
            }
            None => self.search_log(index),
        }
    }

    /// The next answer to [`Self::fetch`].
    pub fn poll_fetched(&mut self) -> Option<Fetched> {
        self.fetched.pop_front()
    }

    /// Does the clients' log surely hold in this segment what the segment table believes? Not in one that is only
    /// reserved: what lies there is of an earlier use.
    fn is_searchable(&self, segment: SegmentIndex) -> bool {
        let position = self.streams[StreamKind::Client.index()].position;
        let current = position.is_some_and(|position| position.segment == segment);
        (current || self.segments.state(segment) == SegmentState::Sealed)
            && self.segments.may_be_of_clients(segment)
            && !self.config.layout.is_anchor(segment)
    }

    /// Where batches end in a segment: where the stream stands, or at its end.
    fn end_of_segment(&self, segment: SegmentIndex) -> u32 {
        let position = self.streams[StreamKind::Client.index()].position;
        let current = position.filter(|position| position.segment == segment);
        current.map_or(self.config.layout.segment_blocks, |position| position.block)
    }

    /// Searches the whole log, from its newest segment on.
    fn search_log(&mut self, index: u32) {
        let mut segments: Vec<SegmentIndex> =
            self.segments.indices().filter(|segment| self.is_searchable(*segment)).collect();
        segments.sort_unstable_by_key(|segment| self.segments.newest_number(*segment));
        let fetch = self.fetches.get_mut(index);
        (fetch.follows, fetch.expected, fetch.older) = (false, None, segments);
        self.search_older(index);
    }

    fn search_older(&mut self, index: u32) {
        while let Some(segment) = self.fetches.get_mut(index).older.pop() {
            // It may have been freed since it was listed.
            if self.is_searchable(segment) && self.end_of_segment(segment) > 0 {
                self.enter_segment(index, segment, 0);
                let fetch = self.fetches.get_mut(index);
                (fetch.link, fetch.saw_earlier) = (None, false);
                return self.read_descriptor(index);
            }
        }
        self.end_fetch(index, FetchOutcome::Gone);
    }

    /// Goes to a segment, which is not written again while this reads it.
    fn enter_segment(&mut self, index: u32, segment: SegmentIndex, block: u32) {
        self.segments.begin_read(segment);
        let fetch = self.fetches.get_mut(index);
        let left = std::mem::replace(&mut fetch.reads, true).then_some(fetch.segment);
        (fetch.segment, fetch.block) = (segment, block);
        left.into_iter().for_each(|segment| self.segments.end_read(segment));
    }

    fn read_descriptor(&mut self, index: u32) {
        let fetch = self.fetches.get_mut(index);
        fetch.step = Step::Descriptor;
        let memory = fetch.memory.part(0, BLOCK_BYTES);
        let place = self.config.layout.place(fetch.segment, fetch.block);
        self.start_fetch_read(index, place, memory);
    }

    fn start_fetch_read(&mut self, index: u32, place: Place, memory: MemoryRange) {
        self.start(Operation::Fetch(index), |token: DiskToken| DiskEffect::Read { token, place, memory });
    }

    pub(super) fn finish_fetch_read<M: Memory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: u32,
        good: bool,
    ) {
        match self.fetches.get(index).step {
            Step::Descriptor => self.fetch_descriptor_came(context, index, good),
            Step::Payload | Step::SecondPayload => self.fetch_payload_came(context, index, good),
            Step::SecondDescriptor => self.fetch_second_half(context, index, good),
        }
    }

    fn fetch_descriptor_came<M: Memory>(&mut self, context: &Context<'_, M>, index: u32, good: bool) {
        let fetch = self.fetches.get(index);
        let (segment, block, first) = (fetch.segment, fetch.block, fetch.link.is_none());
        let bytes = context.memory.bytes(fetch.memory.part(0, BLOCK_BYTES));
        let decoded = Descriptor::decode(bytes).filter(|_| good);
        if let Some(found) = decoded.filter(|_| first && block == 0) {
            let of_clients = usize::from(found.header.stream) == StreamKind::Client.index();
            self.segments.note_of_clients(segment, of_clients);
        }
        let Some(descriptor) = decoded.filter(|found| self.counts(index, found)) else {
            return self.leave_segment_searched(index);
        };
        let record = &self.volumes[self.fetches.get(index).volume as usize].record;
        let (number, order_from) = (record.number, record.order_from);
        let fetch = self.fetches.get_mut(index);
        let link = Link { header: descriptor.header, crc: descriptor.crc };
        (fetch.link, fetch.expected) = (Some(link), None);
        match sight(&descriptor, number, fetch.sequence, order_from) {
            Sighting::Here(view) => self.fetch_found(index, &view, link),
            Sighting::Passed if fetch.follows => self.search_log(index),
            Sighting::Passed if fetch.saw_earlier => self.end_fetch(index, FetchOutcome::Gone),
            Sighting::Passed => self.search_older(index),
            Sighting::Later { earlier } => {
                fetch.saw_earlier |= earlier;
                fetch.block += descriptor.total_blocks();
                if fetch.block < self.end_of_segment(segment) {
                    self.read_descriptor(index);
                } else {
                    self.leave_segment_searched(index);
                }
            }
        }
    }

    /// Is this descriptor the one that must be here?
    fn counts(&self, index: u32, found: &Descriptor<'_>) -> bool {
        let fetch = self.fetches.get(index);
        let header = &found.header;
        let mine = u32::from(header.lane) == self.config.lane
            && usize::from(header.stream) == StreamKind::Client.index()
            && header.number <= self.segments.newest_number(fetch.segment)
            && fetch.block + found.total_blocks() <= self.end_of_segment(fetch.segment);
        let follows = match (&fetch.link, fetch.expected) {
            (Some(link), _) => link.is_followed_by(header),
            (None, Some(crc)) => found.crc == crc,
            (None, None) => true,
        };
        mine && follows
    }

    /// The segment holds no further batch.
    fn leave_segment_searched(&mut self, index: u32) {
        let fetch = self.fetches.get(index);
        if !fetch.follows {
            // Later segments hold only later changes.
            return if fetch.saw_earlier {
                self.end_fetch(index, FetchOutcome::Gone);
            } else {
                self.search_older(index);
            };
        }
        // The log goes on at the start of the next segment. If it does not, or not any more, a search will tell.
        let next = fetch.link.filter(|_| fetch.block > 0).map(|link| link.header.next_segment);
        match next.filter(|next| *next != fetch.segment && self.goes_on_in(*next)) {
            Some(next) => {
                self.enter_segment(index, next, 0);
                self.read_descriptor(index);
            }
            None => self.search_log(index),
        }
    }

    /// May batches of the log be found at the start of this segment, which a descriptor names?
    fn goes_on_in(&self, segment: SegmentIndex) -> bool {
        segment.0 < self.segments.pool_count()
            && self.is_searchable(segment)
            && self.end_of_segment(segment) > 0
    }

    fn fetch_found(&mut self, index: u32, view: &EntryView<'_>, link: Link) {
        let entry = view.entry;
        let stamp = Stamp { epoch: entry.epoch, sequence: entry.sequence };
        let kind = change_of_entry(entry.kind).expect("sighted as a change");
        let fetch = self.fetches.get_mut(index);
        let Fetch { segment, block, sequence, .. } = *fetch;
        let cursor = FetchCursor { sequence, segment, block, crc: link.crc };
        self.volumes[fetch.volume as usize].order.fetch_cursor = Some(cursor);
        fetch.find = Some(Find { stamp, kind, block: entry.block, count: entry.count, link });
        if kind == ChangeKind::Data {
            fetch.checksums.clear();
            fetch.checksums.extend((0..entry.count).map(|block| view.checksum(block)));
            let place = self.config.layout.place(segment, block + 1 + view.payload_index);
            self.read_payload(index, Step::Payload, 0, place);
        } else {
            self.end_fetch(
                index,
                FetchOutcome::Found { stamp, kind, block: entry.block, count: entry.count },
            );
        }
    }

    /// Reads the payload whose checksums are known, to behind `before` blocks of the memory.
    fn read_payload(&mut self, index: u32, step: Step, before: u32, place: Place) {
        let fetch = self.fetches.get_mut(index);
        let blocks = u32::try_from(fetch.checksums.len()).expect("at most a piece") - before;
        if (before + blocks) * BLOCK_BYTES > fetch.memory.len {
            return self.end_fetch(index, FetchOutcome::MemoryTooSmall);
        }
        fetch.step = step;
        let memory = fetch.memory.part(before * BLOCK_BYTES, blocks * BLOCK_BYTES);
        self.start_fetch_read(index, place, memory);
    }

    fn fetch_payload_came<M: Memory>(&mut self, context: &Context<'_, M>, index: u32, good: bool) {
        let fetch = self.fetches.get(index);
        let Find { stamp, kind, block, count, link } = fetch.find.expect("found");
        let bytes = context.memory.bytes(fetch.memory.part(0, count * BLOCK_BYTES));
        let blocks = bytes.chunks_exact(BLOCK_BYTES_USIZE);
        let intact = good && blocks.map(crc32c).eq(fetch.checksums.iter().copied());
        if !intact {
            self.counters.checksum_errors += u64::from(good);
            return self.end_fetch(index, FetchOutcome::Gone);
        }
        let is_first_half = matches!(fetch.step, Step::Payload) && link.header.continues;
        if !is_first_half {
            return self.end_fetch(index, FetchOutcome::Found { stamp, kind, block, count });
        }
        let next = link.header.next_segment;
        if !self.goes_on_in(next) {
            return self.end_fetch(index, FetchOutcome::Gone);
        }
        if (count + 1) * BLOCK_BYTES > fetch.memory.len {
            return self.end_fetch(index, FetchOutcome::MemoryTooSmall);
        }
        let memory = fetch.memory.part(count * BLOCK_BYTES, BLOCK_BYTES);
        self.enter_segment(index, next, 0);
        self.fetches.get_mut(index).step = Step::SecondDescriptor;
        self.start_fetch_read(index, self.config.layout.place(next, 0), memory);
    }

    /// The change was cut in two at the end of its segment: the rest is the first batch of the next one.
    fn fetch_second_half<M: Memory>(&mut self, context: &Context<'_, M>, index: u32, good: bool) {
        let number = self.volumes[self.fetches.get(index).volume as usize].record.number;
        let fetch = self.fetches.get_mut(index);
        let mut find = fetch.find.expect("a first half");
        let bytes = context.memory.bytes(fetch.memory.part(find.count * BLOCK_BYTES, BLOCK_BYTES));
        let descriptor = Descriptor::decode(bytes)
            .filter(|found| good && found.header.continued && find.link.is_followed_by(&found.header));
        let view = descriptor.and_then(|found| found.entries().next()).filter(|view| {
            let entry = &view.entry;
            let stamp = Stamp { epoch: entry.epoch, sequence: entry.sequence };
            entry.volume == number && stamp == find.stamp && entry.block == find.block + find.count
        });
        let Some(view) = view else { return self.end_fetch(index, FetchOutcome::Gone) };
        let first_half = find.count;
        fetch.checksums.extend((0..view.payload_blocks()).map(|block| view.checksum(block)));
        find.count += view.payload_blocks();
        fetch.find = Some(find);
        let place = self.config.layout.place(fetch.segment, 1);
        self.read_payload(index, Step::SecondPayload, first_half, place);
    }

    fn end_fetch(&mut self, index: u32, outcome: FetchOutcome) {
        let fetch = self.fetches.remove(index);
        if fetch.reads {
            self.segments.end_read(fetch.segment);
        }
        self.fetched.push_back(Fetched { cookie: fetch.cookie, outcome });
    }
}

impl Link {
    fn is_followed_by(&self, next: &BatchHeader) -> bool {
        next.follows(&self.header, self.crc)
    }
}

/// Looks for a change in a batch. The second half of one that was cut in two lies behind its beginning. What was there
/// before the volume began to be filled may bear the same numbers and is of another order.
fn sight<'a>(descriptor: &Descriptor<'a>, volume: u32, sequence: u64, order_from: u64) -> Sighting<'a> {
    if descriptor.header.number < order_from {
        return Sighting::Later { earlier: true };
    }
    let begins = |view: &EntryView<'_>| {
        let Entry { kind, volume: its, count, .. } = view.entry;
        its == volume && kind == EntryKind::Fill && count == FILL_BEGINS
    };
    let restarts = descriptor.header.number == order_from;
    let last = descriptor.entries().enumerate().filter(|(_, view)| restarts && begins(view)).last();
    let mut earlier = last.is_some();
    let changes = descriptor
        .entries()
        .skip(last.map_or(0, |(index, _)| index + 1))
        .filter(|view| view.entry.volume == volume && change_of_entry(view.entry.kind).is_some());
    for view in changes {
        let found = view.entry.sequence;
        if found > sequence || found == sequence && descriptor.header.continued {
            return Sighting::Passed;
        }
        if found == sequence {
            return Sighting::Here(view);
        }
        earlier = true;
    }
    Sighting::Later { earlier }
}
