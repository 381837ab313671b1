//! Passes over the replicas of a volume: what heads tell of them, and what is kept.

use datapath::record::NodeId;
use datapath::replica::check::{CheckReport, EndReason, FINDINGS_MAX, Finding, Holding, PassState, Purpose};

use super::{MessageError, node_from_number, volume_from_number};
use crate::control::limits::{REPLICAS_MAX, REQUEST_BYTES_MAX};
use crate::control::proto;

/// Letters of the reason for the end of a pass.
const WHY_CHARACTERS_MAX: usize = 400;

const _: () = assert!(FINDINGS_MAX * (REPLICAS_MAX * 14 + 10) + 4096 <= REQUEST_BYTES_MAX);

/// The last pass over a volume that saw everything. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastPass {
    /// What it found.
    pub report: CheckReport,
    /// When ctl heard of its beginning.
    pub began_at: u64,
    /// When ctl heard of its end.
    pub ended_at: u64,
}

/// What is kept of the passes over a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassHistory {
    /// When the pass that is under way began, in seconds since 1970. Heads may have changed since.
    pub began_at: Option<u64>,
    /// The last one that saw everything.
    pub last: Option<LastPass>,
}

/// The message of a report.
#[must_use]
pub fn check_to_message(report: &CheckReport) -> proto::CheckReport {
    use proto::check_report::State;
    let (state, why) = match &report.state {
        PassState::Running => (State::Running, String::new()),
        PassState::Complete => (State::Complete, String::new()),
        PassState::Ended(reason) => {
            (State::Ended, reason.to_string().chars().take(WHY_CHARACTERS_MAX).collect())
        }
    };
    proto::CheckReport {
        volume: report.volume.0,
        verify: match report.purpose {
            Purpose::Scrub => 0,
            Purpose::Verify(verify) => verify,
        },
        state: state.into(),
        why,
        size_blocks: report.size_blocks,
        passed_blocks: report.passed_blocks,
        members: report.members.iter().map(|node| node.0).collect(),
        lowest_sequence: report.sequences.0,
        highest_sequence: report.sequences.1,
        compared_blocks: report.compared_blocks,
        repaired_blocks: report.repaired_blocks,
        unreadable_blocks: report.unreadable_blocks,
        differing_blocks: report.differing_blocks,
        findings: report.findings.iter().map(finding_to_message).collect(),
    }
}

fn finding_to_message(finding: &Finding) -> proto::Finding {
    use proto::holding::Holds;
    let holding = |(node, holding): &(NodeId, Holding)| proto::Holding {
        node: node.0,
        holds: Some(match holding {
            Holding::Content(crc) => Holds::Content(*crc),
            Holding::Damaged => Holds::Damaged(true),
            Holding::Unknown => Holds::Unknown(true),
        }),
    };
    proto::Finding { block: finding.block, holdings: finding.holdings.iter().map(holding).collect() }
}

/// The report of a message.
///
/// # Errors
/// The first field that is wrong.
pub fn check_from_message(message: proto::CheckReport) -> Result<CheckReport, MessageError> {
    use proto::check_report::State;
    let state = match message.state() {
        State::Running => PassState::Running,
        State::Complete => PassState::Complete,
        // Its reason is for people by now.
        State::Ended => {
            PassState::Ended(EndReason::Refused(message.why.chars().take(WHY_CHARACTERS_MAX).collect()))
        }
    };
    check_length("members", message.members.len(), REPLICAS_MAX)?;
    check_length("findings", message.findings.len(), FINDINGS_MAX)?;
    let members = message.members.into_iter().map(|node| node_from_number("members", node));
    let findings = message.findings.into_iter().map(finding_from_message);
    Ok(CheckReport {
        volume: volume_from_number(message.volume)?,
        purpose: if message.verify == 0 { Purpose::Scrub } else { Purpose::Verify(message.verify) },
        state,
        size_blocks: message.size_blocks,
        passed_blocks: message.passed_blocks,
        members: members.collect::<Result<_, _>>()?,
        sequences: (message.lowest_sequence, message.highest_sequence),
        compared_blocks: message.compared_blocks,
        repaired_blocks: message.repaired_blocks,
        unreadable_blocks: message.unreadable_blocks,
        differing_blocks: message.differing_blocks,
        findings: findings.collect::<Result<_, _>>()?,
    })
}

