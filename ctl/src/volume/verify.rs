//! `berth volume verify`, and how passes over replicas are printed.

use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use datapath::record::NodeId;
use datapath::replica::check::{CheckReport, Finding, Holding, PassState};
use nbd_server::control::convert::{LastPass, check_from_message};
use nbd_server::control::limits::VERIFY_SILENCE_MAX;
use nbd_server::control::proto::VerifyVolumeRequest;
use nbd_server::volume_name::VolumeName;
use serde::Serialize;

use super::Names;
use crate::Output;
use crate::remote::{RemoteArguments, answer, node_names, print, with_client};

/// A pass as it is printed.
#[derive(Debug, Serialize)]
pub(super) struct PassReport {
    complete: bool,
    /// Why it ended before it had seen everything.
    why: Option<String>,
    /// In seconds since 1970; not of one that has just ended.
    began_at: Option<u64>,
    ended_at: Option<u64>,
    members: Vec<String>,
    lowest_sequence: u64,
    highest_sequence: u64,
    compared_blocks: u64,
    repaired_blocks: u64,
    unreadable_blocks: u64,
    differing_blocks: u64,
    findings: Vec<FindingReport>,
}

#[derive(Debug, Serialize)]
struct FindingReport {
    block: u32,
    holdings: Vec<HoldingReport>,
}

#[derive(Debug, Serialize)]
struct HoldingReport {
    node: String,
    /// `content`, `damaged` or `unknown`.
    holds: &'static str,
    /// Of the content, in hexadecimal.
    crc32c: Option<String>,
}

/// The whole of the command's output.
#[derive(Debug, Serialize)]
struct VerifyReport {
    volume: String,
    /// Everything was compared, and is alike and sound now.
    clean: bool,
    #[serde(flatten)]
    pass: PassReport,
}

fn name(node: NodeId, names: &Names) -> String {
    let known = names.iter().find(|(number, _)| *number == node.0);
    known.map_or_else(|| format!("number {}", node.0), |(_, name)| name.clone())
}

impl PassReport {
    pub(super) fn new(last: LastPass, names: &Names) -> PassReport {
        let times = (Some(last.began_at), Some(last.ended_at));
        PassReport::of(&last.report, times, names)
    }

    fn of(
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
            members: report.members.iter().map(|node| name(*node, names)).collect(),
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
    pub(super) fn is_clean(&self) -> bool {
        self.complete && self.differing_blocks == 0 && self.unreadable_blocks == 0
    }

    /// How long ago it ended, for a table.
    pub(super) fn age(&self) -> String {
        let age = self.ended_at.map_or_else(|| "-".to_owned(), age);
        if self.is_clean() { age } else { format!("{age}, DAMAGED") }
    }

    /// For people who look at a volume.
    pub(super) fn description(&self) -> String {
        let ended = self.ended_at.map_or_else(String::new, age);
        format!("  last pass over its replicas: {ended}\n    {}{}", self.summary(), self.list("    "))
    }

    fn summary(&self) -> String {
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
    fn list(&self, indent: &str) -> String {
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
            HoldingReport { node: name(*node, names), holds, crc32c }
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
pub(super) fn age(moment: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let seconds = now.saturating_sub(moment);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Has the volume verified, shows how far it is, and prints what came of it. False if it is not clean.
pub(super) fn run(remote: &RemoteArguments, volume: &VolumeName) -> Result<bool, String> {
    let shows = remote.output == Output::Text && std::io::stderr().is_terminal();
    let (report, names) = with_client(remote, |mut client| async move {
        let names = node_names(&mut client).await?;
        let request = VerifyVolumeRequest { name: volume.to_string() };
        let mut reports = answer(client.verify_volume(request)).await?;
        loop {
            let next = tokio::time::timeout(2 * VERIFY_SILENCE_MAX, reports.message()).await;
            let next = next.map_err(|_| "berth ctl tells nothing any more".to_owned())?;
            let next = next.map_err(|status| status.message().to_owned())?;
            let next = next.ok_or("berth ctl has ended before the volume was verified")?;
            let report = check_from_message(next);
            let report = report.map_err(|error| format!("berth ctl sent what it must not: {error}"))?;
            if report.state != PassState::Running {
                return Ok((report, names));
            }
            if shows {
                let percent = report.passed_blocks * 100 / report.size_blocks.max(1);
                eprint!("\r{percent:>3} %, {} blocks compared ", report.compared_blocks);
            }
        }
    })?;
    if shows {
        eprintln!();
    }
    let pass = PassReport::of(&report, (None, None), &names);
    let whole = VerifyReport { volume: volume.to_string(), clean: pass.is_clean(), pass };
    print(remote.output, &whole, || whole.text())?;
    Ok(whole.clean)
}

impl VerifyReport {
    fn text(&self) -> String {
        let pass = &self.pass;
        let verdict = match &pass.why {
            Some(why) => format!("NOT VERIFIED: {why}"),
            None if pass.differing_blocks > 0 => {
                "THE REPLICAS DIFFER; nothing of that was changed, for nobody knows which of them is right"
                    .to_owned()
            }
            None if pass.unreadable_blocks > 0 => "DAMAGED: not everything could be made good".to_owned(),
            None => "all replicas in sync are alike and sound".to_owned(),
        };
        format!("volume {}: {verdict}\n  {}{}", self.volume, pass.summary(), pass.list("  "))
    }
}

#[cfg(test)]
mod tests {
    use datapath::record::VolumeNumber;
    use datapath::replica::check::{EndReason, Purpose};

    use super::*;

    fn verified(report: CheckReport) -> VerifyReport {
        let names = [(1, "n1".to_owned()), (2, "n2".to_owned())];
        let pass = PassReport::of(&report, (None, None), &names);
        VerifyReport { volume: "v".to_owned(), clean: pass.is_clean(), pass }
    }

    fn complete() -> CheckReport {
        let ended = CheckReport::refused(VolumeNumber(1), 7, EndReason::NoHead);
        let members = vec![NodeId(1), NodeId(2)];
        CheckReport {
            state: PassState::Complete,
            purpose: Purpose::Scrub,
            members,
            compared_blocks: 64,
            ..ended
        }
    }

    #[test]
    fn what_is_wrong_is_told_loudly() {
        let sound = verified(complete());
        assert!(sound.clean && sound.text().contains("alike and sound"), "{}", sound.text());
        let holdings = vec![(NodeId(1), Holding::Content(0xab)), (NodeId(2), Holding::Content(0xcd))];
        let findings = vec![Finding { block: 5, holdings }];
        let differing = verified(CheckReport { differing_blocks: 1, findings, ..complete() });
        let text = differing.text();
        assert!(!differing.clean && text.contains("THE REPLICAS DIFFER"), "{text}");
        assert!(text.contains("block 5: n1 000000ab, n2 000000cd\n"), "{text}");
        let silent = EndReason::Silent(NodeId(2));
        let ended = verified(CheckReport { state: PassState::Ended(silent), ..complete() });
        assert!(!ended.clean && ended.text().contains("NOT VERIFIED: the replica on node number 2"));
        let json = serde_json::to_value(&differing).expect("JSON");
        assert_eq!((&json["clean"], &json["findings"][0]["block"]), (&false.into(), &5.into()));
    }
}
