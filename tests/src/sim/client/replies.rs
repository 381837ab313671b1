//! The client's side of transmission: matching answers to requests.

use datapath::units::Moment;

use super::{Client, EINVAL, ENOSPC, Expect, Headers, Model, Pending, Tolerance};
use crate::sim::bytes::Fields;
use crate::sim::oracle::{Answer, Oracle};
use crate::sim::trace;
use crate::sim::workload::AskKind;
use crate::to_usize;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
const FLAG_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_STATUS_EXTENDED: u16 = 6;
const CHUNK_ERROR: u16 = 0x8001;
const CHUNK_ERROR_OFFSET: u16 = 0x8002;
const STATUS_ZERO: u64 = 2;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;
/// Reads with DF must be served in one piece up to this length.
const ONE_PIECE_BYTES_MIN: u64 = 64 << 10;

/// The header of a chunk, in either form.
struct Chunk {
    flags: u16,
    kind: u16,
    cookie: u64,
    /// Only extended replies repeat it.
    offset_bytes: Option<u64>,
    length: usize,
}

impl Client {
    pub(super) fn handle_reply(
        &mut self,
        now: Moment,
        bytes: &[u8],
        oracle: &mut Oracle,
        tolerance: Tolerance,
    ) -> Option<usize> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        match (magic, self.headers) {
            (SIMPLE_MAGIC, Headers::Simple | Headers::Structured) => {
                self.handle_simple(now, fields, bytes.len(), oracle, tolerance)
            }
            (STRUCTURED_MAGIC, Headers::Structured) => {
                let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
                let length = fields.length()?;
                let chunk = Chunk { flags, kind, cookie, offset_bytes: None, length };
                self.handle_chunk(now, &chunk, fields.bytes(length)?, oracle, tolerance);
                Some(20 + length)
            }
            (EXTENDED_MAGIC, Headers::Extended) => {
                let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
                let (offset, length) = (fields.u64()?, to_usize(fields.u64()?));
                let chunk = Chunk { flags, kind, cookie, offset_bytes: Some(offset), length };
                self.handle_chunk(now, &chunk, fields.bytes(length)?, oracle, tolerance);
                Some(32 + length)
            }
            _ => panic!("client {}: reply magic {magic:#x} with {:?} headers", self.id, self.headers),
        }
    }

    fn handle_simple(
        &mut self,
        now: Moment,
        mut fields: Fields<'_>,
        available: usize,
        oracle: &mut Oracle,
        tolerance: Tolerance,
    ) -> Option<usize> {
        let (error, cookie) = (fields.u32()?, fields.u64()?);
        let position = self.position(cookie);
        let pending = &mut self.pending[position];
        let is_read = matches!(pending.ask.kind, AskKind::Read { .. });
        let chunks_only = is_read || matches!(pending.ask.kind, AskKind::Status { .. });
        assert!(
            self.headers == Headers::Simple || !chunks_only,
            "client {}: a simple reply to {:?} although structured replies are on",
            self.id,
            pending.ask
        );
        let mut used = 16;
        if error == 0 && is_read {
            let length = to_usize(pending.ask.length_bytes);
            if available < used + length {
                return None;
            }
            let data = fields.bytes(length)?;
            pending.cover(0, length, |target| target.copy_from_slice(data));
            used += length;
        }
        pending.error = error;
        self.finish(now, position, oracle, tolerance);
        Some(used)
    }

    fn handle_chunk(
        &mut self,
        now: Moment,
        chunk: &Chunk,
        data: &[u8],
        oracle: &mut Oracle,
        tolerance: Tolerance,
    ) {
        let position = self.position(chunk.cookie);
        let done = chunk.flags & FLAG_DONE != 0;
        assert_eq!(chunk.flags & !FLAG_DONE, 0, "unknown chunk flags");
        let pending = &mut self.pending[position];
        if let Some(offset) = chunk.offset_bytes {
            assert_eq!(offset, pending.ask.offset_bytes, "an extended reply repeats the request's offset");
        }
        match chunk.kind {
            CHUNK_NONE => assert!(done && chunk.length == 0, "an empty chunk ends a reply"),
            CHUNK_DATA | CHUNK_HOLE => pending.handle_content(chunk, data).expect("a complete chunk"),
            CHUNK_STATUS | CHUNK_STATUS_EXTENDED => {
                let extended = chunk.kind == CHUNK_STATUS_EXTENDED;
                assert_eq!(extended, self.headers == Headers::Extended, "the wrong form of status");
                let context = self.status_context;
                pending.handle_status(extended, context, data, oracle).expect("a complete status chunk");
            }
            CHUNK_ERROR | CHUNK_ERROR_OFFSET => {
                let error = Fields(data).u32().expect("an error chunk has an error");
                assert_ne!(error, 0, "an error chunk without an error");
                let text = usize::from(u16::from_be_bytes([data[4], data[5]]));
                let tail = if chunk.kind == CHUNK_ERROR_OFFSET { 8 } else { 0 };
                assert_eq!(data.len(), 6 + text + tail, "length of an error chunk");
                pending.error = if pending.error == 0 { error } else { pending.error };
            }
            kind => panic!("client {}: chunk of type {kind:#x} for {:?}", self.id, pending.ask),
        }
        if done {
            self.finish(now, position, oracle, tolerance);
        }
    }

    fn position(&self, cookie: u64) -> usize {
        let position = self.pending.iter().position(|pending| pending.cookie == cookie);
        position.unwrap_or_else(|| {
            panic!("client {}: an answer to {cookie:#x}, which was answered before or never asked", self.id)
        })
    }

    /// The last part of an answer is here.
    fn finish(&mut self, now: Moment, position: usize, oracle: &mut Oracle, tolerance: Tolerance) {
        let pending = self.pending.swap_remove(position);
        trace::note(now, "client has answer: cookie, error", [pending.cookie, u64::from(pending.error), 0]);
        self.counts.answers += 1;
        self.judge(&pending, tolerance);
        let error = pending.error;
        self.counts.errors += u64::from(error != 0);
        match pending.model {
            Model::Read { start, bytes, covered, pieces } => {
                if error == 0 {
                    let total: usize = covered.iter().map(|(from, to)| to - from).sum();
                    assert_eq!(total, bytes.len(), "client {}: a read was not answered in full", self.id);
                    let one_piece = matches!(pending.ask.kind, AskKind::Read { one_piece: true });
                    assert!(!one_piece || pieces == 1, "a read with DF came in {pieces} pieces");
                    oracle.finish_read(start, pending.ask.offset_bytes, &bytes);
                    self.counts.read_bytes += bytes.len() as u64;
                } else {
                    oracle.abandon_read(start);
                }
                self.spare.push(bytes);
            }
            Model::Status { start, answered } => {
                assert!(error != 0 || answered, "status was answered without a status");
                oracle.abandon_read(start);
            }
            Model::Change(id) => {
                let answer = match error {
                    0 => Answer::Done,
                    EIO | ESHUTDOWN => Answer::Failed,
                    _ => Answer::Refused,
                };
                oracle.finish_change(id, answer);
                if error == 0 && pending.ask.kind == AskKind::Write {
                    self.counts.written_bytes += pending.ask.length_bytes;
                }
            }
            Model::Flush(start) if error == 0 => oracle.finish_flush(start),
            Model::Flush(_) | Model::Nothing => {}
        }
    }

    /// Was this error, or its absence, deserved?
    fn judge(&self, pending: &Pending, tolerance: Tolerance) {
        let (error, ask) = (pending.error, pending.ask);
        let changes = matches!(ask.kind, AskKind::Write | AskKind::Trim | AskKind::Zeroes { .. });
        let excused = match error {
            EIO => tolerance.io,
            EPERM => tolerance.io && changes,
            ENOSPC => tolerance.no_space && changes,
            ESHUTDOWN => tolerance.shutting_down,
            ENOTSUP => matches!(ask.kind, AskKind::Zeroes { only_if_fast: true, .. }),
            EOVERFLOW => {
                matches!(ask.kind, AskKind::Read { one_piece: true })
                    && ask.length_bytes > ONE_PIECE_BYTES_MIN
            }
            _ => false,
        };
        let good = match pending.expect {
            Expect::Success => error == 0,
            Expect::Error(expected) => error == expected,
            Expect::Either => error == 0 || error == EINVAL,
        };
        assert!(
            good || excused,
            "client {}: {ask:?} expects {:?} and was answered with error {error}, and {tolerance:?}",
            self.id,
            pending.expect
        );
    }
}

