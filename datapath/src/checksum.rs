//! CRC32C (Castagnoli), the checksum of every block, descriptor and message: the polynomial of iSCSI and
//! NVMe/TCP digests, computed with the processor's carry-less multiply where it has one.

use crc_fast::{CrcAlgorithm, Digest};

/// The CRC32C of `bytes`. `crc32c(b"123456789")` is `0xe306_9283` (RFC 3720, appendix B.4 uses the same code).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    u32::try_from(crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes)).expect("a CRC of 32 bits")
}

/// The CRC32C of several slices as if they were one.
#[must_use]
pub fn crc32c_of_parts(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    parts.iter().for_each(|part| digest.update(part));
    u32::try_from(digest.finalize()).expect("a CRC of 32 bits")
}

#[cfg(test)]
mod tests {
    use super::{crc32c, crc32c_of_parts};

    #[test]
    fn parts_add_up() {
        assert_eq!(crc32c_of_parts(&[b"1234", b"", b"56789"]), crc32c(b"123456789"));
    }

    #[test]
    fn check_values_of_the_rfc() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }
}
