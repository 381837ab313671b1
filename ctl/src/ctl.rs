//! The flags of `berth ctl`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use berth::service::server::{self, CtlConfig};
use clap::Args;

/// Keep the records of all volumes: who has a replica, who leads. Nodes and commands connect to it, and programs by REST:
/// http://ADDR:PORT/v1/openapi.json
#[derive(Debug, Args)]
pub(crate) struct CtlArguments {
    /// Where the records are kept: redb:PATH, a file that is made if there is none.
    #[arg(long, value_name = "redb:PATH", default_value = "redb:/var/lib/berth/ctl.redb")]
    store: StorePlace,

    /// Where nodes and commands connect.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:7440")]
    listen: String,

    /// Listen on an address that other machines can connect to, without authentication.
    #[arg(long)]
    insecure: bool,

    /// When a node has not been connected for so many seconds, other nodes get the replicas that it had. 0: never.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    replace_after: u64,

    /// Place volumes until their sizes come to so many percent of what their nodes can hold. More than 100: their blocks are
    /// taken when they are first written, and all of them together may not fit.
    #[arg(long, value_name = "PERCENT", default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    overcommit: u32,

    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    exit_with_parent: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct StorePlace(PathBuf);

impl FromStr for StorePlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("redb:") {
            Some(path) if !path.is_empty() => Ok(StorePlace(path.into())),
            _ => Err("write redb:PATH, as in redb:/var/lib/berth/ctl.redb".to_owned()),
        }
    }
}

/// Runs until it is told to stop.
pub(crate) fn run(arguments: CtlArguments) -> Result<(), String> {
    let CtlArguments { store, listen, insecure, replace_after, overcommit, exit_with_parent } = arguments;
    let replace_after = (replace_after > 0).then(|| Duration::from_secs(replace_after));
    if exit_with_parent {
        end_with_parent()?;
    }
    server::run(&CtlConfig {
        store: store.0,
        listen,
        insecure,
        replace_after,
        overcommit_percent: overcommit,
    })
    .map_err(|error| error.to_string())
}

/// Has the kernel ask this process to end when the one that started it ends, however that comes.
pub(crate) fn end_with_parent() -> Result<(), String> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM).map_err(|error| error.to_string())
}
