//! The body of a checkpoint: the volumes of a lane, where their leaves are, and what lives in each segment.
//!
//! ```text
//!   volumes 4, segments 4, then per volume:
//!     number 4, epoch 4, size in blocks 8, sequence 8, identity 16, promise 4, order from 8, order after 8,
//!     base epoch 4, base sequence 8, kept segments 4, leaves 4, flags 1, name length 1, name
//!     per kept segment:  segment 4, through sequence 8
//!     per leaf:          leaf index 4, place 4, CRC32C 4, highest sequence 8
//!   then per segment:  segment 4, live blocks 4, newest batch number 8
//! ```
//!
//! Written in two copies; the root holds the CRC over the whole.

use super::batch::{Entry, FILL_BASE, FILL_BEGINS};
use super::layout::{Place, SegmentIndex};
use super::segment::SegmentTable;
use crate::limits::{VOLUME_BYTES_MAX, VOLUME_NAME_BYTES_MAX};
use crate::record::Stamp;
use crate::units::BLOCK_BYTES_U64;

/// Flag of a volume that is being filled.
const FLAG_FILLING: u8 = 1;
/// Flag of a volume whose changes a head numbers.
const FLAG_REPLICATED: u8 = 2;
/// [`KeptSegment::through`] of what is kept until filling ends.
const UNTIL_FILLED: u64 = u64::MAX;

/// A segment of the log with changes that may not be committed: another replica may still need them, and what they did
/// may have to be undone here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptSegment {
    /// Which.
    pub segment: SegmentIndex,
    /// It is kept until the changes through this one are known to be committed. The highest number: until filling ends.
    pub through: u64,
}

/// A volume as a checkpoint keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// The sequence after which its order went on when it was last filled; 0 if it never was.
    pub order_after: u64,
    /// The last change that it had in common with the volume's order when it began to be filled.
    pub base: Stamp,
    /// It is being filled: what it holds is no state that the volume ever had.
    pub filling: bool,
    /// Its changes are numbered by a head, and committed when all replicas in sync have them.
    pub replicated: bool,
    /// What of the log is kept for changes that may not be committed, without regard to what lives there.
    pub kept: Vec<KeptSegment>,
    /// Its name.
    pub name: String,
}

impl VolumeRecord {
    /// An entry in this segment has taken effect. The cleaner's moves and the copies carry stamps too, but not of changes
    /// of their own.
    pub(super) fn note_change(&mut self, entry: &Entry, segment: SegmentIndex, segments: &mut SegmentTable) {
        if !entry.kind.is_change() {
            return;
        }
        if entry.sequence > self.sequence {
            self.sequence = entry.sequence;
            self.epoch = entry.epoch;
        }
        if !self.replicated {
            return;
        }
        match self.kept.last_mut() {
            Some(kept) if kept.segment == segment && kept.through != UNTIL_FILLED => {
                kept.through = entry.sequence;
            }
            _ => {
                self.kept.push(KeptSegment { segment, through: entry.sequence });
                segments.keep(segment);
            }
        }
    }

    /// The changes through this one are committed: nobody needs them to be in the log any more.
    pub(super) fn note_committed(&mut self, sequence: u64, segments: &mut SegmentTable) {
        self.let_go(segments, |kept| kept.through <= sequence);
    }

    /// Nobody needs anything of the log for it any more.
    pub(super) fn keep_nothing(&mut self, segments: &mut SegmentTable) {
        self.let_go(segments, |_| true);
    }

    fn let_go(&mut self, segments: &mut SegmentTable, which: impl Fn(&KeptSegment) -> bool) {
        self.kept.retain(|kept| {
            let goes = which(kept);
            if goes {
                segments.stop_keeping(kept.segment);
            }
            !goes
        });
    }

