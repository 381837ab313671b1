//! A message and the words of its header, both ways.

use super::{
    ChangeHeader, CheckMessage, CopyHeader, Hello, PeerFrame, PeerMessage, RELEASED_BLOCKS_MAX, WireError,
    change_code, change_of_code,
};
use crate::limits::PIECE_BLOCKS_MAX;
use crate::record::{ChangeKind, NodeId, Stamp};
use crate::wire::fields::Fields;

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const PROMISE: u8 = 2;
    pub(super) const PROMISED: u8 = 3;
    pub(super) const REFUSED: u8 = 4;
    pub(super) const CHANGE: u8 = 5;
    pub(super) const ACK: u8 = 6;
    pub(super) const GAP: u8 = 7;
    pub(super) const FETCH: u8 = 8;
    pub(super) const FETCHED: u8 = 9;
    pub(super) const FETCH_GONE: u8 = 10;
    pub(super) const LEASE: u8 = 11;
    pub(super) const LEASED: u8 = 12;
    pub(super) const FILL: u8 = 13;
    pub(super) const FILLING: u8 = 14;
    pub(super) const COPY: u8 = 15;
    pub(super) const COPIED: u8 = 16;
    pub(super) const FILLED: u8 = 17;
    pub(super) const COMPLETE: u8 = 18;
    pub(super) const NO_ROOM: u8 = 22;
    pub(super) const COMPARE: u8 = 30;
    pub(super) const SURPLUS: u8 = 31;
    pub(super) const COMPARED: u8 = 32;
    pub(super) const LIST_CHANGED: u8 = 33;
    pub(super) const CHANGED: u8 = 34;
    pub(super) const LISTED: u8 = 35;
    pub(super) const READ: u8 = 19;
    pub(super) const BLOCKS: u8 = 20;
    pub(super) const UNREADABLE: u8 = 21;
    pub(super) const HOLES: u8 = 23;
}

/// The header's fields that messages use, whatever they mean to each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Words {
    pub(super) kind: u8,
    pub(super) change: u8,
    pub(super) epoch: u32,
    pub(super) block: u32,
    pub(super) count: u32,
    pub(super) stamp: Stamp,
    pub(super) previous: Stamp,
    pub(super) new_blocks: u32,
    pub(super) number: u64,
}

fn plain(kind: u8, epoch: u32) -> Words {
    Words { kind, epoch, ..Words::default() }
}

fn of_fill(kind: u8, epoch: u32, fill: u64) -> Words {
    Words { number: fill, ..plain(kind, epoch) }
}

fn of_read(kind: u8, epoch: u32, read: u64, (block, count): (u32, u32)) -> Words {
    Words { block, count, number: read, ..plain(kind, epoch) }
}

fn of_change(words: Words, change: ChangeHeader) -> Words {
    Words {
        change: change_code(change.kind),
        block: change.block,
        count: change.count,
        stamp: change.stamp,
        previous: change.previous,
        new_blocks: change.new_blocks,
        ..words
    }
}

