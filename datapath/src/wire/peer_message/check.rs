//! Messages by which a head compares the replicas in sync, and has damage at one of them made good.
//!
//! ```text
//!   message  kind   number   first block, count   stamp: epoch   stamp: sequence     body
//!   ASK       40    check    what to read
//!   DIGEST    41    check    what was read        next leaf      one bit per block:  CRC32C of each block, holes as
//!                                                                it is damaged       zeroes; 0 of a damaged one
//!   UNKNOWN   42    check                         next leaf
//!   MEND      43    check    what comes along                                        CRC32C of each block, then payload
//!   MENDED    44    check    what is mended
//! ```
//!
//! The next leaf is the first one behind the blocks asked for in which anything was ever written at the sender; 2^32 - 1 if
//! there is none. Only nodes that have greeted with [`FEATURE_CHECKS`] are sent these.

use super::{PeerMessage, RELEASED_BLOCKS_MAX, Words};
use crate::wire::WireError;

/// Most blocks of one check, all of one leaf of the map: one bit for each fits into the header.
pub const CHECKED_BLOCKS_MAX: u32 = 64;
/// In a greeting: the sender knows these messages.
pub const FEATURE_CHECKS: u64 = 1;

const NO_LEAF: u32 = u32::MAX;

mod kind {
    pub(super) const ASK: u8 = 40;
    pub(super) const DIGEST: u8 = 41;
    pub(super) const UNKNOWN: u8 = 42;
    pub(super) const MEND: u8 = 43;
    pub(super) const MENDED: u8 = 44;
}

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckMessage {
    /// The head wants to know what the member holds, read from its device.
    Ask {
        /// By whose authority.
        epoch: u32,
        /// Tells this question from others. The answers repeat it.
        check: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// That is it.
    Digest {
        /// What the member promised.
        epoch: u32,
        /// Which question.
        check: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
        /// Those that cannot be read, or do not have the checksum that the map says; the first is the lowest bit.
        damaged: u64,
        /// The next leaf behind them that the member has.
        next_leaf: Option<u32>,
    },
    /// The member does not know what it holds there: its map is damaged.
    Unknown {
        /// What the member promised.
        epoch: u32,
        /// Which question.
        check: u64,
        /// The next leaf behind them that the member has.
        next_leaf: Option<u32>,
    },
    /// What the member's damaged blocks must hold, as payload.
    Mend {
        /// By whose authority.
        epoch: u32,
        /// Which question it is about.
        check: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// The member has them on stable media.
    Mended {
        /// What the member promised.
        epoch: u32,
        /// Which question it was about.
        check: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
}

impl CheckMessage {
    /// Does a member send it to the head?
    #[must_use]
    pub fn is_answer(&self) -> bool {
        match self {
            CheckMessage::Ask { .. } | CheckMessage::Mend { .. } => false,
            CheckMessage::Digest { .. } | CheckMessage::Unknown { .. } | CheckMessage::Mended { .. } => true,
        }
    }

    /// By whose authority, or the sender's promise.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        match *self {
            CheckMessage::Ask { epoch, .. }
            | CheckMessage::Digest { epoch, .. }
            | CheckMessage::Unknown { epoch, .. }
            | CheckMessage::Mend { epoch, .. }
            | CheckMessage::Mended { epoch, .. } => epoch,
        }
    }

    pub(super) fn payload_blocks(&self) -> u32 {
        match *self {
            CheckMessage::Mend { count, .. } => count,
            _ => 0,
        }
    }

    pub(super) fn checksum_count(&self) -> u32 {
        match *self {
            CheckMessage::Digest { count, .. } => count,
            _ => self.payload_blocks(),
        }
    }

    pub(super) fn words(&self) -> Words {
        let plain = |kind, check| Words { kind, epoch: self.epoch(), number: check, ..Words::default() };
        let about = |kind, check, block, count| Words { block, count, ..plain(kind, check) };
        let with_leaf = |mut words: Words, next_leaf: Option<u32>| {
            words.stamp.epoch = next_leaf.unwrap_or(NO_LEAF);
            words
        };
        match *self {
            CheckMessage::Ask { check, block, count, .. } => about(kind::ASK, check, block, count),
            CheckMessage::Digest { check, block, count, damaged, next_leaf, .. } => {
                let mut words = about(kind::DIGEST, check, block, count);
                words.stamp.sequence = damaged;
                with_leaf(words, next_leaf)
            }
            CheckMessage::Unknown { check, next_leaf, .. } => {
                with_leaf(plain(kind::UNKNOWN, check), next_leaf)
            }
            CheckMessage::Mend { check, block, count, .. } => about(kind::MEND, check, block, count),
            CheckMessage::Mended { check, block, count, .. } => about(kind::MENDED, check, block, count),
        }
    }

    pub(super) fn from_words(words: Words) -> Result<CheckMessage, WireError> {
        let Words { kind, epoch, stamp, number: check, .. } = words;
        let next_leaf = Some(stamp.epoch).filter(|leaf| *leaf != NO_LEAF);
        if kind == kind::UNKNOWN {
            return Ok(CheckMessage::Unknown { epoch, check, next_leaf });
        }
        if !(kind::ASK..=kind::MENDED).contains(&kind) {
            return Err(WireError::Kind);
        }
        let (block, count) = words.piece()?;
        let damaged = stamp.sequence;
        let one_leaf = block % RELEASED_BLOCKS_MAX + count <= RELEASED_BLOCKS_MAX;
        if count > CHECKED_BLOCKS_MAX || !one_leaf || count < u64::BITS && damaged >> count != 0 {
            return Err(WireError::Range);
        }
        Ok(match kind {
            kind::ASK => CheckMessage::Ask { epoch, check, block, count },
            kind::DIGEST => CheckMessage::Digest { epoch, check, block, count, damaged, next_leaf },
            kind::MEND => CheckMessage::Mend { epoch, check, block, count },
            _ => CheckMessage::Mended { epoch, check, block, count },
        })
    }
}

impl From<CheckMessage> for PeerMessage {
    fn from(message: CheckMessage) -> PeerMessage {
        PeerMessage::Check(message)
    }
}
