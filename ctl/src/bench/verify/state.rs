//! The verifier's state in a file, so that a later run knows what must be on the volume.

use std::io::{self, Read, Write};

use super::super::random::mix;
use super::{Candidate, Change, Loss, Stage, Verifier};

const STATE_MAGIC: u64 = u64::from_be_bytes(*b"BERTHVS1");

/// The state on disk: little-endian words, in the order of `save`, closed by a checksum of all before.
impl Verifier {
    /// Writes everything down, so that another process can go on. Running changes must have ended.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn save(&self, to: &mut impl Write) -> io::Result<()> {
        let mut out = WordWriter { to, sum: 0 };
        let loss = u64::from(self.loss == Loss::PowerCut);
        for word in [STATE_MAGIC, loss, self.seed, self.clock, self.next_version, self.sector_count()] {
            out.word(word)?;
        }
        for &version in &self.settled {
            out.word(version)?;
        }
        out.word(self.open.len() as u64)?;
        for (&sector, list) in &self.open {
            out.word(sector)?;
            out.word(list.len() as u64)?;
            for c in list {
                let (stage, at) = match c.stage {
                    Stage::Running => (0, 0),
                    Stage::Done(at) => (1, at),
                    Stage::Lost(at) => (2, at),
                };
                let flags = u64::from(c.zeroes) | u64::from(c.durable) << 1 | stage << 2;
                for word in [c.version, flags, c.submitted, at, c.superseded, c.dead] {
                    out.word(word)?;
                }
            }
        }
        out.word(self.unflushed.len() as u64)?;
        for (done, change) in &self.unflushed {
            let zeroes = u64::from(change.zeroes);
            for word in [*done, change.version, change.first_sector, change.sector_count, zeroes] {
                out.word(word)?;
            }
        }
        let sum = out.sum;
        out.word(sum)
    }

    /// Reads what [`Verifier::save`] wrote, and expects that the server went through its loss since then.
    ///
    /// # Errors
    /// Those of the reader, and `InvalidData` for anything that `save` did not write.
    pub fn load(from: &mut impl Read) -> io::Result<Verifier> {
        let mut input = WordReader { from, sum: 0 };
        if input.word()? != STATE_MAGIC {
            return Err(invalid("not a state file of berth bench"));
        }
        let loss = match input.word()? {
            0 => Loss::Kill,
            1 => Loss::PowerCut,
            _ => return Err(invalid("an unknown kind of loss")),
        };
        let (seed, clock, next_version, sectors) =
            (input.word()?, input.word()?, input.word()?, input.word()?);
        let mut verifier = Verifier { clock, next_version, ..Verifier::new(0, seed, loss) };
        for _ in 0..sectors {
            verifier.settled.push(input.word()?);
        }
        for _ in 0..input.word()? {
            let (sector, len) = (input.word()?, input.word()?);
            if sector >= sectors {
                return Err(invalid("a sector beyond the volume"));
            }
            let list = (0..len).map(|_| input.candidate()).collect::<io::Result<Vec<_>>>()?;
            verifier.open.insert(sector, list);
        }
        for _ in 0..input.word()? {
            let [done, version, first_sector, sector_count, zeroes] =
                [input.word()?, input.word()?, input.word()?, input.word()?, input.word()?];
            if first_sector.checked_add(sector_count).is_none_or(|end| end > sectors) {
                return Err(invalid("a change beyond the volume"));
            }
            let change = Change { version, first_sector, sector_count, zeroes: zeroes == 1 };
            verifier.unflushed.push_back((done, change));
        }
        let sum = input.sum;
        if input.word()? != sum {
            return Err(invalid("the checksum does not match"));
        }
        verifier.crashed();
        Ok(verifier)
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

struct WordWriter<'a, W> {
    to: &'a mut W,
    sum: u64,
}

impl<W: Write> WordWriter<'_, W> {
    fn word(&mut self, word: u64) -> io::Result<()> {
        self.sum = mix(self.sum ^ word);
        self.to.write_all(&word.to_le_bytes())
    }
}

struct WordReader<'a, R> {
    from: &'a mut R,
    sum: u64,
}

impl<R: Read> WordReader<'_, R> {
    fn word(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.from.read_exact(&mut bytes)?;
        let word = u64::from_le_bytes(bytes);
        self.sum = mix(self.sum ^ word);
        Ok(word)
    }

    fn candidate(&mut self) -> io::Result<Candidate> {
        let [version, flags, submitted, at, superseded, dead] =
            [self.word()?, self.word()?, self.word()?, self.word()?, self.word()?, self.word()?];
        let stage = match flags >> 2 {
            0 => Stage::Running,
            1 => Stage::Done(at),
            2 => Stage::Lost(at),
            _ => return Err(invalid("an unknown stage")),
        };
        let (zeroes, durable) = (flags & 1 != 0, flags & 2 != 0);
        Ok(Candidate { version, zeroes, durable, submitted, stage, superseded, dead })
    }
}