impl PeerFrame {
    pub(super) fn words(&self) -> Words {
        match self.message {
            PeerMessage::Hello(_) => plain(kind::HELLO, 0),
            PeerMessage::Promise { epoch } => plain(kind::PROMISE, epoch),
            PeerMessage::Promised { epoch, last, granted_ns } => {
                Words { stamp: last, number: granted_ns, ..plain(kind::PROMISED, epoch) }
            }
            PeerMessage::Refused { promised } => plain(kind::REFUSED, promised),
            PeerMessage::Change { epoch, change, committed } => {
                of_change(Words { number: committed, ..plain(kind::CHANGE, epoch) }, change)
            }
            PeerMessage::Ack { epoch, through } => Words { number: through, ..plain(kind::ACK, epoch) },
            PeerMessage::Gap { epoch, last } => Words { stamp: last, ..plain(kind::GAP, epoch) },
            PeerMessage::Fetch { epoch, sequence } => Words { number: sequence, ..plain(kind::FETCH, epoch) },
            PeerMessage::Fetched { epoch, change } => of_change(plain(kind::FETCHED, epoch), change),
            PeerMessage::FetchGone { epoch, sequence } => {
                Words { number: sequence, ..plain(kind::FETCH_GONE, epoch) }
            }
            PeerMessage::Lease { epoch, asked_ns, committed, room } => {
                let stamp = Stamp { epoch: 0, sequence: committed };
                Words { number: asked_ns, stamp, ..plain(kind::LEASE, epoch) }.with_question(room)
            }
            PeerMessage::Leased { epoch, asked_ns, room } => {
                Words { number: asked_ns, ..plain(kind::LEASED, epoch) }.with_answer(room)
            }
            PeerMessage::Compare { epoch, fill, base } => {
                Words { stamp: base, ..of_fill(kind::COMPARE, epoch, fill) }
            }
            PeerMessage::Surplus { epoch, fill, block, count } => {
                Words { block, count, ..of_fill(kind::SURPLUS, epoch, fill) }
            }
            PeerMessage::Compared { epoch, fill, known } => {
                Words { count: known.into(), ..of_fill(kind::COMPARED, epoch, fill) }
            }
            PeerMessage::ListChanged { epoch, fill, base } => {
                Words { stamp: base, ..of_fill(kind::LIST_CHANGED, epoch, fill) }
            }
            PeerMessage::Changed { epoch, fill, if_holes, block, count } => Words {
                change: change_code(if if_holes { ChangeKind::Zero } else { ChangeKind::Data }),
                block,
                count,
                ..of_fill(kind::CHANGED, epoch, fill)
            },
            PeerMessage::Listed { epoch, fill, known } => {
                Words { count: known.into(), ..of_fill(kind::LISTED, epoch, fill) }
            }
            PeerMessage::Fill { epoch, after, fill } => {
                Words { stamp: after, ..of_fill(kind::FILL, epoch, fill) }
            }
            PeerMessage::Filling { epoch, fill } => of_fill(kind::FILLING, epoch, fill),
            PeerMessage::Copy { epoch, fill, copy } => Words {
                change: change_code(if copy.data { ChangeKind::Data } else { ChangeKind::Zero }),
                block: copy.block,
                count: copy.count,
                ..of_fill(kind::COPY, epoch, fill)
            },
            PeerMessage::Copied { epoch, fill, copies } => {
                Words { count: copies, ..of_fill(kind::COPIED, epoch, fill) }
            }
            PeerMessage::Filled { epoch, fill } => of_fill(kind::FILLED, epoch, fill),
            PeerMessage::Complete { epoch, fill } => of_fill(kind::COMPLETE, epoch, fill),
            PeerMessage::NoRoom { epoch } => plain(kind::NO_ROOM, epoch),
            PeerMessage::Read { epoch, read, block, count } => {
                of_read(kind::READ, epoch, read, (block, count))
            }
            PeerMessage::Blocks { epoch, read, block, count } => {
                of_read(kind::BLOCKS, epoch, read, (block, count))
            }
            PeerMessage::Holes { epoch, read, block, count } => {
                of_read(kind::HOLES, epoch, read, (block, count))
            }
            PeerMessage::Unreadable { epoch, read } => of_read(kind::UNREADABLE, epoch, read, (0, 0)),
            PeerMessage::Check(message) => message.words(),
        }
    }
}

