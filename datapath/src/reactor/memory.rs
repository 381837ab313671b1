//! The arena: all memory of a shard that the kernel reads from and writes to, as one mapping.
//!
//! ```text
//!   0                                   engine_range().start                      len_bytes()
//!   ├── receive buffer 0 ─┬─ … ─┬─ n-1 ─┼────────────── the engine's ────────────────────┤
//! ```
//!
//! The arena keeps a raw pointer and makes a slice only of the range that is asked for: while the kernel fills
//! one range, no reference covers it, provided that the engine keeps to the contract of the ports (a buffer
//! named in an effect belongs to the driver until the effect has ended).

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::engine::ports::{Memory, ReceiveBuffer};
use crate::units::{BLOCK_BYTES, MemoryRange};

/// Alignment of the mapping's parts: a page on every machine that matters, and a block.
const PART_ALIGNMENT_BYTES: u32 = BLOCK_BYTES;
/// The kernel takes at most this much in one registered buffer.
pub(super) const REGISTERED_BYTES_MAX: u32 = 1 << 30;

/// How an arena is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    /// Receive buffers: a power of two, as the kernel's buffer rings demand, and at most 32768.
    pub receive_buffers: u16,
    /// Bytes of each; a multiple of 4096.
    pub receive_buffer_bytes: u32,
    /// Bytes for the engine; a multiple of 4096.
    pub engine_bytes: u32,
}

impl Default for ArenaLayout {
    /// 128 KiB take a client's burst of 32 writes of 4 KiB in one receive.
    fn default() -> Self {
        ArenaLayout { receive_buffers: 64, receive_buffer_bytes: 128 << 10, engine_bytes: 64 << 20 }
    }
}

impl ArenaLayout {
    fn receive_bytes(self) -> u32 {
        u32::from(self.receive_buffers)
            .checked_mul(self.receive_buffer_bytes)
            .expect("receive buffers below 4 GiB")
    }

    fn checked_bytes(self) -> u32 {
        assert!(self.receive_buffers.is_power_of_two() && self.receive_buffers <= 1 << 15);
        assert!(
            self.receive_buffer_bytes > 0 && self.receive_buffer_bytes.is_multiple_of(PART_ALIGNMENT_BYTES)
        );
        assert!(self.engine_bytes.is_multiple_of(PART_ALIGNMENT_BYTES));
        self.receive_bytes().checked_add(self.engine_bytes).expect("an arena below 4 GiB")
    }
}

/// The mapping itself. The engine's [`Arena`] and the reactor share it: whatever the engine does with its half,
/// memory that the kernel may still touch stays mapped until the reactor lets go as well.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<c_void>,
    len_bytes: u32,
    layout: ArenaLayout,
}

// SAFETY: the mapping hands out addresses only. Who may use them when is what `Arena` and the reactor keep to.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing in it changes after it was made.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(layout: ArenaLayout) -> io::Result<Mapping> {
        let len_bytes = layout.checked_bytes();
        let length = NonZeroUsize::new(len_bytes as usize).expect("at least one receive buffer");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping without a wished-for address touches no memory in use.
        let base = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?;
        let mapping = Mapping { base, len_bytes, layout };
        // SAFETY: the range is the mapping made above. Advice: a refusal costs speed only.
        let _ = unsafe { madvise(base, length.get(), MmapAdvise::MADV_HUGEPAGE) };
        // A forked child must not turn the pages that the kernel has pinned into copies.
        // SAFETY: as above.
        unsafe { madvise(base, length.get(), MmapAdvise::MADV_DONTFORK) }?;
        Ok(mapping)
    }

    /// How the mapping is divided.
    pub(super) fn len_bytes(&self) -> u32 {
        self.len_bytes
    }

    pub(super) fn layout(&self) -> ArenaLayout {
        self.layout
    }

    /// The whole of one receive buffer.
    pub(super) fn receive_buffer(&self, buffer: ReceiveBuffer) -> MemoryRange {
        assert!(buffer.0 < self.layout.receive_buffers, "no such receive buffer: {buffer:?}");
        let len = self.layout.receive_buffer_bytes;
        MemoryRange { start: u32::from(buffer.0) * len, len }
    }

    /// The address of a range, for the kernel.
    pub(super) fn pointer(&self, range: MemoryRange) -> *mut u8 {
        assert!(
            range.start <= self.len_bytes && range.len <= self.len_bytes - range.start,
            "{range:?} leaves the arena of {} bytes",
            self.len_bytes
        );
        // SAFETY: the range was just found to lie within the mapping.
        unsafe { self.base.as_ptr().cast::<u8>().add(range.start as usize) }
    }

    /// The mapping in parts that the kernel accepts as registered buffers.
    pub(super) fn registrable_parts(&self) -> Vec<libc::iovec> {
        (0..self.len_bytes.div_ceil(REGISTERED_BYTES_MAX))
            .map(|index| {
                let start = index * REGISTERED_BYTES_MAX;
                let len = REGISTERED_BYTES_MAX.min(self.len_bytes - start);
                let base = self.pointer(MemoryRange { start, len });
                libc::iovec { iov_base: base.cast(), iov_len: len as usize }
            })
            .collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody is left who knows an address: the arena is gone, and the reactor gives up its share
        // only after the last completion of its ring was reaped (or never).
        if let Err(error) = unsafe { munmap(self.base, self.len_bytes as usize) } {
            panic!("cannot unmap the arena: {error}");
        }
    }
}

