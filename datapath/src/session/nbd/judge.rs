//! Every request is judged here, from its header, the agreement and nothing else; the checks come in this order.
//!
//! | a request that ... | is answered |
//! |---|---|
//! | is no request, or has a payload of absurd length | by closing: the stream is lost |
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

use super::{Agreement, Rejection};
use crate::limits::{NBD_PAYLOAD_SKIP_BYTES_MAX, NBD_UNFRAGMENTED_BYTES_MAX, REQUEST_PAYLOAD_BYTES_MAX};
use crate::request::{Operation, Request, RequestError};
use crate::wire::nbd_transmission::{HeaderStyle, RequestHeader, command, command_flag};

/// Why a request is refused: the error for the client, the reason for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) RequestError, pub(super) Rejection);

const INVALID_FLAG: Refusal = Refusal(RequestError::Invalid, Rejection::CommandFlag);
pub(super) const INVALID_PAYLOAD: Refusal = Refusal(RequestError::Invalid, Rejection::CommandPayload);
pub(super) const INVALID_CONTEXT: Refusal = Refusal(RequestError::Invalid, Rejection::MetaContext);
const INVALID_LENGTH: Refusal = Refusal(RequestError::Invalid, Rejection::RequestLength);

/// Bytes that follow the header, as far as they can be known; else why the stream is lost.
pub(super) fn payload_bytes(agreement: &Agreement, header: &RequestHeader) -> Result<u64, Rejection> {
    let is_write = header.command == command::WRITE;
    let (follows, bytes_max) = if agreement.style == HeaderStyle::Extended {
        // The client of qemu 10.0 does not announce the payload of a WRITE, as it must, and sends it all the same.
        // No client can mean a WRITE without one.
        (is_write || header.flags & command_flag::PAYLOAD_LEN != 0, REQUEST_PAYLOAD_BYTES_MAX)
    } else {
        (is_write, NBD_PAYLOAD_SKIP_BYTES_MAX)
    };
    match header.length_bytes {
        _ if !follows => Ok(0),
        length if length > u64::from(bytes_max) => Err(Rejection::PayloadLength),
        length => Ok(length),
    }
}

/// Checks what can be checked before a payload is there: does the command exist, and do the flags belong to it
/// and to the agreement?
pub(super) fn judge_flags(
    agreement: &Agreement,
    shutting_down: bool,
    header: &RequestHeader,
) -> Result<(), Refusal> {
    let when = |condition: bool, flag: u16| if condition { flag } else { 0 };
    let extended = agreement.style == HeaderStyle::Extended;
    let chunks = agreement.style != HeaderStyle::Simple;
    let known = match header.command {
        command::READ => when(chunks, command_flag::DF),
        command::WRITE => when(extended, command_flag::PAYLOAD_LEN),
        command::FLUSH | command::TRIM | command::CACHE => 0,
        command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
        command::BLOCK_STATUS => {
            command_flag::REQ_ONE | when(agreement.takes_status_payload(), command_flag::PAYLOAD_LEN)
        }
        _ => return Err(Refusal(RequestError::Invalid, Rejection::Command)),
    };
    let unknown = header.flags & !(known | command_flag::FUA);
    if unknown == command_flag::PAYLOAD_LEN && extended {
        Err(INVALID_PAYLOAD)
    } else if unknown != 0 {
        Err(INVALID_FLAG)
    } else if shutting_down {
        Err(Refusal(RequestError::ShuttingDown, Rejection::RequestShutdown))
    } else {
        Ok(())
    }
}

/// The request, if the export and the agreement allow it. Flags are known to belong to the command.
pub(super) fn judge(agreement: &Agreement, header: &RequestHeader) -> Result<Request, Refusal> {
    let has = |flag: u16| header.flags & flag != 0;
    let durable = has(command_flag::FUA);
    let (offset_bytes, length_bytes) = (header.offset_bytes, header.length_bytes);
    let within = |error: RequestError| {
        let end = offset_bytes.checked_add(length_bytes);
        let inside = end.is_some_and(|end| end <= agreement.size_bytes);
        if inside { Ok(()) } else { Err(Refusal(error, Rejection::Range)) }
    };
    let writable = || {
        let refusal = Refusal(RequestError::NotPermitted, Rejection::ReadOnly);
        if agreement.read_only { Err(refusal) } else { Ok(()) }
    };
    let operation = match header.command {
        command::READ => {
            within(RequestError::Invalid)?;
            let one_piece = has(command_flag::DF);
            let bytes_max = if one_piece { NBD_UNFRAGMENTED_BYTES_MAX } else { REQUEST_PAYLOAD_BYTES_MAX };
            if length_bytes > u64::from(bytes_max) {
                return Err(Refusal(RequestError::TooLarge, Rejection::RequestLength));
            }
            Operation::Read { one_piece }
        }
        command::WRITE => {
            writable()?;
            within(RequestError::NoSpace)?;
            if length_bytes > u64::from(REQUEST_PAYLOAD_BYTES_MAX) {
                return Err(INVALID_LENGTH);
            }
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
            if !agreement.base_allocation {
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
