//! Messages between the nodes of a cluster.
//!
//! ```text
//!   header (64 bytes, network byte order)                 what follows it
//!    0  magic "BRTP"            4                          body: CRC32C of each payload block, 4 bytes each (DIGEST:
//!    4  version 2               1                                of each block), for HELLO its own fields
//!    5  kind                    1                          payload: the blocks, 4096 bytes each
//!    6  change kind             1  (CHANGE, FETCHED, COPY, CHANGED; LEASE, LEASED: `room.rs`)
//!    7  unused                  1
//!    8  CRC32C of header and body  4  (this field as zero)
//!   12  body bytes              4
//!   16  payload bytes           4
//!   20  volume                  4
//!   24  epoch                   4  by whose authority, or the sender's promise
//!   28  first block             4
//!   32  count of blocks         4
//!   36  stamp: epoch            4
//!   40  stamp: sequence         8
//!   48  previous: epoch         4
//!   52  new blocks              4  (CHANGE, FETCHED; LEASE: `room.rs`)
//!   56  number                  8
//! ```
//!
//! The checksums of the blocks are made once, where a payload enters the cluster, and serve as the message's own: a
//! receiver checks the payload against the body, and the body with the header.

mod check;
mod room;
mod words;

use super::WireError;
use super::fields::Fields;
use crate::checksum::{crc32c, crc32c_of_parts};
use crate::limits::PIECE_BLOCKS_MAX;
use crate::record::{ChangeKind, NodeId, Stamp, VolumeNumber};
use crate::units::BLOCK_BYTES;

pub use check::{CHECKED_BLOCKS_MAX, CheckMessage, FEATURE_CHECKS};
pub use room::{RoomAnswer, RoomQuestion};
use words::Words;

const MAGIC: &[u8; 4] = b"BRTP";
const VERSION: u8 = 2;
const CHECKSUM_AT: usize = 8;
/// Bytes of a header.
pub const PEER_HEADER_BYTES: usize = 64;
/// Longest body.
pub const PEER_BODY_BYTES_MAX: u32 = 4 * PIECE_BLOCKS_MAX;
/// Longest payload.
pub const PEER_PAYLOAD_BYTES_MAX: u32 = PIECE_BLOCKS_MAX * BLOCK_BYTES;
/// Blocks that one change without payload may release: those of a leaf of the map.
const RELEASED_BLOCKS_MAX: u32 = 512;
const HELLO_BYTES: u32 = 24;

const CHANGE_CODES: [(ChangeKind, u8); 3] =
    [(ChangeKind::Data, 1), (ChangeKind::Zero, 3), (ChangeKind::Trim, 4)];

fn change_code(kind: ChangeKind) -> u8 {
    CHANGE_CODES.iter().find(|(listed, _)| *listed == kind).expect("all kinds are listed").1
}

fn change_of_code(code: u8) -> Result<ChangeKind, WireError> {
    let found = CHANGE_CODES.iter().find(|(_, listed)| *listed == code);
    found.map(|(kind, _)| *kind).ok_or(WireError::Range)
}

/// A change of a volume without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeHeader {
    /// What it does.
    pub kind: ChangeKind,
    /// First block.
    pub block: u32,
    /// How many; at most a piece if there is a payload.
    pub count: u32,
    /// Its place in the volume's order.
    pub stamp: Stamp,
    /// The place of the one before it.
    pub previous: Stamp,
    /// So many blocks at most it newly takes, at any replica.
    pub new_blocks: u32,
}

impl ChangeHeader {
    /// First block and count.
    #[must_use]
    pub fn blocks(&self) -> (u32, u32) {
        (self.block, self.count)
    }

    /// Blocks that come with it.
    #[must_use]
    pub fn payload_blocks(&self) -> u32 {
        if self.kind == ChangeKind::Data { self.count } else { 0 }
    }
}

/// Blocks copied from one replica to another, without their content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyHeader {
    /// Do they hold data, which comes as payload? If not they read as zeroes.
    pub data: bool,
    /// First block.
    pub block: u32,
    /// How many; at most a piece if there is a payload.
    pub count: u32,
}

impl CopyHeader {
    /// Blocks that come with it.
    #[must_use]
    pub fn payload_blocks(&self) -> u32 {
        if self.data { self.count } else { 0 }
    }
}

/// The first message on a connection, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The sender.
    pub node: NodeId,
    /// Random at each start of the sender's process.
    pub boot: u64,
    /// What the sender can do, one bit each; unknown bits are ignored.
    pub features: u64,
}

