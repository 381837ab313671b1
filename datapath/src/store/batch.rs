//! A batch: one descriptor block and the payload blocks it describes, written to the device in one piece.
//!
//! ```text
//!   descriptor block (4096 bytes)                          entry (32 bytes + 4 per block)
//!    0  magic "BTCH"          4                             0  kind 1, flags 1, unused 2
//!    4  CRC32C of the block   4  (this field as zero)       4  volume number           4
//!    8  lane 2, stream 1, flags 1                           8  first block of volume   4  (leaf index for a leaf)
//!   12  payload blocks        2                            12  count of blocks         4
//!   14  entries               2                            16  epoch                   4
//!   16  mount number          8                            20  old place               4  (move and lost)
//!   24  segment generation    8                            24  sequence                8
//!   32  batch number          8                            32  CRC32C of each payload block
//!   40  flushed watermark     8
//!   48  chain                 4
//!   52  next segment          4
//!   56  unused                8
//!   64  entries ...
//! ```
//!
//! A batch is valid when its descriptor's CRC is right, every payload block has the CRC that its entry gives, and
//! it is the one that must come next: same mount, the generation that its segment was opened with, the next
//! number, and `chain` equal to the CRC of the descriptor before it in the stream. The flushed watermark is the highest
//! batch number of the stream that was known to be on stable media when this batch was made.

use super::fields::{crc32c_without, put, u16_at, u32_at, u64_at};
use super::layout::{Place, SegmentIndex};
use crate::units::BLOCK_BYTES_USIZE;

const MAGIC: &[u8; 4] = b"BTCH";
const HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 32;
/// The next batch of the stream belongs to this one: neither takes effect without the other.
const FLAG_CONTINUES: u8 = 1;
/// The batch before this one has [`FLAG_CONTINUES`].
const FLAG_CONTINUED: u8 = 2;
/// Payload blocks in a batch: one piece of a request.
pub const BATCH_PAYLOAD_BLOCKS_MAX: u32 = crate::limits::PIECE_BLOCKS_MAX;

const _: () = {
    assert!(HEADER_BYTES + ENTRY_BYTES + 4 * BATCH_PAYLOAD_BLOCKS_MAX as usize <= BLOCK_BYTES_USIZE);
    assert!(BATCH_PAYLOAD_BLOCKS_MAX <= u16::MAX as u32);
};

/// What an entry does to the blocks that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// New content, in the payload.
    Data,
    /// The cleaner moved the content here from `old_place`: takes effect only if the map still points there.
    Move,
    /// The blocks read as zeroes; no payload.
    Zero,
    /// The client no longer needs the blocks; they read as zeroes; no payload.
    Trim,
    /// The cleaner found the block at `old_place` damaged and gives it up: reading it is an error from now on. Takes
    /// effect only if the map still points there; no payload.
    Lost,
    /// The replica takes no part any more in epochs below the entry's epoch. Changes no block: `block` is 0, `count` 1; no
    /// payload.
    Promise,
    /// `count` 1: the replica is being filled from now on, and its order goes on from the entry's stamp, which may lie
    /// before the last one. `count` 2: it is complete. Changes no block: `block` is 0; no payload.
    Fill,
    /// Content copied from another replica, in the payload. Changes the blocks but not the order.
    CopyData,
    /// The blocks read as zeroes at another replica. Changes the blocks but not the order; no payload.
    CopyZero,
    /// A leaf of the map. Found through the root, never by rolling forward.
    Leaf,
    /// A part of a checkpoint. Found through the root, never by rolling forward.
    Checkpoint,
}

impl EntryKind {
    const ALL: [(EntryKind, u8); 11] = [
        (EntryKind::Data, 1),
        (EntryKind::Move, 2),
        (EntryKind::Zero, 3),
        (EntryKind::Trim, 4),
        (EntryKind::Lost, 5),
        (EntryKind::Promise, 6),
        (EntryKind::Fill, 7),
        (EntryKind::CopyData, 8),
        (EntryKind::CopyZero, 9),
        (EntryKind::Leaf, 16),
        (EntryKind::Checkpoint, 17),
    ];

