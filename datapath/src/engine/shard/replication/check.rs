//! Checks of a volume that is led here, carried out: who is asked, what of the own replica is kept meanwhile, changes that
//! are held up, and what is given to a member whose blocks are damaged.
//!
//! ```text
//!   ask ─┬─▶ own lane ─▶ blocks (kept) ─┐
//!        ├─▶ link ─▶ member ─▶ digest ──┼─▶ judged ─┬─▶ own damage: from another replica, as for a client's read
//!        └─▶ link ─▶ member ─▶ digest ──┘           └─▶ a member's: the blocks that were kept ─▶ link ─▶ its log
//! ```
//!
//! What is kept may be given to a member as long as no change of these blocks was numbered since it was asked for: a change
//! that is numbered later goes behind it on the same link, and so into the member's log.

use super::super::Shard;
use super::check_here::Asked;
use super::{COOKIE, Leader, NodeConfig, Replica, Replication, Work};
use crate::checksum::crc32c;
use crate::engine::region_locks::RegionClaim;
use crate::memory::Memory;
use crate::record::{NodeId, VolumeNumber};
use crate::replica::bugs::Bugs;
use crate::replica::check::{Answer, CheckCounters, CheckReport, Checks, EndReason, Reach, Turn, View};
use crate::request::RequestError;
use crate::store::lane::{BlockBits, BlockRange, BlocksRead, Completion, HoleMap};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange, Moment};
use crate::wire::peer_message::{ChangeHeader, CheckMessage, FEATURE_CHECKS, PeerFrame};
use std::collections::VecDeque;

/// Somebody who wants a volume verified waits so long for this node to lead it.
const LEAD_NS: u64 = 15_000_000_000;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Checking {
    pub(super) checks: Checks,
    /// They have begun: the volume is led here, and was read from here once.
    begun: bool,
    /// What the own replica has read for the question that is asked now.
    kept: Option<Kept>,
    /// Locks that stand in line, in order.
    in_line: VecDeque<(u64, RegionClaim)>,
    /// The lock that is held.
    held: Option<(u64, RegionClaim)>,
    /// Somebody waits until the volume is led here, and for how long.
    waiting: Option<(u64, Moment)>,
    /// Nobody but who wants it verified made this node lead the volume.
    leads_for_it: bool,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    check: u64,
    block: u32,
    memory: MemoryRange,
}

impl Checking {
    pub(super) fn new(volume: VolumeNumber, bugs: Bugs, period_ns: u64) -> Checking {
        Checking {
            checks: Checks::new(volume, bugs, period_ns),
            begun: false,
            kept: None,
            in_line: VecDeque::new(),
            held: None,
            waiting: None,
            leads_for_it: false,
        }
    }

    /// Does this node lead the volume for the sake of a pass only?
    pub(super) fn leads_for_it(&self) -> bool {
        self.leads_for_it
    }

    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        self.checks.poll_timeout().into_iter().chain(self.waiting.map(|(_, until)| until)).min()
    }
}

impl Replication {
    pub(in crate::engine::shard) fn poll_check_report(&mut self) -> Option<CheckReport> {
        self.check_reports.pop_front()
    }

    /// What all checks on the shard have done.
    pub(in crate::engine::shard) fn check_counters(&self) -> CheckCounters {
        let mut sum = CheckCounters::default();
        for counters in self.replicas.iter().map(|replica| replica.checking.checks.counters()) {
            sum.passes += counters.passes;
            sum.compared_blocks += counters.compared_blocks;
            sum.repaired_blocks += counters.repaired_blocks;
            sum.unreadable_blocks += counters.unreadable_blocks;
            sum.differing_blocks += counters.differing_blocks;
            sum.disturbed += counters.disturbed;
        }
        sum
    }
}

impl<M: Memory> Shard<M> {
    /// In this time every block of every volume that is led here is read and compared once; 0 for never. To be called
    /// before the first record comes.
    pub fn scrub_within(&mut self, period_ns: u64) {
        self.replication.scrub_period_ns = period_ns;
    }

