//! Clients that lie, stop anywhere, speak in any order or never stop. Most cases are what once brought down an NBD
//! server; the number of the report stands with them.

use super::Client;
use crate::limits::{HANDSHAKE_OPTIONS_MAX, OPTION_BYTES_MAX, OPTION_SKIP_BYTES_MAX, SESSION_OUTPUT_BYTES};
use crate::request::{Export, ExportIndex, Exports};
use crate::session::nbd::fuzzing::{FixedExports, check_reply, check_session, run};
use crate::session::nbd::{CloseReason, Rejection, Session, SessionConfig, Step};
use crate::wire::nbd_handshake::{OptionHeader, client_flag, encode_option, option, reply_type};
use crate::wire::nbd_transmission::{HeaderStyle, RequestHeader, command, command_flag};
use crate::wire::random::Xorshift;

use reply_type::{ACK, ERR_INVALID, ERR_TOO_BIG, ERR_UNKNOWN};

fn closed(rejection: Rejection) -> [Step; 1] {
    [Step::Close(CloseReason::Refused(rejection))]
}

/// CVE-2017-15118, CVE-2022-26496: names larger than somebody's buffer. CVE-2020-10761: a maximal name in an
/// error.
#[test]
fn names_of_every_critical_length() {
    for (length, answer) in [
        (1, ERR_UNKNOWN),
        (255, ERR_UNKNOWN),
        (256, ERR_UNKNOWN),
        (257, ERR_UNKNOWN),
        (4096, ERR_UNKNOWN),
        (4097, ERR_INVALID),
    ] {
        let name = "n".repeat(length);
        for option in [option::INFO, option::GO] {
            let client = Client::new().query(option, &name, &[0, 1, 2, 3]);
            assert_eq!(client.play().reply_types(), [answer], "{length}");
            client.check();
        }
        for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let structured = Client::new().option(option::STRUCTURED_REPLY, b"");
            let client = structured.contexts(option, &name, &["base:allocation"]);
            assert_eq!(client.play().reply_types(), [ACK, answer], "{length}");
        }
        let client = Client::new().option(option::EXPORT_NAME, name.as_bytes());
        assert_eq!(client.play().steps, closed(Rejection::ExportName));
        client.check();
    }
    // The empty name is the default export.
    let selected = [Step::Selected(ExportIndex(3))];
    assert_eq!(Client::new().query(option::GO, "", &[]).play().steps, selected);
    assert_eq!(Client::new().option(option::EXPORT_NAME, b"").play().steps, selected);
}

/// CVE-2022-26495: a name of 2^32-1 bytes, to which something is added.
#[test]
fn a_name_length_that_would_wrap() {
    for length in [0xffff_ffff_u32, 0xffff_fffa, 0x8000_0000, 10] {
        let mut payload = length.to_be_bytes().to_vec();
        payload.extend_from_slice(b"vol\0\0");
        for option in [option::INFO, option::GO] {
            assert_eq!(Client::new().option(option, &payload).play().reply_types(), [ERR_INVALID]);
        }
    }
}

/// CVE-2017-15119: options that each claim up to 4 GiB.
#[test]
fn options_that_claim_gigabytes() {
    for length_bytes in [OPTION_SKIP_BYTES_MAX + 1, 1 << 31, 0xffff_ffff] {
        for option in [option::GO, option::LIST, option::ABORT, option::EXPORT_NAME, 4711] {
            let header = OptionHeader { option, length_bytes };
            let played = Client::new().bytes(&header.encode()).play();
            assert_eq!(played.steps, closed(Rejection::OptionLength));
            assert!(played.out.is_empty());
        }
    }
    let most = vec![0; OPTION_SKIP_BYTES_MAX as usize];
    let client = Client::new().option(option::GO, &most).query(option::INFO, "vol", &[]);
    assert_eq!(client.play().reply_types(), [ERR_TOO_BIG, reply_type::INFO, ACK]);
}

#[test]
fn a_stream_of_options_ends() {
    let mut client = Client::new();
    for _ in 0..=HANDSHAKE_OPTIONS_MAX {
        client = client.option(option::STRUCTURED_REPLY, b"");
    }
    let played = client.play();
    assert_eq!(played.steps, closed(Rejection::OptionCount));
    assert_eq!(played.reply_types().len(), HANDSHAKE_OPTIONS_MAX as usize);
    client.option(option::GO, b"not heard any more").check();
}

