//! What measures Berth: micro-benchmarks, the yardsticks and the ratio runs against other servers.

pub mod echo;
pub mod fio;
pub mod machine;
pub mod process;
