//! Flipped bits: which pages may have them, and which have them now.

use super::image::{Image, PAGE_BYTES};
use crate::sim::random::Random;
use crate::to_usize;

/// A page rots only when so many syncs have followed the one that made it stable: what belonged before it has come then.
const SYNCS_BEFORE_ROT: u32 = 2;
/// Draws that look for a page before giving up.
const DRAWS_MAX: usize = 200;

#[derive(Debug)]
pub(super) struct Rot {
    /// Syncs that made something stable.
    syncs: u32,
    /// Per page, the number of syncs when it last became stable.
    stable_since: Vec<u32>,
    /// Byte and bit of each flip that still stands.
    flips: Vec<(u64, u32)>,
}

impl Rot {
    pub(super) fn new(len_bytes: u64) -> Rot {
        Rot { syncs: 0, stable_since: vec![0; to_usize(len_bytes) / PAGE_BYTES], flips: Vec::new() }
    }

    pub(super) fn note_sync(&mut self) {
        self.syncs += 1;
    }

    /// A range was overwritten on stable media: what was flipped there is no more.
    pub(super) fn note_stable(&mut self, offset_bytes: u64, len: usize) {
        let (first, last) = page_span(offset_bytes, len);
        self.stable_since[first..=last].fill(self.syncs);
        let end = offset_bytes + len as u64;
        self.flips.retain(|(at, _)| *at < offset_bytes || *at >= end);
    }

    pub(super) fn is_present(&self) -> bool {
        !self.flips.is_empty()
    }

    pub(super) fn take(&mut self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.flips)
    }

    /// Chooses bits in written pages that became stable some syncs ago.
    pub(super) fn choose(
        &mut self,
        random: &mut Random,
        stable: &Image,
        count: usize,
        eligible: impl Fn(u64) -> bool,
    ) -> Vec<(u64, u32)> {
        let mut chosen = Vec::new();
        for _ in 0..DRAWS_MAX {
            if chosen.len() == count {
                break;
            }
            let page = random.index(self.stable_since.len());
            let start = (page * PAGE_BYTES) as u64;
            if stable.is_written(page)
                && self.stable_since[page] + SYNCS_BEFORE_ROT <= self.syncs
                && eligible(start)
            {
                let bit = u32::try_from(random.below(8)).expect("below 8");
                chosen.push((start + random.below(PAGE_BYTES as u64), bit));
            }
        }
        self.flips.extend_from_slice(&chosen);
        chosen
    }
}

fn page_span(offset_bytes: u64, len: usize) -> (usize, usize) {
    assert!(len > 0, "an empty write");
    let start = to_usize(offset_bytes);
    (start / PAGE_BYTES, (start + len - 1) / PAGE_BYTES)
}
