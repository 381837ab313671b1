//! A shard's memory as machines see it, and the allocator of its pages.

use crate::units::{BLOCK_BYTES, MemoryRange};

/// A shard's memory. The reactor's is pinned and registered with the ring, the simulator's is a vector.
pub trait Memory {
    /// Bytes in all. Addresses are below 4 GiB.
    fn len_bytes(&self) -> u32;
    /// The bytes of a range.
    ///
    /// # Panics
    /// If it leaves the memory.
    fn bytes(&self, range: MemoryRange) -> &[u8];
    /// The bytes of a range, to change them.
    ///
    /// # Panics
    /// If it leaves the memory.
    fn bytes_mut(&mut self, range: MemoryRange) -> &mut [u8];
    /// Copies `from` to `to`, which are of equal length and do not overlap.
    ///
    /// # Panics
    /// If they leave the memory, overlap or differ in length.
    fn copy(&mut self, from: MemoryRange, to: MemoryRange);
}

/// Hands out runs of pages (4096 bytes) from a part of the memory. A bitmap, because runs live for one
/// request only and the whole of it stays in the first-level cache: 64 MiB are 2 KiB of bits.
#[derive(Debug)]
pub struct Pages {
    start: u32,
    count: u32,
    free: u32,
    /// One bit per page, set when in use. Bits past `count` are set for good.
    used: Vec<u64>,
    /// Where the search for a single page begins.
    hint: usize,
}

impl Pages {
    /// Takes charge of `range`, which begins and ends on a page.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn new(range: MemoryRange) -> Pages {
        assert!(range.start.is_multiple_of(BLOCK_BYTES) && range.len.is_multiple_of(BLOCK_BYTES));
        let count = range.len / BLOCK_BYTES;
        let mut used = vec![0_u64; count.div_ceil(64) as usize];
        if let (Some(last), tail @ 1..) = (used.last_mut(), count % 64) {
            *last = u64::MAX << tail;
        }
        Pages { start: range.start, count, free: count, used, hint: 0 }
    }

    /// Pages in all.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Pages not in use.
    #[must_use]
    pub fn free_count(&self) -> u32 {
        self.free
    }

    /// `count` pages in a row, or nothing when there is no such run.
    pub fn allocate(&mut self, count: u32) -> Option<MemoryRange> {
        if count == 0 || count > self.free {
            return None;
        }
        let first = if count == 1 { self.find_one()? } else { self.find_run(count)? };
        self.mark(first, count, true);
        self.free -= count;
        Some(MemoryRange { start: self.start + first * BLOCK_BYTES, len: count * BLOCK_BYTES })
    }

    /// Takes pages back.
    ///
    /// # Panics
    /// If they are not in use: two owners of one page would be silent corruption.
    pub fn release(&mut self, range: MemoryRange) {
        let first = (range.start - self.start) / BLOCK_BYTES;
        let count = range.len / BLOCK_BYTES;
        assert!(
            range.len.is_multiple_of(BLOCK_BYTES) && first + count <= self.count,
            "{range:?} is not ours"
        );
        self.mark(first, count, false);
        self.free += count;
    }

    fn find_one(&mut self) -> Option<u32> {
        let words = self.used.len();
        for step in 0..words {
            let word = (self.hint + step) % words;
            if self.used[word] != u64::MAX {
                self.hint = word;
                return Some(index_u32(word) * 64 + self.used[word].trailing_ones());
            }
        }
        None
    }

    /// First fit from the far end, so that runs and single pages keep out of each other's way.
    fn find_run(&self, count: u32) -> Option<u32> {
        let mut run = 0;
        let mut page = self.count;
        while page > 0 {
            page -= 1;
            let word = self.used[(page / 64) as usize];
            if page % 64 == 63 && word == u64::MAX {
                run = 0;
                page -= 63;
            } else if page % 64 == 63 && word == 0 && run + 64 <= count {
                run += 64;
                page -= 63;
            } else if word >> (page % 64) & 1 == 1 {
                run = 0;
            } else {
                run += 1;
            }
            if run == count {
                return Some(page);
            }
        }
        None
    }

    fn mark(&mut self, first: u32, count: u32, used: bool) {
        let mut page = first;
        let end = first + count;
        while page < end {
            let bits = (64 - page % 64).min(end - page);
            let mask = (u64::MAX >> (64 - bits)) << (page % 64);
            let word = &mut self.used[(page / 64) as usize];
            assert!(*word & mask == if used { 0 } else { mask }, "page {page} has another owner");
            *word ^= mask;
            page += bits;
        }
    }
}

fn index_u32(index: usize) -> u32 {
    u32::try_from(index).expect("a bitmap of at most 2^20 pages")
}

#[cfg(test)]
mod tests {
    use super::{MemoryRange, Pages};
    use crate::units::BLOCK_BYTES;

    fn pages(count: u32) -> Pages {
        Pages::new(MemoryRange { start: 8192, len: count * BLOCK_BYTES })
    }

    #[test]
    fn every_page_is_handed_out_once() {
        let mut pages = pages(130);
        let mut seen = std::collections::BTreeSet::new();
        while let Some(range) = pages.allocate(1) {
            assert!(range.start >= 8192 && range.end() <= 8192 + 130 * BLOCK_BYTES);
            assert!(seen.insert(range.start));
        }
        assert_eq!((seen.len(), pages.free_count()), (130, 0));
    }

    #[test]
    fn random_runs_never_overlap_and_all_come_back() {
        let mut pages = pages(1000);
        let mut owned: Vec<MemoryRange> = Vec::new();
        let mut state = 7_u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = u32::try_from(state >> 40).unwrap();
            if draw % 3 == 0 && !owned.is_empty() {
                pages.release(owned.swap_remove(draw as usize % owned.len()));
            } else if let Some(range) = pages.allocate(1 + draw % 200) {
                assert!(owned.iter().all(|other| other.end() <= range.start || range.end() <= other.start));
                owned.push(range);
            }
        }
        owned.into_iter().for_each(|range| pages.release(range));
        assert_eq!(pages.free_count(), 1000);
        assert_eq!(pages.allocate(1000).unwrap().len, 1000 * BLOCK_BYTES);
    }

    #[test]
    #[should_panic(expected = "another owner")]
    fn releasing_twice_is_caught() {
        let mut pages = pages(8);
        let range = pages.allocate(2).unwrap();
        pages.release(range);
        pages.release(range);
    }
}
