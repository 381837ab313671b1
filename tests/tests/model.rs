//! The model of the replication protocol is explored in full: whole, it keeps its promises; with any rule left out, it
//! does not.

use stateright::{Checker, HasDiscoveries, Model};
use system_tests::model::{Bounds, Omission, Protocol};

/// Nothing happens but writes.
const CALM: Bounds =
    Bounds { writes: 1, epochs: 1, crashes: 0, removals: 0, fills: 0, reads: false, blocks: 1 };
/// Heads come and go, one of them before it has begun to serve.
const THREE_HEADS: Bounds = Bounds { epochs: 3, ..CALM };
/// A head crashes, or a member, and may come back, while another takes over.
const CRASHES: Bounds = Bounds { writes: 2, epochs: 2, crashes: 1, ..CALM };
/// A member is removed while another process takes over.
const REMOVAL: Bounds = Bounds { writes: 2, epochs: 2, removals: 1, ..CALM };
/// Reads under leases while the head changes and a process crashes.
const LEASES: Bounds = Bounds { epochs: 2, crashes: 1, reads: true, ..CALM };
/// A member is removed, misses writes and is brought back, and a process crashes.
const CATCH_UP: Bounds = Bounds { writes: 2, crashes: 1, removals: 1, fills: 1, blocks: 2, ..CALM };
/// A member that a view change left behind is brought back in the next epoch.
const CATCH_UP_LATER: Bounds = Bounds { writes: 2, epochs: 2, fills: 1, ..CALM };

fn explore(name: &str, bounds: Bounds) {
    let checker = Protocol { bounds, omission: None }.checker().threads(2).spawn_bfs().join();
    println!("figure: {name}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    assert!(checker.is_done());
    checker.assert_no_discovery("an acknowledged write is on every in-sync replica");
    checker.assert_no_discovery("in-sync replicas at one position are equal");
    checker.assert_no_discovery("replicas are equal when an epoch starts");
    checker.assert_no_discovery("no read goes back behind an earlier one or an acknowledged write");
    checker.assert_no_discovery("one head at most has writes acknowledged in an epoch");
    checker.assert_no_discovery("the last in-sync replica is never removed");
    if bounds.epochs > 1 {
        checker.assert_any_discovery("a write is acknowledged in a later epoch");
    }
    if bounds.fills > 0 {
        checker.assert_any_discovery("a replica is brought back");
    }
}

#[test]
fn three_heads_keep_every_promise() {
    explore("three heads", THREE_HEADS);
}

#[test]
fn crashes_keep_every_promise() {
    explore("crashes", CRASHES);
}

#[test]
fn removal_keeps_every_promise() {
    explore("removal", REMOVAL);
}

#[test]
fn leases_keep_every_promise() {
    explore("leases", LEASES);
}

#[test]
fn catch_up_keeps_every_promise() {
    explore("catch-up", CATCH_UP);
}

#[test]
fn catch_up_in_a_later_epoch_keeps_every_promise() {
    let blocks = if std::env::var_os("BERTH_FULL").is_some() { 2 } else { 1 };
    explore("catch-up in a later epoch", Bounds { blocks, ..CATCH_UP_LATER });
}

#[test]
fn every_rule_is_needed() {
    let same_epoch = Bounds { writes: 3, removals: 1, fills: 1, blocks: 2, ..CALM };
    let later = Bounds { blocks: 2, ..CATCH_UP_LATER };
    let refilled = Bounds { writes: 2, crashes: 1, removals: 1, fills: 2, blocks: 2, ..CALM };
    let rules = [
        (Omission::AckBeforeRemoval, CALM),
        (Omission::NoUnion, same_epoch),
        (Omission::VolatilePromise, LEASES),
        (Omission::UnequalStart, CRASHES),
        (Omission::GrantLapsesEarly, LEASES),
        (Omission::GrantForgotten, LEASES),
        (Omission::LeaseNotChecked, LEASES),
        (Omission::GrantsNotAwaited, LEASES),
        (Omission::ReadBeforeCommit, LEASES),
        (Omission::ClaimWhileFilling, refilled),
        (Omission::CommonPointBySequence, later),
        (Omission::SurplusKept, later),
        (Omission::CopyWins, same_epoch),
        (Omission::SourceTooEarly, same_epoch),
        (Omission::AdmittedBehind, same_epoch),
        (Omission::AdmittedTooEarly, same_epoch),
    ];
    let mut harmless = Vec::new();
    for (omission, bounds) in rules {
        let protocol = Protocol { bounds, omission: Some(omission) };
        let checker =
            protocol.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let broken = checker.discoveries().into_iter().find(|(name, _)| {
            checker.model().properties().iter().any(|property| {
                property.name == *name && property.expectation == stateright::Expectation::Always
            })
        });
        match broken {
            Some((name, path)) => {
                println!("{omission:?}: not {name:?}, after {} steps", path.into_actions().len());
            }
            None => harmless.push((omission, checker.unique_state_count())),
        }
    }
    assert!(harmless.is_empty(), "left out without harm, with the states explored: {harmless:?}");
}
