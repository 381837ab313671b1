//! Nodes, and how the whole is, over REST.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use nbd_server::control::proto;
use nbd_server::control::proto::control_server::Control;
use tonic::Request;

use super::error::{ApiError, ErrorBody};
use super::{InPath, reply};
use crate::report::{NodeReport, StatusReport};
use crate::service::ControlService;

/// All nodes that have ever joined, by number.
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes",
    responses((status = 200, body = Vec<NodeReport>), (status = "default", body = ErrorBody)))]
pub(super) async fn list(State(service): State<ControlService>) -> Result<Json<Vec<NodeReport>>, ApiError> {
    Ok(Json(reply::nodes(&service).await?))
}

/// A node.
#[utoipa::path(get, path = "/v1/nodes/{name}", tag = "nodes", params(("name" = String, Path)),
    responses((status = 200, body = NodeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn show(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
) -> Result<Json<NodeReport>, ApiError> {
    let nodes = reply::nodes(&service).await?;
    let found = nodes.into_iter().find(|node| node.name == name);
    found.map(Json).ok_or_else(|| ApiError::not_found(format!("there is no node {name}")))
}

/// Has a node give its replicas to others, and get none: answered at once, and done when it has none left. Volumes that are
/// attached to it stay.
#[utoipa::path(post, path = "/v1/nodes/{name}/drain", tag = "nodes", params(("name" = String, Path)),
    responses((status = 200, body = NodeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn drain(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
) -> Result<Json<NodeReport>, ApiError> {
    set_draining(&service, name, true).await
}

/// Has a node keep what it has, and get replicas again.
#[utoipa::path(post, path = "/v1/nodes/{name}/undrain", tag = "nodes", params(("name" = String, Path)),
    responses((status = 200, body = NodeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn undrain(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
) -> Result<Json<NodeReport>, ApiError> {
    set_draining(&service, name, false).await
}

async fn set_draining(
    service: &ControlService,
    name: String,
    drain: bool,
) -> Result<Json<NodeReport>, ApiError> {
    if !reply::nodes(service).await?.iter().any(|node| node.name == name) {
        return Err(ApiError::not_found(format!("there is no node {name}")));
    }
    let request = Request::new(proto::DrainNodeRequest { name, drain });
    reply::node(service.drain_node(request).await?).map(Json)
}

/// Forgets a node that has no replica and is not connected. One that is not known is answered as if it had just been forgotten.
#[utoipa::path(delete, path = "/v1/nodes/{name}", tag = "nodes", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn remove(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
) -> Result<StatusCode, ApiError> {
    let known = reply::nodes(&service).await?.iter().any(|node| node.name == name);
    if known {
        service.remove_node(Request::new(proto::RemoveNodeRequest { name })).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// All volumes, and which of them are not as they should be.
#[utoipa::path(get, path = "/v1/status", tag = "status",
    responses((status = 200, body = StatusReport), (status = "default", body = ErrorBody)))]
pub(super) async fn status(State(service): State<ControlService>) -> Result<Json<StatusReport>, ApiError> {
    let nodes = reply::nodes(&service).await?.len();
    Ok(Json(StatusReport::new(nodes, reply::volumes(&service).await?)))
}

/// Answers `ok` while berth ctl serves.
#[utoipa::path(get, path = "/healthz", tag = "status", responses((status = 200, body = String)))]
pub(super) async fn health() -> &'static str {
    "ok\n"
}
