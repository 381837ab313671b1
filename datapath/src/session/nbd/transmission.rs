//! Transmission: request headers, judged in one place.
//!
//! | a request that ... | is answered |
//! |---|---|
//! | is no request, announces an absurd payload, or leaves its payload unannounced | by closing: the stream is lost |
//! | has an unknown command, an unknown or unnegotiated flag, a payload that does not belong | EINVAL |
//! | comes while the server stops | ESHUTDOWN |
//! | changes a read-only export | EPERM |
//! | leaves the export | ENOSPC for WRITE and WRITE_ZEROES, else EINVAL |
//! | writes more than was advertised | EINVAL |
//! | reads more than was advertised, or than fits in one piece on demand | EOVERFLOW |
//! | is a FLUSH with a range, or a BLOCK_STATUS of nothing or without a context | EINVAL |
//! | has length zero and nothing of the above | with success |
//!
//! FUA is accepted with every command, because clients send it with every command.

use super::carry::Carry;
use super::meta_context::BASE_ALLOCATION_ID;
use super::reply::error_number;
use super::{Agreement, CloseReason, Rejection, Rejections, Replies, Turn};
use crate::limits::{NBD_PAYLOAD_SKIP_BYTES_MAX, NBD_UNFRAGMENTED_BYTES_MAX, REQUEST_PAYLOAD_BYTES_MAX};
use crate::request::{ExportIndex, Operation, Request, RequestError};
use crate::wire::nbd_transmission::{HeaderStyle, RequestHeader, StatusQuery, command, command_flag};

/// Payload of a BLOCK_STATUS request that names the only context there is. A longer one names one twice, or one
/// that was never agreed on.
const STATUS_PAYLOAD_BYTES: usize = StatusQuery::FIXED_BYTES + 4;

/// Where transmission stands in the stream.
#[derive(Debug)]
pub(super) struct Transmission {
    agreement: Agreement,
    part: Part,
}

/// What the next bytes of the stream are.
#[derive(Clone, Copy, Debug)]
enum Part {
    Header,
    /// The payload of this BLOCK_STATUS, with its list of one context or of none.
    StatusPayload(RequestHeader),
    /// The payload of a request that was refused.
    Skip {
        left_bytes: u64,
    },
}

/// What a move of transmission may use beside its own state.
pub(super) struct Around<'a> {
    pub(super) carry: &'a mut Carry,
    pub(super) rejections: &'a mut Rejections,
    pub(super) replies: Replies,
    pub(super) shutting_down: bool,
}

/// Why a request is refused: the error for the client, the reason for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal(RequestError, Rejection);

const INVALID_FLAG: Refusal = Refusal(RequestError::Invalid, Rejection::CommandFlag);
const INVALID_PAYLOAD: Refusal = Refusal(RequestError::Invalid, Rejection::CommandPayload);
const INVALID_CONTEXT: Refusal = Refusal(RequestError::Invalid, Rejection::MetaContext);
const INVALID_LENGTH: Refusal = Refusal(RequestError::Invalid, Rejection::RequestLength);

impl Transmission {
    pub(super) fn new(agreement: Agreement) -> Transmission {
        Transmission { agreement, part: Part::Header }
    }

    pub(super) fn export(&self) -> ExportIndex {
        self.agreement.export
    }

    pub(super) fn turn(&mut self, around: &mut Around<'_>, rest: &mut &[u8], out: &mut Vec<u8>) -> Turn {
        match self.part {
            Part::Header => {
                let header = match self.agreement.style {
                    HeaderStyle::Simple | HeaderStyle::Structured => {
                        around.carry.take(rest).map(|bytes| RequestHeader::decode(&bytes))
                    }
                    HeaderStyle::Extended => {
                        around.carry.take(rest).map(|bytes| RequestHeader::decode_extended(&bytes))
                    }
                };
                match header {
                    None => Turn::Starved,
                    Some(Ok(header)) => self.handle_header(around, &header, out),
                    Some(Err(_)) => Turn::refuse(around.rejections, Rejection::RequestMagic),
                }
            }
            Part::StatusPayload(header) => self.take_status_payload(around, &header, rest, out),
            Part::Skip { left_bytes } => {
                let here = u64::try_from(rest.len()).unwrap_or(u64::MAX);
                let left_bytes = match usize::try_from(left_bytes) {
                    Ok(left) if left <= rest.len() => {
                        *rest = &rest[left..];
                        0
                    }
                    _ => {
                        *rest = &[];
                        left_bytes - here
                    }
                };
                self.part = if left_bytes == 0 { Part::Header } else { Part::Skip { left_bytes } };
                if left_bytes == 0 { Turn::Again } else { Turn::Starved }
            }
        }
    }

