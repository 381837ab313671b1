//! One io_uring: setup with what the kernel has, registration, submission, and the one system call of a turn.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{EnterFlags, IoUring, Probe, opcode, squeue, types};
use thiserror::Error;

use super::features::{Feature, Features};
use super::memory::Mapping;

/// `IORING_REGISTER_RING_FDS` of linux/io_uring.h; the crate ties it to a borrow that a long-lived owner
/// cannot keep.
const REGISTER_RING_FDS: libc::c_uint = 20;

/// Why a ring could not be made.
#[derive(Debug, Error)]
pub enum RingError {
    /// The kernel or a filter refuses io_uring altogether.
    #[error(
        "io_uring is not allowed here ({0}): set the sysctl kernel.io_uring_disabled to 0 (or add the process to \
         kernel.io_uring_group), and let the container's seccomp profile pass io_uring_setup, io_uring_enter and \
         io_uring_register"
    )]
    Blocked(#[source] io::Error),
    /// The kernel is older than 5.15 or lacks an operation.
    #[error("the kernel's io_uring lacks {0}; Linux 5.15 or later is needed")]
    TooOld(&'static str),
    /// The kernel has no memory for the ring.
    #[error("no memory for the ring ({0}); raise the limit of locked memory (ulimit -l)")]
    NoMemory(#[source] io::Error),
    /// Something else went wrong in a step of the setup.
    #[error("io_uring: {step}: {source}")]
    Setup {
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}

impl RingError {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> RingError {
        move |source| RingError::Setup { step, source }
    }
}

/// How long [`Ring::enter`] waits for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Not at all.
    No,
    /// At most so many nanoseconds.
    AtMost(u64),
    /// Until there is one.
    Forever,
}

/// How long a send that did not complete at once, because its client does not read, keeps the thread from looking at
/// other completions.
const SEND_WAIT_US: u32 = 30;

/// One completion, copied out of the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) user_data: u64,
    /// Not negative: the operation's result; negative: an error number.
    pub(super) result: i32,
    pub(super) flags: u32,
}

/// Where a file is found: in the ring's table or in the process's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) number: i32,
    pub(super) registered: bool,
}

impl Target {
    pub(super) fn plain(file: &impl AsRawFd) -> Target {
        Target { number: file.as_raw_fd(), registered: false }
    }

    pub(super) fn fd(self) -> types::Fd {
        types::Fd(self.number)
    }

    pub(super) fn flags(self) -> squeue::Flags {
        if self.registered { squeue::Flags::FIXED_FILE } else { squeue::Flags::empty() }
    }
}

/// The ring of one reactor.
pub(super) struct Ring {
    io: IoUring,
    features: Features,
    /// The ring's place in its thread's table of rings.
    enter_index: Option<i32>,
    /// Calls of io_uring_enter.
    pub(super) enters: u64,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("features", &self.features).field("enters", &self.enters).finish()
    }
}

impl Ring {
    /// A ring, not yet enabled, with the best of the `allowed` features that the kernel has.
    pub(super) fn new(entries: u32, completions: u32, allowed: Features) -> Result<Ring, RingError> {
        let (io, mut features) = set_up(entries, completions, allowed)?;
        if !io.params().is_feature_ext_arg() {
            return Err(RingError::TooOld("timeouts of io_uring_enter"));
        }
        if !io.params().is_feature_nodrop() {
            return Err(RingError::TooOld("completions that are never dropped"));
        }
        let mut probe = Probe::new();
        io.submitter().register_probe(&mut probe).map_err(RingError::at("probe"))?;
        for (name, code) in OPERATIONS {
            if !probe.is_supported(code) {
                return Err(RingError::TooOld(name));
            }
        }
        // Multishot accept cannot be asked for; it came in the same release as SOCKET.
        if probe.is_supported(opcode::Socket::CODE) {
            features.insert(Feature::MultishotAccept);
        }
        if io.params().is_feature_no_iowait() {
            features.insert(Feature::NoIowait);
        }
        if io.params().is_feature_min_timeout() {
            features.insert(Feature::MinimumWait);
        }
        // These are found out by the attempt to use them.
        for feature in [
            Feature::RegisteredBuffers,
            Feature::RegisteredFiles,
            Feature::RegisteredRing,
            Feature::BufferRing,
        ] {
            features.insert(feature);
        }
        for feature in Feature::ALL {
            if !allowed.has(feature) {
                features.remove(feature);
            }
        }
        Ok(Ring { io, features, enter_index: None, enters: 0 })
    }

