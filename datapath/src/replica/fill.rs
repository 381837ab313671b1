//! What a member remembers while it is filled: which blocks live changes have written, and what it owes the head.
//!
//! Live changes and copies reach it over one connection and mix freely. A change always wins over a copy: it is as new as
//! the copy or newer, or one that comes later will be.

use crate::block_set::BlockSet;
use crate::record::Stamp;
use crate::wire::peer_message::CopyHeader;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Filling {
    /// Which fill.
    pub(super) fill: u64,
    /// The order goes on after it.
    pub(super) after: Stamp,
    /// What the replica held had this much in common with the order.
    pub(super) base: Stamp,
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
    /// There is no room for it: it is broken off once its beginning is stored, after this change.
    pub(super) lacks_room: Option<Stamp>,
    /// Blocks that were written since.
    written: BlockSet,
}

impl Filling {
    pub(super) fn new(fill: u64, after: Stamp, base: Stamp) -> Filling {
        Filling {
            fill,
            after,
            base,
            stored: false,
            ending: false,
            copies: 0,
            filling_due: false,
            copied_due: false,
            lacks_room: None,
            written: BlockSet::default(),
        }
    }

    /// A live change of these blocks.
    pub(super) fn note_change(&mut self, block: u32, count: u32) {
        self.written.insert(block, count);
    }

    /// The runs of a copy that no live change has written: first block and count.
    pub(super) fn uncovered(&self, copy: CopyHeader) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for block in (copy.block..copy.block + copy.count).filter(|block| !self.written.contains(*block)) {
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
        self.written = BlockSet::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_cut_around_what_was_written() {
        let mut filling = Filling::new(1, Stamp::default(), Stamp::default());
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
