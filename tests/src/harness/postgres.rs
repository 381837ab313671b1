//! A PostgreSQL server of the test's own, run as the user `postgres`, and its tools.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use super::Scratch;
use super::tools::{dying_with_us, run, tool};

/// Recovery included, a server that takes no connection by then never will.
const READY_TIMEOUT: Duration = Duration::from_secs(90);
/// A server that has not ended by then after a signal never will.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// Where Debian keeps the programs, one folder for each major version.
const PROGRAMS: &str = "/usr/lib/postgresql";

/// Many checkpoints, as little as possible hidden in memory, and no second life after a crash.
const SETTINGS: [&str; 9] = [
    "listen_addresses=",
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "checkpoint_timeout=30s",
    "max_wal_size=64MB",
    "shared_buffers=16MB",
    "restart_after_crash=off",
    "log_checkpoints=on",
];

/// A program of the newest version that is installed.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let versions = fs::read_dir(PROGRAMS).into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists());
    found.max().unwrap_or_else(|| panic!("`{name}` is missing in {PROGRAMS}: apt-get install postgresql"))
}

/// A program run as the user `postgres`: the server refuses to be root.
fn as_postgres(name: &str) -> Command {
    let mut command = dying_with_us("setpriv");
    // Changing the user makes the kernel forget the signal, so the second one asks for it again.
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig", "KILL", "--"]);
    command.arg(program(name));
    command
}

/// A server that takes connections. Dropped, it is put down.
#[derive(Debug)]
pub struct Postgres {
    child: Child,
    sockets: PathBuf,
}

/// Makes an empty database cluster with checksums in the folder `data`.
///
/// # Panics
/// If that fails.
pub fn make_cluster(data: &Path) {
    // For the messages that name packages.
    let _ = tool("setpriv");
    let user = User::from_name("postgres").expect("the list of users");
    let user = user.expect("the package postgresql makes the user `postgres`");
    fs::create_dir_all(data)
        .and_then(|()| chown(data, Some(user.uid.as_raw()), Some(user.gid.as_raw())))
        .unwrap_or_else(|error| panic!("{}: {error}", data.display()));
    let options = ["--data-checksums", "--auth=trust", "--no-locale", "--encoding=UTF8"];
    run(as_postgres("initdb").args(options).arg("-D").arg(data));
}

/// Verifies the checksum of every page of a stopped cluster.
///
/// # Panics
/// If one is wrong.
pub fn check_checksums(data: &Path) {
    let output = run(as_postgres("pg_checksums").arg("--check").arg("-D").arg(data));
    assert!(output.contains("Bad checksums:  0"), "{output}");
}

impl Postgres {
    /// Starts a server, and returns when it has recovered and takes connections.
    ///
    /// # Panics
    /// With its log, if it does not.
    #[must_use]
    pub fn start(scratch: &Scratch, data: &Path) -> Postgres {
        let sockets = scratch.socket("postgres");
        let owner = fs::metadata(data).expect("a cluster");
        fs::create_dir_all(&sockets)
            .and_then(|()| {
                use std::os::unix::fs::MetadataExt as _;
                chown(&sockets, Some(owner.uid()), Some(owner.gid()))
            })
            .unwrap_or_else(|error| panic!("{}: {error}", sockets.display()));
        let path = scratch.file("postgres.log");
        let log = File::options().create(true).append(true).open(&path).expect("a log file");
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(data).arg("-k").arg(&sockets);
        SETTINGS.iter().for_each(|setting| {
            command.args(["-c", setting]);
        });
        let child = command.stdin(Stdio::null()).stderr(log).spawn().expect("setpriv starts");
        let mut postgres = Postgres { child, sockets };
        let deadline = Instant::now() + READY_TIMEOUT;
        while !postgres.client("pg_isready").stdout(Stdio::null()).status().expect("it runs").success() {
            let ended = postgres.child.try_wait().expect("our child");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "postgres is not ready: {ended:?}\n{}",
                fs::read_to_string(&path).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(20));
        }
        postgres
    }

    /// A client program, told where the server is.
    #[must_use]
    pub fn client(&self, name: &str) -> Command {
        let mut command = tool(program(name).to_str().expect("a path in UTF-8"));
        command.env("PGHOST", &self.sockets).env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    /// The lines that a statement answers, without decoration; columns are separated by `|`.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn query(&self, sql: &str) -> Vec<String> {
        let output =
            run(self.client("psql").args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql]));
        output.lines().map(str::to_owned).collect()
    }

    /// Checks every table and index of every database, and that each index entry's row is there and the other way round.
    ///
    /// # Panics
    /// If anything is wrong.
    pub fn check_tables(&self) {
        run(self.client("pg_amcheck").args([
            "--all",
            "--install-missing",
            "--heapallindexed",
            "--parent-check",
        ]));
    }

    /// An orderly shutdown, with a checkpoint.
    ///
    /// # Panics
    /// If the server reports a failure.
    pub fn stop(mut self) {
        let status = self.end_with(Signal::SIGINT).expect("the server stops");
        assert!(status.success(), "postgres ended with {status}");
    }

    /// Tells the server to end at once, all its processes with it, without a word to the disk.
    pub fn put_down(&self) {
        let _ = kill(self.pid(), Signal::SIGQUIT);
    }

    /// Like [`Postgres::put_down`], and waits until they are gone.
    ///
    /// # Panics
    /// If they do not end.
    pub fn crash(mut self) {
        self.end_with(Signal::SIGQUIT).expect("the server ends");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"))
    }

    /// How it ended after this signal, if it did in time.
    fn end_with(&mut self, signal: Signal) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            // Again and again: one that comes while the server starts a process may be lost.
            let _ = kill(self.pid(), signal);
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.end_with(Signal::SIGQUIT).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
