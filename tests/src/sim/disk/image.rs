//! The bytes of a virtual disk, stored page by page and only where something was written.

use crate::to_usize;

/// Bytes in a page of an image.
pub(super) const PAGE_BYTES: usize = 4096;

#[derive(Clone, Debug)]
enum Page {
    /// Reads as zeroes.
    NeverWritten,
    /// Written with zeroes: most of what a store writes ahead of use.
    Zeroes,
    Bytes(Box<[u8; PAGE_BYTES]>),
}

/// Sparse bytes. What was never written reads as zeroes.
#[derive(Clone, Debug)]
pub struct Image {
    pages: Vec<Page>,
}

impl Image {
    /// An image of `len_bytes` zeroes.
    #[must_use]
    pub fn new(len_bytes: u64) -> Image {
        assert!(len_bytes.is_multiple_of(PAGE_BYTES as u64), "{len_bytes} bytes are not whole pages");
        Image { pages: vec![Page::NeverWritten; to_usize(len_bytes) / PAGE_BYTES] }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        (self.pages.len() * PAGE_BYTES) as u64
    }

    /// Was the page with this number ever written?
    #[must_use]
    pub fn is_written(&self, page: usize) -> bool {
        !matches!(self.pages[page], Page::NeverWritten)
    }

    /// Copies bytes out of the image.
    ///
    /// # Panics
    /// If the range leaves the image.
    pub fn read(&self, offset_bytes: u64, target: &mut [u8]) {
        for (page, inner, part) in parts(offset_bytes, target.len()) {
            let target = &mut target[part];
            match &self.pages[page] {
                Page::Bytes(bytes) => target.copy_from_slice(&bytes[inner..inner + target.len()]),
                Page::NeverWritten | Page::Zeroes => target.fill(0),
            }
        }
    }

    /// Copies bytes into the image.
    ///
    /// # Panics
    /// If the range leaves the image.
    pub fn write(&mut self, offset_bytes: u64, source: &[u8]) {
        for (page, inner, part) in parts(offset_bytes, source.len()) {
            let source = &source[part];
            match (&mut self.pages[page], <&[u8; PAGE_BYTES]>::try_from(source)) {
                (Page::Bytes(bytes), _) => bytes[inner..inner + source.len()].copy_from_slice(source),
                (page, Ok(whole)) => *page = Page::Bytes(Box::new(*whole)),
                (page, Err(_)) => {
                    let mut bytes = Box::new([0; PAGE_BYTES]);
                    bytes[inner..inner + source.len()].copy_from_slice(source);
                    *page = Page::Bytes(bytes);
                }
            }
        }
    }

    /// Fills a range with zeroes.
    ///
    /// # Panics
    /// If the range leaves the image.
    pub fn write_zeroes(&mut self, offset_bytes: u64, len: usize) {
        for (page, inner, part) in parts(offset_bytes, len) {
            match &mut self.pages[page] {
                Page::Bytes(bytes) if part.len() < PAGE_BYTES => bytes[inner..inner + part.len()].fill(0),
                page => *page = Page::Zeroes,
            }
        }
    }

    /// Inverts one bit.
    pub fn flip(&mut self, offset_bytes: u64, bit: u32) {
        let mut byte = [0];
        self.read(offset_bytes, &mut byte);
        self.write(offset_bytes, &[byte[0] ^ (1 << bit)]);
    }

    /// Makes the pages that a range touches equal to those of `other`.
    pub fn copy_pages_from(&mut self, other: &Image, offset_bytes: u64, len: usize) {
        for (page, _, _) in parts(offset_bytes, len) {
            match (&mut self.pages[page], &other.pages[page]) {
                (Page::Bytes(mine), Page::Bytes(theirs)) => mine.copy_from_slice(&theirs[..]),
                (mine, theirs) => mine.clone_from(theirs),
            }
        }
    }
}

/// Cuts a byte range at page borders: page number, first byte within the page, positions within the range.
fn parts(offset_bytes: u64, len: usize) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let start = to_usize(offset_bytes);
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let inner = (start + done) % PAGE_BYTES;
        let count = (PAGE_BYTES - inner).min(len - done);
        let part = ((start + done) / PAGE_BYTES, inner, done..done + count);
        done += count;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::{Image, PAGE_BYTES};

    #[test]
    fn bytes_come_back_and_the_rest_is_zero() {
        let mut image = Image::new(1 << 16);
        image.write(4000, &[9; 5000]);
        let mut read = vec![1; 1 << 16];
        image.read(0, &mut read);
        assert!(
            read.iter().enumerate().all(|(at, byte)| *byte == if (4000..9000).contains(&at) { 9 } else { 0 })
        );
        assert!(image.is_written(0) && image.is_written(2) && !image.is_written(3));
    }

    #[test]
    fn zeroes_take_the_place_of_bytes() {
        let mut image = Image::new(1 << 16);
        image.write(0, &[9; 3 * PAGE_BYTES]);
        image.write_zeroes(4000, 5000);
        image.write_zeroes(40_000, 10);
        let mut read = vec![1; 1 << 16];
        image.read(0, &mut read);
        let is_nine = |at: usize| at < 4000 || (9000..3 * PAGE_BYTES).contains(&at);
        assert!(read.iter().enumerate().all(|(at, byte)| *byte == if is_nine(at) { 9 } else { 0 }));
        assert!(image.is_written(1) && image.is_written(9) && !image.is_written(10));
        image.flip(5000, 3);
        image.read(5000, &mut read[..1]);
        assert_eq!(read[0], 8);
    }

    #[test]
    fn whole_pages_are_copied_back() {
        let (mut changed, old) = (Image::new(1 << 16), Image::new(1 << 16));
        changed.write(4000, &[9; 5000]);
        changed.copy_pages_from(&old, 4095, 2);
        let mut read = [1; 3];
        changed.read(8191, &mut read);
        assert_eq!(read, [0, 9, 9], "page 1 went back, page 2 was not concerned");
    }
}
