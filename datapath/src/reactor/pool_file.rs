//! The file or block device that holds a pool: opened past the page cache, and by one process only.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{major, minor};
use thiserror::Error;

use crate::units::{BLOCK_BYTES_U64, BLOCK_BYTES_USIZE};

/// Bytes copied at once where the caller's memory cannot be used for direct I/O.
const BOUNCE_BYTES: usize = 1 << 20;
/// Direct I/O wants memory that starts at a multiple of this; devices need 4 to 512, and the arena has it.
const MEMORY_ALIGNMENT_BYTES: usize = 512;

/// How long a dead process may hold the pool. Requests that it had under way end within this on any healthy device.
const LOCK_WAIT: Duration = Duration::from_secs(3);

/// Why a pool's file cannot be used.
#[derive(Debug, Error)]
pub enum PoolFileError {
    /// Opening failed.
    #[error("{path}: cannot open the pool: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("{path}: the pool is in use by another process")]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// There is something already.
    #[error("{path}: exists already; a new pool is not put over it")]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// A directory, a socket, a character device.
    #[error("{path}: neither a regular file nor a block device")]
    NotStorage {
        /// Which.
        path: PathBuf,
    },
    /// The device's blocks are larger than the pool's.
    #[error("{path}: the device has logical blocks of {block_bytes} bytes; at most 4096 are supported")]
    BlockSize {
        /// Which.
        path: PathBuf,
        /// The device's.
        block_bytes: u64,
    },
    /// Space could not be had.
    #[error("{path}: cannot allocate {length_bytes} bytes: {source}")]
    Allocate {
        /// Which.
        path: PathBuf,
        /// How many.
        length_bytes: u64,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Block devices cannot grow from here, and no pool shrinks.
    #[error("{path}: has {length_bytes} bytes and cannot become {wanted_bytes}")]
    CannotGrow {
        /// Which.
        path: PathBuf,
        /// Its length.
        length_bytes: u64,
        /// What was asked for.
        wanted_bytes: u64,
    },
    /// Anything else.
    #[error("{path}: {step}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}

/// An open pool, locked until it is dropped.
#[derive(Debug)]
pub struct PoolFile {
    path: PathBuf,
    file: Arc<File>,
    length_bytes: u64,
    is_block_device: bool,
    is_direct: bool,
    has_volatile_cache: bool,
}

impl PoolFile {
    /// Opens a pool that exists.
    ///
    /// # Errors
    /// If it does not, is in use, or is no storage.
    pub fn open(path: &Path) -> Result<PoolFile, PoolFileError> {
        let kind = fs::metadata(path).map_err(|source| open_error(path, source))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(PoolFileError::NotStorage { path: path.to_owned() });
        }
        // On a block device O_EXCL keeps out mounts and other pools; on a file it would mean something else.
        let exclusive = if kind.is_block_device() { libc::O_EXCL } else { 0 };
        let (file, is_direct) = open_direct(path, exclusive, false)?;
        PoolFile::finish_open(path, file, is_direct)
    }

    /// Is the pool a file in a filesystem, whose blocks cost more at their first write?
    #[must_use]
    pub fn is_regular_file(&self) -> bool {
        !self.is_block_device
    }

    /// Makes a pool of `length_bytes`, allocated in full, so that no write can find the filesystem full later.
    ///
    /// # Errors
    /// If there is something of that name, or not enough space; nothing is left behind then.
    pub fn create(path: &Path, length_bytes: u64) -> Result<PoolFile, PoolFileError> {
        let (file, is_direct) = open_direct(path, libc::O_EXCL, true)?;
        let created = PoolFile::finish_open(path, file, is_direct).and_then(|mut pool| {
            pool.grow(length_bytes)?;
            sync_directory_of(path)?;
            Ok(pool)
        });
        if created.is_err() {
            // Ours, and of no use to anybody.
            let _ = fs::remove_file(path);
        }
        created
    }

    fn finish_open(path: &Path, file: File, is_direct: bool) -> Result<PoolFile, PoolFileError> {
        let file = Arc::new(file);
        lock(path, &file)?;
        let metadata = file.metadata().map_err(io_error(path, "stat"))?;
        let is_block_device = metadata.file_type().is_block_device();
        let queue = QueueLimits::of(if is_block_device { metadata.rdev() } else { metadata.dev() });
        if let Some(block_bytes) = queue.logical_block_bytes.filter(|bytes| *bytes > BLOCK_BYTES_U64) {
            return Err(PoolFileError::BlockSize { path: path.to_owned(), block_bytes });
        }
        let mut pool = PoolFile {
            path: path.to_owned(),
            file,
            length_bytes: 0,
            is_block_device,
            is_direct,
            has_volatile_cache: queue.has_volatile_cache,
        };
        pool.length_bytes = pool.measure()?;
        Ok(pool)
    }

    fn measure(&self) -> Result<u64, PoolFileError> {
        use std::io::{Seek, SeekFrom};
        // Unlike the metadata, the end is right for block devices too.
        (&*self.file).seek(SeekFrom::End(0)).map_err(io_error(&self.path, "length"))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For the reactor. The lock lasts until this is dropped as well.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Bytes, rounded down to whole blocks.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes - self.length_bytes % BLOCK_BYTES_U64
    }

    /// Does I/O go past the page cache? Where the filesystem refuses that, everything works, but memory is
    /// used twice and a write is acknowledged by the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// May a completed write be lost with the power? Then it is durable only after a sync. True if unknown.
    #[must_use]
    pub fn has_volatile_cache(&self) -> bool {
        self.has_volatile_cache || !self.is_direct
    }

    /// Makes a file longer, allocated in full. A block device must have the length already.
    ///
    /// # Errors
    /// If there is no space, or it would shrink. The length is then as before.
    pub fn grow(&mut self, length_bytes: u64) -> Result<(), PoolFileError> {
        let path = self.path.clone();
        self.length_bytes = self.measure()?;
        if length_bytes == self.length_bytes {
            return Ok(());
        }
        if length_bytes < self.length_bytes || self.is_block_device {
            let length = self.length_bytes;
            return Err(PoolFileError::CannotGrow { path, length_bytes: length, wanted_bytes: length_bytes });
        }
        if let Err(source) = self.allocate(length_bytes) {
            let _ = self.file.set_len(self.length_bytes);
            return Err(PoolFileError::Allocate { path, length_bytes, source });
        }
        self.file.sync_all().map_err(io_error(&self.path, "sync"))?;
        self.length_bytes = length_bytes;
        Ok(())
    }

    fn allocate(&self, length_bytes: u64) -> io::Result<()> {
        let too_large = |_| io::Error::from_raw_os_error(libc::EFBIG);
        let from = i64::try_from(self.length_bytes).map_err(too_large)?;
        let more = i64::try_from(length_bytes).map_err(too_large)? - from;
        match fallocate(&*self.file, FallocateFlags::empty(), from, more) {
            Ok(()) => Ok(()),
            // The filesystem cannot promise space: a write may find it full.
            Err(nix::errno::Errno::EOPNOTSUPP) => self.file.set_len(length_bytes),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes everything zero and keeps the space allocated. A new pool must not lie over the log of an old one,
    /// whose batches could be taken for its own.
    ///
    /// # Errors
    /// If the device fails. Its content is undefined then.
    pub fn erase(&self) -> Result<(), PoolFileError> {
        let failed = || io_error(&self.path, "erase");
        let length = i64::try_from(self.length_bytes).expect("a file's length");
        match fallocate(&*self.file, FallocateFlags::FALLOC_FL_ZERO_RANGE, 0, length) {
            Ok(()) => {}
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                let mut zeroes = AlignedMemory::new(BOUNCE_BYTES);
                let zeroes = zeroes.bytes_mut();
                let mut offset_bytes = 0;
                while offset_bytes < self.length_bytes() {
                    let rest = usize::try_from(self.length_bytes() - offset_bytes).unwrap_or(usize::MAX);
                    let part = &zeroes[..rest.min(BOUNCE_BYTES)];
                    self.write_at(offset_bytes, part).map_err(failed())?;
                    offset_bytes += part.len() as u64;
                }
            }
            Err(error) => return Err(failed()(error.into())),
        }
        self.file.sync_all().map_err(failed())
    }

    /// Reads blocks, waiting for them: for recovery and tools, not for the reactor's thread.
    ///
    /// # Errors
    /// If the device fails or ends before.
    ///
    /// # Panics
    /// If offset or length are not multiples of the block size.
    pub fn read_at(&self, offset_bytes: u64, memory: &mut [u8]) -> io::Result<()> {
        assert_whole_blocks(offset_bytes, memory);
        if is_aligned(memory) {
            return self.file.read_exact_at(memory, offset_bytes);
        }
        let mut bounce = AlignedMemory::new(memory.len().min(BOUNCE_BYTES));
        let mut offset_bytes = offset_bytes;
        for part in memory.chunks_mut(BOUNCE_BYTES) {
            let bounce = &mut bounce.bytes_mut()[..part.len()];
            self.file.read_exact_at(bounce, offset_bytes)?;
            part.copy_from_slice(bounce);
            offset_bytes += part.len() as u64;
        }
        Ok(())
    }

    /// Writes blocks, waiting for the device; durable only after [`PoolFile::sync`].
    ///
    /// # Errors
    /// If the device fails or ends before.
    ///
    /// # Panics
    /// If offset or length are not multiples of the block size.
    pub fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        assert_whole_blocks(offset_bytes, bytes);
        if is_aligned(bytes) {
            return self.file.write_all_at(bytes, offset_bytes);
        }
        let mut bounce = AlignedMemory::new(bytes.len().min(BOUNCE_BYTES));
        let mut offset_bytes = offset_bytes;
        for part in bytes.chunks(BOUNCE_BYTES) {
            let bounce = &mut bounce.bytes_mut()[..part.len()];
            bounce.copy_from_slice(part);
            self.file.write_all_at(bounce, offset_bytes)?;
            offset_bytes += part.len() as u64;
        }
        Ok(())
    }

    /// Brings to stable media all that was written before.
    ///
    /// # Errors
    /// If the device fails. A second attempt would prove nothing: the kernel may have dropped the data.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Opens with O_DIRECT; without, if the filesystem does not have it. True if it has.
fn open_direct(path: &Path, exclusive: i32, create: bool) -> Result<(File, bool), PoolFileError> {
    let open = |direct: i32| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(exclusive | direct);
        // The O_EXCL of a new file is `create_new`.
        options.create_new(create).open(path)
    };
    match open(libc::O_DIRECT) {
        Ok(file) => return Ok((file, true)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        Err(error) => return Err(open_error(path, error)),
    }
    if create {
        // A filesystem may refuse O_DIRECT after it has made the file; it is empty, and was not there before.
        let _ = fs::remove_file(path);
    }
    open(0).map(|file| (file, false)).map_err(|error| open_error(path, error))
}

/// Takes the lock, waiting for one that is about to go: the kernel takes a dead process's ring apart in the background,
/// and until its last write has ended, the ring holds the file and thereby the lock.
fn lock(path: &Path, file: &Arc<File>) -> Result<(), PoolFileError> {
    match file.try_lock() {
        Ok(()) => return Ok(()),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(source)) => return Err(io_error(path, "lock")(source)),
    }
    let (sender, receiver) = sync_channel(1);
    let waiting = Arc::clone(file);
    // A lock can be waited for only by a thread that has nothing else to do. In vain, it waits until the process ends
    // or the other one does; a lock taken then goes with the file.
    std::thread::Builder::new()
        .name("pool-lock".to_owned())
        .spawn(move || sender.send(waiting.lock()))
        .map_err(io_error(path, "start a thread"))?;
    match receiver.recv_timeout(LOCK_WAIT) {
        Ok(locked) => locked.map_err(io_error(path, "lock")),
        Err(_) => Err(PoolFileError::InUse { path: path.to_owned() }),
    }
}

fn open_error(path: &Path, source: io::Error) -> PoolFileError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => PoolFileError::InUse { path },
        Some(libc::EEXIST) => PoolFileError::Exists { path },
        _ => PoolFileError::Open { path, source },
    }
}

