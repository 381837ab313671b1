//! Turns the outcome of a request into the bytes of its reply, in the negotiated style.
//!
//! | outcome | simple | structured, extended |
//! |---|---|---|
//! | done, no payload | simple reply | NONE, last |
//! | READ | simple reply, then all the bytes | OFFSET_DATA and OFFSET_HOLE chunks, the last one marked |
//! | failed | simple reply with the error | ERROR, last |
//! | READ failed after data was sent | close the connection | ERROR_OFFSET |
//! | BLOCK_STATUS | not negotiable | BLOCK_STATUS or BLOCK_STATUS_EXT, last |

use super::meta_context::BASE_ALLOCATION_ID;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::request::{Extent, Operation, Request, RequestError};
use crate::wire::nbd_transmission::{
    ChunkHeader, HeaderBytes, HeaderStyle, allocation_status, chunk_flag, chunk_kind, encode_simple_reply,
    error_number,
};

/// Encodes replies. A copy may outlive the parser's part of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replies {
    style: HeaderStyle,
}

impl Replies {
    pub(super) const fn new(style: HeaderStyle) -> Replies {
        Replies { style }
    }

    /// Can a reply to READ leave out holes and tell an error after some of the data? If not, the whole answer
    /// must be known to be good before its header is sent.
    #[must_use]
    pub fn are_chunks(&self) -> bool {
        self.style != HeaderStyle::Simple
    }

    /// The style that was agreed on.
    #[must_use]
    pub fn style(&self) -> HeaderStyle {
        self.style
    }

    /// The reply to a request that succeeded and returns no payload. After chunks of a READ of which none was
    /// marked as the last, this ends the reply.
    #[must_use]
    pub fn encode_done(&self, request: &Request) -> HeaderBytes {
        self.done(request.cookie, request.offset_bytes)
    }

    /// The whole reply to a request that failed; ends a reply in chunks too.
    #[must_use]
    pub fn encode_error(&self, request: &Request, error: RequestError) -> HeaderBytes {
        let number = error_number(legal_error(request.operation, error));
        self.error(request.cookie, request.offset_bytes, number)
    }

    /// A chunk that says where a READ failed. Chunks of data sent before stay valid up to there; `last` ends the
    /// reply.
    ///
    /// # Panics
    /// If replies are not in chunks, or the offset lies outside the request.
    #[must_use]
    pub fn encode_error_at(
        &self,
        request: &Request,
        error: RequestError,
        offset_bytes: u64,
        last: bool,
    ) -> HeaderBytes {
        check_range(request, offset_bytes, 1);
        let number = error_number(legal_error(request.operation, error));
        let (cookie, offset) = (request.cookie, request.offset_bytes);
        let mut bytes = self.chunk(cookie, offset, chunk_kind::ERROR_OFFSET, 14, last);
        bytes.push(&number.to_be_bytes());
        bytes.push(&0u16.to_be_bytes());
        bytes.push(&offset_bytes.to_be_bytes());
        bytes
    }

    /// What stands directly in front of `length_bytes` bytes of a READ, which begin at `offset_bytes` of the
    /// export. `last` ends the reply, and may be set only when nothing can fail any more.
    ///
    /// # Panics
    /// If the bytes lie outside the request, or there are none; and if replies are simple and these are not
    /// all the bytes of the request.
    #[must_use]
    pub fn read_header(
        &self,
        request: &Request,
        offset_bytes: u64,
        length_bytes: u32,
        last: bool,
    ) -> HeaderBytes {
        check_range(request, offset_bytes, u64::from(length_bytes));
        if !self.are_chunks() {
            let whole =
                offset_bytes == request.offset_bytes && u64::from(length_bytes) == request.length_bytes;
            assert!(whole, "a simple reply holds all the bytes of a read");
            return encode_simple_reply(0, request.cookie);
        }
        let payload_bytes = 8 + u64::from(length_bytes);
        let (cookie, offset) = (request.cookie, request.offset_bytes);
        let mut bytes = self.chunk(cookie, offset, chunk_kind::OFFSET_DATA, payload_bytes, last);
        bytes.push(&offset_bytes.to_be_bytes());
        bytes
    }

    /// A chunk that says that a part of a READ is zeroes. Not for a request that asked for one piece.
    ///
    /// # Panics
    /// If replies are not in chunks, the range lies outside the request or is empty, or the request wants one
    /// piece and the hole is not the whole of it.
    #[must_use]
    pub fn encode_hole(
        &self,
        request: &Request,
        offset_bytes: u64,
        length_bytes: u32,
        last: bool,
    ) -> HeaderBytes {
        check_range(request, offset_bytes, u64::from(length_bytes));
        let one_piece = request.operation == Operation::Read { one_piece: true };
        let whole = u64::from(length_bytes) == request.length_bytes;
        assert!(!one_piece || whole, "a hole fragments a read that must not be");
        let (cookie, offset) = (request.cookie, request.offset_bytes);
        let mut bytes = self.chunk(cookie, offset, chunk_kind::OFFSET_HOLE, 12, last);
        bytes.push(&offset_bytes.to_be_bytes());
        bytes.push(&length_bytes.to_be_bytes());
        bytes
    }

