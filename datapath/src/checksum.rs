//! CRC32C (Castagnoli), the checksum of every block, descriptor and message: the polynomial of iSCSI and
//! NVMe/TCP digests, computed with the processor's carry-less multiply where it has one.

use crc_fast::CrcAlgorithm;

/// The CRC32C of `bytes`. `crc32c(b"123456789")` is `0xe306_9283` (RFC 3720, appendix B.4 uses the same code).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    u32::try_from(crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes)).expect("a CRC of 32 bits")
}

#[cfg(test)]
mod tests {
    use super::crc32c;

    #[test]
    fn check_values_of_the_rfc() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }
}
