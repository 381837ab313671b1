//! All of it, and what is not as it should be.

use serde::Serialize;
use utoipa::ToSchema;

use super::VolumeReport;

/// How a cluster is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusReport {
    /// Nodes that have ever joined.
    pub nodes: usize,
    /// All volumes, by number.
    pub volumes: Vec<VolumeReport>,
    /// Names of those that have fewer replicas in sync than they want, or one that is not in sync.
    pub degraded: Vec<String>,
    /// Names of those whose last pass found what could not be made good.
    pub damaged: Vec<String>,
}

impl StatusReport {
    /// Judges the volumes.
    #[must_use]
    pub fn new(nodes: usize, volumes: Vec<VolumeReport>) -> StatusReport {
        let is_degraded = |volume: &&VolumeReport| {
            let lacks = u32::try_from(volume.in_sync.len()).is_ok_and(|there| there < volume.replicas_wanted);
            lacks || !volume.stale.is_empty() || !volume.catching_up.is_empty()
        };
        let is_damaged =
            |volume: &&VolumeReport| volume.last_pass.as_ref().is_some_and(|pass| !pass.is_clean());
        let names = |volumes: &mut dyn Iterator<Item = &VolumeReport>| {
            volumes.map(|volume| volume.name.clone()).collect::<Vec<_>>()
        };
        let degraded = names(&mut volumes.iter().filter(is_degraded));
        let damaged = names(&mut volumes.iter().filter(is_damaged));
        StatusReport { nodes, volumes, degraded, damaged }
    }

    /// Is everything as it should be?
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.degraded.is_empty() && self.damaged.is_empty()
    }
}
