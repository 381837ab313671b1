//! What waits to be sent on a connection: short replies as bytes, and data where the device put it.

use crate::limits::{SEND_BYTES_ENOUGH, SEND_PIECES_MAX};
use crate::memory::Memory;
use crate::units::{BLOCK_BYTES, MemoryRange};
use std::collections::VecDeque;

/// Pages of a connection from which short replies are sent.
pub(super) const SEND_PAGES: u32 = 1;
/// A connection with so many bytes of short replies waiting is not read from.
pub(super) const SHORT_BACKLOG_BYTES: usize = 64 << 10;

#[derive(Debug)]
enum Item {
    /// So many of `short`.
    Short(usize),
    /// Bytes in memory, and the pages that are free once they are sent.
    Data { bytes: MemoryRange, free: Option<MemoryRange> },
}

/// The queue of one connection.
#[derive(Debug)]
pub(super) struct Output {
    short: Vec<u8>,
    /// How much of `short` has been handed to a send.
    short_taken: usize,
    items: VecDeque<Item>,
    send_memory: MemoryRange,
    pieces: Vec<MemoryRange>,
    freed_when_sent: Vec<MemoryRange>,
    sending: bool,
}

impl Output {
    pub(super) fn new(send_memory: MemoryRange) -> Output {
        assert_eq!(send_memory.len, SEND_PAGES * BLOCK_BYTES);
        Output {
            short: Vec::new(),
            short_taken: 0,
            items: VecDeque::new(),
            send_memory,
            pieces: Vec::with_capacity(SEND_PIECES_MAX),
            freed_when_sent: Vec::new(),
            sending: false,
        }
    }

