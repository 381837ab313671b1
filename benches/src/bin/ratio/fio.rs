//! One fio job and what it found.

use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;

use crate::rows::Row;

/// Where the job's I/O goes.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// An NBD server, by fio's nbd engine.
    Nbd(String),
    /// A file, by io_uring with O_DIRECT.
    File(PathBuf),
}

/// One run of fio.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) row: &'a Row,
    pub(crate) seconds: u32,
    pub(crate) size_mib: u64,
    pub(crate) target: Target,
}

/// What fio measured, in the direction of the row.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) iops: f64,
    pub(crate) bytes_per_second: f64,
    pub(crate) ios: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) json: String,
}

#[derive(Deserialize)]
struct FioOutput {
    jobs: Vec<FioJob>,
}

#[derive(Deserialize)]
struct FioJob {
    error: i64,
    read: FioSide,
    write: FioSide,
}

#[derive(Deserialize)]
struct FioSide {
    iops: f64,
    bw_bytes: f64,
    total_ios: u64,
    clat_ns: FioLatency,
}

#[derive(Deserialize)]
struct FioLatency {
    percentile: Option<FioPercentiles>,
}

#[derive(Deserialize)]
struct FioPercentiles {
    #[serde(rename = "50.000000")]
    p50: f64,
    #[serde(rename = "99.000000")]
    p99: f64,
}

impl Job<'_> {
    pub(crate) fn run(&self) -> Result<Output, String> {
        let mut fio = command(&self.target, self.size_mib);
        fio.args(["--rw", self.row.rw, "--bs", self.row.block, "--norandommap", "--randrepeat=0"]);
        fio.arg(format!("--iodepth={}", self.row.depth));
        fio.args(["--time_based", &format!("--runtime={}", self.seconds)]);
        run(fio, self.row.rw.ends_with("read"))
    }
}

/// Writes the whole volume in order, then as many blocks again at random places, each once.
pub(crate) fn fill(target: &Target, size_mib: u64) -> Result<(), String> {
    for (rw, block) in [("write", "128k"), ("randwrite", "4k")] {
        let mut fio = command(target, size_mib);
        fio.args(["--rw", rw, "--bs", block, "--iodepth=32"]);
        run(fio, false)?;
    }
    Ok(())
}

fn command(target: &Target, size_mib: u64) -> Command {
    let mut fio = crate::servers::dying_with_us("fio");
    fio.args(["--name=ratio", "--output-format=json", &format!("--size={size_mib}m")]);
    match target {
        Target::Nbd(uri) => fio.args(["--ioengine=nbd", &format!("--uri={uri}")]),
        Target::File(path) => {
            fio.args(["--ioengine=io_uring", "--direct=1", &format!("--filename={}", path.display())])
        }
    };
    fio
}

fn run(mut fio: Command, reads: bool) -> Result<Output, String> {
    let output = fio.output().map_err(|error| format!("fio: {error} (Debian package fio)"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // Before the JSON text stands what went wrong; the text itself is all zeroes then.
        let notes = text.split('{').next().unwrap_or_default();
        return Err(format!("{fio:?} failed: {notes}{}", String::from_utf8_lossy(&output.stderr)));
    }
    // fio writes notes before the JSON text.
    let json = text.find('{').map_or("", |start| &text[start..]).to_owned();
    let parsed: FioOutput = serde_json::from_str(&json).map_err(|error| format!("fio's output: {error}"))?;
    let job = parsed.jobs.into_iter().next().ok_or("fio ran no job")?;
    if job.error != 0 {
        return Err(format!("{fio:?} met error {}", job.error));
    }
    let side = if reads { job.read } else { job.write };
    let percentiles = side.clat_ns.percentile.ok_or("fio completed no I/O")?;
    Ok(Output {
        iops: side.iops,
        bytes_per_second: side.bw_bytes,
        ios: side.total_ios,
        p50_us: percentiles.p50 / 1000.0,
        p99_us: percentiles.p99 / 1000.0,
        json,
    })
}
