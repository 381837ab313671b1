//! The control plane and the tools of the `berth` binary.

pub mod bench;
