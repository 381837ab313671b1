//! Starts the real binary and the real clients, and cleans up after them however a test ends.

pub mod blocks;
pub mod client;
pub mod cluster;
pub mod ctl;
pub mod http;
pub mod metrics;
pub mod mounted;
pub mod network;
pub mod postgres;
pub mod rot;
pub mod server;
pub mod tools;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use berth::bench::Control;

static SCRATCH_NUMBER: AtomicU32 = AtomicU32::new(0);

/// Does the run have time for the full-size tests?
#[must_use]
pub fn full_tier() -> bool {
    std::env::var_os("BERTH_FULL").is_some()
}

/// Says what a test measured, on a line of its own: `tests/run --full` shows it.
pub fn print_figure(text: &str) {
    // The name of the running test may stand before it on the same line.
    println!("\nfigure: {text}");
}

/// A test's own folders, removed with it: a large one on the disk of the build, and a short path for sockets.
#[derive(Debug)]
pub struct Scratch {
    disk: PathBuf,
    sockets: PathBuf,
}

impl Scratch {
    /// Makes both.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn new(name: &str) -> Scratch {
        let unique = format!("{}-{}", std::process::id(), SCRATCH_NUMBER.fetch_add(1, Ordering::Relaxed));
        let target = target_folder();
        let disk = target.join("scratch").join(format!("{name}-{unique}"));
        // The address of a unix socket holds 108 bytes, which the path of a build folder may exceed.
        let sockets = PathBuf::from(format!("/tmp/berth-{unique}"));
        for folder in [&disk, &sockets] {
            std::fs::create_dir_all(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        }
        Scratch { disk, sockets }
    }

    /// A file on the disk of the build.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.disk.join(name)
    }

    /// A socket.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(name)
    }

    /// A file of this size in MiB, filled with noise, with a hole in its second quarter.
    ///
    /// # Panics
    /// If it cannot be written.
    #[must_use]
    pub fn image(&self, name: &str, size_mib: u64) -> PathBuf {
        let file = self.file(name);
        let script = format!(
            "openssl enc -aes-128-ctr -nosalt -pass pass:berth -in /dev/zero 2>/dev/null | \
             head -c {size_mib}M > {path} && fallocate -p -o {from}M -l {len}M {path}",
            path = file.display(),
            from = size_mib / 4,
            len = size_mib / 4
        );
        tools::run(Command::new("sh").args(["-c", &script]));
        file
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A failed test leaves its files to look at.
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.disk);
        }
        let _ = std::fs::remove_dir_all(&self.sockets);
    }
}

/// Waits until a load has all its connections, or has ended: a server that is killed earlier was never there for it, and
/// that ends a load.
#[expect(clippy::disallowed_methods, reason = "it looks at the condition now and then")]
pub fn wait_until_begun(control: &Control, has_ended: impl Fn() -> bool) {
    while !control.has_begun() && !has_ended() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The build folder that the running test lies in: `target/PROFILE/deps/TEST`.
///
/// # Panics
/// If the test lies elsewhere.
#[must_use]
pub fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the test");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    profile.to_path_buf()
}
