//! Deleting volumes: the record goes at once, what nodes hold when they hear of it.

use std::time::Duration;

use nbd_server::control::proto;
use nbd_server::volume_name::VolumeNameError;
use tokio::time::{Instant, sleep};
use tonic::{Response, Status};

use super::{ControlService, invalid, volume_reply};
use crate::record_store::VolumeKey;

/// A head whose volume has just been detached lets go within this time.
const LETTING_GO: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl ControlService {
    pub(super) async fn delete(
        &self,
        message: proto::DeleteVolumeRequest,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        let key = VolumeKey::Name(message.name.parse().map_err(|error: VolumeNameError| invalid(error))?);
        if !message.force {
            self.refuse_if_led(&key).await?;
        }
        let record = self.call(move |store| store.delete(&key)).await?;
        tracing::info!(volume = record.name, number = record.volume.0, "volume deleted");
        Ok(volume_reply(&record))
    }

    /// Whoever uses the volume would lose it under their hands.
    async fn refuse_if_led(&self, key: &VolumeKey) -> Result<(), Status> {
        let start = Instant::now();
        loop {
            let wanted = key.clone();
            let record = self.call(move |store| store.get(&wanted)).await?;
            let here = self.passes.connected();
            let led =
                record.living_head().filter(|head| record.attached.is_none() && here.contains(&head.node));
            let Some(head) = led else { return Ok(()) };
            if start.elapsed() >= LETTING_GO {
                let node = self.name_of(head.node).await;
                return Err(Status::failed_precondition(format!(
                    "volume {key} is led by node {node} and may be in use there; if it is not, delete it with --force"
                )));
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    pub(super) async fn deleted(
        &self,
        message: proto::GetDeletedRequest,
    ) -> Result<Response<proto::GetDeletedReply>, Status> {
        let volume = nbd_server::control::convert::volume_from_number(message.volume).map_err(invalid)?;
        match self.call(move |store| store.deleted(volume)).await? {
            Some(lineage) => Ok(Response::new(proto::GetDeletedReply { lineage: lineage.to_vec() })),
            None => {
                Err(Status::not_found(format!("nothing is known of a volume with the number {}", volume.0)))
            }
        }
    }
}
