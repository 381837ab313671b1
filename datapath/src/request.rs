//! What a client asks of a volume, in words that belong to no protocol.

use std::fmt;

/// One request, already checked against the volume's size and against what the session offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's own name for the request, echoed in its replies.
    pub cookie: u64,
    /// What to do.
    pub operation: Operation,
    /// First byte of the volume that is concerned.
    pub offset_bytes: u64,
    /// Number of bytes concerned; zero is legal for every operation.
    pub length_bytes: u64,
}

/// What a request does. Flags that a session accepts and that change nothing are gone by here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Return the bytes.
    Read {
        /// The reply must be one piece, holes included.
        one_piece: bool,
    },
    /// Store the bytes that follow the request.
    Write {
        /// Reply only when they are on stable media.
        durable: bool,
    },
    /// Reply when all that was answered before is on stable media.
    Flush,
    /// The bytes are no longer needed; Berth lets them read as zeroes.
    Trim {
        /// Reply only when this is on stable media.
        durable: bool,
    },
    /// The bytes read as zeroes from now on.
    WriteZeroes {
        /// Reply only when this is on stable media.
        durable: bool,
        /// Keep space allocated, so that a later write cannot find the pool full.
        provisioned: bool,
        /// Refuse at once rather than work as long as a write would.
        only_if_fast: bool,
    },
    /// The bytes will be read soon.
    Cache,
    /// Describe which parts hold data and which are holes.
    BlockStatus {
        /// Answer with exactly one extent.
        one_extent: bool,
    },
}

impl Operation {
    /// Does the operation change what the volume holds?
    #[must_use]
    pub fn is_change(self) -> bool {
        matches!(self, Operation::Write { .. } | Operation::Trim { .. } | Operation::WriteZeroes { .. })
    }
}

/// Why a request failed. Sessions translate this to their protocol's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The volume or the connection does not allow changes.
    NotPermitted,
    /// The data cannot be read or stored.
    Io,
    /// There is no memory for a request of this size now.
    NoMemory,
    /// The request makes no sense.
    Invalid,
    /// The range leaves the volume, or live data leaves no space in the pool.
    NoSpace,
    /// The answer would not fit in one piece.
    TooLarge,
    /// The server does not do this, or not fast.
    NotSupported,
    /// The server is stopping, or another head has taken the volume.
    ShuttingDown,
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RequestError::NotPermitted => "the volume is read-only",
            RequestError::Io => "the data cannot be read or stored",
            RequestError::NoMemory => "no memory for the request",
            RequestError::Invalid => "invalid request",
            RequestError::NoSpace => "no space",
            RequestError::TooLarge => "the answer does not fit in one piece",
            RequestError::NotSupported => "not supported",
            RequestError::ShuttingDown => "shutting down",
        })
    }
}

/// One piece of the answer to [`Operation::BlockStatus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub length_bytes: u64,
    /// Nothing is stored here: it reads as zeroes, and writing it needs new space.
    pub hole: bool,
}

/// A number that stands for an exported volume within one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExportIndex(pub u32);

/// What a session tells its client about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// How requests will name it.
    pub index: ExportIndex,
    /// The name under which it is offered.
    pub name: String,
    /// One line for people; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Refuse every change.
    pub read_only: bool,
    /// Why it cannot be chosen here now, if it cannot.
    pub refusal: Option<String>,
}

/// The volumes that a session may offer.
pub trait Exports {
    /// The volume of this name. The empty name asks for the default volume, if there is one.
    fn find(&self, name: &str) -> Option<&Export>;
    /// The volume number `position` in the order of names, for listings.
    fn nth(&self, position: usize) -> Option<&Export>;
}
