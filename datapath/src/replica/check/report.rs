//! What a pass over a volume has found.

use crate::record::{NodeId, VolumeNumber};

/// Blocks that a report names; of further ones it only tells how many there are.
pub const FINDINGS_MAX: usize = 64;

/// Why a volume is walked through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Its time has come.
    Scrub,
    /// Somebody wants to know, and named the walk so.
    Verify(u64),
}

/// What a replica holds of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Content with this CRC32C; a hole counts as zeroes.
    Content(u32),
    /// It cannot be read, or has a wrong checksum, and could not be made good.
    Damaged,
    /// Nobody knows: the map of these blocks is damaged.
    Unknown,
}

/// A block that the replicas do not hold alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which.
    pub block: u32,
    /// What each of them holds.
    pub holdings: Vec<(NodeId, Holding)>,
}

/// How a pass stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassState {
    /// It goes on.
    Running,
    /// It has seen everything.
    Complete,
    /// It has ended before that.
    Ended(EndReason),
}

/// Why a pass ended before it had seen everything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// The node has no replica of the volume.
    #[error("the node has no replica of the volume")]
    NotHere,
    /// The node cannot lead the volume now.
    #[error("{0}")]
    Refused(String),
    /// Nobody led the volume within the time that a takeover may take.
    #[error("the volume has no head, and none came within 15 s; `berth volume show` says who is in sync")]
    NoHead,
    /// Another node leads the volume now, or none.
    #[error("the node does not lead the volume any more; start it again")]
    HeadChanged,
    /// One is under way.
    #[error("the volume is being verified already")]
    UnderWay,
    /// A replica in sync does not answer.
    #[error("the replica on node number {} is in sync and does not answer", .0.0)]
    Silent(NodeId),
    /// A replica in sync is served by a version that cannot be asked.
    #[error("node number {} runs a version that cannot verify; start it with this one", .0.0)]
    TooOld(NodeId),
    /// Changes of one place are under way all the time and do not end.
    #[error("changes of blocks {0} and on do not come to an end")]
    Changing(u32),
}

/// What a pass has seen so far, or in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckReport {
    /// Of which volume.
    pub volume: VolumeNumber,
    /// Why it was walked through.
    pub purpose: Purpose,
    /// How it stands.
    pub state: PassState,
    /// Blocks of the volume.
    pub size_blocks: u64,
    /// Of these, the blocks that it has passed by, those where nothing was ever written included.
    pub passed_blocks: u64,
    /// Replicas in sync that were read.
    pub members: Vec<NodeId>,
    /// The lowest and the highest sequence at which blocks were compared.
    pub sequences: (u64, u64),
    /// Blocks read at every replica in sync and compared, holes included.
    pub compared_blocks: u64,
    /// Damaged blocks, counted at each replica, that were written again with the content of another one.
    pub repaired_blocks: u64,
    /// Blocks that are damaged at some replica and were not made good.
    pub unreadable_blocks: u64,
    /// Blocks that are sound at two replicas and differ.
    pub differing_blocks: u64,
    /// The first of the last two kinds.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    pub(super) fn new(volume: VolumeNumber, purpose: Purpose, size_blocks: u64) -> CheckReport {
        CheckReport {
            volume,
            purpose,
            state: PassState::Running,
            size_blocks,
            passed_blocks: 0,
            members: Vec::new(),
            sequences: (0, 0),
            compared_blocks: 0,
            repaired_blocks: 0,
            unreadable_blocks: 0,
            differing_blocks: 0,
            findings: Vec::new(),
        }
    }

    /// A walk that did not even begin.
    #[must_use]
    pub fn refused(volume: VolumeNumber, verify: u64, reason: EndReason) -> CheckReport {
        CheckReport {
            state: PassState::Ended(reason),
            ..CheckReport::new(volume, Purpose::Verify(verify), 0)
        }
    }

    /// Has everything been seen, and found alike and sound in the end?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.state == PassState::Complete && self.differing_blocks == 0 && self.unreadable_blocks == 0
    }

    pub(super) fn note_sequence(&mut self, sequence: u64) {
        let first = self.sequences == (0, 0);
        let (low, high) = self.sequences;
        self.sequences = if first { (sequence, sequence) } else { (low.min(sequence), high.max(sequence)) };
    }

    pub(super) fn note_members(&mut self, members: impl Iterator<Item = NodeId>) {
        self.members.extend(members);
        self.members.sort_unstable();
        self.members.dedup();
    }

    pub(super) fn note_finding(&mut self, finding: Finding) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// What all passes on a shard have done, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckCounters {
    /// Passes that have seen everything.
    pub passes: u64,
    /// As in [`CheckReport`].
    pub compared_blocks: u64,
    /// As in [`CheckReport`].
    pub repaired_blocks: u64,
    /// As in [`CheckReport`].
    pub unreadable_blocks: u64,
    /// As in [`CheckReport`].
    pub differing_blocks: u64,
    /// Comparisons that were repeated because the blocks were changed meanwhile.
    pub disturbed: u64,
}

impl CheckCounters {
    /// These and what a pass has done.
    #[must_use]
    pub(super) fn with(self, report: &CheckReport) -> CheckCounters {
        CheckCounters {
            compared_blocks: self.compared_blocks + report.compared_blocks,
            repaired_blocks: self.repaired_blocks + report.repaired_blocks,
            unreadable_blocks: self.unreadable_blocks + report.unreadable_blocks,
            differing_blocks: self.differing_blocks + report.differing_blocks,
            ..self
        }
    }
}
