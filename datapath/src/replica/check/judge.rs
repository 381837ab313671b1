//! What the answers of all replicas say of a piece, and what is to be done about it.

use super::report::{Finding, Holding};
use crate::record::NodeId;

/// What a replica has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// What it holds.
    Digest {
        /// Its damaged blocks, the first of the piece as the lowest bit.
        damaged: u64,
        /// The CRC32C of each block.
        checksums: Vec<u32>,
    },
    /// It does not know: its map is damaged there.
    Unknown,
}

impl Answer {
    fn holding(&self, offset: u32) -> Holding {
        match self {
            Answer::Unknown => Holding::Unknown,
            Answer::Digest { damaged, .. } if damaged >> offset & 1 == 1 => Holding::Damaged,
            Answer::Digest { checksums, .. } => Holding::Content(checksums[offset as usize]),
        }
    }

    fn damaged(&self) -> u64 {
        match self {
            Answer::Digest { damaged, .. } => *damaged,
            Answer::Unknown => 0,
        }
    }
}

/// See the module's text. Blocks are bits, the first of the piece the lowest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Judgement {
    /// Damaged at each replica.
    pub(super) damaged: Vec<(NodeId, u64)>,
    /// Sound at two replicas, and different.
    pub(super) differing: u64,
    /// Damaged or unknown somewhere.
    pub(super) unreadable: u64,
    /// Damaged at the head, and sound and alike elsewhere.
    pub(super) to_repair: u64,
    /// Damaged elsewhere, and sound at the head.
    pub(super) to_mend: Vec<(NodeId, u64)>,
    /// Of the second and third.
    pub(super) findings: Vec<Finding>,
}

/// Judges the answers of all, `own` being the head's replica. A block that two hold differently is nobody's to repair: no
/// copy of it is known to be the right one.
pub(super) fn judge(
    (block, count): (u32, u32),
    own: NodeId,
    answers: &[(NodeId, Answer)],
    findings_max: usize,
) -> Judgement {
    let mut judgement = Judgement {
        damaged: answers.iter().map(|(node, answer)| (*node, answer.damaged())).collect(),
        to_mend: answers.iter().map(|(node, _)| (*node, 0)).collect(),
        ..Judgement::default()
    };
    for offset in 0..count {
        let bit = 1_u64 << offset;
        let holdings = || answers.iter().map(|(node, answer)| (*node, answer.holding(offset)));
        let content = |holding| matches!(holding, Holding::Content(_)).then_some(holding);
        let mut contents = holdings().filter_map(|(_, holding)| content(holding));
        let first = contents.next();
        let differs = contents.any(|other| Some(other) != first);
        let is_bad = holdings().any(|(_, holding)| content(holding).is_none());
        if !differs && !is_bad {
            continue;
        }
        judgement.differing |= if differs { bit } else { 0 };
        judgement.unreadable |= if is_bad { bit } else { 0 };
        if judgement.findings.len() < findings_max {
            judgement.findings.push(Finding { block: block + offset, holdings: holdings().collect() });
        }
        if differs || first.is_none() {
            continue;
        }
        match holdings().find(|(node, _)| *node == own) {
            Some((_, Holding::Damaged)) => judgement.to_repair |= bit,
            Some((_, Holding::Content(_))) => {
                for ((_, bits), (_, holding)) in judgement.to_mend.iter_mut().zip(holdings()) {
                    *bits |= if holding == Holding::Damaged { bit } else { 0 };
                }
            }
            // Where the head does not know what it holds, it has nothing to give, and nothing can be written there.
            Some((_, Holding::Unknown)) | None => {}
        }
    }
    judgement.to_mend.retain(|(_, bits)| *bits != 0);
    judgement
}

/// The runs of bits that are set: first and count.
pub(super) fn runs(bits: u64) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for offset in (0..u64::BITS).filter(|offset| bits >> offset & 1 == 1) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == offset => *count += 1,
            _ => runs.push((offset, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: NodeId = NodeId(1);
    const A: NodeId = NodeId(2);
    const B: NodeId = NodeId(3);

    fn digest(damaged: u64, checksums: [u32; 4]) -> Answer {
        Answer::Digest { damaged, checksums: checksums.to_vec() }
    }

    fn judged(own: Answer, a: Answer, b: Answer) -> Judgement {
        judge((100, 4), OWN, &[(OWN, own), (A, a), (B, b)], 2)
    }

    #[test]
    fn what_is_alike_and_sound_needs_nothing() {
        let same = || digest(0, [1, 2, 3, 4]);
        let judgement = judged(same(), same(), same());
        assert_eq!((judgement.differing, judgement.unreadable, judgement.to_repair), (0, 0, 0));
        assert!(judgement.to_mend.is_empty() && judgement.findings.is_empty());
    }

    #[test]
    fn damage_is_made_good_from_whoever_is_sound() {
        // The checksum of a damaged block says nothing.
        let judgement =
            judged(digest(0b0001, [9, 2, 3, 4]), digest(0b0011, [8, 8, 3, 4]), digest(0, [1, 2, 3, 4]));
        assert_eq!((judgement.differing, judgement.unreadable), (0, 0b0011));
        assert_eq!(judgement.to_repair, 0b0001, "first the head's own");
        assert_eq!(judgement.to_mend, [(A, 0b0010)], "what the head lacks it cannot give");
        assert_eq!(judgement.damaged, [(OWN, 0b0001), (A, 0b0011), (B, 0)]);
    }

    #[test]
    fn what_differs_is_told_and_not_repaired() {
        let judgement =
            judged(digest(0, [1, 2, 3, 4]), digest(0, [1, 7, 3, 4]), digest(0b0010, [1, 0, 3, 4]));
        assert_eq!((judgement.differing, judgement.unreadable), (0b0010, 0b0010));
        assert!(judgement.to_repair == 0 && judgement.to_mend.is_empty());
        let holdings = vec![(OWN, Holding::Content(2)), (A, Holding::Content(7)), (B, Holding::Damaged)];
        assert_eq!(judgement.findings, [Finding { block: 101, holdings }]);
    }

    #[test]
    fn nothing_is_written_where_a_map_is_damaged() {
        let good = || digest(0, [1, 2, 3, 4]);
        let judgement = judged(Answer::Unknown, good(), digest(0b1000, [1, 2, 3, 9]));
        assert!(judgement.to_repair == 0 && judgement.to_mend.is_empty());
        assert_eq!(judgement.unreadable, 0b1111);
        assert_eq!(judgement.findings.len(), 2, "of many only the first are told");
        let judgement = judged(good(), Answer::Unknown, digest(0b1000, [1, 2, 3, 9]));
        assert_eq!(judgement.to_mend, [(B, 0b1000)]);
    }

    #[test]
    fn damaged_everywhere_is_damaged_for_good() {
        let bad = || digest(0b0001, [0, 2, 3, 4]);
        let judgement = judged(bad(), bad(), bad());
        assert_eq!((judgement.unreadable, judgement.to_repair), (1, 0));
        assert!(judgement.to_mend.is_empty());
    }

    #[test]
    fn bits_make_runs() {
        assert_eq!(runs(0), []);
        assert_eq!(runs(0b1_0110), [(1, 2), (4, 1)]);
        assert_eq!(runs(u64::MAX), [(0, 64)]);
    }
}
