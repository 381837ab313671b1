//! A shard's memory as a plain vector that knows whose turn it is.
//!
//! The reactor gives buffers to the kernel, and an engine that touches one before it comes back would corrupt
//! data only now and then. Here every range that an effect names is *lent* to the driver until the event that
//! ends the effect, and touching it meanwhile is a panic at the very line that does it.

use datapath::memory::Memory;
use datapath::units::MemoryRange;

use super::random::Random;

const PAGE_BYTES: u32 = 4096;
/// Memory is cleaned between lives in parts of this size, and only where it was touched.
const PART_BYTES: usize = 64 << 10;

/// What the driver does with a range that it was lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lending {
    /// The driver reads it (a device write, a send): the engine may read it too.
    Shared,
    /// The driver fills it (a device read, a receive): the engine may not even look.
    Exclusive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lend {
    range: MemoryRange,
    lending: Lending,
}

/// The simulator's implementation of [`Memory`].
#[derive(Debug, Default)]
pub struct SimMemory {
    bytes: Vec<u8>,
    lends: Vec<Lend>,
    /// How many lends touch each page, so that the common check is one look.
    lends_of_page: Vec<u16>,
    touched: Vec<bool>,
}

impl SimMemory {
    /// `len_bytes` of zeroes.
    #[must_use]
    pub fn new(len_bytes: u32) -> SimMemory {
        assert!(len_bytes.is_multiple_of(PAGE_BYTES), "{len_bytes} bytes are not whole pages");
        let len = len_bytes as usize;
        SimMemory {
            bytes: vec![0; len],
            lends: Vec::new(),
            lends_of_page: vec![0; (len_bytes / PAGE_BYTES) as usize],
            touched: vec![false; len.div_ceil(PART_BYTES)],
        }
    }

    /// Makes the memory what it would be in a new process: zeroes, all of it the engine's.
    pub fn reset(&mut self) {
        self.lends.clear();
        self.lends_of_page.fill(0);
        for (part, touched) in self.bytes.chunks_mut(PART_BYTES).zip(&mut self.touched) {
            if std::mem::take(touched) {
                part.fill(0);
            }
        }
    }

    /// The driver takes charge of a range.
    ///
    /// # Panics
    /// If the engine names memory that the driver has already, unless both only read it.
    pub fn lend(&mut self, range: MemoryRange, lending: Lending) {
        let verb = match lending {
            Lending::Shared => "asks to send or write",
            Lending::Exclusive => "asks to fill",
        };
        self.assert_free(range, lending, verb);
        self.count_lends(range, |count| *count += 1);
        self.lends.push(Lend { range, lending });
    }

    /// A range that the driver was to fill is the engine's again. Of it `filled_bytes` were; the rest holds noise, whatever
    /// was there before.
    ///
    /// # Panics
    /// If it was not lent.
    pub fn take_back_filled(&mut self, range: MemoryRange, filled_bytes: u32, random: &mut Random) {
        self.take_back(range, Lending::Exclusive);
        self.poison(range.part(filled_bytes, range.len - filled_bytes), random);
    }

    /// The range is the engine's again.
    ///
    /// # Panics
    /// If it was not lent: the simulator's own books are wrong.
    pub fn take_back(&mut self, range: MemoryRange, lending: Lending) {
        let lend = Lend { range, lending };
        let position = self.lends.iter().rposition(|other| *other == lend).expect("the range was lent");
        self.lends.swap_remove(position);
        self.count_lends(range, |count| *count -= 1);
    }

    /// The driver's view of a range, lent or not.
    #[must_use]
    pub fn driver_bytes(&self, range: MemoryRange) -> &[u8] {
        &self.bytes[range.start as usize..range.end() as usize]
    }

    /// The driver's view of a range that it fills.
    pub fn driver_bytes_mut(&mut self, range: MemoryRange) -> &mut [u8] {
        self.touch(range);
        &mut self.bytes[range.start as usize..range.end() as usize]
    }

    /// A repeated random word: cheaper than true noise, and as wrong when it is taken for data.
    fn poison(&mut self, range: MemoryRange, random: &mut Random) {
        let noise = (random.bits() | 1).to_le_bytes();
        let (words, rest) = self.driver_bytes_mut(range).as_chunks_mut::<8>();
        words.fill(noise);
        rest.copy_from_slice(&noise[..rest.len()]);
    }

    fn touch(&mut self, range: MemoryRange) {
        if range.len > 0 {
            let last = (range.end() - 1) as usize / PART_BYTES;
            self.touched[range.start as usize / PART_BYTES..=last].fill(true);
        }
    }

