//! Each command: accepted, and refused with exactly one error.

use super::Client;
use crate::limits::{NBD_PAYLOAD_SKIP_BYTES_MAX, NBD_UNFRAGMENTED_BYTES_MAX, REQUEST_PAYLOAD_BYTES_MAX};
use crate::request::{Operation, Request};
use crate::session::nbd::fuzzing::FixedExports;
use crate::session::nbd::{CloseReason, Rejection, Session, SessionConfig, Step};
use crate::wire::nbd_transmission::{
    Chunk, HeaderStyle, ReplyHeader, RequestHeader, StatusQuery, command, command_flag, error_number,
};

use command::{BLOCK_STATUS, CACHE, DISC, FLUSH, READ, RESIZE, TRIM, WRITE, WRITE_ZEROES};
use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
use error_number::{EINVAL, ENOSPC, EOVERFLOW, EPERM, ESHUTDOWN};

const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];
const SIZE: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const COOKIE: u64 = 0x0123_4567_89ab_cdef;

/// What became of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The engine gets it.
    Runs(Operation),
    /// The session answered: zero for success.
    Answered(u32),
    /// The connection ends.
    Closes(Rejection),
}

use Outcome::{Answered, Closes, Runs};

/// Sends one request, with its payload where one is due and short, then a FLUSH that must still be understood.
fn outcome(style: HeaderStyle, export: &str, request: RequestHeader) -> Outcome {
    let mut client = Client::new().transmission(style, export);
    let handshake_bytes = client.0.len();
    let extended_payload = style == HeaderStyle::Extended && request.flags & PAYLOAD_LEN != 0;
    let payload_bytes = if extended_payload || request.command == WRITE {
        usize::try_from(request.length_bytes).unwrap()
    } else {
        0
    };
    client = client.request(style, request);
    let mut session = Session::new(SessionConfig::default());
    let exports = FixedExports::default();
    let mut out = Vec::new();
    let (consumed, step) = session.advance(&client.0[..handshake_bytes], &exports, &mut out);
    assert_eq!(consumed, handshake_bytes);
    assert!(matches!(step, Step::Selected(_)));
    out.clear();
    let mut step = session.advance(&client.0[handshake_bytes..], &exports, &mut out).1;
    let zeroes = vec![0; 1 << 20];
    let mut payload_left = if matches!(step, Step::Request(_)) { 0 } else { payload_bytes };
    while payload_left > 0 && step == Step::NeedMore {
        let part = payload_left.min(zeroes.len());
        payload_left -= part;
        step = session.advance(&zeroes[..part], &exports, &mut out).1;
    }
    let refused = session.rejections().iter().count();
    match step {
        Step::Close(CloseReason::Refused(rejection)) => {
            assert!(out.is_empty());
            return Closes(rejection);
        }
        Step::Close(reason) => panic!("{reason:?}"),
        _ => {}
    }
    let flush = RequestHeader { flags: 0, command: FLUSH, cookie: 1, offset_bytes: 0, length_bytes: 0 };
    let answers = out.len();
    let (_, after) = session.advance(flush.encode(style).as_slice(), &exports, &mut out);
    let expected = Request { cookie: 1, operation: Operation::Flush, offset_bytes: 0, length_bytes: 0 };
    assert_eq!(after, Step::Request(expected), "{request:?} leaves the stream out of step");
    assert_eq!(out.len(), answers);
    if let Step::Request(accepted) = step {
        assert!(out.is_empty());
        assert_eq!((accepted.cookie, accepted.offset_bytes), (COOKIE, request.offset_bytes));
        assert_eq!(refused, 0);
        return Runs(accepted.operation);
    }
    let error = answered(style, &request, &out);
    assert_eq!(refused, usize::from(error != 0));
    Answered(error)
}

/// The error in the one reply that `out` holds.
fn answered(style: HeaderStyle, request: &RequestHeader, out: &[u8]) -> u32 {
    let (header, len) = ReplyHeader::decode(style, out).unwrap().expect("a reply");
    match header {
        ReplyHeader::Simple { error, cookie } => {
            assert_eq!(style, HeaderStyle::Simple, "chunks were negotiated");
            assert_eq!((cookie, out.len()), (COOKIE, len));
            error
        }
        ReplyHeader::Chunk(chunk) => {
            assert!(chunk.is_last() && chunk.cookie == COOKIE);
            let echoed = if style == HeaderStyle::Extended { request.offset_bytes } else { 0 };
            assert_eq!(chunk.request_offset_bytes, echoed);
            assert_eq!(out.len() - len, usize::try_from(chunk.length_bytes).unwrap());
            match Chunk::decode(chunk.kind, &out[len..]).unwrap() {
                Chunk::None => 0,
                Chunk::Error { error, .. } => error,
                other => panic!("{other:?}"),
            }
        }
    }
}