    pub(super) fn features(&self) -> Features {
        self.features
    }

    pub(super) fn lacks(&mut self, feature: Feature) {
        self.features.remove(feature);
    }

    /// Room for `count` files in the ring's table.
    pub(super) fn register_file_table(&mut self, count: u32) {
        if self.features.has(Feature::RegisteredFiles)
            && self.io.submitter().register_files_sparse(count).is_err()
        {
            self.lacks(Feature::RegisteredFiles);
        }
    }

    /// Puts a file into the table, if there is one.
    pub(super) fn register_file(&mut self, slot: u32, file: &impl AsRawFd) -> io::Result<Target> {
        if !self.features.has(Feature::RegisteredFiles) {
            return Ok(Target::plain(file));
        }
        self.update_file(slot, file.as_raw_fd())?;
        Ok(Target { number: i32::try_from(slot).expect("a small table"), registered: true })
    }

    /// Empties a place of the table.
    pub(super) fn unregister_file(&mut self, target: Target) {
        if target.registered {
            let slot = u32::try_from(target.number).expect("a place of the table");
            self.update_file(slot, -1).expect("a place of the table can be emptied");
        }
    }

    fn update_file(&mut self, slot: u32, fd: RawFd) -> io::Result<()> {
        let updated = self.io.submitter().register_files_update(slot, &[fd])?;
        assert_eq!(updated, 1, "one file was to be changed");
        Ok(())
    }

    /// Pins the arena, so that device I/O does not have to, each time. Without it everything works, slower.
    pub(super) fn register_memory(&mut self, mapping: &Mapping) -> Result<(), RingError> {
        if !self.features.has(Feature::RegisteredBuffers) {
            return Ok(());
        }
        // SAFETY: the parts tile the mapping, which the reactor keeps until the ring is closed and quiet.
        match unsafe { self.io.submitter().register_buffers(&mapping.registrable_parts()) } {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EPERM)) => {
                self.lacks(Feature::RegisteredBuffers);
                Ok(())
            }
            Err(error) => Err(RingError::at("register the arena")(error)),
        }
    }

    /// Registers a ring of receive buffers as group `group`.
    ///
    /// # Safety
    /// `address` is the page-aligned start of `entries` entries, and they stay until the ring is closed.
    pub(super) unsafe fn register_buffer_ring(
        &mut self,
        address: u64,
        entries: u16,
        group: u16,
    ) -> io::Result<()> {
        // SAFETY: as promised by the caller.
        unsafe { self.io.submitter().register_buf_ring_with_flags(address, entries, group, 0) }
    }

    /// Lets the ring work, for the calling thread and no other.
    pub(super) fn enable(&mut self) -> Result<(), RingError> {
        self.io.submitter().register_enable_rings().map_err(RingError::at("enable"))?;
        if self.features.has(Feature::RegisteredRing) {
            self.enter_index = self.register_itself().ok();
            if self.enter_index.is_none() {
                self.lacks(Feature::RegisteredRing);
            }
        }
        Ok(())
    }

    fn register_itself(&mut self) -> io::Result<i32> {
        #[repr(C)]
        struct Update {
            offset: u32,
            reserved: u32,
            fd: u64,
        }
        let fd = u64::try_from(self.io.as_raw_fd()).expect("an open file");
        let mut update = Update { offset: u32::MAX, reserved: 0, fd };
        // SAFETY: the structure is io_uring_rsrc_update of linux/io_uring.h; the kernel writes `offset`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.io.as_raw_fd(),
                REGISTER_RING_FDS,
                &raw mut update,
                1 as libc::c_uint,
            )
        };
        if result != 1 {
            return Err(io::Error::last_os_error());
        }
        Ok(i32::try_from(update.offset).expect("a small table"))
    }

    /// Queues a submission. A full queue is handed to the kernel first.
    ///
    /// # Safety
    /// What the entry points to stays valid and is left alone until its completion.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: as promised by the caller.
            if unsafe { self.io.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(Wait::No, 0)?;
        }
    }

    /// Hands over what is queued and waits for a completion as long as `wait` says. Being interrupted, or the
    /// kernel having no memory for a moment, is no error: the caller comes again.
    ///
    /// `sends` of what is queued will most likely complete at once and bring no news: the thread sleeps on until
    /// something else happens too.
    pub(super) fn enter(&mut self, wait: Wait, sends: u32) -> io::Result<()> {
        let (mut minimum, timeout): (libc::c_uint, _) = match wait {
            Wait::No => (0, None),
            Wait::AtMost(ns) => {
                let subsecond = u32::try_from(ns % 1_000_000_000).expect("below a second");
                (1, Some(types::Timespec::new().sec(ns / 1_000_000_000).nsec(subsecond)))
            }
            Wait::Forever => (1, None),
        };
        let mut arguments = types::SubmitArgs::new();
        if let Some(timeout) = &timeout {
            arguments = arguments.timespec(timeout);
        }
        if minimum > 0 && sends > 0 && self.features.has(Feature::MinimumWait) {
            minimum += sends;
            arguments = arguments.min_wait_usec(SEND_WAIT_US);
        }
        // Deferred work, and completions that overflowed into the kernel's memory, come with GETEVENTS only.
        let mut flags = EnterFlags::EXT_ARG | EnterFlags::GETEVENTS;
        if self.features.has(Feature::NoIowait) {
            flags |= EnterFlags::NO_IOWAIT;
        }
        let fd = match self.enter_index {
            Some(index) => {
                flags |= EnterFlags::REGISTERED_RING;
                index
            }
            None => self.io.as_raw_fd(),
        };
        let queued = libc::c_uint::try_from(self.io.submission().len()).expect("a small queue");
        self.enters += 1;
        // SAFETY: the arguments and the timeout live on this stack until the call returns; what the queued
        // entries point to is promised by those who pushed them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                fd,
                queued,
                minimum,
                flags.bits(),
                &raw const arguments,
                size_of_val(&arguments),
            )
        };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(error),
        }
    }

    /// Moves what has completed to `completions`, at most as much as that holds without growing.
    pub(super) fn reap(&mut self, completions: &mut Vec<Completion>) {
        let room = completions.capacity() - completions.len();
        completions.extend(self.io.completion().take(room).map(|entry| Completion {
            user_data: entry.user_data(),
            result: entry.result(),
            flags: entry.flags(),
        }));
    }
}

