//! Device operations: from effect to submission, and from completions back to one event.
//!
//! A sync covers the writes whose completions were handled before the engine asked for it. That holds by
//! construction: completions are reaped and handled before effects are polled and submitted, in the same turn.

use io_uring::{opcode, squeue, types};

use super::memory::registered_index;
use super::ring::Target;
use super::{Operation, Reactor};
use crate::engine::ports::{DeviceError, DeviceIndex, Engine, Event, Token};
use crate::reactor::features::Feature;
use crate::reactor::memory::Arena;
use crate::units::MemoryRange;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    Read,
    Write,
    WriteDurably,
}

/// What is left to do of one read or write.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceOperation {
    pub(super) token: Token,
    pub(super) device: DeviceIndex,
    pub(super) transfer: Transfer,
    pub(super) offset_bytes: u64,
    pub(super) memory: MemoryRange,
}

impl<E: Engine<Memory = Arena>> Reactor<E> {
    fn device_target(&self, device: DeviceIndex) -> Target {
        self.devices[usize::from(device.0)].target
    }

    pub(super) fn start_transfer(&mut self, operation: DeviceOperation) {
        assert!(operation.memory.len > 0, "an empty transfer: {operation:?}");
        let entry = self.transfer_entry(&operation);
        self.submit(Operation::Transfer(operation), entry);
    }

    fn transfer_entry(&self, operation: &DeviceOperation) -> squeue::Entry {
        let DeviceOperation { device, transfer, offset_bytes: offset, memory, .. } = *operation;
        let target = self.device_target(device);
        let (fd, pointer, len) = (target.fd(), self.mapping.pointer(memory), memory.len);
        let durably = if transfer == Transfer::WriteDurably { libc::RWF_DSYNC } else { 0 };
        let index = if self.ring.features().has(Feature::RegisteredBuffers) {
            registered_index(memory)
        } else {
            None
        };
        let entry = match (transfer, index) {
            (Transfer::Read, Some(index)) => {
                opcode::ReadFixed::new(fd, pointer, len, index).offset(offset).build()
            }
            (Transfer::Read, None) => opcode::Read::new(fd, pointer, len).offset(offset).build(),
            (_, Some(index)) => {
                opcode::WriteFixed::new(fd, pointer, len, index).offset(offset).rw_flags(durably).build()
            }
            (_, None) => opcode::Write::new(fd, pointer, len).offset(offset).rw_flags(durably).build(),
        };
        entry.flags(target.flags())
    }

    /// A part of a transfer was done, or it failed. A short one goes on with the rest.
    pub(super) fn complete_transfer(&mut self, mut operation: DeviceOperation, result: i32) {
        match u32::try_from(result) {
            // Nothing more to read or write: the device ends before the range does.
            Ok(0) => self.fail_device(operation.token, libc::EIO),
            Ok(moved) if moved < operation.memory.len => {
                self.counters.short_transfers += 1;
                operation.offset_bytes += u64::from(moved);
                operation.memory = operation.memory.part(moved, operation.memory.len - moved);
                self.start_transfer(operation);
            }
            Ok(moved) => {
                assert_eq!(moved, operation.memory.len, "the kernel moved more than it was asked to");
                self.finish_device(operation.token, Ok(()));
            }
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => self.start_transfer(operation),
            Err(_) => self.fail_device(operation.token, -result),
        }
    }

    pub(super) fn start_sync(&mut self, token: Token, device: DeviceIndex) {
        self.device_operations += 1;
        let target = self.device_target(device);
        let entry =
            opcode::Fsync::new(target.fd()).flags(types::FsyncFlags::DATASYNC).build().flags(target.flags());
        self.submit(Operation::Sync { token }, entry);
    }

    pub(super) fn complete_sync(&mut self, token: Token, result: i32) {
        if result < 0 {
            // Not again: after a failed sync the kernel may have dropped what it could not write.
            self.fail_device(token, -result);
        } else {
            self.finish_device(token, Ok(()));
        }
    }

    fn fail_device(&mut self, token: Token, error: i32) {
        self.counters.device_failures += 1;
        self.counters.last_device_error = error;
        self.finish_device(token, Err(DeviceError::Failed));
    }

    fn finish_device(&mut self, token: Token, result: Result<(), DeviceError>) {
        self.device_operations -= 1;
        self.pending.push_back(Event::DeviceDone { token, result });
    }
}
