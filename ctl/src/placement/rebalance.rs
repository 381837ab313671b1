//! Which replicas move from full nodes to emptier ones. A pure function of what there is: applied again and
//! again, it comes to rest.
//!
//! A move goes from a node to one that is emptier by more than the dead band, and leaves it no fuller than
//! the node that it came from. So the sum of reserved · reserved / limit over all nodes falls with every
//! move, and no state comes twice; and both nodes stay between what they were, so that the spread never
//! grows.
//!
//! ```text
//!   100 % ┤  source ▇─┐                 moved only if ▇ stays at or above ▁,
//!         │         ▇ │ one replica     and the gap before is above the dead band
//!         │           ▼
//!         │  target ▁
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use datapath::record::{NodeId, VolumeNumber};

use super::model::{Health, Model, Node, Request};
use super::rule::Case;
use super::score::{PPM, crowd, group};
use crate::heal::FILLS_PER_NODE_MAX;

/// Points of utilisation by which two nodes may differ: nothing moves for less.
pub const DEAD_BAND_PERCENT: u64 = 5;
const DEAD_BAND_PPM: u64 = DEAD_BAND_PERCENT * (PPM / 100);

/// A volume whose replicas may move now: one that neither heals nor moves already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Which one.
    pub number: VolumeNumber,
    /// The request that would place one more replica. Its `holders` are the nodes that have one; that of
    /// `near` stays. How many it wants, and whether they are to be filled, does not matter.
    pub request: Request,
}

/// A replica moves: one is added, and once it is in sync, the other is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Whose.
    pub volume: VolumeNumber,
    /// The node that gets a replica.
    pub add: NodeId,
    /// The node whose replica is removed then.
    pub remove: NodeId,
}

/// At most `budget` moves that make the utilisation of nodes more equal, and at most one for each volume.
///
/// Each obeys every hard rule, with the moves before it counted as begun: what they add is there, what they
/// remove is not free yet. None puts a replica where its zone, or rack, has more of the volume than that of
/// the node that it leaves. Nodes that are away or drain are left to those who care for them.
/// `reserved_bytes` of the model must count the replicas of `volumes`. The order of nodes and volumes means
/// nothing.
#[must_use]
pub fn rebalance(model: &Model, volumes: &[Volume], budget: usize) -> Vec<Move> {
    let mut plan = Plan::new(model, volumes);
    let mut moves = Vec::new();
    while moves.len() < budget {
        let Some(step) = plan.next() else { break };
        plan.apply(&step);
        moves.push(Move {
            volume: step.volume.number,
            add: plan.model.nodes[step.target].id,
            remove: plan.model.nodes[step.source].id,
        });
    }
    moves
}

/// One that is found, by places in the model.
struct Step<'a> {
    volume: &'a Volume,
    source: usize,
    target: usize,
}

struct Plan<'a> {
    /// As it is while the moves are under way: what is added is there, and nothing is removed.
    model: Model,
    /// Where in the model a node is.
    places: BTreeMap<NodeId, usize>,
    /// Bytes reserved on each node after the moves.
    settled_bytes: Vec<u64>,
    /// By node: the volumes that may move away, the largest first.
    volumes: BTreeMap<NodeId, Vec<&'a Volume>>,
    moved: BTreeSet<VolumeNumber>,
    /// Nodes from which nothing can move. What other moves change for them, the next call sees.
    done: BTreeSet<usize>,
}

impl<'a> Plan<'a> {
    fn new(model: &Model, volumes: &'a [Volume]) -> Plan<'a> {
        let mut by_node: BTreeMap<NodeId, Vec<&Volume>> = BTreeMap::new();
        for volume in volumes.iter().filter(|volume| volume.request.size_bytes > 0) {
            let request = &volume.request;
            for node in request.holders.iter().filter(|node| request.near != Some(**node)) {
                by_node.entry(*node).or_default().push(volume);
            }
        }
        let order = |volume: &&Volume| (Reverse(volume.request.size_bytes), volume.number);
        by_node.values_mut().for_each(|volumes| volumes.sort_unstable_by_key(order));
        Plan {
            model: model.clone(),
            places: model.nodes.iter().enumerate().map(|(place, node)| (node.id, place)).collect(),
            settled_bytes: model.nodes.iter().map(|node| node.reserved_bytes).collect(),
            volumes: by_node,
            moved: BTreeSet::new(),
            done: BTreeSet::new(),
        }
    }

    /// The next move: from the fullest node that can give one to the emptiest that can take it, and of the
    /// largest volume with which that is so.
    fn next(&mut self) -> Option<Step<'a>> {
        let nodes = self.model.nodes.iter().enumerate();
        let mut targets: Vec<(u64, NodeId, usize)> =
            nodes.map(|(place, node)| (self.utilisation_ppm(place), node.id, place)).collect();
        let mut sources = targets.clone();
        targets.sort_unstable();
        sources.sort_unstable_by_key(|(utilisation_ppm, id, _)| (Reverse(*utilisation_ppm), *id));
        for (source_ppm, _, source) in sources {
            if !self.may_give(source) {
                continue;
            }
            let emptier = targets.iter().take_while(|it| it.0.saturating_add(DEAD_BAND_PPM) < source_ppm);
            let emptier: Vec<usize> = emptier.map(|(_, _, target)| *target).collect();
            if let Some(step) = self.step(source, &emptier) {
                return Some(step);
            }
            self.done.insert(source);
        }
        None
    }