fn request(command: u16, flags: u16, offset_bytes: u64, length_bytes: u64) -> RequestHeader {
    RequestHeader { flags, command, cookie: COOKIE, offset_bytes, length_bytes }
}

/// In the extended style a WRITE announces its payload.
fn write(style: HeaderStyle, flags: u16, offset_bytes: u64, length_bytes: u64) -> RequestHeader {
    let announce = if style == HeaderStyle::Extended { PAYLOAD_LEN } else { 0 };
    request(WRITE, flags | announce, offset_bytes, length_bytes)
}

#[test]
fn every_command_is_accepted_with_all_its_flags() {
    let zeroes = |durable, provisioned, only_if_fast| {
        Runs(Operation::WriteZeroes { durable, provisioned, only_if_fast })
    };
    let status = |one_extent| Runs(Operation::BlockStatus { one_extent });
    for style in STYLES {
        let check = |request, expected| {
            assert_eq!(outcome(style, "vol", request), expected, "{style:?} {request:?}");
        };
        check(request(READ, 0, 1, 4095), Runs(Operation::Read { one_piece: false }));
        check(request(READ, FUA, SIZE - 1, 1), Runs(Operation::Read { one_piece: false }));
        check(request(READ, 0, 0, 32 * MIB), Runs(Operation::Read { one_piece: false }));
        check(write(style, 0, 0, 512), Runs(Operation::Write { durable: false }));
        check(write(style, FUA, SIZE - 5, 5), Runs(Operation::Write { durable: true }));
        // qemu's client leaves out the announcement.
        check(request(WRITE, 0, 0, 512), Runs(Operation::Write { durable: false }));
        check(write(style, 0, 0, 32 * MIB), Runs(Operation::Write { durable: false }));
        check(request(FLUSH, 0, 0, 0), Runs(Operation::Flush));
        check(request(FLUSH, FUA, 0, 0), Runs(Operation::Flush));
        check(request(TRIM, 0, 0, SIZE), Runs(Operation::Trim { durable: false }));
        check(request(TRIM, FUA, 7, 9), Runs(Operation::Trim { durable: true }));
        check(request(CACHE, 0, 0, SIZE), Runs(Operation::Cache));
        check(request(CACHE, FUA, 0, 1), Runs(Operation::Cache));
        check(request(WRITE_ZEROES, 0, 0, SIZE), zeroes(false, false, false));
        check(request(WRITE_ZEROES, FUA | NO_HOLE, 0, 1), zeroes(true, true, false));
        check(request(WRITE_ZEROES, FAST_ZERO, 0, SIZE), zeroes(false, false, true));
        if style != HeaderStyle::Simple {
            check(request(READ, DF, 0, MIB), Runs(Operation::Read { one_piece: true }));
            check(request(BLOCK_STATUS, FUA, 0, SIZE), status(false));
            check(request(BLOCK_STATUS, REQ_ONE, SIZE - 1, 1), status(true));
        }
    }
    // The whole of an export that only extended requests can name at once.
    for command in [TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS] {
        let all = outcome(HeaderStyle::Extended, "huge", request(command, 0, 0, 1 << 40));
        assert!(matches!(all, Runs(_)), "{command}: {all:?}");
    }
}