impl Pending {
    fn handle_content(&mut self, chunk: &Chunk, data: &[u8]) -> Option<()> {
        let mut fields = Fields(data);
        let offset = fields.u64()?;
        let from =
            offset.checked_sub(self.ask.offset_bytes).expect("content before the range that was asked for");
        let from = to_usize(from);
        if chunk.kind == CHUNK_HOLE {
            let length = fields.length()?;
            assert!(length > 0 && fields.0.is_empty(), "form of a hole");
            self.cover(from, length, |target| target.fill(0));
        } else {
            assert!(!fields.0.is_empty(), "an empty data chunk");
            self.cover(from, fields.0.len(), |target| target.copy_from_slice(fields.0));
        }
        Some(())
    }

    /// Content for a part of the range arrived.
    fn cover(&mut self, from: usize, length: usize, fill: impl FnOnce(&mut [u8])) {
        let Model::Read { bytes, covered, pieces, .. } = &mut self.model else {
            // Empty or refused reads have no content but the empty one.
            assert_eq!(length, 0, "content for {:?}", self.ask);
            return;
        };
        let to = from + length;
        assert!(to <= bytes.len(), "content past the range that was asked for");
        let overlap = covered.iter().any(|(start, end)| from < *end && *start < to);
        assert!(!overlap, "content for the same bytes twice");
        covered.push((from, to));
        *pieces += 1;
        fill(&mut bytes[from..to]);
    }

