//! The only source of chance in a simulation: a seed decides everything that follows.
//!
//! The generator is xoshiro256++ (Blackman and Vigna), seeded through SplitMix64. It is written out here because
//! a failing seed must replay the same run in every later version, whatever a library does to its algorithms.

use std::ops::RangeInclusive;

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random {
    /// What the stream was made from: forks depend on it and not on how far this stream was drawn.
    origin: u64,
    state: [u64; 4],
}

impl Random {
    /// The stream of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        let mut walk = seed;
        let state = std::array::from_fn(|_| {
            walk = walk.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(walk)
        });
        Random { origin: seed, state }
    }

    /// An independent stream for one purpose. A new draw in one part of the simulator leaves all others as
    /// they were, so that a seed keeps most of its meaning while the simulator grows.
    #[must_use]
    pub fn fork(&self, purpose: &str, index: u64) -> Random {
        let name = purpose.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Random::new(mix(self.origin ^ mix(name)) ^ mix(index.wrapping_add(0x51_7cc1)))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        let (b_next, a_next) = (b ^ c, a ^ d);
        self.state = [a_next, b_next, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// A number below `limit`.
    ///
    /// # Panics
    /// If `limit` is zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "nothing lies below zero");
        let wide = u128::from(self.bits()) * u128::from(limit);
        u64::try_from(wide >> 64).expect("below the limit")
    }

    /// A position in something of `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("below a usize")
    }

    /// A number of the range, both ends included.
    pub fn range(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    /// True in `percent` of 100 draws.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// True in `count` of a million draws.
    pub fn per_million(&mut self, count: u64) -> bool {
        count > 0 && self.below(1_000_000) < count
    }

    /// One of the choices.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.index(choices.len())]
    }

    /// A number of the range where each power of two is as likely as the next: small ones are common, large
    /// ones happen.
    pub fn skewed(&mut self, range: RangeInclusive<u64>) -> u64 {
        let span = range.end() - range.start() + 1;
        let bits = u64::from(64 - span.leading_zeros());
        let limit = 1_u64 << self.below(bits + 1).min(63);
        range.start() + self.below(limit.min(span))
    }

    /// Puts the elements in a random order.
    pub fn shuffle<T>(&mut self, elements: &mut [T]) {
        for end in (1..elements.len()).rev() {
            elements.swap(end, self.index(end + 1));
        }
    }

    /// Fills `bytes` with noise.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.bits().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// SplitMix64's finisher: every bit of the result depends on every bit of `value`.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn the_stream_of_a_seed_never_changes() {
        // SplitMix64 of 0 begins e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f, f88bb8a8724c81ec; the first
        // result follows from them by the definition of xoshiro256++.
        let [a, d] = [0xe220_a839_7b1d_cdaf_u64, 0xf88b_b8a8_724c_81ec];
        assert_eq!(Random::new(0).bits(), a.wrapping_add(d).rotate_left(23).wrapping_add(a));
        let mut random = Random::new(0);
        assert_eq!(random.state, [a, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f, d]);
        let (t, expected) = (random.state[1] << 17, {
            let mut s = random.state;
            s[2] ^= s[0];
            s[3] ^= s[1];
            s[1] ^= s[2];
            s[0] ^= s[3];
            s
        });
        random.bits();
        assert_eq!(random.state, [expected[0], expected[1], expected[2] ^ t, expected[3].rotate_left(45)]);
    }

    #[test]
    fn forks_differ_and_do_not_depend_on_draws() {
        let fresh = Random::new(7);
        let mut drawn = fresh.clone();
        drawn.bits();
        assert_eq!(fresh.fork("disk", 1).bits(), drawn.fork("disk", 1).bits());
        assert_ne!(fresh.fork("disk", 1).bits(), fresh.fork("disk", 2).bits());
        assert_ne!(fresh.fork("disk", 1).bits(), fresh.fork("client", 1).bits());
    }

    #[test]
    fn numbers_cover_their_range_and_stay_in_it() {
        let mut random = Random::new(1);
        let mut seen = [0_u32; 10];
        for _ in 0..10_000 {
            seen[random.index(10)] += 1;
            assert!((5..=9).contains(&random.range(5..=9)));
            assert!((1..=1000).contains(&random.skewed(1..=1000)));
        }
        assert!(seen.iter().all(|&count| (800..1200).contains(&count)), "{seen:?}");
        let mut order: Vec<usize> = (0..100).collect();
        random.shuffle(&mut order);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
