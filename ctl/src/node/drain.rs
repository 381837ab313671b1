//! `berth node drain`, `undrain` and `remove`.

use std::time::Duration;

use berth::report::NodeReport;
use nbd_server::control::proto::{DrainNodeRequest, ListNodesRequest, NodeReply, RemoveNodeRequest};
use nbd_server::node_name::NodeName;
use tokio::time::Instant;

use crate::remote::{Client, RemoteArguments, answer, print, with_client};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// When nothing has changed for so long, it is said what may be the reason.
const STILL: Duration = Duration::from_secs(30);

/// Marks the node, and waits until it has no replica.
pub(super) fn drain(remote: &RemoteArguments, name: &NodeName, wait: bool) -> Result<(), String> {
    let node = with_client(remote, |mut client| async move {
        let node = mark(&mut client, name, true).await?;
        if wait { wait_until_empty(&mut client, node).await } else { Ok(node) }
    })?;
    print(remote.output, &node, || format!("{}\n", told(&node)))
}

/// Takes the mark away.
pub(super) fn undrain(remote: &RemoteArguments, name: &NodeName) -> Result<(), String> {
    let node = with_client(remote, |mut client| async move { mark(&mut client, name, false).await })?;
    print(remote.output, &node, || {
        format!("node {name} keeps its {}, and gets more\n", count(node.replicas, "replica"))
    })
}

/// Forgets the node.
pub(super) fn remove(remote: &RemoteArguments, name: &NodeName) -> Result<(), String> {
    let request = RemoveNodeRequest { name: name.to_string() };
    let reply = with_client(remote, |mut client| async move { answer(client.remove_node(request)).await })?;
    print(remote.output, &report(reply)?, || format!("node {name} is forgotten\n"))
}

async fn mark(client: &mut Client, name: &NodeName, drain: bool) -> Result<NodeReport, String> {
    report(answer(client.drain_node(DrainNodeRequest { name: name.to_string(), drain })).await?)
}

fn report(reply: NodeReply) -> Result<NodeReport, String> {
    NodeReport::of_reply(reply).map_err(sent_wrongly)
}

fn sent_wrongly(error: impl std::fmt::Display) -> String {
    format!("berth ctl sent what it must not: {error}")
}

/// Says on standard error how far it is, whenever that changes.
async fn wait_until_empty(client: &mut Client, first: NodeReport) -> Result<NodeReport, String> {
    let (mut node, mut filling) = (first, 0);
    let mut since = Instant::now();
    let mut is_told = false;
    while !node.is_empty() {
        tokio::time::sleep(LOOK).await;
        let nodes =
            NodeReport::all(answer(client.list_nodes(ListNodesRequest {})).await?).map_err(sent_wrongly)?;
        let now_filling: u32 = nodes.iter().map(|other| other.fills).sum();
        let found = nodes.into_iter().find(|other| other.node == node.node);
        let found = found.ok_or_else(|| format!("node {} was removed meanwhile", node.name))?;
        if !found.draining {
            return Err(format!("node {} is not drained any more: somebody has undrained it", node.name));
        }
        if (found.replicas, now_filling) != (node.replicas, filling) {
            let left = count(found.replicas, "replica");
            eprintln!("node {}: {left} left, {now_filling} being filled elsewhere", found.name);
            (since, is_told) = (Instant::now(), false);
        } else if since.elapsed() > STILL && !is_told {
            eprintln!("{}", reason(&found));
            is_told = true;
        }
        (node, filling) = (found, now_filling);
    }
    Ok(node)
}

/// What may stand in the way.
fn reason(node: &NodeReport) -> String {
    format!(
        "node {}: {} stayed for {} s. Each needs another node that is connected, has room (`berth node list`) \
         and none of the same volume; and a volume must be led by somebody while it is copied (`berth volume list`)",
        node.name,
        count(node.replicas, "replica"),
        STILL.as_secs()
    )
}

fn told(node: &NodeReport) -> String {
    if node.is_empty() {
        return match node.attached {
            0 => format!("node {} has no replica any more, and no volume is attached to it", node.name),
            attached => format!(
                "node {} has no replica any more: all data is safe elsewhere. {} attached to it, served there until detached",
                node.name,
                count(attached, "volume")
            ),
        };
    }
    format!("node {} is being drained: {} left", node.name, count(node.replicas, "replica"))
}

/// As in "1 replica", "2 replicas".
fn count(number: u32, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
