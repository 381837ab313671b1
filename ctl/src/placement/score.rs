//! The soft rules: which of the nodes that can take a replica is the best.
//!
//! A score is all rules in one number, the first rule in the highest bits, so that a rule decides only
//! between nodes which those before it hold equal. For a rule to leave anything to the next ones, it looks at
//! steps, not at units.
//!
//! ```text
//!   bits   1      7         7         6           4      5          2       20
//!          near   in zone   in rack   free step   load   replicas   group   free
//! ```

use std::cmp::Reverse;
use std::fmt;

use datapath::record::NodeId;

use super::model::{Model, Node, Request};
use super::rule::{Case, Refusal};

/// Parts of a whole in [`free_ppm`].
pub(super) const PPM: u64 = 1_000_000;
/// Two points of free space are a step.
const FREE_STEP_PPM: u64 = 20_000;
/// A tenth of load is a step.
const LOAD_STEP_PERMILLE: u32 = 100;
/// Counts in zones and racks stop here; a volume has 64 replicas at most.
const COUNT_MAX: u64 = 127;

/// What placement says of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scored {
    /// The node.
    pub node: NodeId,
    /// Can it take a replica, and how good is it?
    pub verdict: Verdict,
}

/// Whether a node can take a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can.
    Feasible {
        /// More is better. It means something only beside the others of the same answer; equal ones go by
        /// node.
        score: u64,
        /// What made it, the weightiest first.
        reasons: Vec<Reason>,
    },
    /// It cannot, for every one of these reasons.
    Refused(Vec<Refusal>),
}

/// What speaks for or against a node. Shown, it is a short phrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The task runs there.
    TaskNode,
    /// Its zone, if it is in one.
    Zone {
        /// The zone's name.
        zone: String,
        /// Replicas there, before this one.
        replicas: u64,
    },
    /// Its rack, if it is in one.
    Rack {
        /// The rack's name.
        rack: String,
        /// Replicas there, before this one.
        replicas: u64,
    },
    /// Space that stays free, in percent of what may be promised, rounded down.
    Free {
        /// With this replica.
        percent: u64,
    },
    /// How busy it is.
    Load {
        /// In permille.
        permille: u32,
    },
    /// Replicas of all volumes.
    Replicas(usize),
    /// It has a volume that this one should be with.
    Together,
    /// It has a volume that this one should not be with.
    Apart,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::TaskNode => write!(f, "the task runs here"),
            Reason::Zone { zone, replicas: 0 } => write!(f, "the first in zone {zone}"),
            Reason::Zone { zone, replicas } => write!(f, "zone {zone} has {replicas} already"),
            Reason::Rack { rack, replicas: 0 } => write!(f, "the first in rack {rack}"),
            Reason::Rack { rack, replicas } => write!(f, "rack {rack} has {replicas} already"),
            Reason::Free { percent } => write!(f, "{percent} % stays free"),
            Reason::Load { permille } => write!(f, "load {}.{} %", permille / 10, permille % 10),
            Reason::Replicas(1) => write!(f, "1 replica"),
            Reason::Replicas(count) => write!(f, "{count} replicas"),
            Reason::Together => write!(f, "with a volume of its group"),
            Reason::Apart => write!(f, "beside a volume that it should be apart from"),
        }
    }
}

/// A node that can take a replica.
pub(super) struct Candidate<'a> {
    pub(super) node: &'a Node,
    /// The lower bits of the score: what does not change while nodes are chosen.
    merit: u64,
    is_near: bool,
    in_zone: u64,
    in_rack: u64,
}

impl<'a> Candidate<'a> {
    /// How the node does for the case. It must be feasible.
    fn new(case: Case<'_>, node: &'a Node) -> Candidate<'a> {
        let is_near = case.request.near == Some(node.id);
        let merit = merit(case.model, case.request, node);
        let (in_zone, in_rack) = crowd(node, case.staying);
        Candidate { node, merit, is_near, in_zone, in_rack }
    }

    /// See the module's text.
    pub(super) fn score(&self) -> u64 {
        let spread = [self.in_zone, self.in_rack].map(|count| COUNT_MAX - count.min(COUNT_MAX));
        let ranked = (u64::from(self.is_near) << 14) | (spread[0] << 7) | spread[1];
        (ranked << MERIT_BITS) | self.merit
    }

    fn rank(&self) -> (u64, Reverse<NodeId>) {
        (self.score(), Reverse(self.node.id))
    }

    /// Another node gets a replica.
    fn sees(&mut self, other: &Node) {
        let (in_zone, in_rack) = crowd(self.node, &[other]);
        (self.in_zone, self.in_rack) = (self.in_zone + in_zone, self.in_rack + in_rack);
    }

    /// The score in words.
    pub(super) fn reasons(&self, case: Case<'_>) -> Vec<Reason> {
        let (node, group) = (self.node, group(case.request, self.node));
        let zone = node.zone.clone().map(|zone| Reason::Zone { zone, replicas: self.in_zone });
        let rack = node.rack.clone().map(|rack| Reason::Rack { rack, replicas: self.in_rack });
        let percent = free_ppm(case.model, node, case.request.size_bytes) / (PPM / 100);
        let reasons = [
            self.is_near.then_some(Reason::TaskNode),
            zone,
            rack,
            Some(Reason::Free { percent }),
            Some(Reason::Load { permille: node.load_permille }),
            Some(Reason::Replicas(node.replicas)),
            (group == GROUP_TOGETHER).then_some(Reason::Together),
            (group == GROUP_APART).then_some(Reason::Apart),
        ];
        reasons.into_iter().flatten().collect()
    }
}

