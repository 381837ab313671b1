//! Disks that do more than lose power, and how much of that a cluster can bear.
//!
//! In a seed that has this, one node is ill. All others are sound, but for reads that may fail everywhere.
//!
//! | trouble | where | why nothing that was acknowledged is lost |
//! |---|---|---|
//! | writes and syncs that fail | the ill node | what it acknowledged was synced before. Its lane fails, and its log is verified at the next start |
//! | reads that fail | there, or everywhere | what could not be read is still there |
//! | flipped bits | the ill node | bad blocks are known to be bad, and all others in sync have them. Where nobody else is in sync any more they cannot be read, but are not lost: the bits flip back when faults end |
//! | an empty disk in place of the old one | the ill node | it is given only while nothing rests on what it held, see [`World::may_lose_disk`] |
//!
//! One ill node is the most: with `min_in_sync` 1 and two replicas the sound one may be the only one in sync at any
//! moment, and what a second ill node forgets would be gone. For the same reason two kinds of trouble may meet on the
//! ill node and not on two.
//!
//! A client sees EIO only from a node whose disk has given cause, and never wrong data. Bad blocks are made good from
//! another replica where a client reads them at the head, or a pass over the volume finds them. In seeds with `rot` nothing
//! else makes them good: at the end every replica in sync must be sound.

use super::{Happening, MILLISECOND_NS, Stage, World, id};
use crate::sim::random::Random;
use crate::sim::trace;

/// Percentage of looks at an ill node after which an operator starts it anew.
const RESTARTS: u64 = 8;

/// What is the matter with disks in a seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Illness {
    /// The ill node, to be divided by their count.
    node: u64,
    write_errors: bool,
    sync_errors: bool,
    read_errors: bool,
    /// Reads fail on sound nodes too.
    read_errors_everywhere: bool,
    pub(super) rot: bool,
    pub(super) new_disks: bool,
}

impl Illness {
    /// Nothing but flipped bits.
    pub(super) fn rot_only(random: &mut Random) -> Illness {
        Illness {
            node: random.bits(),
            write_errors: false,
            sync_errors: false,
            read_errors: false,
            read_errors_everywhere: false,
            rot: true,
            new_disks: false,
        }
    }

    pub(super) fn draw(random: &mut Random) -> Illness {
        let illness = Illness {
            node: random.bits(),
            write_errors: random.percent(40),
            sync_errors: random.percent(40),
            read_errors: random.percent(40),
            read_errors_everywhere: random.percent(30),
            rot: random.percent(50),
            new_disks: random.percent(40),
        };
        // Never nothing at all.
        let any = illness.write_errors || illness.sync_errors || illness.read_errors || illness.rot;
        Illness { new_disks: illness.new_disks || !any, ..illness }
    }
}

impl World {
    fn ill_node(&self) -> Option<(usize, Illness)> {
        let illness = self.swarm.illness?;
        Some((crate::to_usize(illness.node % self.nodes.len() as u64), illness))
    }

    /// Decides what a node's disk does in the life that begins.
    pub(super) fn sicken(&mut self, node: usize) {
        let Some((ill, illness)) = self.ill_node().filter(|_| self.stage == Stage::Working) else { return };
        let often = self.random.percent(75);
        let rate = if often { self.random.skewed(2_000..=100_000) } else { 0 };
        let here = ill == node;
        let mut rate_if = |wanted: bool| if wanted && self.random.percent(70) { rate } else { 0 };
        let write_errors = rate_if(here && illness.write_errors);
        let sync_errors = rate_if(here && illness.sync_errors) * 10;
        let read_errors = rate_if(illness.read_errors && (here || illness.read_errors_everywhere));
        let faults = &mut self.nodes[node].disk_mut().faults;
        (faults.write_errors, faults.sync_errors, faults.read_errors) =
            (write_errors, sync_errors, read_errors);
    }