/// CVE-2017-9524, CVE-2019-14851: requests before an export is selected are no options, and options after are
/// no requests.
#[test]
fn phases_do_not_mix() {
    let read =
        RequestHeader { flags: 0, command: command::READ, cookie: 9, offset_bytes: 0, length_bytes: 512 };
    for style in [HeaderStyle::Simple, HeaderStyle::Extended] {
        let early = Client::new().request(style, read);
        assert_eq!(early.play().steps, closed(Rejection::OptionMagic));
        early.check();
        let late = Client::new().transmission(style, "vol").query(option::GO, "vol", &[0, 1, 2, 3]);
        let steps = late.play().steps;
        assert_eq!(steps[1], Step::Close(CloseReason::Refused(Rejection::RequestMagic)));
        late.check();
    }
    // Headers of the style that was not agreed on.
    let mixed = Client::new().transmission(HeaderStyle::Extended, "vol").request(HeaderStyle::Simple, read);
    assert_eq!(mixed.clone().play().steps.len(), 1, "28 bytes of 32");
    let mixed = mixed.bytes(&[0; 4]);
    assert_eq!(mixed.play().steps[1], Step::Close(CloseReason::Refused(Rejection::RequestMagic)));
}

/// CVE-2013-7441, CVE-2017-7539: a client that leaves after any byte.
#[test]
fn a_stream_may_end_anywhere() {
    let client = long_session(HeaderStyle::Extended);
    for end in 0..client.0.len() {
        run(0, &client.0[..end], |left| left);
    }
}

/// A session that uses every option and every command.
fn long_session(style: HeaderStyle) -> Client {
    let mut client = Client::new()
        .option(option::LIST, b"")
        .option(option::STARTTLS, b"")
        .option(77, b"what")
        .query(option::INFO, "vol", &[0, 1, 2, 3])
        .option(option::STRUCTURED_REPLY, b"")
        .contexts(option::LIST_META_CONTEXT, "vol", &[]);
    if style == HeaderStyle::Extended {
        client = client.option(option::EXTENDED_HEADERS, b"");
    }
    client =
        client.contexts(option::SET_META_CONTEXT, "vol", &["base:allocation"]).query(option::GO, "vol", &[3]);
    for command in 0..=8 {
        if command == command::DISC {
            continue;
        }
        let write = command == command::WRITE;
        let flags = if write && style == HeaderStyle::Extended { command_flag::PAYLOAD_LEN } else { 0 };
        let length_bytes = if command == command::FLUSH { 0 } else { 24 };
        for cookie in 0..4 {
            let header = RequestHeader { flags, command, cookie, offset_bytes: 0, length_bytes };
            client = client.request(style, header);
            if write {
                client = client.bytes(&[0x55; 24]);
            }
        }
    }
    let disc =
        RequestHeader { flags: 0, command: command::DISC, cookie: 0, offset_bytes: 0, length_bytes: 0 };
    client.request(style, disc)
}

#[test]
fn every_cut_in_two_gives_the_same_session() {
    for style in [HeaderStyle::Structured, HeaderStyle::Extended] {
        let client = long_session(style);
        let whole = client.check();
        assert_eq!(whole.steps.last(), Some(&Step::Close(CloseReason::Disconnected)));
        assert!(whole.steps.len() > 20);
        for cut in 1..client.0.len() {
            let mut first = true;
            let parts = run(0, &client.0, |left| if std::mem::take(&mut first) { cut } else { left });
            assert_eq!(parts, whole, "cut at {cut}");
        }
        check_session(&[&[0, 0], &client.0[..]].concat());
    }
}

/// Options and requests in any order, valid or slightly broken, and garbage in between.
#[test]
fn any_order_of_messages_keeps_the_promises() {
    for seed in 0..3000 {
        let mut random = Xorshift::new(seed);
        let mut stream = random_stream(&mut random);
        stream.splice(..0, [random.bytes(1)[0] & 3, random.bytes(1)[0]]);
        check_session(&stream);
    }
}

fn random_stream(random: &mut Xorshift) -> Vec<u8> {
    let mut client = if random.below(20) == 0 { Client::with_flags(1) } else { Client::new() };
    let mut style = HeaderStyle::Simple;
    for _ in 0..random.below(8) {
        let names = ["vol", "huge", "frozen", "", "nothing"];
        let queries = ["base:allocation", "base:", "x:y", "bad"];
        client = match random.below(7) {
            0 => {
                let number = u32::try_from(random.below(13)).unwrap();
                let len = random.below(40);
                client.option(number, &random.bytes(len))
            }
            1 => client.query(option::INFO, random.pick(&names), &[3, 1]),
            2 | 3 => {
                let set = random.pick(&[option::SET_META_CONTEXT, option::LIST_META_CONTEXT]);
                client.contexts(set, random.pick(&names), &[random.pick(&queries)])
            }
            4 => client.option(option::LIST, b""),
            5 => {
                style = style.max(HeaderStyle::Structured);
                client.option(option::STRUCTURED_REPLY, b"")
            }
            _ => {
                style = HeaderStyle::Extended;
                client.option(option::EXTENDED_HEADERS, b"")
            }
        };
    }
    client = client.query(option::GO, random.pick(&["vol", "huge", "frozen", ""]), &[]);
    for _ in 0..random.below(30) {
        client = random_request(random, style, client);
    }
    let mut stream = client.0;
    if random.below(3) == 0 {
        let at = random.below(stream.len());
        stream[at] ^= 1 << random.below(8);
    }
    stream
}

