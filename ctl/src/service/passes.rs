//! Passes over the replicas of volumes: who is told to make one, who waits for what it finds, and what is kept.
//!
//! ```text
//!   berth volume verify ──▶ passes ──▶ watch of the head's node ──▶ head
//!            ◀── reports ── passes ◀────────────────── reports ─────┘
//!                             └─▶ record store: the last one that saw everything
//! ```

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use datapath::record::{NodeId, Record, VolumeNumber};
use datapath::replica::check::{CheckReport, PassState, Purpose};
use nbd_server::control::convert::{LastPass, PassHistory};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::record_store::{RecordStore, StoreError};

/// What is wanted of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Somebody wants a volume verified.
    Verify { volume: VolumeNumber, verify: u64 },
    /// A volume that nobody leads needs a head, for the sake of its replicas.
    Tend { volume: VolumeNumber },
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Passes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    watches: u64,
    /// By node: its newest watch.
    nodes: BTreeMap<NodeId, (u64, UnboundedSender<Wish>)>,
    waiting: BTreeMap<u64, UnboundedSender<CheckReport>>,
    /// By volume: whose pass it is that is known to be under way; 0 for a scrub.
    under_way: BTreeMap<VolumeNumber, u64>,
}

impl Passes {
    /// Nothing that is guarded can be left half done: a panic ends the process.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node watches: it is told what is wanted of it, until it watches again.
    pub(super) fn watch(&self, node: NodeId) -> (u64, UnboundedReceiver<Wish>) {
        let (sender, receiver) = unbounded_channel();
        let mut state = self.lock();
        state.watches += 1;
        let watch = state.watches;
        state.nodes.insert(node, (watch, sender));
        (watch, receiver)
    }

    /// The watch has ended.
    pub(super) fn unwatch(&self, node: NodeId, ended: u64) {
        let mut state = self.lock();
        if state.nodes.get(&node).is_some_and(|(watch, _)| *watch == ended) {
            state.nodes.remove(&node);
        }
    }

    /// The nodes that watch, ascending.
    pub(super) fn connected(&self) -> Vec<NodeId> {
        self.lock().nodes.keys().copied().collect()
    }

    /// Has the volume verified by its head, or by a node that may become it. Nothing if none of them is connected.
    pub(super) fn verify(&self, record: &Record, verify: u64) -> Option<UnboundedReceiver<CheckReport>> {
        let mut state = self.lock();
        let head = record.living_head().map(|head| head.node);
        let mut nodes = head.into_iter().chain(record.attached).chain(record.in_sync.iter().copied());
        let wish = Wish::Verify { volume: record.volume, verify };
        nodes.find(|node| state.nodes.get(node).is_some_and(|(_, to)| to.send(wish).is_ok()))?;
        let (sender, receiver) = unbounded_channel();
        state.waiting.insert(verify, sender);
        Some(receiver)
    }

    /// Has a node lead a volume for a while. One that is not connected hears nothing.
    pub(super) fn tend(&self, node: NodeId, volume: VolumeNumber) {
        if let Some((_, to)) = self.lock().nodes.get(&node) {
            // It may have gone just now.
            let _ = to.send(Wish::Tend { volume });
        }
    }

    /// Nobody waits for it any more.
    pub(super) fn forget(&self, verify: u64) {
        self.lock().waiting.remove(&verify);
    }

    /// A head tells: whoever waits is told. Says whether the store must keep something of it.
    pub(super) fn take(&self, report: &CheckReport) -> bool {
        let mut state = self.lock();
        let verify = match report.purpose {
            Purpose::Scrub => 0,
            Purpose::Verify(verify) => verify,
        };
        if let Some(waiting) = state.waiting.get(&verify) {
            // Who waited may have gone.
            let _ = waiting.send(report.clone());
        }
        match report.state {
            PassState::Running => state.under_way.insert(report.volume, verify) != Some(verify),
            PassState::Complete => {
                state.under_way.remove(&report.volume);
                true
            }
            // It has not begun, or is begun anew by the next head.
            PassState::Ended(_) => false,
        }
    }
}

