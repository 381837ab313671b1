//! A client for the tests, and the tests of whole sessions.

mod corpus;
mod handshake;
mod hostile;
mod replies;
mod transmission;

use super::fuzzing::{FixedExports, Transcript, run};
use super::{Rejections, Session, SessionConfig, Step};
use crate::wire::nbd_handshake::{
    OPTION_REPLY_HEADER_BYTES, OptionReplyHeader, client_flag, encode_info_query, encode_meta_context_query,
    encode_option, option,
};
use crate::wire::nbd_transmission::{HeaderStyle, RequestHeader};

/// A stream of bytes that a client sends.
#[derive(Clone, Debug, Default)]
struct Client(Vec<u8>);

impl Client {
    fn new() -> Client {
        Client::with_flags(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES)
    }

    fn with_flags(flags: u32) -> Client {
        Client(flags.to_be_bytes().to_vec())
    }

    fn option(mut self, option: u32, payload: &[u8]) -> Client {
        encode_option(&mut self.0, option, payload);
        self
    }

    fn query(mut self, option: u32, name: &str, info_types: &[u16]) -> Client {
        encode_info_query(&mut self.0, option, name, info_types);
        self
    }

    fn contexts(mut self, option: u32, name: &str, queries: &[&str]) -> Client {
        encode_meta_context_query(&mut self.0, option, name, queries);
        self
    }

    /// Agrees on the style and, if that allows it, on `base:allocation`, and selects an export.
    fn transmission(self, style: HeaderStyle, name: &str) -> Client {
        let client = match style {
            HeaderStyle::Simple => return self.query(option::GO, name, &[]),
            HeaderStyle::Structured => self.option(option::STRUCTURED_REPLY, b""),
            HeaderStyle::Extended => self.option(option::EXTENDED_HEADERS, b""),
        };
        client.contexts(option::SET_META_CONTEXT, name, &["base:allocation"]).query(option::GO, name, &[])
    }

    fn request(mut self, style: HeaderStyle, request: RequestHeader) -> Client {
        self.0.extend_from_slice(request.encode(style).as_slice());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Client {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The session at the end of the stream, with its last answers and step. Answers to requests are left out.
    fn play(&self) -> Played {
        let mut session = Session::new(SessionConfig::default());
        let mut played = Played { steps: Vec::new(), out: Vec::new(), rejections: Rejections::default() };
        let mut rest = &self.0[..];
        loop {
            let (consumed, step) = session.advance(rest, &FixedExports::default(), &mut played.out);
            rest = &rest[consumed..];
            match step {
                Step::OutputFull => {}
                Step::NeedMore => break,
                Step::Close(_) => {
                    played.steps.push(step);
                    break;
                }
                Step::Selected(_) | Step::Request(_) => played.steps.push(step),
            }
        }
        played.rejections = *session.rejections();
        played
    }

    /// The stream through every check there is.
    fn check(&self) -> Transcript {
        run(0, &self.0, |left| left)
    }
}

struct Played {
    steps: Vec<Step>,
    out: Vec<u8>,
    rejections: Rejections,
}

impl Played {
    /// The replies to options, as (option, type, payload).
    fn option_replies(&self) -> Vec<(u32, u32, &[u8])> {
        let (mut replies, mut out) = (Vec::new(), &self.out[..]);
        while let Some(header) = out.first_chunk() {
            let header = OptionReplyHeader::decode(header).expect("a reply to an option");
            let (payload, behind) = out[OPTION_REPLY_HEADER_BYTES..].split_at(header.length_bytes as usize);
            replies.push((header.option, header.reply_type, payload));
            out = behind;
        }
        assert!(out.is_empty(), "half a reply: {out:?}");
        replies
    }

    fn reply_types(&self) -> Vec<u32> {
        self.option_replies().iter().map(|&(_, reply_type, _)| reply_type).collect()
    }
}