    fn handle_status(
        &mut self,
        extended: bool,
        context: Option<u32>,
        data: &[u8],
        oracle: &mut Oracle,
    ) -> Option<()> {
        let AskKind::Status { one_extent } = self.ask.kind else { panic!("status for {:?}", self.ask) };
        let mut fields = Fields(data);
        assert_eq!(fields.u32(), context, "status of a context that was not negotiated");
        let announced = if extended { Some(fields.length()?) } else { None };
        let (mut at, mut count) = (0, 0);
        while !fields.0.is_empty() {
            assert!(at < self.ask.length_bytes, "extents after the end of the range");
            let (length, flags) = if extended {
                (fields.u64()?, fields.u64()?)
            } else {
                (u64::from(fields.u32()?), u64::from(fields.u32()?))
            };
            assert!(length > 0, "an empty extent");
            let inside = length.min(self.ask.length_bytes - at);
            assert!(!one_extent || inside == length, "REQ_ONE was answered with more than was asked for");
            if let (Model::Status { start, .. }, true) = (&self.model, flags & STATUS_ZERO != 0) {
                oracle.check_zeroes(*start, self.ask.offset_bytes + at, inside);
            }
            at += length;
            count += 1;
        }
        assert!(count > 0 && (!one_extent || count == 1), "{count} extents");
        assert!(
            announced.is_none_or(|announced| announced == count),
            "{announced:?} extents announced, {count} came"
        );
        if let Model::Status { answered, .. } = &mut self.model {
            assert!(!std::mem::replace(answered, true), "two status chunks for one context");
        }
        Some(())
    }
}
