//! What the shards of one process tell each other. They share no memory: what belongs to one of them, the others ask for.
//!
//! ```text
//!                  Report, Want, GiveBack, SyncWanted
//!   shard with  ──────────────────────────────────────▶  home of the pool: its free segments, the room in it,
//!   lanes       ◀──────────────────────────────────────  and the syncs of its device
//!                  News, Lent, SyncEnded
//!                  Room, PoolFailed in both directions
//! ```
//!
//! Messages between two shards arrive in order; between others nothing is promised. None is needed for a write whose lane
//! has a segment to write to.

use super::ports::Token;
use crate::store::layout::SegmentIndex;

/// A shard of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardIndex(pub u16);

/// A pool, by its position in the list that all shards were started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolIndex(pub u16);

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardMessage {
    /// To the home: a lane wants everything of it that has completed on stable media.
    SyncWanted {
        /// Of which pool.
        pool: PoolIndex,
        /// Comes back in [`ShardMessage::SyncEnded`].
        token: Token,
    },
    /// From the home: a sync that began after [`ShardMessage::SyncWanted`] had come has ended.
    SyncEnded {
        /// Of whom.
        token: Token,
        /// How.
        good: bool,
    },
    /// A write or sync has failed: all lanes of the pool stop writing.
    PoolFailed {
        /// Which.
        pool: PoolIndex,
    },
    /// To the home: how the sender's lanes stand.
    Report {
        /// In which pool.
        pool: PoolIndex,
        /// How.
        report: PoolReport,
    },
    /// From the home: how the pool stands.
    News {
        /// Which.
        pool: PoolIndex,
        /// How.
        news: PoolNews,
    },
    /// Room passes from the sender to the receiver: segments that its lanes may fill. All shards together never have
    /// room for more than there are.
    Room {
        /// In which pool.
        pool: PoolIndex,
        /// How much.
        segments: u32,
    },
    /// To the home: a lane would like to borrow free segments. Answered by [`ShardMessage::Lent`].
    Want {
        /// From which pool.
        pool: PoolIndex,
        /// The sender's number for its lane.
        lane: u8,
        /// How many, at most.
        count: u8,
    },
    /// From the home: free segments; none, if there are none.
    Lent {
        /// For which lane.
        lane: u8,
        /// Which.
        lot: Lot,
    },
    /// To the home: free segments that a lane can spare.
    GiveBack {
        /// Of which pool.
        pool: PoolIndex,
        /// Which.
        lot: Lot,
    },
    /// The process is short of connections: close those whose clients have gone.
    CloseAbandoned,
    /// The sender has drained: it will not ask for anything any more.
    Finished,
}

/// How the lanes of one shard stand in a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolReport {
    /// Counts the reports.
    pub number: u32,
    /// The newest news that this takes into account.
    pub heard: u32,
    /// Segments that the lanes cannot do without; more than there is room for, if that is too little.
    pub needed: u32,
    /// A change waits for room that another shard may have.
    pub short: bool,
    /// A change waits for a free segment.
    pub hungry: bool,
    /// While others are hungry: segments may yet be given back.
    pub may_give: bool,
}

/// How a pool stands, for one of its shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolNews {
    /// Counts the questions to all. News of the same number may differ.
    pub number: u32,
    /// The newest report of the receiver that this takes into account.
    pub heard: u32,
    /// Segments that no lane has borrowed.
    pub free: u32,
    /// Room that the receiver may keep beyond what it needs.
    pub lot: u32,
    /// Another shard's change waits for a free segment.
    pub others_hungry: bool,
    /// The receiver is short, the others have been asked since, and there is no room to be had.
    pub room_is_out: bool,
    /// The receiver is hungry, the others have been asked since, and none of them may give a segment back.
    pub nothing_comes: bool,
}

/// Segments in one message.
pub const LOT_SEGMENTS: usize = 8;

/// A few segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lot {
    segments: [u32; LOT_SEGMENTS],
    /// One bit each: was it never written?
    pristine: u8,
    count: u8,
}

impl Lot {
    /// Adds a segment. False if it has no place here.
    #[must_use]
    pub fn add(&mut self, segment: SegmentIndex, pristine: bool) -> bool {
        let index = usize::from(self.count);
        if index == LOT_SEGMENTS {
            return false;
        }
        self.segments[index] = segment.0;
        self.pristine |= u8::from(pristine) << index;
        self.count += 1;
        true
    }

    /// The segments, and whether each must be zeroed before it is written.
    pub fn segments(&self) -> impl Iterator<Item = (SegmentIndex, bool)> {
        let Lot { segments, pristine, count } = *self;
        (0..usize::from(count)).map(move |index| (SegmentIndex(segments[index]), pristine >> index & 1 == 1))
    }

    /// Is it full?
    #[must_use]
    pub fn is_full(&self) -> bool {
        usize::from(self.count) == LOT_SEGMENTS
    }

    /// Is there nothing in it?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}