    fn apply(&mut self, step: &Step<'a>) {
        let size_bytes = step.volume.request.size_bytes;
        let target = &mut self.model.nodes[step.target];
        target.reserved_bytes += size_bytes;
        (target.replicas, target.fills) = (target.replicas + 1, target.fills + 1);
        self.settled_bytes[step.target] += size_bytes;
        self.settled_bytes[step.source] -= size_bytes;
        self.moved.insert(step.volume.number);
    }

    fn may_give(&self, source: usize) -> bool {
        let node = &self.model.nodes[source];
        node.health == Health::Here && !node.draining && !self.done.contains(&source)
    }

    /// What is reserved, in millionths of the limit. A node that has promised what it has not at all is
    /// fuller than any.
    fn utilisation_ppm(&self, place: usize) -> u64 {
        let settled_bytes = u128::from(self.settled_bytes[place]);
        match self.model.limit_bytes(&self.model.nodes[place]) {
            0 if settled_bytes > 0 => u64::MAX,
            limit => {
                u64::try_from(settled_bytes * u128::from(PPM) / u128::from(limit.max(1))).unwrap_or(u64::MAX)
            }
        }
    }

    fn step(&self, source: usize, targets: &[usize]) -> Option<Step<'a>> {
        if targets.is_empty() {
            return None;
        }
        let replicas = self.replicas(source);
        targets.iter().find_map(|target| {
            let moves = |replica: &&Replica<'a, '_>| {
                self.stays_above(source, *target, replica.volume.request.size_bytes)
                    && self.may_take(*target, replica)
            };
            replicas.iter().find(moves).map(|it| Step { volume: it.volume, source, target: *target })
        })
    }

    /// What the node can give, the largest first.
    fn replicas(&self, source: usize) -> Vec<Replica<'a, '_>> {
        let from = &self.model.nodes[source];
        let volumes = self.volumes.get(&from.id).into_iter().flatten();
        let free = volumes.filter(|volume| !self.moved.contains(&volume.number));
        let replica = |volume: &&'a Volume| {
            let request = &volume.request;
            let places =
                request.holders.iter().filter_map(|id| self.places.get(id)).filter(|it| **it != source);
            let staying: Vec<&Node> = places.map(|place| &self.model.nodes[*place]).collect();
            Replica { volume, crowd: crowd(from, &staying), group: group(request, from), staying }
        };
        free.map(replica).collect()
    }

    /// Is the source no emptier than the target after so much moved? Exact: this is what brings rest.
    fn stays_above(&self, source: usize, target: usize, size_bytes: u64) -> bool {
        let limit_bytes = |place: usize| u128::from(self.model.limit_bytes(&self.model.nodes[place]));
        let Some(source_bytes) = self.settled_bytes[source].checked_sub(size_bytes) else { return false };
        let target_bytes = u128::from(self.settled_bytes[target]) + u128::from(size_bytes);
        // The left side fits always. The right one may not, and is the greater then.
        let left = u128::from(source_bytes) * limit_bytes(target);
        target_bytes.checked_mul(limit_bytes(source)).is_some_and(|right| left >= right)
    }

    /// The hard rules, and those of the spread and the group.
    fn may_take(&self, target: usize, replica: &Replica<'_, '_>) -> bool {
        let to = &self.model.nodes[target];
        let request = &replica.volume.request;
        to.fills < FILLS_PER_NODE_MAX
            && crowd(to, &replica.staying) <= replica.crowd
            && Case { model: &self.model, request, staying: &replica.staying }.is_feasible(to)
            && group(request, to) >= replica.group
    }
}

/// One that its node can give.
struct Replica<'a, 'm> {
    volume: &'a Volume,
    /// The nodes with the volume's other replicas.
    staying: Vec<&'m Node>,
    /// How many of them are in the node's zone, and in its rack.
    crowd: (u64, u64),
    /// How well the node suits the volume's group.
    group: u64,
}