    /// Appends the reply to BLOCK_STATUS: `extents` from the request's offset on, cut to what the protocol
    /// allows. A client asks again from the first byte that is not described.
    ///
    /// # Panics
    /// If there is no extent, or an empty one.
    pub fn encode_block_status(&self, request: &Request, extents: &[Extent], out: &mut Vec<u8>) {
        let count = u32::try_from(told(request, extents).count()).expect("at most STATUS_EXTENTS_MAX");
        assert!(count > 0, "a status without extents");
        let wide = self.style == HeaderStyle::Extended;
        let (kind, payload_bytes) = if wide {
            (chunk_kind::BLOCK_STATUS_EXT, 8 + 16 * u64::from(count))
        } else {
            (chunk_kind::BLOCK_STATUS, 4 + 8 * u64::from(count))
        };
        let mut header = self.chunk(request.cookie, request.offset_bytes, kind, payload_bytes, true);
        header.push(&BASE_ALLOCATION_ID.to_be_bytes());
        if wide {
            header.push(&count.to_be_bytes());
        }
        out.extend_from_slice(header.as_slice());
        for extent in told(request, extents) {
            let status = if extent.hole { allocation_status::HOLE | allocation_status::ZERO } else { 0 };
            if wide {
                out.extend_from_slice(&extent.length_bytes.to_be_bytes());
                out.extend_from_slice(&u64::from(status).to_be_bytes());
            } else {
                let length = u32::try_from(extent.length_bytes).expect("a compact request is below 4 GiB");
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&status.to_be_bytes());
            }
        }
    }

    pub(super) fn done(self, cookie: u64, request_offset_bytes: u64) -> HeaderBytes {
        if self.are_chunks() {
            self.chunk(cookie, request_offset_bytes, chunk_kind::NONE, 0, true)
        } else {
            encode_simple_reply(0, cookie)
        }
    }

    pub(super) fn error(self, cookie: u64, request_offset_bytes: u64, number: u32) -> HeaderBytes {
        if !self.are_chunks() {
            return encode_simple_reply(number, cookie);
        }
        let mut bytes = self.chunk(cookie, request_offset_bytes, chunk_kind::ERROR, 6, true);
        bytes.push(&number.to_be_bytes());
        bytes.push(&0u16.to_be_bytes());
        bytes
    }

    fn chunk(
        self,
        cookie: u64,
        request_offset_bytes: u64,
        kind: u16,
        length_bytes: u64,
        last: bool,
    ) -> HeaderBytes {
        let flags = if last { chunk_flag::DONE } else { 0 };
        ChunkHeader { flags, kind, cookie, request_offset_bytes, length_bytes }.encode(self.style)
    }
}

/// The number that stands for an error on the wire.
#[must_use]
pub(super) fn error_number(error: RequestError) -> u32 {
    match error {
        RequestError::NotPermitted => error_number::EPERM,
        RequestError::Io => error_number::EIO,
        RequestError::NoMemory => error_number::ENOMEM,
        RequestError::Invalid => error_number::EINVAL,
        RequestError::NoSpace => error_number::ENOSPC,
        RequestError::TooLarge => error_number::EOVERFLOW,
        RequestError::NotSupported => error_number::ENOTSUP,
        RequestError::ShuttingDown => error_number::ESHUTDOWN,
    }
}

/// Two errors are legal with few commands: ENOTSUP only with FAST_ZERO, EOVERFLOW only without a payload from
/// the client and not with FAST_ZERO.
fn legal_error(operation: Operation, error: RequestError) -> RequestError {
    let fast_only = matches!(operation, Operation::WriteZeroes { only_if_fast: true, .. });
    match (error, operation) {
        (RequestError::NotSupported, _) if !fast_only => RequestError::Invalid,
        (RequestError::TooLarge, _) if fast_only => RequestError::NotSupported,
        (RequestError::TooLarge, Operation::Write { .. } | Operation::Flush) => RequestError::Invalid,
        (error, _) => error,
    }
}

/// The extents that a reply tells. Nothing past the requested end is told: this keeps the rules for REQ_ONE and for
/// the sum of the lengths, and a compact reply within 32 bits.
fn told<'a>(request: &Request, extents: &'a [Extent]) -> impl Iterator<Item = Extent> + use<'a> {
    let one_extent = request.operation == Operation::BlockStatus { one_extent: true };
    let extents_max = if one_extent { 1 } else { STATUS_EXTENTS_MAX };
    let mut left = request.length_bytes;
    extents.iter().take(extents_max).map_while(move |extent| {
        assert!(extent.length_bytes > 0, "an extent without bytes");
        let length_bytes = extent.length_bytes.min(left);
        left -= length_bytes;
        (length_bytes > 0).then_some(Extent { length_bytes, hole: extent.hole })
    })
}

fn check_range(request: &Request, offset_bytes: u64, length_bytes: u64) {
    let inside = offset_bytes.checked_sub(request.offset_bytes).is_some_and(|start| {
        length_bytes > 0 && start <= request.length_bytes && length_bytes <= request.length_bytes - start
    });
    assert!(inside, "{offset_bytes}+{length_bytes} leaves {request:?}");
}
