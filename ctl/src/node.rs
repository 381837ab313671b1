//! The flags of `berth node`, and how its results are printed.

use clap::{Args, Subcommand};
use nbd_server::control::convert::{NodeAddress, node_from_message};
use nbd_server::control::proto::ListNodesRequest;
use serde::Serialize;

use crate::remote::{RemoteArguments, answer, columns, print, with_client};

/// Look at the nodes of the cluster.
#[derive(Debug, Args)]
pub(crate) struct NodeArguments {
    #[command(subcommand)]
    command: NodeCommand,

    #[command(flatten)]
    remote: RemoteArguments,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Show all nodes that have ever joined.
    List,
}

/// A node as it is printed.
#[derive(Debug, Serialize)]
struct NodeReport {
    node: u32,
    name: String,
    nbd: Option<String>,
    peer: String,
    /// In hexadecimal: JavaScript has no integers of 64 bits.
    boot: String,
}

impl From<NodeAddress> for NodeReport {
    fn from(node: NodeAddress) -> NodeReport {
        NodeReport {
            node: node.node.0,
            name: node.name.to_string(),
            nbd: node.nbd,
            peer: node.peer,
            boot: format!("{:016x}", node.boot),
        }
    }
}

/// Runs the command and prints what came of it.
pub(crate) fn run(arguments: &NodeArguments) -> Result<(), String> {
    let NodeCommand::List = arguments.command;
    let nodes = with_client(&arguments.remote, |mut client| async move {
        let nodes = answer(client.list_nodes(ListNodesRequest {})).await?.nodes;
        let nodes: Result<Vec<_>, _> = nodes.into_iter().map(node_from_message).collect();
        nodes.map_err(|error| format!("berth ctl sent what it must not: {error}"))
    })?;
    let nodes: Vec<NodeReport> = nodes.into_iter().map(NodeReport::from).collect();
    print(arguments.remote.output, &nodes, || table(&nodes))
}

fn table(nodes: &[NodeReport]) -> String {
    if nodes.is_empty() {
        return "no node has joined yet\n".to_owned();
    }
    let mut lines = vec![["NAME", "NUMBER", "PEER", "NBD"].map(str::to_owned).to_vec()];
    for node in nodes {
        let nbd = node.nbd.clone().unwrap_or_else(|| "-".to_owned());
        lines.push(vec![node.name.clone(), node.node.to_string(), node.peer.clone(), nbd]);
    }
    columns(&lines)
}
