//! What changes hold until they are committed, and who else still reads it.
//!
//! A payload is read by the lane that writes it and by each link that sends it, and must stay for those that may yet have
//! to be sent it again. Its pages are free when the last of them lets go.

use super::super::Shard;
use crate::memory::Memory;
use crate::units::{BLOCK_BYTES, MemoryRange};
use std::collections::VecDeque;

/// A change's payload.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) sequence: u64,
    /// The piece that waits for it, if it is a client's.
    pub(super) piece: Option<u32>,
    /// A page for a descriptor, and the blocks.
    pub(super) memory: Option<MemoryRange>,
    /// Of each block.
    pub(super) checksums: Vec<u32>,
    /// Pages that are counted as other nodes'.
    pub(super) peer_pages: u32,
}

/// Those of one volume, by their numbers, which have no gap.
#[derive(Debug, Default)]
pub(super) struct Contents {
    queue: VecDeque<Content>,
}

impl Contents {
    pub(super) fn push(&mut self, content: Content) {
        let next = self.queue.back().map_or(content.sequence, |last| last.sequence + 1);
        assert_eq!(content.sequence, next, "contents come in order");
        self.queue.push_back(content);
    }

    pub(super) fn get(&self, sequence: u64) -> Option<&Content> {
        let first = self.queue.front()?.sequence;
        let index = usize::try_from(sequence.checked_sub(first)?).ok()?;
        self.queue.get(index)
    }

    pub(super) fn get_mut(&mut self, sequence: u64) -> Option<&mut Content> {
        let first = self.queue.front()?.sequence;
        let index = usize::try_from(sequence.checked_sub(first)?).ok()?;
        self.queue.get_mut(index)
    }

    /// Takes the oldest, which must have this number.
    pub(super) fn pop(&mut self, sequence: u64) -> Content {
        let content = self.queue.pop_front().expect("a change that is not committed");
        assert_eq!(content.sequence, sequence, "changes are let go in order");
        content
    }

    pub(super) fn pop_any(&mut self) -> Option<Content> {
        self.queue.pop_front()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }
}

/// How many use each payload, by its first page.
#[derive(Debug)]
pub(super) struct Users(Vec<u16>);

impl Users {
    pub(super) fn new(memory_bytes: u32) -> Users {
        Users(vec![0; (memory_bytes / BLOCK_BYTES) as usize])
    }

    fn of(&mut self, memory: MemoryRange) -> &mut u16 {
        &mut self.0[(memory.start / BLOCK_BYTES) as usize]
    }
}

impl<M: Memory> Shard<M> {
    /// One more reads the payload.
    pub(super) fn use_memory(&mut self, memory: MemoryRange) {
        *self.replication.users.of(memory) += 1;
    }

    /// One less does.
    pub(super) fn unuse(&mut self, memory: MemoryRange) {
        let users = self.replication.users.of(memory);
        *users = users.checked_sub(1).expect("whoever lets go has held");
        if *users == 0 {
            self.pages.release(memory);
        }
    }

    /// Memory for what comes from another node.
    pub(super) fn allocate_for_peer(&mut self, pages: u32) -> Option<MemoryRange> {
        if self.replication.peer_pages + pages > self.replication.peer_pages_max {
            return None;
        }
        let memory = self.pages.allocate(pages)?;
        self.replication.peer_pages += pages;
        Some(memory)
    }

    /// The same when nobody has used it.
    pub(super) fn give_back_for_peer(&mut self, memory: MemoryRange) {
        self.replication.peer_pages -= memory.len / BLOCK_BYTES;
        self.pages.release(memory);
    }
}
