//! Runs the data path in a deterministic world, seed after seed.

use std::process::ExitCode;

use clap::Parser;
use system_tests::sim::canary::{BUGS, CanarySubject};
use system_tests::sim::runner::{Options, run, summary};

/// Simulate seeds; a failing one prints how to replay it.
#[derive(Debug, Parser)]
struct Arguments {
    /// Number of seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// Run this seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// First seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print everything that happens.
    #[arg(long)]
    verbose: bool,
    /// Run every seed twice and compare.
    #[arg(long)]
    twice: bool,
    /// Plant this bug and expect that it is found.
    #[arg(long)]
    bug: Option<String>,
    /// With --bug: fail if it is not found within this many seeds.
    #[arg(long, default_value_t = 2000)]
    until_found: u64,
    /// With --bug and --seed: show the failure instead of being glad of it.
    #[arg(long)]
    explain: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let bug = match arguments.bug.as_deref() {
        None => None,
        Some(name) => match BUGS.iter().find(|(known, _)| *known == name) {
            Some((_, bug)) => Some(*bug),
            None => {
                eprintln!("no bug is called {name}; there are: {}", BUGS.map(|(known, _)| known).join(", "));
                return ExitCode::FAILURE;
            }
        },
    };
    let hunted = bug.is_some() && !arguments.explain;
    let (first, count) = match arguments.seed {
        Some(seed) => (seed, 1),
        None if hunted => (arguments.from, arguments.until_found),
        None => (arguments.from, arguments.seeds),
    };
    let options = Options {
        first,
        count,
        jobs: arguments.jobs.max(1),
        verbose: arguments.verbose,
        twice: arguments.twice,
        expect_failure: hunted,
        subject_arguments: arguments.bug.map_or_else(String::new, |name| format!("--bug {name} --explain ")),
    };
    let report = run(&options, || CanarySubject { bug });
    if hunted {
        eprintln!("the planted bug was not found in {count} seeds");
        return ExitCode::FAILURE;
    }
    println!("{count} seeds held\n{}", summary(&report));
    ExitCode::SUCCESS
}
