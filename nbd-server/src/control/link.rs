//! A node's link to `berth ctl`: a thread that joins, watches, and carries proposals. The other side is synchronous and is
//! never kept waiting.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use datapath::record::{NodeId, Record, VolumeNumber};
use datapath::replica::check::CheckReport;
use thiserror::Error;
use tokio::sync::Notify;
use tonic::transport::Endpoint;

use super::convert::{MessageError, NodeFacts, NodeInfo, address, optional_address};
use super::limits::{CONNECT_TIMEOUT, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT};
use super::session::Session;
use crate::node_name::NodeName;

/// Called after each piece of news, on the link's thread. It must not block.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// What the node tells of itself, and whom.
#[derive(Clone)]
pub struct LinkSettings {
    /// `http://HOST:PORT` of `berth ctl`.
    pub ctl: String,
    /// The node's name. It decides about the node's number.
    pub name: NodeName,
    /// Chosen at random when the process started.
    pub boot: u64,
    /// Where NBD clients come in, as `HOST:PORT`.
    pub nbd: Option<String>,
    /// Where other nodes come in, as `HOST:PORT`.
    pub peer: String,
    /// What placement goes by.
    pub facts: NodeFacts,
    /// Wakes whoever waits for news.
    pub wake: Waker,
}

impl fmt::Debug for LinkSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkSettings")
            .field("ctl", &self.ctl)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// What the link is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Put this record in the place of the version before it. The outcome is what is read: [`News::Record`] is told after
    /// each proposal, or [`News::Gone`]. A proposal that was not sent yet gives way to a later one for its volume.
    ///
    /// Only a version that is not older than the proposed one decides about the proposal. An older one is told when the
    /// answer was lost, or the proposal broke a rule: then it may still take effect.
    Propose(Record),
    /// Tell the volume's present record, or that there is none: for a volume that the node has nothing to do with as far
    /// as ctl knows, such as one whose deletion it missed.
    Read(VolumeNumber),
    /// Tell ctl how a pass over a volume stands. A report that was not sent yet gives way to a later one of its pass; one
    /// that ends a pass is sent until it has arrived.
    Checked(CheckReport),
}

/// What is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The node has joined, once; its number stays.
    Joined(NodeId),
    /// All nodes: at first, and when one has changed.
    Nodes(Vec<NodeInfo>),
    /// A record of a volume that this node has a replica or the head of. Versions of a volume never fall; a version is told
    /// twice only if it was asked for or a proposal had no effect. The version that takes the node out is the last one.
    Record(Box<Record>),
    /// There is no record of the volume. Its number never comes back.
    Gone(VolumeNumber),
    /// It was deleted: what is left of it may be removed.
    Deleted {
        /// Its number.
        volume: VolumeNumber,
        /// Its lineage.
        lineage: [u8; 16],
    },
    /// Somebody wants a volume led, if nobody leads it: its replicas need that.
    Tend {
        /// Which volume.
        volume: VolumeNumber,
    },
    /// Somebody wants a volume verified.
    Verify {
        /// Which volume.
        volume: VolumeNumber,
        /// The reports repeat it.
        verify: u64,
    },
}

/// Why there is no link.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Not a URL of ctl.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// An address that nobody could connect to.
    #[error(transparent)]
    Address(#[from] MessageError),
    /// No thread.
    #[error("cannot start the thread of the link to ctl: {0}")]
    Thread(#[from] io::Error),
}

/// Not a URL of ctl.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not where berth ctl is; write http://HOST:PORT (there is no TLS yet)")]
pub struct UrlError(String);

/// How to connect to `berth ctl`.
///
/// # Errors
/// If the URL is not `http://HOST:PORT`.
pub fn endpoint(url: &str) -> Result<Endpoint, UrlError> {
    let wrong = || UrlError(url.chars().take(200).collect());
    let place = url.strip_prefix("http://").ok_or_else(wrong)?;
    address("url", place.trim_end_matches('/').to_owned()).map_err(|_| wrong())?;
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| wrong())?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// What both threads know.
#[derive(Debug, Default)]
pub(super) struct Signal {
    /// There are commands, or an end.
    pub(super) notify: Notify,
    stop: AtomicBool,
}

impl Signal {
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// The link. Dropped, it ends; what was proposed may then have an effect or not.
#[derive(Debug)]
pub struct ControlLink {
    commands: Sender<Command>,
    news: Receiver<News>,
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl ControlLink {
    /// Starts the thread. Whether ctl can be reached shows later: it is tried for ever.
    ///
    /// # Errors
    /// If the settings make no sense, or there is no thread.
    pub fn start(settings: LinkSettings) -> Result<ControlLink, LinkError> {
        let endpoint = endpoint(&settings.ctl)?;
        optional_address("nbd", settings.nbd.clone().unwrap_or_default())?;
        address("peer", settings.peer.clone())?;
        let signal = Arc::new(Signal::default());
        let (command_sender, command_receiver) = unbounded();
        let (news_sender, news_receiver) = unbounded();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let session = Session::new(settings, endpoint, command_receiver, news_sender, Arc::clone(&signal));
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            runtime.block_on(session.run());
        })?;
        Ok(ControlLink { commands: command_sender, news: news_receiver, signal, thread: Some(thread) })
    }

    /// Gives the link something to do. Never blocks.
    pub fn send(&self, command: Command) {
        // The link's thread keeps the other end until this one is gone.
        let _ = self.commands.send(command);
        self.signal.notify.notify_one();
    }

    /// Where the news come out. They wait there without bound: whoever starts a link takes them.
    #[must_use]
    pub fn news(&self) -> &Receiver<News> {
        &self.news
    }
}

impl Drop for ControlLink {
    fn drop(&mut self) {
        self.signal.stop.store(true, Ordering::Release);
        self.signal.notify.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the process, or fails the test that it happened in.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_url_is_taken() {
        for good in ["http://127.0.0.1:7440", "http://[::1]:7440/", "http://ctl.example.org:1"] {
            endpoint(good).expect(good);
        }
        for bad in
            ["127.0.0.1:7440", "https://h:1", "http://h", "http://h:1/x", "http://h:0", "", "http://a b:1"]
        {
            let error = endpoint(bad).expect_err(bad).to_string();
            assert!(error.contains("write http://HOST:PORT"), "{error}");
        }
    }
}
