//! The node process around the data path: what it listens on, how it is configured, how it stops, what it tells.

pub mod control;
pub mod listener;
pub mod metrics;
pub mod metrics_page;
pub mod node;
pub mod node_name;
pub mod pool_check;
pub mod pool_tools;
pub mod pools;
pub mod random;
pub mod serve;
pub mod shards;
pub mod size;
pub mod stop;
pub mod uri;
pub mod volume_name;

pub use serve::{ServeConfig, ServeError, serve};
