//! Catch-up: a replica that is not in sync drops what it should not have, is sent what it lacks, mirrors what is written
//! meanwhile, and is admitted.

use super::state::{Fill, Record, State, Version};
use super::{BLOCKS, Omission, Protocol};

impl Protocol {
    /// The head finds a replica that is not in the record, and agrees with it on a common point.
    pub(super) fn begin_fill(&self, state: &mut State, index: usize, member: usize) -> bool {
        let head = state.head(index).expect("listed for heads");
        let epoch = head.record.epoch;
        let idle = head.fill.is_none() && head.open.is_none() && !head.record.in_sync.has(member);
        let node = &state.nodes[member];
        if !idle || !node.up || node.promise > epoch || state.fills == self.bounds.fills {
            return false;
        }
        let (record, mirrored_after) = (head.record.clone(), head.last);
        state.fills += 1;
        let node = &mut state.nodes[member];
        let claim = match node.base {
            Some(base) if !self.omits(Omission::ClaimWhileFilling) => base,
            _ => node.last,
        };
        let common = self.common_point(claim, &record);
        let mut wanted = 0;
        for block in 0..BLOCKS {
            if node.data[block].sequence > common && !self.omits(Omission::SurplusKept) {
                node.data[block] = Version::default();
                wanted |= 1 << block;
            }
        }
        node.promise = epoch;
        node.base = Some(Version { epoch: claim.epoch, sequence: common });
        node.last = mirrored_after;
        node.live = 0;
        state.head_mut(index).fill = Some(Fill {
            member,
            mirrored_after,
            common,
            wanted,
            enumerated: false,
            newest_copied: Version::default(),
            offered: false,
        });
        true
    }

    /// Up to where the replica's order is surely the volume's: no further than its claim, nor than the end of any epoch
    /// from its own on.
    fn common_point(&self, claim: Version, record: &Record) -> u8 {
        if self.omits(Omission::CommonPointBySequence) {
            return claim.sequence;
        }
        let ends = record.ends.iter().filter(|(epoch, _)| *epoch >= claim.epoch);
        ends.map(|(_, end)| *end).min().unwrap_or(claim.sequence).min(claim.sequence)
    }

    /// A source lists the blocks that were changed after the common point.
    pub(super) fn enumerate(&self, state: &mut State, index: usize, source: usize) -> bool {
        let head = state.head(index).expect("listed for heads");
        let Some(fill) = head.fill.filter(|fill| !fill.enumerated) else { return false };
        if !self.may_copy_from(state, index, source, &fill) {
            return false;
        }
        let changed = |block: &usize| state.nodes[source].data[*block].sequence > fill.common;
        let wanted = (0..BLOCKS).filter(changed).fold(fill.wanted, |wanted, block| wanted | 1 << block);
        state.head_mut(index).fill = Some(Fill { wanted, enumerated: true, ..fill });
        true
    }

    /// What is not mirrored must be in what is copied: a source is used once it has reached the first mirrored write.
    fn may_copy_from(&self, state: &State, index: usize, source: usize, fill: &Fill) -> bool {
        let node = &state.nodes[source];
        let in_sync = state.head(index).is_some_and(|head| head.record.in_sync.has(source));
        let reached = node.last >= fill.mirrored_after || self.omits(Omission::SourceTooEarly);
        in_sync && node.up && reached
    }

    /// A block is copied, unless a live write has come first.
    pub(super) fn copy(&self, state: &mut State, index: usize, source: usize, block: usize) -> bool {
        let head = state.head(index).expect("listed for heads");
        let Some(fill) = head.fill.filter(|fill| fill.enumerated && fill.wanted >> block & 1 == 1) else {
            return false;
        };
        let epoch = head.record.epoch;
        let version = state.nodes[source].data[block];
        let target = &state.nodes[fill.member];
        let reachable = target.up && target.promise == epoch && target.base.is_some();
        if !reachable || !self.may_copy_from(state, index, source, &fill) {
            return false;
        }
        let target = &mut state.nodes[fill.member];
        let mut newest_copied = fill.newest_copied;
        if target.live >> block & 1 == 0 || self.omits(Omission::CopyWins) {
            target.data[block] = version;
            newest_copied = newest_copied.max(version);
        }
        let wanted = fill.wanted & !(1 << block);
        state.head_mut(index).fill = Some(Fill { wanted, newest_copied, ..fill });
        true
    }

    /// Everything was copied: the replica stores that it is complete, and the head asks for its admission. From now on
    /// writes need its acknowledgement too.
    pub(super) fn admit(&self, state: &mut State, index: usize) -> bool {
        let head = state.head(index).expect("listed for heads");
        let Some(fill) = head.fill.filter(|fill| fill.enumerated && fill.wanted == 0 && !fill.offered) else {
            return false;
        };
        let expected = head.record.version;
        let in_sync = head.record.in_sync.with(fill.member);
        let record = Record { version: expected + 1, in_sync, ..head.record.clone() };
        let node = &state.nodes[fill.member];
        // What was committed without it, and what a copy may have told it of, must be in its order.
        let complete = (node.last >= head.committed_through || self.omits(Omission::AdmittedBehind))
            && (node.last >= fill.newest_copied || self.omits(Omission::AdmittedTooEarly));
        let reachable = node.up && node.promise == record.epoch && node.base.is_some();
        if head.open.is_some() || !complete || !reachable {
            return false;
        }
        let node = &mut state.nodes[fill.member];
        node.base = None;
        node.live = 0;
        let head = state.head_mut(index);
        head.fill = Some(Fill { offered: true, ..fill });
        head.open = Some(record.clone());
        state.propose(expected, record);
        true
    }
}
