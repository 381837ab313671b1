//! NBD before transmission: greeting, options and their replies.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice project, sections "Newstyle negotiation", "Fixed newstyle
//! negotiation" and "Handshake phase"; extended headers from its branch `extension-ext-header`. Numbers are in
//! network byte order.
//!
//! ```text
//! greeting        S: "NBDMAGIC" "IHAVEOPT" flags:16                              18 bytes
//!                 C: flags:32                                                     4
//! option          C: "IHAVEOPT" option:32 length:32 payload                      16 + length
//! option reply    S: 0x3e889045565a9 option:32 type:32 length:32 payload         20 + length
//! EXPORT_NAME     S: size:64 transmission flags:16 [124 zero bytes]              10 or 134, no header
//! INFO, GO        C: name length:32 name  count:16 (info type:16)*
//! *_META_CONTEXT  C: name length:32 name  count:32 (query length:32 query)*
//! REP_SERVER      S: name length:32 name description
//! REP_INFO        S: EXPORT:16 size:64 flags:16 | NAME:16 name | DESCRIPTION:16 text
//!                    | BLOCK_SIZE:16 minimum:32 preferred:32 maximum:32
//! REP_META_CONTEXT S: id:32 name
//! REP_ERR_*       S: text for people
//! ```

use super::WireError;
use super::fields::Fields;
use crate::limits::NBD_STRING_BYTES_MAX;

/// The port that IANA assigned to NBD.
pub const PORT: u16 = 10_809;
/// `NBDMAGIC`, the first word of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting and before every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The only metadata context that the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Bytes of the greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of the client's flags.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes in front of an option's payload.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes in front of the payload of a reply to an option.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Bytes of the answer to EXPORT_NAME, without the zeroes.
pub const EXPORT_NAME_REPLY_BYTES: usize = 10;
/// Zero bytes behind the answer to EXPORT_NAME, unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Handshake flags, 16 bits, sent by the server.
pub mod handshake_flag {
    /// The server understands all options and replies to them.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The server can leave out the zeroes behind the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Client flags, 32 bits, the client's answer to the greeting.
pub mod client_flag {
    /// The client understands replies to options.
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client does not want the zeroes behind the answer to EXPORT_NAME.
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Transmission flags, 16 bits: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Changes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is understood, on every command.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium is a spinning disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and its NO_HOLE flag are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag of READ is understood. Needs structured or extended replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// What one connection flushed, all connections see.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// RESIZE is understood (an extension that nobody ships).
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO flag of WRITE_ZEROES is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may carry a list of metadata contexts. Needs extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Option numbers.
pub mod option {
    /// Choose an export and start; the answer cannot be an error.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Withdrawn.
    pub const PEEK_EXPORT: u32 = 4;
    /// Continue under TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Reply in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose the metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use headers of 32 bytes both ways.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Reply types. Those with bit 31 set are errors and may carry a text.
pub mod reply_type {
    /// Accepted, or the end of a list.
    pub const ACK: u32 = 1;
    /// An entry of the list of exports.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The server does not know the option.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The server knows the option and is configured to refuse it.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option makes no sense, or not now.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// The server's platform lacks support.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for the block size.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// Request or reply is too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers first; or: they are on, and structured replies are below them.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Types of facts about an export, in INFO and GO.
pub mod info_type {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest and best block, largest payload.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What the server says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Of [`handshake_flag`].
    pub flags: u16,
}

impl Greeting {
    /// The greeting's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[0..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..18].copy_from_slice(&self.flags.to_be_bytes());
        bytes
    }