impl Words {
    pub(super) fn message(self, body: &[u8]) -> Result<PeerMessage, WireError> {
        let Words { epoch, stamp, number, .. } = self;
        Ok(match self.kind {
            kind::HELLO => {
                let mut fields = Fields::new(body);
                let node = NodeId(fields.u32()?);
                let _ = fields.u32()?;
                PeerMessage::Hello(Hello { node, boot: fields.u64()?, features: fields.u64()? })
            }
            kind::PROMISE => PeerMessage::Promise { epoch },
            kind::PROMISED => PeerMessage::Promised { epoch, last: stamp, granted_ns: number },
            kind::REFUSED => PeerMessage::Refused { promised: epoch },
            kind::CHANGE => PeerMessage::Change { epoch, change: self.change()?, committed: number },
            kind::ACK => PeerMessage::Ack { epoch, through: number },
            kind::GAP => PeerMessage::Gap { epoch, last: stamp },
            kind::FETCH => PeerMessage::Fetch { epoch, sequence: number },
            kind::FETCHED => PeerMessage::Fetched { epoch, change: self.change()? },
            kind::FETCH_GONE => PeerMessage::FetchGone { epoch, sequence: number },
            kind::LEASE => PeerMessage::Lease {
                epoch,
                asked_ns: number,
                committed: stamp.sequence,
                room: self.question()?,
            },
            kind::LEASED => PeerMessage::Leased { epoch, asked_ns: number, room: self.answer()? },
            kind::NO_ROOM => PeerMessage::NoRoom { epoch },
            kind::FILL | kind::COMPARE | kind::LIST_CHANGED if stamp.epoch > epoch => {
                return Err(WireError::Range);
            }
            kind::COMPARE => PeerMessage::Compare { epoch, fill: number, base: stamp },
            kind::SURPLUS => {
                let CopyHeader { block, count, .. } = self.blocks_of_a_leaf(false)?;
                PeerMessage::Surplus { epoch, fill: number, block, count }
            }
            kind::COMPARED | kind::LISTED if self.count > 1 => return Err(WireError::Range),
            kind::COMPARED => PeerMessage::Compared { epoch, fill: number, known: self.count == 1 },
            kind::LIST_CHANGED => PeerMessage::ListChanged { epoch, fill: number, base: stamp },
            kind::CHANGED => {
                let if_holes = match change_of_code(self.change)? {
                    ChangeKind::Data => false,
                    ChangeKind::Zero => true,
                    ChangeKind::Trim => return Err(WireError::Range),
                };
                let CopyHeader { block, count, .. } = self.blocks_of_a_leaf(false)?;
                PeerMessage::Changed { epoch, fill: number, if_holes, block, count }
            }
            kind::LISTED => PeerMessage::Listed { epoch, fill: number, known: self.count == 1 },
            kind::FILL => PeerMessage::Fill { epoch, after: stamp, fill: number },
            kind::FILLING => PeerMessage::Filling { epoch, fill: number },
            kind::COPY => PeerMessage::Copy { epoch, fill: number, copy: self.copy()? },
            kind::COPIED => PeerMessage::Copied { epoch, fill: number, copies: self.count },
            kind::FILLED => PeerMessage::Filled { epoch, fill: number },
            kind::COMPLETE => PeerMessage::Complete { epoch, fill: number },
            kind::READ => {
                let (block, count) = self.piece()?;
                PeerMessage::Read { epoch, read: number, block, count }
            }
            kind::BLOCKS => {
                let (block, count) = self.piece()?;
                PeerMessage::Blocks { epoch, read: number, block, count }
            }
            kind::HOLES => {
                let (block, count) = self.piece()?;
                PeerMessage::Holes { epoch, read: number, block, count }
            }
            kind::UNREADABLE => PeerMessage::Unreadable { epoch, read: number },
            _ => PeerMessage::Check(CheckMessage::from_words(self)?),
        })
    }

    /// Some blocks, at most a piece.
    pub(super) fn piece(self) -> Result<(u32, u32), WireError> {
        let inside =
            (1..=PIECE_BLOCKS_MAX).contains(&self.count) && self.block.checked_add(self.count - 1).is_some();
        if inside { Ok((self.block, self.count)) } else { Err(WireError::Range) }
    }

    /// A copy of sense: some blocks of one leaf, and no trim, which leaves zeroes like any other.
    fn copy(self) -> Result<CopyHeader, WireError> {
        let data = match change_of_code(self.change)? {
            ChangeKind::Data => true,
            ChangeKind::Zero => false,
            ChangeKind::Trim => return Err(WireError::Range),
        };
        self.blocks_of_a_leaf(data)
    }

    /// Some blocks of one leaf; no more than a piece if they come with data.
    fn blocks_of_a_leaf(self, data: bool) -> Result<CopyHeader, WireError> {
        let most = if data { PIECE_BLOCKS_MAX } else { RELEASED_BLOCKS_MAX };
        let one_leaf = self.count <= RELEASED_BLOCKS_MAX - self.block % RELEASED_BLOCKS_MAX;
        if !(1..=most).contains(&self.count) || !one_leaf {
            return Err(WireError::Range);
        }
        Ok(CopyHeader { data, block: self.block, count: self.count })
    }

    /// A change of sense: some blocks, and a predecessor that can have come before it.
    fn change(self) -> Result<ChangeHeader, WireError> {
        let kind = change_of_code(self.change)?;
        let most = if kind == ChangeKind::Data { PIECE_BLOCKS_MAX } else { RELEASED_BLOCKS_MAX };
        let sensible = (1..=most).contains(&self.count)
            && self.block.checked_add(self.count - 1).is_some()
            && self.stamp.sequence > 0
            && self.previous.epoch <= self.stamp.epoch
            && self.new_blocks <= if kind == ChangeKind::Data { self.count } else { 0 };
        if !sensible {
            return Err(WireError::Range);
        }
        let Words { block, count, stamp, previous, new_blocks, .. } = self;
        Ok(ChangeHeader { kind, block, count, stamp, previous, new_blocks })
    }
}
