//! An NBD client that believes nothing.
//!
//! It encodes and decodes the protocol by itself and not with the codecs of the data path: two independent
//! readings of the specification must agree. Every answer is checked against what was asked, against the
//! protocol and against the [`Oracle`]. What must not happen is a panic that says so.
//!
//! ```text
//!   Greeting ──▶ Options (one at a time) ──▶ Ready ──▶ Gone
//!                      └── EXPORT_NAME ──▶ ExportName ──┘
//! ```

mod handshake;
mod replies;

use datapath::units::Moment;

use self::handshake::Step;
use super::bytes::ByteQueue;
use super::oracle::{ChangeId, ChangeKind, Oracle, Start, stamp};
use super::random::Random;
use super::trace;
use super::workload::{Ask, AskKind};
use crate::{to_u32, to_usize};

const COMPACT_REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const COMMAND_DISC: u16 = 2;
const FLAG_FUA: u16 = 1 << 0;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_DF: u16 = 1 << 2;
const FLAG_REQ_ONE: u16 = 1 << 3;
const FLAG_FAST_ZERO: u16 = 1 << 4;
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;
/// Error numbers of the protocol.
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// Which errors the world has given cause for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// The disk failed or rotted: EIO, or EPERM when the volume went read-only.
    pub io: bool,
    /// The pool may be full.
    pub no_space: bool,
    /// The server was told to stop.
    pub shutting_down: bool,
}

/// What a client is like.
#[derive(Clone, Debug)]
pub struct ClientPlan {
    /// Name of the volume.
    pub name: String,
    /// Its size, which the server must report.
    pub size_bytes: u64,
    /// Negotiate structured replies.
    pub structured: bool,
    /// Negotiate extended headers.
    pub extended: bool,
    /// Negotiate base:allocation, if one of the former is on.
    pub status: bool,
    /// Choose the volume with EXPORT_NAME, as old clients do.
    pub export_name: bool,
    /// Ask for things on the way that a plain client would not.
    pub curious: bool,
    /// Requests in flight at once.
    pub depth: usize,
    /// Do not wait for the answer to the choice of the volume: requests follow it at once.
    pub eager: bool,
    /// Another node may be where the volume is to be had.
    pub elsewhere: bool,
    /// The server need not know the volume.
    pub may_be_unknown: bool,
}

