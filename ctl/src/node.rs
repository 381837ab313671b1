//! The flags of `berth node`, and how its results are printed.

mod drain;

use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::time::Duration;

use berth::report::NodeReport;
use clap::{Args, Subcommand};
use nbd_server::control::convert::label;
use nbd_server::control::proto::ListNodesRequest;
use nbd_server::listener::ListenAddress;
use nbd_server::node::{NodeSettings, run_node};
use nbd_server::node_name::NodeName;
use nbd_server::serve::CpuList;
use nbd_server::size::Size;

use crate::remote::{RemoteArguments, answer, columns, print, with_client};

/// Run a node of a cluster, or look at the nodes that there are.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NodeArguments {
    #[command(subcommand)]
    command: Option<NodeCommand>,

    #[command(flatten)]
    run: Option<RunArguments>,

    #[command(flatten)]
    remote: RemoteArguments,
}

/// The flags of a node.
#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The node's name: 1 to 63 of a-z, 0-9, '.' and '-'. It keeps its place in the cluster by it.
    #[arg(long, required = true, value_name = "NAME")]
    name: NodeName,

    /// File or block device that holds its replicas.
    #[arg(long, required = true, value_name = "FILE")]
    pool: PathBuf,

    /// Make the pool with this size if it does not exist, or grow it to this size.
    #[arg(long, value_name = "SIZE")]
    pool_size: Option<Size>,

    /// Where NBD clients connect: ADDR:PORT or unix:PATH. May be given several times.
    #[arg(long, value_name = "ADDR|unix:PATH", default_value = "127.0.0.1:10809")]
    nbd: Vec<ListenAddress>,

    /// Where other nodes connect.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:7441")]
    peer: ListenAddress,

    /// Host name or address under which others reach this node [default: that of --peer].
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,

    /// What fails together with it: a data centre, an availability zone. Replicas are spread over zones.
    #[arg(long, value_name = "ZONE", value_parser = parse_label)]
    zone: Option<String>,

    /// What fails together with it within the zone. Replicas are spread over racks.
    #[arg(long, value_name = "RACK", value_parser = parse_label)]
    rack: Option<String>,

    /// KEY=VALUE, for whoever chooses nodes by it. May be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_pair)]
    labels: Vec<(String, String)>,

    /// The processor to use; a node runs one thread [default: the first that the process may use].
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<CpuList>,

    /// Memory for the map from blocks to places [default: as much as it needs].
    #[arg(long, value_name = "SIZE")]
    map_cache: Option<Size>,

    /// Serve metrics to Prometheus on this address, at /metrics.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<String>,

    /// Read every block of the volumes that this node leads at all their replicas, compare them and make damage good, once in
    /// so many days; 0: only when `berth volume verify` asks.
    #[arg(long, value_name = "DAYS", default_value = "14", value_parser = parse_days)]
    scrub_days: Duration,

    /// Let other nodes in on an address that other machines can connect to, without authentication.
    #[arg(long)]
    insecure: bool,

    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    exit_with_parent: bool,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Show all nodes that have joined.
    List,
    /// Have a node give its replicas to others and get none, and wait until it has none left. Volumes that are attached to it
    /// go on being served there, from the replicas of others. Ctrl-C ends the waiting only.
    Drain {
        /// Its name.
        name: NodeName,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// Have a node keep the replicas that it has, and get some again.
    Undrain {
        /// Its name.
        name: NodeName,
    },
    /// Forget a node that has no replica and was stopped. One that joins under its name later is a new one.
    Remove {
        /// Its name.
        name: NodeName,
    },
}

/// Runs the command and prints what came of it.
pub(crate) fn run(arguments: NodeArguments) -> Result<(), String> {
    match (arguments.command, arguments.run) {
        (Some(NodeCommand::List), _) => list(&arguments.remote),
        (Some(NodeCommand::Drain { name, no_wait }), _) => drain::drain(&arguments.remote, &name, !no_wait),
        (Some(NodeCommand::Undrain { name }), _) => drain::undrain(&arguments.remote, &name),
        (Some(NodeCommand::Remove { name }), _) => drain::remove(&arguments.remote, &name),
        (None, Some(run)) => run_as_node(run, arguments.remote.ctl),
        (None, None) => {
            Err("say what to run: --name NAME --pool FILE, or list, drain, undrain, remove".to_owned())
        }
    }
}