    /// An [`EntryKind::Fill`](super::batch::EntryKind::Fill) of this batch has taken effect.
    pub(super) fn note_fill(&mut self, entry: &Entry, batch_number: u64, segments: &mut SegmentTable) {
        match entry.count {
            FILL_BASE => self.base = Stamp { epoch: entry.epoch, sequence: entry.sequence },
            FILL_BEGINS => {
                self.filling = true;
                (self.epoch, self.sequence) = (entry.epoch, entry.sequence);
                (self.order_from, self.order_after) = (batch_number, entry.sequence);
                // What is not of the order may have to be undone again, should this not come to its end.
                self.kept.iter_mut().for_each(|kept| kept.through = UNTIL_FILLED);
            }
            _ => {
                self.filling = false;
                self.base = Stamp::default();
                self.let_go(segments, |kept| kept.through == UNTIL_FILLED);
            }
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
        self.bytes.extend(volume.order_after.to_le_bytes());
        self.bytes.extend(volume.base.epoch.to_le_bytes());
        self.bytes.extend(volume.base.sequence.to_le_bytes());
        let kept = u32::try_from(volume.kept.len()).expect("segments fit 32 bits");
        self.bytes.extend(kept.to_le_bytes());
        self.leaves_at = self.bytes.len();
        self.bytes.extend(0_u32.to_le_bytes());
        let filling = if volume.filling { FLAG_FILLING } else { 0 };
        let replicated = if volume.replicated { FLAG_REPLICATED } else { 0 };
        self.bytes.push(filling | replicated);
        self.bytes.push(name_bytes);
        self.bytes.extend(volume.name.as_bytes());
        for kept in &volume.kept {
            self.bytes.extend(kept.segment.0.to_le_bytes());
            self.bytes.extend(kept.through.to_le_bytes());
        }
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
        let order_after = self.u64()?;
        let base = Stamp { epoch: self.u32()?, sequence: self.u64()? };
        let (kept_count, leaf_count, [flags, name_bytes]) = (self.u32()?, self.u32()?, self.take()?);
        let (name, tail) = self.0.split_at_checked(usize::from(name_bytes))?;
        self.0 = tail;
        let name = String::from_utf8(name.to_vec()).ok()?;
        let sensible = flags & !(FLAG_FILLING | FLAG_REPLICATED) == 0
            && name.len() <= VOLUME_NAME_BYTES_MAX
            && size_blocks <= VOLUME_BYTES_MAX / BLOCK_BYTES_U64;
        let mut kept = Vec::new();
        for _ in 0..kept_count {
            kept.push(KeptSegment { segment: SegmentIndex(self.u32()?), through: self.u64()? });
        }
        let mut leaves = Vec::new();
        for _ in 0..leaf_count {
            leaves.push(LeafRecord {
                leaf: self.u32()?,
                place: Place(self.u32()?),
                crc: self.u32()?,
                sequence_max: self.u64()?,
            });
        }
        let record = VolumeRecord {
            number,
            epoch,
            size_blocks,
            sequence,
            identity,
            promise,
            order_from,
            order_after,
            base,
            filling: flags & FLAG_FILLING != 0,
            replicated: flags & FLAG_REPLICATED != 0,
            kept,
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
            order_after: 6,
            base: Stamp { epoch: 9, sequence: 10 },
            filling: number == 1,
            replicated: true,
            kept: vec![KeptSegment { segment: SegmentIndex(6), through: 11 }],
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
        assert_eq!(&bytes[48..68], b"\x07\0\0\0\x08\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0");
        assert_eq!(&bytes[68..84], b"\x09\0\0\0\x0a\0\0\0\0\0\0\0\x01\0\0\0");
        assert_eq!(&bytes[84..94], b"\x02\0\0\0\x03\x04data");
        assert_eq!(&bytes[94..106], b"\x06\0\0\0\x0b\0\0\0\0\0\0\0");
        assert_eq!(&bytes[106..118], &[0, 0, 0, 0, 77, 0, 0, 0, 0xcd, 0xab, 0, 0]);
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
