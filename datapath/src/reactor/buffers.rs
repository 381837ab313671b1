//! Receive buffers: which are free, and who chooses the one for a receive.
//!
//! With a buffer ring the kernel chooses when there is data, so that idle connections hold no buffer. Without
//! one the reactor waits for data first and chooses then, which costs a second submission per receive.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::features::Feature;
use super::memory::Mapping;
use super::ring::Ring;
use crate::engine::ports::ReceiveBuffer;

/// The one group of buffers.
pub(super) const BUFFER_GROUP: u16 = 0;

/// The receive buffers of one reactor.
#[derive(Debug)]
pub(super) struct ReceiveBuffers {
    /// Lent to the engine. Returning one that is not lent would hand it to two owners.
    lent: Vec<bool>,
    lent_count: usize,
    supply: Supply,
}

#[derive(Debug)]
enum Supply {
    Kernel(BufferRing),
    Reactor { free: Vec<u16> },
}

impl ReceiveBuffers {
    /// Offers all buffers of the mapping, through a buffer ring if there can be one.
    pub(super) fn new(ring: &mut Ring, mapping: &Arc<Mapping>) -> io::Result<ReceiveBuffers> {
        let count = mapping.layout().receive_buffers;
        let lent = vec![false; usize::from(count)];
        if ring.features().has(Feature::BufferRing) {
            if let Some(supply) = BufferRing::new(ring, mapping)? {
                return Ok(ReceiveBuffers { lent, lent_count: 0, supply: Supply::Kernel(supply) });
            }
            ring.lacks(Feature::BufferRing);
        }
        // The buffer used last is chosen first: it is the one in the processor's caches.
        Ok(ReceiveBuffers {
            lent,
            lent_count: 0,
            supply: Supply::Reactor { free: (0..count).rev().collect() },
        })
    }

    /// Does the kernel choose?
    pub(super) fn kernel_chooses(&self) -> bool {
        matches!(self.supply, Supply::Kernel(_))
    }

    /// Is there one? Where the kernel chooses, one that it has taken without having said so counts as free.
    pub(super) fn any_free(&self) -> bool {
        match &self.supply {
            Supply::Kernel(_) => self.lent_count < self.lent.len(),
            Supply::Reactor { free } => !free.is_empty(),
        }
    }

    /// Chooses a free buffer, where the kernel does not.
    pub(super) fn choose(&mut self) -> ReceiveBuffer {
        match &mut self.supply {
            Supply::Kernel(_) => panic!("the kernel chooses"),
            Supply::Reactor { free } => ReceiveBuffer(free.pop().expect("a free buffer: ask any_free first")),
        }
    }

    /// The buffer goes to the engine, or is on its way there.
    pub(super) fn lend(&mut self, buffer: ReceiveBuffer) {
        let lent = &mut self.lent[usize::from(buffer.0)];
        assert!(!*lent, "{buffer:?} has two owners");
        *lent = true;
        self.lent_count += 1;
    }

    /// The engine gives a buffer back.
    pub(super) fn recycle(&mut self, buffer: ReceiveBuffer) {
        let lent = self.lent.get_mut(usize::from(buffer.0)).expect("a buffer of this reactor");
        assert!(*lent, "{buffer:?} is returned twice");
        *lent = false;
        self.lent_count -= 1;
        self.offer(buffer);
    }

    /// A chosen buffer was not filled.
    pub(super) fn put_back(&mut self, buffer: ReceiveBuffer) {
        assert!(!self.lent[usize::from(buffer.0)], "{buffer:?} is with the engine");
        self.offer(buffer);
    }

    fn offer(&mut self, buffer: ReceiveBuffer) {
        match &mut self.supply {
            Supply::Kernel(ring) => ring.offer(buffer),
            Supply::Reactor { free } => free.push(buffer.0),
        }
    }
}

/// Memory shared with the kernel: a ring of (address, length, buffer number), which the kernel takes from the
/// front and the reactor fills at the tail.
#[derive(Debug)]
struct BufferRing {
    entries: NonNull<BufRingEntry>,
    count: u16,
    tail: u16,
    mapping: Arc<Mapping>,
}

// SAFETY: the ring's memory is this value's own; the kernel's side of it is bound to no thread.
unsafe impl Send for BufferRing {}

impl BufferRing {
    /// None if the kernel has no buffer rings.
    fn new(ring: &mut Ring, mapping: &Arc<Mapping>) -> io::Result<Option<BufferRing>> {
        let count = mapping.layout().receive_buffers;
        let length = Self::length(count);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping without a wished-for address touches no memory in use.
        let memory = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?;
        let mut buffers = BufferRing { entries: memory.cast(), count, tail: 0, mapping: Arc::clone(mapping) };
        // SAFETY: the mapping is page aligned, long enough, and unmapped only when this value is dropped, which
        // the reactor does after it has closed the ring.
        let registered = unsafe {
            ring.register_buffer_ring(memory.as_ptr().expose_provenance() as u64, count, BUFFER_GROUP)
        };
        match registered {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        for number in 0..count {
            buffers.offer(ReceiveBuffer(number));
        }
        Ok(Some(buffers))
    }

    fn length(count: u16) -> NonZeroUsize {
        NonZeroUsize::new(usize::from(count) * size_of::<BufRingEntry>()).expect("a receive buffer")
    }

    fn offer(&mut self, buffer: ReceiveBuffer) {
        let range = self.mapping.receive_buffer(buffer);
        let place = usize::from(self.tail & (self.count - 1));
        // SAFETY: the place is below the count, so within the mapping. The kernel does not read an entry before
        // the tail has passed it, and it has taken the entry that was here before: there are as many places as
        // buffers, and this buffer is not in the ring.
        let entry = unsafe { &mut *self.entries.as_ptr().add(place) };
        entry.set_addr(self.mapping.pointer(range).expose_provenance() as u64);
        entry.set_len(range.len);
        entry.set_bid(buffer.0);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies in the first entry, is 2-byte aligned and lives as long as the mapping; only
        // this reactor writes it, and every access to it is atomic.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries.as_ptr()).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        let memory: NonNull<c_void> = self.entries.cast();
        // SAFETY: the mapping is this value's own, and the ring that knew it is closed.
        if let Err(error) = unsafe { munmap(memory, Self::length(self.count).get()) } {
            panic!("cannot unmap the buffer ring: {error}");
        }
    }
}
