//! NBD transmission: requests and their replies, in the three styles that a handshake can agree on.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice project, sections "Transmission" and "Transmission phase";
//! extended headers from its branch `extension-ext-header`. Numbers are in network byte order.
//!
//! ```text
//! request, compact    0x25609513 flags:16 command:16 cookie:64 offset:64 length:32              28 bytes
//! request, extended   0x21e41c71 flags:16 command:16 cookie:64 offset:64 length:64              32
//! simple reply        0x67446698 error:32 cookie:64                                             16
//! structured chunk    0x668e33ef flags:16 kind:16 cookie:64 length:32 payload                   20 + length
//! extended chunk      0x6e8a278c flags:16 kind:16 cookie:64 offset:64 length:64 payload         32 + length
//!
//! payloads of chunks  OFFSET_DATA       offset:64 data
//!                     OFFSET_HOLE       offset:64 length:32
//!                     BLOCK_STATUS      context:32 (length:32 status:32)+
//!                     BLOCK_STATUS_EXT  context:32 count:32 (length:64 status:64)+
//!                     ERROR             error:32 text length:16 text
//!                     ERROR_OFFSET      error:32 text length:16 text offset:64
//! payload of an extended BLOCK_STATUS request: length:64 context:32 *
//! ```

use super::WireError;
use super::fields::Fields;
use super::nbd_handshake::decode_string;

/// First word of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a compact request.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of an extended request.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Bytes of a simple reply.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes in front of the payload of a structured chunk.
pub const STRUCTURED_REPLY_BYTES: usize = 20;
/// Bytes in front of the payload of an extended chunk.
pub const EXTENDED_REPLY_BYTES: usize = 32;

/// Command numbers.
pub mod command {
    /// Return bytes.
    pub const READ: u16 = 0;
    /// Store bytes.
    pub const WRITE: u16 = 1;
    /// Leave; there is no reply.
    pub const DISC: u16 = 2;
    /// Bring to stable media what was answered.
    pub const FLUSH: u16 = 3;
    /// Bytes are no longer needed.
    pub const TRIM: u16 = 4;
    /// Bytes will be read soon.
    pub const CACHE: u16 = 5;
    /// Bytes become zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// Where are data and holes?
    pub const BLOCK_STATUS: u16 = 7;
    /// Change the size (an extension that nobody ships).
    pub const RESIZE: u16 = 8;
}

/// Command flags.
pub mod command_flag {
    /// Reply when this is on stable media. Legal with every command.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep space allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: at most one content chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: exactly one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: refuse unless faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flags of chunks.
pub mod chunk_flag {
    /// The last chunk of a reply.
    pub const DONE: u16 = 1 << 0;
}

/// Kinds of chunks. Those with bit 15 set are errors.
pub mod chunk_kind {
    /// Nothing; ends a reply.
    pub const NONE: u16 = 0;
    /// Bytes of the export.
    pub const OFFSET_DATA: u16 = 1;
    /// A range that reads as zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Error numbers. Nothing else may stand in an error field.
pub mod error_number {
    /// Operation not permitted.
    pub const EPERM: u32 = 1;
    /// Input/output error.
    pub const EIO: u32 = 5;
    /// Cannot allocate memory.
    pub const ENOMEM: u32 = 12;
    /// Invalid argument.
    pub const EINVAL: u32 = 22;
    /// No space left on device.
    pub const ENOSPC: u32 = 28;
    /// Value too large.
    pub const EOVERFLOW: u32 = 75;
    /// Operation not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server is stopping.
    pub const ESHUTDOWN: u32 = 108;
}

/// Status flags of the metadata context `base:allocation`.
pub mod allocation_status {
    /// Nothing is stored; writing may find no space.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// What a handshake agreed on for requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum HeaderStyle {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; READ and BLOCK_STATUS are answered in structured chunks, the rest in chunks or simply.
    Structured,
    /// Requests and chunks with headers of 32 bytes.
    Extended,
}

impl HeaderStyle {
    /// Bytes in front of a request's payload.
    #[must_use]
    pub fn request_bytes(self) -> usize {
        match self {
            HeaderStyle::Simple | HeaderStyle::Structured => REQUEST_BYTES,
            HeaderStyle::Extended => EXTENDED_REQUEST_BYTES,
        }
    }
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Of [`command_flag`].
    pub flags: u16,
    /// Of [`command`], or a number that nobody knows.
    pub command: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// First byte concerned.
    pub offset_bytes: u64,
    /// Bytes concerned, or with [`command_flag::PAYLOAD_LEN`] bytes of payload.
    pub length_bytes: u64,
}

impl RequestHeader {
    /// Reads a compact request.
    ///
    /// # Errors
    /// [`WireError::Magic`] if it is not one.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<RequestHeader, WireError> {
        let mut fields = Fields::new(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(RequestHeader {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset_bytes: fields.u64()?,
            length_bytes: u64::from(fields.u32()?),
        })
    }

