//! The body of a checkpoint: the volumes of a lane, where their leaves are, and what lives in each segment.
//!
//! ```text
//!   volumes 4, segments 4, then per volume:
//!     number 4, epoch 4, size in blocks 8, sequence 8, identity 16, promise 4, order from 8, leaves 4,
//!     filling 1, name length 1, name
//!     per leaf:     leaf index 4, place 4, CRC32C 4, highest sequence 8
//!   then per segment:  segment 4, live blocks 4, newest batch number 8
//! ```
//!
//! Written in two copies; the root holds the CRC over the whole.

use super::batch::{Entry, FILL_BEGINS};
use super::layout::{Place, SegmentIndex};
use crate::limits::{VOLUME_BYTES_MAX, VOLUME_NAME_BYTES_MAX};
use crate::record::Stamp;
use crate::units::BLOCK_BYTES_U64;

/// A volume as a checkpoint keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Its number in the pool, never given out twice.
    pub number: u32,
    /// Epoch of its last change that the checkpoint includes.
    pub epoch: u32,
    /// Size in blocks.
    pub size_blocks: u64,
    /// Sequence of its last change that the checkpoint includes.
    pub sequence: u64,
    /// Tells it from every other volume of this name.
    pub identity: [u8; 16],
    /// The lowest epoch that its replica here may still take part in.
    pub promise: u32,
    /// Its changes in batches up to this one are of an order that it does not follow any more. In that batch itself only
    /// what lies behind the entry that begins to fill it counts.
    pub order_from: u64,
    /// It is being filled: what it holds is no state that the volume ever had.
    pub filling: bool,
    /// Its name.
    pub name: String,
}

impl VolumeRecord {
    /// An entry has taken effect. The cleaner's moves and the copies carry stamps too, but not of changes of their own.
    pub(super) fn note_change(&mut self, entry: &Entry) {
        if entry.kind.is_change() && entry.sequence > self.sequence {
            self.sequence = entry.sequence;
            self.epoch = entry.epoch;
        }
    }

    /// An [`EntryKind::Fill`](super::batch::EntryKind::Fill) of this batch has taken effect.
    pub(super) fn note_fill(&mut self, entry: &Entry, batch_number: u64) {
        self.filling = entry.count == FILL_BEGINS;
        if self.filling {
            (self.epoch, self.sequence) = (entry.epoch, entry.sequence);
            self.order_from = batch_number;
        }
    }

    /// The stamp of the last change in effect.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        Stamp { epoch: self.epoch, sequence: self.sequence }
    }
}

/// Where a leaf of a volume's map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafRecord {
    /// Which leaf of the volume.
    pub leaf: u32,
    /// Where; [`Place::NONE`] for a leaf of holes only, kept for its sequence.
    pub place: Place,
    /// CRC32C of its block.
    pub crc: u32,
    /// Highest sequence of a change to its blocks.
    pub sequence_max: u64,
}

/// What is known of a segment that the lane owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Which.
    pub segment: SegmentIndex,
    /// Blocks in it that something still refers to.
    pub live_blocks: u32,
    /// Number of the newest batch in it: its age.
    pub newest_number: u64,
}

/// Builds a body.
#[derive(Debug, Default)]
pub struct BodyWriter {
    bytes: Vec<u8>,
    leaves_at: usize,
}

impl BodyWriter {
    /// Starts a body with so many volumes and segments.
    #[must_use]
    pub fn new(volumes: u32, segments: u32) -> BodyWriter {
        let mut writer = BodyWriter::default();
        writer.bytes.extend(volumes.to_le_bytes());
        writer.bytes.extend(segments.to_le_bytes());
        writer
    }

    /// Adds a volume; its leaves follow.
    pub fn volume(&mut self, volume: &VolumeRecord) {
        let name_bytes = u8::try_from(volume.name.len()).expect("names have at most 63 bytes");
        self.bytes.extend(volume.number.to_le_bytes());
        self.bytes.extend(volume.epoch.to_le_bytes());
        self.bytes.extend(volume.size_blocks.to_le_bytes());
        self.bytes.extend(volume.sequence.to_le_bytes());
        self.bytes.extend(volume.identity);
        self.bytes.extend(volume.promise.to_le_bytes());
        self.bytes.extend(volume.order_from.to_le_bytes());
        self.leaves_at = self.bytes.len();
        self.bytes.extend(0_u32.to_le_bytes());
        self.bytes.push(u8::from(volume.filling));
        self.bytes.push(name_bytes);
        self.bytes.extend(volume.name.as_bytes());
    }

    /// Adds a leaf of the volume added last.
    pub fn leaf(&mut self, leaf: &LeafRecord) {
        let counter = &mut self.bytes[self.leaves_at..self.leaves_at + 4];
        let count = u32::from_le_bytes((&*counter).try_into().expect("four bytes")) + 1;
        counter.copy_from_slice(&count.to_le_bytes());
        self.bytes.extend(leaf.leaf.to_le_bytes());
        self.bytes.extend(leaf.place.0.to_le_bytes());
        self.bytes.extend(leaf.crc.to_le_bytes());
        self.bytes.extend(leaf.sequence_max.to_le_bytes());
    }

