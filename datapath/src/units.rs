//! The numbers of the domain as types, so that an index, a count and a size cannot be confused.

use std::fmt;

/// Bytes in a block: the unit of mapping, checksumming and device I/O.
pub const BLOCK_BYTES: u32 = 4096;
/// [`BLOCK_BYTES`] for address arithmetic.
pub const BLOCK_BYTES_U64: u64 = BLOCK_BYTES as u64;
/// [`BLOCK_BYTES`] for slices.
pub const BLOCK_BYTES_USIZE: usize = BLOCK_BYTES as usize;

/// A point on the driver's monotonic clock, in nanoseconds. Only differences mean anything.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub u64);

impl Moment {
    /// The moment `nanoseconds` later, or the end of time.
    #[must_use]
    pub fn after_ns(self, nanoseconds: u64) -> Moment {
        Moment(self.0.saturating_add(nanoseconds))
    }

    /// The moment `milliseconds` later.
    #[must_use]
    pub fn after_ms(self, milliseconds: u64) -> Moment {
        self.after_ns(milliseconds.saturating_mul(1_000_000))
    }

    /// Nanoseconds since `earlier`; zero if that lies in the future.
    #[must_use]
    pub fn since_ns(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}s", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

/// A range of bytes in a shard's memory. Machines name buffers this way and never by pointer.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryRange {
    /// First byte, counted from the start of the shard's memory.
    pub start: u32,
    /// Length in bytes.
    pub len: u32,
}

impl MemoryRange {
    /// The part that begins `offset` bytes in and is `len` bytes long.
    ///
    /// # Panics
    /// If that part does not lie within the range.
    #[must_use]
    pub fn part(self, offset: u32, len: u32) -> MemoryRange {
        assert!(offset <= self.len && len <= self.len - offset, "{offset}+{len} leaves {self:?}");
        MemoryRange { start: self.start + offset, len }
    }

    /// The first byte past the range.
    #[must_use]
    pub fn end(self) -> u32 {
        self.start + self.len
    }
}

impl fmt::Debug for MemoryRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory[{}..+{}]", self.start, self.len)
    }
}
