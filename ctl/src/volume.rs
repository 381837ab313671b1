//! The flags of `berth volume`, and how its results are printed.

mod attach;
mod verify;

use berth::report::{Names, PassReport, StatusReport, VolumeReport, age};
use clap::{Args, Subcommand};
use datapath::units::BLOCK_BYTES_U64;
use nbd_server::control::proto::{
    self, CreateVolumeRequest, DeleteVolumeRequest, DetachRequest, GetVolumeRequest, ListVolumesRequest,
    ReplicaRequest, get_volume_request,
};
use nbd_server::node_name::NodeName;
use nbd_server::size::Size;
use nbd_server::volume_name::VolumeName;

use crate::remote::{Client, RemoteArguments, answer, columns, node_names, print, with_client};

/// Make, look at and delete replicated volumes.
#[derive(Debug, Args)]
pub(crate) struct VolumeArguments {
    #[command(subcommand)]
    command: VolumeCommand,

    #[command(flatten)]
    remote: RemoteArguments,
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// Make a volume. Its replicas come to nodes with room for them, spread over zones and racks, or to those named.
    Create {
        /// Its name: 1 to 63 of a-z, 0-9, '.' and '-'.
        name: VolumeName,
        /// Its size: 20G, 512M, bytes.
        #[arg(long, value_parser = parse_size)]
        size: Size,
        /// How many replicas [default: 3].
        #[arg(long, value_name = "N", conflicts_with = "on", value_parser = clap::value_parser!(u32).range(1..=64))]
        replicas: Option<u32>,
        /// Exactly these nodes, as in n1,n2,n3, whether they have room for all of it or not.
        #[arg(long, value_name = "NODES", value_delimiter = ',')]
        on: Vec<NodeName>,
        /// The node where its task runs: it gets a replica if it can take one.
        #[arg(long, value_name = "NODE", conflicts_with = "on")]
        near: Option<NodeName>,
        /// Only nodes of these zones.
        #[arg(long, value_name = "ZONES", value_delimiter = ',', conflicts_with = "on")]
        zones: Vec<String>,
        /// Serve only while so many replicas are in sync [default: 2 with three replicas or more, else 1].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
        min_in_sync: Option<u32>,
    },
    /// Show all volumes.
    List,
    /// Show a volume.
    Show {
        /// Its name.
        name: VolumeName,
    },
    /// Read and compare all replicas in sync while the volume is in use, and make damaged blocks good. Ends with status 1 if
    /// replicas differ, damage stays, or not everything could be compared.
    Verify {
        /// Its name.
        name: VolumeName,
    },
    /// Have a node lead the volume, and tell its URI there. Where it was led before, requests under way are answered and
    /// its clients disconnected; from then on no other node serves it.
    Attach {
        /// The volume's name.
        name: VolumeName,
        /// The node's name.
        #[arg(long, value_name = "NODE")]
        node: NodeName,
        /// Take it from another node that lives.
        #[arg(long)]
        steal: bool,
    },
    /// Let any node lead the volume that a client chooses.
    Detach {
        /// The volume's name.
        name: VolumeName,
        /// Only if it is attached to this node.
        #[arg(long, value_name = "NODE")]
        node: Option<NodeName>,
    },
    /// Give a node a replica of the volume, one more than there are. It is filled while a head serves the volume.
    AddReplica {
        /// The volume's name.
        name: VolumeName,
        /// The node's name.
        #[arg(long, value_name = "NODE")]
        node: NodeName,
    },
    /// Forget the replica of a node, which must not be in sync. What the node holds stays in its pool.
    RemoveReplica {
        /// The volume's name.
        name: VolumeName,
        /// The node's name.
        #[arg(long, value_name = "NODE")]
        node: NodeName,
    },
    /// Delete a volume with all its data: nodes remove what they hold of it
    Delete {
        /// Its name.
        name: VolumeName,
        /// Also if a node leads it, so that somebody may be using it.
        #[arg(long)]
        force: bool,
    },
}

/// A volume is an array of whole blocks.
fn parse_size(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    if size.bytes == 0 || !size.bytes.is_multiple_of(BLOCK_BYTES_U64) {
        return Err(format!("{text} is not a multiple of {BLOCK_BYTES_U64} bytes"));
    }
    Ok(size)
}