/// What the reactor submits, on every kernel.
const OPERATIONS: [(&str, u8); 12] = [
    ("READ", opcode::Read::CODE),
    ("READ_FIXED", opcode::ReadFixed::CODE),
    ("WRITE", opcode::Write::CODE),
    ("WRITE_FIXED", opcode::WriteFixed::CODE),
    ("FSYNC", opcode::Fsync::CODE),
    ("ACCEPT", opcode::Accept::CODE),
    ("RECV", opcode::Recv::CODE),
    ("SEND", opcode::Send::CODE),
    ("SENDMSG", opcode::SendMsg::CODE),
    ("POLL_ADD", opcode::PollAdd::CODE),
    ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
    ("LINK_TIMEOUT", opcode::LinkTimeout::CODE),
];

/// Tries the combinations of setup flags from the best to the plainest.
fn set_up(entries: u32, completions: u32, allowed: Features) -> Result<(IoUring, Features), RingError> {
    let ladder: [&[Feature]; 4] = [
        &[Feature::SubmitAll, Feature::CooperativeTaskrun, Feature::DeferTaskrun],
        &[Feature::SubmitAll, Feature::CooperativeTaskrun],
        &[Feature::SubmitAll],
        &[],
    ];
    for rung in ladder {
        if rung.iter().any(|feature| !allowed.has(*feature)) {
            continue;
        }
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(completions).setup_r_disabled();
        let mut features = Features::NONE;
        for feature in rung {
            features.insert(*feature);
            match feature {
                Feature::SubmitAll => builder.setup_submit_all(),
                Feature::CooperativeTaskrun => builder.setup_coop_taskrun(),
                Feature::DeferTaskrun => builder.setup_single_issuer().setup_defer_taskrun(),
                _ => unreachable!("not a flag of the setup"),
            };
        }
        match builder.build(entries) {
            Ok(io) => return Ok((io, features)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL) => {}
                Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => return Err(RingError::Blocked(error)),
                Some(libc::ENOMEM) => return Err(RingError::NoMemory(error)),
                _ => return Err(RingError::at("setup")(error)),
            },
        }
    }
    Err(RingError::TooOld("rings that start disabled"))
}
