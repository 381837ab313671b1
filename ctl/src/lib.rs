//! The control plane and the tools of the `berth` binary.

pub mod api;
pub mod bench;
pub mod heal;
pub mod placement;
pub mod record_store;
pub mod report;
pub mod service;
pub mod tending;
