//! The transmission's codec against golden bytes, round trips and noise.

use super::*;
use crate::wire::random::Xorshift;

const REQUEST: RequestHeader = RequestHeader {
    flags: command_flag::FUA,
    command: command::WRITE,
    cookie: 0x1112_1314_1516_1718,
    offset_bytes: 0x2122_2324_2526_2728,
    length_bytes: 0x3132_3334,
};

#[test]
fn golden_requests() {
    let compact = b"\x25\x60\x95\x13\x00\x01\x00\x01\x11\x12\x13\x14\x15\x16\x17\x18\
                    \x21\x22\x23\x24\x25\x26\x27\x28\x31\x32\x33\x34";
    assert_eq!(REQUEST.encode(HeaderStyle::Simple).as_slice(), compact);
    assert_eq!(REQUEST.encode(HeaderStyle::Structured).as_slice(), compact);
    assert_eq!(RequestHeader::decode(compact), Ok(REQUEST));
    let extended = b"\x21\xe4\x1c\x71\x00\x01\x00\x01\x11\x12\x13\x14\x15\x16\x17\x18\
                     \x21\x22\x23\x24\x25\x26\x27\x28\x00\x00\x00\x00\x31\x32\x33\x34";
    assert_eq!(REQUEST.encode(HeaderStyle::Extended).as_slice(), extended);
    assert_eq!(RequestHeader::decode_extended(extended), Ok(REQUEST));
    // Neither style passes for the other.
    assert_eq!(RequestHeader::decode(extended.first_chunk().unwrap()), Err(WireError::Magic));
    let mut padded = [0; 32];
    padded[..28].copy_from_slice(compact);
    assert_eq!(RequestHeader::decode_extended(&padded), Err(WireError::Magic));
    assert_eq!(compact.len(), HeaderStyle::Structured.request_bytes());
    assert_eq!(extended.len(), HeaderStyle::Extended.request_bytes());
}

#[test]
fn golden_reply_headers() {
    let simple = encode_simple_reply(error_number::ENOSPC, 0x0102_0304_0506_0708);
    let bytes = b"\x67\x44\x66\x98\x00\x00\x00\x1c\x01\x02\x03\x04\x05\x06\x07\x08";
    assert_eq!(simple.as_slice(), bytes);
    let decoded = ReplyHeader::Simple { error: 28, cookie: 0x0102_0304_0506_0708 };
    assert_eq!(ReplyHeader::decode(HeaderStyle::Simple, bytes), Ok(Some((decoded, 16))));
    assert_eq!(ReplyHeader::decode(HeaderStyle::Structured, bytes), Ok(Some((decoded, 16))));
    assert_eq!(ReplyHeader::decode(HeaderStyle::Extended, bytes), Err(WireError::Magic));

    let chunk = ChunkHeader {
        flags: chunk_flag::DONE,
        kind: chunk_kind::OFFSET_DATA,
        cookie: 0x0102_0304_0506_0708,
        request_offset_bytes: 0,
        length_bytes: 9,
    };
    let bytes = b"\x66\x8e\x33\xef\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x09";
    assert_eq!(chunk.encode(HeaderStyle::Structured).as_slice(), bytes);
    assert_eq!(
        ReplyHeader::decode(HeaderStyle::Structured, bytes),
        Ok(Some((ReplyHeader::Chunk(chunk), 20)))
    );
    assert_eq!(ReplyHeader::decode(HeaderStyle::Simple, bytes), Err(WireError::Magic));
    assert!(chunk.is_last());

    let chunk = ChunkHeader { request_offset_bytes: 0x2122, flags: 0, ..chunk };
    let bytes = b"\x6e\x8a\x27\x8c\x00\x00\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
                  \x00\x00\x00\x00\x00\x00\x21\x22\x00\x00\x00\x00\x00\x00\x00\x09";
    assert_eq!(chunk.encode(HeaderStyle::Extended).as_slice(), bytes);
    assert_eq!(ReplyHeader::decode(HeaderStyle::Extended, bytes), Ok(Some((ReplyHeader::Chunk(chunk), 32))));
    assert!(!chunk.is_last());
    for short in 0..bytes.len() {
        assert_eq!(ReplyHeader::decode(HeaderStyle::Extended, &bytes[..short]), Ok(None));
    }
}

