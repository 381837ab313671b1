//! The head: who takes a volume's changes, numbers them, and knows when they are committed.
//!
//! ```text
//!          take               CAS 1 won                 CAS 2 won             grants lapsed
//!   idle ───────▶ proposing ───────────▶ gathering ─▶ bringing ─▶ starting ───────────────▶ waiting ─▶ serving
//!    ▲                │ lost                   │           │           │                        │          │
//!    └────────────────┴────────────────────────┴───────────┴───────────┴── a later epoch ───────┴──────────┘
//! ```
//!
//! | state | what happens | what ends it |
//! |---|---|---|
//! | proposing | the compare-and-swap that opens the epoch is under way | the record is read and is ours, or another's |
//! | gathering | the members in sync are asked for their promise and their position | all have answered, or enough after a while |
//! | bringing | changes that some lack are fetched from one that has them and sent to the others, in order | all are equal |
//! | starting | the compare-and-swap that starts the epoch with exactly these members is under way | the record is read |
//! | waiting | leases that members had granted to an earlier head run out | the first of them has: that head cannot read |
//! | serving | changes are numbered, sent and committed; members that fail are removed, and brought back one by one (`fill`) | a later epoch, or it lets go |
//! | releasing | nothing is read or numbered any more; the compare-and-swap that says so is under way (`release`) | the record is read |
//!
//! The outcome of a compare-and-swap is known only from reading the record. Until then both records count: what is
//! acknowledged, everybody in either must have (the union rule).

mod fill;
mod peers;
mod release;
mod room;
mod serve;
mod view;

use super::bugs::{Bugs, PlantedBug};
use crate::record::{NodeId, Record, Stamp};
use crate::units::Moment;
use crate::wire::peer_message::{ChangeHeader, RoomQuestion};
use fill::Fills;
use peers::{Peer, Peers, Phase};
use std::collections::VecDeque;

pub use room::Room;

/// A member that owes an answer for so long is removed, if enough others remain.
pub const MEMBER_PATIENCE_NS: u64 = 1_000_000_000;
/// A new head waits so long for the members that have not answered, before it goes on without them.
pub const GATHER_PATIENCE_NS: u64 = 500_000_000;
/// A member that has not answered is asked again for its promise after this time.
pub const PROMISE_AGAIN_NS: u64 = 200_000_000;
/// A proposal whose outcome is not known after this time is sent again; it can succeed only once.
pub const PROPOSE_AGAIN_NS: u64 = 1_000_000_000;
/// So many changes do not wait for more. They are a batch of their own at each member.
const GATHERED_CHANGES_MAX: u64 = 32;
/// Changes with so much payload go at once: members have enough to do with each.
const GATHERED_BLOCKS_MAX: u32 = 4;
/// Nothing waits for a member that has been silent for so long.
const GATHER_SILENCE_NS: u64 = MEMBER_PATIENCE_NS / 4;

