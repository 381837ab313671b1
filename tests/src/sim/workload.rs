//! What clients ask for: every kind of request, of every size, in patterns that differ from seed to seed.

use super::random::Random;

const SECTOR_BYTES: u64 = 512;
const BLOCK_BYTES: u64 = 4096;
/// Percentage of requests that may be long: more, and they would be all that a seed has time for.
const LONG: u64 = 4;

/// One request that a client is going to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What for.
    pub kind: AskKind,
    /// First byte.
    pub offset_bytes: u64,
    /// Number of bytes.
    pub length_bytes: u64,
    /// Set the FUA flag. Servers accept it on every command.
    pub fua: bool,
}

/// The kinds of requests, with the flags that only one kind has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AskKind {
    /// Read; `one_piece` is the DF flag.
    Read { one_piece: bool },
    /// Write.
    Write,
    /// Flush.
    Flush,
    /// Trim.
    Trim,
    /// Write zeroes.
    Zeroes { no_hole: bool, only_if_fast: bool },
    /// Read ahead.
    Cache,
    /// Ask which parts hold data.
    Status { one_extent: bool },
    /// A command that does not exist.
    Unknown,
}

/// How one seed's clients behave.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// Relative frequency of reads, writes, flushes, trims, zeroes, cache, status and nonsense.
    weights: [u64; 8],
    /// Percentage of requests that begin and end on a block.
    aligned: u64,
    /// Percentage of requests that fall into the hot part.
    hot: u64,
    /// Percentage of changes with FUA.
    fua: u64,
    /// Percentage of requests that go on where the last one ended.
    sequential: u64,
    /// Longest request.
    bytes_max: u64,
    /// Percentage of writes that may be so long.
    long_writes: u64,
}

impl Pattern {
    /// Draws a pattern: each kind of request and each habit is absent in some seeds and frequent in others.
    #[must_use]
    pub fn draw(random: &mut Random, bytes_max: u64) -> Pattern {
        let mut weight = |usual: u64| if random.percent(20) { 0 } else { usual * random.range(1..=4) };
        let weights = [
            weight(30) + 10,
            weight(40) + 15,
            weight(5),
            weight(6),
            weight(5),
            weight(1),
            weight(3),
            weight(1),
        ];
        Pattern {
            weights,
            aligned: *random.pick(&[0, 50, 80, 100]),
            hot: *random.pick(&[0, 50, 90]),
            fua: *random.pick(&[0, 0, 5, 30]),
            sequential: *random.pick(&[0, 10, 60]),
            bytes_max: *random.pick(&[BLOCK_BYTES * 2, 128 << 10, bytes_max, bytes_max]),
            long_writes: LONG,
        }
    }
}

impl Pattern {
    /// The same with long writes everywhere, and few trims: volumes fill up.
    #[must_use]
    pub fn filling(mut self, bytes_max: u64) -> Pattern {
        let [reads, _, flushes, trims, zeroes, ..] = self.weights;
        self.weights = [reads.min(30), 150, flushes, trims.min(5), zeroes.min(5), 1, 1, 1];
        Pattern { hot: 0, sequential: self.sequential.max(30), bytes_max, long_writes: 40, ..self }
    }
}

/// A stream of requests for one volume.
#[derive(Debug)]
pub struct Workload {
    pattern: Pattern,
    size_bytes: u64,
    next_offset: u64,
    random: Random,
}

impl Workload {
    /// Requests for a volume of `size_bytes`.
    #[must_use]
    pub fn new(pattern: Pattern, size_bytes: u64, random: Random) -> Workload {
        Workload { pattern, size_bytes, next_offset: 0, random }
    }

    /// The next request.
    pub fn draw(&mut self) -> Ask {
        let kind = self.draw_kind();
        if kind == AskKind::Flush {
            return Ask { kind, offset_bytes: 0, length_bytes: 0, fua: false };
        }
        let length_bytes = self.draw_length(kind);
        let offset_bytes = self.draw_offset(length_bytes);
        self.next_offset = offset_bytes + length_bytes;
        let ask = Ask { kind, offset_bytes, length_bytes, fua: self.random.percent(self.pattern.fua) };
        if self.random.per_million(3_000) { self.spoil(ask) } else { self.unalign_read(ask) }
    }

