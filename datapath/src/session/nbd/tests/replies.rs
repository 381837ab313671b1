//! Replies byte by byte, in all styles.

use crate::request::{Extent, Operation, Request, RequestError};
use crate::session::nbd::Replies;
use crate::wire::nbd_transmission::{Chunk, HeaderStyle, ReplyHeader, StatusExtent, allocation_status};

const SIMPLE: Replies = Replies::new(HeaderStyle::Simple);
const STRUCTURED: Replies = Replies::new(HeaderStyle::Structured);
const EXTENDED: Replies = Replies::new(HeaderStyle::Extended);

fn request(operation: Operation, length_bytes: u64) -> Request {
    Request { cookie: 0x0102_0304_0506_0708, operation, offset_bytes: 0x1000, length_bytes }
}

fn read(length_bytes: u64) -> Request {
    request(Operation::Read { one_piece: false }, length_bytes)
}

#[test]
fn golden_success() {
    let flush = Request { offset_bytes: 0, ..request(Operation::Flush, 0) };
    assert_eq!(
        SIMPLE.encode_done(&flush).as_slice(),
        b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
    );
    assert_eq!(
        STRUCTURED.encode_done(&flush).as_slice(),
        b"\x66\x8e\x33\xef\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0"
    );
    let trim = request(Operation::Trim { durable: false }, 512);
    assert_eq!(
        EXTENDED.encode_done(&trim).as_slice(),
        b"\x6e\x8a\x27\x8c\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
          \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn golden_failure() {
    let io = RequestError::Io;
    assert_eq!(
        SIMPLE.encode_error(&read(512), io).as_slice(),
        b"\x67\x44\x66\x98\0\0\0\x05\x01\x02\x03\x04\x05\x06\x07\x08"
    );
    assert_eq!(
        STRUCTURED.encode_error(&read(512), io).as_slice(),
        b"\x66\x8e\x33\xef\0\x01\x80\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x06\0\0\0\x05\0\0"
    );
    assert_eq!(
        EXTENDED.encode_error(&read(512), io).as_slice(),
        b"\x6e\x8a\x27\x8c\0\x01\x80\x01\x01\x02\x03\x04\x05\x06\x07\x08\
          \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x06\0\0\0\x05\0\0"
    );
    assert_eq!(
        STRUCTURED.encode_error_at(&read(512), io, 0x1100, false).as_slice(),
        b"\x66\x8e\x33\xef\0\0\x80\x02\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x0e\
          \0\0\0\x05\0\0\0\0\0\0\0\0\x11\0"
    );
}

#[test]
fn golden_read() {
    assert_eq!(
        SIMPLE.read_header(&read(512), 0x1000, 512, false).as_slice(),
        b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
    );
    assert_eq!(
        STRUCTURED.read_header(&read(512), 0x1080, 256, true).as_slice(),
        b"\x66\x8e\x33\xef\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\x01\x08\0\0\0\0\0\0\x10\x80"
    );
    assert_eq!(
        EXTENDED.read_header(&read(512), 0x1080, 256, false).as_slice(),
        b"\x6e\x8a\x27\x8c\0\0\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\
          \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x01\x08\0\0\0\0\0\0\x10\x80"
    );
    assert_eq!(
        STRUCTURED.encode_hole(&read(512), 0x1080, 256, true).as_slice(),
        b"\x66\x8e\x33\xef\0\x01\0\x02\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x0c\0\0\0\0\0\0\x10\x80\0\0\x01\0"
    );
}

/// The extents that a client reads from the reply.
fn told(replies: Replies, request: &Request, extents: &[(u64, bool)]) -> Vec<(u64, bool)> {
    let extents: Vec<Extent> =
        extents.iter().map(|&(length_bytes, hole)| Extent { length_bytes, hole }).collect();
    let mut out = Vec::new();
    replies.encode_block_status(request, &extents, &mut out);
    let Ok(Some((ReplyHeader::Chunk(chunk), len))) = ReplyHeader::decode(replies.style(), &out) else {
        panic!("no chunk: {out:?}")
    };
    assert!(chunk.is_last());
    assert_eq!(u64::try_from(out.len() - len), Ok(chunk.length_bytes));
    let Ok(Chunk::Status { context: 1, extents }) = Chunk::decode(chunk.kind, &out[len..]) else {
        panic!("no status: {out:?}")
    };
    let hole = u64::from(allocation_status::HOLE | allocation_status::ZERO);
    extents.iter().map(|StatusExtent { length_bytes, status }| (length_bytes, status == hole)).collect()
}

#[test]
fn status_keeps_the_rules_for_lengths() {
    let status = |one_extent, length_bytes| request(Operation::BlockStatus { one_extent }, length_bytes);
    for replies in [STRUCTURED, EXTENDED] {
        let told = |request: Request, extents: &[(u64, bool)]| told(replies, &request, extents);
        let two = [(4096, false), (8192, true)];
        assert_eq!(told(status(false, 12288), &two), two);
        // Less than asked is legal; more is cut.
        assert_eq!(told(status(false, 1 << 20), &two), two);
        assert_eq!(told(status(false, 8192), &two), [(4096, false), (4096, true)]);
        assert_eq!(told(status(false, 4096), &two), [(4096, false)]);
        // One extent is one, and within the request.
        assert_eq!(told(status(true, 12288), &two), [(4096, false)]);
        assert_eq!(told(status(true, 100), &two), [(100, false)]);
        // Extents beyond 32 bits in a reply to a request of nearly 4 GiB.
        for length in [0xffff_ffff, 0xffff_fe00] {
            assert_eq!(told(status(false, length), &[(1 << 40, true), (4096, false)]), [(length, true)]);
        }
        let many: Vec<(u64, bool)> = (0..1000).map(|index| (4096, index % 2 == 0)).collect();
        assert_eq!(told(status(false, 1 << 30), &many), many[..256]);
    }
    assert_eq!(told(EXTENDED, &status(false, 1 << 41), &[(1 << 40, true)]), [(1 << 40, true)]);
}

#[test]
fn golden_status() {
    let status = request(Operation::BlockStatus { one_extent: false }, 0x3000);
    let extents = [Extent { length_bytes: 0x1000, hole: false }, Extent { length_bytes: 0x2000, hole: true }];
    let mut out = Vec::new();
    STRUCTURED.encode_block_status(&status, &extents, &mut out);
    assert_eq!(
        out,
        b"\x66\x8e\x33\xef\0\x01\0\x05\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x14\
          \0\0\0\x01\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\x03"
    );
    out.clear();
    EXTENDED.encode_block_status(&status, &extents, &mut out);
    assert_eq!(
        out,
        b"\x6e\x8a\x27\x8c\0\x01\0\x06\x01\x02\x03\x04\x05\x06\x07\x08\
          \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x28\0\0\0\x01\0\0\0\x02\
          \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\x03"
    );
}

#[test]
fn errors_that_a_command_may_not_have_become_legal_ones() {
    let zeroes = |only_if_fast| Operation::WriteZeroes { durable: false, provisioned: false, only_if_fast };
    let write = Operation::Write { durable: false };
    let read = Operation::Read { one_piece: true };
    let cases = [
        (read, RequestError::NotPermitted, 1),
        (read, RequestError::Io, 5),
        (read, RequestError::NoMemory, 12),
        (read, RequestError::Invalid, 22),
        (write, RequestError::NoSpace, 28),
        (read, RequestError::TooLarge, 75),
        (zeroes(true), RequestError::NotSupported, 95),
        (read, RequestError::ShuttingDown, 108),
        (zeroes(false), RequestError::NotSupported, 22),
        (read, RequestError::NotSupported, 22),
        (write, RequestError::TooLarge, 22),
        (Operation::Flush, RequestError::TooLarge, 22),
        (zeroes(true), RequestError::TooLarge, 95),
        (zeroes(false), RequestError::TooLarge, 75),
    ];
    for (operation, error, number) in cases {
        let bytes = SIMPLE.encode_error(&request(operation, 512), error);
        let header = ReplyHeader::Simple { error: number, cookie: 0x0102_0304_0506_0708 };
        assert_eq!(ReplyHeader::decode(HeaderStyle::Simple, bytes.as_slice()), Ok(Some((header, 16))));
    }
}

#[test]
#[should_panic(expected = "holds all the bytes")]
fn a_simple_reply_cannot_be_split() {
    let _ = SIMPLE.read_header(&read(512), 0x1000, 256, false);
}

#[test]
#[should_panic(expected = "leaves")]
fn a_chunk_cannot_leave_its_request() {
    let _ = STRUCTURED.read_header(&read(512), 0x1100, 512, false);
}

#[test]
#[should_panic(expected = "fragments")]
fn a_hole_cannot_split_one_piece() {
    let request = request(Operation::Read { one_piece: true }, 512);
    let _ = STRUCTURED.encode_hole(&request, 0x1000, 256, false);
}

#[test]
#[should_panic(expected = "without extents")]
fn a_status_needs_an_extent() {
    let status = request(Operation::BlockStatus { one_extent: false }, 512);
    STRUCTURED.encode_block_status(&status, &[], &mut Vec::new());
}
