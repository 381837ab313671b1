//! Floor 3: joins sessions and stores into a shard that takes one event at a time.

mod device_sync;
mod export_table;
mod output;
mod pool_home;
pub mod pool_space;
pub mod ports;
mod region_locks;
pub mod report;
pub mod shard;
pub mod shard_message;
