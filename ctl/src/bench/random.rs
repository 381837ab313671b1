//! A small, seeded stream of random numbers: a run can be repeated, and needs no crate for it.

/// SplitMix64 (Steele, Lea, Flood 2014): good enough for offsets and gaps, not for secrets.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Streams of different seeds have nothing visible in common.
    #[must_use]
    pub(super) fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    /// Any number.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not zero. The bias is below `end` in 2^64.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(end);
        u64::try_from(wide >> 64).expect("the high half of a product fits")
    }

    /// True in `percent` of 100 cases.
    pub(super) fn percent(&mut self, percent: u32) -> bool {
        self.below(100) < u64::from(percent)
    }

    /// A gap between two arrivals of a Poisson process with this mean, in nanoseconds.
    pub(super) fn poisson_gap_ns(&mut self, mean_ns: f64) -> f64 {
        // 53 bits, and never zero: the logarithm stays finite.
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
        let unit = ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        -unit.ln() * mean_ns
    }
}

/// The finisher of SplitMix64: every bit of the argument changes half of the result.
pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_poisson_process() {
        let mut random = Random::new(1);
        let gaps: Vec<f64> = (0..200_000).map(|_| random.poisson_gap_ns(1000.0)).collect();
        let mean = gaps.iter().sum::<f64>() / 200_000.0;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 200_000.0;
        assert!((990.0..1010.0).contains(&mean), "{mean}");
        assert!((970.0..1030.0).contains(&variance.sqrt()), "{}", variance.sqrt());
    }

    #[test]
    fn below_reaches_both_ends_and_stays_inside() {
        let mut random = Random::new(2);
        let seen: std::collections::BTreeSet<u64> = (0..1000).map(|_| random.below(7)).collect();
        assert_eq!(seen, (0..7).collect());
    }
}
