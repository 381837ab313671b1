//! What is told of volumes and nodes: the same words on the command line, with `--output json`, and over REST.

mod node;
mod pass;
mod status;
mod volume;

use datapath::record::NodeId;

pub use node::NodeReport;
pub use pass::{FindingReport, HoldingReport, PassReport, age};
pub use status::StatusReport;
pub use volume::{StaleReport, VolumeReport};

/// Numbers of nodes and their names.
pub type Names = [(u32, String)];

/// The node's name; one that is not in the register keeps its number.
fn name_of(node: NodeId, names: &Names) -> String {
    let known = names.iter().find(|(number, _)| *number == node.0);
    known.map_or_else(|| format!("number {}", node.0), |(_, name)| name.clone())
}
