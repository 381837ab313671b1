//! Volumes over REST. Every request may be repeated: what is so already is answered as if it had just been done.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use datapath::units::BLOCK_BYTES_U64;
use nbd_server::control::proto::control_server::Control;
use nbd_server::control::proto::{self, get_volume_request::Which};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tonic::{Code, Request, Status};
use utoipa::{IntoParams, ToSchema};

use super::error::{ApiError, ErrorBody};
use super::{Body, InPath, reply};
use crate::report::VolumeReport;
use crate::service::ControlService;

/// How long attaching waits for the node to lead the volume, unless the request says.
const WAIT_SECONDS: u32 = 15;
const WAIT_SECONDS_MAX: u32 = 60;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// A volume that is wanted.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// 1 to 63 of a-z, 0-9, '.' and '-'.
    #[schema(example = "data")]
    pub name: String,
    /// A multiple of 4096, at most 16 TiB.
    #[schema(example = 10_737_418_240_u64)]
    pub size_bytes: u64,
    /// How many replicas; 3 if neither this nor `on` is given.
    #[serde(default)]
    pub replicas: Option<u32>,
    /// Exactly these nodes, whether they have room for all of it or not.
    #[serde(default)]
    pub on: Vec<String>,
    /// The node where its task runs: it gets a replica if it can take one.
    #[serde(default)]
    pub near: Option<String>,
    /// Only nodes of these zones.
    #[serde(default)]
    pub zones: Vec<String>,
    /// It is served only while so many replicas are in sync: 2 with three replicas or more, else 1.
    #[serde(default)]
    pub min_in_sync: Option<u32>,
}

/// Where a volume is to be led.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Name of the node.
    #[schema(example = "n1")]
    pub node: String,
    /// Take it from another node that lives.
    #[serde(default)]
    pub steal: bool,
    /// How long to wait until the node leads it, at most 60; 0: not at all.
    #[serde(default)]
    pub wait_seconds: Option<u32>,
}

/// From where a volume is detached.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Detachment {
    /// Only if it is attached to this node.
    #[serde(default)]
    pub node: Option<String>,
}

/// How a volume is deleted.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Deletion {
    /// Also if a node leads it, so that somebody may be using it.
    #[serde(default)]
    pub force: bool,
}

/// A node for a replica.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReplica {
    /// Its name.
    #[schema(example = "n4")]
    pub node: String,
}

/// A volume that is attached.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Attached {
    /// The volume.
    pub volume: VolumeReport,
    /// Does the node lead it?
    pub is_led: bool,
    /// Where clients find it; nothing if the node takes none over TCP.
    #[schema(example = "nbd://10.0.0.2:10809/data")]
    pub uri: Option<String>,
}

/// All volumes, by number.
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes",
    responses((status = 200, body = Vec<VolumeReport>), (status = "default", body = ErrorBody)))]
pub(super) async fn list(State(service): State<ControlService>) -> Result<Json<Vec<VolumeReport>>, ApiError> {
    Ok(Json(reply::volumes(&service).await?))
}

/// Makes a volume. One that exists and is just as wanted is answered with 200.
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", request_body = NewVolume,
    responses((status = 201, body = VolumeReport), (status = 200, body = VolumeReport),
        (status = "default", body = ErrorBody)))]
pub(super) async fn create(
    State(service): State<ControlService>,
    Body(wish): Body<NewVolume>,
) -> Result<(StatusCode, Json<VolumeReport>), ApiError> {
    if wish.size_bytes % BLOCK_BYTES_U64 != 0 {
        return Err(ApiError::invalid(format!("size_bytes: {} is not a multiple of 4096", wish.size_bytes)));
    }
    // Before any node is looked at: what it was given may be all that there was room for.
    if let Some(known) = known(&service, &wish).await? {
        return Ok((StatusCode::OK, Json(known)));
    }
    let request = proto::CreateVolumeRequest {
        name: wish.name.clone(),
        size_blocks: wish.size_bytes / BLOCK_BYTES_U64,
        on: wish.on.clone(),
        min_in_sync: wish.min_in_sync.unwrap_or(0),
        replicas: wish.replicas.unwrap_or(0),
        near: wish.near.clone().unwrap_or_default(),
        zones: wish.zones.clone(),
    };
    match service.create_volume(Request::new(request)).await {
        Ok(made) => Ok((StatusCode::CREATED, Json(reply::volume(&service, made).await?))),
        // Somebody else has made it just now.
        Err(status) if status.code() == Code::AlreadyExists => match known(&service, &wish).await? {
            Some(known) => Ok((StatusCode::OK, Json(known))),
            None => Err(status.into()),
        },
        Err(status) => Err(status.into()),
    }
}

