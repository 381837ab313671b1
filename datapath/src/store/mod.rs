//! Floor 2: the log-structured store of one pool, lane by lane.

pub mod batch;
pub mod checkpoint_body;
mod fields;
pub mod layout;
pub mod map;
pub mod root;
