//! The few bytes of a header that arrived without the rest of it.

/// Bytes that the longest header takes.
const CAPACITY: usize = 32;

/// Collects one fixed-size header at a time over any cuts of the stream.
#[derive(Debug, Default)]
pub(super) struct Carry {
    bytes: [u8; CAPACITY],
    len: u8,
}

impl Carry {
    /// The next `N` bytes of the stream, removed from the start of `input`. `None` if `input` ends before; then
    /// all of it was taken, and the caller asks for the same `N` when more has come.
    pub(super) fn take<const N: usize>(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        const { assert!(N <= CAPACITY) };
        if self.len == 0
            && let Some((header, rest)) = input.split_first_chunk::<N>()
        {
            *input = rest;
            return Some(*header);
        }
        let have = usize::from(self.len);
        assert!(have < N, "the rest of one header was asked for as another");
        let (part, rest) = input.split_at(input.len().min(N - have));
        *input = rest;
        let end = have + part.len();
        self.bytes[have..end].copy_from_slice(part);
        if end < N {
            self.len = u8::try_from(end).expect("below the capacity");
            return None;
        }
        self.len = 0;
        self.bytes.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::Carry;

    #[test]
    fn any_cut_gives_the_same_headers() {
        let stream = b"abcdefghijkl";
        for cut in 0..=stream.len() {
            let mut carry = Carry::default();
            let mut headers = Vec::new();
            for mut part in [&stream[..cut], &stream[cut..]] {
                while let Some(header) = carry.take::<4>(&mut part) {
                    headers.push(header);
                }
                assert!(part.is_empty());
            }
            assert_eq!(headers, [*b"abcd", *b"efgh", *b"ijkl"]);
        }
    }
}
