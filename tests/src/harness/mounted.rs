//! A volume as a mounted ext4, without the kernel's NBD driver: nbdfuse shows the volume as a file, and the loop driver
//! makes a block device of the file. Flushes come all the way through: ext4 asks the block device, the loop driver
//! syncs the file, and nbdfuse sends a FLUSH.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::Scratch;
use super::tools::{dying_with_us, run, tool};

/// nbdfuse that has not connected by then never will.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// nbdfuse that has not ended by then after its file was unmounted never will.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Gives this thread, and all that it starts, mounts of its own. They and their loop devices go with the last process
/// that sees them, so not even a test that is killed leaves any behind.
///
/// # Panics
/// Without the right to do so.
pub fn keep_mounts_private() {
    unshare(CloneFlags::CLONE_NEWNS).expect("run this as root: the test mounts a filesystem");
    run(tool("mount").args(["--make-rprivate", "/"]));
}

/// A volume as a file, and mounted if [`Mounted::mount`] was called. Dropped, everything is taken down.
#[derive(Debug)]
pub struct Mounted {
    nbdfuse: Child,
    folder: PathBuf,
    mountpoint: PathBuf,
    is_mounted: bool,
}

impl Mounted {
    /// Attaches the volume. [`keep_mounts_private`] comes first.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn attach(scratch: &Scratch, uri: &str) -> Mounted {
        let (folder, mountpoint) = (scratch.socket("fuse"), scratch.socket("mount"));
        for one in [&folder, &mountpoint] {
            std::fs::create_dir_all(one).unwrap_or_else(|error| panic!("{}: {error}", one.display()));
        }
        let ready = scratch.socket("nbdfuse.pid");
        let _ = std::fs::remove_file(&ready);
        // For the message that names the package.
        let _ = tool("nbdfuse");
        let mut command = dying_with_us("nbdfuse");
        command.arg("-P").arg(&ready).arg(&folder).arg(uri).stdin(Stdio::null());
        let nbdfuse = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut mounted = Mounted { nbdfuse, folder, mountpoint, is_mounted: false };
        let deadline = Instant::now() + READY_TIMEOUT;
        while !ready.exists() {
            let ended = mounted.nbdfuse.try_wait().expect("our child");
            assert!(ended.is_none() && Instant::now() < deadline, "nbdfuse shows no file: {ended:?}");
            thread::sleep(Duration::from_millis(5));
        }
        mounted
    }

    /// The volume as a file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.join("nbd")
    }

    /// Makes an ext4 on it.
    ///
    /// # Panics
    /// If that fails.
    pub fn make_ext4(&self) {
        run(tool("mkfs.ext4").args(["-q", "-F"]).arg(self.file()));
    }

    /// Checks the unmounted ext4, and changes nothing.
    ///
    /// # Panics
    /// If anything is wrong with it.
    pub fn check_ext4(&self) {
        assert!(!self.is_mounted, "a mounted filesystem cannot be checked");
        run(tool("e2fsck").args(["-f", "-n"]).arg(self.file()));
    }

    /// Mounts the ext4, which replays its journal, and returns where.
    ///
    /// # Panics
    /// If that fails.
    pub fn mount(&mut self) -> &Path {
        run(tool("mount")
            .args(["-t", "ext4", "-o", "loop,errors=remount-ro"])
            .arg(self.file())
            .arg(&self.mountpoint));
        self.is_mounted = true;
        &self.mountpoint
    }

    /// Unmounts the ext4 and frees its loop device. Works with a server that is gone, too.
    ///
    /// # Panics
    /// If that fails: someone still uses it.
    pub fn unmount(&mut self) {
        run(tool("umount").arg(&self.mountpoint));
        self.is_mounted = false;
    }

    /// Unmounts everything and waits until nbdfuse has ended. Its status is not looked at: with a server that is gone it
    /// may report that.
    ///
    /// # Panics
    /// If that fails.
    pub fn detach(mut self) {
        if self.is_mounted {
            self.unmount();
        }
        let deadline = Instant::now() + END_TIMEOUT;
        // The kernel gives a loop device up some time after its last user has gone.
        while !Command::new("umount")
            .arg(&self.folder)
            .stderr(Stdio::null())
            .status()
            .expect("umount")
            .success()
        {
            assert!(Instant::now() < deadline, "{} stays busy", self.folder.display());
            thread::sleep(Duration::from_millis(10));
        }
        while self.nbdfuse.try_wait().expect("our child").is_none() {
            assert!(Instant::now() < deadline, "nbdfuse does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for place in [&self.mountpoint, &self.folder] {
            // What is not mounted any more fails here, which is well.
            let _ = Command::new("umount").arg("--lazy").arg(place).stderr(Stdio::null()).status();
        }
        let _ = self.nbdfuse.kill();
        let _ = self.nbdfuse.wait();
    }
}
