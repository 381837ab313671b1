//! Limits of the control plane's messages, with the relations between them asserted at build time.

use std::time::Duration;

/// Longest request that the service reads, in bytes. What comes must be one record at most.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Longest answer that a client reads, in bytes.
pub const REPLY_BYTES_MAX: usize = 8 << 20;
/// Replicas of a volume, in sync or not.
pub const REPLICAS_MAX: usize = 64;
/// Ends of epochs that a record keeps. They are pruned when the oldest stale replica has caught up.
pub const EPOCH_ENDS_MAX: usize = 1024;
/// Bytes of `HOST:PORT`: the longest host name has 253.
pub const ADDRESS_BYTES_MAX: usize = 260;
/// Bytes of all keys and values of a node's labels.
pub const LABELS_BYTES_MAX: usize = 256;
/// Nodes of a cluster: a list of all of them fits into one message.
pub const NODES_MAX: usize = 4096;
/// Volumes of a cluster: ctl keeps all records in memory.
pub const VOLUMES_MAX: usize = 100_000;
/// Records in one page of a list.
pub const PAGE_RECORDS_MAX: usize = 64;

/// Whoever waits for a volume to be verified gives up when nothing is heard of it for so long.
pub const VERIFY_SILENCE_MAX: Duration = Duration::from_secs(30);
/// A call that has no answer by then has none.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for the connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that is silent for this long is asked whether it is still there ...
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// ... and given up when it has not answered for this long.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Most bytes of a record on the wire: its lists, of numbers with 10 bytes at most, and a kilobyte for the rest.
const RECORD_BYTES_MAX: usize = REPLICAS_MAX * 34 + EPOCH_ENDS_MAX * 20 + 1024;

/// The same for what is told of the passes over its volume, without the blocks that they found.
const PASSES_BYTES_MAX: usize = REPLICAS_MAX * 10 + 1024;

const _: () = {
    assert!(RECORD_BYTES_MAX <= REQUEST_BYTES_MAX);
    assert!(PAGE_RECORDS_MAX * (RECORD_BYTES_MAX + PASSES_BYTES_MAX) <= REPLY_BYTES_MAX);
    assert!(NODES_MAX * (2 * ADDRESS_BYTES_MAX + 3 * LABELS_BYTES_MAX + 512) <= REPLY_BYTES_MAX);
};
