//! What the service answers, in the words of [`crate::report`].

use datapath::record::Record;
use nbd_server::control::convert::record_from_message;
use nbd_server::control::proto;
use nbd_server::control::proto::control_server::Control;
use tonic::{Request, Response, Status};

use super::error::ApiError;
use crate::report::{NodeReport, VolumeReport};
use crate::service::ControlService;

/// The service's own words that it does not understand are a fault of its own.
fn own(error: impl std::fmt::Display) -> ApiError {
    Status::internal(error.to_string()).into()
}

async fn names(service: &ControlService) -> Result<Vec<(u32, String)>, ApiError> {
    let list = service.list_nodes(Request::new(proto::ListNodesRequest {})).await?.into_inner();
    Ok(list.nodes.into_iter().map(|node| (node.node, node.name)).collect())
}

pub(super) async fn volume(
    service: &ControlService,
    reply: Response<proto::VolumeReply>,
) -> Result<VolumeReport, ApiError> {
    let reply = reply.into_inner();
    VolumeReport::of_messages(reply.record.unwrap_or_default(), reply.check, &names(service).await?)
        .map_err(own)
}

pub(super) fn record(reply: &Response<proto::VolumeReply>) -> Result<Record, ApiError> {
    record_from_message(reply.get_ref().record.clone().unwrap_or_default()).map_err(own)
}

pub(super) async fn volumes(service: &ControlService) -> Result<Vec<VolumeReport>, ApiError> {
    let names = names(service).await?;
    let mut volumes: Vec<VolumeReport> = Vec::new();
    loop {
        let after = volumes.last().map_or(0, |last| last.number);
        let request = Request::new(proto::ListVolumesRequest { after });
        let page = service.list_volumes(request).await?.into_inner();
        let checks = page.checks.into_iter().map(Some).chain(std::iter::repeat(None));
        for (record, check) in page.records.into_iter().zip(checks) {
            volumes.push(VolumeReport::of_messages(record, check, &names).map_err(own)?);
        }
        if !page.more {
            return Ok(volumes);
        }
    }
}

pub(super) fn node(reply: Response<proto::NodeReply>) -> Result<NodeReport, ApiError> {
    NodeReport::of_reply(reply.into_inner()).map_err(own)
}

pub(super) async fn nodes(service: &ControlService) -> Result<Vec<NodeReport>, ApiError> {
    let list = service.list_nodes(Request::new(proto::ListNodesRequest {})).await?.into_inner();
    NodeReport::all(list).map_err(own)
}