#[test]
fn golden_chunk_payloads() {
    let decode = Chunk::decode;
    assert_eq!(decode(chunk_kind::NONE, b""), Ok(Chunk::None));
    assert_eq!(
        decode(chunk_kind::OFFSET_DATA, b"\0\0\0\0\0\0\x10\0ab"),
        Ok(Chunk::Data { offset_bytes: 4096, data: b"ab" })
    );
    assert_eq!(
        decode(chunk_kind::OFFSET_HOLE, b"\0\0\0\0\0\0\x10\0\0\0\0\x09"),
        Ok(Chunk::Hole { offset_bytes: 4096, length_bytes: 9 })
    );
    assert_eq!(
        decode(chunk_kind::ERROR, b"\0\0\0\x05\0\x03bad"),
        Ok(Chunk::Error { error: 5, message: "bad", offset_bytes: None })
    );
    assert_eq!(
        decode(chunk_kind::ERROR_OFFSET, b"\0\0\0\x05\0\0\0\0\0\0\0\0\0\x07"),
        Ok(Chunk::Error { error: 5, message: "", offset_bytes: Some(7) })
    );
    // An error of an unknown kind is still an error.
    assert_eq!(
        decode(chunk_kind::ERROR_BIT | 99, b"\0\0\0\x05\0\0what else"),
        Ok(Chunk::Error { error: 5, message: "", offset_bytes: None })
    );
}

#[test]
fn golden_status_chunks() {
    let narrow = b"\0\0\0\x01\0\0\x10\0\0\0\0\x03\0\0\x20\0\0\0\0\0";
    let wide = b"\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0";
    let expected =
        [StatusExtent { length_bytes: 4096, status: 3 }, StatusExtent { length_bytes: 8192, status: 0 }];
    for (kind, payload) in
        [(chunk_kind::BLOCK_STATUS, &narrow[..]), (chunk_kind::BLOCK_STATUS_EXT, &wide[..])]
    {
        let Ok(Chunk::Status { context: 1, extents }) = Chunk::decode(kind, payload) else {
            panic!("kind {kind}")
        };
        assert_eq!(extents.count(), 2);
        assert_eq!(extents.iter().collect::<Vec<_>>(), expected);
        for cut in 0..payload.len() {
            let whole_narrow = kind == chunk_kind::BLOCK_STATUS && cut == 12;
            assert_eq!(Chunk::decode(kind, &payload[..cut]).is_ok(), whole_narrow, "{kind} cut at {cut}");
        }
    }
}

#[test]
fn chunks_that_break_the_rules_are_refused() {
    let refused: [(u16, &[u8], WireError); 12] = [
        (chunk_kind::NONE, b"x", WireError::Trailing),
        (chunk_kind::OFFSET_DATA, b"\0\0\0\0\0\0\0\0", WireError::Truncated),
        (chunk_kind::OFFSET_DATA, b"\0\0\0", WireError::Truncated),
        (chunk_kind::OFFSET_HOLE, b"\0\0\0\0\0\0\0\0\0\0\0\0", WireError::Range),
        (chunk_kind::OFFSET_HOLE, b"\0\0\0\0\0\0\0\0\0\0\0\x01\0", WireError::Trailing),
        (chunk_kind::BLOCK_STATUS, b"\0\0\0\x01", WireError::Truncated),
        (chunk_kind::BLOCK_STATUS, b"\0\0\0\x01\0\0\0\0\0\0\0\0", WireError::Range),
        (chunk_kind::BLOCK_STATUS_EXT, b"\0\0\0\x01\0\0\0\x01\0\0\0\0", WireError::Truncated),
        (chunk_kind::ERROR, b"\0\0\0\0\0\0", WireError::Range),
        (chunk_kind::ERROR, b"\0\0\0\x05\xff\xffx", WireError::Truncated),
        (chunk_kind::ERROR_OFFSET, b"\0\0\0\x05\0\0\0\0", WireError::Truncated),
        (7, b"", WireError::Kind),
    ];
    for (kind, payload, error) in refused {
        assert_eq!(Chunk::decode(kind, payload), Err(error), "{kind} {payload:?}");
    }
}

