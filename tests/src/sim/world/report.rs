//! What a seed did, and what is asked of each.

use crate::sim::client::ClientCounts;
use crate::sim::subject::SubjectCounts;

/// What a seed is to come to.
pub const QUOTA: Tally = Tally { requests: 2_000, recoveries: 5, checkpoints: 1, cleaned_segments: 1 };

/// What is asked of every seed, or what one came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Requests answered.
    pub requests: u64,
    /// Starts after a kill or a power cut.
    pub recoveries: u64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Segments that the cleaner has emptied.
    pub cleaned_segments: u64,
}

impl Tally {
    /// Is it as much as `quota` of everything?
    #[must_use]
    pub fn reaches(&self, quota: &Tally) -> bool {
        self.least(quota) == *quota
    }

    /// The smaller number of each.
    #[must_use]
    pub fn least(&self, other: &Tally) -> Tally {
        Tally {
            requests: self.requests.min(other.requests),
            recoveries: self.recoveries.min(other.recoveries),
            checkpoints: self.checkpoints.min(other.checkpoints),
            cleaned_segments: self.cleaned_segments.min(other.cleaned_segments),
        }
    }
}

/// What a seed did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// What clients did.
    pub clients: ClientCounts,
    /// Engines started.
    pub lives: u64,
    /// Power cuts.
    pub power_cuts: u64,
    /// Kills.
    pub kills: u64,
    /// Orderly stops.
    pub drains: u64,
    /// Starts after a kill or a power cut.
    pub recoveries: u64,
    /// What each of several seeds came to, at least.
    pub least: Option<Tally>,
    /// Crashes before the engine had answered a request.
    pub early_crashes: u64,
    /// Damaged images that were refused.
    pub refusals: u64,
    /// Errors that the disk reported.
    pub disk_errors: u64,
    /// Bits flipped.
    pub flipped_bits: u64,
    /// Bytes written to the disk.
    pub disk_written_bytes: u64,
    /// Turns of the engines.
    pub turns: u64,
    /// Threads of all lives together.
    pub threads: u64,
    /// Connections that moved from one thread to another.
    pub moves: u64,
    /// Virtual time.
    pub virtual_ns: u64,
    /// What the subject did.
    pub subject: SubjectCounts,
    /// Two runs of a seed must have the same one.
    pub digest: u64,
}

impl Report {
    /// Of what the seed did, what is asked of it.
    #[must_use]
    pub fn tally(&self) -> Tally {
        Tally {
            requests: self.clients.answers,
            recoveries: self.recoveries,
            checkpoints: self.subject.checkpoints,
            cleaned_segments: self.subject.cleaned_segments,
        }
    }

    /// Adds another seed's numbers.
    pub fn add(&mut self, other: &Report) {
        self.clients.requests += other.clients.requests;
        self.clients.answers += other.clients.answers;
        self.clients.errors += other.clients.errors;
        self.clients.written_bytes += other.clients.written_bytes;
        self.clients.read_bytes += other.clients.read_bytes;
        self.lives += other.lives;
        self.power_cuts += other.power_cuts;
        self.kills += other.kills;
        self.drains += other.drains;
        self.recoveries += other.recoveries;
        let of_other = other.least.unwrap_or_else(|| other.tally());
        self.least = Some(self.least.map_or(of_other, |least| least.least(&of_other)));
        self.early_crashes += other.early_crashes;
        self.refusals += other.refusals;
        self.disk_errors += other.disk_errors;
        self.flipped_bits += other.flipped_bits;
        self.disk_written_bytes += other.disk_written_bytes;
        self.turns += other.turns;
        self.threads += other.threads;
        self.moves += other.moves;
        self.virtual_ns += other.virtual_ns;
        self.subject.add(&other.subject);
        self.digest ^= other.digest;
    }
}

impl SubjectCounts {
    pub(super) fn add(&mut self, other: &SubjectCounts) {
        self.checkpoints += other.checkpoints;
        self.lost_blocks += other.lost_blocks;
        self.cleaned_segments += other.cleaned_segments;
        self.batches += other.batches;
        self.inputs_parked += other.inputs_parked;
        self.connections_put_out += other.connections_put_out;
    }
}
