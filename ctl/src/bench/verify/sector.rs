//! What a sector carries: where it belongs, which change put it there, and a pattern that shows damage.

use super::super::random::mix;
use super::{Change, SECTOR_LEN};

const MAGIC: u64 = u64::from_be_bytes(*b"BERTHSEC");

/// What a sector was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing but zeroes.
    Zeroes,
    /// What this version put there.
    Version(u64),
    /// Something else, in words.
    Foreign(&'static str),
}

/// The payload of a write: what each of its sectors will carry.
pub(in crate::bench) fn fill(seed: u64, change: Change, payload: &mut [u8]) {
    for (sector, bytes) in (change.first_sector..).zip(payload.chunks_exact_mut(SECTOR_LEN)) {
        let header = [MAGIC, seed, sector, change.version];
        for (word, value) in bytes.chunks_exact_mut(8).zip(header.into_iter().chain(pattern(header))) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Reads a sector of the volume of this seed.
pub(super) fn decode(bytes: &[u8], seed: u64, sector: u64) -> Found {
    if bytes.iter().all(|&byte| byte == 0) {
        return Found::Zeroes;
    }
    let mut words =
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight")));
    let mut next = || words.next().expect("a sector has 64 words");
    let header = [next(), next(), next(), next()];
    if header[0] != MAGIC {
        return Found::Foreign("bytes that no write of this program put there");
    }
    if !words.eq(pattern(header).take(SECTOR_LEN / 8 - 4)) {
        return Found::Foreign("a torn or damaged sector");
    }
    if header[1] != seed {
        return Found::Foreign("a sector of another volume or run");
    }
    if header[2] != sector {
        return Found::Foreign("a sector of another place of this volume");
    }
    Found::Version(header[3])
}

/// Endless words that depend on every bit of the header.
fn pattern(header: [u64; 4]) -> impl Iterator<Item = u64> {
    let mut state = header.iter().fold(0, |state, word| mix(state ^ word));
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(state)
    })
}