/// The nodes that can take a replica, and those that are chosen from them.
pub(super) struct Field<'a> {
    pub(super) chosen: Vec<Candidate<'a>>,
    pub(super) left: Vec<Candidate<'a>>,
}

impl<'a> Field<'a> {
    /// Chooses as many as are wanted, or as many as there are.
    ///
    /// One after another, each time the best. That gives the best spread there is: every node counts for one
    /// zone and one rack of it, and where nodes are taken from the emptiest zone first, no other choice
    /// leaves fewer together.
    pub(super) fn choose(case: Case<'a>) -> Field<'a> {
        let nodes = case.model.nodes.iter().filter(|node| case.is_feasible(node));
        let mut field = Field {
            chosen: Vec::with_capacity(case.request.replicas.min(case.model.nodes.len())),
            left: nodes.map(|node| Candidate::new(case, node)).collect(),
        };
        while field.chosen.len() < case.request.replicas {
            let may = |candidate: &Candidate<'_>| case.request.allow_fewer_zones || candidate.in_zone == 0;
            let open = field.left.iter().enumerate().filter(|(_, candidate)| may(candidate));
            let Some((best, _)) = open.max_by_key(|(_, candidate)| candidate.rank()) else { break };
            let best = field.left.swap_remove(best);
            field.left.iter_mut().for_each(|candidate| candidate.sees(best.node));
            field.chosen.push(best);
        }
        field
    }

    /// Those that are left, the best first.
    pub(super) fn sort_left(&mut self) {
        self.left.sort_unstable_by_key(|candidate| Reverse(candidate.rank()));
    }
}

/// How many of the others are in the node's zone, and in its rack.
pub(super) fn crowd(node: &Node, others: &[&Node]) -> (u64, u64) {
    let mut counts = (0, 0);
    for other in others.iter().filter(|other| other.zone == node.zone) {
        counts.0 += 1;
        counts.1 += u64::from(other.rack == node.rack);
    }
    counts
}

const GROUP_APART: u64 = 0;
const GROUP_TOGETHER: u64 = 2;

/// How well the node suits the volume's group; 1: it has nothing to do with it, or something on both sides.
pub(super) fn group(request: &Request, node: &Node) -> u64 {
    match (request.together.contains(&node.id), request.apart.contains(&node.id)) {
        (true, false) => GROUP_TOGETHER,
        (false, true) => GROUP_APART,
        _ => 1,
    }
}

/// What of the node's limit stays free with a replica of this size, which must fit, in millionths. None of no
/// limit.
fn free_ppm(model: &Model, node: &Node, size_bytes: u64) -> u64 {
    let free_bytes = model.room_bytes(node) - size_bytes;
    let share = (u128::from(free_bytes) * u128::from(PPM)).checked_div(u128::from(model.limit_bytes(node)));
    u64::try_from(share.unwrap_or(0)).expect("a part of the limit")
}

const MERIT_BITS: u32 = 6 + 4 + 5 + 2 + 20;

fn merit(model: &Model, request: &Request, node: &Node) -> u64 {
    let free = free_ppm(model, node, request.size_bytes);
    let free_step = free / FREE_STEP_PPM;
    let idle_step = 10 - u64::from((node.load_permille / LOAD_STEP_PERMILLE).min(10));
    // Of thousands, a few more mean nothing.
    let few_step = 31 - u64::from(node.replicas.saturating_add(1).ilog2().min(31));
    let steps = (((free_step << 4) | idle_step) << 5) | few_step;
    (((steps << 2) | group(request, node)) << 20) | free
}
