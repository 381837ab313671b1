//! A set of a volume's blocks: a few that are far apart, or many that are close together.

use std::collections::BTreeMap;

/// Blocks that one set of bits covers: those of a leaf of the map.
const PART_BLOCKS: u32 = 512;
const WORDS: usize = PART_BLOCKS as usize / 64;

/// Blocks of a volume. Takes about 100 bytes for each 512 blocks (2 MiB) of which it holds any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSet {
    parts: BTreeMap<u32, [u64; WORDS]>,
}

impl BlockSet {
    /// Adds `count` blocks from `first` on.
    ///
    /// # Panics
    /// If the last of them has no number.
    pub fn insert(&mut self, first: u32, count: u32) {
        assert!(first.checked_add(count).is_some(), "{count} blocks from {first} on");
        let (mut block, end) = (first, first + count);
        while block < end {
            let part = self.parts.entry(block / PART_BLOCKS).or_default();
            let stop = end.min((block / PART_BLOCKS).saturating_add(1).saturating_mul(PART_BLOCKS));
            for block in block..stop {
                part[(block % PART_BLOCKS / 64) as usize] |= 1 << (block % 64);
            }
            block = stop;
        }
    }

    /// Is the block one of them?
    #[must_use]
    pub fn contains(&self, block: u32) -> bool {
        let part = self.parts.get(&(block / PART_BLOCKS));
        part.is_some_and(|part| part[(block % PART_BLOCKS / 64) as usize] >> (block % 64) & 1 == 1)
    }

    /// The first of them from `block` on.
    #[must_use]
    pub fn next_from(&self, block: u32) -> Option<u32> {
        self.parts.range(block / PART_BLOCKS..).find_map(|(part, words)| {
            let start = part * PART_BLOCKS;
            let skipped = block.saturating_sub(start);
            let first = words.iter().enumerate().skip((skipped / 64) as usize).find_map(|(index, word)| {
                let index = u32::try_from(index).expect("a few words");
                let kept = if index == skipped / 64 { word & (u64::MAX << (skipped % 64)) } else { *word };
                (kept != 0).then(|| index * 64 + kept.trailing_zeros())
            });
            first.map(|offset| start + offset)
        })
    }

    /// Adds all of the other.
    pub fn extend(&mut self, other: &BlockSet) {
        for (part, words) in &other.parts {
            let own = self.parts.entry(*part).or_default();
            own.iter_mut().zip(words).for_each(|(own, other)| *own |= other);
        }
    }

    /// How many parts of 512 blocks it holds any of: what it takes in memory.
    #[must_use]
    pub fn parts(&self) -> usize {
        self.parts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_was_inserted_and_nothing_else() {
        let mut set = BlockSet::default();
        let ranges = [(0, 1), (510, 4), (1023, 1), (5000, 1030), (u32::MAX - 2, 2)];
        for (first, count) in ranges {
            set.insert(first, count);
        }
        let inside =
            |block: u32| ranges.iter().any(|(first, count)| (*first..first + count).contains(&block));
        assert!((0..8000).chain(u32::MAX - 4..=u32::MAX).all(|block| set.contains(block) == inside(block)));
        let mut found = Vec::new();
        let mut next = set.next_from(0);
        while let Some(block) = next {
            found.push(block);
            next = set.next_from(block + 1);
        }
        let all: Vec<u32> = ranges.iter().flat_map(|(first, count)| *first..first + count).collect();
        assert_eq!(found, all);
        assert_eq!((set.next_from(512), set.next_from(514)), (Some(512), Some(1023)));
        assert_eq!(set.next_from(u32::MAX), None);
    }

    #[test]
    fn two_become_one() {
        let (mut one, mut other) = (BlockSet::default(), BlockSet::default());
        one.insert(3, 2);
        other.insert(4, 2);
        other.insert(9000, 1);
        one.extend(&other);
        assert_eq!((one.next_from(0), one.next_from(6), one.parts()), (Some(3), Some(9000), 2));
        assert!(one.contains(5) && !one.contains(6));
    }
}
