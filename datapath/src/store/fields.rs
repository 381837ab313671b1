//! Little-endian numbers at fixed places of a block.

/// The two bytes at `at`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

/// The four bytes at `at`.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The eight bytes at `at`.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Puts `field` at `at`.
pub(super) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The CRC32C of `bytes` as if the four bytes at `at` were zero: how a block carries its own checksum.
pub(super) fn crc32c_without(bytes: &mut [u8], at: usize) -> u32 {
    let kept = u32_at(bytes, at);
    put(bytes, at, &[0; 4]);
    let crc = crate::checksum::crc32c(bytes);
    put(bytes, at, &kept.to_le_bytes());
    crc
}