/// Runs the command and prints what came of it.
pub(crate) fn run(arguments: &VolumeArguments) -> Result<bool, String> {
    let output = arguments.remote.output;
    let ask = |request| with_client(&arguments.remote, |client| one(client, request));
    let printed = match &arguments.command {
        VolumeCommand::Verify { name } => return verify::run(&arguments.remote, name),
        VolumeCommand::Create { name, size, replicas, on, near, zones, min_in_sync } => {
            let made = ask(Request::Create(CreateVolumeRequest {
                name: name.to_string(),
                size_blocks: size.bytes / BLOCK_BYTES_U64,
                on: on.iter().map(NodeName::to_string).collect(),
                min_in_sync: min_in_sync.unwrap_or(0),
                replicas: replicas.unwrap_or(0),
                near: near.as_ref().map(NodeName::to_string).unwrap_or_default(),
                zones: zones.clone(),
            }))?;
            print(output, &made, || {
                format!("volume {name}: {}, replicas on {}\n", made.size(), made.in_sync.join(", "))
            })
        }
        VolumeCommand::List => {
            let volumes = with_client(&arguments.remote, list)?;
            print(output, &volumes, || table(&volumes))
        }
        VolumeCommand::Show { name } => {
            let which = Some(get_volume_request::Which::Name(name.to_string()));
            let found = ask(Request::Get(GetVolumeRequest { which }))?;
            print(output, &found, || description(&found))
        }
        VolumeCommand::Attach { name, node, steal } => {
            let (attached, uri) = attach::run(&arguments.remote, name, node, *steal)?;
            print(output, &attached, || format!("volume {name}: node {node} leads it, {uri}\n"))
        }
        VolumeCommand::Detach { name, node } => {
            let node = node.as_ref().map(NodeName::to_string).unwrap_or_default();
            let detached = ask(Request::Detach(DetachRequest { name: name.to_string(), node }))?;
            print(output, &detached, || format!("volume {name} is attached to no node\n"))
        }
        VolumeCommand::AddReplica { name, node } => {
            let request = ReplicaRequest { name: name.to_string(), node: node.to_string() };
            let changed = ask(Request::AddReplica(request))?;
            print(output, &changed, || format!("volume {name}: node {node} gets a replica\n"))
        }
        VolumeCommand::RemoveReplica { name, node } => {
            let request = ReplicaRequest { name: name.to_string(), node: node.to_string() };
            let changed = ask(Request::RemoveReplica(request))?;
            print(output, &changed, || format!("volume {name}: the replica of node {node} is forgotten\n"))
        }
        VolumeCommand::Delete { name, force } => {
            let deleted =
                ask(Request::Delete(DeleteVolumeRequest { name: name.to_string(), force: *force }))?;
            print(output, &deleted, || format!("volume {name} is deleted\n"))
        }
    };
    printed.map(|()| true)
}

/// Show the state of the cluster. Ends with status 1 if a volume has fewer replicas in sync than it should.
#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    #[command(flatten)]
    remote: RemoteArguments,
}

/// Prints how the volumes are. False if one is degraded.
pub(crate) fn status(arguments: &StatusArguments) -> Result<bool, String> {
    let (nodes, volumes) = with_client(&arguments.remote, |mut client| async move {
        let nodes = node_names(&mut client).await?.len();
        Ok((nodes, list(client).await?))
    })?;
    let report = StatusReport::new(nodes, volumes);
    print(arguments.remote.output, &report, || {
        let mut all = if report.degraded.is_empty() {
            "all replicas are in sync".to_owned()
        } else {
            format!("DEGRADED: {}", report.degraded.join(", "))
        };
        if !report.damaged.is_empty() {
            all.push_str(&format!("; DAMAGED (see `berth volume show`): {}", report.damaged.join(", ")));
        }
        format!("{} nodes, {} volumes; {all}\n{}", report.nodes, report.volumes.len(), table(&report.volumes))
    })?;
    Ok(report.is_well())
}

/// Requests that are answered with one volume.
enum Request {
    Create(CreateVolumeRequest),
    Get(GetVolumeRequest),
    Delete(DeleteVolumeRequest),
    Detach(DetachRequest),
    AddReplica(ReplicaRequest),
    RemoveReplica(ReplicaRequest),
}

