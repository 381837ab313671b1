//! A deterministic world for the data path: virtual time, network and disk, clients that check every answer.
//!
//! ```text
//!   world    lives, cuts, kills, recoveries; what is tolerated when            one seed = one world
//!   ├─ client  workload  oracle      what is asked, and what may be answered
//!   └─ driver                        the second driver of engine::ports (the first is the reactor)
//!      ├─ disk   network   memory    unkind versions of what the kernel offers
//!      └─ clock  random  trace
//! ```
//!
//! A seed decides everything. `berth` puts the real shard into this world; `canary` holds a small block server with bugs on request, which proves that the
//! alarms ring. `cluster` joins several shards by a network and a record store.

pub mod berth;
pub mod bytes;
pub mod canary;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod disk;
pub mod doubts;
pub mod driver;
pub mod memory;
pub mod network;
pub mod oracle;
pub mod random;
pub mod runner;
pub mod scenario;
pub mod subject;
pub mod trace;
pub mod workload;
pub mod world;