/// What the head wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadEffect {
    /// Replace the record of the version before by this one.
    Propose(Box<Record>),
    /// Ask a member for its promise.
    Promise {
        /// Whom.
        member: NodeId,
        /// For which epoch.
        epoch: u32,
    },
    /// Send a member a change, with the content that came with [`Head::submit`] or [`Head::fetched`].
    Change {
        /// Whom.
        member: NodeId,
        /// By which authority.
        epoch: u32,
        /// Which.
        change: ChangeHeader,
    },
    /// Ask a member for a change of its log.
    Fetch {
        /// Whom.
        member: NodeId,
        /// By which authority.
        epoch: u32,
        /// Which.
        sequence: u64,
    },
    /// Ask a replica that will be filled what it has beyond `base`.
    Compare {
        /// Whom.
        member: NodeId,
        /// By which authority.
        epoch: u32,
        /// Which fill it is for.
        fill: u64,
        /// The last change in common.
        base: Stamp,
    },
    /// Tell a replica that it will be filled.
    Fill {
        /// Whom.
        member: NodeId,
        /// By which authority.
        epoch: u32,
        /// Which fill.
        fill: u64,
        /// The changes after it will be sent.
        after: Stamp,
    },
    /// Find the first blocks from `block` on that the replica may lack: what the own replica changed after `base`, and what
    /// the other one has beyond that; all if `base` is [`Stamp::default`]. Read a piece from there on from the own replica,
    /// send what of it is lacking, and call [`Head::copy_sent`] or [`Head::copy_failed`].
    Copy {
        /// Whom.
        member: NodeId,
        /// By which authority.
        epoch: u32,
        /// Which fill.
        fill: u64,
        /// The last change in common.
        base: Stamp,
        /// All before this block was sent.
        block: u32,
    },
    /// Tell it that this was all.
    Filled {
        /// Whom.
        member: NodeId,
        /// By which authority.
        epoch: u32,
        /// Which fill.
        fill: u64,
    },
    /// Ask a member for a lease, and for room.
    Lease {
        /// Whom.
        member: NodeId,
        /// For which epoch.
        epoch: u32,
        /// At which moment: the answer names it.
        asked: Moment,
        /// What to ask of its room.
        room: Option<RoomQuestion>,
    },
    /// The change is on stable media everywhere: answer whoever asked for it, and let its content go.
    Committed {
        /// Which.
        sequence: u64,
        /// What came with [`Head::submit`]; nothing for a change of an earlier epoch.
        cookie: Option<u32>,
    },
    /// A change that was fetched is not sent any further now: its content may go.
    Dropped {
        /// Which.
        sequence: u64,
    },
    /// The volume is served here from now on.
    Started,
    /// It is not, or no longer: nothing that is open will be answered, and all content may go.
    Ended,
}

/// Why a change is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The volume is not served here.
    #[error("the volume is not served here")]
    NotServing,
}

#[derive(Clone, Debug)]
struct Windowed {
    change: ChangeHeader,
    cookie: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Gathering { until: Moment },
    Bringing { source: NodeId, highest: Stamp, fetching: bool, until: Moment },
    Starting,
    Waiting { until: Moment },
    Serving,
}

/// A head in the making, or one that serves.
#[derive(Debug)]
struct Lead {
    epoch: u32,
    stage: Stage,
    /// A proposal whose outcome is not known, and when to send it again.
    open: Option<(Box<Record>, Moment)>,
    /// The last change of the order.
    last: Stamp,
    /// Changes up to here are committed.
    committed: u64,
    /// Those after it.
    window: VecDeque<Windowed>,
    peers: Peers,
    ask_leases_at: Moment,
    fills: Fills,
    /// What the change takes that waits for room; 0 if none does.
    room_needed: u32,
    /// When to ask again for it.
    room_again_at: Option<Moment>,
    /// Changes that newly take blocks were numbered since leases were last asked for.
    is_filling_space: bool,
    /// Every earlier head has let go: no leave that it had must lapse first.
    unhindered: bool,
}

#[derive(Debug)]
enum Role {
    Idle,
    Proposing { wanted: Box<Record>, again_at: Moment },
    Releasing { epoch: u32, wanted: Box<Record>, again_at: Moment },
    Lead(Box<Lead>),
}

/// See the module's text.
#[derive(Debug)]
pub struct Head {
    node: NodeId,
    record: Record,
    role: Role,
    /// Nodes with a replica to which there is a connection.
    reachable: Vec<NodeId>,
    effects: VecDeque<HeadEffect>,
    bugs: Bugs,
}

impl Head {
    /// The head that this node could be.
    #[must_use]
    pub fn new(node: NodeId, record: Record) -> Head {
        Head {
            node,
            record,
            role: Role::Idle,
            reachable: Vec::new(),
            effects: VecDeque::new(),
            bugs: Bugs::none(),
        }
    }

    /// Plants a mistake.
    pub fn plant(&mut self, bugs: Bugs) {
        self.bugs = bugs;
    }

    /// The newest record that was read.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Does this node serve the volume, or is about to?
    #[must_use]
    pub fn is_active(&self) -> bool {
        matches!(self.role, Role::Proposing { .. } | Role::Lead(_))
    }

