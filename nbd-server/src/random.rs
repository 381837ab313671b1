//! Numbers that nobody can guess and no other process draws too.

use std::io::{self, Read};

/// 16 random bytes of the kernel.
///
/// # Errors
/// If it gives none.
pub fn random_bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A random number, such as one that tells a process from those before it.
///
/// # Errors
/// If the kernel gives none.
pub fn random_number() -> io::Result<u64> {
    let bytes = random_bytes()?;
    Ok(u64::from_le_bytes(*bytes.first_chunk().expect("16 bytes")))
}
