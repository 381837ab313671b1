//! What must hold for any bytes at all: the bodies of the fuzz targets. Tests replay the seed corpus and many
//! generated streams through them.
//!
//! Input of [`check_session`]: one byte of settings (bit 0 read-only listener, bit 1 the server stops once an
//! export is selected), one byte that chooses how the stream is cut, then the client's stream.

use super::{Session, SessionConfig, Step};
use crate::limits::{
    HANDSHAKE_OPTIONS_MAX, NBD_STRING_BYTES_MAX, OPTION_BYTES_MAX, REQUEST_PAYLOAD_BYTES_MAX,
    SESSION_OUTPUT_BYTES,
};
use crate::request::{Export, ExportIndex, Exports, Extent, Operation, Request, RequestError};
use crate::wire::nbd_handshake::{
    EXPORT_NAME_REPLY_BYTES, EXPORT_NAME_ZEROES, GREETING_BYTES, Greeting, Info, InfoQuery, MetaContextQuery,
    OPTION_REPLY_HEADER_BYTES, OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader, decode_meta_context,
    decode_server_entry, reply_type,
};
use crate::wire::nbd_transmission::{Chunk, ChunkHeader, HeaderStyle, ReplyHeader, StatusQuery};

/// Longest answer of a session to one message, over what it waits at: the facts of INFO, two of them strings.
const ANSWER_BYTES_MAX: usize = 3 * NBD_STRING_BYTES_MAX;

/// Exports with every property that matters to a session. The first is the default.
#[derive(Debug)]
pub struct FixedExports(Vec<Export>);

impl Default for FixedExports {
    fn default() -> FixedExports {
        let export = |index, name: &str, description: &str, size_bytes, read_only| Export {
            index: ExportIndex(index),
            name: name.to_owned(),
            description: description.to_owned(),
            size_bytes,
            read_only,
            refusal: None,
        };
        FixedExports(vec![
            export(3, "vol", "the first volume", 1 << 30, false),
            export(5, "huge", "", 1 << 40, false),
            export(8, "frozen", "a snapshot", 1 << 20, true),
        ])
    }
}

impl Exports for FixedExports {
    fn find(&self, name: &str) -> Option<&Export> {
        self.0.iter().find(|export| name.is_empty() || export.name == name)
    }

    fn nth(&self, position: usize) -> Option<&Export> {
        self.0.get(position)
    }
}

/// All that a stream of bytes led to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// The steps that ask the engine for something, in order.
    pub steps: Vec<Step>,
    /// Everything that was sent.
    pub output: Vec<u8>,
    /// Each refusal by name, with its count.
    pub rejections: Vec<(&'static str, u32)>,
}

/// Target `nbd_session`: any stream, cut anywhere, leads to the same transcript and breaks no promise.
///
/// # Panics
/// If it does; that is the finding.
pub fn check_session(data: &[u8]) {
    let [settings, cuts, stream @ ..] = data else { return };
    let whole = run(*settings, stream, |left| left);
    let bytes = run(*settings, stream, |_| 1);
    assert_eq!(whole, bytes, "one byte at a time");
    let mut seed = u64::from(*cuts) | 0x100;
    let parts = run(*settings, stream, |left| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap_or(1) % left.min(97) + 1
    });
    assert_eq!(whole, parts, "in parts");
}

/// Feeds `stream` in pieces of the lengths that `next_cut` chooses (at least 1, at most what is left), answers
/// every request, and checks everything on the way.
///
/// # Panics
/// If a promise is broken.
pub fn run(settings: u8, stream: &[u8], mut next_cut: impl FnMut(usize) -> usize) -> Transcript {
    let mut driver = Driver::new(settings);
    let mut left = stream;
    while !left.is_empty() && !driver.is_closed() {
        let (part, behind) = left.split_at(next_cut(left.len()));
        left = behind;
        driver.feed(part);
    }
    driver.finish()
}

struct Driver {
    session: Session,
    exports: FixedExports,
    stop_when_selected: bool,
    export: Option<Export>,
    read_only: bool,
    payload_left: u64,
    requests: usize,
    transcript: Transcript,
}

impl Driver {
    fn new(settings: u8) -> Driver {
        let session = Session::new(SessionConfig { read_only: settings & 1 != 0 });
        let mut transcript = Transcript::default();
        session.greeting(&mut transcript.output);
        assert_eq!(transcript.output.len(), GREETING_BYTES);
        Driver {
            session,
            exports: FixedExports::default(),
            stop_when_selected: settings & 2 != 0,
            export: None,
            read_only: settings & 1 != 0,
            payload_left: 0,
            requests: 0,
            transcript,
        }
    }

    fn is_closed(&self) -> bool {
        matches!(self.transcript.steps.last(), Some(Step::Close(_)))
    }

