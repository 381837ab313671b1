//! Berth's data path: everything between a client's bytes and a disk's blocks.
//!
//! The library is built in floors, and a floor uses only the ones below it (a test fails on an upward `use`):
//!
//! | floor | modules | what lives there |
//! |---|---|---|
//! | 0 | [`units`], [`limits`], [`request`], [`record`], [`block_set`], [`checksum`], [`memory`] | the words of the domain |
//! | 1 | [`wire`] | byte layouts of the protocols, as pure encoders and decoders |
//! | 2 | [`session`], [`store`], [`replica`] | state machines; they do not know each other |
//! | 3 | [`engine`] | joins the machines into a shard, one event at a time |
//! | 4 | [`reactor`] | io_uring, files and sockets; the only floor with `unsafe` code |
//!
//! Floors 0 to 3 read no clock, no socket, no file and no thread: a driver hands in facts and the current
//! moment and carries out the effects that come back. There are two drivers, the [`reactor`] and the
//! simulator of the `system-tests` package, and both run the same machines.

pub mod block_set;
pub mod checksum;
pub mod engine;
pub mod limits;
pub mod memory;
pub mod reactor;
pub mod record;
pub mod replica;
pub mod request;
pub mod session;
pub mod store;
pub mod units;
pub mod wire;
