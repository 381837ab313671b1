//! What clients write: every sector says which write put it there and where it belongs.

use crate::sim::disk::SECTOR_BYTES;
use crate::sim::random::mix;

const WORD_BYTES: usize = 8;
/// In the upper half of a stamped sector's first word; the lower half is the number of the write.
const MAGIC: u64 = 0xb10c_57a9 << 32;
/// An odd step makes all words of a sector differ, so that a shifted copy is not taken for the original.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the bytes of a sector claim to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zero.
    Zero,
    /// Exactly what this write put into this sector.
    Write(u32),
    /// Neither.
    Garbage,
}

/// Fills `target` with what write number `write` puts into the sectors from `first_sector` of volume `volume`.
pub fn fill(target: &mut [u8], volume: u32, write: u32, first_sector: u64) {
    for (sector, bytes) in (first_sector..).zip(target.chunks_mut(SECTOR_BYTES)) {
        let (head, tail) = bytes.split_at_mut(WORD_BYTES);
        head.copy_from_slice(&(MAGIC | u64::from(write)).to_le_bytes());
        let mut word = base(volume, write, sector);
        for chunk in tail.chunks_exact_mut(WORD_BYTES) {
            chunk.copy_from_slice(&word.to_le_bytes());
            word = word.wrapping_add(STEP);
        }
    }
}

/// Recognises what a whole sector holds.
#[must_use]
pub fn recognise(bytes: &[u8], volume: u32, sector: u64) -> Content {
    let bytes: &[u8; SECTOR_BYTES] = bytes.try_into().expect("a whole sector");
    let head = u64::from_le_bytes(bytes[..WORD_BYTES].try_into().expect("a word"));
    if head == 0 {
        return if bytes == &[0; SECTOR_BYTES] { Content::Zero } else { Content::Garbage };
    }
    let Ok(write) = u32::try_from(head ^ MAGIC) else { return Content::Garbage };
    let mut word = base(volume, write, sector);
    for chunk in bytes[WORD_BYTES..].chunks_exact(WORD_BYTES) {
        if chunk != word.to_le_bytes() {
            return Content::Garbage;
        }
        word = word.wrapping_add(STEP);
    }
    Content::Write(write)
}

fn base(volume: u32, write: u32, sector: u64) -> u64 {
    mix(mix(u64::from(volume) << 32 | u64::from(write)) ^ sector)
}

#[cfg(test)]
mod tests {
    use super::{Content, fill, recognise};

    #[test]
    fn a_sector_is_recognised_only_whole_and_in_its_place() {
        let mut bytes = [0; 1024];
        fill(&mut bytes, 1, 77, 10);
        assert_eq!(recognise(&bytes[..512], 1, 10), Content::Write(77));
        assert_eq!(recognise(&bytes[512..], 1, 11), Content::Write(77));
        assert_eq!(recognise(&bytes[512..], 1, 10), Content::Garbage);
        assert_eq!(recognise(&bytes[..512], 2, 10), Content::Garbage);
        assert_eq!(recognise(&bytes[8..520], 1, 10), Content::Garbage);
        for at in 0..512 {
            let mut torn = bytes;
            torn[at] ^= 0x10;
            assert_ne!(recognise(&torn[..512], 1, 10), Content::Write(77));
        }
        assert_eq!(recognise(&[0; 512], 1, 10), Content::Zero);
    }
}
