//! What is in a state.

use super::{BLOCKS, NODES};

/// A set of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nodes(u8);

impl Nodes {
    /// All of them.
    pub const ALL: Nodes = Nodes((1 << NODES) - 1);

    /// With one more.
    #[must_use]
    pub fn with(self, node: usize) -> Nodes {
        Nodes(self.0 | 1 << node)
    }

    /// Without one.
    #[must_use]
    pub fn without(self, node: usize) -> Nodes {
        Nodes(self.0 & !(1 << node))
    }

    /// Those of both.
    #[must_use]
    pub fn union(self, other: Nodes) -> Nodes {
        Nodes(self.0 | other.0)
    }

    /// Is the node in it?
    #[must_use]
    pub fn has(self, node: usize) -> bool {
        self.0 >> node & 1 == 1
    }

    /// Is every one of `other` in it?
    #[must_use]
    pub fn covers(self, other: Nodes) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is nobody in it?
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its members.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..NODES).filter(move |node| self.has(*node))
    }
}

/// A change of the volume, by its place in the order: epoch first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// The epoch in which it was numbered.
    pub epoch: u8,
    /// Its number.
    pub sequence: u8,
}

/// The volume's record.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Record {
    /// Rises with every change of the record.
    pub version: u8,
    /// Rises with every head.
    pub epoch: u8,
    /// The head's node.
    pub head: usize,
    /// Has the epoch begun to serve?
    pub started: bool,
    /// Whose acknowledgement every write needs.
    pub in_sync: Nodes,
    /// Where started epochs ended: epoch and last sequence.
    pub ends: Vec<(u8, u8)>,
    /// The last epoch that was started.
    pub last_started: u8,
}

/// A compare-and-swap on its way to the record store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Proposal {
    /// The version that it replaces.
    pub expected: u8,
    /// What it puts there.
    pub record: Record,
}

/// A write on its way to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// Whom it is for.
    pub to: usize,
    /// The write.
    pub version: Version,
    /// The one before it in the order.
    pub previous: Version,
    /// What it changes.
    pub block: usize,
}

/// A write that the head has numbered and not committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pending {
    /// The write.
    pub version: Version,
    /// What it changes.
    pub block: usize,
    /// Who has it.
    pub acked: Nodes,
}

/// A returning replica as the head sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fill {
    /// Whose.
    pub member: usize,
    /// The last write that was not mirrored to it.
    pub mirrored_after: Version,
    /// Up to where the replica's order is the volume's.
    pub common: u8,
    /// Blocks still to be copied, one bit each.
    pub wanted: u8,
    /// A source has said which blocks were changed.
    pub enumerated: bool,
    /// The newest write whose effect a copy had.
    pub newest_copied: Version,
    /// The compare-and-swap that admits it was sent.
    pub offered: bool,
}

/// A process that leads or wants to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Neither.
    None,
    /// Its first compare-and-swap is on its way.
    Proposing(Record),
    /// Its epoch is open: it gathers promises.
    Candidate {
        /// Its record, not started.
        record: Record,
        /// What members reported with their promises.
        reports: [Option<Version>; NODES],
        /// The compare-and-swap that starts the epoch was sent.
        starting: Option<Record>,
    },
    /// It serves.
    Head(Box<Head>),
}

/// A serving head.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Head {
    /// The newest record that it knows.
    pub record: Record,
    /// A change of it whose outcome it does not know.
    pub open: Option<Record>,
    /// The last write numbered.
    pub last: Version,
    /// Not committed, in order.
    pub pending: Vec<Pending>,
    /// The last write committed.
    pub committed_through: Version,
    /// What reads return.
    pub committed: [Version; BLOCKS],
    /// Whose lease it holds.
    pub leases: Nodes,
    /// The replica that it brings back.
    pub fill: Option<Fill>,
}

impl Head {
    /// Whose acknowledgement and lease it needs: of both records while a change is open.
    pub fn needed(&self, union: bool) -> Nodes {
        match &self.open {
            Some(open) if union => self.record.in_sync.union(open.in_sync),
            _ => self.record.in_sync,
        }
    }
}

