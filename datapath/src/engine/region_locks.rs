//! Locks on ranges of a volume's blocks, for writes that do not begin and end on a block.
//!
//! Such a write reads a block, changes a part of it and writes it back. Nothing else may change the block
//! meanwhile, and what was being written must have taken effect before the block is read. Whole-block writes need no
//! order among themselves: they share.

use std::collections::VecDeque;

/// Blocks per region.
const REGION_BLOCKS: u32 = 64;
/// Regions are told apart modulo this; two that collide only wait for each other.
const REGIONS: u32 = 1024;

/// A range of blocks and how it is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionClaim {
    /// First block.
    pub(super) block: u32,
    /// How many.
    pub(super) count: u32,
    /// Alone, or together with others that share.
    pub(super) exclusive: bool,
}

impl RegionClaim {
    fn regions(self) -> impl Iterator<Item = usize> {
        let first = self.block / REGION_BLOCKS;
        let last = (self.block + (self.count - 1)) / REGION_BLOCKS;
        let last = last.min(first + (REGIONS - 1));
        (first..=last).map(|region| (region % REGIONS) as usize)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Region {
    shared: u32,
    exclusive: bool,
}

/// The locks of one volume. Whoever cannot be served waits in line, and newcomers wait behind.
#[derive(Debug)]
pub(super) struct RegionLocks {
    regions: Vec<Region>,
    waiting: VecDeque<(u32, RegionClaim)>,
}

impl Default for RegionLocks {
    fn default() -> RegionLocks {
        RegionLocks { regions: vec![Region::default(); REGIONS as usize], waiting: VecDeque::new() }
    }
}

impl RegionLocks {
    /// Locks the range for `owner` at once, or puts it in line; [`Self::release`] will name it.
    pub(super) fn acquire(&mut self, owner: u32, claim: RegionClaim) -> bool {
        if self.try_acquire(claim) {
            return true;
        }
        self.waiting.push_back((owner, claim));
        false
    }

    /// Locks the range if that needs no waiting.
    pub(super) fn try_acquire(&mut self, claim: RegionClaim) -> bool {
        let free = self.waiting.is_empty() && self.is_free(claim);
        if free {
            self.take(claim);
        }
        free
    }

    /// Unlocks a range.
    pub(super) fn release(&mut self, claim: RegionClaim) {
        for index in claim.regions() {
            let region = &mut self.regions[index];
            if claim.exclusive {
                assert!(std::mem::take(&mut region.exclusive), "a lock is released once");
            } else {
                region.shared = region.shared.checked_sub(1).expect("a lock is released once");
            }
        }
    }

    /// The next owner in line whose range is free now; it is locked.
    pub(super) fn grant_next(&mut self) -> Option<u32> {
        let (owner, claim) = *self.waiting.front()?;
        if !self.is_free(claim) {
            return None;
        }
        self.waiting.pop_front();
        self.take(claim);
        Some(owner)
    }

    fn is_free(&self, claim: RegionClaim) -> bool {
        claim.regions().all(|index| {
            let region = self.regions[index];
            !region.exclusive && (!claim.exclusive || region.shared == 0)
        })
    }

    fn take(&mut self, claim: RegionClaim) {
        for index in claim.regions() {
            if claim.exclusive {
                self.regions[index].exclusive = true;
            } else {
                self.regions[index].shared += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(block: u32, count: u32, exclusive: bool) -> RegionClaim {
        RegionClaim { block, count, exclusive }
    }

    #[test]
    fn sharers_share_and_one_alone_waits_for_them() {
        let mut locks = RegionLocks::default();
        assert!(locks.acquire(1, claim(0, 10, false)));
        assert!(locks.acquire(2, claim(5, 200, false)));
        assert!(!locks.acquire(3, claim(6, 1, true)));
        assert!(!locks.acquire(4, claim(7, 1, false)), "newcomers do not overtake");
        locks.release(claim(0, 10, false));
        assert_eq!(locks.grant_next(), None);
        locks.release(claim(5, 200, false));
        assert_eq!((locks.grant_next(), locks.grant_next()), (Some(3), None));
        locks.release(claim(6, 1, true));
        assert_eq!((locks.grant_next(), locks.grant_next()), (Some(4), None));
    }

    #[test]
    fn a_range_larger_than_the_table_locks_each_region_once() {
        let mut locks = RegionLocks::default();
        let all = claim(3, REGION_BLOCKS * (REGIONS + 5), true);
        assert!(locks.acquire(1, all));
        locks.release(all);
        assert!(locks.acquire(2, all));
    }
}
