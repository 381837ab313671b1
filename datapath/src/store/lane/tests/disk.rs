//! A disk in memory that completes its operations in any order and forgets, when power fails, what was not synced.

use crate::memory::Memory;
use crate::store::lane::{DiskEffect, DiskToken};
use crate::store::layout::Place;
use crate::store::recovery::PoolReader;
use crate::units::{BLOCK_BYTES_USIZE, MemoryRange};

/// Numbers that look random and are the same in every run.
pub(super) struct Random(pub(super) u64);

impl Random {
    /// A number below `end`.
    pub(super) fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((self.0 >> 33) % u64::from(end)).expect("below a 32-bit number")
    }
}

/// Memory that is a vector.
#[derive(Debug)]
pub(super) struct TestMemory(pub(super) Vec<u8>);

fn span(range: MemoryRange) -> std::ops::Range<usize> {
    range.start as usize..range.end() as usize
}

impl Memory for TestMemory {
    fn len_bytes(&self) -> u32 {
        u32::try_from(self.0.len()).expect("below 4 GiB")
    }

    fn bytes(&self, range: MemoryRange) -> &[u8] {
        &self.0[span(range)]
    }

    fn bytes_mut(&mut self, range: MemoryRange) -> &mut [u8] {
        &mut self.0[span(range)]
    }

    fn copy(&mut self, from: MemoryRange, to: MemoryRange) {
        assert!(from.len == to.len && (from.end() <= to.start || to.end() <= from.start));
        self.0.copy_within(span(from), to.start as usize);
    }
}

struct Pending {
    effect: DiskEffect,
    /// What is to be written, as it was when the write was submitted.
    bytes: Vec<u8>,
    /// For a sync: how many of the unsynced writes had completed when it was submitted.
    covers: usize,
}

/// See the module's text.
pub(super) struct Disk {
    /// What reads return.
    pub(super) seen: Vec<u8>,
    /// What a loss of power leaves for sure.
    stable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    pending: Vec<Pending>,
    /// Reads are not completed.
    pub(super) holds_reads: bool,
    /// Writes and syncs are not completed.
    pub(super) holds_writes: bool,
    /// Syncs are not completed.
    pub(super) holds_syncs: bool,
    /// Reads completed.
    pub(super) reads: u32,
}

impl Disk {
    pub(super) fn new(bytes: usize) -> Disk {
        Disk {
            seen: vec![0; bytes],
            stable: vec![0; bytes],
            unsynced: Vec::new(),
            pending: Vec::new(),
            holds_reads: false,
            holds_writes: false,
            holds_syncs: false,
            reads: 0,
        }
    }

    /// Writes at once and for good.
    pub(super) fn put(&mut self, place: Place, bytes: &[u8]) {
        let at = usize::try_from(place.offset_bytes()).expect("fits");
        self.seen[at..at + bytes.len()].copy_from_slice(bytes);
        self.stable[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn submit(&mut self, memory: &TestMemory, effect: DiskEffect) {
        let bytes = match effect {
            DiskEffect::Write { memory: range, .. } => memory.bytes(range).to_vec(),
            _ => Vec::new(),
        };
        self.pending.push(Pending { effect, bytes, covers: self.unsynced.len() });
    }

    /// Reads submitted and not completed.
    pub(super) fn reads_pending(&self) -> usize {
        self.pending.iter().filter(|pending| matches!(pending.effect, DiskEffect::Read { .. })).count()
    }

    /// Writes submitted and not completed.
    pub(super) fn writes_pending(&self) -> usize {
        self.pending.iter().filter(|pending| matches!(pending.effect, DiskEffect::Write { .. })).count()
    }

    /// Completes any one of the operations that are not held back.
    pub(super) fn complete_one(&mut self, memory: &mut TestMemory, random: &mut Random) -> Option<DiskToken> {
        let free = |pending: &Pending| match pending.effect {
            DiskEffect::Read { .. } => !self.holds_reads,
            DiskEffect::Write { .. } => !self.holds_writes,
            DiskEffect::Sync { .. } => !self.holds_writes && !self.holds_syncs,
        };
        let ready: Vec<usize> = (0..self.pending.len()).filter(|index| free(&self.pending[*index])).collect();
        if ready.is_empty() {
            return None;
        }
        let chosen = ready[random.below(u32::try_from(ready.len()).expect("few")) as usize];
        let Pending { effect, bytes, covers } = self.pending.remove(chosen);
        match effect {
            DiskEffect::Read { token, place, memory: range } => {
                let at = usize::try_from(place.offset_bytes()).expect("fits");
                memory.bytes_mut(range).copy_from_slice(&self.seen[at..at + range.len as usize]);
                self.reads += 1;
                Some(token)
            }
            DiskEffect::Write { token, place, memory: range } => {
                assert!(memory.bytes(range) == bytes, "memory changed while the device read it");
                let at = usize::try_from(place.offset_bytes()).expect("fits");
                self.seen[at..at + bytes.len()].copy_from_slice(&bytes);
                self.unsynced.push((at, bytes));
                Some(token)
            }
            DiskEffect::Sync { token } => {
                for (at, bytes) in self.unsynced.drain(..covers) {
                    self.stable[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                Some(token)
            }
        }
    }

    /// Of what was not synced, any block may be there or not.
    pub(super) fn lose_power(&mut self, random: &mut Random) {
        let pending = self.pending.drain(..).filter_map(|pending| match pending.effect {
            DiskEffect::Write { place, .. } => {
                Some((usize::try_from(place.offset_bytes()).expect("fits"), pending.bytes))
            }
            _ => None,
        });
        for (at, bytes) in self.unsynced.drain(..).chain(pending) {
            let whole = random.below(2) == 0;
            for (index, block) in bytes.chunks_exact(BLOCK_BYTES_USIZE).enumerate() {
                if whole || random.below(3) > 0 {
                    let at = at + index * BLOCK_BYTES_USIZE;
                    self.stable[at..at + BLOCK_BYTES_USIZE].copy_from_slice(block);
                }
            }
        }
        self.seen.copy_from_slice(&self.stable);
    }

    /// The process was killed: what it had submitted is done.
    pub(super) fn kill(&mut self) {
        for pending in self.pending.drain(..) {
            if let DiskEffect::Write { place, .. } = pending.effect {
                let at = usize::try_from(place.offset_bytes()).expect("fits");
                self.seen[at..at + pending.bytes.len()].copy_from_slice(&pending.bytes);
                self.unsynced.push((at, pending.bytes));
            }
        }
    }
}

impl PoolReader for Disk {
    fn len_bytes(&self) -> u64 {
        self.seen.len() as u64
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        let at = usize::try_from(offset_bytes).expect("fits");
        into.copy_from_slice(&self.seen[at..at + into.len()]);
        true
    }
}
