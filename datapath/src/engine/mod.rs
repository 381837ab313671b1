//! Floor 3: joins sessions and stores into a shard that takes one event at a time.

pub mod ports;
