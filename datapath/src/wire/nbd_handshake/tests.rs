//! The handshake's codec against golden bytes, round trips and noise.

use super::*;
use crate::wire::random::Xorshift;

#[test]
fn golden_greeting() {
    let greeting = Greeting { flags: handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES };
    assert_eq!(&greeting.encode(), b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(Greeting::decode(b"NBDMAGICIHAVEOPT\x00\x03"), Ok(greeting));
    // The withdrawn oldstyle greeting has another second word.
    assert_eq!(Greeting::decode(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"), Err(WireError::Magic));
}

#[test]
fn golden_option_headers() {
    let header = OptionHeader { option: option::GO, length_bytes: 0x0102_0304 };
    assert_eq!(&header.encode(), b"IHAVEOPT\x00\x00\x00\x07\x01\x02\x03\x04");
    assert_eq!(OptionHeader::decode(&header.encode()), Ok(header));
    assert_eq!(OptionHeader::decode(b"IHAVEOPU\x00\x00\x00\x07\x01\x02\x03\x04"), Err(WireError::Magic));

    let reply =
        OptionReplyHeader { option: option::LIST, reply_type: reply_type::ERR_UNSUP, length_bytes: 5 };
    let bytes = b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x01\x00\x00\x00\x05";
    assert_eq!(&reply.encode(), bytes);
    assert_eq!(OptionReplyHeader::decode(bytes), Ok(reply));
    assert!(reply.is_error());
    assert!(!OptionReplyHeader { reply_type: reply_type::ACK, ..reply }.is_error());
    assert_eq!(OptionReplyHeader::decode(&[0; 20]), Err(WireError::Magic));
}

#[test]
fn golden_info_query() {
    let mut out = Vec::new();
    encode_info_query(&mut out, option::GO, "vol", &[info_type::BLOCK_SIZE, info_type::NAME]);
    let bytes = b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x0d\x00\x00\x00\x03vol\x00\x02\x00\x03\x00\x01";
    assert_eq!(out, bytes);
    let query = InfoQuery::decode(&out[16..]).unwrap();
    assert_eq!(query.name, "vol");
    assert!(query.asks_for(info_type::BLOCK_SIZE) && query.asks_for(info_type::NAME));
    assert!(!query.asks_for(info_type::EXPORT) && !query.asks_for(0x0300));
}

#[test]
fn golden_meta_context_query() {
    let mut out = Vec::new();
    encode_meta_context_query(&mut out, option::SET_META_CONTEXT, "v", &["base:", "x:y"]);
    let bytes = b"IHAVEOPT\x00\x00\x00\x0a\x00\x00\x00\x19\x00\x00\x00\x01v\x00\x00\x00\x02\
                  \x00\x00\x00\x05base:\x00\x00\x00\x03x:y";
    assert_eq!(out, bytes);
    let query = MetaContextQuery::decode(&out[16..]).unwrap();
    assert_eq!(query.name, "v");
    assert_eq!(query.queries().collect::<Vec<_>>(), ["base:", "x:y"]);
}

#[test]
fn golden_replies() {
    let reply = |encode: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        encode(&mut out);
        let header = OptionReplyHeader::decode(out.first_chunk().unwrap()).unwrap();
        let payload = out.split_off(OPTION_REPLY_HEADER_BYTES);
        assert_eq!(payload.len(), header.length_bytes as usize);
        (header.option, header.reply_type, payload)
    };
    let (option, kind, payload) = reply(&|out| encode_server_entry(out, "vol", "a disk"));
    assert_eq!((option, kind, &payload[..]), (3, 2, &b"\x00\x00\x00\x03vola disk"[..]));
    assert_eq!(decode_server_entry(&payload), Ok(("vol", "a disk")));

    let (option, kind, payload) = reply(&|out| encode_meta_context(out, 10, 1, BASE_ALLOCATION));
    assert_eq!((option, kind, &payload[..]), (10, 4, &b"\x00\x00\x00\x01base:allocation"[..]));
    assert_eq!(decode_meta_context(&payload), Ok((1, BASE_ALLOCATION)));

    let facts: [(Info<'_>, &[u8]); 5] = [
        (
            Info::Export { size_bytes: 1 << 32, flags: 0x0123 },
            b"\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x01\x23",
        ),
        (Info::Name("vol"), b"\x00\x01vol"),
        (Info::Description("a disk"), b"\x00\x02a disk"),
        (
            Info::BlockSize { minimum_bytes: 1, preferred_bytes: 4096, payload_bytes_max: 32 << 20 },
            b"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00",
        ),
        (Info::Unknown(77), b"\x00\x4d"),
    ];
    for (info, bytes) in facts {
        let (option, kind, payload) = reply(&|out| encode_info(out, option::GO, &info));
        assert_eq!((option, kind, &payload[..]), (7, 3, bytes));
        assert_eq!(Info::decode(&payload), Ok(info));
    }
    let (_, kind, payload) = reply(&|out| encode_option_reply(out, 7, reply_type::ERR_UNKNOWN, b"no"));
    assert_eq!((kind, &payload[..]), (0x8000_0006, &b"no"[..]));

    let answer = ExportNameReply { size_bytes: 0x0102_0304_0506_0708, flags: 0x090a };
    assert_eq!(answer.encode(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(ExportNameReply::decode(&answer.encode()), answer);
}

#[test]
fn strings_have_a_limit_and_no_nul() {
    assert_eq!(decode_string(&[b'a'; 4096]).map(str::len), Ok(4096));
    assert_eq!(decode_string(&[b'a'; 4097]), Err(WireError::StringLength));
    assert_eq!(decode_string(b"a\0b"), Err(WireError::StringContent));
    assert_eq!(decode_string(b"\xff"), Err(WireError::StringContent));
    assert_eq!(decode_string("größe".as_bytes()), Ok("größe"));
}

#[test]
fn lengths_from_outside_are_not_trusted() {
    // A name of 2^32-1 bytes; one byte more than is there; a count without its list; bytes left over.
    assert_eq!(InfoQuery::decode(b"\xff\xff\xff\xffvol\0\0"), Err(WireError::Truncated));
    assert_eq!(InfoQuery::decode(b"\0\0\0\x04vol"), Err(WireError::Truncated));
    assert_eq!(InfoQuery::decode(b"\0\0\0\x03vol\xff\xff"), Err(WireError::Truncated));
    assert_eq!(InfoQuery::decode(b"\0\0\0\x03vol\0\0x"), Err(WireError::Trailing));
    assert_eq!(InfoQuery::decode(b""), Err(WireError::Truncated));
    assert_eq!(MetaContextQuery::decode(b"\0\0\0\x01v\xff\xff\xff\xff"), Err(WireError::Truncated));
    assert_eq!(
        MetaContextQuery::decode(b"\0\0\0\x01v\0\0\0\x01\xff\xff\xff\xffbase:"),
        Err(WireError::Truncated)
    );
    assert_eq!(MetaContextQuery::decode(b"\0\0\0\x01v\0\0\0\0x"), Err(WireError::Trailing));
    assert_eq!(Info::decode(b"\0\0\0\0\0\0\0\0\0\x01\0\0\0"), Err(WireError::Trailing));
    assert_eq!(decode_server_entry(b"\0\0\0\x05vol"), Err(WireError::Truncated));
}

#[test]
fn what_was_encoded_is_decoded() {
    let mut random = Xorshift::new(1);
    for _ in 0..2000 {
        let texts: Vec<String> = (0..random.below(6))
            .map(|_| (0..random.below(40)).map(|_| random.pick(&['a', ':', 'ß', '\u{10348}'])).collect())
            .collect();
        let queries: Vec<&str> = texts.iter().map(String::as_str).collect();
        let name: String = (0..random.below(80)).map(|_| random.pick(&['v', 'ü', '/'])).collect();
        let mut out = Vec::new();
        encode_meta_context_query(&mut out, option::LIST_META_CONTEXT, &name, &queries);
        let header = OptionHeader::decode(out.first_chunk().unwrap()).unwrap();
        assert_eq!(header.length_bytes as usize, out.len() - OPTION_HEADER_BYTES);
        let query = MetaContextQuery::decode(&out[OPTION_HEADER_BYTES..]).unwrap();
        assert_eq!((query.name, query.queries().collect::<Vec<_>>()), (name.as_str(), queries));
    }
}

#[test]
fn arbitrary_bytes_never_panic() {
    let mut random = Xorshift::new(2);
    for _ in 0..20_000 {
        let len = random.below(80);
        let mut bytes = random.bytes(len);
        // Plausible small numbers get further than random ones.
        for byte in &mut bytes {
            if random.below(3) > 0 {
                *byte %= 3;
            }
        }
        let _ = InfoQuery::decode(&bytes).map(|query| query.asks_for(info_type::NAME));
        let _ = MetaContextQuery::decode(&bytes).map(|query| query.queries().count());
        let _ = Info::decode(&bytes);
        let _ = decode_server_entry(&bytes);
        let _ = decode_meta_context(&bytes);
        if let Some(header) = bytes.first_chunk() {
            let _ = OptionHeader::decode(header);
        }
        if let Some(header) = bytes.first_chunk() {
            let _ = OptionReplyHeader::decode(header);
        }
        if let Some(header) = bytes.first_chunk() {
            let _ = Greeting::decode(header);
        }
    }
}
