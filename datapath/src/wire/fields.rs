//! Reads a message field by field. Every length comes from outside, so none is trusted: a field that reaches
//! past the end is an error, and no sum is formed that could wrap.

use super::WireError;

/// The fields of a message that have not been read yet. Numbers are in network byte order.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Starts at the first byte of `message`.
    #[must_use]
    pub fn new(message: &'a [u8]) -> Fields<'a> {
        Fields { rest: message }
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (field, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(field)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (field, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(*field)
    }

    /// The next two bytes as a number.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes as a number.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes as a number.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of four bytes, and as many bytes as it says.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if there are fewer.
    pub fn counted_bytes(&mut self) -> Result<&'a [u8], WireError> {
        let len = usize::try_from(self.u32()?).map_err(|_| WireError::Truncated)?;
        self.bytes(len)
    }

    /// Everything that has not been read.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Makes sure that everything has been read.
    ///
    /// # Errors
    /// [`WireError::Trailing`] if bytes are left.
    pub fn finish(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Trailing) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Fields, WireError};

    #[test]
    fn reads_numbers_in_network_order() {
        let mut fields = Fields::new(&[0x12, 0x34, 0, 0, 0, 2, 0xaa, 0xbb, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(fields.u16(), Ok(0x1234));
        assert_eq!(fields.counted_bytes(), Ok(&[0xaa, 0xbb][..]));
        assert_eq!(fields.u64(), Ok(0x0102_0304_0506_0708));
        assert_eq!(fields.finish(), Ok(()));
    }

    #[test]
    fn a_length_past_the_end_is_refused_and_consumes_nothing_more() {
        let mut fields = Fields::new(&[0xff, 0xff, 0xff, 0xff, 9]);
        assert_eq!(fields.counted_bytes(), Err(WireError::Truncated));
        assert_eq!(fields.rest(), &[9]);
        assert_eq!(fields.u16(), Err(WireError::Truncated));
        assert_eq!(fields.finish(), Err(WireError::Trailing));
    }
}
