//! `berth volume attach`: waits until the node leads the volume.

use std::time::Duration;

use nbd_server::control::convert::record_from_message;
use nbd_server::control::proto::{AttachRequest, GetVolumeRequest, ListNodesRequest, get_volume_request};
use nbd_server::node_name::NodeName;
use nbd_server::volume_name::VolumeName;
use tokio::time::Instant;

use super::{VolumeReport, report};
use crate::remote::{Client, RemoteArguments, answer, with_client};

/// A dead head's leave to read has lapsed by then, and its members have been waited for.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// The volume once the node leads it, and where its clients find it.
pub(super) fn run(
    remote: &RemoteArguments,
    name: &VolumeName,
    node: &NodeName,
    steal: bool,
) -> Result<(VolumeReport, String), String> {
    let (name, node) = (name.to_string(), node.to_string());
    with_client(remote, |client| attach(client, name, node, steal))
}

async fn attach(
    mut client: Client,
    name: String,
    node: String,
    steal: bool,
) -> Result<(VolumeReport, String), String> {
    let request = AttachRequest { name: name.clone(), node: node.clone(), steal };
    let mut reply = answer(client.attach_volume(request)).await?;
    let nodes = answer(client.list_nodes(ListNodesRequest {})).await?.nodes;
    let names: Vec<(u32, String)> = nodes.iter().map(|known| (known.node, known.name.clone())).collect();
    let address = nodes.into_iter().find(|known| known.name == node).map(|known| known.nbd_address);
    let until = Instant::now() + PATIENCE;
    loop {
        let message = reply.record.unwrap_or_default();
        let record = record_from_message(message.clone())
            .map_err(|error| format!("berth ctl sent what it must not: {error}"))?;
        if record.is_led_as_attached() {
            let uri = match address.as_deref() {
                Some("") | None => "but its clients cannot come in over TCP".to_owned(),
                Some(address) => format!("nbd://{address}/{name}"),
            };
            return Ok((report(message, reply.check, &names)?, uri));
        }
        if Instant::now() > until {
            return Err(format!(
                "volume {name} is attached to node {node}, which does not lead it yet; `berth volume show {name}` \
                 tells how it stands"
            ));
        }
        tokio::time::sleep(LOOK).await;
        let which = Some(get_volume_request::Which::Name(name.clone()));
        reply = answer(client.get_volume(GetVolumeRequest { which })).await?;
    }
}
