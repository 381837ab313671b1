//! Who may take how much of the memory for requests, and who must let go of it.
//!
//! ```text
//!   request memory   │ to borrow: one half │ kept for shares: the other half │
//! ```
//!
//! A client can hold memory as long as it likes: it does not read its replies, or does not send the payload that it
//! announced. So:
//!
//! - A connection has a **share** of what is kept for shares, so small that there is one for every connection that the
//!   shard can have: a short request never waits for what other clients do.
//! - It **borrows** beyond that, up to 16 MiB, while what is kept for shares stays free.
//! - Whoever holds no more than a share and is refused is **hungry**. While somebody is, no other borrows who has
//!   borrowed already, so everybody in line gets a turn.
//! - Writes may wait for a lane that has no space. Where there are several lanes, the writes of one hold at most eight
//!   times what they leave free, so that the others go on.
//! - When there has been hunger for as long as a client is given to read or send, connections that hold memory and
//!   whose clients have done neither for as long are closed, the largest first.

use super::Shard;
use super::connection::Ending;
use crate::engine::ports::ConnectionId;
use crate::limits::{BYTES_PER_CONNECTION_MAX, CLIENT_PATIENCE_MS, CONNECTIONS_MAX};
use crate::memory::Memory;
use crate::units::{BLOCK_BYTES, MemoryRange, Moment};

/// Pages that requests leave free besides those of connections, for the lanes.
pub(super) const PAGES_KEPT: u32 = 16;
/// One part in so many is kept for shares.
const SHARES_PART: u32 = 2;
/// Pages for one block: a share is not less, however little memory there is.
const SHARE_PAGES_MIN: u32 = 2;
/// How much more a lane's writes may hold than they leave free.
const LANE_WRITES_TO_FREE: u32 = 8;
/// Between two looks for somebody to close, while none is found.
const LOOK_AGAIN_MS: u64 = 250;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
}

/// Who waits for memory, and since when.
#[derive(Debug, Default)]
pub(super) struct Hunger {
    /// In this turn somebody was refused who holds no more than a share, and keeps nobody waiting.
    refused: bool,
    since: Option<Moment>,
    look_again_at: Option<Moment>,
    /// Connections that were closed because of it.
    pub(super) put_out: u64,
}

impl Hunger {
    /// All who wait ask again in every turn.
    pub(super) fn begin_turn(&mut self) {
        self.refused = false;
    }

    fn is_felt(&self) -> bool {
        self.refused || self.since.is_some()
    }

    pub(super) fn look_again_at(&self) -> Option<Moment> {
        self.look_again_at
    }
}

impl<M: Memory> Shard<M> {
    /// Memory for a task, counted as its connection's.
    pub(super) fn allocate(&mut self, task: u32, pages: u32, purpose: Purpose) -> Option<MemoryRange> {
        if !self.has_memory_for(task, pages, purpose) {
            return None;
        }
        let memory = self.pages.allocate(pages);
        self.note_outcome(task, pages, purpose, memory.is_some());
        memory
    }

    /// Several runs of pages, or none.
    pub(super) fn allocate_all(
        &mut self,
        task: u32,
        runs: &[u32],
        purpose: Purpose,
    ) -> Option<Vec<MemoryRange>> {
        let pages = runs.iter().sum();
        if !self.has_memory_for(task, pages, purpose) {
            return None;
        }
        let memory = self.allocate_runs(runs);
        self.note_outcome(task, pages, purpose, memory.is_some());
        memory
    }

    fn has_memory_for(&mut self, task: u32, pages: u32, purpose: Purpose) -> bool {
        let held = self.any_connection_of(task).map_or(0, |connection| connection.bytes_under_way);
        if held > 0 && held + pages * BLOCK_BYTES > BYTES_PER_CONNECTION_MAX {
            // Its own limit: nobody else can do anything about it.
            return false;
        }
        let may_take = self.may_take(task, held / BLOCK_BYTES, pages, purpose);
        if !may_take {
            self.note_refused(task);
        }
        may_take
    }