fn run_as_node(run: RunArguments, ctl: String) -> Result<(), String> {
    if run.exit_with_parent {
        crate::ctl::end_with_parent()?;
    }
    if !run.insecure
        && let ListenAddress::Tcp(peer) = &run.peer
    {
        check_loopback(peer).map_err(|error| format!("--peer {peer}: {error}"))?;
    }
    let settings = NodeSettings {
        name: run.name,
        pool: run.pool,
        pool_size: run.pool_size,
        ctl,
        nbd: run.nbd,
        peer: run.peer,
        advertise: run.advertise,
        zone: run.zone,
        rack: run.rack,
        labels: run.labels.into_iter().collect(),
        cpus: run.cpus,
        map_cache: run.map_cache,
        metrics: run.metrics,
        scrub_period: run.scrub_days,
    };
    run_node(&settings).map_err(|error| error.to_string())
}

fn parse_label(text: &str) -> Result<String, String> {
    label("it", text.to_owned()).map_err(|error| error.to_string())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text} is not KEY=VALUE"))?;
    let value = if value.is_empty() { String::new() } else { parse_label(value)? };
    Ok((parse_label(key)?, value))
}

/// Days, or a part of one.
fn parse_days(text: &str) -> Result<Duration, String> {
    const DAYS_MAX: f64 = 3650.0;
    let days: f64 = text.parse().map_err(|_| format!("{text} is no number of days"))?;
    if !(0.0..=DAYS_MAX).contains(&days) {
        return Err(format!("{text} is not between 0 and {DAYS_MAX} days"));
    }
    Ok(Duration::from_secs_f64(days * 86_400.0))
}

/// There is no authentication between nodes yet: whoever can connect can write.
fn check_loopback(address: &str) -> Result<(), String> {
    let mut found = address.to_socket_addrs().map_err(|error| error.to_string())?;
    if found.all(|address| address.ip().is_loopback()) {
        return Ok(());
    }
    Err("other machines can connect there and nothing is authenticated yet; say --insecure if that is meant"
        .to_owned())
}

fn list(remote: &RemoteArguments) -> Result<(), String> {
    let reply =
        with_client(
            remote,
            |mut client| async move { answer(client.list_nodes(ListNodesRequest {})).await },
        )?;
    let nodes =
        NodeReport::all(reply).map_err(|error| format!("berth ctl sent what it must not: {error}"))?;
    print(remote.output, &nodes, || table(&nodes))
}

fn table(nodes: &[NodeReport]) -> String {
    if nodes.is_empty() {
        return "no node has joined yet\n".to_owned();
    }
    let heading = ["NAME", "STATE", "ZONE", "CAPACITY", "PROMISED", "REPLICAS", "LEADS", "NBD", "PEER"];
    let mut lines = vec![heading.map(str::to_owned).to_vec()];
    for node in nodes {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        let state = match (node.connected, node.draining, node.is_empty()) {
            (true, false, _) => "connected",
            (true, true, false) => "draining",
            (true, true, true) => "drained",
            (false, false, _) => "AWAY",
            (false, true, false) => "AWAY, draining",
            (false, true, true) => "AWAY, drained",
        };
        let filling = if node.fills == 0 { String::new() } else { format!(" ({} filling)", node.fills) };
        lines.push(vec![
            node.name.clone(),
            state.to_owned(),
            or_none(&node.zone),
            Size { bytes: node.capacity_bytes }.to_string(),
            Size { bytes: node.reserved_bytes }.to_string(),
            format!("{}{filling}", node.replicas),
            node.heads.to_string(),
            or_none(&node.nbd),
            node.peer.clone(),
        ]);
    }
    columns(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_may_be_parts_of_one() {
        assert_eq!(parse_days("14"), Ok(Duration::from_secs(14 * 86_400)));
        assert_eq!(parse_days("0.5"), Ok(Duration::from_secs(43_200)));
        assert_eq!(parse_days("0"), Ok(Duration::ZERO));
        for bad in ["-1", "4000", "NaN", "inf", "a week"] {
            parse_days(bad).expect_err(bad);
        }
    }
}