    /// The store does not start. That must be deserved.
    pub(super) fn start_refused(&mut self, node: usize, error: &str) {
        let (rotten, unreadable) = (self.nodes[node].disk().is_rotten(), self.nodes[node].has_errors());
        trace::note(
            self.moment(),
            "start refused: node, rotten, unreadable",
            [node as u64, rotten.into(), unreadable.into()],
        );
        self.report.refusals += 1;
        assert!(rotten || unreadable, "node {node} has an undamaged pool and is refused: {error}");
        assert!(self.stage == Stage::Working, "node {node} is refused when all is repaired: {error}");
        if rotten && !unreadable {
            // It will be refused again: its disk is replaced, or it stays down for as long as there are faults.
            if !self.may_lose_disk(node) || self.random.percent(50) {
                return;
            }
            self.replace_disk(node);
        }
        self.start_later(node);
    }

    pub(super) fn start_later(&mut self, node: usize) {
        let delay = self.random.skewed(MILLISECOND_NS..=self.swarm.down_ns_max);
        let boots = self.nodes[node].boots;
        self.after(delay, Happening::Start { node, boots });
    }

    /// Bits flip on the ill node.
    pub(super) fn rot(&mut self) {
        let Some((node, _)) = self.ill_node() else { return };
        let count = crate::to_usize(self.random.skewed(1..=20));
        let flipped =
            if self.options.rot { self.nodes[node].rot_data(count) } else { self.nodes[node].rot(count) };
        self.report.flipped_bits += flipped as u64;
        self.verifies.note_rot(node, self.now_ns);
    }

    /// The ill node comes back with an empty disk.
    pub(super) fn lose_disk(&mut self) {
        let Some((node, _)) = self.ill_node() else { return };
        if !self.may_lose_disk(node) {
            return;
        }
        if self.nodes[node].life.is_some() {
            self.stop(node, true);
            self.start_later(node);
        }
        self.replace_disk(node);
    }

    /// May a node forget everything? Where it was left out nothing is lost. Where it is in sync, somebody else must have
    /// all that was acknowledged, and go on without it: somebody else is in sync, who may be the last one. And it must
    /// not be the head, which may have asked the record store a moment ago to leave out all others.
    fn may_lose_disk(&self, node: usize) -> bool {
        self.records.all().iter().filter(|record| record.replicas().contains(&id(node))).all(|record| {
            let stale = record.stale.iter().any(|replica| replica.node == id(node));
            let others = record.in_sync.iter().any(|other| *other != id(node));
            let leads = record.head.is_some_and(|head| head.node == id(node));
            stale || others && !leads && record.min_in_sync <= 1
        })
    }

    fn replace_disk(&mut self, node: usize) {
        trace::note(self.moment(), "node has an empty disk", [node as u64, 0, 0]);
        self.report.new_disks += 1;
        self.nodes[node].replace_disk();
        self.checks.forget_disk(node);
    }

    /// A store that has failed, or cannot read everything, is started anew sooner or later.
    pub(super) fn watch_disks(&mut self) {
        for node in 0..self.nodes.len() {
            let restarts = self.nodes[node].life.is_some()
                && self.nodes[node].may_fail()
                && self.stage == Stage::Working
                && self.random.percent(RESTARTS);
            if restarts {
                self.stop(node, false);
                self.start_later(node);
            }
        }
    }

    /// No disk fails any more. What has failed is repaired or replaced, and started anew.
    pub(super) fn cure(&mut self, node: usize) {
        self.nodes[node].disk_mut().end_faults();
        if self.nodes[node].may_fail() && !self.options.rot {
            if self.nodes[node].life.is_some() {
                self.stop(node, false);
            }
            let rotten = self.nodes[node].is_rotted();
            if rotten && self.may_lose_disk(node) && (self.nodes[node].has_lost() || self.random.percent(30))
            {
                self.replace_disk(node);
            } else {
                self.nodes[node].repair();
            }
        }
    }
}