    /// Reads an extended request.
    ///
    /// # Errors
    /// [`WireError::Magic`] if it is not one.
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_BYTES]) -> Result<RequestHeader, WireError> {
        let mut fields = Fields::new(bytes);
        if fields.u32()? != EXTENDED_REQUEST_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(RequestHeader {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset_bytes: fields.u64()?,
            length_bytes: fields.u64()?,
        })
    }

    /// The request in this style. In the extended one the caller sets [`command_flag::PAYLOAD_LEN`] on WRITE.
    ///
    /// # Panics
    /// If the style is compact and the length does not fit in 32 bits.
    #[must_use]
    pub fn encode(self, style: HeaderStyle) -> HeaderBytes {
        let mut bytes = HeaderBytes::new();
        bytes.push(&match style {
            HeaderStyle::Simple | HeaderStyle::Structured => REQUEST_MAGIC.to_be_bytes(),
            HeaderStyle::Extended => EXTENDED_REQUEST_MAGIC.to_be_bytes(),
        });
        bytes.push(&self.flags.to_be_bytes());
        bytes.push(&self.command.to_be_bytes());
        bytes.push(&self.cookie.to_be_bytes());
        bytes.push(&self.offset_bytes.to_be_bytes());
        bytes.push_length(style, self.length_bytes);
        bytes
    }
}

/// What stands in front of the payload of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// The whole reply; the bytes follow if the request was a READ and `error` is zero.
    Simple {
        /// Of [`error_number`], or zero.
        error: u32,
        /// Of the request.
        cookie: u64,
    },
    /// One chunk of a reply.
    Chunk(ChunkHeader),
}

/// What stands in front of a chunk's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Of [`chunk_flag`].
    pub flags: u16,
    /// Of [`chunk_kind`], or a number that this client does not know.
    pub kind: u16,
    /// Of the request.
    pub cookie: u64,
    /// Of the request; zero and not sent in structured replies.
    pub request_offset_bytes: u64,
    /// Bytes of payload that follow.
    pub length_bytes: u64,
}

impl ReplyHeader {
    /// Reads the header at the start of `bytes`, and says how many bytes it takes; `None` if it is not all there.
    ///
    /// # Errors
    /// [`WireError::Magic`] if the bytes are no reply of this style.
    pub fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<Option<(ReplyHeader, usize)>, WireError> {
        let Some(magic) = bytes.first_chunk::<4>() else { return Ok(None) };
        let len = match (style, u32::from_be_bytes(*magic)) {
            (HeaderStyle::Simple | HeaderStyle::Structured, SIMPLE_REPLY_MAGIC) => SIMPLE_REPLY_BYTES,
            (HeaderStyle::Structured, STRUCTURED_REPLY_MAGIC) => STRUCTURED_REPLY_BYTES,
            (HeaderStyle::Extended, EXTENDED_REPLY_MAGIC) => EXTENDED_REPLY_BYTES,
            _ => return Err(WireError::Magic),
        };
        let Some(header) = bytes.get(4..len) else { return Ok(None) };
        let mut fields = Fields::new(header);
        if len == SIMPLE_REPLY_BYTES {
            return Ok(Some((ReplyHeader::Simple { error: fields.u32()?, cookie: fields.u64()? }, len)));
        }
        let mut chunk = ChunkHeader {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
            request_offset_bytes: 0,
            length_bytes: 0,
        };
        if style == HeaderStyle::Extended {
            chunk.request_offset_bytes = fields.u64()?;
            chunk.length_bytes = fields.u64()?;
        } else {
            chunk.length_bytes = u64::from(fields.u32()?);
        }
        Ok(Some((ReplyHeader::Chunk(chunk), len)))
    }
}