    fn feed(&mut self, mut part: &[u8]) {
        loop {
            let payload = usize::try_from(self.payload_left).unwrap_or(usize::MAX).min(part.len());
            part = &part[payload..];
            self.payload_left -= payload as u64;
            if self.payload_left > 0 {
                return;
            }
            let mut out = Vec::new();
            let (consumed, step) = self.session.advance(part, &self.exports, &mut out);
            assert!(consumed <= part.len());
            assert!(out.len() <= SESSION_OUTPUT_BYTES + ANSWER_BYTES_MAX, "{} bytes of answers", out.len());
            part = &part[consumed..];
            let selected = matches!(step, Step::Selected(_));
            if self.export.is_some() {
                self.check_replies(&out)
            } else {
                check_option_replies(&out, selected)
            }
            self.transcript.output.extend_from_slice(&out);
            match step {
                Step::NeedMore => {
                    assert!(part.is_empty());
                    return;
                }
                Step::OutputFull => {
                    assert!(out.len() >= SESSION_OUTPUT_BYTES);
                    continue;
                }
                Step::Selected(index) => self.select(index),
                Step::Request(request) => self.answer(&request),
                Step::Close(_) => {
                    assert!(part.is_empty(), "nothing is left to parse after the end");
                    self.transcript.steps.push(step);
                    let again = self.session.advance(b"more", &self.exports, &mut out);
                    assert_eq!(again, (4, step), "closed for good");
                    return;
                }
            }
            self.transcript.steps.push(step);
        }
    }

    fn select(&mut self, index: ExportIndex) {
        assert!(self.export.is_none(), "selected twice");
        assert_eq!(self.session.export(), Some(index));
        let export = self.exports.0.iter().find(|export| export.index == index).expect("one that exists");
        self.read_only |= export.read_only;
        self.export = Some(export.clone());
        if self.stop_when_selected {
            self.session.begin_shutdown();
        }
    }

    /// Plays the engine: checks that the request may be trusted, and answers it with what its cookie says.
    fn answer(&mut self, request: &Request) {
        let export = self.export.as_ref().expect("no request before an export is selected");
        self.requests += 1;
        assert!(!self.stop_when_selected, "a request reached an engine that stops");
        assert!(!(self.read_only && request.operation.is_change()));
        assert!(request.offset_bytes <= export.size_bytes);
        assert!(request.length_bytes <= export.size_bytes - request.offset_bytes);
        assert_eq!(request.length_bytes == 0, request.operation == Operation::Flush);
        let replies = self.session.replies();
        let mut out = Vec::new();
        let succeeds = request.cookie.is_multiple_of(2);
        match request.operation {
            Operation::Write { .. } => {
                assert!(request.length_bytes <= u64::from(REQUEST_PAYLOAD_BYTES_MAX));
                self.payload_left = request.length_bytes;
                out.extend_from_slice(replies.encode_done(request).as_slice());
            }
            Operation::Read { one_piece } if succeeds => {
                answer_read(&self.session, request, one_piece, &mut out);
            }
            Operation::BlockStatus { .. } if succeeds => {
                let extent = |length_bytes, hole| Extent { length_bytes, hole };
                let extents = [extent(4096, false), extent(1 << 33, true), extent(1 << 41, false)];
                replies.encode_block_status(request, &extents, &mut out);
            }
            _ if succeeds => out.extend_from_slice(replies.encode_done(request).as_slice()),
            _ => {
                let errors = [RequestError::Io, RequestError::NotSupported, RequestError::TooLarge];
                let error = errors[usize::try_from(request.cookie % 3).expect("below 3")];
                out.extend_from_slice(replies.encode_error(request, error).as_slice());
            }
        }
        let is_simple_read = replies.style() == HeaderStyle::Simple
            && succeeds
            && matches!(request.operation, Operation::Read { .. });
        if !is_simple_read {
            self.check_replies(&out);
        }
        self.transcript.output.extend_from_slice(&out);
    }

    /// Everything a session writes in transmission is whole replies that a client can read, with legal errors.
    fn check_replies(&self, mut out: &[u8]) {
        let style = self.session.replies().style();
        while let Some((header, len)) = ReplyHeader::decode(style, out).expect("a reply of the agreed style")
        {
            out = &out[len..];
            let error = match header {
                ReplyHeader::Simple { error, .. } => error,
                ReplyHeader::Chunk(chunk) => {
                    let payload_bytes = usize::try_from(chunk.length_bytes).expect("a short payload");
                    let (payload, behind) = out.split_at(payload_bytes);
                    out = behind;
                    match Chunk::decode(chunk.kind, payload).expect("a chunk that keeps the rules") {
                        Chunk::Error { error, .. } => error,
                        _ => 0,
                    }
                }
            };
            assert!([0, 1, 5, 12, 22, 28, 75, 95, 108].contains(&error), "error {error}");
        }
        assert!(out.is_empty(), "half a reply");
    }

