//! Floor 2: the log-structured store of one pool, lane by lane.

pub mod batch;
pub mod bugs;
pub mod check;
pub mod checkpoint_body;
mod fields;
pub mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod lane;
pub mod layout;
pub mod map;
pub mod offline;
pub mod recovery;
pub mod root;
pub mod segment;
pub mod slab;
