//! Every limit of the data path in one place, with the relations between them asserted at build time.

use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// Longest payload of one request that is accepted; NBD names 32 MiB as what clients may rely on.
pub const REQUEST_PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest part of a request that is worked on at once. A longer one is done part by part.
pub const PIECE_BYTES_MAX: u32 = 1 << 20;
/// [`PIECE_BYTES_MAX`] in blocks.
pub const PIECE_BLOCKS_MAX: u32 = PIECE_BYTES_MAX / BLOCK_BYTES;
/// Payloads of this length and more are received straight into the memory that will be written to disk.
pub const EXACT_RECEIVE_BYTES_MIN: u32 = 16 << 10;

/// A client that has not chosen an export after this time is disconnected.
pub const HANDSHAKE_DEADLINE_MS: u64 = 10_000;
/// Options that one client may send during its handshake.
pub const HANDSHAKE_OPTIONS_MAX: u32 = 64;
/// Longest option that is parsed. A longer one, up to [`OPTION_SKIP_BYTES_MAX`], is skipped and refused.
pub const OPTION_BYTES_MAX: u32 = 8 << 10;
/// An option that claims to be longer than this ends the connection.
pub const OPTION_SKIP_BYTES_MAX: u32 = 64 << 10;
/// Longest string in the NBD protocol (names, queries).
pub const NBD_STRING_BYTES_MAX: usize = 4096;
/// Payload of a refused NBD write that is read and dropped to stay in step; a longer one ends the connection.
pub const NBD_PAYLOAD_SKIP_BYTES_MAX: u32 = 64 << 20;
/// Longest NBD read that is answered in one chunk on demand; clients may rely on 64 KiB.
pub const NBD_UNFRAGMENTED_BYTES_MAX: u32 = PIECE_BYTES_MAX;
/// A session that has produced this many bytes of answers by itself stops parsing until they are sent.
pub const SESSION_OUTPUT_BYTES: usize = 16 << 10;
/// Extents in one BLOCK_STATUS reply.
pub const STATUS_EXTENTS_MAX: usize = 256;
/// Longest volume name, in bytes.
pub const VOLUME_NAME_BYTES_MAX: usize = 63;

/// Connections of one shard.
pub const CONNECTIONS_MAX: u32 = 1024;
/// Connections from one address that are still in their handshake.
pub const HANDSHAKES_PER_ADDRESS_MAX: u32 = 64;
/// The same for all local processes together, which have no address to tell them apart.
pub const HANDSHAKES_UNIX_MAX: u32 = 512;
/// A handshake younger than this does not give way to newcomers: a client at work is through by then.
pub const HANDSHAKE_GRACE_MS: u64 = 250;
/// Requests of one connection that are being worked on; the next one is not read until one is answered.
pub const REQUESTS_PER_CONNECTION_MAX: u32 = 256;
/// Payload bytes of one connection that are being worked on.
pub const BYTES_PER_CONNECTION_MAX: u32 = 16 << 20;
/// Requests of one volume that are being worked on, over all its connections.
pub const REQUESTS_PER_VOLUME_MAX: u32 = 2048;
/// A client that others wait for has this long to take one send, or to finish one piece of a payload that it began.
pub const CLIENT_PATIENCE_MS: u64 = 3_000;
/// Receive buffers that all connections together keep while they cannot go on. The bytes of further ones are copied out
/// of the buffer, which goes back to the driver: it has far fewer buffers than there are connections.
pub const STALLED_BUFFERS_MAX: u32 = 8;
/// Pieces of memory in one send.
pub const SEND_PIECES_MAX: usize = 128;
/// A send takes no further piece once it has so many bytes: its end shows that the client reads.
pub const SEND_BYTES_ENOUGH: u32 = 512 << 10;
/// Requests parsed from one connection before the next connection has its turn.
pub const REQUESTS_PER_TURN_MAX: u32 = 64;

/// Blocks that one head has granted at most in a member's pool, so that its changes need not wait for room: 4 MiB on
/// their way, whatever the distance.
pub const ROOM_BLOCKS_MAX: u32 = 1024;

/// Largest size of a volume: its blocks are counted in 32 bits.
pub const VOLUME_BYTES_MAX: u64 = (1 << 32) * BLOCK_BYTES_U64;
/// Largest size of a pool: its blocks are counted in 32 bits too.
pub const POOL_BYTES_MAX: u64 = ((1 << 32) - 1) * BLOCK_BYTES_U64;

const _: () = {
    assert!(PIECE_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
    assert!(EXACT_RECEIVE_BYTES_MIN <= PIECE_BYTES_MAX);
    assert!(HANDSHAKE_GRACE_MS < HANDSHAKE_DEADLINE_MS);
    assert!(HANDSHAKES_PER_ADDRESS_MAX <= HANDSHAKES_UNIX_MAX && HANDSHAKES_UNIX_MAX < CONNECTIONS_MAX);
    assert!(PIECE_BYTES_MAX <= BYTES_PER_CONNECTION_MAX);
    assert!(REQUESTS_PER_CONNECTION_MAX <= REQUESTS_PER_VOLUME_MAX);
    // An option must hold the longest name or query, with room for the fields around it.
    assert!(OPTION_BYTES_MAX as usize >= NBD_STRING_BYTES_MAX + 64);
    assert!(OPTION_SKIP_BYTES_MAX >= OPTION_BYTES_MAX);
    assert!(NBD_PAYLOAD_SKIP_BYTES_MAX >= REQUEST_PAYLOAD_BYTES_MAX);
    assert!(
        NBD_UNFRAGMENTED_BYTES_MAX >= 64 << 10 && NBD_UNFRAGMENTED_BYTES_MAX <= REQUEST_PAYLOAD_BYTES_MAX
    );
    assert!(ROOM_BLOCKS_MAX >= PIECE_BLOCKS_MAX);
    assert!(VOLUME_NAME_BYTES_MAX <= NBD_STRING_BYTES_MAX);
};