    fn finish(mut self) -> Transcript {
        let session_bytes = size_of::<Session>();
        assert!(session_bytes <= 512, "{session_bytes} bytes for each connection");
        assert!(self.session.heap_bytes() <= OPTION_BYTES_MAX as usize);
        if self.export.is_some() {
            assert_eq!(self.session.heap_bytes(), 0, "transmission needs nothing from the heap");
        }
        let rejections = self.session.rejections().iter();
        self.transcript.rejections = rejections.map(|(reason, count)| (reason.name(), count)).collect();
        self.transcript
    }
}

/// A READ in the way its style allows: whole, or as data, hole, and error or end.
fn answer_read(session: &Session, request: &Request, one_piece: bool, out: &mut Vec<u8>) {
    let replies = session.replies();
    let length = u32::try_from(request.length_bytes).expect("at most REQUEST_PAYLOAD_BYTES_MAX");
    if length > 4096 {
        out.extend_from_slice(replies.encode_error(request, RequestError::Io).as_slice());
    } else if !replies.are_chunks() || one_piece || length < 2 {
        let last = replies.are_chunks();
        out.extend_from_slice(replies.read_header(request, request.offset_bytes, length, last).as_slice());
        out.resize(out.len() + length as usize, 0xda);
    } else {
        let data = length / 2;
        let middle = request.offset_bytes + u64::from(data);
        out.extend_from_slice(replies.read_header(request, request.offset_bytes, data, false).as_slice());
        out.resize(out.len() + data as usize, 0xda);
        out.extend_from_slice(replies.encode_hole(request, middle, length - data, false).as_slice());
        if request.cookie.is_multiple_of(4) {
            out.extend_from_slice(replies.encode_done(request).as_slice());
        } else {
            out.extend_from_slice(
                replies.encode_error_at(request, RequestError::Io, middle, true).as_slice(),
            );
        }
    }
}

/// Everything a session writes in the handshake is whole replies, perhaps with the answer to EXPORT_NAME behind.
fn check_option_replies(mut out: &[u8], selected: bool) {
    let mut replies = 0;
    while out.starts_with(&OPTION_REPLY_MAGIC.to_be_bytes()) {
        let header = out.first_chunk().expect("a whole header");
        let header = OptionReplyHeader::decode(header).expect("the magic is there");
        let payload = &out[OPTION_REPLY_HEADER_BYTES..][..header.length_bytes as usize];
        out = &out[OPTION_REPLY_HEADER_BYTES + payload.len()..];
        match header.reply_type {
            reply_type::ACK => assert!(payload.is_empty()),
            reply_type::SERVER => assert!(decode_server_entry(payload).is_ok()),
            reply_type::INFO => assert!(Info::decode(payload).is_ok()),
            reply_type::META_CONTEXT => assert!(decode_meta_context(payload).is_ok()),
            _ => assert!(header.is_error() && std::str::from_utf8(payload).is_ok()),
        }
        replies += 1;
    }
    assert!(replies <= HANDSHAKE_OPTIONS_MAX as usize * 6);
    let after_export_name =
        [EXPORT_NAME_REPLY_BYTES, EXPORT_NAME_REPLY_BYTES + EXPORT_NAME_ZEROES].contains(&out.len());
    assert!(out.is_empty() || (selected && after_export_name), "{} strange bytes", out.len());
}

/// Target `nbd_reply`: whatever a server sends, a client's decoders refuse it or read it, and what they read
/// encodes to the same bytes.
///
/// # Panics
/// If they do not; that is the finding.
pub fn check_reply(data: &[u8]) {
    for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
        let Ok(Some((header, len))) = ReplyHeader::decode(style, data) else { continue };
        let (bytes, payload) = data.split_at(len);
        let ReplyHeader::Chunk(chunk) = header else { continue };
        assert_eq!(ChunkHeader::encode(chunk, style).as_slice(), bytes);
        let payload_bytes = usize::try_from(chunk.length_bytes).unwrap_or(usize::MAX).min(payload.len());
        if let Ok(Chunk::Status { extents, .. }) = Chunk::decode(chunk.kind, &payload[..payload_bytes]) {
            assert_eq!(extents.iter().count(), extents.count());
            assert!(extents.iter().all(|extent| extent.length_bytes > 0));
        }
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(header) = OptionReplyHeader::decode(bytes)
    {
        assert_eq!(&header.encode(), bytes);
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(header) = OptionHeader::decode(bytes)
    {
        assert_eq!(&header.encode(), bytes);
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(greeting) = Greeting::decode(bytes)
    {
        assert_eq!(&greeting.encode(), bytes);
    }
    let payload = data.get(OPTION_REPLY_HEADER_BYTES..).unwrap_or(data);
    let _ = Info::decode(payload);
    let _ = decode_server_entry(payload);
    let _ = decode_meta_context(payload);
    let _ = InfoQuery::decode(payload);
    let _ = MetaContextQuery::decode(payload).map(|query| query.queries().count());
    let _ = StatusQuery::decode(payload).map(|query| query.contexts().count());
}
