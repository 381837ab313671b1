//! Runs the data path in a deterministic world, seed after seed.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use datapath::replica;
use datapath::store::bugs::Bugs;
use system_tests::sim::berth::BerthSubject;
use system_tests::sim::canary::{BUGS, CanarySubject};
use system_tests::sim::cluster::{self, ClusterOptions};
use system_tests::sim::runner::{Options, cluster_summary, run, summary};
use system_tests::sim::scenario::{Slant, find};
use system_tests::sim::world::run_seed;

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
    /// Bend the worlds in this way; an unknown name lists those there are.
    #[arg(long)]
    scenario: Option<String>,
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
    /// Simulate the canary, a small block server, in place of Berth.
    #[arg(long)]
    canary: bool,
    /// Simulate several nodes with replicated volumes.
    #[arg(long)]
    cluster: bool,
    /// Plant this bug and expect that it is found. Those of Berth need a build with the feature planted-bugs.
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
    let hunted = arguments.bug.is_some() && !arguments.explain;
    let (first, count) = match arguments.seed {
        Some(seed) => (seed, 1),
        None if hunted => (arguments.from, arguments.until_found),
        None => (arguments.from, arguments.seeds),
    };
    if arguments.cluster {
        return run_cluster(&arguments, first, count);
    }
    let slant = match arguments
        .scenario
        .as_deref()
        .map_or_else(|| Ok(Slant::default()), |name| find(name).map(|found| found.slant))
    {
        Ok(slant) => slant,
        Err(error) => return refuse(&error),
    };
    let options = options(&arguments, first, count);
    let report = if arguments.canary {
        let bug = match canary_bug(arguments.bug.as_deref()) {
            Ok(bug) => bug,
            Err(error) => return refuse(&error),
        };
        run(&options, |seed, verbose| run_seed(seed, slant, &mut CanarySubject { bug }, verbose))
    } else {
        let bugs = match berth_bugs(arguments.bug.as_deref()) {
            Ok(bugs) => bugs,
            Err(error) => return refuse(&error),
        };
        run(&options, |seed, verbose| run_seed(seed, slant, &mut BerthSubject::new(bugs), verbose))
    };
    if hunted {
        eprintln!("the planted bug was not found in {count} seeds");
        return ExitCode::FAILURE;
    }
    println!("{count} seeds held\n{}", summary(&report));
    ExitCode::SUCCESS
}

fn options(arguments: &Arguments, first: u64, count: u64) -> Options {
    Options {
        first,
        count,
        jobs: arguments.jobs.max(1),
        verbose: arguments.verbose,
        twice: arguments.twice,
        backtrace: arguments.backtrace,
        expect_failure: arguments.bug.is_some() && !arguments.explain,
        subject_arguments: subject_arguments(arguments),
    }
}

#[expect(clippy::disallowed_methods, reason = "a tool: says how many seeds it does per second")]
fn run_cluster(arguments: &Arguments, first: u64, count: u64) -> ExitCode {
    let bugs = match replication_bugs(arguments.bug.as_deref()) {
        Ok(bugs) => bugs,
        Err(error) => return refuse(&error),
    };
    let bent = match arguments.scenario.as_deref().map(cluster::find).transpose() {
        Ok(bent) => bent.unwrap_or_default(),
        Err(error) => return refuse(&error),
    };
    let world = ClusterOptions { bugs, ..bent };
    let options = options(arguments, first, count);
    let start = Instant::now();
    let report = run(&options, |seed, verbose| cluster::run_seed(seed, world, verbose));
    if options.expect_failure {
        eprintln!("the planted bug was not found in {count} seeds");
        return ExitCode::FAILURE;
    }
    let seconds = start.elapsed().as_secs_f64();
    let rate = f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / seconds;
    println!("{count} seeds held, {rate:.1} per second\n{}", cluster_summary(&report));
    ExitCode::SUCCESS
}

fn refuse(error: &str) -> ExitCode {
    eprintln!("simulate: {error}");
    ExitCode::FAILURE
}

fn subject_arguments(arguments: &Arguments) -> String {
    let canary = if arguments.canary { "--canary " } else { "" };
    let cluster = if arguments.cluster { "--cluster " } else { "" };
    let bug = arguments.bug.as_ref().map_or_else(String::new, |name| format!("--bug {name} --explain "));
    let scenario = arguments.scenario.as_ref().map_or_else(String::new, |name| format!("--scenario {name} "));
    format!("{canary}{cluster}{scenario}{bug}")
}

fn canary_bug(name: Option<&str>) -> Result<Option<system_tests::sim::canary::Bug>, String> {
    let Some(name) = name else { return Ok(None) };
    let found = BUGS.iter().find(|(known, _)| *known == name).map(|(_, bug)| Some(*bug));
    found.ok_or_else(|| {
        format!("no bug is called {name}; there are: {}", BUGS.map(|(known, _)| known).join(", "))
    })
}

#[cfg(feature = "planted-bugs")]
fn berth_bugs(name: Option<&str>) -> Result<Bugs, String> {
    use datapath::store::bugs::PlantedBug;
    let Some(name) = name else { return Ok(Bugs::none()) };
    let found = PlantedBug::ALL.iter().find(|(_, known)| *known == name).map(|(bug, _)| Bugs::planted(*bug));
    let names = PlantedBug::ALL.map(|(_, known)| known).join(", ");
    found.ok_or_else(|| format!("no bug is called {name}; there are: {names}"))
}

#[cfg(not(feature = "planted-bugs"))]
fn berth_bugs(name: Option<&str>) -> Result<Bugs, String> {
    match name {
        None => Ok(Bugs::none()),
        Some(_) => Err("build with --features planted-bugs to plant bugs in Berth".to_owned()),
    }
}

#[cfg(feature = "planted-bugs")]
fn replication_bugs(name: Option<&str>) -> Result<replica::bugs::Bugs, String> {
    use replica::bugs::{Bugs, PlantedBug};
    let Some(name) = name else { return Ok(Bugs::none()) };
    let found = PlantedBug::ALL.iter().find(|(_, known)| *known == name).map(|(bug, _)| Bugs::planted(*bug));
    let names = PlantedBug::ALL.map(|(_, known)| known).join(", ");
    found.ok_or_else(|| format!("no bug is called {name}; there are: {names}"))
}

#[cfg(not(feature = "planted-bugs"))]
fn replication_bugs(name: Option<&str>) -> Result<replica::bugs::Bugs, String> {
    match name {
        None => Ok(replica::bugs::Bugs::none()),
        Some(_) => Err("build with --features planted-bugs to plant bugs in replication".to_owned()),
    }
}
