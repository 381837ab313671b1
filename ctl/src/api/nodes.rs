//! Nodes, and how the whole is, over REST.

use axum::Json;
use axum::extract::State;

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