    /// Reads a greeting.
    ///
    /// # Errors
    /// [`WireError::Magic`] if it is not one; the withdrawn oldstyle greeting is not.
    pub fn decode(bytes: &[u8; GREETING_BYTES]) -> Result<Greeting, WireError> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != INIT_MAGIC || fields.u64()? != OPTION_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(Greeting { flags: fields.u16()? })
    }
}

/// What stands in front of every option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Of [`option`], or a number that nobody knows.
    pub option: u32,
    /// Bytes of payload that follow, as the client claims.
    pub length_bytes: u32,
}

impl OptionHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_HEADER_BYTES] {
        let mut bytes = [0; OPTION_HEADER_BYTES];
        bytes[0..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.length_bytes.to_be_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::Magic`] if it is not one.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<OptionHeader, WireError> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(OptionHeader { option: fields.u32()?, length_bytes: fields.u32()? })
    }
}

/// What stands in front of every reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// Of [`reply_type`].
    pub reply_type: u32,
    /// Bytes of payload that follow.
    pub length_bytes: u32,
}

impl OptionReplyHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_REPLY_HEADER_BYTES] {
        let mut bytes = [0; OPTION_REPLY_HEADER_BYTES];
        bytes[0..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.reply_type.to_be_bytes());
        bytes[16..20].copy_from_slice(&self.length_bytes.to_be_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::Magic`] if it is not one.
    pub fn decode(bytes: &[u8; OPTION_REPLY_HEADER_BYTES]) -> Result<OptionReplyHeader, WireError> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(OptionReplyHeader {
            option: fields.u32()?,
            reply_type: fields.u32()?,
            length_bytes: fields.u32()?,
        })
    }

    /// Does the reply refuse the option?
    #[must_use]
    pub fn is_error(self) -> bool {
        self.reply_type & reply_type::ERROR_BIT != 0
    }
}

/// The payload of INFO and GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    /// The export; empty for the default one.
    pub name: &'a str,
    info_types: &'a [u8],
}

impl<'a> InfoQuery<'a> {
    /// Reads the payload of INFO or GO.
    ///
    /// # Errors
    /// Any of [`WireError`] except `Magic` and `Kind`; nothing in the payload is trusted.
    pub fn decode(payload: &'a [u8]) -> Result<InfoQuery<'a>, WireError> {
        let mut fields = Fields::new(payload);
        let name = decode_string(fields.counted_bytes()?)?;
        let info_types = usize::from(fields.u16()?) * 2;
        let info_types = fields.bytes(info_types)?;
        fields.finish()?;
        Ok(InfoQuery { name, info_types })
    }

    /// Does the client ask for this fact, of [`info_type`]?
    #[must_use]
    pub fn asks_for(&self, info_type: u16) -> bool {
        self.info_types.chunks_exact(2).any(|pair| pair == info_type.to_be_bytes())
    }
}

/// The payload of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaContextQuery<'a> {
    /// The export; empty for the default one.
    pub name: &'a str,
    queries: &'a [u8],
}

impl<'a> MetaContextQuery<'a> {
    /// Reads the payload, all queries included.
    ///
    /// # Errors
    /// Any of [`WireError`] except `Magic` and `Kind`; nothing in the payload is trusted.
    pub fn decode(payload: &'a [u8]) -> Result<MetaContextQuery<'a>, WireError> {
        let mut fields = Fields::new(payload);
        let name = decode_string(fields.counted_bytes()?)?;
        let count = fields.u32()?;
        let queries = fields.rest();
        // A count of 2^32-1 ends at the first query that is not there: the loop is bounded by the payload.
        for _ in 0..count {
            decode_string(fields.counted_bytes()?)?;
        }
        fields.finish()?;
        Ok(MetaContextQuery { name, queries })
    }

    /// The queries, in the client's order.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut fields = Fields::new(self.queries);
        std::iter::from_fn(move || decode_string(fields.counted_bytes().ok()?).ok())
    }
}

