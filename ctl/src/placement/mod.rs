//! Which nodes get the replicas of a volume, and how large a volume can be. Pure functions of what there is:
//! the same question has the same answer, whoever asks: the making of volumes, healing, rebalancing, or a
//! scheduler.
//!
//! ```text
//!   Model ──▶ hard rules ──▶ feasible ──▶ soft rules, one node after another ──▶ chosen
//!   Request      │                           zone, rack, task's node, free space,
//!                ▼                           load, few replicas, group
//!             refused ───────▶ NotEnough, if they are too few
//! ```
//!
//! Hard rules refuse a node: it is away, cordoned or drained, holds a replica already, lacks the space, a
//! label, or a fill that it may begin, or is in a zone that is not allowed. Soft rules order the others, each
//! only those that the rules before it hold equal. So no two replicas come into one zone while a zone without
//! one could take it. Only the task's node is taken before all others. Where no replica is placed yet this
//! costs no spread.

mod census;
mod error;
mod model;
mod rebalance;
mod rule;
mod score;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use datapath::record::NodeId;
use datapath::units::BLOCK_BYTES_U64;

pub use self::census::{census, size_bytes};
pub use self::error::{NotEnough, RefusedNode};
pub use self::model::{Health, Model, Node, Request};
pub use self::rebalance::{DEAD_BAND_PERCENT, Move, Volume, rebalance};
pub use self::rule::Refusal;
pub use self::score::{Reason, Scored, Verdict};

use self::rule::Case;
use self::score::{Candidate, Field};

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// As many nodes as were to be chosen, the best first.
    pub chosen: Vec<NodeId>,
    /// Every node of the cluster: the chosen ones in their order, those that would be next, the best first,
    /// with scores that count the chosen ones' replicas as there, and those that are refused, by number.
    pub nodes: Vec<Scored>,
}

/// Places replicas, and tells of every node why it is where it is in the order.
///
/// # Errors
/// If fewer nodes can take one than are to be chosen.
pub fn place(model: &Model, request: &Request) -> Result<Placement, NotEnough> {
    let staying = holders(model, request);
    let case = Case { model, request, staying: &staying };
    let mut field = Field::choose(case);
    if field.chosen.len() < request.replicas {
        return Err(NotEnough::new(case, field.chosen.len()));
    }
    field.sort_left();
    let chosen = field.chosen.iter().map(|candidate| candidate.node.id).collect();
    let feasible = field.chosen.iter().chain(&field.left).map(|candidate| scored(case, candidate));
    let mut nodes: Vec<Scored> = feasible.collect();
    let refused = error::refused(case).into_iter();
    nodes.extend(refused.map(|it| Scored { node: it.node, verdict: Verdict::Refused(it.refusals) }));
    Ok(Placement { chosen, nodes })
}

/// The nodes that [`place`] chooses, without the reasons. Nothing where it fails. Takes time and memory in
/// proportion to the nodes.
#[must_use]
pub fn choose(model: &Model, request: &Request) -> Option<Vec<NodeId>> {
    let staying = holders(model, request);
    let field = Field::choose(Case { model, request, staying: &staying });
    let chosen: Vec<NodeId> = field.chosen.iter().map(|candidate| candidate.node.id).collect();
    (chosen.len() == request.replicas).then_some(chosen)
}

/// The largest size in bytes, a whole number of blocks, with which the request would succeed; 0 if it would
/// with none. Its own size does not matter. Where no node is to be chosen, any size does.
#[must_use]
pub fn largest_volume(model: &Model, request: &Request) -> u64 {
    let request = Request { size_bytes: 0, ..request.clone() };
    let staying = holders(model, &request);
    let case = Case { model, request: &request, staying: &staying };
    let feasible = model.nodes.iter().filter(|node| case.is_feasible(node));
    let rooms = feasible.map(|node| (node.zone.as_deref(), model.room_bytes(node)));
    let mut rooms: Vec<u64> = if request.allow_fewer_zones {
        rooms.map(|(_, room)| room).collect()
    } else {
        // One node of each zone is all that counts.
        let mut zones = BTreeMap::new();
        rooms.for_each(|(zone, room)| {
            let most = zones.entry(zone).or_insert(room);
            *most = room.max(*most);
        });
        zones.into_values().collect()
    };
    rooms.sort_unstable_by(|one, other| other.cmp(one));
    let smallest = match request.replicas.checked_sub(1) {
        Some(last) => rooms.get(last).copied().unwrap_or(0),
        None => u64::MAX,
    };
    smallest / BLOCK_BYTES_U64 * BLOCK_BYTES_U64
}

fn holders<'a>(model: &'a Model, request: &Request) -> Vec<&'a Node> {
    if request.holders.is_empty() {
        return Vec::new();
    }
    model.nodes.iter().filter(|node| request.holders.contains(&node.id)).collect()
}

fn scored(case: Case<'_>, candidate: &Candidate<'_>) -> Scored {
    let verdict = Verdict::Feasible { score: candidate.score(), reasons: candidate.reasons(case) };
    Scored { node: candidate.node.id, verdict }
}
