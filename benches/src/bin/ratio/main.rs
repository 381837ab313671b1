//! The ratio runs: Berth against other NBD servers, the raw disk and the wire, side by side on one machine.
//!
//! `cargo run --release -p benches --bin ratio -- [ROW…]` runs every contender of a row in each round, forwards in
//! even rounds and backwards in odd ones, and compares within the round: machines drift, pairs do not. Every
//! server is started for its own job alone and stopped after it, so that nothing works in the background of
//! another's job. The result is a table on standard output, and under `target/ratio/` the raw figures and a plot.
#![expect(clippy::disallowed_methods, reason = "a measuring tool reads the clock and waits for servers")]

mod plot;
mod rows;
mod servers;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use benches::fio::{Job, Length};
use benches::machine;
use clap::Parser;

use crate::rows::{ROWS, Row};
use crate::servers::Contender;
use crate::table::{Results, Sample};

/// Measures Berth against other NBD servers and the raw disk.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// Rows to run: r4k w4k r4k1 w4k1 r128k w128k, and of three replicas w4k-r3 w4k1-r3 w4k1f-r3 r4k-r3 w128k-r3; all
    /// without any.
    rows: Vec<String>,
    /// Pairs per row.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Length of one job.
    #[arg(long, default_value_t = 8)]
    seconds: u32,
    /// Size of the volume in MiB; the pool is four times as large.
    #[arg(long, default_value_t = 2048)]
    size_mib: u64,
    /// Contenders, separated by commas; the raw disk is always one. All without this.
    #[arg(long, value_delimiter = ',')]
    servers: Vec<String>,
    /// Where the volumes and the results go; must be on the disk to measure and allow O_DIRECT.
    #[arg(long, default_value = "target/ratio")]
    dir: PathBuf,
    /// Measure although others use the machine. The figures then only show that everything runs.
    #[arg(long)]
    noisy: bool,
    /// Be the echo server on this socket (the program starts itself so).
    #[arg(long, hide = true)]
    echo: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.echo {
        Some(socket) => std::os::unix::net::UnixListener::bind(socket)
            .and_then(|listener| benches::echo::serve(&listener, arguments.size_mib << 20))
            .map_err(|error| error.to_string()),
        None => measure(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("ratio: {why}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<(), String> {
    let rows = rows::named(&arguments.rows)?;
    let contenders = servers::named(&arguments.servers)?;
    let bench = servers::Bench::prepare(&arguments.dir, arguments.size_mib, &rows, &contenders)?;
    let mut facts = machine::describe(&arguments.dir);
    if arguments.noisy {
        facts.push("TAKEN ON A BUSY MACHINE".to_owned());
    }
    let mut results = Results::new(facts, arguments.rounds, arguments.seconds);
    let best = choose_variants(arguments, &bench, &rows, &contenders)?;
    for round in 0..arguments.rounds {
        for (row, contenders) in rows.iter().zip(&best) {
            let mut order: Vec<Contender> = contenders.clone();
            if round % 2 == 1 {
                order.reverse();
            }
            // The raw disk frames the round: a round whose raw runs disagree says nothing about a stream.
            order.insert(0, Contender::Raw);
            order.push(Contender::Raw);
            for contender in order {
                let sample = run_one(arguments, &bench, row, contender, round)?;
                eprintln!("round {round} {:6} {:22} {}", row.name, contender.name(), sample.short(row));
                results.add(row, contender, round, sample);
            }
        }
    }
    results.write(&arguments.dir)?;
    plot::write(&results, &arguments.dir.join("ratio.svg"))?;
    println!("{}", results.markdown());
    let (met, all) = results.bars_met();
    println!("figure: {met} of {all} bars met");
    Ok(())
}

/// For each row, of every server that can be set up in several ways the one that does best there.
fn choose_variants(
    arguments: &Arguments,
    bench: &servers::Bench,
    rows: &[&'static Row],
    contenders: &[Contender],
) -> Result<Vec<Vec<Contender>>, String> {
    let probing = Arguments { seconds: arguments.seconds.min(2), ..arguments.clone() };
    let mut best = Vec::new();
    for row in rows {
        let mut chosen: Vec<(Contender, f64)> = Vec::new();
        let fit: Vec<Contender> =
            contenders.iter().copied().filter(|contender| contender.is_of(row)).collect();
        for &contender in fit.iter().filter(|&&contender| contender != Contender::Raw) {
            let alone = fit.iter().filter(|other| other.family() == contender.family()).count() == 1;
            let score =
                if alone { 0.0 } else { run_one(&probing, bench, row, contender, u32::MAX)?.score(row) };
            match chosen.iter_mut().find(|(other, _)| other.family() == contender.family()) {
                Some(entry) if entry.1 < score => *entry = (contender, score),
                Some(_) => {}
                None => chosen.push((contender, score)),
            }
        }
        best.push(chosen.into_iter().map(|(contender, _)| contender).collect());
    }
    Ok(best)
}

/// How long each job runs before it is measured.
const WARM_UP_SECONDS: u32 = 3;

fn run_one(
    arguments: &Arguments,
    bench: &servers::Bench,
    row: &Row,
    contender: Contender,
    round: u32,
) -> Result<Sample, String> {
    let server = bench.start(contender)?;
    if !arguments.noisy {
        machine::wait_until_quiet()?;
    }
    let mut job = Job {
        rw: row.rw,
        block: row.block,
        depth: row.depth,
        flush_each: row.flush_each,
        length: Length::Seconds(WARM_UP_SECONDS),
        size_mib: bench.size_mib,
        target: server.target(),
    };
    // Not counted: whoever used the disk last still has its caches, and a server has just started.
    job.run()?;
    job.length = Length::Seconds(arguments.seconds);
    let machine_before = machine::busy_seconds()?;
    let server_before = server.cpu_seconds()?;
    let output = job.run()?;
    let server_cpu = server.cpu_seconds()? - server_before;
    let machine_cpu = machine::busy_seconds()? - machine_before;
    if round != u32::MAX {
        let file = bench.raw_dir().join(format!("{round}-{}-{}.json", row.name, contender.name()));
        std::fs::write(&file, &output.json).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    server.stop()?;
    // What a server left in the page cache must not be written back during the next one's job.
    nix::unistd::sync();
    Ok(Sample::new(&output, server_cpu, machine_cpu))
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_row_has_its_own_name() {
        let names: std::collections::BTreeSet<_> = super::ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), super::ROWS.len());
    }
}
