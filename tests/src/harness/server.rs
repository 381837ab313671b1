//! `berth serve` as a child process.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::network::Place;
use super::tools::dying_with_us;
use super::{Scratch, target_folder};

/// Recovery included, a server that is not ready by then never will be.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How to start a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// The pool file; made by the first start.
    pub pool: PathBuf,
    /// Size of the pool in MiB.
    pub pool_mib: u64,
    /// Names and sizes in MiB.
    pub volumes: Vec<(String, u64)>,
    /// The socket it listens on.
    pub socket: PathBuf,
    /// Threads.
    pub threads: u32,
    /// Further arguments of `berth serve`.
    pub more: Vec<String>,
}

impl Options {
    /// One volume `v` of this size in a pool twice as large, on two threads.
    #[must_use]
    pub fn new(scratch: &Scratch, volume_mib: u64) -> Options {
        Options {
            pool: scratch.file("pool"),
            pool_mib: volume_mib * 2,
            volumes: vec![("v".to_owned(), volume_mib)],
            socket: scratch.socket("nbd"),
            threads: 2,
            more: Vec::new(),
        }
    }
}

/// A command of the binary under test.
#[must_use]
pub fn berth(arguments: &[&str]) -> Command {
    berth_at(&Place::here(), arguments)
}

/// The same on a machine of a network.
///
/// # Panics
/// If the binary's path is not UTF-8.
#[must_use]
pub fn berth_at(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command(binary().to_str().expect("a path in UTF-8"));
    command.args(arguments);
    command
}

/// A server that is ready. Dropped without being stopped, it is killed.
#[derive(Debug)]
pub struct Server {
    child: Child,
    uris: Vec<String>,
    metrics: Option<String>,
}

/// The binary under test: `BERTH_BIN`, or the one built beside the tests.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn binary() -> PathBuf {
    let path = std::env::var_os("BERTH_BIN").map_or_else(|| target_folder().join("berth"), PathBuf::from);
    let how = "cargo build --release -p berth, or set BERTH_BIN";
    assert!(path.exists(), "{} is missing: {how}", path.display());
    path
}

impl Server {
    /// Starts it, and returns when it has said that each volume is served.
    ///
    /// # Panics
    /// If it ends or is not ready in time.
    #[must_use]
    pub fn start(options: &Options) -> Server {
        let mut command = dying_with_us(binary().to_str().expect("a path in UTF-8"));
        command
            .arg("serve")
            .arg("--pool")
            .arg(&options.pool)
            .arg(format!("--pool-size={}M", options.pool_mib));
        for (name, size_mib) in &options.volumes {
            command.arg(format!("--volume={name}={size_mib}M"));
        }
        command.arg(format!("--nbd=unix:{}", options.socket.display()));
        command.arg(format!("--threads={}", options.threads)).args(&options.more);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (tell, told) = mpsc::channel();
        // Reads to the end, also what comes later: a full pipe would stop the server.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // Nobody listens any more once all are ready.
                let _ = tell.send(line);
            }
        });
        let mut server = Server { child, uris: Vec::new(), metrics: None };
        while server.uris.len() < options.volumes.len() {
            let line = told.recv_timeout(READY_TIMEOUT).unwrap_or_else(|_| {
                panic!("berth serve was not ready: {:?}", server.child.try_wait());
            });
            match line.split_once(' ') {
                Some(("ready", uri)) => server.uris.push(uri.to_owned()),
                Some(("metrics", url)) => server.metrics = Some(url.to_owned()),
                _ => panic!("berth serve says {line:?}"),
            }
        }
        server
    }

    /// Where the first volume is.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uris[0]
    }

    /// Where all volumes are.
    #[must_use]
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// Kill -9. Returns when the process is gone.
    ///
    /// # Panics
    /// If it had ended before, by itself.
    pub fn kill(&mut self) {
        let ended = self.child.try_wait().expect("our child");
        assert!(ended.is_none(), "the server ended by itself: {ended:?}");
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }

    /// SIGTERM. Returns when the process has ended by itself.
    ///
    /// # Panics
    /// If it reports a failure.
    pub fn stop(mut self) {
        self.terminate();
        let status = self.child.wait().expect("our child");
        assert!(status.success(), "the server ended with {status}");
    }

    /// SIGTERM, and nothing more.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("our child");
    }

    /// How the process ended, if it does within this time.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn wait_at_most(&mut self, most: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + most;
        loop {
            match self.child.try_wait().expect("our child") {
                None if Instant::now() < deadline => thread::park_timeout(Duration::from_millis(2)),
                ended => return ended,
            }
        }
    }

    /// Where the metrics are.
    ///
    /// # Panics
    /// If the server was not told to serve them.
    #[must_use]
    pub fn metrics_url(&self) -> &str {
        self.metrics.as_deref().expect("--metrics was given")
    }

    /// Is it still there?
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    /// Most memory that it ever held, in KiB.
    ///
    /// # Panics
    /// If the process is gone.
    #[must_use]
    pub fn peak_memory_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line VmHWM");
        line.trim().trim_end_matches(" kB").parse().expect("a number of KiB")
    }

    /// CPU time used so far, in seconds.
    ///
    /// # Panics
    /// If the process is gone.
    #[must_use]
    pub fn cpu_seconds(&self) -> f64 {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = fs::read_to_string(path).expect("a running process");
        let (_, fields) = stat.rsplit_once(") ").expect("the name is in parentheses");
        // utime and stime are the fields 14 and 15 of proc_pid_stat(5), in hundredths of a second.
        let ticks = fields.split(' ').skip(11).take(2).map(|n| n.parse::<u32>().expect("a number"));
        f64::from(ticks.sum::<u32>()) / 100.0
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