    fn code(self) -> u8 {
        EntryKind::ALL.iter().find(|(kind, _)| *kind == self).expect("all kinds are listed").1
    }

    fn of_code(code: u8) -> Option<EntryKind> {
        EntryKind::ALL.iter().find(|(_, listed)| *listed == code).map(|(kind, _)| *kind)
    }

    /// Do payload blocks come with it?
    #[must_use]
    pub fn has_payload(self) -> bool {
        !matches!(
            self,
            EntryKind::Zero
                | EntryKind::Trim
                | EntryKind::Lost
                | EntryKind::Promise
                | EntryKind::Fill
                | EntryKind::CopyZero
        )
    }

    /// Is it a change of its volume's order, with a number of its own?
    #[must_use]
    pub fn is_change(self) -> bool {
        matches!(self, EntryKind::Data | EntryKind::Zero | EntryKind::Trim)
    }

    /// Does it change no block?
    #[must_use]
    pub fn is_about_the_volume(self) -> bool {
        matches!(self, EntryKind::Promise | EntryKind::Fill)
    }
}

/// The count of an [`EntryKind::Fill`] with which filling begins.
pub const FILL_BEGINS: u32 = 1;
/// The count of an [`EntryKind::Fill`] with which it is complete.
pub const FILL_ENDS: u32 = 2;
/// The count of an [`EntryKind::Fill`] that comes before one with which filling begins, and whose stamp is the last change
/// in common.
pub const FILL_BASE: u32 = 3;

/// An entry without its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it does.
    pub kind: EntryKind,
    /// The volume, by its number in the pool.
    pub volume: u32,
    /// First block of the volume; for [`EntryKind::Leaf`] the index of the leaf.
    pub block: u32,
    /// How many blocks.
    pub count: u32,
    /// Epoch in which the change was numbered, or that is promised.
    pub epoch: u32,
    /// Where a moved or lost block was.
    pub old_place: Place,
    /// Number of the change within its volume.
    pub sequence: u64,
}

/// The fields of a descriptor that identify the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Lane of the pool.
    pub lane: u16,
    /// Stream of the lane.
    pub stream: u8,
    /// Takes effect only together with the next batch of the stream.
    pub continues: bool,
    /// Takes effect only together with the batch before it in the stream.
    pub continued: bool,
    /// How often the pool had been opened when this was written.
    pub mount: u64,
    /// Which use of the segment this is.
    pub generation: u64,
    /// Position in the order of the lane's batches.
    pub number: u64,
    /// Highest batch number of the stream known to be on stable media.
    pub flushed: u64,
    /// CRC of the descriptor before this one in the stream.
    pub chain: u32,
    /// Where the stream goes on when its segment is full.
    pub next_segment: SegmentIndex,
}

impl BatchHeader {
    /// Can this be the batch behind `before` in its stream, whose descriptor has this CRC? Batches of a mount are chained,
    /// and the first of a later mount begins a new chain. Numbers ascend within a mount; a later one may give those of
    /// discarded batches again.
    #[must_use]
    pub fn follows(&self, before: &BatchHeader, crc: u32) -> bool {
        let same_mount =
            self.mount == before.mount && self.chain == crc && self.generation >= before.generation;
        let later_mount = self.mount > before.mount && self.chain == 0;
        (same_mount || later_mount) && self.number > before.number
    }
}

/// Fills a descriptor block, entry by entry. The state is three numbers; the bytes stay where they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct DescriptorWriter {
    used_bytes: usize,
    entries: u16,
    payload_blocks: u32,
}

impl DescriptorWriter {
    /// An empty descriptor.
    #[must_use]
    pub fn new() -> DescriptorWriter {
        DescriptorWriter { used_bytes: HEADER_BYTES, entries: 0, payload_blocks: 0 }
    }

    /// Payload blocks so far.
    #[must_use]
    pub fn payload_blocks(&self) -> u32 {
        self.payload_blocks
    }