    fn may_take(&self, task: u32, held: u32, pages: u32, purpose: Purpose) -> bool {
        let for_connections = self.connection_pages_max - self.connection_pages;
        let free = self.pages.free_count().saturating_sub(for_connections + PAGES_KEPT);
        let Some(left) = free.checked_sub(pages) else { return false };
        let for_shares = self.request_pages / SHARES_PART;
        // What is larger than all that can be borrowed must still be possible.
        let kept = for_shares.min(self.request_pages.saturating_sub(pages));
        let within_share = held + pages <= self.share_pages();
        let others_first = self.hunger.is_felt() && held > self.share_pages();
        let lane_writes = self.lanes[self.lane_of(task)].write_pages;
        let lane_has_too_much = purpose == Purpose::Write
            && self.lanes.len() > 1
            && lane_writes > 0
            && lane_writes + pages > LANE_WRITES_TO_FREE * left;
        !lane_has_too_much && (within_share || (left >= kept && !others_first))
    }

    fn share_pages(&self) -> u32 {
        (self.request_pages / SHARES_PART / CONNECTIONS_MAX).max(SHARE_PAGES_MIN)
    }

    fn allocate_runs(&mut self, runs: &[u32]) -> Option<Vec<MemoryRange>> {
        let mut memory = Vec::with_capacity(runs.len());
        for pages in runs {
            if let Some(run) = self.pages.allocate(*pages) {
                memory.push(run);
            } else {
                memory.into_iter().for_each(|run| self.pages.release(run));
                return None;
            }
        }
        Some(memory)
    }

    /// No run may be long enough although there are pages.
    fn note_outcome(&mut self, task: u32, pages: u32, purpose: Purpose, taken: bool) {
        if !taken {
            return self.note_refused(task);
        }
        if purpose == Purpose::Write {
            let lane = self.lane_of(task);
            self.lanes[lane].write_pages += pages;
        }
        if let Some(connection) = self.any_connection_of(task) {
            connection.bytes_under_way += pages * BLOCK_BYTES;
        }
    }

    /// Releases memory of [`Self::allocate`].
    pub(super) fn give_back(&mut self, task: u32, memory: MemoryRange, purpose: Purpose) {
        self.note_given_back(task, memory.len, purpose);
        self.pages.release(memory);
    }

    /// Ends the accounting of memory of [`Self::allocate`].
    pub(super) fn note_given_back(&mut self, task: u32, bytes: u32, purpose: Purpose) {
        if purpose == Purpose::Write {
            let lane = self.lane_of(task);
            self.lanes[lane].write_pages -= bytes / BLOCK_BYTES;
        }
        if let Some(connection) = self.any_connection_of(task) {
            connection.bytes_under_way -= bytes;
        }
    }

    /// Who has borrowed already goes on with that, and who lets others wait has no reason to complain.
    fn note_refused(&mut self, task: u32) {
        let (now, share_bytes) = (self.now, self.share_pages() * BLOCK_BYTES);
        let can_wait = self.any_connection_of(task).is_some_and(|connection| {
            let to_blame =
                connection.waits_for_client_since().is_some_and(|since| is_past_patience(now, since));
            to_blame || connection.bytes_under_way > share_bytes
        });
        self.hunger.refused |= !can_wait;
    }

    /// Closes a connection that others have waited for long enough.
    pub(super) fn relieve_hunger(&mut self) {
        if !self.hunger.refused {
            (self.hunger.since, self.hunger.look_again_at) = (None, None);
            return;
        }
        let since = *self.hunger.since.get_or_insert(self.now);
        if !is_past_patience(self.now, since) {
            self.hunger.look_again_at = Some(since.after_ms(CLIENT_PATIENCE_MS));
            return;
        }
        self.hunger.look_again_at = Some(self.now.after_ms(LOOK_AGAIN_MS));
        if self.connections.iter().flatten().any(|connection| connection.is_giving_back()) {
            return;
        }
        if let Some(id) = self.largest_to_blame() {
            self.hunger.put_out += 1;
            self.close(id);
        }
    }

    fn largest_to_blame(&self) -> Option<ConnectionId> {
        let connections = (0..).map(ConnectionId).zip(&self.connections);
        let to_blame = connections.filter_map(|(id, connection)| {
            let connection = connection.as_deref()?;
            let since = connection.waits_for_client_since()?;
            let guilty = connection.ending != Ending::Closing
                && connection.bytes_under_way > 0
                && is_past_patience(self.now, since);
            guilty.then_some((connection.bytes_under_way, id.0))
        });
        to_blame.max().map(|(_, id)| ConnectionId(id))
    }
}

fn is_past_patience(now: Moment, since: Moment) -> bool {
    now.since_ns(since) >= CLIENT_PATIENCE_MS * 1_000_000
}
