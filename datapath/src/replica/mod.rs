//! Floor 2: the replication of one volume, as machines that know no disk and no network.
//!
//! ```text
//!                    record store
//!                        ▲ │ compare-and-swap, news
//!                        │ ▼
//!   requests ──▶ head ──────────▶ member ──▶ log        on each node with a replica; the head's own replica is a
//!                  ▲   changes  │                       member like the others
//!                  └────────────┘ acknowledgements
//! ```
//!
//! The head numbers every change and sends it to all members; a change is committed when every replica in sync has it on
//! stable media. Views (who leads, who is in sync) change by compare-and-swap of the volume's
//! [`Record`](crate::record::Record); PacificA (Lin et al., 2008) is where the idea is from.

pub mod bugs;
pub mod check;
mod fill;
pub mod head;
pub mod member;
pub mod peer_reads;
#[cfg(test)]
mod tests;

/// How long a lease lasts at the head, counted from when it asked.
pub const LEASE_NS: u64 = 3_000_000_000;
/// Added at the member and taken off at the head: what two clocks may differ by in the length of a lease.
pub const LEASE_DRIFT_NS: u64 = 150_000_000;
/// The head asks for its leases anew after this time.
pub const LEASE_EVERY_NS: u64 = 1_000_000_000;
