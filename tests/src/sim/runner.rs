//! Many seeds on a few threads, and what is said when one of them fails.
//!
//! A failure is a panic, in the engine or in a check. Released binaries abort on panic, so everything that is
//! to be said is said by the hook: which seed, how to replay it, and the end of its trace.

use std::panic::PanicHookInfo;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cluster::ClusterReport;
use super::trace;
use super::world::Report;

/// Lines of the trace that are printed.
const TRACE_LINES: usize = 60;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// First seed.
    pub first: u64,
    /// Number of seeds.
    pub count: u64,
    /// Threads.
    pub jobs: usize,
    /// Print everything that happens.
    pub verbose: bool,
    /// Run every seed twice, to prove that it decides everything.
    pub twice: bool,
    /// Print a backtrace of a failure.
    pub backtrace: bool,
    /// A bug is planted: a failure is what is wanted.
    pub expect_failure: bool,
    /// The arguments that make the same subject, for the command that replays a seed.
    pub subject_arguments: String,
}

/// What one seed did, or several.
pub trait Totals: Default + Send {
    /// Adds another seed's numbers.
    fn add(&mut self, other: &Self);
    /// Two runs of a seed must have the same one.
    fn digest(&self) -> u64;
    /// Requests that were answered.
    fn answers(&self) -> u64;
}

impl Totals for Report {
    fn add(&mut self, other: &Report) {
        Report::add(self, other);
    }

    fn digest(&self) -> u64 {
        self.digest
    }

    fn answers(&self) -> u64 {
        self.clients.answers
    }
}

impl Totals for ClusterReport {
    fn add(&mut self, other: &ClusterReport) {
        ClusterReport::add(self, other);
    }

    fn digest(&self) -> u64 {
        self.digest
    }

    fn answers(&self) -> u64 {
        self.clients.answers
    }
}

/// Runs the seeds with `run_seed`, which is told whether to print everything, and returns the totals. Ends the process
/// if one fails.
///
/// # Panics
/// When a thread does; the hook has ended the process by then.
pub fn run<R: Totals>(options: &Options, run_seed: impl Fn(u64, bool) -> R + Sync) -> R {
    install_hook(options.clone());
    let next = AtomicU64::new(0);
    let totals = Mutex::new(R::default());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                loop {
                    let offset = next.fetch_add(1, Ordering::Relaxed);
                    if offset >= options.count {
                        break;
                    }
                    let report = run_one(options.first + offset, options, &run_seed);
                    let mut totals = totals.lock().expect("no thread panics and goes on");
                    totals.add(&report);
                    let done = offset + 1;
                    if done.is_multiple_of(500) && !options.expect_failure {
                        println!("{done} seeds, {} requests", totals.answers());
                    }
                }
            });
        }
    });
    totals.into_inner().expect("no thread panics and goes on")
}

fn run_one<R: Totals>(seed: u64, options: &Options, run_seed: impl Fn(u64, bool) -> R) -> R {
    let report = run_seed(seed, options.verbose);
    if options.twice {
        let again = run_seed(seed, false);
        assert_eq!(
            report.digest(),
            again.digest(),
            "two runs of one seed differ: something reads the outer world"
        );
    }
    report
}

fn install_hook(options: Options) {
    std::panic::set_hook(Box::new(move |info| {
        let (seed, _) = trace::tail(0);
        if options.expect_failure {
            println!("found by seed {seed}: {}", first_line(info));
            std::process::exit(0);
        }
        explain(info, &options);
        std::process::exit(1);
    }));
}

fn explain(info: &PanicHookInfo<'_>, options: &Options) {
    let (seed, lines) = trace::tail(TRACE_LINES);
    eprintln!("\nseed {seed} fails: {info}\n\nthe last things that happened:");
    for line in lines {
        eprintln!("  {line}");
    }
    let subject_arguments = &options.subject_arguments;
    eprintln!(
        "\nreplay: cargo run -p system-tests --release --bin simulate -- {subject_arguments}--seed {seed}"
    );
    eprintln!("        with --verbose for the whole trace, --backtrace for where it failed");
    if options.backtrace {
        eprintln!("{}", std::backtrace::Backtrace::force_capture());
    }
}

fn first_line(info: &PanicHookInfo<'_>) -> String {
    let text = info.to_string();
    text.lines().nth(1).unwrap_or_default().to_owned()
}

/// The totals of a run, for people.
#[must_use]
pub fn summary(report: &Report) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let least = report.least.unwrap_or_else(|| report.tally());
    format!(
        "each seed: at least {} requests, {} recoveries, {} checkpoints, {} segments cleaned\n\
         {} requests ({} errors deserved), {} MiB written, {} MiB read\n\
         {} lives: {} power cuts, {} kills, {} stops, {} crashes before the first answer, {} refusals\n\
         disk: {} MiB written, {} errors, {} flipped bits, {} blocks given up\n\
         {} threads, {} connections moved between them\n\
         engine: {} turns, {} batches, {} checkpoints, {} segments cleaned; {} s of virtual time\n\
         clients: {} stalled ones gave back their receive buffer, {} were put out",
        least.requests,
        least.recoveries,
        least.checkpoints,
        least.cleaned_segments,
        report.clients.answers,
        report.clients.errors,
        mib(report.clients.written_bytes),
        mib(report.clients.read_bytes),
        report.lives,
        report.power_cuts,
        report.kills,
        report.drains,
        report.early_crashes,
        report.refusals,
        mib(report.disk_written_bytes),
        report.disk_errors,
        report.flipped_bits,
        report.subject.lost_blocks,
        report.threads,
        report.moves,
        report.turns,
        report.subject.batches,
        report.subject.checkpoints,
        report.subject.cleaned_segments,
        report.virtual_ns / 1_000_000_000,
        report.subject.inputs_parked,
        report.subject.connections_put_out,
    )
}

/// The same for clusters.
#[must_use]
pub fn cluster_summary(report: &ClusterReport) -> String {
    format!(
        "{} requests, {} errors, {} MiB written, {} MiB read; {} s of virtual time, {} turns\n\
         {} failovers, {} epochs, {} removals, {} admissions, {} replaced, {} left, {} gave up what they held, {} attached, {} let go, {} led from elsewhere, {} record changes, {} commits, {} messages\n\
         {} kills, {} power cuts, {} blackouts, {} network faults, {} pauses; {} comparisons of replicas\n\
         {} disk errors, {} flipped bits, {} refused starts, {} empty disks; {} writes without space\n\
         {} passes over volumes, {} blocks compared, {} made good; {} moves timed, the slowest took {} ms",
        report.clients.answers,
        report.clients.errors,
        report.clients.written_bytes >> 20,
        report.clients.read_bytes >> 20,
        report.virtual_ns / 1_000_000_000,
        report.turns,
        report.failovers,
        report.epochs,
        report.removals,
        report.admissions,
        report.replacements,
        report.left,
        report.departures,
        report.attachments,
        report.releases,
        report.remote_heads,
        report.record_changes,
        report.commits,
        report.messages,
        report.kills,
        report.power_cuts,
        report.blackouts,
        report.network_faults,
        report.pauses,
        report.comparisons,
        report.disk_errors,
        report.flipped_bits,
        report.refusals,
        report.new_disks,
        report.no_space,
        report.passes,
        report.compared_blocks,
        report.repaired_blocks,
        report.timed_moves,
        report.slowest_move_ns / 1_000_000,
    )
}