#[test]
fn every_breach_has_its_error() {
    for style in STYLES {
        let check = |request, error| {
            assert_eq!(outcome(style, "vol", request), Answered(error), "{style:?} {request:?}");
        };
        let past_the_end = [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512), (0, 0xffff_ffff)];
        for (offset, length) in past_the_end {
            check(request(READ, 0, offset, length), EINVAL);
            check(request(TRIM, 0, offset, length), EINVAL);
            check(request(CACHE, 0, offset, length), EINVAL);
            check(request(BLOCK_STATUS, 0, offset, length), EINVAL);
            check(request(WRITE_ZEROES, 0, offset, length), ENOSPC);
            if length < 4096 {
                check(write(style, 0, offset, length), ENOSPC);
            }
        }
        check(request(READ, 0, 0, u64::from(REQUEST_PAYLOAD_BYTES_MAX) + 1), EOVERFLOW);
        check(request(RESIZE, 0, 0, 4096), EINVAL);
        check(request(0xffff, 0, 0, 4096), EINVAL);
        check(request(FLUSH, 0, 4096, 0), EINVAL);
        check(request(FLUSH, 0, 0, 4096), EINVAL);
        check(write(style, FAST_ZERO, 0, 512), EINVAL);
        check(write(style, NO_HOLE, 0, 512), EINVAL);
        check(request(WRITE, NO_HOLE, 0, 512), EINVAL);
        for flag in [NO_HOLE, REQ_ONE, FAST_ZERO, 1 << 6, 1 << 14, 1 << 15] {
            check(request(READ, flag, 0, 512), EINVAL);
        }
        for command in [FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
            check(request(command, DF, 0, 0), EINVAL);
        }
        for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES] {
            check(request(command, PAYLOAD_LEN, 0, 512), EINVAL);
        }
        if style == HeaderStyle::Simple {
            check(request(READ, DF, 0, 512), EINVAL);
            check(request(BLOCK_STATUS, 0, 0, 512), EINVAL);
        } else {
            check(request(READ, DF, 0, u64::from(NBD_UNFRAGMENTED_BYTES_MAX) + 1), EOVERFLOW);
            check(request(BLOCK_STATUS, 0, 0, 0), EINVAL);
        }
    }
}

#[test]
fn changes_of_a_read_only_export_are_not_permitted() {
    for style in STYLES {
        for request in [write(style, 0, 0, 512), request(TRIM, 0, 0, 512), request(WRITE_ZEROES, 0, 0, 512)] {
            assert_eq!(outcome(style, "frozen", request), Answered(EPERM));
            // Even where nothing would change, and past the end.
            let nothing = RequestHeader { length_bytes: 0, ..request };
            assert_eq!(outcome(style, "frozen", nothing), Answered(EPERM));
            let beyond = RequestHeader { offset_bytes: SIZE, ..request };
            assert_eq!(outcome(style, "frozen", beyond), Answered(EPERM));
        }
        let read = outcome(style, "frozen", request(READ, 0, 0, 512));
        assert_eq!(read, Runs(Operation::Read { one_piece: false }));
    }
}

#[test]
fn requests_for_nothing_succeed_at_once() {
    for style in STYLES {
        for command in [READ, TRIM, CACHE, WRITE_ZEROES] {
            assert_eq!(outcome(style, "vol", request(command, FUA, SIZE, 0)), Answered(0));
        }
        assert_eq!(outcome(style, "vol", write(style, FUA, 0, 0)), Answered(0));
        assert_eq!(outcome(style, "vol", request(READ, 0, SIZE + 1, 0)), Answered(EINVAL));
        assert_eq!(outcome(style, "vol", write(style, 0, SIZE + 1, 0)), Answered(ENOSPC));
    }
}

#[test]
fn oversized_payloads_are_skipped_or_end_the_connection() {
    let (max, skip) = (u64::from(REQUEST_PAYLOAD_BYTES_MAX), u64::from(NBD_PAYLOAD_SKIP_BYTES_MAX));
    for style in [HeaderStyle::Simple, HeaderStyle::Structured] {
        assert_eq!(outcome(style, "vol", write(style, 0, 0, max + 1)), Answered(EINVAL));
        assert_eq!(outcome(style, "vol", write(style, 0, 0, skip)), Answered(EINVAL));
        for length in [skip + 1, 1 << 31, 0xffff_ffff] {
            assert_eq!(outcome(style, "vol", write(style, 0, 0, length)), Closes(Rejection::PayloadLength));
        }
    }
    let extended = HeaderStyle::Extended;
    for length in [max + 1, 0xffff_ffff, 1 << 32, u64::MAX] {
        assert_eq!(outcome(extended, "vol", write(extended, 0, 0, length)), Closes(Rejection::PayloadLength));
        let status = request(BLOCK_STATUS, PAYLOAD_LEN, 0, length);
        assert_eq!(outcome(extended, "vol", status), Closes(Rejection::PayloadLength));
    }
}

