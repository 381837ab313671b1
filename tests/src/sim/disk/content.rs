//! What a write carries. The zeroes that a store writes ahead of use are most of what it writes; they are not kept.

use std::borrow::Cow;

use super::image::{Image, PAGE_BYTES};

const ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

#[derive(Debug)]
pub(super) enum Content {
    Bytes(Vec<u8>),
    Zeroes(usize),
}

impl Content {
    /// A copy of `source`, in one of the `spare` buffers.
    pub(super) fn of(source: &[u8], spare: &mut Vec<Vec<u8>>) -> Content {
        if source.chunks(PAGE_BYTES).all(|part| part == &ZEROES[..part.len()]) {
            return Content::Zeroes(source.len());
        }
        let mut bytes = spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(source);
        Content::Bytes(bytes)
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Content::Bytes(bytes) => bytes.len(),
            Content::Zeroes(len) => *len,
        }
    }

    pub(super) fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Content::Bytes(bytes) => Cow::Borrowed(bytes),
            Content::Zeroes(len) => Cow::Owned(vec![0; *len]),
        }
    }

    pub(super) fn write_to(&self, image: &mut Image, offset_bytes: u64) {
        match self {
            Content::Bytes(bytes) => image.write(offset_bytes, bytes),
            Content::Zeroes(len) => image.write_zeroes(offset_bytes, *len),
        }
    }

    /// Gives its buffer back.
    pub(super) fn let_go(self, spare: &mut Vec<Vec<u8>>) {
        if let Content::Bytes(bytes) = self {
            spare.push(bytes);
        }
    }
}