/// The volume of this name, if there is one and it is as wanted.
async fn known(service: &ControlService, wish: &NewVolume) -> Result<Option<VolumeReport>, ApiError> {
    let which = Some(Which::Name(wish.name.clone()));
    let found = match service.get_volume(Request::new(proto::GetVolumeRequest { which })).await {
        Ok(found) => found,
        Err(status) if status.code() == Code::NotFound => return Ok(None),
        Err(status) => return Err(status.into()),
    };
    let known = reply::volume(service, found).await?;
    match difference(wish, &known) {
        None => Ok(Some(known)),
        Some(difference) => {
            Err(ApiError::exists(format!("there is a volume {} already, and {difference}", wish.name)))
        }
    }
}

/// What of a volume is not as it is wanted. Where its replicas are may have changed since it was made.
fn difference(wish: &NewVolume, known: &VolumeReport) -> Option<String> {
    let replicas = match (wish.replicas, wish.on.len()) {
        (Some(replicas), _) => replicas,
        (None, 0) => 3,
        (None, named) => u32::try_from(named).unwrap_or(u32::MAX),
    };
    let min_in_sync = wish.min_in_sync.unwrap_or(if replicas >= 3 { 2 } else { 1 });
    if known.size_bytes != wish.size_bytes {
        return Some(format!("it has {} bytes, not {}", known.size_bytes, wish.size_bytes));
    }
    if known.replicas_wanted != replicas {
        return Some(format!("it has {} replicas, not {replicas}", known.replicas_wanted));
    }
    (known.min_in_sync != min_in_sync)
        .then(|| format!("its min_in_sync is {}, not {min_in_sync}", known.min_in_sync))
}

/// A volume.
#[utoipa::path(get, path = "/v1/volumes/{name}", tag = "volumes", params(("name" = String, Path)),
    responses((status = 200, body = VolumeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn show(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
) -> Result<Json<VolumeReport>, ApiError> {
    let found = find(&service, &name).await?;
    Ok(Json(reply::volume(&service, found).await?))
}

/// Deletes a volume with all its data. It is refused while the volume is attached, or, unless forced, a node leads it. One
/// that is not there is deleted.
#[utoipa::path(delete, path = "/v1/volumes/{name}", tag = "volumes",
    params(("name" = String, Path), Deletion),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn delete(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
    query: Result<Query<Deletion>, QueryRejection>,
) -> Result<StatusCode, ApiError> {
    let Query(Deletion { force }) = query.map_err(|error| ApiError::invalid(error.body_text()))?;
    let request = proto::DeleteVolumeRequest { name, force };
    match service.delete_volume(Request::new(request)).await {
        Err(status) if status.code() != Code::NotFound => Err(status.into()),
        _ => Ok(StatusCode::NO_CONTENT),
    }
}

/// Has a node lead the volume, and waits until it does.
#[utoipa::path(post, path = "/v1/volumes/{name}/attach", tag = "volumes", params(("name" = String, Path)),
    request_body = Attachment,
    responses((status = 200, body = Attached), (status = "default", body = ErrorBody)))]
pub(super) async fn attach(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
    Body(wish): Body<Attachment>,
) -> Result<Json<Attached>, ApiError> {
    let wait_seconds = wish.wait_seconds.unwrap_or(WAIT_SECONDS);
    if wait_seconds > WAIT_SECONDS_MAX {
        return Err(ApiError::invalid(format!(
            "wait_seconds: {wait_seconds} is more than {WAIT_SECONDS_MAX}"
        )));
    }
    let until = Instant::now() + Duration::from_secs(wait_seconds.into());
    let request = proto::AttachRequest { name: name.clone(), node: wish.node.clone(), steal: wish.steal };
    let mut reply = service.attach_volume(Request::new(request)).await?;
    loop {
        let is_led = reply::record(&reply)?.is_led_as_attached();
        if is_led || wait_seconds == 0 {
            let address = reply::nodes(&service).await?.into_iter().find(|node| node.name == wish.node);
            let uri = address.and_then(|node| node.nbd).map(|address| format!("nbd://{address}/{name}"));
            return Ok(Json(Attached { volume: reply::volume(&service, reply).await?, is_led, uri }));
        }
        if Instant::now() >= until {
            return Err(ApiError::not_led(&name, &wish.node));
        }
        sleep(LOOK).await;
        reply = find(&service, &name).await?;
    }
}