    /// Somebody wants a volume verified.
    pub(in crate::engine::shard) fn begin_verify(&mut self, volume: VolumeNumber, verify: u64) {
        let Some(index) = self.replication.find(volume) else {
            return self.refuse_verify(volume, verify, EndReason::NotHere);
        };
        // That is no reason to take the volume from a head that lives.
        let config = NodeConfig { steals: false, ..self.replication.config() };
        let replica = &mut self.replication.replicas[index];
        if replica.head.is_serving() && replica.checking.begun {
            return replica.checking.checks.verify(verify);
        }
        if replica.head.is_serving() {
            let why = format!(
                "{} is led by a node that has no replica of it in sync to compare the others with; attach it to one \
                 that has",
                replica.head.record().name
            );
            return self.refuse_verify(volume, verify, EndReason::Refused(why));
        }
        if replica.checking.waiting.is_some() {
            return self.refuse_verify(volume, verify, EndReason::UnderWay);
        }
        if let Some(refusal) = replica.refusal(config, self.now) {
            return self.refuse_verify(volume, verify, EndReason::Refused(refusal));
        }
        replica.checking.waiting = Some((verify, self.now.after_ns(LEAD_NS)));
    }

    fn refuse_verify(&mut self, volume: VolumeNumber, verify: u64, reason: EndReason) {
        self.replication.check_reports.push_back(CheckReport::refused(volume, verify, reason));
    }

    /// Somebody waits for this node to lead: it does, or takes the volume, or it is too late.
    fn lead_for_verify(&mut self, index: usize) {
        let Some((verify, until)) = self.replication.replicas[index].checking.waiting else { return };
        let config = NodeConfig { steals: false, ..self.replication.config() };
        let (now, random) = (self.now, self.replication.random());
        let replica = &mut self.replication.replicas[index];
        if replica.head.is_serving() && replica.checking.begun {
            replica.checking.waiting = None;
            return replica.checking.checks.verify(verify);
        }
        if until <= now || self.draining {
            let volume = replica.volume;
            replica.checking.waiting = None;
            return self.refuse_verify(volume, verify, EndReason::NoHead);
        }
        if !replica.head.is_active()
            && replica.refusal(config, now).is_none()
            && replica.may_take(config, now)
        {
            replica.checking.leads_for_it = true;
            replica.head.take(now, random);
            self.settle_head(index);
        }
    }

    /// The volume is served here from now on.
    pub(super) fn begin_checks(&mut self, index: usize) {
        let (now, random) = (self.now, self.replication.random());
        let replica = &mut self.replication.replicas[index];
        replica.checking.begun = true;
        replica.checking.checks.begin(now, replica.head.record().size_blocks, random);
    }

    /// The volume is led here, or its record has changed: while the own replica is in sync, it is what others are compared
    /// with.
    pub(super) fn note_whence_is_read(&mut self, index: usize) {
        let (node, bugs) = (self.replication.node(), self.replication.bugs);
        let replica = &self.replication.replicas[index];
        if replica.head.is_serving() && replica.reads_here(node, bugs) && !replica.checking.begun {
            self.begin_checks(index);
        }
    }

    /// It is not, or not any more. No read from another replica is under way by now.
    pub(super) fn end_checks(&mut self, index: usize) {
        let checking = &mut self.replication.replicas[index].checking;
        checking.checks.end();
        checking.begun = false;
        checking.leads_for_it &= checking.waiting.is_some();
        self.release_check_lock(index);
        self.forget_kept(index);
    }

    /// Does what the checks of a volume want.
    pub(super) fn advance_checks(&mut self, index: usize) {
        self.lead_for_verify(index);
        let now = self.now;
        if self.replication.replicas[index].checking.checks.wants_turn(now) {
            while let Some(turn) = self.turn_checks(index) {
                self.do_check(index, turn);
            }
        }
        let Replication { replicas, check_reports, .. } = &mut self.replication;
        let checking = &mut replicas[index].checking;
        check_reports.extend(std::iter::from_fn(|| checking.checks.poll_report()));
        let wanted = checking.waiting.is_some() || checking.checks.is_verifying();
        // What is being filled would begin anew with the next head.
        if checking.leads_for_it && !wanted && !replicas[index].head.is_filling() {
            let checking = &mut replicas[index].checking;
            checking.leads_for_it = false;
            let replica = &mut replicas[index];
            // Whoever wants the volume elsewhere need not wait until this node ends.
            let is_asked = self.served[replica.served].connections > 0
                || replica.attached_since.is_some()
                || replica.tended_until.is_some();
            if !is_asked && replica.head.is_serving() {
                let now = self.now;
                replica.head.release(now);
                self.settle_head(index);
            }
        }
    }

