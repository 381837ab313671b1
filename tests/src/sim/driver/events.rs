//! Events, for the trace and for the rules about connections.

use datapath::engine::ports::{ConnectionId, Event};
use datapath::units::Moment;

use crate::sim::trace;

/// The connection that an event is about.
pub(super) fn connection_of(event: &Event) -> Option<ConnectionId> {
    match event {
        Event::Accepted { connection, .. }
        | Event::Received { connection, .. }
        | Event::ReceivedExact { connection }
        | Event::ReceiveEnded { connection }
        | Event::HungUp { connection }
        | Event::Sent { connection }
        | Event::SendFailed { connection }
        | Event::Closed { connection }
        | Event::Adopted { connection, .. }
        | Event::PeerAccepted { connection }
        | Event::PeerConnected { connection, .. } => Some(*connection),
        Event::DeviceDone { .. }
        | Event::Told { .. }
        | Event::PeerUnreachable { .. }
        | Event::Record(_)
        | Event::Deleted { .. }
        | Event::Tend { .. }
        | Event::Verify { .. }
        | Event::Timeout
        | Event::Drain => None,
    }
}

/// Notes an event that the engine is told.
pub(super) fn note_event(now: Moment, event: &Event) {
    let (label, numbers) = match event {
        Event::Accepted { connection, .. } => ("accepted connection", [connection.0.into(), 0, 0]),
        Event::Received { connection, memory, .. } => (
            "received on connection, at, length",
            [connection.0.into(), memory.start.into(), memory.len.into()],
        ),
        Event::ReceivedExact { connection } => {
            ("received exactly on connection", [connection.0.into(), 0, 0])
        }
        Event::ReceiveEnded { connection } => ("receive ended on connection", [connection.0.into(), 0, 0]),
        Event::HungUp { connection } => ("hung up connection", [connection.0.into(), 0, 0]),
        Event::Sent { connection } => ("sent on connection", [connection.0.into(), 0, 0]),
        Event::SendFailed { connection } => ("send failed on connection", [connection.0.into(), 0, 0]),
        Event::Closed { connection } => ("closed connection", [connection.0.into(), 0, 0]),
        Event::DeviceDone { token, result } => {
            ("device done token, failed", [token.0.into(), u64::from(result.is_err()), 0])
        }
        Event::Told { from, .. } => ("told by", [from.0.into(), 0, 0]),
        Event::Adopted { connection, .. } => ("adopted connection", [connection.0.into(), 0, 0]),
        Event::PeerAccepted { connection } => ("peer accepted connection", [connection.0.into(), 0, 0]),
        Event::PeerConnected { node, connection } => {
            ("peer connected node, connection", [node.0.into(), connection.0.into(), 0])
        }
        Event::PeerUnreachable { node } => ("peer unreachable node", [node.0.into(), 0, 0]),
        Event::Record(record) => (
            "record of volume, version, epoch",
            [record.volume.0.into(), record.version, record.epoch.into()],
        ),
        Event::Deleted { volume, .. } => ("deleted volume", [volume.0.into(), 0, 0]),
        Event::Tend { volume } => ("tend volume", [volume.0.into(), 0, 0]),
        Event::Verify { volume, verify } => ("verify volume, number", [volume.0.into(), *verify, 0]),
        Event::Timeout => ("timeout", [0; 3]),
        Event::Drain => ("drain", [0; 3]),
    };
    trace::note(now, label, numbers);
}
