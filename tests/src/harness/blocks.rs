//! What each block of a volume must hold, when its writer knows the fate of every write.
//!
//! Every write gets versions of its own, and a block's content tells block and version. A write that was answered with
//! success holds, one that was refused must have changed nothing, and of one whose connection was lost either may be
//! there, until a look at the block has decided.

use std::collections::BTreeMap;
use std::ops::Range;

use datapath::wire::nbd_transmission::command;

use super::client::Client;
use crate::to_usize;

/// Bytes in a block.
pub const BLOCK_BYTES: u64 = 4096;
const BLOCK_LEN: usize = 4096;
/// Blocks in one read of [`Blocks::verify`], and reads in flight.
const READ_BLOCKS: u64 = 256;
const READ_DEPTH: usize = 4;

/// The volume as its only writer knows it. Version 0 of a block is zeroes.
#[derive(Debug)]
pub struct Blocks {
    versions: Vec<u32>,
    /// Blocks with a write whose outcome is open, and its version.
    open: BTreeMap<u64, u32>,
    next_version: u32,
}

impl Blocks {
    /// A volume of so many blocks that reads as zeroes.
    #[must_use]
    pub fn new(count: u64) -> Blocks {
        Blocks { versions: vec![0; to_usize(count)], open: BTreeMap::new(), next_version: 1 }
    }

    /// Is a write of this block under way?
    #[must_use]
    pub fn is_open(&self, block: u64) -> bool {
        self.open.contains_key(&block)
    }

    /// Does it hold something other than zeroes?
    #[must_use]
    pub fn is_written(&self, block: u64) -> bool {
        self.versions[to_usize(block)] != 0
    }

    /// Blocks that hold something other than zeroes.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.versions.iter().filter(|version| **version != 0).count() as u64
    }

    /// A write of these blocks begins; returns its payload.
    ///
    /// # Panics
    /// If a write of one of them is under way.
    pub fn begin(&mut self, blocks: Range<u64>) -> Vec<u8> {
        let mut payload = Vec::with_capacity(to_usize((blocks.end - blocks.start) * BLOCK_BYTES));
        for block in blocks {
            let before = self.open.insert(block, self.next_version);
            assert!(before.is_none(), "two writes of block {block} at a time");
            append_content(&mut payload, block, self.next_version);
            self.next_version += 1;
        }
        payload
    }

    /// The write of these blocks was answered with success.
    ///
    /// # Panics
    /// If it was not under way.
    pub fn done(&mut self, blocks: Range<u64>) {
        for block in blocks {
            self.versions[to_usize(block)] = self.open.remove(&block).expect("under way");
        }
    }

    /// The write of these blocks was answered with an error that promises that nothing has changed.
    ///
    /// # Panics
    /// If it was not under way.
    pub fn refused(&mut self, blocks: Range<u64>) {
        for block in blocks {
            self.open.remove(&block).expect("under way");
        }
    }

    /// A trim of these blocks was answered with success.
    pub fn trimmed(&mut self, blocks: Range<u64>) {
        self.versions[to_usize(blocks.start)..to_usize(blocks.end)].fill(0);
    }

    /// Reads the whole volume and compares. Decides the writes whose outcome was open.
    ///
    /// # Panics
    /// If a block holds what it must not hold, or cannot be read.
    pub fn verify(&mut self, client: &mut Client) {
        let count = self.versions.len() as u64;
        let mut asked = BTreeMap::new();
        let mut next = 0;
        while next < count || !asked.is_empty() {
            if next < count && asked.len() < READ_DEPTH {
                let length = READ_BLOCKS.min(count - next);
                let cookie = client
                    .ask(command::READ, next * BLOCK_BYTES, length * BLOCK_BYTES, &[])
                    .expect("the server stays");
                asked.insert(cookie, next);
                next += length;
                continue;
            }
            let answer = client.answer().expect("the server stays");
            let first = asked.remove(&answer.cookie).expect("one of the reads");
            assert_eq!(answer.error, 0, "the read at block {first} failed");
            (first..)
                .zip(answer.data.chunks_exact(BLOCK_LEN))
                .for_each(|(block, data)| self.check(block, data));
        }
        assert!(self.open.is_empty(), "every block was looked at");
    }

    fn check(&mut self, block: u64, data: &[u8]) {
        let settled = &mut self.versions[to_usize(block)];
        let open = self.open.remove(&block);
        let mut wanted = Vec::with_capacity(BLOCK_LEN);
        for version in [Some(*settled), open].into_iter().flatten() {
            wanted.clear();
            append_content(&mut wanted, block, version);
            if wanted == data {
                *settled = version;
                return;
            }
        }
        let found: Vec<u32> = data[..12]
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect();
        panic!("block {block} must hold version {settled} or {open:?}, and begins with {found:?}");
    }
}

/// Block and version, then numbers that follow from both.
fn append_content(to: &mut Vec<u8>, block: u64, version: u32) {
    if version == 0 {
        to.resize(to.len() + BLOCK_LEN, 0);
        return;
    }
    let mut state = block << 32 | u64::from(version);
    for _ in 0..BLOCK_LEN / 8 {
        to.extend_from_slice(&state.to_le_bytes());
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_LEN, Blocks};

    #[test]
    fn an_open_write_may_be_there_or_not_until_someone_looks() {
        let mut blocks = Blocks::new(2);
        let old = blocks.begin(0..2);
        blocks.done(0..2);
        let new = blocks.begin(0..1);
        blocks.check(0, &new);
        blocks.check(1, &old[BLOCK_LEN..]);
        assert!(std::panic::catch_unwind(move || blocks.check(0, &old[..BLOCK_LEN])).is_err(), "it was seen");
    }

    #[test]
    fn a_refused_write_and_a_trim_leave_no_trace() {
        let mut blocks = Blocks::new(1);
        let payload = blocks.begin(0..1);
        blocks.refused(0..1);
        blocks.check(0, &[0; BLOCK_LEN]);
        assert!(std::panic::catch_unwind(move || blocks.check(0, &payload)).is_err(), "it was refused");
        let mut blocks = Blocks::new(1);
        blocks.begin(0..1);
        blocks.done(0..1);
        blocks.trimmed(0..1);
        blocks.check(0, &[0; BLOCK_LEN]);
        assert_eq!(blocks.written(), 0);
    }
}