fn finding_from_message(message: proto::Finding) -> Result<Finding, MessageError> {
    use proto::holding::Holds;
    check_length("holdings", message.holdings.len(), REPLICAS_MAX)?;
    let holding = |holding: proto::Holding| {
        let node = node_from_number("holdings", holding.node)?;
        let holds = match holding.holds.ok_or(MessageError::Missing("holds"))? {
            Holds::Content(crc) => Holding::Content(crc),
            Holds::Damaged(_) => Holding::Damaged,
            Holds::Unknown(_) => Holding::Unknown,
        };
        Ok((node, holds))
    };
    let holdings: Result<_, MessageError> = message.holdings.into_iter().map(holding).collect();
    Ok(Finding { block: message.block, holdings: holdings? })
}

fn check_length(list: &'static str, count: usize, most: usize) -> Result<(), MessageError> {
    if count <= most { Ok(()) } else { Err(MessageError::TooMany { list, count, most }) }
}

/// The message of what is kept. It is what the record store keeps, too.
#[must_use]
pub fn history_to_message(history: &PassHistory) -> proto::CheckState {
    let last = history.last.as_ref();
    proto::CheckState {
        began_at: history.began_at.unwrap_or(0),
        last: last.map(|last| check_to_message(&last.report)),
        last_began_at: last.map_or(0, |last| last.began_at),
        last_ended_at: last.map_or(0, |last| last.ended_at),
    }
}

/// What is kept, of a message.
///
/// # Errors
/// The first field that is wrong.
pub fn history_from_message(message: proto::CheckState) -> Result<PassHistory, MessageError> {
    let proto::CheckState { began_at, last, last_began_at, last_ended_at } = message;
    let last = last.map(check_from_message).transpose()?;
    Ok(PassHistory {
        began_at: (began_at != 0).then_some(began_at),
        last: last.map(|report| LastPass { report, began_at: last_began_at, ended_at: last_ended_at }),
    })
}

#[cfg(test)]
mod tests {
    use datapath::record::VolumeNumber;

    use super::*;

    fn report() -> CheckReport {
        let holdings = vec![
            (NodeId(1), Holding::Content(7)),
            (NodeId(2), Holding::Damaged),
            (NodeId(3), Holding::Unknown),
        ];
        CheckReport {
            volume: VolumeNumber(9),
            purpose: Purpose::Verify(77),
            state: PassState::Complete,
            size_blocks: 100,
            passed_blocks: 100,
            members: vec![NodeId(1), NodeId(2), NodeId(3)],
            sequences: (3, 9),
            compared_blocks: 64,
            repaired_blocks: 2,
            unreadable_blocks: 1,
            differing_blocks: 0,
            findings: vec![Finding { block: 5, holdings }],
        }
    }

    #[test]
    fn what_is_kept_comes_back() {
        let last = Some(LastPass { report: report(), began_at: 1, ended_at: 2 });
        for history in [
            PassHistory::default(),
            PassHistory { began_at: Some(3), last: None },
            PassHistory { began_at: None, last },
        ] {
            assert_eq!(history_from_message(history_to_message(&history)), Ok(history));
        }
    }

    #[test]
    fn an_end_keeps_its_reason_as_text() {
        let ended = CheckReport { state: PassState::Ended(EndReason::Silent(NodeId(2))), ..report() };
        let back = check_from_message(check_to_message(&ended)).expect("a report");
        let PassState::Ended(reason) = back.state else { panic!("{back:?}") };
        assert_eq!(reason.to_string(), EndReason::Silent(NodeId(2)).to_string());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = || check_to_message(&report());
        let too_many = vec![good().findings[0].clone(); FINDINGS_MAX + 1];
        let nothing = proto::Finding { block: 1, holdings: vec![proto::Holding { node: 1, holds: None }] };
        for (bad, field) in [
            (proto::CheckReport { volume: 0, ..good() }, "volume"),
            (proto::CheckReport { members: vec![0], ..good() }, "members"),
            (proto::CheckReport { findings: too_many, ..good() }, "findings"),
            (proto::CheckReport { findings: vec![nothing], ..good() }, "holds"),
        ] {
            let error = check_from_message(bad).expect_err(field).to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