/// Server: a simple reply.
#[must_use]
pub fn encode_simple_reply(error: u32, cookie: u64) -> HeaderBytes {
    let mut bytes = HeaderBytes::new();
    bytes.push(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes.push(&error.to_be_bytes());
    bytes.push(&cookie.to_be_bytes());
    bytes
}

impl ChunkHeader {
    /// Server: the header in this style.
    ///
    /// # Panics
    /// If the style has no chunks, or is structured and the length does not fit in 32 bits.
    #[must_use]
    pub fn encode(self, style: HeaderStyle) -> HeaderBytes {
        let mut bytes = HeaderBytes::new();
        bytes.push(&match style {
            HeaderStyle::Simple => panic!("chunks were not negotiated"),
            HeaderStyle::Structured => STRUCTURED_REPLY_MAGIC.to_be_bytes(),
            HeaderStyle::Extended => EXTENDED_REPLY_MAGIC.to_be_bytes(),
        });
        bytes.push(&self.flags.to_be_bytes());
        bytes.push(&self.kind.to_be_bytes());
        bytes.push(&self.cookie.to_be_bytes());
        if style == HeaderStyle::Extended {
            bytes.push(&self.request_offset_bytes.to_be_bytes());
        }
        bytes.push_length(style, self.length_bytes);
        bytes
    }

    /// Is this the last chunk of its reply?
    #[must_use]
    pub fn is_last(self) -> bool {
        self.flags & chunk_flag::DONE != 0
    }
}

/// The payload of a chunk, as a client reads it. A client that wants the bytes of OFFSET_DATA elsewhere decodes
/// the eight bytes of their offset itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// The end of the reply.
    None,
    /// Bytes of the export.
    Data {
        /// Of the first byte, in the export.
        offset_bytes: u64,
        /// At least one.
        data: &'a [u8],
    },
    /// A range that reads as zeroes.
    Hole {
        /// First byte, in the export.
        offset_bytes: u64,
        /// At least one.
        length_bytes: u32,
    },
    /// Extents of a metadata context, from the request's offset on.
    Status {
        /// Number of the context.
        context: u32,
        /// At least one.
        extents: StatusExtents<'a>,
    },
    /// The request failed.
    Error {
        /// Of [`error_number`], or unknown; not zero.
        error: u32,
        /// For people; may be empty.
        message: &'a str,
        /// Where, if the server says so.
        offset_bytes: Option<u64>,
    },
}

impl<'a> Chunk<'a> {
    /// Reads the payload of a chunk of this kind.
    ///
    /// # Errors
    /// [`WireError::Kind`] for a kind that is no error and not known here; any other but `Magic` for a payload
    /// that breaks the rules. The protocol then asks a client to disconnect.
    pub fn decode(kind: u16, payload: &'a [u8]) -> Result<Chunk<'a>, WireError> {
        let mut fields = Fields::new(payload);
        let chunk = match kind {
            chunk_kind::NONE => Chunk::None,
            chunk_kind::OFFSET_DATA => {
                let offset_bytes = fields.u64()?;
                let data = fields.rest();
                return if data.is_empty() {
                    Err(WireError::Truncated)
                } else {
                    Ok(Chunk::Data { offset_bytes, data })
                };
            }
            chunk_kind::OFFSET_HOLE => {
                Chunk::Hole { offset_bytes: fields.u64()?, length_bytes: fields.u32()? }
            }
            chunk_kind::BLOCK_STATUS | chunk_kind::BLOCK_STATUS_EXT => {
                let context = fields.u32()?;
                let extents = StatusExtents::decode(kind, fields)?;
                return Ok(Chunk::Status { context, extents });
            }
            error if error & chunk_kind::ERROR_BIT != 0 => {
                let error = fields.u32()?;
                let text_bytes = usize::from(fields.u16()?);
                let message = decode_string(fields.bytes(text_bytes)?)?;
                let offset_bytes = if kind == chunk_kind::ERROR_OFFSET { Some(fields.u64()?) } else { None };
                if error == 0 {
                    return Err(WireError::Range);
                }
                // Behind the fields that all errors share, unknown kinds of errors may carry more.
                return Ok(Chunk::Error { error, message, offset_bytes });
            }
            _ => return Err(WireError::Kind),
        };
        fields.finish()?;
        if matches!(chunk, Chunk::Hole { length_bytes: 0, .. }) {
            return Err(WireError::Range);
        }
        Ok(chunk)
    }
}

/// One extent of a metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes; not zero.
    pub length_bytes: u64,
    /// Of [`allocation_status`], for `base:allocation`.
    pub status: u64,
}

/// The extents in a status chunk. Their lengths were checked when the chunk was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtents<'a> {
    wide: bool,
    descriptors: &'a [u8],
}

