//! One fio job and what it found.

use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;

use crate::process::dying_with_us;

/// Where the job's I/O goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// An NBD server, by fio's nbd engine.
    Nbd(String),
    /// A file, by io_uring with O_DIRECT.
    File(PathBuf),
}

/// How long a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many seconds.
    Seconds(u32),
    /// Until so many MiB were transferred.
    Mib(u64),
}

/// One run of fio.
#[derive(Debug)]
pub struct Job<'a> {
    /// Direction and order, as fio names them.
    pub rw: &'a str,
    /// Size of a request, as fio takes it.
    pub block: &'a str,
    /// Requests in flight.
    pub depth: u32,
    /// When it ends.
    pub length: Length,
    /// Every write is followed by a flush.
    pub flush_each: bool,
    /// The part of the target that is used, from its start.
    pub size_mib: u64,
    /// Where the I/O goes.
    pub target: Target,
}

/// What fio measured, in the direction of the job.
#[derive(Clone, Debug)]
pub struct Output {
    /// I/Os per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// I/Os.
    pub ios: u64,
    /// Median latency; that of the flush added, if each I/O is followed by one.
    pub p50_us: f64,
    /// Latency that one I/O in a hundred exceeds, that of the flush added.
    pub p99_us: f64,
    /// fio's own report.
    pub json: String,
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
    sync: FioSyncs,
}

#[derive(Deserialize)]
struct FioSyncs {
    lat_ns: FioLatency,
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
    /// Runs fio.
    ///
    /// # Errors
    /// When it fails, or meets an I/O error.
    pub fn run(&self) -> Result<Output, String> {
        let mut fio = command(&self.target, self.size_mib);
        fio.args(["--rw", self.rw, "--bs", self.block, "--norandommap", "--randrepeat=0"]);
        fio.arg(format!("--iodepth={}", self.depth));
        fio.arg(format!("--fsync={}", u32::from(self.flush_each)));
        match self.length {
            Length::Seconds(seconds) => fio.args(["--time_based", &format!("--runtime={seconds}")]),
            Length::Mib(mib) => fio.arg(format!("--io_size={mib}m")),
        };
        run(fio, self.rw.ends_with("read"))
    }
}

/// Where the client runs, whoever serves it: the last processor of several. Left to itself the scheduler puts it beside
/// whoever wakes it, now on the server's processor and now not, and figures differ by half.
#[must_use]
pub fn client_cpu() -> Option<usize> {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (count > 1).then(|| count - 1)
}

/// Writes the whole volume in order, then as many blocks again at random places, each once.
///
/// # Errors
/// When fio fails.
pub fn fill(target: &Target, size_mib: u64) -> Result<(), String> {
    for (rw, block) in [("write", "128k"), ("randwrite", "4k")] {
        let mut fio = command(target, size_mib);
        fio.args(["--rw", rw, "--bs", block, "--iodepth=32"]);
        run(fio, false)?;
    }
    Ok(())
}

fn command(target: &Target, size_mib: u64) -> Command {
    let mut fio = dying_with_us("fio");
    if let Some(cpu) = client_cpu() {
        fio.arg(format!("--cpus_allowed={cpu}"));
    }
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
    let syncs = job.sync.lat_ns.percentile.unwrap_or(FioPercentiles { p50: 0.0, p99: 0.0 });
    Ok(Output {
        iops: side.iops,
        bytes_per_second: side.bw_bytes,
        ios: side.total_ios,
        p50_us: (percentiles.p50 + syncs.p50) / 1000.0,
        p99_us: (percentiles.p99 + syncs.p99) / 1000.0,
        json,
    })
}
