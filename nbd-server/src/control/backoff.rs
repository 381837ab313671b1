//! How long to wait before the next attempt to connect. Waits grow, and no two nodes wait equally long: when ctl comes
//! back, they do not all come at once.

use std::time::Duration;

/// The first wait is at most this long.
const FIRST: Duration = Duration::from_millis(100);
/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(5);

/// The waits of one client.
#[derive(Debug)]
pub struct Backoff {
    most: Duration,
    /// State of a xorshift generator: not zero.
    random: u64,
}

impl Backoff {
    /// Waits that differ from seed to seed.
    #[must_use]
    pub fn new(seed: u64) -> Backoff {
        Backoff { most: FIRST, random: seed | 1 }
    }

    /// The next wait: between half and all of what it may be.
    pub fn next_wait(&mut self) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let half_us = u64::try_from(self.most.as_micros() / 2).expect("some seconds");
        let wait = Duration::from_micros(half_us + self.random % (half_us + 1));
        self.most = (self.most * 2).min(LONGEST);
        wait
    }

    /// It went well: the next wait is short again.
    pub fn reset(&mut self) {
        self.most = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::{Backoff, FIRST, LONGEST};

    #[test]
    fn waits_grow_to_the_longest_and_start_over() {
        let (mut one, mut other) = (Backoff::new(1), Backoff::new(0x1234_5678_9abc_def0));
        let mut most = FIRST;
        let mut equal = 0;
        for _ in 0..20 {
            let (wait, others) = (one.next_wait(), other.next_wait());
            assert!(wait >= most / 2 && wait <= most, "{wait:?} of {most:?}");
            equal += i32::from(wait == others);
            most = (most * 2).min(LONGEST);
        }
        assert!(equal < 3 && most == LONGEST, "{equal}");
        one.reset();
        assert!(one.next_wait() <= FIRST);
    }
}