    /// Adds a segment; all volumes have been added.
    pub fn segment(&mut self, segment: &SegmentRecord) {
        self.bytes.extend(segment.segment.0.to_le_bytes());
        self.bytes.extend(segment.live_blocks.to_le_bytes());
        self.bytes.extend(segment.newest_number.to_le_bytes());
    }

    /// Length so far.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Bytes that one [`SegmentRecord`] takes.
pub const SEGMENT_RECORD_BYTES: usize = 16;

/// A body as read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Body {
    /// The volumes with their leaves.
    pub volumes: Vec<(VolumeRecord, Vec<LeafRecord>)>,
    /// The segments of the lane.
    pub segments: Vec<SegmentRecord>,
}

impl Body {
    /// Reads a body whose CRC was found good; nothing if it makes no sense all the same.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Body> {
        let mut input = Input(bytes);
        let (volumes, segments) = (input.u32()?, input.u32()?);
        let mut body = Body::default();
        for _ in 0..volumes {
            body.volumes.push(input.volume()?);
        }
        for _ in 0..segments {
            body.segments.push(SegmentRecord {
                segment: SegmentIndex(input.u32()?),
                live_blocks: input.u32()?,
                newest_number: input.u64()?,
            });
        }
        input.0.is_empty().then_some(body)
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn volume(&mut self) -> Option<(VolumeRecord, Vec<LeafRecord>)> {
        let (number, epoch, size_blocks, sequence) = (self.u32()?, self.u32()?, self.u64()?, self.u64()?);
        let (identity, promise, order_from) = (self.take()?, self.u32()?, self.u64()?);
        let (leaf_count, [filling, name_bytes]) = (self.u32()?, self.take()?);
        let (name, tail) = self.0.split_at_checked(usize::from(name_bytes))?;
        self.0 = tail;
        let name = String::from_utf8(name.to_vec()).ok()?;
        let sensible = filling <= 1
            && name.len() <= VOLUME_NAME_BYTES_MAX
            && size_blocks <= VOLUME_BYTES_MAX / BLOCK_BYTES_U64;
        let mut leaves = Vec::new();
        for _ in 0..leaf_count {
            leaves.push(LeafRecord {
                leaf: self.u32()?,
                place: Place(self.u32()?),
                crc: self.u32()?,
                sequence_max: self.u64()?,
            });
        }
        let filling = filling == 1;
        let record = VolumeRecord {
            number,
            epoch,
            size_blocks,
            sequence,
            identity,
            promise,
            order_from,
            filling,
            name,
        };
        sensible.then_some((record, leaves))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Body, Vec<u8>) {
        let volume = |number: u32, name: &str| VolumeRecord {
            number,
            epoch: 1,
            size_blocks: 1000,
            sequence: 5,
            identity: [3; 16],
            promise: 7,
            order_from: 8,
            filling: number == 1,
            name: name.to_owned(),
        };
        let leaf = |leaf| LeafRecord { leaf, place: Place(77), crc: 0xabcd, sequence_max: 4 };
        let body = Body {
            volumes: vec![(volume(1, "data"), vec![leaf(0), leaf(9)]), (volume(4, "x"), vec![])],
            segments: vec![SegmentRecord { segment: SegmentIndex(6), live_blocks: 12, newest_number: 8 }],
        };
        let mut writer = BodyWriter::new(2, 1);
        for (volume, leaves) in &body.volumes {
            writer.volume(volume);
            leaves.iter().for_each(|leaf| writer.leaf(leaf));
        }
        body.segments.iter().for_each(|segment| writer.segment(segment));
        (body, writer.finish())
    }

    #[test]
    fn what_was_written_is_read_back_and_keeps_its_bytes() {
        let (body, bytes) = sample();
        assert_eq!(Body::decode(&bytes), Some(body));
        assert_eq!(&bytes[..12], &[2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&bytes[48..70], b"\x07\0\0\0\x08\0\0\0\0\0\0\0\x02\0\0\0\x01\x04data");
        assert_eq!(&bytes[70..82], &[0, 0, 0, 0, 77, 0, 0, 0, 0xcd, 0xab, 0, 0]);
        assert_eq!(&bytes[bytes.len() - 16..bytes.len() - 8], &[6, 0, 0, 0, 12, 0, 0, 0]);
    }

    #[test]
    fn no_cut_or_change_makes_it_panic() {
        let (_, bytes) = sample();
        for end in 0..bytes.len() {
            assert_eq!(Body::decode(&bytes[..end]), None);
        }
        for at in 0..bytes.len() {
            for change in [1, 0x80, 0xff] {
                let mut other = bytes.clone();
                other[at] ^= change;
                let _ = Body::decode(&other);
            }
        }
    }
}