    /// Lets `write` append short replies.
    pub(super) fn append<R>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        let before = self.short.len();
        let result = write(&mut self.short);
        let added = self.short.len() - before;
        if added > 0 {
            if let Some(Item::Short(length)) = self.items.back_mut() {
                *length += added;
            } else {
                self.items.push_back(Item::Short(added));
            }
        }
        result
    }

    /// Appends bytes that lie in memory; `free` is handed back by [`Self::finish_send`] when they are sent.
    pub(super) fn append_data(&mut self, bytes: MemoryRange, free: Option<MemoryRange>) {
        self.items.push_back(Item::Data { bytes, free });
    }

    /// Is a send under way?
    pub(super) fn is_sending(&self) -> bool {
        self.sending
    }

    /// Is there nothing to send and nothing being sent?
    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty() && !self.sending
    }

    /// Must the client read before more is done for it?
    pub(super) fn is_backlogged(&self) -> bool {
        self.short.len() - self.short_taken > SHORT_BACKLOG_BYTES
    }

    /// Gathers what one send takes: see [`SEND_BYTES_ENOUGH`]. False if there is nothing to send or one is under way.
    pub(super) fn begin_send(&mut self, memory: &mut impl Memory) -> bool {
        if self.sending || self.items.is_empty() {
            return false;
        }
        self.pieces.clear();
        let mut short_used = 0;
        let mut bytes_taken = 0;
        while self.pieces.len() < SEND_PIECES_MAX && bytes_taken < SEND_BYTES_ENOUGH {
            match self.items.front_mut() {
                Some(Item::Short(left)) => {
                    let room = self.send_memory.len - short_used;
                    let length = (*left).min(room as usize);
                    if length == 0 {
                        break;
                    }
                    let count = u32::try_from(length).expect("bounded by the room");
                    let piece = self.send_memory.part(short_used, count);
                    let from = self.short_taken;
                    memory.bytes_mut(piece).copy_from_slice(&self.short[from..from + length]);
                    short_used += count;
                    self.short_taken += length;
                    *left -= length;
                    if *left == 0 {
                        self.items.pop_front();
                    }
                    self.pieces.push(piece);
                }
                Some(Item::Data { bytes, free }) => {
                    self.pieces.push(*bytes);
                    bytes_taken += bytes.len;
                    self.freed_when_sent.extend(free.take());
                    self.items.pop_front();
                }
                None => break,
            }
        }
        if self.short_taken == self.short.len() {
            self.short.clear();
            self.short_taken = 0;
        }
        self.sending = true;
        true
    }

    /// What is being sent.
    pub(super) fn pieces(&self) -> &[MemoryRange] {
        &self.pieces
    }

    /// The send has ended; returns the pages that nobody needs any more.
    pub(super) fn finish_send(&mut self) -> std::vec::Drain<'_, MemoryRange> {
        assert!(std::mem::take(&mut self.sending), "a send ends once");
        self.freed_when_sent.drain(..)
    }

    /// Takes the short replies that were not yet given to a send, for another place to send them from.
    ///
    /// # Panics
    /// If a send is under way, or data is to be sent.
    pub(super) fn take_unsent(&mut self) -> Vec<u8> {
        assert!(!self.sending, "what is being sent cannot be taken");
        assert!(self.items.drain(..).all(|item| matches!(item, Item::Short(_))), "data stays where it is");
        let taken = std::mem::take(&mut self.short_taken);
        self.short.drain(..taken);
        std::mem::take(&mut self.short)
    }

    /// Drops what was not yet given to a send; returns all pages of the connection's that no send holds. The runs of one
    /// reply share their pages, which are free with the last of them: a send that holds the first keeps them all.
    pub(super) fn abandon(&mut self) -> Vec<MemoryRange> {
        self.short.clear();
        self.short_taken = 0;
        let free = |item: Item| match item {
            Item::Data { free, .. } => free,
            Item::Short(_) => None,
        };
        let dropped = self.items.drain(..).filter_map(free);
        let is_sent_from = |pages: &MemoryRange| {
            let overlaps = |piece: &MemoryRange| piece.start < pages.end() && pages.start < piece.end();
            self.sending && self.pieces.iter().any(overlaps)
        };
        let (held, free) = dropped.partition(is_sent_from);
        let held: Vec<MemoryRange> = held;
        self.freed_when_sent.extend(held);
        free
    }

    /// The connection's own pages.
    pub(super) fn send_memory(&self) -> MemoryRange {
        self.send_memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl Memory for Bytes {
        fn len_bytes(&self) -> u32 {
            u32::try_from(self.0.len()).unwrap()
        }
        fn bytes(&self, range: MemoryRange) -> &[u8] {
            &self.0[range.start as usize..range.end() as usize]
        }
        fn bytes_mut(&mut self, range: MemoryRange) -> &mut [u8] {
            &mut self.0[range.start as usize..range.end() as usize]
        }
        fn copy(&mut self, from: MemoryRange, to: MemoryRange) {
            self.0.copy_within(from.start as usize..from.end() as usize, to.start as usize);
        }
    }

    #[test]
    fn everything_is_sent_in_order_however_it_is_cut() {
        let mut memory = Bytes((0..=255).flat_map(|page: u8| [page; 256]).collect());
        let mut output = Output::new(MemoryRange { start: 0, len: SEND_PAGES * BLOCK_BYTES });
        let mut expected: Vec<u8> = Vec::new();
        for round in 0..300_u32 {
            let short = [round.to_le_bytes()[0]; 90];
            expected.extend(&short);
            output.append(|out| out.extend(&short));
            let data = MemoryRange { start: 16384 + round, len: 7 };
            expected.extend(memory.bytes(data));
            output.append_data(data, Some(MemoryRange { start: 4096 * (100 + round), len: 4096 }));
        }
        let (mut sent, mut freed) = (Vec::<u8>::new(), 0);
        while output.begin_send(&mut memory) {
            assert!(output.pieces().len() <= SEND_PIECES_MAX && !output.begin_send(&mut memory));
            output.pieces().iter().for_each(|piece| sent.extend(memory.bytes(*piece)));
            freed += output.finish_send().count();
        }
        assert_eq!((sent == expected, freed, output.is_empty()), (true, 300, true));
    }

    #[test]
    fn what_is_taken_goes_on_where_the_last_send_ended() {
        let mut memory = Bytes(vec![0; 8192]);
        let mut output = Output::new(MemoryRange { start: 0, len: SEND_PAGES * BLOCK_BYTES });
        let expected: Vec<u8> = (0..6000_u32).map(|at| at.to_le_bytes()[0]).collect();
        output.append(|out| out.extend(&expected));
        assert!(output.begin_send(&mut memory));
        let mut sent: Vec<u8> =
            output.pieces().iter().flat_map(|piece| memory.bytes(*piece).to_vec()).collect();
        output.finish_send();
        sent.extend(output.take_unsent());
        assert_eq!((sent == expected, output.is_empty()), (true, true));
    }

    /// A client that goes while the first run of a reply is on its way: what is sent from must not be somebody else's yet.
    #[test]
    fn pages_of_a_reply_that_is_half_sent_are_free_when_the_send_has_ended() {
        let mut memory = Bytes(vec![0; 1 << 16]);
        let mut output = Output::new(MemoryRange { start: 0, len: SEND_PAGES * BLOCK_BYTES });
        let reply = MemoryRange { start: 1 << 16, len: SEND_BYTES_ENOUGH + 8192 };
        let first = reply.part(28, SEND_BYTES_ENOUGH);
        output.append_data(first, None);
        output.append_data(reply.part(reply.len - 100, 100), Some(reply));
        let other = MemoryRange { start: 1 << 20, len: 8192 };
        output.append_data(other, Some(other));
        assert!(output.begin_send(&mut memory));
        assert_eq!(output.pieces(), [first]);
        assert_eq!((output.abandon(), output.is_empty()), (vec![other], false));
        assert_eq!(output.finish_send().collect::<Vec<_>>(), [reply]);
        assert!(output.is_empty());
    }
}
