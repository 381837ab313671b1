//! The simulator judges rightly: a correct server passes, and every planted bug is found.

use std::panic::catch_unwind;

use system_tests::sim::canary::{BUGS, Bug, CanarySubject};
use system_tests::sim::scenario::Slant;
use system_tests::sim::world::run_seed;

/// The number of seeds in which each bug must show itself.
const SEEDS: u64 = 400;

fn run(seed: u64, bug: Option<Bug>) -> u64 {
    run_seed(seed, Slant::default(), &mut CanarySubject { bug }, false).digest
}

#[test]
fn a_correct_server_passes() {
    for seed in 0..6 {
        let report = run_seed(seed, Slant::default(), &mut CanarySubject { bug: None }, false);
        assert!(report.clients.answers >= 2_000, "seed {seed} did {} requests", report.clients.answers);
        assert!(report.power_cuts + report.kills >= 5, "seed {seed}: {report:?}");
    }
}

#[test]
fn a_seed_decides_everything() {
    for seed in 100..102 {
        assert_eq!(run(seed, None), run(seed, None));
    }
}

#[test]
fn every_planted_bug_is_found() {
    // Hundreds of expected panics would bury the name of a bug that was missed.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let missed: Vec<&str> = BUGS
        .iter()
        .filter(|(_, bug)| (0..SEEDS).all(|seed| catch_unwind(|| run(seed, Some(*bug))).is_ok()))
        .map(|(name, _)| *name)
        .collect();
    std::panic::set_hook(hook);
    assert!(missed.is_empty(), "not found in {SEEDS} seeds: {missed:?}");
}