    /// Is there nothing in it?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Does an entry with this many checksums still fit?
    #[must_use]
    pub fn has_room(&self, checksums: u32) -> bool {
        self.used_bytes + ENTRY_BYTES + 4 * checksums as usize <= BLOCK_BYTES_USIZE
    }

    /// Adds an entry; `checksums` has one CRC per payload block and is empty for an entry without payload.
    ///
    /// # Panics
    /// If there is no room, or the number of checksums is wrong.
    pub fn push(&mut self, block: &mut [u8], entry: &Entry, checksums: impl ExactSizeIterator<Item = u32>) {
        let expected = if entry.kind.has_payload() { entry.count } else { 0 };
        assert!(checksums.len() == expected as usize && self.has_room(expected));
        let at = self.used_bytes;
        block[at] = entry.kind.code();
        put(block, at + 1, &[0; 3]);
        put(block, at + 4, &entry.volume.to_le_bytes());
        put(block, at + 8, &entry.block.to_le_bytes());
        put(block, at + 12, &entry.count.to_le_bytes());
        put(block, at + 16, &entry.epoch.to_le_bytes());
        put(block, at + 20, &entry.old_place.0.to_le_bytes());
        put(block, at + 24, &entry.sequence.to_le_bytes());
        let mut next = at + ENTRY_BYTES;
        for crc in checksums {
            put(block, next, &crc.to_le_bytes());
            next += 4;
        }
        self.used_bytes = next;
        self.entries += 1;
        self.payload_blocks += expected;
    }

    /// Completes the block and returns its CRC: the chain value for the next batch of the stream.
    pub fn finish(&self, block: &mut [u8], header: &BatchHeader) -> u32 {
        put(block, 0, MAGIC);
        put(block, 4, &[0; 4]);
        put(block, 8, &header.lane.to_le_bytes());
        block[10] = header.stream;
        block[11] = if header.continues { FLAG_CONTINUES } else { 0 }
            | if header.continued { FLAG_CONTINUED } else { 0 };
        put(block, 12, &u16::try_from(self.payload_blocks).expect("bounded by the batch").to_le_bytes());
        put(block, 14, &self.entries.to_le_bytes());
        put(block, 16, &header.mount.to_le_bytes());
        put(block, 24, &header.generation.to_le_bytes());
        put(block, 32, &header.number.to_le_bytes());
        put(block, 40, &header.flushed.to_le_bytes());
        put(block, 48, &header.chain.to_le_bytes());
        put(block, 52, &header.next_segment.0.to_le_bytes());
        put(block, 56, &[0; 8]);
        block[self.used_bytes..BLOCK_BYTES_USIZE].fill(0);
        let crc = crate::checksum::crc32c(&block[..BLOCK_BYTES_USIZE]);
        put(block, 4, &crc.to_le_bytes());
        crc
    }
}

/// A descriptor block whose CRC and structure are good.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor<'a> {
    block: &'a [u8],
    /// The identifying fields.
    pub header: BatchHeader,
    /// Its CRC.
    pub crc: u32,
    /// Payload blocks that follow it.
    pub payload_blocks: u32,
    entries: u16,
}

impl<'a> Descriptor<'a> {
    /// Reads a descriptor, or nothing if the block is none: wrong magic, wrong CRC, or (whatever wrote that)
    /// entries that do not add up.
    #[must_use]
    pub fn decode(block: &'a [u8]) -> Option<Descriptor<'a>> {
        let block = block.get(..BLOCK_BYTES_USIZE)?;
        if &block[..4] != MAGIC {
            return None;
        }
        let crc = u32_at(block, 4);
        let mut copy: [u8; BLOCK_BYTES_USIZE] = block.try_into().expect("one block");
        if crc32c_without(&mut copy, 4) != crc {
            return None;
        }
        let header = BatchHeader {
            lane: u16_at(block, 8),
            stream: block[10],
            continues: block[11] & FLAG_CONTINUES != 0,
            continued: block[11] & FLAG_CONTINUED != 0,
            mount: u64_at(block, 16),
            generation: u64_at(block, 24),
            number: u64_at(block, 32),
            flushed: u64_at(block, 40),
            chain: u32_at(block, 48),
            next_segment: SegmentIndex(u32_at(block, 52)),
        };
        let payload_blocks = u32::from(u16_at(block, 12));
        let descriptor = Descriptor { block, header, crc, payload_blocks, entries: u16_at(block, 14) };
        descriptor.adds_up().then_some(descriptor)
    }

    /// Blocks on the device, the descriptor included.
    #[must_use]
    pub fn total_blocks(&self) -> u32 {
        1 + self.payload_blocks
    }

    /// The entries, each with the position of its first payload block behind the descriptor.
    #[must_use]
    pub fn entries(&self) -> Entries<'a> {
        Entries { block: self.block, at: HEADER_BYTES, left: self.entries, payload_index: 0 }
    }

