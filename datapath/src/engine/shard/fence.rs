//! Whoever comes to a volume is served when nothing more can come of those who went before.
//!
//! ```text
//!   chosen ─▶ watched ─▶ a turn later: whose clients have hung up, they are closed ─▶ what they had begun has ended ─▶ served
//! ```
//!
//! A client that lost its connection, or died and was started again, asks again over a new one, is answered and goes on. What
//! it had asked before must not be done over that: no piece that had not been begun, no request that is still in the socket, and
//! no write that still waits for its log. So a connection that is closed begins nothing more; a volume's next request closes
//! those whose clients have hung up, whatever of their bytes has not been read; and a newcomer waits for what was begun.
//!
//! The kernel tells of a hang-up in the turn in which it tells of a client that came later, or before. A connection that comes
//! from another shard may be overtaken by a younger one, so that its client may have gone before a younger one was served.

use super::Shard;
use super::connection::Connection;
use super::task::{Piece, PieceKind};
use crate::engine::ports::{ConnectionId, Effect};
use crate::memory::Memory;
use crate::replica::bugs::PlantedBug;
use crate::request::{Operation, RequestError};

/// How far a connection is on its way to being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fence {
    /// Its watch was begun in this turn.
    Watching { turn: u64 },
    /// Connections of the volume up to this death may still have changes under way.
    Waiting { deaths: u64 },
    /// It is served, or has chosen nothing yet.
    Passed,
}

impl<M: Memory> Shard<M> {
    /// The connection has chosen a volume that is served here.
    pub(super) fn begin_fence(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        connection.fence = Fence::Watching { turn: self.turns };
        if !std::mem::replace(&mut connection.watched, true) {
            self.effects.push_back(Effect::WatchHangUp { connection: id });
        }
        self.arriving.push(id);
    }

    /// Must the driver come again at once, for somebody who arrives?
    pub(super) fn is_watching_somebody(&self) -> bool {
        let fences =
            self.arriving.iter().filter_map(|id| Some(self.connections[id.0 as usize].as_ref()?.fence));
        fences.into_iter().any(|fence| matches!(fence, Fence::Watching { .. }))
    }

    /// Those who may be served by now, are.
    pub(super) fn pass_fences(&mut self) {
        for id in std::mem::take(&mut self.arriving) {
            let turns = self.turns;
            let Some(connection) = self.living(id) else { continue };
            match connection.fence {
                Fence::Passed => continue,
                Fence::Watching { turn } if turn < turns => self.look_round(id),
                Fence::Watching { .. } | Fence::Waiting { .. } => {}
            }
            let Some(connection) = self.living(id) else { continue };
            let (fence, export) = (connection.fence, connection.export.expect("it has chosen"));
            let is_over = match fence {
                Fence::Waiting { deaths } => self.is_over(export.0, deaths),
                Fence::Watching { .. } | Fence::Passed => false,
            };
            if is_over {
                self.connections[id.0 as usize].as_deref_mut().expect("living").fence = Fence::Passed;
                self.ready.push_back(id);
            } else {
                self.arriving.push(id);
            }
        }
    }

    /// Its watch would have told by now: who went before it came, went before it is served.
    fn look_round(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref().expect("a living connection");
        let (hung_up, accepted_at) = (connection.hung_up, connection.accepted_at);
        let export = connection.export.expect("it has chosen").0;
        let served = &mut self.served[export as usize];
        let is_overtaken = served.newest_served.is_some_and(|newest| newest >= accepted_at);
        served.newest_served = served.newest_served.max(Some(accepted_at));
        if hung_up && is_overtaken {
            self.connections_abandoned += 1;
            return self.close(id);
        }
        self.close_those_who_left(export, id);
        let deaths = self.served[export as usize].deaths;
        let connection = self.connections[id.0 as usize].as_deref_mut().expect("a living connection");
        connection.fence = Fence::Waiting { deaths };
    }

    /// Has everything ended that was begun for connections up to this death?
    fn is_over(&self, export: u32, deaths: u64) -> bool {
        let does_not_wait = self.replication.bugs.has(PlantedBug::OldBytesLast);
        does_not_wait
            || self
                .tasks
                .iter()
                .all(|(_, task)| task.export != export || task.died.is_none_or(|died| died > deaths))
    }

    /// A request of this connection begins. Whoever has hung up until now has gone before.
    pub(super) fn close_those_who_left(&mut self, export: u32, id: ConnectionId) {
        if !std::mem::take(&mut self.served[export as usize].somebody_left)
            || self.replication.bugs.has(PlantedBug::OldBytesLast)
        {
            return;
        }
        let has_left = |connection: &Connection| {
            connection.hung_up && connection.export.is_some_and(|chosen| chosen.0 == export)
        };
        let here = (0..).map(ConnectionId).zip(&self.connections);
        let left = here.filter(|(_, connection)| connection.as_deref().is_some_and(has_left));
        let left: Vec<ConnectionId> = left.map(|(left, _)| left).collect();
        for left in left {
            if left == id {
                self.served[export as usize].somebody_left = true;
            } else if self.living(left).is_some() {
                self.connections_abandoned += 1;
                self.close(left);
            }
        }
    }

    /// The connection is gone: of what it asked to be changed nothing is begun any more.
    pub(super) fn abandon_changes(&mut self, id: ConnectionId) {
        let connection = self.connections[id.0 as usize].as_deref().expect("a connection that is closed");
        let generation = connection.generation;
        let Some(export) = connection.export.filter(|_| connection.requests_under_way > 0) else { return };
        if self.replication.bugs.has(PlantedBug::OldBytesLast) {
            return;
        }
        let served = &mut self.served[export.0 as usize];
        served.deaths += 1;
        let (deaths, lane) = (served.deaths, served.lane);
        for (_, task) in self.tasks.iter_mut() {
            let is_its = task.connection == id && task.generation == generation;
            if is_its && changes_something(task.request.operation) {
                task.died = Some(deaths);
                task.error.get_or_insert(RequestError::ShuttingDown);
            }
        }
        let is_dead = |piece: &Piece| {
            let is_change = matches!(piece.kind, PieceKind::Write(_) | PieceKind::Release(_));
            is_change && self.tasks.get(piece.task).died == Some(deaths)
        };
        let dead: Vec<u32> =
            self.pieces.iter().filter(|(_, piece)| is_dead(piece)).map(|(piece, _)| piece).collect();
        for piece in dead {
            self.with_lane(lane, |lane, context| lane.cancel(context, piece));
        }
        self.progress = true;
    }
}

fn changes_something(operation: Operation) -> bool {
    matches!(operation, Operation::Write { .. } | Operation::Trim { .. } | Operation::WriteZeroes { .. })
}
