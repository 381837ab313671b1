//! Each option: accepted, and refused with exactly one error.

use super::Client;
use crate::request::ExportIndex;
use crate::session::nbd::fuzzing::FixedExports;
use crate::session::nbd::{CloseReason, Rejection, Session, SessionConfig, Step};
use crate::wire::nbd_handshake::{Info, client_flag, info_type, option, reply_type, transmission_flag};

use reply_type::{
    ACK, ERR_EXT_HEADER_REQD, ERR_INVALID, ERR_SHUTDOWN, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP, INFO,
    META_CONTEXT, SERVER,
};

const ALLOCATION: &str = "base:allocation";

fn closed(rejection: Rejection) -> Vec<Step> {
    vec![Step::Close(CloseReason::Refused(rejection))]
}

#[test]
fn every_option_is_answered_as_the_table_says() {
    let new = Client::new;
    let structured = || new().option(option::STRUCTURED_REPLY, b"");
    let extended = || new().option(option::EXTENDED_HEADERS, b"");
    let set = |client: Client, queries: &[&str]| client.contexts(option::SET_META_CONTEXT, "vol", queries);
    let list = |client: Client, queries: &[&str]| client.contexts(option::LIST_META_CONTEXT, "vol", queries);
    let long = [b'x'; 8193];
    let cases: Vec<(&str, Client, Vec<u32>)> = vec![
        ("list", new().option(option::LIST, b""), vec![SERVER, SERVER, SERVER, ACK]),
        ("list with payload", new().option(option::LIST, b"x"), vec![ERR_INVALID]),
        ("peek", new().option(option::PEEK_EXPORT, b"vol"), vec![ERR_UNSUP]),
        ("starttls", new().option(option::STARTTLS, b""), vec![ERR_UNSUP]),
        ("starttls with payload", new().option(option::STARTTLS, b"x"), vec![ERR_INVALID]),
        ("unknown", new().option(99, b"whatever"), vec![ERR_UNSUP]),
        ("unknown, long", new().option(0, &long), vec![ERR_UNSUP]),
        ("info", new().query(option::INFO, "vol", &[]), vec![INFO, ACK]),
        ("info, default", new().query(option::INFO, "", &[info_type::NAME]), vec![INFO, INFO, ACK]),
        (
            "info, all facts",
            new().query(option::INFO, "vol", &[0, 1, 2, 3]),
            vec![INFO; 4].into_iter().chain([ACK]).collect(),
        ),
        ("info, no description", new().query(option::INFO, "huge", &[2]), vec![INFO, ACK]),
        ("info, strange fact", new().query(option::INFO, "vol", &[77]), vec![INFO, ACK]),
        ("info, no export", new().query(option::INFO, "nothing", &[]), vec![ERR_UNKNOWN]),
        ("info, empty", new().option(option::INFO, b""), vec![ERR_INVALID]),
        ("info, too long", new().option(option::INFO, &long), vec![ERR_TOO_BIG]),
        ("go, no export", new().query(option::GO, "nothing", &[]), vec![ERR_UNKNOWN]),
        ("go", new().query(option::GO, "vol", &[]), vec![INFO, ACK]),
        (
            "go, name too long for its option",
            new().option(option::GO, b"\0\0\0\x06vol\0\0"),
            vec![ERR_INVALID],
        ),
        ("structured", structured(), vec![ACK]),
        ("structured with payload", new().option(option::STRUCTURED_REPLY, b"x"), vec![ERR_INVALID]),
        ("structured twice", structured().option(option::STRUCTURED_REPLY, b""), vec![ACK, ERR_INVALID]),
        ("extended", extended(), vec![ACK]),
        ("extended with payload", new().option(option::EXTENDED_HEADERS, b"x"), vec![ERR_INVALID]),
        ("extended twice", extended().option(option::EXTENDED_HEADERS, b""), vec![ACK, ERR_INVALID]),
        ("extended after structured", structured().option(option::EXTENDED_HEADERS, b""), vec![ACK, ACK]),
        (
            "structured after extended",
            extended().option(option::STRUCTURED_REPLY, b""),
            vec![ACK, ERR_EXT_HEADER_REQD],
        ),
        ("list contexts, simple", list(new(), &[]), vec![ERR_INVALID]),
        ("list contexts", list(structured(), &[]), vec![ACK, META_CONTEXT, ACK]),
        ("list base:", list(structured(), &["base:"]), vec![ACK, META_CONTEXT, ACK]),
        ("list another base", list(structured(), &["base:other"]), vec![ACK, ACK]),
        ("list another namespace", list(extended(), &["qemu:dirty-bitmap:x"]), vec![ACK, ACK]),
        ("list without colon", list(extended(), &["allocation"]), vec![ACK, ERR_INVALID]),
        ("set contexts, simple", set(new(), &[ALLOCATION]), vec![ERR_INVALID]),
        ("set", set(structured(), &[ALLOCATION]), vec![ACK, META_CONTEXT, ACK]),
        (
            "set twice in one",
            set(structured(), &[ALLOCATION, "x-y:z", ALLOCATION]),
            vec![ACK, META_CONTEXT, ACK],
        ),
        ("set nothing", set(structured(), &[]), vec![ACK, ACK]),
        ("set base: selects nothing", set(structured(), &["base:"]), vec![ACK, ACK]),
        ("set, no namespace", set(structured(), &[":allocation"]), vec![ACK, ERR_INVALID]),
        ("set, too long", structured().option(option::SET_META_CONTEXT, &long), vec![ACK, ERR_TOO_BIG]),
        (
            "set, no export",
            structured().contexts(option::SET_META_CONTEXT, "nothing", &[ALLOCATION]),
            vec![ACK, ERR_UNKNOWN],
        ),
        (
            "set, query too long",
            structured().option(option::SET_META_CONTEXT, b"\0\0\0\0\0\0\0\x01\0\0\0\x02b"),
            vec![ACK, ERR_INVALID],
        ),
    ];
    for (what, client, expected) in cases {
        assert_eq!(client.play().reply_types(), expected, "{what}");
        // After any answer the session is still in step, unless transmission has begun.
        if what != "go" {
            let after = client.clone().query(option::INFO, "frozen", &[]).play();
            let expected: Vec<u32> = expected.iter().copied().chain([INFO, ACK]).collect();
            assert_eq!(after.reply_types(), expected, "{what}, in step afterwards");
        }
        client.check();
    }
}

