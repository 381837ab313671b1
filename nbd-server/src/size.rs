//! Sizes as people write them: `4096`, `512M`, `20G`. Factors are powers of 1024.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    /// Bytes.
    pub bytes: u64,
}

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error("{0:?} is not a size; write bytes, or a whole number with K, M, G, T or P (1K = 1024 bytes)")]
    Malformed(String),
    /// More than 64 bits of bytes.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

const UNITS: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let upper = text.to_ascii_uppercase();
        // 20G, 20GiB; not 20GB, which means another number to many.
        let plain = upper.strip_suffix("IB").unwrap_or(&upper);
        let unit = plain.chars().last().and_then(|last| UNITS.into_iter().find(|(name, _)| *name == last));
        let (digits, shift) = match unit {
            Some((_, shift)) => (&plain[..plain.len() - 1], shift),
            None if plain.len() == upper.len() => (plain, 0),
            None => return Err(SizeError::Malformed(text.to_owned())),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(SizeError::Malformed(text.to_owned()));
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let count: u64 = digits.parse().map_err(|_| too_large())?;
        let bytes = count.checked_mul(1 << shift).ok_or_else(too_large)?;
        Ok(Size { bytes })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS
            .into_iter()
            .rev()
            .find(|(_, shift)| self.bytes >> shift > 0 && self.bytes.is_multiple_of(1 << shift));
        match unit {
            Some((name, shift)) => write!(f, "{}{name}", self.bytes >> shift),
            None => write!(f, "{}", self.bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Size, SizeError};

    #[test]
    fn factors_are_powers_of_1024() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("20G", 20 << 30),
            ("3TiB", 3 << 40),
            ("1P", 1 << 50),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(Size { bytes }), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "+1", "1.5G", "20GB", "1 G", "12X", "iB", "1iB", "٣"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Malformed(text.to_owned())), "{text}");
        }
        for text in ["18446744073709551616", "16384P"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn prints_what_it_parses() {
        for text in ["20G", "1537K", "4097", "0", "1P"] {
            assert_eq!(text.parse::<Size>().expect("a size").to_string(), text);
        }
    }
}
