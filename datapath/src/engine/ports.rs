//! The only door between a shard and the world.
//!
//! A driver hands [`Event`]s to an [`Engine`] and carries out the [`Effect`]s that it asks for. The reactor does
//! so with io_uring, the simulator with a virtual clock, network and disk. Per turn:
//!
//! ```text
//!   loop {
//!       for each thing that happened { engine.handle_event(now, event) }
//!       engine.finish_turn(now)                   seals batches, paces background work
//!       while let Some(effect) = engine.poll_effect() { start it }
//!       wait for something to happen, at most until engine.poll_timeout()
//!   }
//! ```
//!
//! Rules that both sides keep:
//! - A buffer that an effect names belongs to the driver until the event that ends the effect, whatever
//!   becomes of the connection meanwhile.
//! - Every effect with a [`Token`] ends in exactly one event with that token.
//! - A connection has at most one receive and one send under way.
//! - After [`Effect::HandOver`] the driver ends the watch on the connection, if there is one, without a word, and tells
//!   the other shard [`Event::Adopted`]; here it says [`Event::Closed`] when the connection is gone there, and nothing
//!   before. Messages and connections from one shard to another arrive in the order in which they were sent.
//! - After [`Effect::Close`] the driver ends what is under way on the connection (each in its own event, as
//!   failed) and then says [`Event::Closed`]; the id is free for reuse only then.

use super::shard::MovedConnection;
use super::shard_message::{ShardIndex, ShardMessage};
pub use crate::memory::Memory;
use crate::record::{NodeId, Record, VolumeNumber};
use crate::replica::check::CheckReport;
use crate::units::{MemoryRange, Moment};

/// A shard's name for one of its device operations. Drivers carry it and do not look inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u32);

/// A device (pool) of the shard: the position in the list that it was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIndex(pub u16);

/// A connection. The driver chooses the number when it accepts, below `CONNECTIONS_MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u32);

/// A receive buffer that the driver lent out with [`Event::Received`] and wants back with [`Effect::Recycle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveBuffer(pub u16);

/// Where a connection comes from, as far as limits care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerAddress {
    /// An IPv4 address is mapped to IPv6, so that one client has one name.
    Internet(std::net::Ipv6Addr),
    /// A local process; all of them count as one address.
    Unix,
}

/// Why an operation on a device failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The device reported an error, or fewer bytes than asked.
    Failed,
}

/// What happened in the world.
#[derive(Debug)]
pub enum Event {
    /// A client connected.
    Accepted {
        /// The name the driver gave it.
        connection: ConnectionId,
        /// Where it comes from.
        peer: PeerAddress,
    },
    /// [`Effect::Receive`] ended: bytes arrived in a buffer of the driver, which the engine returns with
    /// [`Effect::Recycle`] when it has no more use for it.
    Received {
        /// From whom.
        connection: ConnectionId,
        /// The bytes; at least one.
        memory: MemoryRange,
        /// The buffer to return.
        buffer: ReceiveBuffer,
    },
    /// [`Effect::ReceiveExact`] ended: all the bytes asked for have arrived.
    ReceivedExact {
        /// From whom.
        connection: ConnectionId,
    },
    /// [`Effect::Receive`] or [`Effect::ReceiveExact`] ended without (all of) its bytes: the client left, the
    /// connection broke, or it was closed by the engine. No receive may be asked for after this.
    ReceiveEnded {
        /// Whose.
        connection: ConnectionId,
    },
    /// The client has closed its side; asked for by [`Effect::WatchHangUp`]. What it had sent before may still be there.
    HungUp {
        /// Whose.
        connection: ConnectionId,
    },
    /// [`Effect::Send`] ended: everything was handed to the kernel.
    Sent {
        /// To whom.
        connection: ConnectionId,
    },
    /// [`Effect::Send`] ended before everything was sent. No send may be asked for after this.
    SendFailed {
        /// To whom.
        connection: ConnectionId,
    },
    /// The connection asked to be closed is gone and its id may return in [`Event::Accepted`].
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// A device operation ended.
    DeviceDone {
        /// Which.
        token: Token,
        /// How.
        result: Result<(), DeviceError>,
    },
    /// Another shard of the process says something.
    Told {
        /// Which.
        from: ShardIndex,
        /// What.
        message: ShardMessage,
    },
    /// Another shard has handed over a connection.
    Adopted {
        /// The name the driver gave it here.
        connection: ConnectionId,
        /// All that goes with it.
        moved: Box<MovedConnection>,
    },
    /// Another node connected.
    PeerAccepted {
        /// The name the driver gave the connection.
        connection: ConnectionId,
    },
    /// [`Effect::Connect`] ended: there is a connection to another node.
    PeerConnected {
        /// To whom.
        node: NodeId,
        /// The name the driver gave it.
        connection: ConnectionId,
    },
    /// [`Effect::Connect`] ended without a connection.
    PeerUnreachable {
        /// To whom.
        node: NodeId,
    },
    /// The record of a volume, as it was read from the record store just now, or the store's answer to a proposal.
    Record(Box<Record>),
    /// The record store knows that the volume with this number and lineage was deleted.
    Deleted {
        /// Its number.
        volume: VolumeNumber,
        /// Its lineage.
        lineage: [u8; 16],
    },
    /// Something has to be done for the replicas of a volume: the node leads it for a while, if nobody else does.
    Tend {
        /// Which volume.
        volume: VolumeNumber,
    },
    /// Somebody wants all replicas in sync of a volume compared. [`Engine::poll_check_report`] tells what comes of it.
    Verify {
        /// Which volume.
        volume: VolumeNumber,
        /// The reports repeat it.
        verify: u64,
    },
    /// The moment of [`Engine::poll_timeout`] has come. Harmless at any other time.
    Timeout,
    /// Stop: refuse new connections, finish what is under way, write a checkpoint. The engine reports
    /// [`Engine::is_drained`] when it is done.
    Drain,
}

