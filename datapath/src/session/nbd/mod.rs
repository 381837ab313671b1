//! One NBD connection: fixed newstyle handshake, then requests in the negotiated style.
//!
//! ```text
//!              client flags        option, answered            GO | EXPORT_NAME
//!   greeting ───────────────▶ handshake ──┐ ◀──────┘ ─────────────────────────▶ transmission ──┐ request, or
//!                                  │      └ LIST pauses when out is full              │  ▲─────┘ refusal
//!                                  ▼                                                  ▼
//!                                closed ◀── ABORT, DISC, or a breach that cannot be answered
//! ```
//!
//! Contract with the engine:
//! - [`Session::advance`] parses from the start of the bytes it is given. It is a pull parser: it stops at the
//!   first request, so at most one is outside of the engine's accounting.
//! - A WRITE is handed over without its payload. The engine takes `length_bytes` from the stream before it calls
//!   [`Session::advance`] again.
//! - A request that breaks a rule never reaches the engine: it is answered here with the protocol's error and
//!   counted, its payload skipped. So is a request of length zero, which has nothing to do.
//! - What a session writes by itself is bounded: past [`SESSION_OUTPUT_BYTES`] it waits to be called again, so a
//!   client that asks and never reads costs that much and no more.
//! - In transmission nothing allocates but `out`, which the engine keeps.

mod carry;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handshake;
mod judge;
mod meta_context;
mod rejection;
mod reply;
mod transmission;

#[cfg(test)]
mod tests;

pub use rejection::{Rejection, Rejections};
pub use reply::Replies;

use crate::limits::SESSION_OUTPUT_BYTES;
use crate::request::{ExportIndex, Exports, Request};
use crate::wire::nbd_handshake::{Greeting, handshake_flag};
use crate::wire::nbd_transmission::HeaderStyle;
use carry::Carry;
use handshake::Handshake;
use transmission::Transmission;

/// What a listener decides for the sessions it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SessionConfig {
    /// Offer every export read-only.
    pub read_only: bool,
}

/// What [`Session::advance`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All input is consumed; give more bytes.
    NeedMore,
    /// `out` has grown by [`SESSION_OUTPUT_BYTES`]: send it, then call again with the rest of the input, even if
    /// that is empty.
    OutputFull,
    /// Transmission begins with this export; the acceptance is in `out`.
    Selected(ExportIndex),
    /// A request to carry out, already validated. The payload of a WRITE follows in the stream.
    Request(Request),
    /// Finish what is under way, send its replies and `out`, then close. Nothing more will come.
    Close(CloseReason),
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client sent NBD_CMD_DISC.
    Disconnected,
    /// The client sent NBD_OPT_ABORT.
    Aborted,
    /// The client broke a rule that no error reply can answer.
    Refused(Rejection),
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    phase: Phase,
    carry: Carry,
    shutting_down: bool,
    replies: Replies,
    rejections: Rejections,
}

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Transmission(Transmission),
    Closed(CloseReason),
}

/// What the handshake agreed on.
#[derive(Clone, Copy, Debug)]
struct Agreement {
    export: ExportIndex,
    size_bytes: u64,
    read_only: bool,
    style: HeaderStyle,
    /// `base:allocation` was chosen for this export.
    base_allocation: bool,
}

/// One move of a phase.
#[derive(Debug)]
enum Turn {
    /// Something was consumed or written; go on.
    Again,
    /// The input is used up.
    Starved,
    Selected(Agreement),
    Request(Request),
    Close(CloseReason),
}

impl Turn {
    fn refuse(rejections: &mut Rejections, rejection: Rejection) -> Turn {
        rejections.note(rejection);
        Turn::Close(CloseReason::Refused(rejection))
    }
}

impl Session {
    /// A session that has said and heard nothing.
    #[must_use]
    pub fn new(config: SessionConfig) -> Session {
        Session {
            config,
            phase: Phase::Handshake(Handshake::new()),
            carry: Carry::default(),
            shutting_down: false,
            replies: Replies::new(HeaderStyle::Simple),
            rejections: Rejections::default(),
        }
    }

    /// Appends what the server says before it hears anything.
    pub fn greeting(&self, out: &mut Vec<u8>) {
        let greeting = Greeting { flags: handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES };
        out.extend_from_slice(&greeting.encode());
    }

    /// Parses from the start of `input` until there is something to do, appends answers that need no engine to
    /// `out`, and says how many bytes were consumed: all of them, unless the step asks for action first.
    pub fn advance(&mut self, input: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> (usize, Step) {
        let mut rest = input;
        let output_full = out.len() + SESSION_OUTPUT_BYTES;
        let step = loop {
            if out.len() >= output_full {
                break Step::OutputFull;
            }
            match self.turn(&mut rest, exports, out) {
                Turn::Again => {}
                Turn::Starved => {
                    assert!(rest.is_empty(), "starved with {} bytes left", rest.len());
                    break Step::NeedMore;
                }
                Turn::Selected(agreement) => {
                    self.replies = Replies::new(agreement.style);
                    self.phase = Phase::Transmission(Transmission::new(agreement));
                    break Step::Selected(agreement.export);
                }
                Turn::Request(request) => break Step::Request(request),
                Turn::Close(reason) => {
                    self.phase = Phase::Closed(reason);
                    rest = &[];
                    break Step::Close(reason);
                }
            }
        };
        (input.len() - rest.len(), step)
    }

    fn turn(&mut self, rest: &mut &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Turn {
        match &mut self.phase {
            Phase::Transmission(transmission) => {
                let mut around = transmission::Around {
                    carry: &mut self.carry,
                    rejections: &mut self.rejections,
                    replies: self.replies,
                    shutting_down: self.shutting_down,
                };
                transmission.turn(&mut around, rest, out)
            }
            Phase::Handshake(handshake) => {
                let mut around = handshake::Around {
                    carry: &mut self.carry,
                    rejections: &mut self.rejections,
                    exports,
                    read_only: self.config.read_only,
                    shutting_down: self.shutting_down,
                };
                handshake.turn(&mut around, rest, out)
            }
            Phase::Closed(reason) => Turn::Close(*reason),
        }
    }

    /// The encoder of replies in the style that was agreed on. Stays valid after [`Step::Close`], for requests
    /// that are still under way.
    #[must_use]
    pub fn replies(&self) -> Replies {
        self.replies
    }

    /// The export, once one is selected.
    #[must_use]
    pub fn export(&self) -> Option<ExportIndex> {
        match &self.phase {
            Phase::Transmission(transmission) => Some(transmission.export()),
            Phase::Handshake(_) | Phase::Closed(_) => None,
        }
    }

    /// From now on, answer every option with ERR_SHUTDOWN and every request with ESHUTDOWN.
    pub fn begin_shutdown(&mut self) {
        self.shutting_down = true;
    }

    /// Bytes that the session holds on the heap: part of an option, and nothing in transmission.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        match &self.phase {
            Phase::Handshake(handshake) => handshake.heap_bytes(),
            Phase::Transmission(_) | Phase::Closed(_) => 0,
        }
    }

    /// What this session refused so far.
    #[must_use]
    pub fn rejections(&self) -> &Rejections {
        &self.rejections
    }
}
