//! A queue of bytes, and the big-endian numbers of the NBD protocol.

use crate::to_usize;

/// Bytes that are appended at one end and taken at the other.
#[derive(Default)]
pub struct ByteQueue {
    bytes: Vec<u8>,
    taken: usize,
}

impl std::fmt::Debug for ByteQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = &self.peek()[..self.len().min(32)];
        write!(f, "{} bytes: {head:02x?}", self.len())
    }
}

impl ByteQueue {
    /// Bytes waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() - self.taken
    }

    /// Is nothing waiting?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes waiting, first come first.
    #[must_use]
    pub fn peek(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        // Compacting only when most of the vector is dead keeps the cost per byte constant.
        if self.taken > 4096 && self.taken * 2 > self.bytes.len() {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Forgets the first `count` bytes.
    pub fn skip(&mut self, count: usize) {
        assert!(count <= self.len(), "{count} of {} bytes", self.len());
        self.taken += count;
        if self.is_empty() {
            self.bytes.clear();
            self.taken = 0;
        }
    }

    /// Drops all but the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        self.bytes.truncate(self.taken + count);
    }
}

/// Reads fields from the front of a slice; `None` once it is too short.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    /// A number of `N` bytes, most significant first.
    fn number<const N: usize>(&mut self) -> Option<u64> {
        Some(self.bytes(N)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// A 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.number::<2>().and_then(|value| u16::try_from(value).ok())
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.number::<4>().and_then(|value| u32::try_from(value).ok())
    }

    /// A 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.number::<8>()
    }

    /// A 32-bit length, as an index.
    pub fn length(&mut self) -> Option<usize> {
        self.u32().map(|value| to_usize(u64::from(value)))
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteQueue, Fields};

    #[test]
    fn bytes_leave_in_the_order_they_came() {
        let mut queue = ByteQueue::default();
        let (mut pushed, mut taken) = (0_u8, 0_u8);
        for round in 0..5_000_usize {
            for _ in 0..round % 7 {
                queue.push(&[pushed]);
                pushed = pushed.wrapping_add(1);
            }
            let count = queue.len().min(round % 6);
            for byte in &queue.peek()[..count] {
                assert_eq!(*byte, taken);
                taken = taken.wrapping_add(1);
            }
            queue.skip(count);
        }
        queue.truncate(1);
        assert_eq!(queue.peek(), [taken]);
    }

    #[test]
    fn fields_are_big_endian_and_end_in_none() {
        let mut fields = Fields(&[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((fields.u16(), fields.u32(), fields.u16()), (Some(0x0102), Some(0x0304_0506), None));
        assert_eq!(fields.bytes(1), Some(&[7][..]));
    }
}
