//! A connection whose client has chosen a volume of another shard moves there: all connections to a volume meet at its home.
//!
//! ```text
//!   choice ─▶ the send under way ends ─▶ HandOver ─▶ driver: nothing is under way any more ─▶ Adopted, elsewhere
//!                                            └── later, here: Closed. The place stays taken until then.
//! ```
//!
//! It moves as a value: the session, the bytes that have come behind the choice, and those not yet sent. The choice is
//! parsed from bytes that are here, so no receive is under way, and none is begun before the connection has arrived.

use super::Shard;
use super::connection::{Connection, Ending};
use super::input::Input;
use super::neighbours::ExportPlace;
use crate::engine::output::SEND_PAGES;
use crate::engine::ports::{ConnectionId, Effect, PeerAddress};
use crate::engine::shard_message::ShardIndex;
use crate::memory::Memory;
use crate::request::ExportIndex;
use crate::session::nbd::Session;
use crate::units::Moment;

/// A connection on its way.
#[derive(Debug)]
pub struct MovedConnection {
    peer: PeerAddress,
    accepted_at: Moment,
    session: Session,
    export: ExportIndex,
    /// Received and not parsed.
    input: Box<[u8]>,
    /// Not yet sent.
    output: Vec<u8>,
}

/// Where a connection is to go as soon as the send under way has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    to: ShardIndex,
    export: ExportIndex,
}

impl<M: Memory> Shard<M> {
    /// The client has chosen a volume of another shard.
    pub(super) fn begin_move(&mut self, id: ConnectionId, to: ShardIndex, export: ExportIndex) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        connection.moving = Some(Move { to, export });
        self.move_if_quiet(id);
    }

    /// Hands the connection over, if it is to go and nothing of it is with the driver.
    pub(super) fn move_if_quiet(&mut self, id: ConnectionId) {
        let Some(connection) = self.living(id) else { return };
        let Some(Move { to, export }) = connection.moving else { return };
        if connection.output.is_sending() || connection.ending != Ending::Not {
            return;
        }
        connection.assert_only_shaken_hands(id);
        let output = connection.output.take_unsent();
        let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
        let input = connection.input.as_ref().map_or(&[][..], |input| input.bytes(&self.memory)).into();
        self.drop_input(id);
        let connection = self.connections[id.0 as usize].take().expect("a living connection");
        self.connection_pages -= SEND_PAGES;
        self.pages.release(connection.output.send_memory());
        let Connection { peer, accepted_at, session, .. } = *connection;
        let moved = Box::new(MovedConnection { peer, accepted_at, session, export, input, output });
        self.neighbours.connections_elsewhere.insert(id);
        self.effects.push_back(Effect::HandOver { connection: id, to, moved });
    }

    /// A connection comes from another shard.
    pub(super) fn adopt(&mut self, id: ConnectionId, moved: MovedConnection) {
        let MovedConnection { peer, accepted_at, session, export, input, output } = moved;
        let ExportPlace::Here(served) = self.export_places[export.0 as usize] else {
            panic!("{id:?} came to a shard that is not the home of {export:?}")
        };
        self.close_abandoned();
        if !self.open_connection(id, peer, session) {
            return self.refuse(id);
        }
        self.served[served as usize].connections += 1;
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("just opened");
        connection.export = Some(ExportIndex(served));
        (connection.has_spoken, connection.accepted_at) = (true, accepted_at);
        connection.output.append(|out| out.extend_from_slice(&output));
        if !input.is_empty() {
            self.parked_bytes += input.len() as u64;
            connection.input = Some(Input::Parked { bytes: input, position: 0 });
        }
        self.to_send.push(id);
        self.begin_fence(id);
        if self.draining {
            self.connections[id.0 as usize].as_deref_mut().expect("just opened").session.begin_shutdown();
            self.finish(id);
        }
    }
}