/// What a shard wants done.
#[derive(Debug)]
pub enum Effect {
    /// Read from a device; memory, offset and length are multiples of the block size, except that the
    /// memory may start at any multiple of 512.
    DeviceRead {
        /// Comes back in [`Event::DeviceDone`].
        token: Token,
        /// From where.
        device: DeviceIndex,
        /// First byte on the device.
        offset_bytes: u64,
        /// Where to put it.
        memory: MemoryRange,
    },
    /// Write to a device; memory, offset and length are multiples of the block size.
    DeviceWrite {
        /// Comes back in [`Event::DeviceDone`].
        token: Token,
        /// Where to.
        device: DeviceIndex,
        /// First byte on the device.
        offset_bytes: u64,
        /// What to write.
        memory: MemoryRange,
        /// Done only when on stable media (the block layer's FUA, or write and sync).
        durable: bool,
    },
    /// Bring to stable media all writes whose [`Event::DeviceDone`] was handled before this effect was polled.
    DeviceSync {
        /// Comes back in [`Event::DeviceDone`].
        token: Token,
        /// Which device.
        device: DeviceIndex,
    },
    /// Receive what comes next into a buffer that the driver chooses.
    Receive {
        /// From whom.
        connection: ConnectionId,
    },
    /// Receive exactly as many bytes as the memory holds.
    ReceiveExact {
        /// From whom.
        connection: ConnectionId,
        /// Where to put them.
        memory: MemoryRange,
    },
    /// Tell when the client has closed its side, whatever else is under way. Asked for once per connection at most.
    WatchHangUp {
        /// Whose.
        connection: ConnectionId,
    },
    /// The engine has no more use for a receive buffer.
    Recycle {
        /// The buffer to take back.
        buffer: ReceiveBuffer,
    },
    /// Send, in order, the pieces of [`Engine::send_pieces`], which stay the same until the send has ended.
    Send {
        /// To whom.
        connection: ConnectionId,
    },
    /// Connect to another node; ends in [`Event::PeerConnected`] or [`Event::PeerUnreachable`]. One at a time to each.
    Connect {
        /// To whom.
        node: NodeId,
    },
    /// Close the connection. What was sent before is delivered; what has not been received is dropped.
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// Tell another shard of the process.
    Tell {
        /// Whom.
        shard: ShardIndex,
        /// What.
        message: ShardMessage,
    },
    /// Hand a connection over to another shard of the process. Nothing but a watch is under way on it.
    HandOver {
        /// Which.
        connection: ConnectionId,
        /// To whom.
        to: ShardIndex,
        /// All that goes with it.
        moved: Box<MovedConnection>,
    },
}

/// What the reactor and the simulator drive.
pub trait Engine {
    /// The memory that this engine's ranges point into.
    type Memory: Memory;
    /// What the engine tells about itself, for metrics and tools.
    type Report: Send + 'static;
    /// Take note of one event.
    fn handle_event(&mut self, now: Moment, event: Event);
    /// All events of this turn were handled: start what has gathered.
    fn finish_turn(&mut self, now: Moment);
    /// The next thing to do, until there is none.
    fn poll_effect(&mut self) -> Option<Effect>;
    /// The next record to be proposed to the record store, in place of the version before it. Whatever becomes of that, the
    /// record that is in the store afterwards comes back as [`Event::Record`], if the store can be reached.
    fn poll_proposal(&mut self) -> Option<Box<Record>> {
        None
    }
    /// The next report of a pass over a volume's replicas: somebody's, or one whose time had come.
    fn poll_check_report(&mut self) -> Option<CheckReport> {
        None
    }
    /// When to send [`Event::Timeout`] if nothing else happens.
    fn poll_timeout(&self) -> Option<Moment>;
    /// The memory, for the driver to fill and to send from.
    fn memory(&mut self) -> &mut Self::Memory;
    /// The pieces of the send under way on this connection, at most `SEND_PIECES_MAX`.
    fn send_pieces(&self, connection: ConnectionId) -> &[MemoryRange];
    /// How things are. Called rarely; may allocate.
    fn report(&self) -> Self::Report;
    /// Has recovery been made safe, so that requests are taken?
    fn is_open(&self) -> bool;
    /// After [`Event::Drain`]: is everything finished and safe on the devices?
    fn is_drained(&self) -> bool;
}