/// Seconds since 1970.
#[expect(clippy::disallowed_methods, reason = "the control plane reads the clock that people read")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Keeps what a report says, if it begins or completes a pass.
pub(super) fn keep(store: &dyn RecordStore, report: CheckReport) -> Result<(), StoreError> {
    let volume = report.volume;
    let history = store.passes(volume)?;
    let next = next_history(history.clone(), report, now());
    if next == history { Ok(()) } else { store.put_passes(volume, &next) }
}

/// A scrub that a new head begins again began when the first of its heads did.
fn next_history(history: PassHistory, report: CheckReport, now: u64) -> PassHistory {
    let began_at = history.began_at;
    match (&report.state, report.purpose) {
        (PassState::Running, Purpose::Scrub) => PassHistory { began_at: began_at.or(Some(now)), ..history },
        (PassState::Running, Purpose::Verify(_)) => PassHistory { began_at: Some(now), ..history },
        (PassState::Complete, _) => {
            let last = LastPass { report, began_at: began_at.unwrap_or(now), ended_at: now };
            PassHistory { began_at: None, last: Some(last) }
        }
        (PassState::Ended(_), _) => history,
    }
}

#[cfg(test)]
mod tests {
    use datapath::record::HeadSession;

    use super::*;

    fn report(purpose: Purpose, state: PassState) -> CheckReport {
        let refused = datapath::replica::check::EndReason::NoHead;
        CheckReport { purpose, state, ..CheckReport::refused(VolumeNumber(1), 0, refused) }
    }

    #[test]
    fn the_head_is_told_or_whoever_may_become_it() {
        let passes = Passes::default();
        let mut record = Record::new(VolumeNumber(1), "v", [0; 16], 8, &[NodeId(1), NodeId(2)]);
        assert!(passes.verify(&record, 5).is_none(), "nobody is connected");
        let (_, mut first) = passes.watch(NodeId(1));
        let (watch, mut second) = passes.watch(NodeId(2));
        (record.epoch, record.head) = (1, Some(HeadSession { node: NodeId(2), session: 1 }));
        let mut told = passes.verify(&record, 6).expect("the head is connected");
        let wish = |verify| Ok(Wish::Verify { volume: VolumeNumber(1), verify });
        assert_eq!(second.try_recv(), wish(6));
        let ends = report(Purpose::Verify(6), PassState::Complete);
        passes.take(&ends);
        assert_eq!(told.try_recv(), Ok(ends));
        passes.unwatch(NodeId(2), watch);
        passes.verify(&record, 7).expect("the other one is");
        assert_eq!(first.try_recv(), wish(7));
    }

    #[test]
    fn an_earlier_watch_that_ends_does_not_end_a_later_one() {
        let passes = Passes::default();
        let record = Record::new(VolumeNumber(1), "v", [0; 16], 8, &[NodeId(1)]);
        let (earlier, _old) = passes.watch(NodeId(1));
        let (_, _new) = passes.watch(NodeId(1));
        passes.unwatch(NodeId(1), earlier);
        assert!(passes.verify(&record, 5).is_some());
    }

    #[test]
    fn a_pass_began_with_its_first_head_and_the_last_complete_one_stays() {
        let running = || report(Purpose::Scrub, PassState::Running);
        let history = next_history(PassHistory::default(), running(), 10);
        let history = next_history(history, running(), 20);
        assert_eq!(history, PassHistory { began_at: Some(10), last: None });
        let complete = report(Purpose::Scrub, PassState::Complete);
        let history = next_history(history, complete.clone(), 30);
        let last = Some(LastPass { report: complete, began_at: 10, ended_at: 30 });
        assert_eq!(history, PassHistory { began_at: None, last: last.clone() });
        let history = next_history(history, report(Purpose::Verify(1), PassState::Running), 40);
        assert_eq!(history, PassHistory { began_at: Some(40), last });
    }
}
