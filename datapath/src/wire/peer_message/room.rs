//! Room for changes, in the messages about leases: how many blocks a head's changes may newly take in a member's pool.
//!
//! ```text
//!            change kind                          first block   count     at 52
//!   LEASE    1: asks for room (else 0)            keeps         needs     wants
//!   LEASED   1: grants room (else 0)                            granted
//!            3: and there may be more of it soon
//! ```

use super::Words;
use crate::wire::WireError;

const ROOM: u8 = 1;
const ROOM_MAY_GROW: u8 = 3;

/// What a head asks of a member's room: for how many blocks that its changes to come may newly take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoomQuestion {
    /// Of what was granted before it uses no more than this. The rest is given back.
    pub keeps: u32,
    /// So many, with those, a change takes that waits for room. Less would not help it.
    pub needs: u32,
    /// So many, with those, it would like to have, lest later ones wait.
    pub wants: u32,
}

/// What a member answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoomAnswer {
    /// Blocks that changes numbered after the question may newly take here.
    pub granted: u32,
    /// It is less than was needed, and there may be more soon.
    pub may_grow: bool,
}

impl Words {
    pub(super) fn with_question(self, question: Option<RoomQuestion>) -> Words {
        let Some(RoomQuestion { keeps, needs, wants }) = question else { return self };
        Words { change: ROOM, block: keeps, count: needs, new_blocks: wants, ..self }
    }

    pub(super) fn question(self) -> Result<Option<RoomQuestion>, WireError> {
        let question = RoomQuestion { keeps: self.block, needs: self.count, wants: self.new_blocks };
        match self.change {
            0 if question == RoomQuestion::default() => Ok(None),
            ROOM => Ok(Some(question)),
            _ => Err(WireError::Range),
        }
    }

    pub(super) fn with_answer(self, answer: Option<RoomAnswer>) -> Words {
        let Some(RoomAnswer { granted, may_grow }) = answer else { return self };
        Words { change: if may_grow { ROOM_MAY_GROW } else { ROOM }, count: granted, ..self }
    }

    pub(super) fn answer(self) -> Result<Option<RoomAnswer>, WireError> {
        let may_grow = self.change == ROOM_MAY_GROW;
        match self.change {
            0 if self.count == 0 => Ok(None),
            ROOM | ROOM_MAY_GROW => Ok(Some(RoomAnswer { granted: self.count, may_grow })),
            _ => Err(WireError::Range),
        }
    }
}