fn io_error(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> PoolFileError {
    move |source| PoolFileError::Io { path: path.to_owned(), step, source }
}

/// A new file is there after a loss of power only if its directory was synced.
fn sync_directory_of(path: &Path) -> Result<(), PoolFileError> {
    let parent =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(io_error(parent, "sync the directory"))
}

fn assert_whole_blocks(offset_bytes: u64, memory: &[u8]) {
    assert!(
        offset_bytes.is_multiple_of(BLOCK_BYTES_U64) && memory.len().is_multiple_of(BLOCK_BYTES_USIZE),
        "{} bytes at {offset_bytes} are not whole blocks",
        memory.len()
    );
}

fn is_aligned(memory: &[u8]) -> bool {
    memory.as_ptr().addr().is_multiple_of(MEMORY_ALIGNMENT_BYTES)
}

/// Zeroed memory that starts at a block's border.
#[derive(Debug)]
struct AlignedMemory(Vec<AlignedBlock>);

#[derive(Clone, Debug)]
#[repr(C, align(4096))]
struct AlignedBlock([u8; BLOCK_BYTES_USIZE]);

impl AlignedMemory {
    fn new(len: usize) -> AlignedMemory {
        AlignedMemory(vec![AlignedBlock([0; BLOCK_BYTES_USIZE]); len.div_ceil(BLOCK_BYTES_USIZE)])
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.0.len() * BLOCK_BYTES_USIZE;
        // SAFETY: the blocks are arrays of bytes without padding (their size is their alignment), one after the
        // other, and borrowed exclusively for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// What the kernel says about the device under a file.
#[derive(Debug)]
struct QueueLimits {
    logical_block_bytes: Option<u64>,
    has_volatile_cache: bool,
}

impl QueueLimits {
    fn of(device: u64) -> QueueLimits {
        let device = PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
        // A partition has its limits at the disk it is part of.
        let read = |name: &str| {
            ["queue", "../queue"]
                .iter()
                .find_map(|queue| fs::read_to_string(device.join(queue).join(name)).ok())
        };
        QueueLimits {
            logical_block_bytes: read("logical_block_size").and_then(|text| text.trim().parse().ok()),
            has_volatile_cache: read("write_cache").is_none_or(|text| text.trim() != "write through"),
        }
    }
}
