//! The handshake: client flags, then options until one of them selects an export.
//!
//! | option | accepted when | otherwise |
//! |---|---|---|
//! | EXPORT_NAME | the export exists, headers are not extended | closed, for want of an error reply |
//! | ABORT | always, whatever it carries | |
//! | LIST | no payload | ERR_INVALID |
//! | STARTTLS | never yet | ERR_UNSUP |
//! | INFO, GO | the payload parses, the export exists | ERR_INVALID, ERR_UNKNOWN |
//! | STRUCTURED_REPLY | no payload, once, not after EXTENDED_HEADERS | ERR_INVALID, ERR_EXT_HEADER_REQD |
//! | EXTENDED_HEADERS | no payload, once | ERR_INVALID |
//! | LIST_META_CONTEXT, SET_META_CONTEXT | see the module `meta_context` | |
//! | any other | never | ERR_UNSUP |
//!
//! Nothing of an export is opened or reserved here: a client is worth nothing until it has selected one. Error
//! texts are constants and repeat nothing that the client sent.

use super::carry::Carry;
use super::meta_context;
use super::{Agreement, CloseReason, Rejection, Rejections, Turn};
use crate::limits::{
    HANDSHAKE_OPTIONS_MAX, NBD_STRING_BYTES_MAX, OPTION_BYTES_MAX, OPTION_SKIP_BYTES_MAX,
    REQUEST_PAYLOAD_BYTES_MAX,
};
use crate::request::{Export, ExportIndex, Exports};
use crate::units::BLOCK_BYTES;
use crate::wire::nbd_handshake::{
    EXPORT_NAME_ZEROES, ExportNameReply, Info, InfoQuery, OptionHeader, client_flag, decode_string,
    encode_info, encode_option_reply, encode_server_entry, info_type, option, reply_type, transmission_flag,
};
use crate::wire::nbd_transmission::HeaderStyle;
use std::borrow::Cow;

/// What the handshake has agreed on so far, and where it stands in the stream.
#[derive(Debug)]
pub(super) struct Handshake {
    part: Part,
    fixed_newstyle: bool,
    no_zeroes: bool,
    options_seen: u32,
    style: HeaderStyle,
    /// The export for which the last SET_META_CONTEXT chose `base:allocation`.
    context_export: Option<ExportIndex>,
    /// A payload that arrives in parts.
    payload: Vec<u8>,
}

/// What the next bytes of the stream are.
#[derive(Clone, Copy, Debug)]
enum Part {
    ClientFlags,
    Header,
    Payload(OptionHeader),
    /// The rest of an option that was answered on its header.
    Skip {
        left_bytes: u32,
    },
    /// None: the list of exports is written from this position on.
    List {
        position: usize,
    },
}

/// What a move of the handshake may use beside its own state.
pub(super) struct Around<'a> {
    pub(super) carry: &'a mut Carry,
    pub(super) rejections: &'a mut Rejections,
    pub(super) exports: &'a dyn Exports,
    pub(super) read_only: bool,
    pub(super) shutting_down: bool,
}

/// Why an option is refused: a [`reply_type`], a text for people, a reason for metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) u32, pub(super) Cow<'static, str>, pub(super) Rejection);

impl Refusal {
    const UNKNOWN_OPTION: Refusal = Refusal(
        reply_type::ERR_UNSUP,
        Cow::Borrowed("the server does not know this option"),
        Rejection::OptionUnknown,
    );
    const NO_TLS: Refusal =
        Refusal(reply_type::ERR_UNSUP, Cow::Borrowed("TLS is not offered here"), Rejection::TlsNotOffered);
    const UNEXPECTED_PAYLOAD: Refusal = Refusal(
        reply_type::ERR_INVALID,
        Cow::Borrowed("this option takes no payload"),
        Rejection::OptionMalformed,
    );
    const TOO_BIG: Refusal =
        Refusal(reply_type::ERR_TOO_BIG, Cow::Borrowed("the option is too long"), Rejection::OptionTooBig);
    const TWICE: Refusal =
        Refusal(reply_type::ERR_INVALID, Cow::Borrowed("already negotiated"), Rejection::OptionOrder);
    const BELOW_EXTENDED: Refusal = Refusal(
        reply_type::ERR_EXT_HEADER_REQD,
        Cow::Borrowed("extended headers are negotiated already"),
        Rejection::OptionOrder,
    );
    const SHUTDOWN: Refusal =
        Refusal(reply_type::ERR_SHUTDOWN, Cow::Borrowed("the server is stopping"), Rejection::OptionShutdown);
    pub(super) const MALFORMED: Refusal = Refusal(
        reply_type::ERR_INVALID,
        Cow::Borrowed("the option's payload is malformed"),
        Rejection::OptionMalformed,
    );
    pub(super) const NO_EXPORT: Refusal = Refusal(
        reply_type::ERR_UNKNOWN,
        Cow::Borrowed("there is no export of this name"),
        Rejection::ExportUnknown,
    );
}

