//! What REST answers when it does not do what was asked: a code for programs, a message and what to do for people.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tonic::{Code, Status};
use utoipa::ToSchema;

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    what_to_do: &'static str,
}

/// The body of every answer that is an error.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorText,
}

/// See the fields.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorText {
    /// For programs; does not change between versions.
    #[schema(example = "not_found")]
    pub code: &'static str,
    /// What is wrong, exactly.
    #[schema(example = "there is no volume data")]
    pub message: String,
    /// What helps.
    #[schema(example = "GET /v1/volumes and GET /v1/nodes list what there is")]
    pub what_to_do: &'static str,
}

const LOOK_FIRST: &str = "GET /v1/volumes and GET /v1/nodes list what there is";
const READ_THE_DOCUMENT: &str = "GET /v1/openapi.json describes every request";

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: String, what_to_do: &'static str) -> ApiError {
        ApiError { status, code, message, what_to_do }
    }

    pub(super) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid", message.into(), READ_THE_DOCUMENT)
    }

    pub(super) fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", message.into(), LOOK_FIRST)
    }

    pub(super) fn exists(message: impl Into<String>) -> ApiError {
        let what_to_do = "choose another name, or delete the volume first";
        ApiError::new(StatusCode::CONFLICT, "exists", message.into(), what_to_do)
    }

    pub(super) fn no_such_path(path: &str) -> ApiError {
        let message = format!("there is nothing at {path}");
        ApiError::new(StatusCode::NOT_FOUND, "no_such_path", message, READ_THE_DOCUMENT)
    }

    pub(super) fn wrong_method(method: &str, path: &str) -> ApiError {
        let message = format!("{path} does not know {method}");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", message, READ_THE_DOCUMENT)
    }

    pub(super) fn too_slow() -> ApiError {
        let message = "the request did not arrive in time".to_owned();
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "too_slow", message, "send it again")
    }

    pub(super) fn not_led(volume: &str, node: &str) -> ApiError {
        let message = format!("volume {volume} is attached to node {node}, which does not lead it yet");
        let what_to_do = "ask again: attaching it there once more waits for that, and changes nothing";
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "not_led_yet", message, what_to_do)
    }
}

/// What the service says, whichever face asks.
impl From<Status> for ApiError {
    fn from(status: Status) -> ApiError {
        let (http, code, what_to_do) = match status.code() {
            Code::InvalidArgument => (StatusCode::BAD_REQUEST, "invalid", READ_THE_DOCUMENT),
            Code::NotFound => (StatusCode::NOT_FOUND, "not_found", LOOK_FIRST),
            Code::AlreadyExists => {
                (StatusCode::CONFLICT, "exists", "choose another name, or delete the volume first")
            }
            Code::Aborted => (
                StatusCode::CONFLICT,
                "changed_meanwhile",
                "look at it again, and ask again if that is still meant",
            ),
            Code::FailedPrecondition => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "not_possible_now",
                "the message says what stands against it; change that, or the request",
            ),
            Code::ResourceExhausted => {
                (StatusCode::UNPROCESSABLE_ENTITY, "limit_reached", "delete what is not needed any more")
            }
            Code::Unavailable | Code::DeadlineExceeded => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "ask again in some seconds")
            }
            _ => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "failed",
                "the log of berth ctl says more; it may have been done all the same, so look before asking again",
            ),
        };
        ApiError::new(http, code, status.message().to_owned(), what_to_do)
    }
}

/// A body that is none.
impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> ApiError {
        let (code, what_to_do) = match rejection.status() {
            StatusCode::UNSUPPORTED_MEDIA_TYPE => ("not_json", "send Content-Type: application/json"),
            StatusCode::PAYLOAD_TOO_LARGE => ("too_large", "no request needs more than 64 KiB"),
            _ => ("invalid", READ_THE_DOCUMENT),
        };
        let status = match rejection.status() {
            // Well-formed JSON that is no request is as malformed as any.
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            status => status,
        };
        ApiError::new(status, code, rejection.body_text(), what_to_do)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let ApiError { status, code, message, what_to_do } = self;
        (status, Json(ErrorBody { error: ErrorText { code, message, what_to_do } })).into_response()
    }
}
