//! What every state must satisfy, and what some state must, lest the model prove nothing.

use stateright::Property;

use super::state::State;
use super::{BLOCKS, Protocol};

pub(super) fn all() -> Vec<Property<Protocol>> {
    vec![
        Property::always("an acknowledged write is on every in-sync replica", |_, state: &State| {
            state.record.in_sync.iter().all(|member| {
                let node = &state.nodes[member];
                node.base.is_none() && (0..BLOCKS).all(|block| node.data[block] >= state.acked[block])
            })
        }),
        Property::always("in-sync replicas at one position are equal", |_, state: &State| {
            let members: Vec<_> = state.record.in_sync.iter().map(|member| &state.nodes[member]).collect();
            members
                .iter()
                .all(|one| members.iter().all(|other| one.last != other.last || one.data == other.data))
        }),
        Property::always("replicas are equal when an epoch starts", |_, state: &State| !state.unequal),
        Property::always(
            "no read goes back behind an earlier one or an acknowledged write",
            |_, state: &State| !state.went_back,
        ),
        Property::always("one head at most has writes acknowledged in an epoch", |_, state: &State| {
            let by = &state.acked_by;
            by.iter().all(|(epoch, node)| by.iter().all(|(other, also)| epoch != other || node == also))
        }),
        Property::always("the last in-sync replica is never removed", |_, state: &State| {
            !state.record.in_sync.is_empty()
        }),
        Property::sometimes("a replica is brought back", |_, state: &State| state.admitted),
        Property::sometimes("a write is acknowledged in a later epoch", |_, state: &State| {
            state.acked_by.iter().any(|(epoch, _)| *epoch > 1)
        }),
    ]
}
