//! Many seeds on a few threads, and what is said when one of them fails.
//!
//! A failure is a panic, in the engine or in a check. Released binaries abort on panic, so everything that is
//! to be said is said by the hook: which seed, how to replay it, and the end of its trace.

use std::panic::PanicHookInfo;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::scenario::Slant;
use super::subject::Subject;
use super::trace;
use super::world::{Report, run_seed};

/// Lines of the trace that are printed.
const TRACE_LINES: usize = 60;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// First seed.
    pub first: u64,
    /// Number of seeds.
    pub count: u64,
    /// How their worlds are bent.
    pub slant: Slant,
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

/// Runs the seeds and returns the totals. Ends the process if one fails.
///
/// # Panics
/// When a thread does; the hook has ended the process by then.
pub fn run<S: Subject>(options: &Options, make: impl Fn() -> S + Sync) -> Report {
    install_hook(options.clone());
    let next = AtomicU64::new(0);
    let totals = Mutex::new(Report::default());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                loop {
                    let offset = next.fetch_add(1, Ordering::Relaxed);
                    if offset >= options.count {
                        break;
                    }
                    let report = run_one(options.first + offset, options, &make);
                    let mut totals = totals.lock().expect("no thread panics and goes on");
                    totals.add(&report);
                    let done = offset + 1;
                    if done.is_multiple_of(500) && !options.expect_failure {
                        println!("{done} seeds, {} requests", totals.clients.answers);
                    }
                }
            });
        }
    });
    totals.into_inner().expect("no thread panics and goes on")
}

fn run_one<S: Subject>(seed: u64, options: &Options, make: impl Fn() -> S) -> Report {
    let report = run_seed(seed, options.slant, &mut make(), options.verbose);
    if options.twice {
        let again = run_seed(seed, options.slant, &mut make(), false);
        assert_eq!(
            report.digest, again.digest,
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
    format!(
        "{} requests ({} errors deserved), {} MiB written, {} MiB read\n\
         {} lives: {} power cuts, {} kills, {} stops, {} crashes before the first answer, {} refusals\n\
         disk: {} MiB written, {} errors, {} flipped bits, {} blocks given up\n\
         engine: {} turns, {} batches, {} checkpoints, {} segments cleaned; {} s of virtual time\n\
         clients: {} stalled ones gave back their receive buffer, {} were put out",
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
        report.turns,
        report.subject.batches,
        report.subject.checkpoints,
        report.subject.cleaned_segments,
        report.virtual_ns / 1_000_000_000,
        report.subject.inputs_parked,
        report.subject.connections_put_out,
    )
}