    /// Has this node's epoch started, so that it is the head until a later one opens?
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.lead().is_some_and(|lead| matches!(lead.stage, Stage::Waiting { .. } | Stage::Serving))
    }

    /// May changes be submitted?
    #[must_use]
    pub fn is_serving(&self) -> bool {
        matches!(&self.role, Role::Lead(lead) if lead.stage == Stage::Serving)
    }

    /// May a read be answered with what is committed? Every replica in sync must have given leave.
    #[must_use]
    pub fn may_read(&self, now: Moment) -> bool {
        let Role::Lead(lead) = &self.role else { return false };
        lead.stage == Stage::Serving && lead.peers.all_leased(&lead.needed(&self.record, self.bugs), now)
    }

    /// The last sequence that was numbered, if the volume is served here.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.lead().map_or(0, |lead| lead.last.sequence)
    }

    /// Changes up to here are committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.lead().map_or(0, |lead| lead.committed)
    }

    /// Changes up to here stay for ever, and members need not keep them in their logs for others. While a view changes that
    /// is nothing: who takes part in the next attempt may lack what those of this one hold.
    #[must_use]
    pub fn settled(&self) -> u64 {
        let serves = |lead: &&Lead| matches!(lead.stage, Stage::Waiting { .. } | Stage::Serving);
        self.lead().filter(serves).map_or(0, |lead| lead.committed)
    }

    /// Changes that are not committed, oldest first.
    pub fn pending(&self) -> impl Iterator<Item = &ChangeHeader> {
        self.lead().into_iter().flat_map(|lead| lead.window.iter().map(|windowed| &windowed.change))
    }

    /// The other replicas in sync, if the volume is served here.
    #[must_use]
    pub fn others_in_sync(&self) -> Vec<NodeId> {
        if !self.is_serving() {
            return Vec::new();
        }
        self.record.in_sync.iter().copied().filter(|node| *node != self.node).collect()
    }

    /// Does this member follow the head, so that it has all that is committed and can be asked for it?
    #[must_use]
    pub fn is_following(&self, member: NodeId) -> bool {
        let peer = self.lead().and_then(|lead| lead.peers.get(member));
        peer.is_some_and(|peer| peer.phase == Phase::Following)
    }

    /// Is a replica being filled?
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.lead().is_some_and(|lead| !lead.fills.is_idle())
    }

    /// The epoch that this node leads, or is about to; 0 if none.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.lead().map_or(0, |lead| lead.epoch)
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<HeadEffect> {
        self.effects.pop_front()
    }

    fn lead(&self) -> Option<&Lead> {
        match &self.role {
            Role::Lead(lead) => Some(lead),
            _ => None,
        }
    }

    /// Gives up whatever this node was to the volume.
    pub fn resign(&mut self) {
        if self.is_active() {
            self.role = Role::Idle;
            self.effects.push_back(HeadEffect::Ended);
        }
    }

    /// For people and failing tests: what the volume waits for.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.role {
            Role::Idle => format!("no head; record {:?}", self.record),
            Role::Proposing { wanted, .. } => format!("proposing epoch {}", wanted.epoch),
            Role::Releasing { epoch, .. } => format!("letting go of epoch {epoch}; record {:?}", self.record),
            Role::Lead(lead) => format!(
                "epoch {} {:?}, committed {} of {:?}, open {:?}, in sync {:?}, {:?}, {:?}",
                lead.epoch,
                lead.stage,
                lead.committed,
                lead.last,
                lead.open.as_ref().map(|(record, _)| &record.in_sync),
                self.record.in_sync,
                lead.peers,
                lead.fills
            ),
        }
    }
}

impl Lead {
    /// Whose acknowledgements and leases count: everybody in the record, and while a change of it is open, everybody in
    /// that too.
    fn needed(&self, record: &Record, bugs: Bugs) -> Vec<NodeId> {
        if let Some((open, _)) = self.open.as_ref().filter(|_| bugs.has(PlantedBug::AckBeforeRemoval)) {
            return open.in_sync.clone();
        }
        let mut needed = record.in_sync.clone();
        if let Some((open, _)) = self.open.as_ref().filter(|_| !bugs.has(PlantedBug::AckBeforeAdmission)) {
            needed.extend(open.in_sync.iter().filter(|node| !record.is_in_sync(**node)));
        }
        needed
    }
}