#[test]
fn a_payload_of_block_status_names_contexts() {
    let style = HeaderStyle::Extended;
    let ask = |effect_bytes: u64, contexts: &[u32]| {
        let mut payload = Vec::new();
        StatusQuery::encode(&mut payload, effect_bytes, contexts);
        let length = u64::try_from(payload.len()).unwrap();
        let header = request(BLOCK_STATUS, PAYLOAD_LEN, 4096, length);
        let client = Client::new().transmission(style, "vol").request(style, header).bytes(&payload);
        client.check();
        let mut played = client.request(style, request(DISC, 0, 0, 0)).play();
        assert_eq!(played.steps.pop(), Some(Step::Close(CloseReason::Disconnected)));
        let header_at = played.out.windows(4).position(|word| word == 0x6e8a_278c_u32.to_be_bytes());
        match played.steps.pop() {
            Some(Step::Request(request)) => {
                assert_eq!(request.operation, Operation::BlockStatus { one_extent: false });
                assert_eq!((request.offset_bytes, header_at), (4096, None));
                Ok(request.length_bytes)
            }
            _ => Err(answered(style, &header, &played.out[header_at.expect("a reply")..])),
        }
    };
    assert_eq!(ask(8192, &[1]), Ok(8192));
    assert_eq!(ask(8192, &[]), Err(0));
    assert_eq!(ask(8192, &[2]), Err(EINVAL));
    assert_eq!(ask(8192, &[1, 1]), Err(EINVAL));
    assert_eq!(ask(8192, &[1; 300]), Err(EINVAL));
    assert_eq!(ask(0, &[1]), Err(EINVAL));
    assert_eq!(ask(SIZE, &[1]), Err(EINVAL));
    assert_eq!(ask(u64::MAX, &[1]), Err(EINVAL));
    for odd in [1, 7, 9, 11, 13] {
        assert_eq!(outcome(style, "vol", request(BLOCK_STATUS, PAYLOAD_LEN, 0, odd)), Answered(EINVAL));
    }
}

#[test]
fn block_status_needs_the_context_of_this_export() {
    use crate::wire::nbd_handshake::option;
    let client = Client::new()
        .option(option::STRUCTURED_REPLY, b"")
        .contexts(option::SET_META_CONTEXT, "huge", &["base:allocation"])
        .query(option::GO, "vol", &[])
        .request(HeaderStyle::Structured, request(BLOCK_STATUS, 0, 0, 512));
    let played = client.play();
    assert_eq!(played.steps.len(), 1, "selected, and no request");
    assert_eq!(played.rejections.count(Rejection::MetaContext), 1);
}

#[test]
fn a_stopping_server_refuses_requests_and_stays_in_step() {
    let style = HeaderStyle::Structured;
    let client = Client::new().transmission(style, "vol");
    let mut session = Session::new(SessionConfig::default());
    let (exports, mut out) = (FixedExports::default(), Vec::new());
    session.advance(&client.0, &exports, &mut out);
    session.begin_shutdown();
    out.clear();
    let write = request(WRITE, 0, 0, 512);
    let stream =
        Client(Vec::new()).request(style, write).bytes(&[0; 512]).request(style, request(DISC, 0, 0, 0));
    let (consumed, step) = session.advance(&stream.0, &exports, &mut out);
    assert_eq!((consumed, step), (stream.0.len(), Step::Close(CloseReason::Disconnected)));
    assert_eq!(answered(style, &write, &out), ESHUTDOWN);
}

#[test]
fn a_read_only_listener_overrides_the_export() {
    let mut session = Session::new(SessionConfig { read_only: true });
    let client = Client::new()
        .transmission(HeaderStyle::Simple, "vol")
        .request(HeaderStyle::Simple, request(TRIM, 0, 0, 512));
    let (exports, mut out) = (FixedExports::default(), Vec::new());
    let (consumed, step) = session.advance(&client.0, &exports, &mut out);
    assert!(matches!(step, Step::Selected(_)));
    out.clear();
    assert_eq!(session.advance(&client.0[consumed..], &exports, &mut out).1, Step::NeedMore);
    assert_eq!(answered(HeaderStyle::Simple, &request(TRIM, 0, 0, 512), &out), EPERM);
}