/// A fact about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// Size in bytes and [`transmission_flag`]s.
    Export {
        /// Size in bytes.
        size_bytes: u64,
        /// Of [`transmission_flag`].
        flags: u16,
    },
    /// The canonical name.
    Name(&'a str),
    /// A text for people.
    Description(&'a str),
    /// What requests should keep to.
    BlockSize {
        /// Offsets and lengths are multiples of this many bytes.
        minimum_bytes: u32,
        /// Requests of multiples of this many bytes are done without reading first.
        preferred_bytes: u32,
        /// Longest payload.
        payload_bytes_max: u32,
    },
    /// A fact of a kind that this client does not know and ignores.
    Unknown(u16),
}

impl<'a> Info<'a> {
    /// Reads the payload of a reply of type INFO.
    ///
    /// # Errors
    /// Any of [`WireError`] except `Magic` and `Kind`.
    pub fn decode(payload: &'a [u8]) -> Result<Info<'a>, WireError> {
        let mut fields = Fields::new(payload);
        let info = match fields.u16()? {
            info_type::EXPORT => Info::Export { size_bytes: fields.u64()?, flags: fields.u16()? },
            info_type::BLOCK_SIZE => Info::BlockSize {
                minimum_bytes: fields.u32()?,
                preferred_bytes: fields.u32()?,
                payload_bytes_max: fields.u32()?,
            },
            info_type::NAME => return decode_string(fields.rest()).map(Info::Name),
            info_type::DESCRIPTION => return decode_string(fields.rest()).map(Info::Description),
            other => return Ok(Info::Unknown(other)),
        };
        fields.finish()?;
        Ok(info)
    }
}

/// The answer to EXPORT_NAME.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportNameReply {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Of [`transmission_flag`].
    pub flags: u16,
}

impl ExportNameReply {
    /// The answer's bytes, without the zeroes.
    #[must_use]
    pub fn encode(self) -> [u8; EXPORT_NAME_REPLY_BYTES] {
        let mut bytes = [0; EXPORT_NAME_REPLY_BYTES];
        bytes[0..8].copy_from_slice(&self.size_bytes.to_be_bytes());
        bytes[8..10].copy_from_slice(&self.flags.to_be_bytes());
        bytes
    }

    /// Reads the answer.
    #[must_use]
    pub fn decode(bytes: &[u8; EXPORT_NAME_REPLY_BYTES]) -> ExportNameReply {
        let (size, flags) = bytes.split_at(8);
        ExportNameReply {
            size_bytes: u64::from_be_bytes(size.try_into().expect("eight bytes")),
            flags: u16::from_be_bytes(flags.try_into().expect("two bytes")),
        }
    }
}

/// An entry of the list of exports: its name and a text for people.
///
/// # Errors
/// Any of [`WireError`] except `Magic`, `Kind` and `Trailing`.
pub fn decode_server_entry(payload: &[u8]) -> Result<(&str, &str), WireError> {
    let mut fields = Fields::new(payload);
    let name = decode_string(fields.counted_bytes()?)?;
    Ok((name, decode_string(fields.rest())?))
}

/// A metadata context: its number and its name.
///
/// # Errors
/// Any of [`WireError`] except `Magic`, `Kind` and `Trailing`.
pub fn decode_meta_context(payload: &[u8]) -> Result<(u32, &str), WireError> {
    let mut fields = Fields::new(payload);
    let id = fields.u32()?;
    Ok((id, decode_string(fields.rest())?))
}

/// A string of the protocol: UTF-8 without NUL, at most [`NBD_STRING_BYTES_MAX`] bytes.
///
/// # Errors
/// [`WireError::StringLength`] or [`WireError::StringContent`].
pub fn decode_string(bytes: &[u8]) -> Result<&str, WireError> {
    if bytes.len() > NBD_STRING_BYTES_MAX {
        return Err(WireError::StringLength);
    }
    if bytes.contains(&0) {
        return Err(WireError::StringContent);
    }
    std::str::from_utf8(bytes).map_err(|_| WireError::StringContent)
}

/// Client: appends an option.
///
/// # Panics
/// If the payload does not fit in 32 bits.
pub fn encode_option(out: &mut Vec<u8>, option: u32, payload: &[u8]) {
    out.extend_from_slice(&OptionHeader { option, length_bytes: length32(payload.len()) }.encode());
    out.extend_from_slice(payload);
}

/// Client: appends INFO or GO.
///
/// # Panics
/// If `name` or `info_types` do not fit in their length fields.
pub fn encode_info_query(out: &mut Vec<u8>, option: u32, name: &str, info_types: &[u16]) {
    let payload_bytes = length32(4 + name.len() + 2 + 2 * info_types.len());
    out.extend_from_slice(&OptionHeader { option, length_bytes: payload_bytes }.encode());
    encode_counted(out, name);
    let count = u16::try_from(info_types.len()).expect("at most 65535 facts are asked for");
    out.extend_from_slice(&count.to_be_bytes());
    for info_type in info_types {
        out.extend_from_slice(&info_type.to_be_bytes());
    }
}

/// Client: appends LIST_META_CONTEXT or SET_META_CONTEXT.
///
/// # Panics
/// If anything does not fit in its length field.
pub fn encode_meta_context_query(out: &mut Vec<u8>, option: u32, name: &str, queries: &[&str]) {
    let queries_bytes: usize = queries.iter().map(|query| 4 + query.len()).sum();
    let payload_bytes = length32(4 + name.len() + 4 + queries_bytes);
    out.extend_from_slice(&OptionHeader { option, length_bytes: payload_bytes }.encode());
    encode_counted(out, name);
    out.extend_from_slice(&length32(queries.len()).to_be_bytes());
    for query in queries {
        encode_counted(out, query);
    }
}

/// Server: appends a reply to `option` that carries `payload` (empty for ACK, a text for errors).
///
/// # Panics
/// If the payload does not fit in 32 bits.
pub fn encode_option_reply(out: &mut Vec<u8>, option: u32, reply_type: u32, payload: &[u8]) {
    let length_bytes = length32(payload.len());
    out.extend_from_slice(&OptionReplyHeader { option, reply_type, length_bytes }.encode());
    out.extend_from_slice(payload);
}

/// Server: appends an entry of the list of exports.
///
/// # Panics
/// If the strings do not fit in 32 bits.
pub fn encode_server_entry(out: &mut Vec<u8>, name: &str, description: &str) {
    let length_bytes = length32(4 + name.len() + description.len());
    let header = OptionReplyHeader { option: option::LIST, reply_type: reply_type::SERVER, length_bytes };
    out.extend_from_slice(&header.encode());
    encode_counted(out, name);
    out.extend_from_slice(description.as_bytes());
}

/// Server: appends a fact in reply to `option`, which is INFO or GO.
///
/// # Panics
/// If a string does not fit in 32 bits.
pub fn encode_info(out: &mut Vec<u8>, option: u32, info: &Info<'_>) {
    let mut header = |info_type: u16, content_bytes: usize| {
        let length_bytes = length32(2 + content_bytes);
        let header = OptionReplyHeader { option, reply_type: reply_type::INFO, length_bytes };
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(&info_type.to_be_bytes());
    };
    match *info {
        Info::Export { size_bytes, flags } => {
            header(info_type::EXPORT, 10);
            out.extend_from_slice(&ExportNameReply { size_bytes, flags }.encode());
        }
        Info::Name(text) => {
            header(info_type::NAME, text.len());
            out.extend_from_slice(text.as_bytes());
        }
        Info::Description(text) => {
            header(info_type::DESCRIPTION, text.len());
            out.extend_from_slice(text.as_bytes());
        }
        Info::BlockSize { minimum_bytes, preferred_bytes, payload_bytes_max } => {
            header(info_type::BLOCK_SIZE, 12);
            for number in [minimum_bytes, preferred_bytes, payload_bytes_max] {
                out.extend_from_slice(&number.to_be_bytes());
            }
        }
        Info::Unknown(info_type) => header(info_type, 0),
    }
}

/// Server: appends a metadata context in reply to `option`, which is LIST_META_CONTEXT or SET_META_CONTEXT.
///
/// # Panics
/// If the name does not fit in 32 bits.
pub fn encode_meta_context(out: &mut Vec<u8>, option: u32, id: u32, name: &str) {
    let length_bytes = length32(4 + name.len());
    let header = OptionReplyHeader { option, reply_type: reply_type::META_CONTEXT, length_bytes };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(name.as_bytes());
}

fn encode_counted(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&length32(text.len()).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn length32(len: usize) -> u32 {
    u32::try_from(len).expect("an option or reply of less than 4 GiB")
}

#[cfg(test)]
mod tests;
