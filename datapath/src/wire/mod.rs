//! Floor 1: byte layouts of the protocols. Pure encoders and decoders: no state, no clock, no socket.
//!
//! Decoders of fixed-size headers take arrays, so that a length cannot be wrong; the others check every length
//! against the bytes that are really there. Both ends of each message are here: the server's half serves
//! sessions, the client's half the simulator, the load generator and the tests.

use thiserror::Error;

pub mod fields;
pub mod nbd_handshake;
pub mod nbd_transmission;
pub mod peer_message;
#[cfg(test)]
pub(crate) mod random;

/// Why bytes are not the message that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// The magic number is wrong: the stream is out of step or speaks another protocol.
    #[error("wrong magic number")]
    Magic,
    /// A field reaches past the end of its message.
    #[error("a field reaches past the end of its message")]
    Truncated,
    /// Bytes are left over behind the last field.
    #[error("bytes are left over behind the last field")]
    Trailing,
    /// A checksum is wrong: the message was damaged on its way.
    #[error("a checksum is wrong")]
    Checksum,
    /// A string is longer than the protocol allows.
    #[error("a string is longer than the protocol allows")]
    StringLength,
    /// A string is not UTF-8, or contains NUL.
    #[error("a string is not UTF-8 without NUL")]
    StringContent,
    /// A number is outside what its field may hold.
    #[error("a number is outside what its field may hold")]
    Range,
    /// The message is of a kind that the receiver does not know and may not skip.
    #[error("a message of unknown kind")]
    Kind,
}