/// Which of [`Mapping::registrable_parts`] holds the range; none if it crosses a border.
pub(super) fn registered_index(range: MemoryRange) -> Option<u16> {
    let index = range.start / REGISTERED_BYTES_MAX;
    let last = range.end().saturating_sub(1) / REGISTERED_BYTES_MAX;
    (index == last).then(|| u16::try_from(index).expect("four parts at most"))
}

/// A shard's memory: page aligned, zeroed, in huge pages where the kernel has them.
#[derive(Debug)]
pub struct Arena {
    mapping: Arc<Mapping>,
}

impl Arena {
    /// Maps the memory.
    ///
    /// # Errors
    /// If the kernel has not that much address space for the process.
    ///
    /// # Panics
    /// If the layout breaks its own rules.
    pub fn new(layout: ArenaLayout) -> io::Result<Arena> {
        Ok(Arena { mapping: Arc::new(Mapping::new(layout)?) })
    }

    /// The part that is the engine's to use.
    #[must_use]
    pub fn engine_range(&self) -> MemoryRange {
        let start = self.mapping.layout.receive_bytes();
        MemoryRange { start, len: self.mapping.len_bytes - start }
    }

    /// The reactor's share.
    pub(super) fn mapping(&self) -> Arc<Mapping> {
        Arc::clone(&self.mapping)
    }
}

impl Memory for Arena {
    fn len_bytes(&self) -> u32 {
        self.mapping.len_bytes
    }

    fn bytes(&self, range: MemoryRange) -> &[u8] {
        // SAFETY: `pointer` checked the bounds, the mapping is initialized (zeroes) and lives as long as `self`.
        // Writers are the kernel, in ranges that the engine does not ask for before their event, and
        // `bytes_mut`, which needs the arena exclusively.
        unsafe { std::slice::from_raw_parts(self.mapping.pointer(range), range.len as usize) }
    }

    fn bytes_mut(&mut self, range: MemoryRange) -> &mut [u8] {
        // SAFETY: as for `bytes`, and the exclusive borrow of the arena rules out every other slice.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.pointer(range), range.len as usize) }
    }

    fn copy(&mut self, from: MemoryRange, to: MemoryRange) {
        assert_eq!(from.len, to.len, "copy between different lengths");
        let (source, target) = (self.mapping.pointer(from), self.mapping.pointer(to));
        assert!(from.end() <= to.start || to.end() <= from.start, "{from:?} and {to:?} overlap");
        // SAFETY: both ranges lie in the mapping and were just found not to overlap.
        unsafe { std::ptr::copy_nonoverlapping(source, target, from.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::{Arena, ArenaLayout, REGISTERED_BYTES_MAX, registered_index};
    use crate::engine::ports::{Memory, ReceiveBuffer};
    use crate::units::MemoryRange;

    fn arena() -> Arena {
        let layout = ArenaLayout { receive_buffers: 4, receive_buffer_bytes: 8192, engine_bytes: 16384 };
        Arena::new(layout).expect("memory for a small arena")
    }

    #[test]
    fn parts_tile_the_mapping() {
        let arena = arena();
        assert_eq!(arena.mapping.receive_buffer(ReceiveBuffer(3)), MemoryRange { start: 24576, len: 8192 });
        assert_eq!(arena.engine_range(), MemoryRange { start: 32768, len: 16384 });
        assert_eq!(arena.engine_range().end(), arena.len_bytes());
        assert!((arena.mapping.pointer(arena.engine_range()) as usize).is_multiple_of(4096));
        assert!(arena.bytes(MemoryRange { start: 0, len: arena.len_bytes() }).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn copies_what_was_written() {
        let mut arena = arena();
        let (from, to) = (MemoryRange { start: 100, len: 5 }, MemoryRange { start: 40000, len: 5 });
        arena.bytes_mut(from).copy_from_slice(b"berth");
        arena.copy(from, to);
        assert_eq!(arena.bytes(to), b"berth");
    }

    #[test]
    #[should_panic(expected = "leaves the arena")]
    fn refuses_a_range_past_the_end() {
        let arena = arena();
        let _ = arena.bytes(MemoryRange { start: arena.len_bytes() - 1, len: 2 });
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn refuses_to_copy_onto_itself() {
        arena().copy(MemoryRange { start: 0, len: 10 }, MemoryRange { start: 9, len: 10 });
    }

    #[test]
    fn a_range_across_two_registered_parts_has_no_index() {
        assert_eq!(registered_index(MemoryRange { start: REGISTERED_BYTES_MAX - 1, len: 1 }), Some(0));
        assert_eq!(registered_index(MemoryRange { start: REGISTERED_BYTES_MAX, len: 1 }), Some(1));
        assert_eq!(registered_index(MemoryRange { start: REGISTERED_BYTES_MAX - 1, len: 2 }), None);
    }
}