impl<'a> StatusExtents<'a> {
    fn decode(kind: u16, mut fields: Fields<'a>) -> Result<StatusExtents<'a>, WireError> {
        let wide = kind == chunk_kind::BLOCK_STATUS_EXT;
        let count = if wide { Some(fields.u32()?) } else { None };
        let extents = StatusExtents { wide, descriptors: fields.rest() };
        let (whole, rest) = (extents.count(), extents.descriptors.len() % extents.descriptor_bytes());
        if rest != 0 || whole == 0 || count.is_some_and(|count| usize::try_from(count) != Ok(whole)) {
            return Err(WireError::Truncated);
        }
        if extents.iter().any(|extent| extent.length_bytes == 0) {
            return Err(WireError::Range);
        }
        Ok(extents)
    }

    /// How many extents there are; at least one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.descriptors.len() / self.descriptor_bytes()
    }

    /// The extents in the order of the export.
    pub fn iter(&self) -> impl Iterator<Item = StatusExtent> + use<'a> {
        let (wide, mut fields) = (self.wide, Fields::new(self.descriptors));
        std::iter::from_fn(move || {
            Some(if wide {
                StatusExtent { length_bytes: fields.u64().ok()?, status: fields.u64().ok()? }
            } else {
                let (length, status) = (fields.u32().ok()?, fields.u32().ok()?);
                StatusExtent { length_bytes: u64::from(length), status: u64::from(status) }
            })
        })
    }

    fn descriptor_bytes(&self) -> usize {
        if self.wide { 16 } else { 8 }
    }
}

/// The payload of an extended BLOCK_STATUS request: how much of the export, and which metadata contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusQuery<'a> {
    /// Bytes of the export concerned.
    pub length_bytes: u64,
    contexts: &'a [u8],
}

impl<'a> StatusQuery<'a> {
    /// Bytes in front of the list of contexts.
    pub const FIXED_BYTES: usize = 8;

    /// Reads the payload.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if it ends within a number.
    pub fn decode(payload: &'a [u8]) -> Result<StatusQuery<'a>, WireError> {
        let mut fields = Fields::new(payload);
        let length_bytes = fields.u64()?;
        let contexts = fields.rest();
        if contexts.len().is_multiple_of(4) {
            Ok(StatusQuery { length_bytes, contexts })
        } else {
            Err(WireError::Truncated)
        }
    }

    /// The numbers of the contexts, in the client's order.
    pub fn contexts(&self) -> impl Iterator<Item = u32> + use<'a> {
        let mut fields = Fields::new(self.contexts);
        std::iter::from_fn(move || fields.u32().ok())
    }

    /// Client: appends the payload.
    pub fn encode(out: &mut Vec<u8>, length_bytes: u64, contexts: &[u32]) {
        out.extend_from_slice(&length_bytes.to_be_bytes());
        for context in contexts {
            out.extend_from_slice(&context.to_be_bytes());
        }
    }
}

/// A header with the fixed part of its payload, built without allocating.
#[derive(Clone, Copy)]
pub struct HeaderBytes {
    bytes: [u8; HeaderBytes::CAPACITY],
    len: u8,
}

impl HeaderBytes {
    /// Most bytes that one can hold: an extended header and the longest fixed payload fit well.
    pub const CAPACITY: usize = 64;

    /// Nothing yet.
    #[must_use]
    pub fn new() -> HeaderBytes {
        HeaderBytes { bytes: [0; HeaderBytes::CAPACITY], len: 0 }
    }

    /// Appends a field.
    ///
    /// # Panics
    /// If there is no room: only fields of fixed size are put here.
    pub fn push(&mut self, field: &[u8]) {
        let start = usize::from(self.len);
        let end = start + field.len();
        self.bytes[start..end].copy_from_slice(field);
        self.len = u8::try_from(end).expect("at most the capacity");
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    fn push_length(&mut self, style: HeaderStyle, length_bytes: u64) {
        if style == HeaderStyle::Extended {
            self.push(&length_bytes.to_be_bytes());
        } else {
            let narrow = u32::try_from(length_bytes).expect("compact headers hold 32-bit lengths");
            self.push(&narrow.to_be_bytes());
        }
    }
}

impl Default for HeaderBytes {
    fn default() -> HeaderBytes {
        HeaderBytes::new()
    }
}

impl AsRef<[u8]> for HeaderBytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl std::fmt::Debug for HeaderBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeaderBytes({:02x?})", self.as_slice())
    }
}

#[cfg(test)]
mod tests;