    fn draw_kind(&mut self) -> AskKind {
        let random = &mut self.random;
        let mut draw = random.below(self.pattern.weights.iter().sum());
        let kind = self.pattern.weights.iter().position(|weight| {
            let hit = draw < *weight;
            draw = draw.wrapping_sub(*weight);
            hit
        });
        match kind.expect("the draw is below the sum") {
            0 => AskKind::Read { one_piece: random.percent(10) },
            1 => AskKind::Write,
            2 => AskKind::Flush,
            3 => AskKind::Trim,
            4 => AskKind::Zeroes { no_hole: random.percent(30), only_if_fast: random.percent(10) },
            5 => AskKind::Cache,
            6 => AskKind::Status { one_extent: random.percent(20) },
            _ => AskKind::Unknown,
        }
    }

    fn draw_length(&mut self, kind: AskKind) -> u64 {
        let longest = match kind {
            // These carry no payload.
            AskKind::Trim | AskKind::Zeroes { .. } | AskKind::Status { .. } => self.size_bytes,
            _ => self.pattern.bytes_max,
        };
        let longest = longest.min(self.size_bytes);
        let unit = self.draw_unit();
        if self.random.percent(40) {
            return BLOCK_BYTES;
        }
        let often = if kind == AskKind::Write { self.pattern.long_writes } else { LONG };
        let longest = if self.random.percent(often) { longest } else { longest.min(64 << 10) };
        self.random.skewed(1..=longest / unit) * unit
    }

    fn draw_offset(&mut self, length_bytes: u64) -> u64 {
        let unit = self.draw_unit();
        let room = self.size_bytes - length_bytes;
        if self.random.percent(self.pattern.sequential) && self.next_offset <= room {
            return self.next_offset;
        }
        let hot_room = if self.random.percent(self.pattern.hot) { room.min(256 << 10) } else { room };
        self.random.range(0..=hot_room / unit) * unit
    }

    fn draw_unit(&mut self) -> u64 {
        if self.random.percent(self.pattern.aligned) { BLOCK_BYTES } else { SECTOR_BYTES }
    }

    /// Reads may begin and end at any byte.
    fn unalign_read(&mut self, mut ask: Ask) -> Ask {
        if matches!(ask.kind, AskKind::Read { .. }) && ask.length_bytes > 1024 && self.random.percent(5) {
            let head = self.random.range(1..=511);
            ask.offset_bytes += head;
            ask.length_bytes -= head + self.random.range(0..=511);
        }
        ask
    }

    /// Makes the request one that must be refused, or that is empty.
    fn spoil(&mut self, ask: Ask) -> Ask {
        match self.random.below(3) {
            0 => Ask { length_bytes: 0, ..ask },
            1 => Ask {
                offset_bytes: self.size_bytes - ask.length_bytes.min(self.size_bytes) + SECTOR_BYTES,
                ..ask
            },
            _ => Ask { offset_bytes: u64::MAX - self.random.below(2 << 20), ..ask },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Ask, AskKind, Pattern, Random, Workload};

    #[test]
    fn requests_lie_within_the_volume_but_for_a_few_and_cover_all_kinds() {
        let size = 8 << 20;
        let (mut outside, mut kinds) = (0, std::collections::BTreeSet::new());
        for seed in 0..50 {
            let random = Random::new(seed);
            let pattern = Pattern::draw(&mut random.fork("pattern", 0), 1 << 20);
            let mut workload = Workload::new(pattern, size, random);
            for _ in 0..1000 {
                let Ask { kind, offset_bytes, length_bytes, .. } = workload.draw();
                outside += u32::from(offset_bytes.checked_add(length_bytes).is_none_or(|end| end > size));
                if !matches!(kind, AskKind::Read { .. }) && offset_bytes < size {
                    assert!(offset_bytes.is_multiple_of(512) && length_bytes.is_multiple_of(512));
                }
                kinds.insert(format!("{kind:?}"));
            }
        }
        assert!((10..500).contains(&outside), "{outside}");
        assert_eq!(kinds.len(), 13, "{kinds:?}");
    }
}