    fn handle_header(&mut self, around: &mut Around<'_>, header: &RequestHeader, out: &mut Vec<u8>) -> Turn {
        if header.command == command::DISC {
            return Turn::Close(CloseReason::Disconnected);
        }
        let payload_bytes = match self.payload_bytes(header) {
            Ok(payload_bytes) => payload_bytes,
            Err(rejection) => return Turn::refuse(around.rejections, rejection),
        };
        let verdict = self.judge_flags(around, header).and_then(|()| {
            if header.command != command::BLOCK_STATUS || payload_bytes == 0 {
                return self.judge(header).map(Some);
            }
            let whole = [StatusQuery::FIXED_BYTES, STATUS_PAYLOAD_BYTES].map(|bytes| bytes as u64);
            if whole.contains(&payload_bytes) { Ok(None) } else { Err(INVALID_PAYLOAD) }
        });
        match verdict {
            Ok(Some(request)) => Self::hand_over(around, request, out),
            Ok(None) => {
                self.part = Part::StatusPayload(*header);
                Turn::Again
            }
            Err(refusal) => {
                if payload_bytes > 0 {
                    self.part = Part::Skip { left_bytes: payload_bytes };
                }
                refuse(around, header, refusal, out)
            }
        }
    }

    /// Bytes that follow the header, as far as they can be known; else why the stream is lost.
    fn payload_bytes(&self, header: &RequestHeader) -> Result<u64, Rejection> {
        let is_write = header.command == command::WRITE;
        let announced = header.flags & command_flag::PAYLOAD_LEN != 0;
        let (follows, bytes_max) = if self.agreement.style == HeaderStyle::Extended {
            // Taking data for requests, or requests for data, would let whoever wrote the data speak here.
            if is_write && !announced {
                return Err(Rejection::PayloadUnannounced);
            }
            (announced, REQUEST_PAYLOAD_BYTES_MAX)
        } else {
            (is_write, NBD_PAYLOAD_SKIP_BYTES_MAX)
        };
        match header.length_bytes {
            _ if !follows => Ok(0),
            length if length > u64::from(bytes_max) => Err(Rejection::PayloadLength),
            length => Ok(length),
        }
    }

    fn judge_flags(&self, around: &Around<'_>, header: &RequestHeader) -> Result<(), Refusal> {
        let when = |condition: bool, flag: u16| if condition { flag } else { 0 };
        let extended = self.agreement.style == HeaderStyle::Extended;
        let chunks = self.agreement.style != HeaderStyle::Simple;
        let known = match header.command {
            command::READ => when(chunks, command_flag::DF),
            command::WRITE => when(extended, command_flag::PAYLOAD_LEN),
            command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => {
                command_flag::REQ_ONE | when(self.agreement.takes_status_payload(), command_flag::PAYLOAD_LEN)
            }
            _ => return Err(Refusal(RequestError::Invalid, Rejection::Command)),
        };
        let unknown = header.flags & !(known | command_flag::FUA);
        if unknown == command_flag::PAYLOAD_LEN && extended {
            Err(INVALID_PAYLOAD)
        } else if unknown != 0 {
            Err(INVALID_FLAG)
        } else if around.shutting_down {
            Err(Refusal(RequestError::ShuttingDown, Rejection::RequestShutdown))
        } else {
            Ok(())
        }
    }