impl Handshake {
    pub(super) fn new() -> Handshake {
        Handshake {
            part: Part::ClientFlags,
            fixed_newstyle: false,
            no_zeroes: false,
            options_seen: 0,
            style: HeaderStyle::Simple,
            context_export: None,
            payload: Vec::new(),
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.payload.capacity()
    }

    pub(super) fn turn(&mut self, around: &mut Around<'_>, rest: &mut &[u8], out: &mut Vec<u8>) -> Turn {
        match self.part {
            Part::ClientFlags => {
                let Some(flags) = around.carry.take(rest) else { return Turn::Starved };
                self.handle_client_flags(around, u32::from_be_bytes(flags))
            }
            Part::Header => {
                let Some(header) = around.carry.take(rest) else { return Turn::Starved };
                match OptionHeader::decode(&header) {
                    Ok(header) => self.handle_header(around, header, out),
                    Err(_) => Turn::refuse(around.rejections, Rejection::OptionMagic),
                }
            }
            Part::Payload(header) => self.collect_payload(around, header, rest, out),
            Part::Skip { left_bytes } => {
                let skipped = u32::try_from(rest.len()).unwrap_or(u32::MAX).min(left_bytes);
                *rest = &rest[skipped as usize..];
                let left_bytes = left_bytes - skipped;
                self.part = if left_bytes == 0 { Part::Header } else { Part::Skip { left_bytes } };
                if left_bytes == 0 { Turn::Again } else { Turn::Starved }
            }
            Part::List { position } => {
                if let Some(export) = around.exports.nth(position) {
                    encode_server_entry(out, clip(&export.name), clip(&export.description));
                    self.part = Part::List { position: position + 1 };
                } else {
                    encode_option_reply(out, option::LIST, reply_type::ACK, b"");
                    self.part = Part::Header;
                }
                Turn::Again
            }
        }
    }

    /// A bit that was not offered may change the meaning of everything after it, so the protocol demands that the
    /// connection is dropped.
    fn handle_client_flags(&mut self, around: &mut Around<'_>, flags: u32) -> Turn {
        if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
            return Turn::refuse(around.rejections, Rejection::ClientFlags);
        }
        self.fixed_newstyle = flags & client_flag::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & client_flag::NO_ZEROES != 0;
        self.part = Part::Header;
        Turn::Again
    }

    fn handle_header(&mut self, around: &mut Around<'_>, header: OptionHeader, out: &mut Vec<u8>) -> Turn {
        self.options_seen += 1;
        let fatal = if self.options_seen > HANDSHAKE_OPTIONS_MAX {
            Some(Rejection::OptionCount)
        } else if header.length_bytes > OPTION_SKIP_BYTES_MAX {
            Some(Rejection::OptionLength)
        } else if header.option == option::EXPORT_NAME {
            self.refuse_export_name(around, header)
        } else if !self.fixed_newstyle {
            Some(Rejection::OptionNeedsFixed)
        } else {
            None
        };
        if let Some(rejection) = fatal {
            return Turn::refuse(around.rejections, rejection);
        }
        if header.option == option::ABORT {
            encode_option_reply(out, option::ABORT, reply_type::ACK, b"");
            return Turn::Close(CloseReason::Aborted);
        }
        self.part = match self.judge_header(around, header) {
            Ok(part) => part,
            Err(refusal) => {
                refuse(around.rejections, header.option, refusal, out);
                Part::Skip { left_bytes: header.length_bytes }
            }
        };
        if matches!(self.part, Part::Header) {
            encode_option_reply(out, header.option, reply_type::ACK, b"");
        }
        Turn::Again
    }