impl ClientPlan {
    /// Draws a client for a volume.
    #[must_use]
    pub fn draw(random: &mut Random, name: &str, size_bytes: u64) -> ClientPlan {
        ClientPlan {
            name: name.to_owned(),
            size_bytes,
            structured: random.percent(70),
            extended: random.percent(40),
            status: random.percent(70),
            export_name: random.percent(15),
            curious: random.percent(20),
            depth: to_usize(random.skewed(1..=48)),
            eager: random.percent(30),
            elsewhere: false,
            may_be_unknown: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Greeting,
    Options,
    ExportName,
    Ready,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Headers {
    Simple,
    Structured,
    Extended,
}

/// A request without an answer.
#[derive(Debug)]
struct Pending {
    cookie: u64,
    ask: Ask,
    sent: Moment,
    expect: Expect,
    model: Model,
    /// First error that a chunk reported.
    error: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Success,
    /// This error number.
    Error(u32),
    /// An empty request: nothing to do or nothing that makes sense.
    Either,
}

/// What the oracle knows the request as.
#[derive(Debug)]
enum Model {
    Read { start: Start, bytes: Vec<u8>, covered: Vec<(usize, usize)>, pieces: usize },
    Status { start: Start, answered: bool },
    Change(ChangeId),
    Flush(Start),
    Nothing,
}

/// What clients have done, for reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientCounts {
    /// Requests sent.
    pub requests: u64,
    /// Requests answered.
    pub answers: u64,
    /// Answers that were errors the world had given cause for.
    pub errors: u64,
    /// Payload bytes written and answered with success.
    pub written_bytes: u64,
    /// Payload bytes read.
    pub read_bytes: u64,
}

/// See the module's description.
#[derive(Debug)]
pub struct Client {
    /// For traces.
    id: u64,
    volume: u32,
    plan: ClientPlan,
    phase: Phase,
    headers: Headers,
    steps: Vec<Step>,
    status_context: Option<u32>,
    no_zeroes: bool,
    /// Transmission flags of the export.
    flags: u16,
    pending: Vec<Pending>,
    next_cookie: u64,
    output: Vec<u8>,
    spare: Vec<Vec<u8>>,
    turned_away: bool,
    disconnecting: bool,
    /// What was done so far.
    pub counts: ClientCounts,
}

impl Client {
    /// A client that has just connected and says nothing until it is greeted.
    #[must_use]
    pub fn new(id: u64, volume: u32, plan: ClientPlan) -> Client {
        let steps = handshake::steps(&plan);
        Client {
            id,
            volume,
            no_zeroes: !plan.curious,
            plan,
            phase: Phase::Greeting,
            headers: Headers::Simple,
            steps,
            status_context: None,
            flags: 0,
            pending: Vec::new(),
            next_cookie: id << 32,
            output: Vec::new(),
            spare: Vec::new(),
            disconnecting: false,
            turned_away: false,
            counts: ClientCounts::default(),
        }
    }

    /// Which volume it uses.
    #[must_use]
    pub fn volume(&self) -> usize {
        self.volume as usize
    }

    /// May it send requests?
    #[must_use]
    pub fn is_ready(&self) -> bool {
        // Nothing but the choice of the volume is still to be answered.
        let has_chosen = match self.phase {
            Phase::Options => self.steps.as_slice() == [Step::Go],
            phase => phase == Phase::ExportName,
        };
        let ready = self.phase == Phase::Ready || has_chosen && self.plan.eager && !self.plan.elsewhere;
        ready && !self.disconnecting
    }

    /// How many more requests it may send now.
    #[must_use]
    pub fn free_depth(&self) -> usize {
        if self.is_ready() { self.plan.depth.saturating_sub(self.pending.len()) } else { 0 }
    }

    /// Requests without an answer.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// When the oldest request without an answer was sent.
    #[must_use]
    pub fn oldest_pending(&self) -> Option<Moment> {
        self.pending.iter().map(|pending| pending.sent).min()
    }

    /// What the client has written since the last call; the buffer is to be cleared by the caller.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// Takes what the server sent.
    ///
    /// # Panics
    /// If the server broke the protocol or a promise.
    pub fn handle_input(
        &mut self,
        now: Moment,
        input: &mut ByteQueue,
        oracle: &mut Oracle,
        tolerance: Tolerance,
    ) {
        loop {
            let used = match self.phase {
                Phase::Greeting => self.handle_greeting(input.peek()),
                Phase::Options => self.handle_option_reply(input.peek()),
                Phase::ExportName => self.handle_export(input.peek()),
                Phase::Ready => self.handle_reply(now, input.peek(), oracle, tolerance),
                Phase::Gone => Some(input.len()),
            };
            match used {
                Some(count) if count > 0 => input.skip(count),
                _ => return,
            }
        }
    }

    /// Sends a request, unless it makes no sense on this connection.
    pub fn send(&mut self, now: Moment, ask: Ask, oracle: &mut Oracle) {
        let ask = self.adapt(ask);
        let expect = self.expectation(ask);
        let model = self.begin(ask, expect, oracle);
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.counts.requests += 1;
        trace::note(now, "client sends cookie, offset, length", [cookie, ask.offset_bytes, ask.length_bytes]);
        self.write_header(
            command(ask.kind),
            self.command_flags(ask),
            cookie,
            ask.offset_bytes,
            ask.length_bytes,
        );
        if ask.kind == AskKind::Write {
            let from = self.output.len();
            self.output.resize(from + to_usize(ask.length_bytes), 0);
            if let Model::Change(id) = model {
                stamp::fill(&mut self.output[from..], self.volume, id.0, ask.offset_bytes / 512);
            }
        }
        self.pending.push(Pending { cookie, ask, sent: now, expect, model, error: 0 });
    }

    /// Says good-bye. The caller closes the connection.
    pub fn send_disconnect(&mut self) {
        assert!(self.is_ready(), "only a client in transmission says good-bye");
        self.write_header(COMMAND_DISC, 0, self.next_cookie, 0, 0);
        self.disconnecting = true;
    }

    /// Was it told that another node leads the volume?
    #[must_use]
    pub fn is_turned_away(&self) -> bool {
        self.turned_away
    }

    /// The connection is gone: what was asked will never be answered. Returns the changes among that.
    pub fn leave(&mut self, oracle: &mut Oracle) -> Vec<ChangeId> {
        self.phase = Phase::Gone;
        let mut changes = Vec::new();
        for pending in self.pending.drain(..) {
            match pending.model {
                Model::Read { start, .. } | Model::Status { start, .. } => oracle.abandon_read(start),
                Model::Change(change) => changes.push(change),
                _ => {}
            }
        }
        changes
    }

    /// Replaces what this connection did not negotiate.
    fn adapt(&self, ask: Ask) -> Ask {
        let kind = match ask.kind {
            AskKind::Read { .. } if self.headers == Headers::Simple => AskKind::Read { one_piece: false },
            AskKind::Status { .. } if self.status_context.is_none() => AskKind::Read { one_piece: false },
            other => other,
        };
        let status_to_read = matches!((ask.kind, kind), (AskKind::Status { .. }, AskKind::Read { .. }));
        let longest = if status_to_read {
            64 << 10
        } else if self.headers == Headers::Extended {
            u64::MAX
        } else {
            u64::from(u32::MAX)
        };
        Ask { kind, length_bytes: ask.length_bytes.min(longest), ..ask }
    }

    fn expectation(&self, ask: Ask) -> Expect {
        let outside =
            ask.offset_bytes.checked_add(ask.length_bytes).is_none_or(|end| end > self.plan.size_bytes);
        match ask.kind {
            AskKind::Unknown => Expect::Error(EINVAL),
            AskKind::Flush => Expect::Success,
            AskKind::Write | AskKind::Zeroes { .. } if outside => Expect::Error(ENOSPC),
            _ if outside => Expect::Error(EINVAL),
            _ if ask.length_bytes == 0 => Expect::Either,
            _ => Expect::Success,
        }
    }

    fn begin(&mut self, ask: Ask, expect: Expect, oracle: &mut Oracle) -> Model {
        if expect != Expect::Success {
            return Model::Nothing;
        }
        let mut change =
            |kind| Model::Change(oracle.begin_change(kind, ask.offset_bytes, ask.length_bytes, ask.fua));
        match ask.kind {
            AskKind::Write => change(ChangeKind::Write),
            AskKind::Zeroes { .. } => change(ChangeKind::Zero),
            AskKind::Trim => change(ChangeKind::Trim),
            AskKind::Read { .. } => {
                // What an earlier read left here is of no use to the server: an answer must cover every byte.
                let mut bytes = self.spare.pop().unwrap_or_default();
                bytes.resize(to_usize(ask.length_bytes), 0xee);
                Model::Read { start: oracle.begin_read(), bytes, covered: Vec::new(), pieces: 0 }
            }
            AskKind::Status { .. } => Model::Status { start: oracle.begin_read(), answered: false },
            AskKind::Flush => Model::Flush(oracle.begin_flush()),
            AskKind::Cache | AskKind::Unknown => Model::Nothing,
        }
    }

    fn command_flags(&self, ask: Ask) -> u16 {
        let set = |on: bool, flag: u16| if on { flag } else { 0 };
        let own = match ask.kind {
            AskKind::Read { one_piece } => set(one_piece, FLAG_DF),
            AskKind::Zeroes { no_hole, only_if_fast } => {
                set(no_hole, FLAG_NO_HOLE) | set(only_if_fast, FLAG_FAST_ZERO)
            }
            AskKind::Status { one_extent } => set(one_extent, FLAG_REQ_ONE),
            AskKind::Write => set(self.headers == Headers::Extended, FLAG_PAYLOAD_LEN),
            AskKind::Flush | AskKind::Trim | AskKind::Cache | AskKind::Unknown => 0,
        };
        own | set(ask.fua, FLAG_FUA)
    }

    fn write_header(&mut self, command: u16, flags: u16, cookie: u64, offset_bytes: u64, length_bytes: u64) {
        let extended = self.headers == Headers::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { COMPACT_REQUEST_MAGIC };
        self.output.extend_from_slice(&magic.to_be_bytes());
        self.output.extend_from_slice(&flags.to_be_bytes());
        self.output.extend_from_slice(&command.to_be_bytes());
        self.output.extend_from_slice(&cookie.to_be_bytes());
        self.output.extend_from_slice(&offset_bytes.to_be_bytes());
        if extended {
            self.output.extend_from_slice(&length_bytes.to_be_bytes());
        } else {
            self.output.extend_from_slice(&to_u32(to_usize(length_bytes)).to_be_bytes());
        }
    }
}

fn command(kind: AskKind) -> u16 {
    match kind {
        AskKind::Read { .. } => 0,
        AskKind::Write => 1,
        AskKind::Flush => 3,
        AskKind::Trim => 4,
        AskKind::Cache => 5,
        AskKind::Zeroes { .. } => 6,
        AskKind::Status { .. } => 7,
        AskKind::Unknown => 77,
    }
}
