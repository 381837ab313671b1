//! REST: what the command line can do, for programs that speak HTTP and JSON. Described by `/v1/openapi.json`.
//!
//! ```text
//!   HTTP ──▶ router ──/v1/…──▶ handler ──▶ ControlService ◀── gRPC ◀── nodes, command line
//!               │                 └──▶ report: the same JSON as `--output json`
//!               └──/berth.v1.Control/…──▶ gRPC
//! ```
//!
//! Both faces share one port and one service. A request may be repeated after a timeout without harm.

mod error;
mod nodes;
mod reply;
mod volumes;

use std::time::Duration;

use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use utoipa::OpenApi;

use crate::service::ControlService;
use error::ApiError;

pub use error::{ErrorBody, ErrorText};
pub use volumes::{Attached, Attachment, Deletion, Detachment, NewReplica, NewVolume};

/// A request's body may be so long.
const BODY_BYTES_MAX: usize = 64 << 10;
/// A body must have arrived after so long.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

/// Everything that REST offers.
#[derive(Debug, OpenApi)]
#[openapi(
    info(title = "berth ctl", description = "Replicated block volumes: where they are, who serves them."),
    paths(
        volumes::list, volumes::create, volumes::show, volumes::delete, volumes::attach, volumes::detach,
        volumes::add_replica, volumes::remove_replica, nodes::list, nodes::show, nodes::remove,
        nodes::drain, nodes::undrain, nodes::status, nodes::health,
    ),
    tags(
        (name = "volumes", description = "Volumes and their replicas"),
        (name = "nodes", description = "Nodes that hold them"),
        (name = "status", description = "How all of it is"),
    )
)]
struct Document;

/// The routes of REST; whatever else comes is for `others`.
pub fn routes(service: ControlService, others: Router) -> Router {
    let rest = Router::new()
        .route("/v1/volumes", get(volumes::list).post(volumes::create))
        .route("/v1/volumes/{name}", get(volumes::show).delete(volumes::delete))
        .route("/v1/volumes/{name}/attach", post(volumes::attach))
        .route("/v1/volumes/{name}/detach", post(volumes::detach))
        .route("/v1/volumes/{name}/replicas", post(volumes::add_replica))
        .route("/v1/volumes/{name}/replicas/{node}", axum::routing::delete(volumes::remove_replica))
        .route("/v1/nodes", get(nodes::list))
        .route("/v1/nodes/{name}", get(nodes::show).delete(nodes::remove))
        .route("/v1/nodes/{name}/drain", post(nodes::drain))
        .route("/v1/nodes/{name}/undrain", post(nodes::undrain))
        .route("/v1/status", get(nodes::status))
        .route("/v1/openapi.json", get(document))
        .route("/healthz", get(nodes::health))
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(service);
    rest.merge(others.reset_fallback()).fallback(no_such_path)
}

async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}

async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::no_such_path(uri.path())
}

/// A request's body: JSON, whole and in time, with nothing in it that is not understood.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match tokio::time::timeout(BODY_TIME_MAX, Json::<T>::from_request(request, state)).await {
            Ok(Ok(Json(body))) => Ok(Body(body)),
            Ok(Err(rejection)) => Err(rejection.into()),
            Err(_) => Err(ApiError::too_slow()),
        }
    }
}

/// What stands in a request's path.
struct InPath<T>(T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for InPath<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<T>::from_request_parts(parts, state).await;
        path.map(|Path(names)| InPath(names)).map_err(|rejection| ApiError::invalid(rejection.body_text()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_describes_every_route_and_how_it_fails() {
        let document = serde_json::to_value(Document::openapi()).expect("JSON");
        let source = include_str!("mod.rs");
        let mut routes = 0;
        for line in source.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
            let path = line.split('"').next().expect("a path");
            if path == "/v1/openapi.json" {
                continue;
            }
            routes += 1;
            let operations =
                document["paths"][path].as_object().unwrap_or_else(|| panic!("{path} is missing"));
            for (method, operation) in operations {
                assert!(line.contains(method.as_str()), "{method} {path} is described and not there");
                let fails = operation["responses"].get("default").is_some();
                assert!(fails || path == "/healthz", "{method} {path} says nothing of errors");
                assert!(operation["summary"].is_string() || operation["description"].is_string(), "{path}");
            }
        }
        assert_eq!(document["paths"].as_object().map(serde_json::Map::len), Some(routes));
    }
}
