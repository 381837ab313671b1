//! What watchers are told. The feed holds the present state, every entry marked with the revision of its last change, and
//! a watcher asks for what is newer than the revision that it has seen. So a slow watcher costs no memory and misses
//! nothing but versions that newer ones overtook.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use datapath::record::{NodeId, Record, VolumeNumber};
use nbd_server::control::convert::NodeInfo;
use tokio::sync::watch;

use crate::record_store::Change;

/// Deleted volumes that are remembered; a watcher that is further behind has to begin anew.
const GONE_MAX: usize = 4096;
/// Entries that a watcher takes at once.
const TAKE_MAX: usize = 64;

/// The present state of a record store.
#[derive(Debug)]
pub struct Feed {
    state: Mutex<State>,
    /// The revision, or [`CLOSED`].
    changed: watch::Sender<u64>,
}

/// The revision after the last one.
const CLOSED: u64 = u64::MAX;

#[derive(Debug, Default)]
struct State {
    revision: u64,
    nodes_revision: u64,
    nodes: Arc<Vec<NodeInfo>>,
    /// With the revision of its last change.
    records: BTreeMap<VolumeNumber, (u64, Arc<Record>)>,
    /// Volumes, deleted ones too, by the revision of their last change.
    by_revision: BTreeMap<u64, VolumeNumber>,
    /// Revisions of [`State::by_revision`] at which a volume was deleted.
    gone: BTreeSet<u64>,
    /// The newest revision of a deleted volume that is forgotten.
    forgotten: u64,
}

/// How far a watcher has come.
#[derive(Debug, Default)]
pub struct Cursor {
    /// Only records that this node has to do with.
    node: Option<NodeId>,
    revision: u64,
    /// Volumes that were told, and not told to be gone or to have nothing to do with the node any more.
    told: BTreeSet<VolumeNumber>,
}

/// What is new to a watcher.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// A record.
    Record(Arc<Record>),
    /// A volume that was told is gone.
    Gone(VolumeNumber),
    /// All nodes.
    Nodes(Arc<Vec<NodeInfo>>),
}

/// Why a watcher is told no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedEnd {
    /// ctl is about to end.
    Closed,
    /// The watcher has missed deletions that are forgotten.
    FellBehind,
}

