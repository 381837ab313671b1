//! Received bytes that were not parsed yet, and where they wait while their connection cannot go on.
//!
//! The driver has few receive buffers for many connections. A connection that is at a limit may stay there as long as
//! its client likes, so it must not keep a buffer from the others: few may, and the rest of them copy their bytes into
//! memory of their own. Nothing more is received for a connection before these are used up, which bounds them by one
//! buffer's size each.

use super::Shard;
use crate::engine::ports::{ConnectionId, Effect, ReceiveBuffer};
use crate::limits::STALLED_BUFFERS_MAX;
use crate::memory::Memory;
use crate::units::MemoryRange;

/// Bytes of one connection that were not parsed yet; at least one.
pub(super) enum Input {
    /// Where the driver has put them.
    Received {
        rest: MemoryRange,
        buffer: ReceiveBuffer,
        /// Counted in [`Shard::buffers_kept`].
        kept: bool,
    },
    /// In memory of their own, from `position` on.
    Parked { bytes: Box<[u8]>, position: usize },
}

impl Input {
    pub(super) fn received(rest: MemoryRange, buffer: ReceiveBuffer) -> Input {
        Input::Received { rest, buffer, kept: false }
    }

    pub(super) fn len(&self) -> u32 {
        match self {
            Input::Received { rest, .. } => rest.len,
            Input::Parked { bytes, position } => {
                u32::try_from(bytes.len() - position).expect("at most a receive buffer")
            }
        }
    }

    pub(super) fn bytes<'a>(&'a self, memory: &'a impl Memory) -> &'a [u8] {
        match self {
            Input::Received { rest, .. } => memory.bytes(*rest),
            Input::Parked { bytes, position } => &bytes[*position..],
        }
    }

    /// Copies as many bytes from the front as `to` takes.
    pub(super) fn copy_front(&self, to: MemoryRange, memory: &mut impl Memory) {
        match self {
            Input::Received { rest, .. } => memory.copy(rest.part(0, to.len), to),
            Input::Parked { bytes, position } => {
                memory.bytes_mut(to).copy_from_slice(&bytes[*position..][..to.len as usize]);
            }
        }
    }
}

/// Without the bytes themselves, which may be many.
impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Input::Received { rest, buffer, kept } => write!(f, "{rest:?} of {buffer:?}, kept {kept}"),
            Input::Parked { .. } => write!(f, "{} bytes parked", self.len()),
        }
    }
}

impl<M: Memory> Shard<M> {
    /// Takes bytes from the front of the input. What held it is given back when it is used up.
    pub(super) fn consume(&mut self, id: ConnectionId, count: u32) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        match &mut connection.input {
            None => assert_eq!(count, 0, "bytes of an empty input were used"),
            Some(Input::Received { rest, .. }) => *rest = rest.part(count, rest.len - count),
            Some(Input::Parked { position, .. }) => {
                *position += count as usize;
                self.parked_bytes -= u64::from(count);
            }
        }
        if connection.input.as_ref().is_some_and(|input| input.len() == 0) {
            self.drop_input(id);
        }
    }

    /// Gives back what holds the input, used or not.
    pub(super) fn drop_input(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a connection");
        match connection.input.take() {
            None => {}
            Some(Input::Received { buffer, kept, .. }) => {
                self.buffers_kept -= u32::from(kept);
                self.effects.push_back(Effect::Recycle { buffer });
            }
            Some(parked @ Input::Parked { .. }) => self.parked_bytes -= u64::from(parked.len()),
        }
    }

    /// The connection waits, nobody knows how long: it keeps a receive buffer only while few others do.
    pub(super) fn rest(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections[id.0 as usize].as_deref_mut() else { return };
        let Some(Input::Received { rest, buffer, kept: kept @ false }) = &mut connection.input else {
            return;
        };
        if !std::mem::replace(&mut connection.watched, true) {
            // Nothing is received meanwhile that would tell of the client's end.
            self.effects.push_back(Effect::WatchHangUp { connection: id });
        }
        if self.buffers_kept < STALLED_BUFFERS_MAX {
            *kept = true;
            self.buffers_kept += 1;
            return;
        }
        self.inputs_parked += 1;
        self.parked_bytes += u64::from(rest.len);
        self.effects.push_back(Effect::Recycle { buffer: *buffer });
        connection.input = Some(Input::Parked { bytes: self.memory.bytes(*rest).into(), position: 0 });
    }
}