/// A message without checksums and payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerMessage {
    /// Who is there.
    Hello(Hello),
    /// A head, or one that wants to be, asks a member to promise to accept nothing of an earlier epoch.
    Promise {
        /// The epoch.
        epoch: u32,
    },
    /// The promise is on stable media.
    Promised {
        /// The epoch.
        epoch: u32,
        /// The last change of the member's order.
        last: Stamp,
        /// For so long the member must honour a lease that it granted to an earlier head, in nanoseconds.
        granted_ns: u64,
    },
    /// The sender has promised a later epoch.
    Refused {
        /// That epoch.
        promised: u32,
    },
    /// A change for a member's log.
    Change {
        /// By whose authority.
        epoch: u32,
        /// What it is.
        change: ChangeHeader,
        /// Changes up to here are committed.
        committed: u64,
    },
    /// All changes up to here are on the member's stable media.
    Ack {
        /// What the member promised.
        epoch: u32,
        /// Up to which sequence.
        through: u64,
    },
    /// The member lacks the changes between its last one and that it was sent.
    Gap {
        /// What the member promised.
        epoch: u32,
        /// Its last change.
        last: Stamp,
    },
    /// Asks for a change out of the member's log.
    Fetch {
        /// By whose authority.
        epoch: u32,
        /// Which.
        sequence: u64,
    },
    /// The change asked for.
    Fetched {
        /// What the member promised.
        epoch: u32,
        /// What it is.
        change: ChangeHeader,
    },
    /// The change asked for is not in the log any more.
    FetchGone {
        /// What the member promised.
        epoch: u32,
        /// Which.
        sequence: u64,
    },
    /// Before it fills the member, the head asks which blocks its log changed after this stamp, which is the last that the
    /// two have in common: that must be undone.
    Compare {
        /// By whose authority.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// The stamp.
        base: Stamp,
    },
    /// Some of these blocks, all of one leaf of the map.
    Surplus {
        /// What the member promised.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// These were all, or the member cannot tell and must be copied whole.
    Compared {
        /// What the member promised.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// These were all.
        known: bool,
    },
    /// The head has no replica in sync of its own, and fills another one: it asks a member that has all which blocks were
    /// changed after this stamp.
    ListChanged {
        /// By whose authority.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// The stamp.
        base: Stamp,
    },
    /// Some of these blocks, all of one leaf of the map.
    Changed {
        /// What the member promised.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// They are changed if they are holes. If not, they are changed whatever they are.
        if_holes: bool,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// These were all, or the member cannot tell.
    Listed {
        /// What the member promised.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// These were all.
        known: bool,
    },
    /// The head is going to fill the member: whatever it holds, its order goes on after this stamp. Changes follow at once,
    /// copies when the member has stored this.
    Fill {
        /// By whose authority.
        epoch: u32,
        /// The change before the first that will follow.
        after: Stamp,
        /// Tells this fill from the epoch's others. The messages below repeat it.
        fill: u64,
    },
    /// The member has stored that.
    Filling {
        /// What the member promised.
        epoch: u32,
        /// Which fill.
        fill: u64,
    },
    /// Blocks as the head's own replica holds them: with payload, or zeroes.
    Copy {
        /// By whose authority.
        epoch: u32,
        /// Which fill.
        fill: u64,
        /// Which blocks, all of one leaf of the map.
        copy: CopyHeader,
    },
    /// So many of the fill's copies have been taken care of.
    Copied {
        /// What the member promised.
        epoch: u32,
        /// Which fill.
        fill: u64,
        /// How many since it began.
        copies: u32,
    },
    /// That was the last copy.
    Filled {
        /// By whose authority.
        epoch: u32,
        /// Which fill.
        fill: u64,
    },
    /// The member has everything up to the last copy on stable media, and has stored that it is complete.
    Complete {
        /// What the member promised.
        epoch: u32,
        /// Which fill.
        fill: u64,
    },
    /// The member's pool has no room for what it is sent while it is filled: the fill is broken off.
    NoRoom {
        /// What the member promised.
        epoch: u32,
    },
    /// The head's own replica cannot give these blocks, or it has none: it asks for them as another one holds them.
    Read {
        /// By whose authority.
        epoch: u32,
        /// Tells this question from others. The answers repeat it.
        read: u64,
        /// First block.
        block: u32,
        /// How many: at most a piece.
        count: u32,
    },
    /// The blocks asked for, as payload; holes are zeroes.
    Blocks {
        /// What the member promised.
        epoch: u32,
        /// Which question.
        read: u64,
        /// First block.
        block: u32,
        /// How many: at most a piece.
        count: u32,
    },
    /// All blocks asked for are holes.
    Holes {
        /// What the member promised.
        epoch: u32,
        /// Which question.
        read: u64,
        /// First block.
        block: u32,
        /// How many: at most a piece.
        count: u32,
    },
    /// The member cannot give these blocks either.
    Unreadable {
        /// What the member promised.
        epoch: u32,
        /// Which question.
        read: u64,
    },
    /// Replicas are compared, and damage is made good.
    Check(CheckMessage),
    /// The head asks for leave to answer reads without asking again.
    Lease {
        /// Whose.
        epoch: u32,
        /// When it asked, by its own clock, in nanoseconds.
        asked_ns: u64,
        /// Changes up to here are committed: the member's log need not keep them for others.
        committed: u64,
        /// What it asks of the member's room, if it numbers changes within that.
        room: Option<RoomQuestion>,
    },
    /// Leave is granted.
    Leased {
        /// To whose.
        epoch: u32,
        /// The request's own moment.
        asked_ns: u64,
        /// The member's room, if it was asked for that and changes may be numbered within it.
        room: Option<RoomAnswer>,
    },
}

impl PeerMessage {
    /// Does a member send it to a head, and not the other way round?
    #[must_use]
    pub fn is_answer(&self) -> bool {
        match self {
            PeerMessage::Hello(_)
            | PeerMessage::Promise { .. }
            | PeerMessage::Change { .. }
            | PeerMessage::Fetch { .. }
            | PeerMessage::Compare { .. }
            | PeerMessage::ListChanged { .. }
            | PeerMessage::Fill { .. }
            | PeerMessage::Copy { .. }
            | PeerMessage::Filled { .. }
            | PeerMessage::Read { .. }
            | PeerMessage::Lease { .. } => false,
            PeerMessage::Promised { .. }
            | PeerMessage::Refused { .. }
            | PeerMessage::Ack { .. }
            | PeerMessage::Gap { .. }
            | PeerMessage::Fetched { .. }
            | PeerMessage::FetchGone { .. }
            | PeerMessage::Leased { .. }
            | PeerMessage::Surplus { .. }
            | PeerMessage::Compared { .. }
            | PeerMessage::Changed { .. }
            | PeerMessage::Listed { .. }
            | PeerMessage::Filling { .. }
            | PeerMessage::Copied { .. }
            | PeerMessage::Complete { .. }
            | PeerMessage::NoRoom { .. }
            | PeerMessage::Blocks { .. }
            | PeerMessage::Holes { .. }
            | PeerMessage::Unreadable { .. } => true,
            PeerMessage::Check(check) => check.is_answer(),
        }
    }
}

/// A message's frame: what it is, about which volume, and what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerFrame {
    /// The volume; 0 for [`PeerMessage::Hello`].
    pub volume: VolumeNumber,
    /// The message.
    pub message: PeerMessage,
}

