//! Between a node and `berth ctl`: the messages, their limits, and the node's link.
//!
//! The service is `berth.v1.Control` (`proto/berth/v1/control.proto`). Whoever receives a message converts it at once
//! ([`convert`]), so that past the edge there are only checked values.

pub mod backoff;
pub mod convert;
pub mod limits;
pub mod link;
mod session;

/// The generated messages, client and server.
#[allow(clippy::all, clippy::pedantic, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("berth.v1");
}