impl Default for Feed {
    fn default() -> Feed {
        Feed { state: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Feed {
    /// Takes a change of the store, in the store's order.
    pub fn apply(&self, change: Change) {
        let mut state = self.lock();
        state.revision += 1;
        let revision = state.revision;
        match change {
            Change::Nodes(nodes) => (state.nodes, state.nodes_revision) = (Arc::new(nodes), revision),
            Change::Record(record) => {
                let volume = record.volume;
                if let Some((old, _)) = state.records.insert(volume, (revision, Arc::from(record))) {
                    state.by_revision.remove(&old);
                }
                state.by_revision.insert(revision, volume);
            }
            Change::Gone(volume) => {
                if let Some((old, _)) = state.records.remove(&volume) {
                    state.by_revision.remove(&old);
                }
                state.by_revision.insert(revision, volume);
                state.gone.insert(revision);
                state.forget();
            }
        }
        drop(state);
        self.changed.send_if_modified(|told| {
            let open = *told != CLOSED;
            if open {
                *told = revision;
            }
            open
        });
    }

    /// Ends all watchers.
    pub fn close(&self) {
        self.changed.send_replace(CLOSED);
    }

    /// A watcher of the records that the node has to do with, or of all, which has seen nothing.
    #[must_use]
    pub fn watch(&self, node: Option<NodeId>) -> (Cursor, watch::Receiver<u64>) {
        (Cursor { node, ..Cursor::default() }, self.changed.subscribe())
    }

    /// All records as they are now, by number.
    #[must_use]
    pub fn records(&self) -> Vec<Arc<Record>> {
        self.lock().records.values().map(|(_, record)| Arc::clone(record)).collect()
    }

    /// Is a node drained?
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.lock().nodes.iter().any(|node| node.draining)
    }

    /// Takes the next news, oldest first. None: there are no more now. It may be empty.
    ///
    /// # Errors
    /// If there will be no more.
    pub fn take(&self, cursor: &mut Cursor) -> Result<Option<Vec<News>>, FeedEnd> {
        if *self.changed.borrow() == CLOSED {
            return Err(FeedEnd::Closed);
        }
        let state = self.lock();
        // A watcher that has seen nothing has told nothing that could be gone.
        if cursor.revision < state.forgotten && !cursor.told.is_empty() {
            return Err(FeedEnd::FellBehind);
        }
        if cursor.revision == state.revision {
            return Ok(None);
        }
        let mut news = Vec::new();
        if state.nodes_revision > cursor.revision {
            news.push(News::Nodes(Arc::clone(&state.nodes)));
        }
        let mut newer = state.by_revision.range(cursor.revision + 1..);
        let mut last = state.revision;
        for (taken, (revision, volume)) in newer.by_ref().enumerate() {
            news.extend(cursor.judge(*volume, state.records.get(volume).map(|(_, record)| record)));
            if taken + 1 == TAKE_MAX {
                last = *revision;
                break;
            }
        }
        cursor.revision = last;
        Ok(Some(news))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the feed is closed.
pub(super) async fn closed(changed: &mut watch::Receiver<u64>) {
    // Without a feed there is nothing to tell any more, either.
    let _ = changed.wait_for(|revision| *revision == CLOSED).await;
}

impl State {
    fn forget(&mut self) {
        while self.gone.len() > GONE_MAX {
            let oldest = self.gone.pop_first().expect("there are some");
            self.by_revision.remove(&oldest);
            self.forgotten = oldest;
        }
    }
}

impl Cursor {
    fn judge(&mut self, volume: VolumeNumber, record: Option<&Arc<Record>>) -> Option<News> {
        let Some(record) = record else {
            return self.told.remove(&volume).then_some(News::Gone(volume));
        };
        let concerned = self.node.is_none_or(|node| concerns(record, node));
        // The version that takes a node out is the last one that it is told.
        let was_told = if concerned { !self.told.insert(volume) } else { self.told.remove(&volume) };
        (concerned || was_told).then(|| News::Record(Arc::clone(record)))
    }
}

/// Has the node a replica or the head, or is it to have the head?
fn concerns(record: &Record, node: NodeId) -> bool {
    record.attached == Some(node)
        || record.head.is_some_and(|head| head.node == node)
        || record.has_replica(node)
}

#[cfg(test)]
mod tests {
    use datapath::record::HeadSession;

    use super::*;

    fn told(record: Record) -> Change {
        Change::Record(Box::new(record))
    }

    fn record(volume: u32, version: u64, nodes: &[u32]) -> Record {
        let nodes: Vec<NodeId> = nodes.iter().copied().map(NodeId).collect();
        Record { version, ..Record::new(VolumeNumber(volume), "v", [0; 16], 1, &nodes) }
    }

    /// All news, as `VOLUME:VERSION`, `VOLUME:gone`, `nodes`.
    fn news(feed: &Feed, cursor: &mut Cursor) -> String {
        let mut words = Vec::new();
        while let Some(some) = feed.take(cursor).expect("open") {
            words.extend(some.into_iter().map(|news| match news {
                News::Record(record) => format!("{}:{}", record.volume.0, record.version),
                News::Gone(volume) => format!("{}:gone", volume.0),
                News::Nodes(nodes) => format!("{} nodes", nodes.len()),
            }));
        }
        words.join(" ")
    }

    #[test]
    fn a_watcher_hears_the_state_and_then_the_newest_of_each_change() {
        let feed = Feed::default();
        feed.apply(Change::Nodes(Vec::new()));
        feed.apply(told(record(1, 1, &[1])));
        feed.apply(told(record(2, 1, &[2])));
        let (mut all, _) = feed.watch(None);
        let (mut one, _) = feed.watch(Some(NodeId(1)));
        assert_eq!(news(&feed, &mut all), "0 nodes 1:1 2:1");
        assert_eq!(news(&feed, &mut one), "0 nodes 1:1");
        assert_eq!(news(&feed, &mut all), "");
        feed.apply(told(record(2, 2, &[2])));
        feed.apply(told(record(1, 2, &[1])));
        feed.apply(told(record(2, 3, &[2])));
        assert_eq!(news(&feed, &mut all), "1:2 2:3");
        assert_eq!(news(&feed, &mut one), "1:2");
        feed.apply(Change::Gone(VolumeNumber(1)));
        feed.apply(Change::Gone(VolumeNumber(2)));
        assert_eq!(news(&feed, &mut all), "1:gone 2:gone");
        assert_eq!(news(&feed, &mut one), "1:gone");
    }

    #[test]
    fn a_node_is_told_that_it_is_out() {
        let feed = Feed::default();
        let (mut one, _) = feed.watch(Some(NodeId(1)));
        feed.apply(told(record(1, 1, &[2])));
        assert_eq!(news(&feed, &mut one), "", "it has nothing to do with it");
        let head = Some(HeadSession { node: NodeId(1), session: 1 });
        feed.apply(told(Record { head, ..record(1, 2, &[2]) }));
        assert_eq!(news(&feed, &mut one), "1:2", "the head needs no replica");
        feed.apply(told(record(1, 3, &[2])));
        assert_eq!(news(&feed, &mut one), "1:3");
        feed.apply(told(record(1, 4, &[2])));
        assert_eq!(news(&feed, &mut one), "");
        feed.apply(told(record(1, 5, &[2]).with_attached(Some(NodeId(1)), 1)));
        assert_eq!(news(&feed, &mut one), "1:6", "it is to have the head");
        feed.apply(told(record(1, 7, &[2])));
        assert_eq!(news(&feed, &mut one), "1:7");
        feed.apply(Change::Gone(VolumeNumber(1)));
        assert_eq!(news(&feed, &mut one), "");
    }

    #[test]
    fn many_records_come_in_parts() {
        let feed = Feed::default();
        let most = u32::try_from(TAKE_MAX).expect("small");
        (1..=most + 1).for_each(|volume| feed.apply(told(record(volume, 1, &[1]))));
        let (mut all, _) = feed.watch(None);
        assert_eq!(feed.take(&mut all).expect("open").expect("news").len(), TAKE_MAX);
        assert_eq!(feed.take(&mut all).expect("open").expect("news").len(), 1);
        assert_eq!(feed.take(&mut all), Ok(None));
    }

    #[test]
    fn who_missed_forgotten_deletions_begins_anew() {
        let feed = Feed::default();
        feed.apply(told(record(1, 1, &[1])));
        let (mut old, _) = feed.watch(None);
        assert_eq!(news(&feed, &mut old), "1:1");
        for volume in 1..=u32::try_from(GONE_MAX).expect("small") + 1 {
            feed.apply(told(record(volume, 1, &[1])));
            feed.apply(Change::Gone(VolumeNumber(volume)));
        }
        assert_eq!(feed.take(&mut old), Err(FeedEnd::FellBehind));
        let (mut new, _) = feed.watch(None);
        assert_eq!(news(&feed, &mut new), "");
        assert_eq!(feed.lock().by_revision.len(), GONE_MAX, "the memory for them is bounded");
        feed.close();
        feed.apply(told(record(9_999, 1, &[1])));
        assert_eq!(feed.take(&mut new), Err(FeedEnd::Closed));
    }
}