    fn pages(range: MemoryRange) -> std::ops::Range<usize> {
        let first = (range.start / PAGE_BYTES) as usize;
        if range.len == 0 { first..first } else { first..range.end().div_ceil(PAGE_BYTES) as usize }
    }

    fn count_lends(&mut self, range: MemoryRange, change: impl Fn(&mut u16)) {
        self.lends_of_page[Self::pages(range)].iter_mut().for_each(change);
    }

    /// Panics if a lend forbids this use of the range.
    #[track_caller]
    fn assert_free(&self, range: MemoryRange, uses: Lending, verb: &str) {
        if self.lends_of_page[Self::pages(range)].iter().all(|count| *count == 0) {
            return;
        }
        for lend in &self.lends {
            let overlaps = lend.range.start < range.end() && range.start < lend.range.end();
            let forbidden = uses == Lending::Exclusive || lend.lending == Lending::Exclusive;
            assert!(!(overlaps && forbidden), "the engine {verb} {range:?}, but the driver has {lend:?}");
        }
    }
}

impl Memory for SimMemory {
    fn len_bytes(&self) -> u32 {
        u32::try_from(self.bytes.len()).expect("addresses are below 4 GiB")
    }

    fn bytes(&self, range: MemoryRange) -> &[u8] {
        self.assert_free(range, Lending::Shared, "reads");
        self.driver_bytes(range)
    }

    fn bytes_mut(&mut self, range: MemoryRange) -> &mut [u8] {
        self.assert_free(range, Lending::Exclusive, "changes");
        self.driver_bytes_mut(range)
    }

    fn copy(&mut self, from: MemoryRange, to: MemoryRange) {
        assert_eq!(from.len, to.len, "lengths differ");
        assert!(from.end() <= to.start || to.end() <= from.start, "{from:?} and {to:?} overlap");
        self.assert_free(from, Lending::Shared, "copies from");
        self.assert_free(to, Lending::Exclusive, "copies to");
        self.touch(to);
        self.bytes.copy_within(from.start as usize..from.end() as usize, to.start as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::{Lending, Memory, MemoryRange, Random, SimMemory};

    fn range(start: u32, len: u32) -> MemoryRange {
        MemoryRange { start, len }
    }

    fn lent(lending: Lending) -> SimMemory {
        let mut memory = SimMemory::new(1 << 20);
        memory.bytes_mut(range(4096, 100)).fill(7);
        memory.lend(range(4100, 50), lending);
        memory
    }

    #[test]
    fn neighbours_of_a_lent_range_stay_usable() {
        let mut memory = lent(Lending::Exclusive);
        memory.bytes_mut(range(4096, 4)).fill(1);
        memory.bytes_mut(range(4150, 50)).fill(1);
        memory.take_back(range(4100, 50), Lending::Exclusive);
        memory.bytes_mut(range(4096, 100)).fill(2);
    }

    #[test]
    fn shared_ranges_may_be_read_and_lent_again() {
        let mut memory = lent(Lending::Shared);
        assert_eq!(memory.bytes(range(4100, 50)), [7; 50]);
        memory.lend(range(4120, 10), Lending::Shared);
        memory.take_back(range(4100, 50), Lending::Shared);
        memory.take_back(range(4120, 10), Lending::Shared);
        memory.bytes_mut(range(4096, 100)).fill(2);
    }

    #[test]
    #[should_panic(expected = "the engine changes")]
    fn changing_a_range_under_a_device_write_is_caught() {
        lent(Lending::Shared).bytes_mut(range(4149, 1));
    }

    #[test]
    #[should_panic(expected = "the engine reads")]
    fn looking_at_a_range_under_a_device_read_is_caught() {
        let _ = lent(Lending::Exclusive).bytes(range(0, 8192));
    }

    #[test]
    #[should_panic(expected = "the engine asks to fill")]
    fn filling_one_range_twice_is_caught() {
        lent(Lending::Exclusive).lend(range(4110, 1), Lending::Exclusive);
    }

    #[test]
    fn what_was_not_filled_comes_back_as_noise() {
        let mut memory = lent(Lending::Exclusive);
        memory.take_back_filled(range(4100, 50), 10, &mut Random::new(1));
        assert_eq!(memory.bytes(range(4096, 14)), [7; 14]);
        assert_ne!(memory.bytes(range(4110, 40)), [7; 40]);
        assert_eq!(memory.bytes(range(4150, 46)), [7; 46]);
    }

    #[test]
    fn a_new_process_finds_zeroes() {
        let mut memory = lent(Lending::Exclusive);
        memory.copy(range(4096, 4), range(900_000, 4));
        memory.reset();
        assert!(memory.bytes(range(0, 1 << 20)).iter().all(|byte| *byte == 0));
    }
}
