//! Runs the data path in a deterministic world, seed after seed.

use std::process::ExitCode;

use clap::Parser;
use datapath::store::bugs::PlantedBug;
use system_tests::sim::canary::{BUGS, Bug, CanarySubject};
use system_tests::sim::runner::{Options, run, summary};
use system_tests::sim::shard::ShardSubject;

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
    /// Print a backtrace of a failure.
    #[arg(long)]
    backtrace: bool,
    /// Plant this bug and expect that it is found. A bug of the store needs --features planted-bugs.
    #[arg(long)]
    bug: Option<String>,
    /// Run the canary, not the store.
    #[arg(long)]
    canary: bool,
    /// With --bug: fail if it is not found within this many seeds.
    #[arg(long, default_value_t = 2000)]
    until_found: u64,
    /// With --bug and --seed: show the failure instead of being glad of it.
    #[arg(long)]
    explain: bool,
}

/// What the seeds are run on.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Canary(Option<Bug>),
    Shard(Option<PlantedBug>),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let choice = match choose(&arguments) {
        Ok(choice) => choice,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::FAILURE;
        }
    };
    let hunted = arguments.bug.is_some() && !arguments.explain;
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
        backtrace: arguments.backtrace,
        expect_failure: hunted,
        subject_arguments: subject_arguments(&arguments),
    };
    let report = match choice {
        Choice::Canary(bug) => run(&options, || CanarySubject { bug }),
        Choice::Shard(bug) => run(&options, || ShardSubject::new(bug)),
    };
    if hunted {
        eprintln!("the planted bug was not found in {count} seeds");
        return ExitCode::FAILURE;
    }
    println!("{count} seeds held\n{}", summary(&report));
    ExitCode::SUCCESS
}

fn choose(arguments: &Arguments) -> Result<Choice, String> {
    let Some(name) = arguments.bug.as_deref() else {
        return Ok(if arguments.canary { Choice::Canary(None) } else { Choice::Shard(None) });
    };
    if let (true, Some((_, bug))) = (arguments.canary, BUGS.iter().find(|(known, _)| *known == name)) {
        return Ok(Choice::Canary(Some(*bug)));
    }
    if let (false, Some((bug, _))) = (arguments.canary, PlantedBug::ALL.iter().find(|(_, known)| *known == name)) {
        if cfg!(not(feature = "planted-bugs")) {
            return Err("build with --features planted-bugs to plant bugs in the store".to_owned());
        }
        return Ok(Choice::Shard(Some(*bug)));
    }
    let store = PlantedBug::ALL.map(|(_, name)| name).join(", ");
    let canary = BUGS.map(|(name, _)| name).join(", ");
    Err(format!("no bug is called {name}\n  in the store: {store}\n  with --canary: {canary}"))
}

fn subject_arguments(arguments: &Arguments) -> String {
    let canary = if arguments.canary { "--canary " } else { "" };
    let bug = arguments.bug.as_deref().map_or_else(String::new, |name| format!("--bug {name} --explain "));
    format!("{canary}{bug}")
}