    /// Bytes of the block that header and entries fill.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        let entries = self.entries().map(|view| ENTRY_BYTES + 4 * view.payload_blocks() as usize);
        HEADER_BYTES + entries.sum::<usize>()
    }

    fn adds_up(&self) -> bool {
        let mut at = HEADER_BYTES;
        let mut payload = 0_u64;
        for _ in 0..self.entries {
            if at + ENTRY_BYTES > BLOCK_BYTES_USIZE {
                return false;
            }
            let Some(kind) = EntryKind::of_code(self.block[at]) else { return false };
            let count = u32_at(self.block, at + 12);
            at += ENTRY_BYTES;
            if kind.has_payload() {
                payload += u64::from(count);
                at = at.saturating_add(4 * count as usize);
            }
            if at > BLOCK_BYTES_USIZE || count == 0 {
                return false;
            }
        }
        payload == u64::from(self.payload_blocks) && self.payload_blocks <= BATCH_PAYLOAD_BLOCKS_MAX
    }
}

/// The entries of a descriptor that this process made and still holds: its checksum is not computed again.
#[must_use]
pub fn own_entries(block: &[u8]) -> Entries<'_> {
    assert!(&block[..4] == MAGIC, "a finished descriptor");
    Entries { block, at: HEADER_BYTES, left: u16_at(block, 14), payload_index: 0 }
}

/// Walks the entries of a [`Descriptor`].
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    block: &'a [u8],
    at: usize,
    left: u16,
    payload_index: u32,
}

/// An entry with its checksums and the position of its payload.
#[derive(Clone, Copy, Debug)]
pub struct EntryView<'a> {
    /// The fields.
    pub entry: Entry,
    /// Its first payload block, counted from the block after the descriptor.
    pub payload_index: u32,
    checksums: &'a [u8],
}