    fn turn_checks(&mut self, index: usize) -> Option<Turn> {
        let own = self.replication.node();
        let in_sync = self.replication.replicas[index].head.record().in_sync.clone();
        let mut members: Vec<(NodeId, Reach)> =
            in_sync.into_iter().map(|node| (node, self.reach(index, node))).collect();
        if !members.iter().any(|(node, _)| *node == own) {
            // It has left since the pass began.
            members.push((own, Reach::Away));
        }
        let repairs_under_way = {
            let works = self.replication.works.iter();
            works
                .map(|(_, work)| work)
                .any(|work| matches!(work, Work::Repair { replica, .. } if *replica == index))
        };
        let clients_are_busy = !self.tasks.is_empty();
        let Replica { head, checking, .. } = &mut self.replication.replicas[index];
        let overlaps = |change: &ChangeHeader, block: u32, count: u32| {
            change.block < block + count && block < change.block + change.count
        };
        let view = View {
            own,
            members: &members,
            committed: head.committed(),
            is_pending: &|block, count| head.pending().any(|change| overlaps(change, block, count)),
            repairs_under_way,
            clients_are_busy,
        };
        checking.checks.turn(self.now, &view)
    }

    fn reach(&self, index: usize, node: NodeId) -> Reach {
        let replica = &self.replication.replicas[index];
        if !replica.head.is_following(node) {
            return Reach::Away;
        }
        if node == self.replication.node() {
            // Whoever leads another epoch has the own replica follow.
            return if replica.leader == Leader::ThisNode { Reach::Follows } else { Reach::Away };
        }
        let link =
            self.replication.dials.up(node).and_then(|id| self.replication.links[id.0 as usize].as_ref());
        match link {
            Some(link) if link.features & FEATURE_CHECKS != 0 => Reach::Follows,
            Some(_) => Reach::TooOld,
            None => Reach::Away,
        }
    }

    fn do_check(&mut self, index: usize, turn: Turn) {
        let served = self.replication.replicas[index].served;
        match turn {
            Turn::Lock { lock, block, count } => {
                let claim = RegionClaim { block, count, exclusive: true };
                let owner = COOKIE | u32::try_from(index).expect("replicas fit 31 bits");
                self.replication.replicas[index].checking.in_line.push_back((lock, claim));
                if self.served[served].locks.acquire(owner, claim) {
                    self.check_lock_granted(owner);
                }
            }
            Turn::Unlock { lock } => {
                // One that stands in line is given back when its turn comes.
                if self.replication.replicas[index].checking.held.is_some_and(|(held, _)| held == lock) {
                    self.release_check_lock(index);
                }
            }
            Turn::Ask { check, block, count, members } => {
                self.forget_kept(index);
                let epoch = self.replication.replicas[index].head.epoch();
                for member in members {
                    self.ask_member(index, member, CheckMessage::Ask { epoch, check, block, count }.into());
                }
            }
            Turn::Repair { check, runs } => self.repair_own(index, check, &runs),
            Turn::Mend { check, member, block, count } => self.mend(index, check, member, (block, count)),
            Turn::Forget => self.forget_kept(index),
        }
    }

    /// A lock that stood in line is granted.
    pub(in crate::engine::shard) fn check_lock_granted(&mut self, owner: u32) {
        let (now, index) = (self.now, (owner & !COOKIE) as usize);
        let Replica { checking, served, .. } = &mut self.replication.replicas[index];
        let (lock, claim) = checking.in_line.pop_front().expect("it stood in line");
        if checking.checks.locked(now, lock) {
            assert!(checking.held.replace((lock, claim)).is_none(), "one lock at a time");
            self.progress = true;
        } else {
            let export = u32::try_from(*served).expect("exports fit 32 bits");
            self.unlock(export, claim);
        }
    }