#[test]
fn replies_carry_the_option_and_no_text_from_the_client() {
    let played = Client::new().query(option::GO, "secret-name", &[]).play();
    let replies = played.option_replies();
    assert_eq!((replies[0].0, replies[0].1), (option::GO, ERR_UNKNOWN));
    assert!(!String::from_utf8_lossy(replies[0].2).contains("secret"));
    assert_eq!(played.rejections.count(Rejection::ExportUnknown), 1);
}

#[test]
fn abort_is_acknowledged_whatever_it_carries() {
    for payload in [&b""[..], b"goodbye"] {
        let played = Client::new().option(option::ABORT, payload).play();
        assert_eq!(played.reply_types(), [ACK]);
        assert_eq!(played.steps, [Step::Close(CloseReason::Aborted)]);
    }
}

#[test]
fn export_name_answers_without_header() {
    let flags = transmission_flag::HAS_FLAGS
        | transmission_flag::SEND_FLUSH
        | transmission_flag::SEND_FUA
        | transmission_flag::SEND_TRIM
        | transmission_flag::SEND_WRITE_ZEROES
        | transmission_flag::CAN_MULTI_CONN
        | transmission_flag::SEND_CACHE
        | transmission_flag::SEND_FAST_ZERO;
    let mut expected = (1u64 << 30).to_be_bytes().to_vec();
    expected.extend_from_slice(&flags.to_be_bytes());
    let played = Client::new().option(option::EXPORT_NAME, b"vol").play();
    assert_eq!(played.out, expected);
    assert_eq!(played.steps, [Step::Selected(ExportIndex(3))]);
    // With zeroes, to a client that is not even fixed newstyle.
    let played = Client::with_flags(0).option(option::EXPORT_NAME, b"vol").play();
    expected.resize(10 + 124, 0);
    assert_eq!(played.out, expected);
    Client::with_flags(0).option(option::EXPORT_NAME, b"").check();
}

#[test]
fn breaches_without_an_error_reply_close() {
    let extended = Client::new().option(option::EXTENDED_HEADERS, b"");
    let cases = [
        (Client::with_flags(4), Rejection::ClientFlags),
        (Client::with_flags(0x8000_0003), Rejection::ClientFlags),
        (Client::new().bytes(b"GET / HTTP/1.1\r\n"), Rejection::OptionMagic),
        (Client::new().option(option::EXPORT_NAME, b"nothing"), Rejection::ExportName),
        (Client::new().option(option::EXPORT_NAME, b"vo\0"), Rejection::ExportName),
        (Client::new().option(option::EXPORT_NAME, b"\xff"), Rejection::ExportName),
        (extended.option(option::EXPORT_NAME, b"vol"), Rejection::ExportNameExtended),
        (Client::with_flags(0).query(option::GO, "vol", &[]), Rejection::OptionNeedsFixed),
        (Client::with_flags(client_flag::NO_ZEROES).option(option::ABORT, b""), Rejection::OptionNeedsFixed),
    ];
    for (client, rejection) in cases {
        let played = client.play();
        assert_eq!(played.steps, closed(rejection));
        assert_eq!(played.rejections.count(rejection), 1);
        client.check();
    }
}

