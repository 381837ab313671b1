//! Transmission: finds the requests in the stream, and stays in step past those that are refused.
//!
//! Which requests are refused, and how, is decided in the module `judge`.

use super::carry::Carry;
use super::judge::{self, INVALID_CONTEXT, INVALID_PAYLOAD, Refusal};
use super::meta_context::BASE_ALLOCATION_ID;
use super::reply::error_number;
use super::{Agreement, CloseReason, Rejection, Rejections, Replies, Turn};
use crate::request::{ExportIndex, Operation, Request};
use crate::wire::nbd_transmission::{HeaderStyle, RequestHeader, StatusQuery, command};

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
        let payload_bytes = match judge::payload_bytes(&self.agreement, header) {
            Ok(payload_bytes) => payload_bytes,
            Err(rejection) => return Turn::refuse(around.rejections, rejection),
        };
        let verdict = judge::judge_flags(&self.agreement, around.shutting_down, header).and_then(|()| {
            if header.command != command::BLOCK_STATUS || payload_bytes == 0 {
                return judge::judge(&self.agreement, header).map(Some);
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
        let judged =
            judge::judge(&self.agreement, &RequestHeader { length_bytes: query.length_bytes, ..*header });
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
