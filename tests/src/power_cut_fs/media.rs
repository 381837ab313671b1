//! A disk with a volatile cache, as bytes: what was written, what is safe, and what a loss of power leaves.

/// The unit that a disk writes whole.
const SECTOR: usize = 512;

/// How a loss of power treats the writes that are not safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All are lost.
    Nothing,
    /// Each write survives whole or is lost, one or the other in half of the cases.
    Writes,
    /// Each sector of each write survives or is lost.
    Sectors,
    /// The writes up to some moment survive; the one of that moment is torn.
    Prefix,
    /// All survive: the caches were written out just in time.
    Everything,
}

impl Cut {
    /// All ways, to go through.
    pub const ALL: [Cut; 5] = [Cut::Sectors, Cut::Writes, Cut::Prefix, Cut::Nothing, Cut::Everything];
}

/// A write that is not safe yet.
#[derive(Debug)]
struct Unsafe {
    offset: usize,
    data: Vec<u8>,
    answered: bool,
    number: u64,
}

/// The disk. A file's size is taken as safe at once: its growth is not what these tests are about.
#[derive(Debug, Default)]
pub struct Media {
    /// What reads return.
    cached: Vec<u8>,
    /// What a loss of power cannot touch.
    safe: Vec<u8>,
    pending: Vec<Unsafe>,
    writes: u64,
}

impl Media {
    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cached.len()
    }

    /// Is nothing there?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cached.is_empty()
    }

    /// Writes that would be lost now, if power were.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Grows with zeroes, or shrinks.
    pub fn resize(&mut self, len: usize) {
        self.cached.resize(len, 0);
        self.safe.resize(len, 0);
        self.pending.retain(|write| write.offset + write.data.len() <= len);
    }

    /// The bytes from `offset` on, as far as there are any.
    #[must_use]
    pub fn read(&self, offset: usize, len: usize) -> &[u8] {
        let start = offset.min(self.cached.len());
        &self.cached[start..start + len.min(self.cached.len() - start)]
    }

    /// Takes a write, growing if needed. It is not answered yet; the number names it.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> u64 {
        if offset + data.len() > self.len() {
            self.resize(offset + data.len());
        }
        self.cached[offset..offset + data.len()].copy_from_slice(data);
        self.writes += 1;
        self.pending.push(Unsafe { offset, data: data.to_vec(), answered: false, number: self.writes });
        self.writes
    }

    /// The writer is about to learn that the write is done.
    pub fn answer(&mut self, number: u64) {
        // Not there any more: a loss of power came first.
        if let Some(write) = self.pending.iter_mut().find(|write| write.number == number) {
            write.answered = true;
        }
    }

    /// Makes safe what was answered. A write that is still under way is not covered, as on a real disk.
    pub fn sync(&mut self) {
        for write in self.pending.extract_if(.., |write| write.answered) {
            self.safe[write.offset..write.offset + write.data.len()].copy_from_slice(&write.data);
        }
    }

    /// The power goes, and comes back.
    pub fn cut(&mut self, how: Cut, mut random: impl FnMut() -> u64) {
        let last = usize::try_from(random() % (self.pending.len() as u64 + 1)).expect("a position");
        for (position, write) in std::mem::take(&mut self.pending).into_iter().enumerate() {
            let whole = random().is_multiple_of(2);
            for (number, sector) in write.data.chunks(SECTOR).enumerate() {
                let each = random().is_multiple_of(2);
                let survives = match how {
                    Cut::Nothing => false,
                    Cut::Writes => whole,
                    Cut::Sectors => each,
                    Cut::Prefix => position < last || (position == last && each),
                    Cut::Everything => true,
                };
                if survives {
                    let at = write.offset + number * SECTOR;
                    self.safe[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        self.cached.copy_from_slice(&self.safe);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter() -> impl FnMut() -> u64 {
        let mut state = 0_u64;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        }
    }

    #[test]
    fn only_answered_and_synced_writes_are_safe() {
        let mut media = Media::default();
        media.resize(4 * SECTOR);
        let first = media.write(0, &[1; SECTOR]);
        media.answer(first);
        media.write(SECTOR, &[2; SECTOR]);
        media.sync();
        let third = media.write(2 * SECTOR, &[3; SECTOR]);
        media.answer(third);
        assert_eq!(media.read(2 * SECTOR, 1), [3]);
        assert_eq!(media.pending(), 2);
        media.cut(Cut::Nothing, counter());
        assert_eq!([0, 1, 2].map(|sector| media.read(sector * SECTOR, 1)[0]), [1, 0, 0]);
    }

    #[test]
    fn a_cut_tears_between_sectors_and_never_within() {
        let mut torn = false;
        let mut random = counter();
        for _ in 0..20 {
            let mut media = Media::default();
            media.write(0, &[7; 8 * SECTOR]);
            media.cut(Cut::Sectors, &mut random);
            let sectors: Vec<_> = media.read(0, 8 * SECTOR).chunks(SECTOR).map(<[u8]>::to_vec).collect();
            assert!(sectors.iter().all(|sector| sector == &[7; SECTOR] || sector == &[0; SECTOR]));
            torn |= sectors.iter().any(|sector| sector[0] != sectors[0][0]);
        }
        assert!(torn);
    }

    #[test]
    fn an_older_unsafe_write_may_outlive_a_newer_one_but_not_undo_a_safe_one() {
        let mut random = counter();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..50 {
            let mut media = Media::default();
            for value in 1..=3 {
                let number = media.write(0, &[value; SECTOR]);
                media.answer(number);
                if value == 1 {
                    media.sync();
                }
            }
            media.cut(Cut::Writes, &mut random);
            seen.insert(media.read(0, 1)[0]);
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 2, 3]);
    }
}
