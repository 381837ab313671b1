//! `berth volume verify`, and how passes over replicas are printed.

use std::io::IsTerminal;

use berth::report::PassReport;
use datapath::replica::check::PassState;
use nbd_server::control::convert::check_from_message;
use nbd_server::control::limits::VERIFY_SILENCE_MAX;
use nbd_server::control::proto::VerifyVolumeRequest;
use nbd_server::volume_name::VolumeName;
use serde::Serialize;

use crate::Output;
use crate::remote::{RemoteArguments, answer, node_names, print, with_client};

/// The whole of the command's output.
#[derive(Debug, Serialize)]
struct VerifyReport {
    volume: String,
    /// Everything was compared, and is alike and sound now.
    clean: bool,
    #[serde(flatten)]
    pass: PassReport,
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
    use datapath::record::{NodeId, VolumeNumber};
    use datapath::replica::check::{CheckReport, EndReason, Finding, Holding, Purpose};

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