    /// What is known to be wrong with EXPORT_NAME before its payload is there.
    fn refuse_export_name(&self, around: &Around<'_>, header: OptionHeader) -> Option<Rejection> {
        if self.style == HeaderStyle::Extended {
            Some(Rejection::ExportNameExtended)
        } else if around.shutting_down {
            Some(Rejection::OptionShutdown)
        } else if header.length_bytes as usize > NBD_STRING_BYTES_MAX {
            Some(Rejection::ExportName)
        } else {
            None
        }
    }

    /// How to go on after an option's header. [`Part::Header`] says that the option is carried out already.
    fn judge_header(&mut self, around: &Around<'_>, header: OptionHeader) -> Result<Part, Refusal> {
        // A failed SET_META_CONTEXT replaces the old choice too, whatever it failed on.
        if header.option == option::SET_META_CONTEXT {
            self.context_export = None;
        }
        if around.shutting_down {
            return Err(Refusal::SHUTDOWN);
        }
        match header.option {
            option::EXPORT_NAME => Ok(Part::Payload(header)),
            option::INFO | option::GO | option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                if header.length_bytes > OPTION_BYTES_MAX {
                    return Err(Refusal::TOO_BIG);
                }
                Ok(Part::Payload(header))
            }
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS
                if header.length_bytes > 0 =>
            {
                Err(Refusal::UNEXPECTED_PAYLOAD)
            }
            option::LIST => Ok(Part::List { position: 0 }),
            // The place where TLS will come. Whatever was agreed on in plain text may come from somebody else:
            // style, contexts and unread input must be discarded with the ACK.
            option::STARTTLS => Err(Refusal::NO_TLS),
            option::STRUCTURED_REPLY => match self.style {
                HeaderStyle::Simple => {
                    self.style = HeaderStyle::Structured;
                    Ok(Part::Header)
                }
                HeaderStyle::Structured => Err(Refusal::TWICE),
                HeaderStyle::Extended => Err(Refusal::BELOW_EXTENDED),
            },
            option::EXTENDED_HEADERS => {
                if self.style == HeaderStyle::Extended {
                    return Err(Refusal::TWICE);
                }
                self.style = HeaderStyle::Extended;
                Ok(Part::Header)
            }
            _ => Err(Refusal::UNKNOWN_OPTION),
        }
    }

    /// Handles the option where it lies if all of it is there; else gathers it, at most [`OPTION_BYTES_MAX`].
    fn collect_payload(
        &mut self,
        around: &mut Around<'_>,
        header: OptionHeader,
        rest: &mut &[u8],
        out: &mut Vec<u8>,
    ) -> Turn {
        let length = header.length_bytes as usize;
        if self.payload.is_empty()
            && let Some((payload, behind)) = rest.split_at_checked(length)
        {
            *rest = behind;
            return self.handle_payload(around, header, payload, out);
        }
        let (part, behind) = rest.split_at(rest.len().min(length - self.payload.len()));
        *rest = behind;
        self.payload.reserve_exact(length - self.payload.len());
        self.payload.extend_from_slice(part);
        if self.payload.len() < length {
            return Turn::Starved;
        }
        let payload = std::mem::take(&mut self.payload);
        self.handle_payload(around, header, &payload, out)
    }

    fn handle_payload(
        &mut self,
        around: &mut Around<'_>,
        header: OptionHeader,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Turn {
        self.part = Part::Header;
        let answer = match header.option {
            option::EXPORT_NAME => return self.answer_export_name(around, payload, out),
            option::INFO | option::GO => self.answer_info(around, header.option, payload, out),
            option::LIST_META_CONTEXT => {
                meta_context::answer_list(self.style, around.exports, payload, out).map(|()| None)
            }
            _ => meta_context::answer_set(self.style, around.exports, payload, out).map(|chosen| {
                self.context_export = chosen;
                None
            }),
        };
        match answer {
            Ok(selected) => {
                encode_option_reply(out, header.option, reply_type::ACK, b"");
                selected.map_or(Turn::Again, Turn::Selected)
            }
            Err(refusal) => {
                refuse(around.rejections, header.option, refusal, out);
                Turn::Again
            }
        }
    }

    fn answer_export_name(&mut self, around: &mut Around<'_>, name: &[u8], out: &mut Vec<u8>) -> Turn {
        let export = decode_string(name).ok().and_then(|name| around.exports.find(name));
        let Some(export) = export else { return Turn::refuse(around.rejections, Rejection::ExportName) };
        if export.refusal.is_some() {
            return Turn::refuse(around.rejections, Rejection::ExportElsewhere);
        }
        let agreement = self.agreement(around, export);
        let reply = ExportNameReply { size_bytes: export.size_bytes, flags: agreement.transmission_flags() };
        out.extend_from_slice(&reply.encode());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
        Turn::Selected(agreement)
    }

    /// Writes the facts about an export. INFO and GO with the same payload write the same ones.
    fn answer_info(
        &mut self,
        around: &Around<'_>,
        option: u32,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Agreement>, Refusal> {
        let query = InfoQuery::decode(payload).map_err(|_| Refusal::MALFORMED)?;
        let export = around.exports.find(query.name).ok_or(Refusal::NO_EXPORT)?;
        if let (option::GO, Some(why)) = (option, &export.refusal) {
            let why = Cow::Owned(clip(why).to_owned());
            return Err(Refusal(reply_type::ERR_POLICY, why, Rejection::ExportElsewhere));
        }
        let agreement = self.agreement(around, export);
        let flags = agreement.transmission_flags();
        encode_info(out, option, &Info::Export { size_bytes: export.size_bytes, flags });
        if query.asks_for(info_type::NAME) {
            encode_info(out, option, &Info::Name(clip(&export.name)));
        }
        if query.asks_for(info_type::DESCRIPTION) && !export.description.is_empty() {
            encode_info(out, option, &Info::Description(clip(&export.description)));
        }
        if query.asks_for(info_type::BLOCK_SIZE) {
            let block_size = Info::BlockSize {
                minimum_bytes: 1,
                preferred_bytes: BLOCK_BYTES,
                payload_bytes_max: REQUEST_PAYLOAD_BYTES_MAX,
            };
            encode_info(out, option, &block_size);
        }
        Ok((option == option::GO).then_some(agreement))
    }

    fn agreement(&self, around: &Around<'_>, export: &Export) -> Agreement {
        Agreement {
            export: export.index,
            size_bytes: export.size_bytes,
            read_only: export.read_only || around.read_only,
            style: self.style,
            base_allocation: self.context_export == Some(export.index),
        }
    }
}

impl Agreement {
    /// Exactly what is implemented for this export in this style.
    pub(super) fn transmission_flags(&self) -> u16 {
        let mut flags = transmission_flag::HAS_FLAGS
            | transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::SEND_TRIM
            | transmission_flag::SEND_WRITE_ZEROES
            | transmission_flag::CAN_MULTI_CONN
            | transmission_flag::SEND_CACHE
            | transmission_flag::SEND_FAST_ZERO;
        if self.read_only {
            flags |= transmission_flag::READ_ONLY;
        }
        if self.style != HeaderStyle::Simple {
            flags |= transmission_flag::SEND_DF;
        }
        if self.takes_status_payload() {
            flags |= transmission_flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    /// May BLOCK_STATUS name the contexts that it is about?
    pub(super) fn takes_status_payload(&self) -> bool {
        self.style == HeaderStyle::Extended && self.base_allocation
    }
}

fn refuse(rejections: &mut Rejections, option: u32, refusal: Refusal, out: &mut Vec<u8>) {
    let Refusal(reply_type, text, rejection) = refusal;
    rejections.note(rejection);
    encode_option_reply(out, option, reply_type, text.as_bytes());
}

/// As much of a text as a string of the protocol can hold.
fn clip(text: &str) -> &str {
    let mut end = text.len().min(NBD_STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