/// Lets any node lead the volume that a client chooses.
#[utoipa::path(post, path = "/v1/volumes/{name}/detach", tag = "volumes", params(("name" = String, Path)),
    request_body = Detachment,
    responses((status = 200, body = VolumeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn detach(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
    Body(wish): Body<Detachment>,
) -> Result<Json<VolumeReport>, ApiError> {
    let request = proto::DetachRequest { name, node: wish.node.unwrap_or_default() };
    let detached = service.detach_volume(Request::new(request)).await?;
    Ok(Json(reply::volume(&service, detached).await?))
}

/// Gives the volume one more replica, which is filled when a node leads it. A node that has one keeps it.
#[utoipa::path(post, path = "/v1/volumes/{name}/replicas", tag = "volumes", params(("name" = String, Path)),
    request_body = NewReplica,
    responses((status = 200, body = VolumeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn add_replica(
    State(service): State<ControlService>,
    InPath(name): InPath<String>,
    Body(wish): Body<NewReplica>,
) -> Result<Json<VolumeReport>, ApiError> {
    let request = proto::ReplicaRequest { name: name.clone(), node: wish.node.clone() };
    let added = service.add_replica(Request::new(request)).await;
    replicas_or_as_wanted(&service, &name, added, |volume| holds(volume, &wish.node)).await
}

/// Forgets a replica that is not in sync. A node that has none is left alone.
#[utoipa::path(delete, path = "/v1/volumes/{name}/replicas/{node}", tag = "volumes",
    params(("name" = String, Path), ("node" = String, Path)),
    responses((status = 200, body = VolumeReport), (status = "default", body = ErrorBody)))]
pub(super) async fn remove_replica(
    State(service): State<ControlService>,
    InPath((name, node)): InPath<(String, String)>,
) -> Result<Json<VolumeReport>, ApiError> {
    let request = proto::ReplicaRequest { name: name.clone(), node: node.clone() };
    let removed = service.remove_replica(Request::new(request)).await;
    replicas_or_as_wanted(&service, &name, removed, |volume| !holds(volume, &node)).await
}

fn holds(volume: &VolumeReport, node: &str) -> bool {
    let stale = volume.stale.iter().map(|stale| &stale.node);
    volume.in_sync.iter().chain(&volume.catching_up).chain(stale).any(|name| name == node)
}

/// The outcome of a change of replicas. One that is refused because it is so already is none.
async fn replicas_or_as_wanted(
    service: &ControlService,
    name: &str,
    outcome: Result<tonic::Response<proto::VolumeReply>, Status>,
    is_as_wanted: impl FnOnce(&VolumeReport) -> bool,
) -> Result<Json<VolumeReport>, ApiError> {
    match outcome {
        Ok(changed) => Ok(Json(reply::volume(service, changed).await?)),
        Err(status) if status.code() == Code::FailedPrecondition => {
            let known = find(service, name).await?;
            let known = reply::volume(service, known).await?;
            if is_as_wanted(&known) { Ok(Json(known)) } else { Err(status.into()) }
        }
        Err(status) => Err(status.into()),
    }
}

async fn find(service: &ControlService, name: &str) -> Result<tonic::Response<proto::VolumeReply>, ApiError> {
    let which = Some(Which::Name(name.to_owned()));
    Ok(service.get_volume(Request::new(proto::GetVolumeRequest { which })).await?)
}

#[cfg(test)]
mod tests {
    use datapath::record::{NodeId, Record, VolumeNumber};
    use nbd_server::control::convert::PassHistory;

    use super::*;

    #[test]
    fn a_volume_that_exists_is_the_one_that_is_wanted_or_it_is_said_why_not() {
        let wish = |text: &str| serde_json::from_str::<NewVolume>(text).expect("a wish");
        let record = Record::new(VolumeNumber(1), "v", [0; 16], 2, &[1, 2, 3].map(NodeId));
        let known = VolumeReport::new(Record { min_in_sync: 2, ..record }, PassHistory::default(), &[]);
        assert_eq!(difference(&wish(r#"{"name": "v", "size_bytes": 8192}"#), &known), None);
        assert_eq!(
            difference(&wish(r#"{"name": "v", "size_bytes": 8192, "on": ["a", "b", "c"]}"#), &known),
            None
        );
        for (text, expected) in [
            (r#"{"name": "v", "size_bytes": 4096}"#, "it has 8192 bytes, not 4096"),
            (r#"{"name": "v", "size_bytes": 8192, "replicas": 2}"#, "it has 3 replicas, not 2"),
            (r#"{"name": "v", "size_bytes": 8192, "min_in_sync": 1}"#, "its min_in_sync is 2, not 1"),
        ] {
            assert_eq!(difference(&wish(text), &known).as_deref(), Some(expected));
        }
    }
}