impl PeerFrame {
    /// Appends header and body; the payload follows it on the wire. `checksums` are those of the payload's blocks.
    ///
    /// # Panics
    /// If there are not as many checksums as the message has blocks.
    pub fn encode(&self, checksums: &[u32], out: &mut Vec<u8>) {
        let words = self.words();
        let payload_blocks = self.payload_blocks();
        assert_eq!(checksums.len(), self.checksum_count() as usize, "one checksum per block");
        let start = out.len();
        let body_bytes = self.body_bytes();
        out.extend(MAGIC);
        out.extend([VERSION, words.kind, words.change, 0]);
        out.extend([0; 4]);
        out.extend(body_bytes.to_be_bytes());
        out.extend((payload_blocks * BLOCK_BYTES).to_be_bytes());
        out.extend(self.volume.0.to_be_bytes());
        out.extend(words.epoch.to_be_bytes());
        out.extend(words.block.to_be_bytes());
        out.extend(words.count.to_be_bytes());
        out.extend(words.stamp.epoch.to_be_bytes());
        out.extend(words.stamp.sequence.to_be_bytes());
        out.extend(words.previous.epoch.to_be_bytes());
        out.extend(words.new_blocks.to_be_bytes());
        out.extend(words.number.to_be_bytes());
        assert_eq!(out.len() - start, PEER_HEADER_BYTES);
        if let PeerMessage::Hello(hello) = self.message {
            out.extend(hello.node.0.to_be_bytes());
            out.extend([0; 4]);
            out.extend(hello.boot.to_be_bytes());
            out.extend(hello.features.to_be_bytes());
        }
        checksums.iter().for_each(|crc| out.extend(crc.to_be_bytes()));
        let crc = crc32c(&out[start..]);
        out[start + CHECKSUM_AT..start + CHECKSUM_AT + 4].copy_from_slice(&crc.to_be_bytes());
    }

