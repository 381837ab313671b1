//! A file system with one file, on a disk that forgets what was not synced when it is told to lose power.
//!
//! It runs inside the test (FUSE), so a server opens an ordinary file, with O_DIRECT if it likes. Answers to writes
//! come a moment late and out of order, and a sync covers only the writes that were answered before it: a server
//! that takes "submitted" for "done" is found out. Needs /dev/fuse and the right to mount.

mod media;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

pub use self::media::{Cut, Media};

const FILE: INodeNo = INodeNo(2);
/// Attributes may change under the kernel's feet, so it must ask each time.
const NOT_CACHED: Duration = Duration::ZERO;
/// Writes whose answers are held back together and shuffled.
const HELD_MAX: usize = 4;

/// The mounted file system; unmounted when dropped.
#[derive(Debug)]
pub struct PowerCutFs {
    disk: Arc<Disk>,
    file: PathBuf,
    session: Option<BackgroundSession>,
}

#[derive(Debug)]
struct Disk {
    media: Mutex<Media>,
    exists: Mutex<bool>,
    random: AtomicU64,
}

impl Disk {
    fn media(&self) -> MutexGuard<'_, Media> {
        self.media.lock().expect("no holder panics")
    }

    fn random(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl PowerCutFs {
    /// Mounts it on an empty folder.
    ///
    /// # Panics
    /// If that is not possible; the message says what it needs.
    #[must_use]
    pub fn mount(folder: &Path, seed: u64) -> PowerCutFs {
        std::fs::create_dir_all(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let disk = Arc::new(Disk {
            media: Mutex::new(Media::default()),
            exists: Mutex::new(false),
            random: AtomicU64::new(seed),
        });
        let (held, answers) = mpsc::channel();
        let answering = Arc::clone(&disk);
        thread::spawn(move || answer_writes(&answering, &answers));
        let front = Front { disk: Arc::clone(&disk), held };
        let session = fuser::spawn_mount(front, folder, &Config::default()).unwrap_or_else(|error| {
            panic!(
                "cannot mount on {}: {error}; needs root or fusermount3 (apt-get install fuse3)",
                folder.display()
            )
        });
        PowerCutFs { disk, file: folder.join("pool"), session: Some(session) }
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The power goes and comes back; nobody has the file open. Returns how many writes were at stake.
    #[must_use]
    pub fn cut(&self, how: Cut) -> usize {
        let mut media = self.disk.media();
        let pending = media.pending();
        media.cut(how, || self.disk.random());
        pending
    }
}

impl Drop for PowerCutFs {
    fn drop(&mut self) {
        if let Some(session) = self.session.take()
            && let Err(error) = session.umount_and_join()
        {
            eprintln!("unmounting {}: {error}", self.file.display());
        }
    }
}

/// Answers writes in another order than they came in.
fn answer_writes(disk: &Disk, held: &mpsc::Receiver<(u64, u32, ReplyWrite)>) {
    while let Ok(first) = held.recv() {
        let mut batch = vec![first];
        while batch.len() < HELD_MAX
            && let Ok(next) = held.recv_timeout(Duration::from_micros(50 + disk.random() % 150))
        {
            batch.push(next);
        }
        while !batch.is_empty() {
            let position = usize::try_from(disk.random() % batch.len() as u64).expect("a position");
            let (number, length, reply) = batch.swap_remove(position);
            disk.media().answer(number);
            reply.written(length);
        }
    }
}

struct Front {
    disk: Arc<Disk>,
    held: mpsc::Sender<(u64, u32, ReplyWrite)>,
}

impl Front {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let folder = inode == INodeNo::ROOT;
        let size = self.disk.media().len() as u64;
        FileAttr {
            ino: inode,
            size: if folder { 0 } else { size },
            blocks: if folder { 0 } else { size.div_ceil(512) },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if folder { FileType::Directory } else { FileType::RegularFile },
            perm: if folder { 0o755 } else { 0o644 },
            nlink: if folder { 2 } else { 1 },
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn exists(&self) -> MutexGuard<'_, bool> {
        self.disk.exists.lock().expect("no holder panics")
    }
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).expect("a 64-bit machine")
}

impl Filesystem for Front {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "pool" && *self.exists() {
            reply.entry(&NOT_CACHED, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&NOT_CACHED, &self.attributes(inode));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.disk.media().resize(position(size));
        }
        reply.attr(&NOT_CACHED, &self.attributes(inode));
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        if name != "pool" {
            return reply.error(Errno::ENOSPC);
        }
        *self.exists() = true;
        let attributes = self.attributes(FILE);
        reply.created(&NOT_CACHED, &attributes, Generation(0), FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(self.disk.media().read(position(offset), size as usize));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let number = self.disk.media().write(position(offset), data);
        let length = u32::try_from(data.len()).expect("the kernel splits writes");
        self.held.send((number, length, reply)).expect("the answering thread lives as long as this");
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.disk.media().sync();
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // Only plain preallocation; servers must do without the rest on many file systems anyway.
        if mode != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let end = position(offset + length);
        let mut media = self.disk.media();
        if end > media.len() {
            media.resize(end);
        }
        drop(media);
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use super::*;
    use crate::harness::Scratch;

    #[test]
    fn a_mounted_file_keeps_what_was_synced_and_takes_direct_io() {
        let scratch = Scratch::new("power-cut-fs");
        let fs = PowerCutFs::mount(&scratch.file("mount"), 1);
        let open = || {
            // O_DIRECT needs aligned memory: a slice of a larger vector that starts on a page.
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .custom_flags(nix::libc::O_DIRECT)
                .open(fs.file())
                .expect("a file")
        };
        let file = open();
        file.set_len(1 << 20).expect("a size");
        file.write_all_at(&[1; 8192], 4096).expect("a write");
        file.sync_data().expect("a sync");
        file.write_all_at(&[2; 8192], 4096).expect("a write");
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 4096).expect("a read");
        assert_eq!(bytes, [2; 4096]);
        drop(file);
        assert!(fs.cut(Cut::Nothing) > 0);
        open().read_exact_at(&mut bytes, 8192).expect("a read");
        assert_eq!(bytes, [1; 4096]);
    }
}
