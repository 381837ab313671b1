//! What a member remembers while it is filled: which blocks live changes have written, and what it owes the head.
//!
//! Live changes and copies reach it over one connection and mix freely. A change always wins over a copy: it is as new as
//! the copy or newer, or one that comes later will be.

use crate::record::Stamp;
use crate::wire::peer_message::CopyHeader;
use std::collections::BTreeMap;

/// Blocks that one set of bits covers: those of a leaf of the map.
const SET_BLOCKS: u32 = 512;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Filling {
    /// Which fill.
    pub(super) fill: u64,
    /// The order goes on after it.
    pub(super) after: Stamp,
    /// Its beginning is on stable media.
    pub(super) stored: bool,
    /// The end is being stored: no copy comes any more.
    pub(super) ending: bool,
    /// Copies that are taken care of.
    pub(super) copies: u32,
    /// An answer to the beginning is owed.
    pub(super) filling_due: bool,
    /// A count of copies is owed.
    pub(super) copied_due: bool,
    /// Blocks that were written since, one bit each.
    written: BTreeMap<u32, [u64; SET_BLOCKS as usize / 64]>,
}

impl Filling {
    pub(super) fn new(fill: u64, after: Stamp) -> Filling {
        Filling {
            fill,
            after,
            stored: false,
            ending: false,
            copies: 0,
            filling_due: false,
            copied_due: false,
            written: BTreeMap::new(),
        }
    }

    /// A live change of these blocks.
    pub(super) fn note_change(&mut self, block: u32, count: u32) {
        for block in block..block + count {
            let set = self.written.entry(block / SET_BLOCKS).or_default();
            set[(block % SET_BLOCKS / 64) as usize] |= 1 << (block % 64);
        }
    }

    fn is_written(&self, block: u32) -> bool {
        let set = self.written.get(&(block / SET_BLOCKS));
        set.is_some_and(|set| set[(block % SET_BLOCKS / 64) as usize] >> (block % 64) & 1 == 1)
    }

    /// The runs of a copy that no live change has written: first block and count.
    pub(super) fn uncovered(&self, copy: CopyHeader) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for block in (copy.block..copy.block + copy.count).filter(|block| !self.is_written(*block)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }

    /// Nothing of it is needed any more but the answers.
    pub(super) fn end(&mut self) {
        self.ending = true;
        self.written = BTreeMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_cut_around_what_was_written() {
        let mut filling = Filling::new(1, Stamp::default());
        let copy = |block, count| CopyHeader { data: true, block, count };
        assert_eq!(filling.uncovered(copy(500, 12)), [(500, 12)]);
        filling.note_change(510, 4);
        filling.note_change(502, 1);
        assert_eq!(filling.uncovered(copy(500, 12)), [(500, 2), (503, 7)]);
        assert_eq!(filling.uncovered(copy(510, 2)), []);
        assert_eq!(filling.uncovered(copy(512, 100)), [(514, 98)]);
        filling.note_change(u32::MAX - 2, 2);
        assert_eq!(filling.uncovered(copy(u32::MAX - 3, 3)), [(u32::MAX - 3, 1)]);
    }
}
