//! A model of the replication protocol: views, write-all, leases and catch-up, small enough to be explored in full.
//!
//! A state holds the volume's record in the record store, the compare-and-swaps on their way to it, the replicas, the
//! processes' memory and the messages. An action is one step of one party. Messages are lost by never being
//! delivered, answers by never being read, and a message that was not acknowledged may come again and late. Time is
//! in the model only as far as leases need it: a grant ends at the head before it ends at the member.
//!
//! What every state must satisfy is in [`properties`]. Each rule of the protocol can be left out ([`Omission`]); the
//! checker must then find a state that breaks a promise, or the rule, or the model, is not worth its place.

mod actions;
mod catch_up;
mod properties;
mod state;
mod view;

pub use actions::Action;
pub use state::{Record, State};

use stateright::{Model, Property};

/// Replicas of the volume; each is on a node of its own, and each node may be the head.
pub const NODES: usize = 3;
/// Blocks of the volume.
pub const BLOCKS: usize = 2;

/// A rule that is left out, to see that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Omission {
    /// A write is acknowledged without a member that is still in the record.
    AckBeforeRemoval,
    /// While a change of the record is open, only the old members are asked.
    NoUnion,
    /// A promise is forgotten at a restart.
    VolatilePromise,
    /// The new head starts without bringing the members to one position.
    UnequalStart,
    /// A member counts its grant from when it was asked, not from its answer: it may lapse before the head's.
    GrantLapsesEarly,
    /// A restarted member does not assume that it had granted a lease.
    GrantForgotten,
    /// The head reads without looking at its leases.
    LeaseNotChecked,
    /// A new head does not wait for the grants of its members.
    GrantsNotAwaited,
    /// A read returns a write that is not committed.
    ReadBeforeCommit,
    /// A replica that is being filled claims its highest sequence.
    ClaimWhileFilling,
    /// The common point ignores where earlier epochs ended.
    CommonPointBySequence,
    /// What a returning replica has past the common point stays.
    SurplusKept,
    /// A copied block wins over a live write.
    CopyWins,
    /// The source is read before it has reached the first mirrored write.
    SourceTooEarly,
    /// A replica is admitted before it has every write that was committed without it.
    AdmittedBehind,
    /// A replica is admitted before it has every write whose effect it was sent in a copy.
    AdmittedTooEarly,
}

/// How far the model goes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Writes of clients.
    pub writes: u8,
    /// The last epoch.
    pub epochs: u8,
    /// Crashes.
    pub crashes: u8,
    /// Removals of a member by the head.
    pub removals: u8,
    /// Replicas brought back.
    pub fills: u8,
    /// Are there reads, and so leases?
    pub reads: bool,
    /// Blocks that are written.
    pub blocks: u8,
}

/// The protocol within bounds, whole or with one rule left out.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// How far to go.
    pub bounds: Bounds,
    /// What to leave out.
    pub omission: Option<Omission>,
}

impl Protocol {
    fn omits(&self, omission: Omission) -> bool {
        self.omission == Some(omission)
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::beginning()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.list_actions(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        self.act(&mut next, action).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
