//! `berth ctl` as a child process, and nodes' links to it.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use datapath::record::{NodeId, Record, VolumeNumber};
use nbd_server::control::convert::NodeFacts;
use nbd_server::control::link::{ControlLink, LinkSettings, News};
use nbd_server::random::random_number;

use super::network::Place;
use super::server::berth_at;

/// What has not happened by then never will.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A ctl that is ready. Dropped, it is killed.
#[derive(Debug)]
pub struct Ctl {
    child: Child,
    place: Place,
    store: PathBuf,
    listen: String,
    arguments: Vec<String>,
}

impl Ctl {
    /// Starts it on this store, on a port of its own.
    ///
    /// # Panics
    /// If it does not get ready.
    #[must_use]
    pub fn start(store: &Path) -> Ctl {
        Ctl::start_with(store, &[])
    }

    /// The same with more arguments.
    ///
    /// # Panics
    /// If it does not get ready.
    #[must_use]
    pub fn start_with(store: &Path, arguments: &[&str]) -> Ctl {
        // A restart must listen where the nodes look: the port is chosen here. Another process may take it meanwhile,
        // which would fail the test and prove nothing wrong.
        let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Ctl::start_at(&Place::here(), store, &free.to_string(), arguments)
    }

    /// Starts it on this store, on a machine of its own.
    ///
    /// # Panics
    /// If it does not get ready.
    #[must_use]
    pub fn start_on(place: &Place, store: &Path) -> Ctl {
        Ctl::start_at(place, store, &format!("{}:7440", place.address()), Vec::new())
    }

    fn start_at(place: &Place, store: &Path, listen: &str, arguments: Vec<String>) -> Ctl {
        let mut command = berth_at(place, &["ctl", "--listen", listen]);
        if place.is_apart() {
            command.arg("--insecure");
        }
        command.arg(format!("--store=redb:{}", store.display())).args(&arguments);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("text");
        let url = line.trim().strip_prefix("ready http://");
        assert_eq!(url, Some(listen), "berth ctl says {line:?}");
        Ctl { child, place: place.clone(), store: store.to_owned(), listen: listen.to_owned(), arguments }
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// A command of the binary that talks to it.
    #[must_use]
    pub fn command(&self, words: &str) -> Command {
        let mut command = berth_at(&self.place, &words.split(' ').collect::<Vec<_>>());
        command.arg(format!("--ctl={}", self.url()));
        command
    }

    /// Kill -9.
    ///
    /// # Panics
    /// If it had ended before, by itself.
    pub fn kill(&mut self) {
        let ended = self.child.try_wait().expect("our child");
        assert!(ended.is_none(), "ctl ended by itself: {ended:?}");
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }

    /// Starts it again in the same place.
    pub fn restart(&mut self) {
        *self = Ctl::start_at(&self.place, &self.store, &self.listen, self.arguments.clone());
    }

    /// SIGTERM. Returns how long it took to end.
    ///
    /// # Panics
    /// If it reports a failure, or does not end.
    pub fn stop(&mut self) -> Duration {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        let start = Instant::now();
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("our child");
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                assert!(status.success(), "ctl ended with {status}");
                return start.elapsed();
            }
            assert!(start.elapsed() < PATIENCE, "ctl does not end");
            thread::park_timeout(Duration::from_millis(2));
        }
    }
}

impl Drop for Ctl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A node's link, with what it has told.
#[derive(Debug)]
pub struct Node {
    /// The link.
    pub link: ControlLink,
    /// Its number.
    pub id: NodeId,
    /// How often the waker was called.
    pub woken: Arc<AtomicU64>,
    taken: u64,
    versions: BTreeMap<VolumeNumber, u64>,
}

impl Node {
    /// Joins.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn join(url: &str, name: &str) -> Node {
        let woken = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&woken);
        let settings = LinkSettings {
            facts: NodeFacts::default(),
            ctl: url.to_owned(),
            name: name.parse().expect("a name"),
            boot: random_number().expect("a number"),
            nbd: None,
            peer: "127.0.0.1:7441".to_owned(),
            wake: Arc::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            }),
        };
        let link = ControlLink::start(settings).expect("a link");
        let mut node = Node { link, id: NodeId(0), woken, taken: 0, versions: BTreeMap::new() };
        node.id = node.wait_for("a number", |news| match news {
            News::Joined(id) => Some(id),
            _ => None,
        });
        node
    }

    /// The next piece of news, if there is one in time. Checks that versions never fall.
    ///
    /// # Panics
    /// If one does.
    pub fn next_news(&mut self, most: Duration) -> Option<News> {
        let news = self.link.news().recv_timeout(most).ok()?;
        self.taken += 1;
        if let News::Record(record) = &news {
            let before = self.versions.insert(record.volume, record.version);
            assert!(before <= Some(record.version), "{before:?}, then {record:?}");
        }
        Some(news)
    }

    /// Waits until there was a wake for each piece of news that was taken.
    ///
    /// # Panics
    /// If there is none.
    pub fn check_wakes(&self) {
        let start = Instant::now();
        // The wake comes after the news.
        while self.woken.load(Ordering::SeqCst) < self.taken {
            assert!(start.elapsed() < PATIENCE, "no wake for {} pieces of news", self.taken);
            thread::yield_now();
        }
    }

    /// Takes news until `wanted` finds something in it.
    ///
    /// # Panics
    /// If that does not come.
    pub fn wait_for<T>(&mut self, what: &str, mut wanted: impl FnMut(News) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let news = self.next_news(left).unwrap_or_else(|| panic!("no news of {what}"));
            if let Some(found) = wanted(news) {
                return found;
            }
        }
    }

    /// Waits for a version of the volume that is not older than this one.
    pub fn wait_for_version(&mut self, volume: VolumeNumber, version: u64) -> Record {
        self.wait_for(&format!("version {version} of {volume:?}"), |news| match news {
            News::Record(record) if record.volume == volume && record.version >= version => Some(*record),
            _ => None,
        })
    }
}
