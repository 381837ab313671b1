//! What tests Berth as a whole.

pub mod harness;
pub mod power_cut_fs;