    /// Blocks of payload behind header and body.
    #[must_use]
    pub fn payload_blocks(&self) -> u32 {
        match self.message {
            PeerMessage::Change { change, .. } | PeerMessage::Fetched { change, .. } => {
                change.payload_blocks()
            }
            PeerMessage::Copy { copy, .. } => copy.payload_blocks(),
            PeerMessage::Blocks { count, .. } => count,
            PeerMessage::Check(message) => message.payload_blocks(),
            _ => 0,
        }
    }

    /// Checksums in its body: of what comes with it, or of what it tells of.
    fn checksum_count(&self) -> u32 {
        match self.message {
            PeerMessage::Check(message) => message.checksum_count(),
            _ => self.payload_blocks(),
        }
    }

    fn body_bytes(&self) -> u32 {
        match self.message {
            PeerMessage::Hello(_) => HELLO_BYTES,
            _ => 4 * self.checksum_count(),
        }
    }

    /// How long the body is that follows this header. Nothing but the magic number, the version and the lengths has been
    /// checked when this returns: the rest needs the body.
    ///
    /// # Errors
    /// [`WireError::Magic`], [`WireError::Kind`] for another version, [`WireError::Range`] for a length that no message has.
    pub fn body_length(header: &[u8; PEER_HEADER_BYTES]) -> Result<u32, WireError> {
        let mut fields = Fields::new(header);
        if &fields.array()? != MAGIC {
            return Err(WireError::Magic);
        }
        let [version, ..] = fields.array::<4>()?;
        if version != VERSION {
            return Err(WireError::Kind);
        }
        let (_, body, payload) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let sensible = body <= PEER_BODY_BYTES_MAX.max(HELLO_BYTES)
            && payload <= PEER_PAYLOAD_BYTES_MAX
            && payload.is_multiple_of(BLOCK_BYTES);
        if sensible { Ok(body) } else { Err(WireError::Range) }
    }

    /// Reads header and body; the body are the bytes that [`Self::body_length`] gave.
    ///
    /// # Errors
    /// [`WireError::Checksum`] if header or body are damaged, [`WireError::Range`] if a field cannot be, and
    /// [`WireError::Kind`] for a kind that does not exist.
    pub fn decode(bytes: &[u8]) -> Result<PeerFrame, WireError> {
        let (header, body) = bytes.split_first_chunk::<PEER_HEADER_BYTES>().ok_or(WireError::Truncated)?;
        if Self::body_length(header)? as usize != body.len() {
            return Err(WireError::Truncated);
        }
        let stated = u32::from_be_bytes(header[CHECKSUM_AT..CHECKSUM_AT + 4].try_into().expect("four bytes"));
        let parts = [&header[..CHECKSUM_AT], &[0; 4], &header[CHECKSUM_AT + 4..], body];
        if crc32c_of_parts(&parts) != stated {
            return Err(WireError::Checksum);
        }
        let mut fields = Fields::new(&header[4..]);
        let [_, kind, change, _] = fields.array()?;
        let _ = (fields.u32()?, fields.u32()?);
        let payload_bytes = fields.u32()?;
        let volume = VolumeNumber(fields.u32()?);
        let (epoch, block, count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let stamp = Stamp { epoch: fields.u32()?, sequence: fields.u64()? };
        let previous = Stamp { epoch: fields.u32()?, sequence: stamp.sequence.wrapping_sub(1) };
        let new_blocks = fields.u32()?;
        let number = fields.u64()?;
        let words = Words { kind, change, epoch, block, count, stamp, previous, new_blocks, number };
        let frame = PeerFrame { volume, message: words.message(body)? };
        let fits = frame.body_bytes() as usize == body.len()
            && frame.payload_blocks() * BLOCK_BYTES == payload_bytes;
        if fits { Ok(frame) } else { Err(WireError::Range) }
    }

    /// The checksums in the body of a message that was decoded.
    pub fn checksums(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
        let body = &bytes[PEER_HEADER_BYTES..];
        body.chunks_exact(4).map(|crc| u32::from_be_bytes(crc.try_into().expect("four bytes")))
    }
}

#[cfg(test)]
mod tests;
