//! What a shard tells about itself, for metrics and tools.

use crate::replica::check::CheckCounters;
use crate::session::nbd::Rejections;
use crate::store::lane::LaneCounters;
use hdrhistogram::Histogram;

/// Operations that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationClass {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// FLUSH.
    Flush,
    /// TRIM.
    Trim,
    /// WRITE_ZEROES.
    WriteZeroes,
    /// All others.
    Other,
}

impl OperationClass {
    /// All, with the names that metrics use.
    pub const ALL: [(OperationClass, &'static str); 6] = [
        (OperationClass::Read, "read"),
        (OperationClass::Write, "write"),
        (OperationClass::Flush, "flush"),
        (OperationClass::Trim, "trim"),
        (OperationClass::WriteZeroes, "write_zeroes"),
        (OperationClass::Other, "other"),
    ];

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// How one class of operations fared.
#[derive(Clone, Debug)]
pub struct OperationReport {
    /// Requests answered.
    pub requests: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Bytes read, written or released.
    pub bytes: u64,
    /// From the whole request received to its reply queued, in microseconds, up to one minute.
    pub latency_us: Histogram<u32>,
}

impl Default for OperationReport {
    fn default() -> OperationReport {
        let latency_us = Histogram::new_with_max(60_000_000, 2).expect("valid bounds");
        OperationReport { requests: 0, errors: 0, bytes: 0, latency_us }
    }
}

/// How one lane fares.
#[derive(Clone, Copy, Debug)]
pub struct LaneReport {
    /// Its number, counted over all pools of the process, whichever shard runs it.
    pub number: usize,
    /// What it counted.
    pub counters: LaneCounters,
    /// Leaves in memory.
    pub leaves_resident: usize,
    /// Leaves with unwritten changes.
    pub leaves_dirty: usize,
    /// Leaves that had to be loaded.
    pub leaf_misses: u64,
    /// Leaves dropped for want of room.
    pub leaf_evictions: u64,
    /// Segments ready to be written.
    pub segments_free: u32,
    /// Segments that belong to the lane.
    pub segments_owned: u32,
    /// Blocks that something refers to.
    pub live_blocks: u64,
    /// Blocks that can be alive at most.
    pub capacity_blocks: u64,
    /// Has a write or sync failed?
    pub failed: bool,
}

/// What other replicas did for a head whose own replica could not give what was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Reads answered with what another replica holds.
    pub reads_from_peers: u64,
    /// Damaged blocks that were written again here, with what another replica holds.
    pub blocks_repaired: u64,
    /// Reads that no replica in sync could answer.
    pub reads_without_good_copy: u64,
    /// Fills that were broken off because the replica's pool had no room.
    pub fills_without_room: u64,
}

/// Bytes sent to other nodes, headers and checksums included, by what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerBytes {
    /// Changes for replicas that follow.
    pub changes: u64,
    /// Copies for a replica that is filled.
    pub copies: u64,
    /// Changes out of the log, for a head that asked for them.
    pub fetched: u64,
    /// Everything else: greetings, promises, acknowledgements, leases.
    pub other: u64,
}

/// How a shard fares.
#[derive(Clone, Debug, Default)]
pub struct ShardReport {
    /// By [`OperationClass`].
    pub operations: [OperationReport; 6],
    /// The shard's lanes.
    pub lanes: Vec<LaneReport>,
    /// What sessions refused, by reason.
    pub rejections: Rejections,
    /// Connections refused because there were too many, in all or from one address.
    pub connections_refused: u64,
    /// Connections closed, when connections were short, because their clients had gone.
    pub connections_abandoned: u64,
    /// Connections that did not finish their handshake in time.
    pub handshakes_timed_out: u64,
    /// For replicated volumes.
    pub repairs: RepairReport,
    /// Volumes that lanes have taken out, because they have no replica here any more.
    pub volumes_removed: u64,
    /// Volumes that could not be taken out, because a leaf of their map cannot be read, or their lane failed.
    pub removals_failed: u64,
    /// The same: what comparing replicas has found.
    pub checks: CheckCounters,
    /// Connections closed because others waited for memory that they held and their clients did nothing about.
    pub connections_put_out: u64,
    /// Receive buffers that connections keep now although they cannot go on.
    pub receive_buffers_kept: u32,
    /// Received bytes that wait in memory of their own now, because their connections cannot go on.
    pub parked_bytes: u64,
    /// How often received bytes were moved there.
    pub inputs_parked: u64,
    /// Connections open now.
    pub connections: u32,
    /// Sent to other nodes; nothing outside of a cluster.
    pub peer_bytes_sent: PeerBytes,
    /// Requests being worked on now.
    pub requests_under_way: u32,
    /// Memory pages free now, and in all.
    pub pages_free: u32,
    /// See above.
    pub pages: u32,
}