/// One node: a replica on stable media, and a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// Does the process run?
    pub up: bool,
    /// No lower epoch is accepted; on stable media.
    pub promise: u8,
    /// The last entry of the replica's unbroken order, or while it is filled the last mirrored one.
    pub last: Version,
    /// While it is filled: what it holds for sure. On stable media before the first block out of order.
    pub base: Option<Version>,
    /// The blocks.
    pub data: [Version; BLOCKS],
    /// Blocks that a live write has given it since it is being filled, one bit each. In memory.
    pub live: u8,
    /// The epoch to whose head it granted a lease that it must still honour; 0: none.
    pub granted: u8,
    /// What the process is.
    pub role: Role,
}

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// In the record store.
    pub record: Record,
    /// On their way to it.
    pub proposals: Vec<Proposal>,
    /// All nodes.
    pub nodes: [Node; NODES],
    /// Writes on their way.
    pub messages: Vec<Message>,
    /// Newest acknowledged write of each block.
    pub acked: [Version; BLOCKS],
    /// Newest version of each block that was acknowledged or read.
    pub seen: [Version; BLOCKS],
    /// Who had a write acknowledged in each epoch, one more than the node.
    pub acked_by: Vec<(u8, usize)>,
    /// What has been used of the bounds.
    pub writes: u8,
    /// The same.
    pub crashes: u8,
    /// The same.
    pub removals: u8,
    /// The same.
    pub fills: u8,
    /// A read returned less than had been seen.
    pub went_back: bool,
    /// An epoch started with replicas that differ.
    pub unequal: bool,
    /// A returning replica was admitted.
    pub admitted: bool,
}

impl State {
    /// Three empty replicas in sync, node 0 leads the first epoch.
    #[must_use]
    pub fn beginning() -> State {
        let record = Record {
            version: 1,
            epoch: 1,
            head: 0,
            started: true,
            in_sync: Nodes::ALL,
            ends: Vec::new(),
            last_started: 1,
        };
        let node = |role| Node {
            up: true,
            promise: 1,
            last: Version::default(),
            base: None,
            data: [Version::default(); BLOCKS],
            live: 0,
            granted: 0,
            role,
        };
        let head = Head {
            record: record.clone(),
            open: None,
            last: Version::default(),
            pending: Vec::new(),
            committed_through: Version::default(),
            committed: [Version::default(); BLOCKS],
            leases: Nodes::default(),
            fill: None,
        };
        State {
            record,
            proposals: Vec::new(),
            nodes: [node(Role::Head(Box::new(head))), node(Role::None), node(Role::None)],
            messages: Vec::new(),
            acked: [Version::default(); BLOCKS],
            seen: [Version::default(); BLOCKS],
            acked_by: Vec::new(),
            writes: 0,
            crashes: 0,
            removals: 0,
            fills: 0,
            went_back: false,
            unequal: false,
            admitted: false,
        }
    }

    /// The head that runs on a node.
    pub fn head(&self, node: usize) -> Option<&Head> {
        match &self.nodes[node].role {
            Role::Head(head) => Some(head),
            _ => None,
        }
    }

    /// The same, to change it.
    pub fn head_mut(&mut self, node: usize) -> &mut Head {
        match &mut self.nodes[node].role {
            Role::Head(head) => head,
            role => unreachable!("{role:?} is no head"),
        }
    }

    /// Sends a compare-and-swap. One that others have made hopeless already need not be kept.
    pub fn propose(&mut self, expected: u8, record: Record) {
        if expected != self.record.version {
            return;
        }
        let proposal = Proposal { expected, record };
        if let Err(place) = self.proposals.binary_search(&proposal) {
            self.proposals.insert(place, proposal);
        }
    }

    /// Sends a write.
    pub fn send(&mut self, message: Message) {
        if let Err(place) = self.messages.binary_search(&message) {
            self.messages.insert(place, message);
        }
    }
}