/// The transmission flags that GO tells after these options.
fn go_flags(client: Client, name: &str) -> u16 {
    let played = client.query(option::INFO, name, &[3]).query(option::GO, name, &[3]).play();
    let replies = played.option_replies();
    let (info, go) = replies[replies.len() - 6..].split_at(3);
    for (info, go) in info.iter().zip(go) {
        assert_eq!((info.1, info.2), (go.1, go.2), "INFO and the same GO tell the same facts");
    }
    assert!(matches!(
        Info::decode(go[1].2),
        Ok(Info::BlockSize { minimum_bytes: 1, preferred_bytes: 4096, payload_bytes_max: 0x200_0000 })
    ));
    match Info::decode(go[0].2) {
        Ok(Info::Export { flags, .. }) => flags,
        other => panic!("{other:?}"),
    }
}

#[test]
fn flags_tell_exactly_what_was_negotiated() {
    let structured = || Client::new().option(option::STRUCTURED_REPLY, b"");
    let extended = || Client::new().option(option::EXTENDED_HEADERS, b"");
    let (df, payload) = (transmission_flag::SEND_DF, transmission_flag::BLOCK_STATUS_PAYLOAD);
    let set = |client: Client, name| client.contexts(option::SET_META_CONTEXT, name, &[ALLOCATION]);
    let plain = go_flags(Client::new(), "vol");
    assert_eq!(plain & (df | payload | transmission_flag::READ_ONLY | transmission_flag::SEND_RESIZE), 0);
    assert_eq!(go_flags(Client::new(), "frozen"), plain | transmission_flag::READ_ONLY);
    assert_eq!(go_flags(structured(), "vol"), plain | df);
    assert_eq!(go_flags(extended(), "vol"), plain | df);
    assert_eq!(go_flags(set(structured(), "vol"), "vol"), plain | df);
    assert_eq!(go_flags(set(extended(), "vol"), "vol"), plain | df | payload);
    // Contexts count for the export that they were chosen for; the default export is the same one.
    assert_eq!(go_flags(set(extended(), "huge"), "vol"), plain | df);
    assert_eq!(go_flags(set(extended(), ""), "vol"), plain | df | payload);
}

#[test]
fn a_failed_set_clears_the_contexts() {
    let set = |client: Client, name| client.contexts(option::SET_META_CONTEXT, name, &[ALLOCATION]);
    let chosen = || set(Client::new().option(option::EXTENDED_HEADERS, b""), "vol");
    let payload = transmission_flag::BLOCK_STATUS_PAYLOAD;
    assert_ne!(go_flags(chosen(), "vol") & payload, 0);
    let failing = [
        set(chosen(), "nothing"),
        set(chosen(), "huge"),
        chosen().contexts(option::SET_META_CONTEXT, "vol", &[]),
        chosen().option(option::SET_META_CONTEXT, b"garbage"),
        chosen().option(option::SET_META_CONTEXT, &[0; 9000]),
    ];
    for client in failing {
        assert_eq!(go_flags(client, "vol") & payload, 0);
    }
    // Listing changes nothing.
    let listed = chosen().contexts(option::LIST_META_CONTEXT, "huge", &[]);
    assert_ne!(go_flags(listed, "vol") & payload, 0);
}

#[test]
fn a_stopping_server_refuses_all_but_abort() {
    let mut session = Session::new(SessionConfig::default());
    session.begin_shutdown();
    let client =
        Client::new().query(option::GO, "vol", &[]).option(option::LIST, b"").option(option::ABORT, b"");
    let mut out = Vec::new();
    let (consumed, step) = session.advance(&client.0, &FixedExports::default(), &mut out);
    assert_eq!((consumed, step), (client.0.len(), Step::Close(CloseReason::Aborted)));
    let played = super::Played { steps: vec![], out, rejections: *session.rejections() };
    assert_eq!(played.reply_types(), [ERR_SHUTDOWN, ERR_SHUTDOWN, ACK]);
    assert_eq!(played.rejections.count(Rejection::OptionShutdown), 2);
}
