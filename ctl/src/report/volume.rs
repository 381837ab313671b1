//! A volume and its replicas.

use datapath::record::{NodeId, Record};
use datapath::units::BLOCK_BYTES_U64;
use nbd_server::control::convert::{MessageError, PassHistory, history_from_message, record_from_message};
use nbd_server::control::proto;
use nbd_server::size::Size;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Names, PassReport, name_of};

/// A volume as it is printed. Nodes are named; one without a name in the register keeps its number.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VolumeReport {
    pub name: String,
    pub number: u32,
    pub size_bytes: u64,
    pub version: u64,
    pub epoch: u32,
    pub started: bool,
    /// The node that leads it, if any does.
    pub head: Option<String>,
    /// The node that is to lead it.
    pub attached: Option<String>,
    pub in_sync: Vec<String>,
    pub catching_up: Vec<String>,
    pub stale: Vec<StaleReport>,
    /// Of those catching up or stale: added, and not in sync since.
    pub fresh: Vec<String>,
    /// Of all replicas: those that are to go, because their nodes are drained.
    pub leaving: Vec<String>,
    pub min_in_sync: u32,
    pub replicas_wanted: u32,
    /// When the pass over it that is under way began, in seconds since 1970.
    pub pass_began_at: Option<u64>,
    /// The last pass that saw everything.
    pub last_pass: Option<PassReport>,
}

/// A replica that was left out.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StaleReport {
    pub node: String,
    pub since_version: u64,
}

impl VolumeReport {
    /// As its record and what is kept of passes say.
    #[must_use]
    pub fn new(record: Record, passes: PassHistory, names: &Names) -> VolumeReport {
        let name = |node: NodeId| name_of(node, names);
        let all = |nodes: &[NodeId]| nodes.iter().copied().map(name).collect();
        VolumeReport {
            number: record.volume.0,
            size_bytes: record.size_blocks * BLOCK_BYTES_U64,
            version: record.version,
            epoch: record.epoch,
            started: record.started,
            head: record.living_head().map(|head| name(head.node)),
            attached: record.attached.map(name),
            in_sync: all(&record.in_sync),
            catching_up: all(&record.catching_up),
            stale: record
                .stale
                .iter()
                .map(|stale| StaleReport { node: name(stale.node), since_version: stale.since_version })
                .collect(),
            fresh: all(&record.fresh),
            leaving: all(&record.leaving),
            min_in_sync: record.min_in_sync,
            replicas_wanted: record.replicas_wanted,
            pass_began_at: passes.began_at,
            last_pass: passes.last.map(|last| PassReport::new(last, names)),
            name: record.name,
        }
    }

    /// The same, as they are sent.
    ///
    /// # Errors
    /// What is wrong with the messages.
    pub fn of_messages(
        record: proto::Record,
        check: Option<proto::CheckState>,
        names: &Names,
    ) -> Result<VolumeReport, MessageError> {
        let passes = history_from_message(check.unwrap_or_default())?;
        Ok(VolumeReport::new(record_from_message(record)?, passes, names))
    }

    /// Its size, for people.
    #[must_use]
    pub fn size(&self) -> String {
        Size { bytes: self.size_bytes }.to_string()
    }
}