    fn release_check_lock(&mut self, index: usize) {
        let replica = &mut self.replication.replicas[index];
        if let Some((_, claim)) = replica.checking.held.take() {
            let export = u32::try_from(replica.served).expect("exports fit 32 bits");
            self.unlock(export, claim);
        }
    }

    /// The own replica has answered a question of the own head.
    pub(super) fn keep_own_blocks(&mut self, index: usize, asked: Asked, memory: MemoryRange) {
        if !self.replication.replicas[index].checking.checks.is_asking(asked.check) {
            return self.give_back_for_peer(memory);
        }
        self.forget_kept(index);
        // Links send it, and reads from other replicas go there.
        self.use_memory(memory);
        let kept = Kept { check: asked.check, block: asked.block, memory };
        self.replication.replicas[index].checking.kept = Some(kept);
    }

    fn forget_kept(&mut self, index: usize) {
        if let Some(Kept { memory, .. }) = self.replication.replicas[index].checking.kept.take() {
            self.replication.peer_pages -= memory.len / BLOCK_BYTES;
            self.unuse(memory);
        }
    }

    /// The part of what was kept where these blocks are.
    fn kept_blocks(
        &self,
        index: usize,
        check: u64,
        (block, count): (u32, u32),
    ) -> Option<(MemoryRange, MemoryRange)> {
        let kept = self.replication.replicas[index].checking.kept.filter(|kept| kept.check == check)?;
        let first = 1 + block - kept.block;
        Some((kept.memory, kept.memory.part(first * BLOCK_BYTES, count * BLOCK_BYTES)))
    }

    /// Reads of these blocks of the own replica have found damage: they go the way of a client's read.
    fn repair_own(&mut self, index: usize, check: u64, runs: &[(u32, u32)]) {
        let now = self.now;
        let volume = self.served[self.replication.replicas[index].served].volume;
        for (block, count) in runs.iter().copied() {
            let (_, memory) =
                self.kept_blocks(index, check, (block, count)).expect("what was judged is kept");
            let mut damaged = BlockBits::default();
            (0..count).for_each(|offset| damaged.set(offset));
            let range = BlockRange { volume, block, count };
            let cookie = self.begin_work(Work::CheckRepair { replica: index, check });
            let replica = &mut self.replication.replicas[index];
            let read = replica.peer_reads.begin(now, block, count);
            let completion = Completion {
                cookie,
                result: Err(RequestError::Io),
                holes: HoleMap::default(),
                read: Some(BlocksRead { range, memory, damaged }),
            };
            replica.damaged_reads.push((read, completion));
        }
        self.advance_peer_reads(index);
    }

    /// Gives a member what its damaged blocks must hold.
    fn mend(&mut self, index: usize, check: u64, member: NodeId, (block, count): (u32, u32)) {
        let Some(link) = self.replication.dials.up(member) else { return };
        let Some((memory, blocks)) = self.kept_blocks(index, check, (block, count)) else { return };
        let checksums: Vec<u32> =
            self.memory.bytes(blocks).chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect();
        let replica = &self.replication.replicas[index];
        let message = CheckMessage::Mend { epoch: replica.head.epoch(), check, block, count }.into();
        let frame = PeerFrame { volume: replica.volume, message };
        self.send_part(link, frame, &checksums, blocks, memory);
    }

    /// A member's answer.
    pub(super) fn check_answered(
        &mut self,
        index: usize,
        member: NodeId,
        answer: CheckMessage,
        checksums: Vec<u32>,
    ) {
        let checks = &mut self.replication.replicas[index].checking.checks;
        match answer {
            CheckMessage::Digest { check, damaged, next_leaf, .. } => {
                checks.answered(member, check, Answer::Digest { damaged, checksums }, next_leaf);
            }
            CheckMessage::Unknown { check, next_leaf, .. } => {
                checks.answered(member, check, Answer::Unknown, next_leaf);
            }
            CheckMessage::Mended { check, block, count, .. } => checks.mended(member, check, block, count),
            CheckMessage::Ask { .. } | CheckMessage::Mend { .. } => unreachable!("these are no answers"),
        }
        self.progress = true;
    }
}
