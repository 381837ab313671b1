//! The hard rules: which nodes can take a replica at all.

use std::fmt;

use nbd_server::size::Size;

use super::model::{Health, Model, Node, Request};
use crate::heal::FILLS_PER_NODE_MAX;

/// A question whose answer refuses a node or does not.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    IsHere,
    IsNotCordoned,
    IsNotDraining,
    HoldsNone,
    IsInAZoneAllowed,
    HasTheLabels,
    HasRoom,
    HasAFillLeft,
    IsInAZoneWithout,
}

/// All of them, in the order in which they are told.
const RULES: [Rule; 9] = [
    Rule::IsHere,
    Rule::IsNotCordoned,
    Rule::IsNotDraining,
    Rule::HoldsNone,
    Rule::IsInAZoneAllowed,
    Rule::HasTheLabels,
    Rule::HasRoom,
    Rule::HasAFillLeft,
    Rule::IsInAZoneWithout,
];

/// What the rules are asked about.
#[derive(Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) model: &'a Model,
    pub(super) request: &'a Request,
    /// The nodes with a replica that stays, as far as the cluster knows them.
    pub(super) staying: &'a [&'a Node],
}

impl Case<'_> {
    /// Can the node take a replica?
    pub(super) fn is_feasible(&self, node: &Node) -> bool {
        RULES.into_iter().all(|rule| self.is_kept(rule, node))
    }

    /// Every rule that refuses the node, in words.
    pub(super) fn refusals(&self, node: &Node) -> Vec<Refusal> {
        let broken = RULES.into_iter().filter(|rule| !self.is_kept(*rule, node));
        broken.map(|rule| self.refusal(rule, node)).collect()
    }

    fn is_kept(&self, rule: Rule, node: &Node) -> bool {
        let request = self.request;
        match rule {
            Rule::IsHere => node.health == Health::Here,
            Rule::IsNotCordoned => !node.cordoned,
            Rule::IsNotDraining => !node.draining,
            Rule::HoldsNone => !request.holders.contains(&node.id),
            Rule::IsInAZoneAllowed => {
                request.zones.is_empty()
                    || node.zone.as_ref().is_some_and(|zone| request.zones.contains(zone))
            }
            Rule::HasTheLabels => {
                request.labels.iter().all(|(key, value)| node.labels.get(key) == Some(value))
            }
            Rule::HasRoom => request.size_bytes <= self.model.room_bytes(node),
            Rule::HasAFillLeft => !request.needs_fill || node.fills < FILLS_PER_NODE_MAX,
            Rule::IsInAZoneWithout => {
                request.allow_fewer_zones || self.staying.iter().all(|other| other.zone != node.zone)
            }
        }
    }

    fn refusal(&self, rule: Rule, node: &Node) -> Refusal {
        let request = self.request;
        match rule {
            Rule::IsHere => Refusal::Away,
            Rule::IsNotCordoned => Refusal::Cordoned,
            Rule::IsNotDraining => Refusal::Draining,
            Rule::HoldsNone => Refusal::HoldsOne,
            Rule::IsInAZoneAllowed => Refusal::OtherZone { zone: node.zone.clone() },
            Rule::HasTheLabels => {
                let lacking =
                    request.labels.iter().filter(|(key, value)| node.labels.get(*key) != Some(*value));
                Refusal::LacksLabels(lacking.map(|(key, value)| format!("{key}={value}")).collect())
            }
            Rule::HasRoom => {
                Refusal::NoRoom { free_bytes: self.model.room_bytes(node), needed_bytes: request.size_bytes }
            }
            Rule::HasAFillLeft => Refusal::Filling { fills: node.fills },
            Rule::IsInAZoneWithout => Refusal::ZoneHasOne { zone: node.zone.clone() },
        }
    }
}

/// Why a node cannot take a replica. Shown, it goes on from the node's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is not connected.
    Away,
    /// It is cordoned.
    Cordoned,
    /// It is being drained.
    Draining,
    /// It has a replica of the volume, or is getting one.
    HoldsOne,
    /// Its zone is none of those that are allowed.
    OtherZone {
        /// Where it is.
        zone: Option<String>,
    },
    /// It lacks these labels, each as `key=value`.
    LacksLabels(Vec<String>),
    /// Too little space is left.
    NoRoom {
        /// Bytes that may still be promised.
        free_bytes: u64,
        /// Bytes that the replica takes.
        needed_bytes: u64,
    },
    /// It is being filled with as many replicas as may be at a time.
    Filling {
        /// So many.
        fills: usize,
    },
    /// Its zone has a replica, and each is to be in another.
    ZoneHasOne {
        /// Where it is.
        zone: Option<String>,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Away => write!(f, "is away"),
            Refusal::Cordoned => write!(f, "is cordoned"),
            Refusal::Draining => write!(f, "is being drained"),
            Refusal::HoldsOne => write!(f, "holds a replica already"),
            Refusal::OtherZone { zone: Some(zone) } => write!(f, "is in zone {zone} (not allowed)"),
            Refusal::OtherZone { zone: None } => write!(f, "is in no zone"),
            Refusal::LacksLabels(labels) => write!(f, "lacks {}", labels.join(" and ")),
            Refusal::NoRoom { free_bytes, needed_bytes } => {
                let [free, needed] = [free_bytes, needed_bytes].map(|bytes| Size { bytes: *bytes });
                write!(f, "has {free} left of the {needed} that it takes")
            }
            Refusal::Filling { fills } => write!(f, "is being filled with {fills} replicas"),
            Refusal::ZoneHasOne { zone: Some(zone) } => write!(f, "is in zone {zone}, which has a replica"),
            Refusal::ZoneHasOne { zone: None } => write!(f, "is in no zone, like a node that has one"),
        }
    }
}
