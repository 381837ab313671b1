//! A pass over the replicas of a volume.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use datapath::record::NodeId;
use datapath::replica::check::{CheckReport, Finding, Holding, PassState};
use nbd_server::control::convert::LastPass;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Names, name_of};

/// A pass as it is printed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PassReport {
    pub complete: bool,
    /// Why it ended before it had seen everything.
    pub why: Option<String>,
    /// In seconds since 1970; not of one that has just ended.
    pub began_at: Option<u64>,
    pub ended_at: Option<u64>,
    pub members: Vec<String>,
    pub lowest_sequence: u64,
    pub highest_sequence: u64,
    pub compared_blocks: u64,
    pub repaired_blocks: u64,
    pub unreadable_blocks: u64,
    pub differing_blocks: u64,
    pub findings: Vec<FindingReport>,
}

/// A block that was not alike and sound everywhere.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FindingReport {
    pub block: u32,
    pub holdings: Vec<HoldingReport>,
}

/// What a replica holds of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HoldingReport {
    pub node: String,
    /// `content`, `damaged` or `unknown`.
    pub holds: &'static str,
    /// Of the content, in hexadecimal.
    pub crc32c: Option<String>,
}

impl PassReport {
    /// One that a record store keeps.
    #[must_use]
    pub fn new(last: LastPass, names: &Names) -> PassReport {
        let times = (Some(last.began_at), Some(last.ended_at));
        PassReport::of(&last.report, times, names)
    }

    /// The same, of a report and its times.
    #[must_use]
    pub fn of(
        report: &CheckReport,
        (began_at, ended_at): (Option<u64>, Option<u64>),
        names: &Names,
    ) -> PassReport {
        let why = match &report.state {
            PassState::Ended(reason) => Some(reason.to_string()),
            PassState::Running | PassState::Complete => None,
        };
        PassReport {
            complete: report.state == PassState::Complete,
            why,
            began_at,
            ended_at,
            members: report.members.iter().map(|node| name_of(*node, names)).collect(),
            lowest_sequence: report.sequences.0,
            highest_sequence: report.sequences.1,
            compared_blocks: report.compared_blocks,
            repaired_blocks: report.repaired_blocks,
            unreadable_blocks: report.unreadable_blocks,
            differing_blocks: report.differing_blocks,
            findings: report.findings.iter().map(|finding| FindingReport::new(finding, names)).collect(),
        }
    }

    /// Was everything seen, and found or made alike and sound?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.complete && self.differing_blocks == 0 && self.unreadable_blocks == 0
    }

    /// How long ago it ended, for a table.
    #[must_use]
    pub fn age(&self) -> String {
        let age = self.ended_at.map_or_else(|| "-".to_owned(), age);
        if self.is_clean() { age } else { format!("{age}, DAMAGED") }
    }

    /// For people who look at a volume.
    #[must_use]
    pub fn description(&self) -> String {
        let ended = self.ended_at.map_or_else(String::new, age);
        format!("  last pass over its replicas: {ended}\n    {}{}", self.summary(), self.list("    "))
    }

    /// What it looked at and what it found, in one line.
    #[must_use]
    pub fn summary(&self) -> String {
        format!(
            "{} blocks compared on {} at sequences {} to {}; {} made good, {} damaged for good, {} differing\n",
            self.compared_blocks,
            self.members.join(", "),
            self.lowest_sequence,
            self.highest_sequence,
            self.repaired_blocks,
            self.unreadable_blocks,
            self.differing_blocks
        )
    }

    /// The blocks that it found, one a line.
    #[must_use]
    pub fn list(&self, indent: &str) -> String {
        self.findings.iter().map(|finding| format!("{indent}{}\n", finding.line())).collect()
    }
}

impl FindingReport {
    fn new(finding: &Finding, names: &Names) -> FindingReport {
        let holding = |(node, holding): &(NodeId, Holding)| {
            let (holds, crc32c) = match holding {
                Holding::Content(crc) => ("content", Some(format!("{crc:08x}"))),
                Holding::Damaged => ("damaged", None),
                Holding::Unknown => ("unknown", None),
            };
            HoldingReport { node: name_of(*node, names), holds, crc32c }
        };
        FindingReport { block: finding.block, holdings: finding.holdings.iter().map(holding).collect() }
    }

    fn line(&self) -> String {
        let words = self.holdings.iter().map(|holding| {
            let what = holding.crc32c.as_deref().unwrap_or(holding.holds);
            format!("{} {what}", holding.node)
        });
        format!("block {}: {}", self.block, words.collect::<Vec<_>>().join(", "))
    }
}

/// How long ago a moment was, in seconds since 1970.
#[expect(clippy::disallowed_methods, reason = "a tool for people: it reads the clock that they read")]
pub fn age(moment: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let seconds = now.saturating_sub(moment);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