fn random_request(random: &mut Xorshift, style: HeaderStyle, client: Client) -> Client {
    let command = u16::try_from(random.below(9)).unwrap();
    let command = if command == command::DISC && random.below(8) > 0 { command::WRITE } else { command };
    let flags = match random.below(4) {
        0 => 1 << random.below(7),
        _ => 0,
    };
    let announce = style == HeaderStyle::Extended && command == command::WRITE && random.below(10) > 0;
    let flags = if announce { flags | command_flag::PAYLOAD_LEN } else { flags };
    let offsets = [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 30) - 8, 1 << 30, 1 << 40, u64::MAX];
    let short = u64::try_from(random.below(64)).unwrap();
    let lengths = [short, short, 8, 12, 0, 4096, 1 << 20, 32 << 20, (32 << 20) + 1, 0xffff_ffff];
    let header = RequestHeader {
        flags,
        command,
        cookie: random.number(),
        offset_bytes: random.pick(&offsets),
        length_bytes: random.pick(&lengths),
    };
    let client = client.request(style, header);
    let payload = flags & command_flag::PAYLOAD_LEN != 0 || command == command::WRITE;
    match usize::try_from(header.length_bytes) {
        Ok(length) if payload && length <= 4096 => client.bytes(&random.bytes(length)),
        _ => client,
    }
}

#[test]
fn arbitrary_bytes_keep_the_promises() {
    for seed in 0..3000 {
        let mut random = Xorshift::new(seed);
        let len = random.below(300);
        let mut stream = random.bytes(len);
        check_session(&stream);
        check_reply(&stream);
        // Past the client flags, and past the first magic.
        stream.splice(..0, [&[0, 1][..], &3u32.to_be_bytes(), b"IHAVEOPT"].concat());
        check_session(&stream);
    }
}

/// Listings and refusals are paced by what the client reads.
#[test]
fn a_client_that_never_reads_costs_little() {
    struct Many(Vec<Export>);
    impl Exports for Many {
        fn find(&self, name: &str) -> Option<&Export> {
            self.0.iter().find(|export| name.is_empty() || export.name == name)
        }
        fn nth(&self, position: usize) -> Option<&Export> {
            self.0.get(position)
        }
    }
    let exports = Many(
        (0..5000)
            .map(|index| Export {
                index: ExportIndex(index),
                name: format!("volume-{index:05}"),
                description: "d".repeat(5000),
                size_bytes: 1 << 30,
                read_only: false,
                refusal: None,
            })
            .collect(),
    );
    let mut client = Client::new().option(option::LIST, b"").query(option::GO, "", &[]);
    for cookie in 0..100_000 {
        let unknown = RequestHeader { flags: 0, command: 99, cookie, offset_bytes: 0, length_bytes: 0 };
        client = client.request(HeaderStyle::Simple, unknown);
    }
    let mut session = Session::new(SessionConfig::default());
    let (mut rest, mut total_bytes, mut pauses) = (&client.0[..], 0, 0);
    loop {
        let mut out = Vec::new();
        let (consumed, step) = session.advance(rest, &exports, &mut out);
        rest = &rest[consumed..];
        total_bytes += out.len();
        assert!(out.len() < SESSION_OUTPUT_BYTES + 5000);
        match step {
            Step::OutputFull => pauses += 1,
            Step::NeedMore => break,
            Step::Selected(_) => {}
            other => panic!("{other:?}"),
        }
    }
    // Each entry of the list has its description, cut to the longest string that the protocol has.
    assert!(total_bytes > 5000 * 4096 + 100_000 * 16 && pauses > 1000);
    assert_eq!(session.rejections().count(Rejection::Command), 100_000);
}

#[test]
fn a_session_holds_one_option_and_nothing_in_transmission() {
    let exports = FixedExports::default();
    let mut session = Session::new(SessionConfig::default());
    let mut bytes = (client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes().to_vec();
    encode_option(&mut bytes, option::GO, &vec![b'x'; OPTION_BYTES_MAX as usize]);
    let mut out = Vec::new();
    assert_eq!(session.advance(&bytes[..bytes.len() - 1], &exports, &mut out).1, Step::NeedMore);
    assert_eq!(session.heap_bytes(), OPTION_BYTES_MAX as usize);
    session.advance(&bytes[bytes.len() - 1..], &exports, &mut out);
    assert_eq!(session.heap_bytes(), 0);
    let client = Client(Vec::new()).query(option::GO, "vol", &[]);
    assert_eq!(session.advance(&client.0, &exports, &mut out).1, Step::Selected(ExportIndex(3)));
    let half = vec![0x25, 0x60];
    assert_eq!(session.advance(&half, &exports, &mut out).1, Step::NeedMore);
    assert_eq!(session.heap_bytes(), 0);
}

#[test]
fn a_session_moves_between_threads() {
    fn movable<T: Send + 'static>() {}
    movable::<Session>();
}