#[test]
fn golden_status_query() {
    let mut out = Vec::new();
    StatusQuery::encode(&mut out, 1 << 40, &[1, 7]);
    assert_eq!(out, b"\0\0\x01\0\0\0\0\0\0\0\0\x01\0\0\0\x07");
    let query = StatusQuery::decode(&out).unwrap();
    assert_eq!((query.length_bytes, query.contexts().collect::<Vec<_>>()), (1 << 40, vec![1, 7]));
    assert_eq!(StatusQuery::decode(&out[..15]), Err(WireError::Truncated));
    assert_eq!(StatusQuery::decode(&out[..7]), Err(WireError::Truncated));
    assert_eq!(StatusQuery::decode(&out[..8]).unwrap().contexts().count(), 0);
}

#[test]
fn what_was_encoded_is_decoded() {
    let mut random = Xorshift::new(3);
    let narrow = |number: u64| number >> 32;
    for _ in 0..5000 {
        let request = RequestHeader {
            flags: random.number().to_be_bytes().first_chunk().map(|b| u16::from_be_bytes(*b)).unwrap(),
            command: random.number().to_be_bytes().first_chunk().map(|b| u16::from_be_bytes(*b)).unwrap(),
            cookie: random.number(),
            offset_bytes: random.number(),
            length_bytes: narrow(random.number()),
        };
        let compact = request.encode(HeaderStyle::Simple);
        assert_eq!(RequestHeader::decode(compact.as_slice().first_chunk().unwrap()), Ok(request));
        let request = RequestHeader { length_bytes: random.number(), ..request };
        let extended = request.encode(HeaderStyle::Extended);
        assert_eq!(RequestHeader::decode_extended(extended.as_slice().first_chunk().unwrap()), Ok(request));

        let chunk = ChunkHeader {
            flags: request.flags,
            kind: request.command,
            cookie: request.cookie,
            request_offset_bytes: request.offset_bytes,
            length_bytes: request.length_bytes,
        };
        let bytes = chunk.encode(HeaderStyle::Extended);
        let decoded = ReplyHeader::decode(HeaderStyle::Extended, bytes.as_slice());
        assert_eq!(decoded, Ok(Some((ReplyHeader::Chunk(chunk), 32))));
        let chunk =
            ChunkHeader { request_offset_bytes: 0, length_bytes: narrow(chunk.length_bytes), ..chunk };
        let bytes = chunk.encode(HeaderStyle::Structured);
        let decoded = ReplyHeader::decode(HeaderStyle::Structured, bytes.as_slice());
        assert_eq!(decoded, Ok(Some((ReplyHeader::Chunk(chunk), 20))));
    }
}

#[test]
fn arbitrary_bytes_never_panic() {
    let mut random = Xorshift::new(4);
    let kinds = [0, 1, 2, 3, 5, 6, 0x8001, 0x8002, 0x8003, 0xffff];
    for _ in 0..20_000 {
        let len = random.below(64);
        let mut bytes = random.bytes(len);
        for byte in &mut bytes {
            if random.below(3) > 0 {
                *byte %= 3;
            }
        }
        if let Ok(Chunk::Status { extents, .. }) = Chunk::decode(random.pick(&kinds), &bytes) {
            assert_eq!(extents.iter().count(), extents.count());
        }
        let magics = [SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC, 0];
        if random.below(2) == 0 && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&random.pick(&magics).to_be_bytes());
        }
        for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
            if let Ok(Some((_, len))) = ReplyHeader::decode(style, &bytes) {
                assert!(len <= bytes.len());
            }
        }
        let _ = StatusQuery::decode(&bytes).map(|query| query.contexts().count());
    }
}