    /// The request, if the export and the agreement allow it. Flags are known to belong to the command.
    fn judge(&self, header: &RequestHeader) -> Result<Request, Refusal> {
        let has = |flag: u16| header.flags & flag != 0;
        let durable = has(command_flag::FUA);
        let (offset_bytes, length_bytes) = (header.offset_bytes, header.length_bytes);
        let within = |error: RequestError| {
            let end = offset_bytes.checked_add(length_bytes);
            let inside = end.is_some_and(|end| end <= self.agreement.size_bytes);
            if inside { Ok(()) } else { Err(Refusal(error, Rejection::Range)) }
        };
        let writable = || {
            let refusal = Refusal(RequestError::NotPermitted, Rejection::ReadOnly);
            if self.agreement.read_only { Err(refusal) } else { Ok(()) }
        };
        let operation = match header.command {
            command::READ => {
                within(RequestError::Invalid)?;
                let one_piece = has(command_flag::DF);
                let bytes_max =
                    if one_piece { NBD_UNFRAGMENTED_BYTES_MAX } else { REQUEST_PAYLOAD_BYTES_MAX };
                if length_bytes > u64::from(bytes_max) {
                    return Err(Refusal(RequestError::TooLarge, Rejection::RequestLength));
                }
                Operation::Read { one_piece }
            }
            command::WRITE => {
                writable()?;
                if length_bytes > u64::from(REQUEST_PAYLOAD_BYTES_MAX) {
                    return Err(INVALID_LENGTH);
                }
                within(RequestError::NoSpace)?;
                Operation::Write { durable }
            }
            command::FLUSH => {
                if offset_bytes != 0 || length_bytes != 0 {
                    return Err(INVALID_LENGTH);
                }
                Operation::Flush
            }
            command::TRIM => {
                writable()?;
                within(RequestError::Invalid)?;
                Operation::Trim { durable }
            }
            command::CACHE => {
                within(RequestError::Invalid)?;
                Operation::Cache
            }
            command::WRITE_ZEROES => {
                writable()?;
                within(RequestError::NoSpace)?;
                Operation::WriteZeroes {
                    durable,
                    provisioned: has(command_flag::NO_HOLE),
                    only_if_fast: has(command_flag::FAST_ZERO),
                }
            }
            _ => {
                if !self.agreement.base_allocation {
                    return Err(INVALID_CONTEXT);
                }
                within(RequestError::Invalid)?;
                // The reply needs an extent of at least one byte.
                if length_bytes == 0 {
                    return Err(INVALID_LENGTH);
                }
                Operation::BlockStatus { one_extent: has(command_flag::REQ_ONE) }
            }
        };
        Ok(Request { cookie: header.cookie, operation, offset_bytes, length_bytes })
    }

    fn take_status_payload(
        &mut self,
        around: &mut Around<'_>,
        header: &RequestHeader,
        rest: &mut &[u8],
        out: &mut Vec<u8>,
    ) -> Turn {
        const LENGTH_ONLY: usize = StatusQuery::FIXED_BYTES;
        let mut bytes = [0; STATUS_PAYLOAD_BYTES];
        let payload = if header.length_bytes == LENGTH_ONLY as u64 {
            let Some(length) = around.carry.take::<LENGTH_ONLY>(rest) else { return Turn::Starved };
            bytes[..LENGTH_ONLY].copy_from_slice(&length);
            &bytes[..LENGTH_ONLY]
        } else {
            let Some(whole) = around.carry.take(rest) else { return Turn::Starved };
            bytes = whole;
            &bytes[..]
        };
        self.part = Part::Header;
        let query = StatusQuery::decode(payload).expect("a length and whole numbers of contexts");
        let known = query.contexts().all(|context| context == BASE_ALLOCATION_ID);
        let judged = self.judge(&RequestHeader { length_bytes: query.length_bytes, ..*header });
        match judged {
            _ if !known => refuse(around, header, INVALID_CONTEXT, out),
            Err(refusal) => refuse(around, header, refusal, out),
            Ok(request) if query.contexts().next().is_none() => {
                // Asked about no context, there is nothing to tell.
                out.extend_from_slice(around.replies.encode_done(&request).as_slice());
                Turn::Again
            }
            Ok(request) => Turn::Request(request),
        }
    }

    fn hand_over(around: &Around<'_>, request: Request, out: &mut Vec<u8>) -> Turn {
        if request.length_bytes > 0 || request.operation == Operation::Flush {
            return Turn::Request(request);
        }
        out.extend_from_slice(around.replies.encode_done(&request).as_slice());
        Turn::Again
    }
}

fn refuse(around: &mut Around<'_>, header: &RequestHeader, refusal: Refusal, out: &mut Vec<u8>) -> Turn {
    let Refusal(error, rejection) = refusal;
    around.rejections.note(rejection);
    let reply = around.replies.error(header.cookie, header.offset_bytes, error_number(error));
    out.extend_from_slice(reply.as_slice());
    Turn::Again
}
