//! What Berth is tested with: a simulator that runs the data path on a virtual clock, network and disk, and
//! checks of the source tree itself.

pub mod harness;
pub mod model;
pub mod power_cut_fs;
pub mod sim;
pub mod tidy;

/// A byte or element count as an index. The simulator's disks and volumes fit in memory.
///
/// # Panics
/// If it does not fit.
#[must_use]
pub fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("fits in memory")
}

/// A length as a field of the wire or of a memory range.
///
/// # Panics
/// If it does not fit.
#[must_use]
pub fn to_u32(value: usize) -> u32 {
    u32::try_from(value).expect("below 4 GiB")
}
