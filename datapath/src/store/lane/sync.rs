//! Bringing writes to stable media, one sync for all that wait.

use super::stream::StreamKind;
use super::{AckPolicy, Context, DiskEffect, Lane, Operation};
use crate::memory::Memory;
use crate::request::RequestError;
use crate::store::bugs::PlantedBug;

/// Syncs under way and wanted. A sync covers the writes that had completed when it was started, so whoever comes
/// while one is running waits for the next.
#[derive(Debug, Default)]
pub(super) struct Syncer {
    wanted: bool,
    /// What the sync under way covers of each stream.
    running: Option<[u64; 3]>,
    /// Answered by the sync under way, and by the next one.
    served: Vec<u32>,
    waiting: Vec<u32>,
    /// The checkpoint waits for the sync under way, or for the next one.
    checkpoint_served: bool,
    checkpoint_waiting: bool,
}

impl Syncer {
    /// Is a sync under way?
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Something was written that must be brought to stable media soon.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    /// Answer `cookie` when everything written so far is on stable media.
    pub(super) fn wait(&mut self, cookie: u32) {
        self.waiting.push(cookie);
        self.wanted = true;
    }

    /// Tell the checkpoint when everything written so far is on stable media.
    pub(super) fn wait_for_checkpoint(&mut self) {
        self.checkpoint_waiting = true;
        self.wanted = true;
    }
}

impl Lane {
    /// Answers `cookie` when every change answered before is on stable media.
    pub fn flush(&mut self, cookie: u32) {
        if self.failed {
            return self.complete(cookie, Err(RequestError::Io));
        }
        let client = &self.streams[StreamKind::Client.index()];
        // What was answered has taken effect; under the durable policy that means it is on stable media.
        let nothing_to_do =
            self.config.ack == AckPolicy::Durable || client.flushed_through >= client.applied.0;
        if nothing_to_do {
            return self.complete(cookie, Ok(()));
        }
        self.syncer.wait(cookie);
        let overlooked = self.config.bugs.has(PlantedBug::RunningSyncCovers) && self.syncer.running.is_some();
        if overlooked {
            let cookie = self.syncer.waiting.pop().expect("just put there");
            self.syncer.served.push(cookie);
        }
    }

    pub(super) fn upkeep_sync(&mut self) {
        if !self.syncer.wanted || self.syncer.running.is_some() {
            return;
        }
        self.syncer.wanted = false;
        self.syncer.running = Some(std::array::from_fn(|index| self.streams[index].written_through));
        std::mem::swap(&mut self.syncer.served, &mut self.syncer.waiting);
        self.syncer.checkpoint_served = std::mem::take(&mut self.syncer.checkpoint_waiting);
        self.counters.syncs += 1;
        self.start(Operation::Sync, |token| DiskEffect::Sync { token });
    }

    pub(super) fn finish_sync<M: Memory>(&mut self, context: &mut Context<'_, M>, good: bool) {
        let covered = self.syncer.running.take().expect("a sync under way");
        if !good {
            return self.fail(context);
        }
        if self.failed {
            return;
        }
        for (stream, number) in self.streams.iter_mut().zip(covered) {
            stream.flushed_through = stream.flushed_through.max(number);
        }
        self.note_kept_promises();
        let mut served = std::mem::take(&mut self.syncer.served);
        served.drain(..).for_each(|cookie| self.complete(cookie, Ok(())));
        self.syncer.served = served;
        if std::mem::take(&mut self.syncer.checkpoint_served) {
            self.checkpoint_synced(context);
        }
        self.apply_ready(context, StreamKind::Client);
    }

    pub(super) fn fail_syncs(&mut self) {
        for list in [std::mem::take(&mut self.syncer.served), std::mem::take(&mut self.syncer.waiting)] {
            list.into_iter().for_each(|cookie| self.complete(cookie, Err(RequestError::Io)));
        }
        self.syncer.wanted = false;
    }
}