impl EntryView<'_> {
    /// The CRC of payload block `index` of this entry.
    #[must_use]
    pub fn checksum(&self, index: u32) -> u32 {
        u32_at(self.checksums, 4 * index as usize)
    }

    /// Payload blocks of this entry.
    #[must_use]
    pub fn payload_blocks(&self) -> u32 {
        if self.entry.kind.has_payload() { self.entry.count } else { 0 }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = EntryView<'a>;

    fn next(&mut self) -> Option<EntryView<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (block, at) = (self.block, self.at);
        let entry = Entry {
            kind: EntryKind::of_code(block[at]).expect("checked by decode"),
            volume: u32_at(block, at + 4),
            block: u32_at(block, at + 8),
            count: u32_at(block, at + 12),
            epoch: u32_at(block, at + 16),
            old_place: Place(u32_at(block, at + 20)),
            sequence: u64_at(block, at + 24),
        };
        let payload_blocks = if entry.kind.has_payload() { entry.count } else { 0 };
        let end = at + ENTRY_BYTES + 4 * payload_blocks as usize;
        let view =
            EntryView { entry, payload_index: self.payload_index, checksums: &block[at + ENTRY_BYTES..end] };
        self.at = end;
        self.payload_index += payload_blocks;
        Some(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> BatchHeader {
        BatchHeader {
            lane: 3,
            stream: 1,
            continues: true,
            continued: true,
            mount: 5,
            generation: 0x0102_0304,
            number: 77,
            flushed: 70,
            chain: 0xdead_beef,
            next_segment: SegmentIndex(9),
        }
    }

    fn entry(kind: EntryKind, count: u32) -> Entry {
        Entry { kind, volume: 2, block: 100, count, epoch: 1, old_place: Place(0), sequence: 42 }
    }

    fn sample() -> [u8; BLOCK_BYTES_USIZE] {
        let mut block = [0xaa; BLOCK_BYTES_USIZE];
        let mut writer = DescriptorWriter::new();
        writer.push(&mut block, &entry(EntryKind::Data, 2), [0x11, 0x22].into_iter());
        writer.push(&mut block, &entry(EntryKind::Trim, 500), [].into_iter());
        writer.push(&mut block, &entry(EntryKind::Leaf, 1), [0x33].into_iter());
        writer.push(&mut block, &entry(EntryKind::Promise, 1), [].into_iter());
        writer.push(&mut block, &entry(EntryKind::Fill, FILL_ENDS), [].into_iter());
        writer.push(&mut block, &entry(EntryKind::CopyZero, 3), [].into_iter());
        writer.push(&mut block, &entry(EntryKind::CopyData, 1), [0x44].into_iter());
        writer.finish(&mut block, &header());
        block
    }

    #[test]
    fn the_descriptor_keeps_its_bytes() {
        let block = sample();
        assert_eq!(&block[..4], b"BTCH");
        assert_eq!(&block[8..16], &[3, 0, 1, 3, 4, 0, 7, 0]);
        assert_eq!(&block[16..24], &5_u64.to_le_bytes());
        assert_eq!(&block[48..56], &[0xef, 0xbe, 0xad, 0xde, 9, 0, 0, 0]);
        assert_eq!(&block[64..80], &[1, 0, 0, 0, 2, 0, 0, 0, 100, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(&block[88..104], &[42, 0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 0x22, 0, 0, 0]);
        assert_eq!((block[104], block[136], block[172]), (4, 16, 6));
        assert_eq!((block[204], block[216], block[236], block[268]), (7, 2, 9, 8));
    }

    #[test]
    fn what_was_written_is_read_back() {
        let block = sample();
        let descriptor = Descriptor::decode(&block).unwrap();
        assert_eq!((descriptor.header, descriptor.payload_blocks), (header(), 4));
        let entries: Vec<_> = descriptor.entries().collect();
        assert_eq!(entries[0].entry, entry(EntryKind::Data, 2));
        assert_eq!((entries[0].checksum(0), entries[0].checksum(1)), (0x11, 0x22));
        assert_eq!((entries[1].entry, entries[1].payload_index), (entry(EntryKind::Trim, 500), 2));
        assert_eq!((entries[2].payload_index, entries[2].checksum(0)), (2, 0x33));
        assert_eq!((entries.len(), entries[3].entry), (7, entry(EntryKind::Promise, 1)));
        assert_eq!(
            (entries[4].entry, entries[5].entry.kind),
            (entry(EntryKind::Fill, 2), EntryKind::CopyZero)
        );
        assert_eq!((entries[6].payload_index, entries[6].checksum(0)), (3, 0x44));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = sample();
        for bit in 0..good.len() * 8 {
            let mut block = good;
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(Descriptor::decode(&block).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn entries_that_do_not_add_up_are_refused_despite_a_good_checksum() {
        let mut state = 99_u64;
        for _ in 0..20_000 {
            let mut block = sample();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                block[8 + usize::try_from(state >> 33).unwrap() % 120] = state.to_le_bytes()[3];
            }
            let crc = crc32c_without(&mut block, 4);
            put(&mut block, 4, &crc.to_le_bytes());
            if let Some(descriptor) = Descriptor::decode(&block) {
                let payload: u32 = descriptor.entries().map(|view| view.payload_blocks()).sum();
                assert_eq!(payload, descriptor.payload_blocks);
            }
        }
    }
}
