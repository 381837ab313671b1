//! Floor 2: one client's connection as a state machine, bytes in, requests out, replies back to bytes.
//!
//! A session holds no requests and no payload: what is being worked on belongs to the engine, and payload goes
//! from the connection to its place in memory without passing through here.

pub mod nbd;
