//! What a run found, for people and for programs.

use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

/// The kinds of request that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// NBD_CMD_READ.
    Read,
    /// NBD_CMD_WRITE.
    Write,
    /// NBD_CMD_TRIM.
    Trim,
    /// NBD_CMD_WRITE_ZEROES.
    Zeroes,
    /// NBD_CMD_FLUSH.
    Flush,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Kind; 5] = [Kind::Read, Kind::Write, Kind::Trim, Kind::Zeroes, Kind::Flush];

    /// The word for tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Trim => "trim",
            Kind::Zeroes => "zeroes",
            Kind::Flush => "flush",
        }
    }
}

/// What one connection counted for one kind of request.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) latency_ns: Histogram<u64>,
    pub(super) bytes: u64,
    pub(super) errors: u64,
}

impl Tally {
    pub(super) fn new() -> Tally {
        // Three digits; grows by itself when something takes long.
        let latency_ns = Histogram::new(3).expect("three digits are allowed");
        Tally { latency_ns, bytes: 0, errors: 0 }
    }

    pub(super) fn add(&mut self, other: &Tally) {
        self.latency_ns.add(&other.latency_ns).expect("a resizing histogram takes any value");
        self.bytes += other.bytes;
        self.errors += other.errors;
    }
}

/// The result of a run over all volumes and connections.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The volumes.
    pub uris: Vec<String>,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// One per kind of request that was sent.
    pub operations: Vec<OperationReport>,
    /// How often the server went away and came back.
    pub reconnects: u64,
    /// With `--rate`: arrivals of the time span that were never sent because the server was too slow.
    pub not_sent: u64,
    /// With `--verify`: sectors compared.
    pub sectors_verified: Option<u64>,
}

/// The result for one kind of request.
#[derive(Clone, Debug, Serialize)]
pub struct OperationReport {
    /// Which kind.
    pub operation: Kind,
    /// Answered with success.
    pub count: u64,
    /// Answered with an error.
    pub errors: u64,
    /// Payload of those that succeeded.
    pub bytes: u64,
    /// Successes per second.
    pub iops: f64,
    /// Payload per second, in units of 10^6 bytes.
    pub megabytes_per_second: f64,
    /// From the moment the request should have started to its answer.
    pub latency_us: Latency,
}

/// Percentiles of latency, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "the names are the percentiles")]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p99_9: f64,
    pub p99_99: f64,
    pub max: f64,
}

impl OperationReport {
    #[expect(clippy::cast_precision_loss, reason = "rates are rounded for people")]
    pub(super) fn new(operation: Kind, tally: &Tally, seconds: f64) -> OperationReport {
        let histogram = &tally.latency_ns;
        let us = |ns: u64| ns as f64 / 1000.0;
        let at = |quantile: f64| us(histogram.value_at_quantile(quantile));
        OperationReport {
            operation,
            count: histogram.len(),
            errors: tally.errors,
            bytes: tally.bytes,
            iops: histogram.len() as f64 / seconds,
            megabytes_per_second: tally.bytes as f64 / seconds / 1e6,
            latency_us: Latency {
                mean: histogram.mean() / 1000.0,
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                p99_9: at(0.999),
                p99_99: at(0.9999),
                max: us(histogram.max()),
            },
        }
    }
}

impl Report {
    /// The result for one kind, if any such request was sent.
    #[must_use]
    pub fn operation(&self, kind: Kind) -> Option<&OperationReport> {
        self.operations.iter().find(|operation| operation.operation == kind)
    }

    /// Requests that the server answered with an error.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.operations.iter().map(|operation| operation.errors).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<8}{:>10}{:>10}{:>10}{:>8}   latency in µs: {:>8}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "", "requests", "IOPS", "MB/s", "errors", "p50", "p90", "p99", "p99.9", "p99.99", "max"
        )?;
        for o in &self.operations {
            let l = o.latency_us;
            writeln!(
                f,
                "{:<8}{:>10}{:>10.0}{:>10.1}{:>8}   {:15}{:>8.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}",
                o.operation.name(),
                o.count,
                o.iops,
                o.megabytes_per_second,
                o.errors,
                "",
                l.p50,
                l.p90,
                l.p99,
                l.p99_9,
                l.p99_99,
                l.max
            )?;
        }
        write!(f, "{:.1} s, {} volume(s)", self.seconds, self.uris.len())?;
        if self.reconnects > 0 {
            write!(f, ", {} reconnects", self.reconnects)?;
        }
        if self.not_sent > 0 {
            write!(f, ", {} arrivals not sent: the server is too slow for this rate", self.not_sent)?;
        }
        if let Some(sectors) = self.sectors_verified {
            write!(f, ", {sectors} sectors verified")?;
        }
        writeln!(f)
    }
}