async fn one(mut client: Client, request: Request) -> Result<VolumeReport, String> {
    // Before the volume is touched: what fails here has changed nothing.
    let names = node_names(&mut client).await?;
    let reply = match request {
        Request::Create(request) => answer(client.create_volume(request)).await,
        Request::Get(request) => answer(client.get_volume(request)).await,
        Request::Delete(request) => answer(client.delete_volume(request)).await,
        Request::Detach(request) => answer(client.detach_volume(request)).await,
        Request::AddReplica(request) => answer(client.add_replica(request)).await,
        Request::RemoveReplica(request) => answer(client.remove_replica(request)).await,
    };
    let reply = reply?;
    report(reply.record.unwrap_or_default(), reply.check, &names)
}

async fn list(mut client: Client) -> Result<Vec<VolumeReport>, String> {
    let names = node_names(&mut client).await?;
    let mut volumes: Vec<VolumeReport> = Vec::new();
    loop {
        let after = volumes.last().map_or(0, |last| last.number);
        let page = answer(client.list_volumes(ListVolumesRequest { after })).await?;
        let checks = page.checks.into_iter().map(Some).chain(std::iter::repeat(None));
        for (record, check) in page.records.into_iter().zip(checks) {
            volumes.push(report(record, check, &names)?);
        }
        if !page.more || volumes.last().is_none_or(|last| last.number <= after) {
            return Ok(volumes);
        }
    }
}

fn report(
    record: proto::Record,
    check: Option<proto::CheckState>,
    names: &Names,
) -> Result<VolumeReport, String> {
    VolumeReport::of_messages(record, check, names)
        .map_err(|error| format!("berth ctl sent what it must not: {error}"))
}

fn table(volumes: &[VolumeReport]) -> String {
    if volumes.is_empty() {
        return "there are no volumes; make one with `berth volume create NAME --size 10G`\n".to_owned();
    }
    let heading = ["NAME", "SIZE", "HEAD", "IN SYNC", "AWAY", "LAST PASS"];
    let mut lines = vec![heading.map(str::to_owned).to_vec()];
    for volume in volumes {
        let head = volume.head.clone().unwrap_or_else(|| "-".to_owned());
        let stale = volume.stale.iter().map(|stale| stale.node.clone());
        let away: Vec<String> = volume.catching_up.iter().cloned().chain(stale).collect();
        let away = if away.is_empty() { "-".to_owned() } else { away.join(",") };
        let pass = volume.last_pass.as_ref().map_or_else(|| "never".to_owned(), PassReport::age);
        lines.push(vec![volume.name.clone(), volume.size(), head, volume.in_sync.join(","), away, pass]);
    }
    columns(&lines)
}

fn description(volume: &VolumeReport) -> String {
    let state = if volume.started { "started" } else { "not started" };
    let mut head = volume.head.clone().unwrap_or_else(|| "none".to_owned());
    if let Some(node) = &volume.attached {
        head.push_str(&format!(", attached to {node}"));
    }
    let mut text = format!(
        "volume {}: {}, number {}\n  head {head}, epoch {} ({state}), version {}\n  in sync: {} (at least {}, wanted {})\n",
        volume.name,
        volume.size(),
        volume.number,
        volume.epoch,
        volume.version,
        volume.in_sync.join(", "),
        volume.min_in_sync,
        volume.replicas_wanted,
    );
    if !volume.catching_up.is_empty() {
        text.push_str(&format!("  catching up: {}\n", volume.catching_up.join(", ")));
    }
    if !volume.fresh.is_empty() {
        text.push_str(&format!("  new, filled from nothing: {}\n", volume.fresh.join(", ")));
    }
    if !volume.leaving.is_empty() {
        text.push_str(&format!("  to go, since their nodes are drained: {}\n", volume.leaving.join(", ")));
    }
    for stale in &volume.stale {
        text.push_str(&format!("  stale: {}, since version {}\n", stale.node, stale.since_version));
    }
    if let Some(began_at) = volume.pass_began_at {
        text.push_str(&format!("  a pass over its replicas began {}\n", age(began_at)));
    }
    match &volume.last_pass {
        Some(pass) => text.push_str(&pass.description()),
        None => text.push_str("  last pass over its replicas: never\n"),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_whole_blocks() {
        assert_eq!(parse_size("10G").expect("a size").bytes, 10 << 30);
        for bad in ["0", "4097", "10GB"] {
            parse_size(bad).expect_err(bad);
        }
    }
}
