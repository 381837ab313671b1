//! What the log costs: device writes for each client write, latency while the cleaner works, and checkpoints.
//!
//! `cargo run --release -p benches --bin amplification` fills 70 % of a pool with one volume and overwrites it at random
//! places, five times the pool's size. Everything that the server writes to the device counts: the log, the cleaner's
//! copies, the map with its checkpoints, and zeroes. The result is a table on standard output.
#![expect(clippy::cast_precision_loss, reason = "figures for people")]

mod server;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use benches::fio::{Job, Length, Output};
use benches::machine;
use clap::Parser;

use crate::server::{Berth, Counters};
use crate::table::{Checkpoints, Line, print};

/// Live data in the pool.
const LIVE_PERCENT: u64 = 70;
/// A pool is young until the overwrites, of this part of its size, have used what the live data left free.
const YOUNG_PERCENT: u64 = 10;
/// Device blocks for each client block with 32 requests in flight, and with one.
const BAR_DEEP: f64 = 2.2;
const BAR_SINGLE: f64 = 3.5;
/// p99 latency while cleaning, against that of a young pool.
const BAR_LATENCY: f64 = 3.0;
/// The kernel may count so much more than the server says that it wrote.
const BAR_COUNTED: f64 = 1.02;

/// Measures write amplification, latency while cleaning, and the size of checkpoints.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// Size of the pool in MiB; in a smaller one 70 % live data do not fit.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..))]
    pool_mib: u64,
    /// Pool sizes to write.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..))]
    times: u64,
    /// Requests in flight, separated by commas: each is a run of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 1])]
    depths: Vec<u32>,
    /// Sizes in GiB of the volumes whose checkpoints are measured, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16])]
    volumes_gib: Vec<u64>,
    /// Multiply every bar by this: a tiny pool, or a busy machine, says little about the design's bars.
    #[arg(long, default_value_t = 1.0)]
    slack: f64,
    /// Where the pools go; must be on the disk to measure and allow O_DIRECT.
    #[arg(long, default_value = "target/amplification")]
    dir: PathBuf,
    /// Measure although others use the machine. The latencies then only show that everything runs.
    #[arg(long)]
    noisy: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match measure(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("amplification: {why}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<(), String> {
    std::fs::create_dir_all(&arguments.dir)
        .map_err(|error| format!("{}: {error}", arguments.dir.display()))?;
    let mut facts = machine::describe(&arguments.dir);
    if arguments.noisy {
        facts.push("TAKEN ON A BUSY MACHINE".to_owned());
    }
    let mut lines = Vec::new();
    for depth in &arguments.depths {
        lines.extend(overwrite(arguments, *depth)?);
    }
    let mut checkpoints = Vec::new();
    for gib in &arguments.volumes_gib {
        checkpoints.push(checkpoint_sizes(arguments, *gib)?);
    }
    print(&facts, arguments.slack, &lines, &checkpoints);
    Ok(())
}

/// Overwrites a volume that fills most of its pool, and judges what that cost.
fn overwrite(arguments: &Arguments, depth: u32) -> Result<Vec<Line>, String> {
    let (pool_mib, volume_mib) = (arguments.pool_mib, arguments.pool_mib * LIVE_PERCENT / 100);
    let berth = Berth::start_fresh(&arguments.dir, pool_mib, volume_mib)?;
    job(&berth, volume_mib, "write", "128k", 8, volume_mib)?;
    let before = berth.counters()?;
    let run = |name: &str, mib: u64| {
        if !arguments.noisy {
            machine::wait_until_quiet()?;
        }
        let output = job(&berth, volume_mib, "randwrite", "4k", depth, mib)?;
        eprintln!("QD{depth} {name}: {mib} MiB, {:.0} IOPS, p99 {:.0} µs", output.iops, output.p99_us);
        Ok::<_, String>(output)
    };
    let young_mib = pool_mib * YOUNG_PERCENT / 100;
    let young = run("young", young_mib)?;
    run("ageing", pool_mib * (arguments.times - 1) - young_mib)?;
    let aged_before = berth.counters()?;
    let aged = run("aged", pool_mib)?;
    let after = berth.counters()?;
    berth.stop()?;
    if after.segments_cleaned == aged_before.segments_cleaned {
        return Err("nothing was cleaned: the pool is too large for what was written".to_owned());
    }
    Ok(judge(depth, &after.since(&before), &young, &aged))
}

fn judge(depth: u32, spent: &Counters, young: &Output, aged: &Output) -> Vec<Line> {
    let client = spent.client_blocks as f64;
    let parts =
        spent.device_blocks.iter().map(|(kind, blocks)| format!("{kind} {:.2}", *blocks as f64 / client));
    let device = spent.device_blocks_in_all() as f64;
    vec![
        Line {
            what: format!("write amplification, QD{depth}"),
            bar: if depth == 1 { BAR_SINGLE } else { BAR_DEEP },
            unit: "",
            figure: device / client,
            made_of: parts.collect::<Vec<_>>().join(", "),
        },
        Line {
            what: format!("p99 while cleaning, QD{depth}"),
            bar: BAR_LATENCY,
            unit: " × young",
            figure: aged.p99_us / young.p99_us,
            made_of: format!("{:.0} µs, young {:.0} µs", aged.p99_us, young.p99_us),
        },
        Line {
            what: format!("written by the kernel's count, QD{depth}"),
            bar: BAR_COUNTED,
            unit: " × the server's",
            figure: spent.kernel_bytes as f64 / (device * 4096.0),
            made_of: format!("{} MiB, server {:.0} MiB", spent.kernel_bytes >> 20, device / 256.0),
        },
    ]
}

/// Writes a block in every 2 MiB of a volume, which makes its map as large as it can be, and then at random.
fn checkpoint_sizes(arguments: &Arguments, gib: u64) -> Result<Checkpoints, String> {
    let volume_mib = gib << 10;
    // Room for one block of each leaf, and for what comes after: thin volumes take no more.
    let random_mib = 1280;
    let pool_mib = 3 * random_mib + volume_mib / 256;
    let berth = Berth::start_fresh(&arguments.dir, pool_mib, volume_mib)?;
    // After each block of 4 KiB fio leaves out the rest of 2 MiB.
    job(&berth, volume_mib, "write:2044k", "4k", 32, volume_mib / 2 * 4 / 1024)?;
    berth.stop()?;
    // The first thing a start does is a checkpoint, here of a map in which nothing has changed.
    let berth = Berth::start(&arguments.dir, pool_mib, volume_mib)?;
    let start = berth.counters()?;
    job(&berth, volume_mib, "randwrite", "4k", 32, random_mib)?;
    let spent = berth.counters()?.since(&start);
    berth.stop()?;
    if spent.checkpoints == 0 {
        return Err(format!("no checkpoint came in {random_mib} MiB of random writes"));
    }
    let map = |counters: &Counters| counters.blocks_for("map") * 4096;
    Ok(Checkpoints {
        gib,
        at_start_bytes: map(&start) / start.checkpoints.max(1),
        under_load_bytes: map(&spent) / spent.checkpoints,
        checkpoints: spent.checkpoints,
        client_bytes: spent.client_blocks * 4096,
    })
}

fn job(
    berth: &Berth,
    volume_mib: u64,
    rw: &str,
    block: &str,
    depth: u32,
    mib: u64,
) -> Result<Output, String> {
    let target = berth.target();
    Job { rw, block, depth, length: Length::Mib(mib.max(1)), flush_each: false, size_mib: volume_mib, target }
        .run()
}
