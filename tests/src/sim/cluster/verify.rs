//! Volumes are verified again and again, by the nodes themselves and because somebody wants it, whatever else happens.
//!
//! What a pass says must be true: replicas in sync never differ, damage is where a disk has given cause for it, and what a
//! pass has seen to its end and calls sound is sound on the disks. Every pass that somebody waits for has an end.

use std::collections::BTreeMap;

use datapath::checksum::crc32c;
use datapath::record::NodeId;
use datapath::replica::check::{CheckReport, PassState, Purpose};
use datapath::units::BLOCK_BYTES_USIZE;

use super::node::SCRUB_NS;
use super::{Happening, MILLISECOND_NS, SECOND_NS, Stage, World, index, number, position};
use crate::sim::random::Random;
use crate::sim::subject::StableReader;
use crate::sim::trace;

/// Whoever waits is told something within this time, or the node has died.
const SILENT_NS_MAX: u64 = 60 * SECOND_NS;
/// From one wish to the next.
const PAUSE_NS_MAX: u64 = 3 * SECOND_NS;

/// Somebody waits.
#[derive(Clone, Copy, Debug)]
struct Open {
    volume: usize,
    node: usize,
    boot: u64,
    since_ns: u64,
    heard_ns: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Verifies {
    asked: u64,
    open: BTreeMap<u64, Open>,
    /// When bits flipped last, by node.
    rotted_ns: Vec<u64>,
    /// When a process last ended that had feigned damage.
    feigned_ns: Option<u64>,
    /// When the last pass that ended well, by volume, had begun.
    clean_since_ns: Vec<Option<u64>>,
    random: Random,
}

impl Verifies {
    pub(super) fn new(nodes: usize, volumes: usize, random: Random) -> Verifies {
        Verifies {
            asked: 0,
            open: BTreeMap::new(),
            rotted_ns: vec![0; nodes],
            feigned_ns: None,
            clean_since_ns: vec![None; volumes],
            random,
        }
    }

    pub(super) fn note_feigned(&mut self, now_ns: u64) {
        self.feigned_ns = Some(now_ns);
    }

    pub(super) fn note_rot(&mut self, node: usize, now_ns: u64) {
        self.rotted_ns[node] = now_ns;
    }
}

impl World {
    pub(super) fn plan_verify(&mut self) {
        let delay = self.verifies.random.skewed(10 * MILLISECOND_NS..=PAUSE_NS_MAX);
        self.after(delay, Happening::Verify);
    }

    /// Somebody wants a volume verified: at its head, most often.
    pub(super) fn want_verify(&mut self) {
        let volume = self.verifies.random.index(self.volumes.len());
        let record = self.records.get(volume);
        let replicas = record.replicas();
        let any = *self.verifies.random.pick(&replicas);
        // Where nobody leads it a node would take it; that is for heads and clients to fight about now and then.
        let strays = self.verifies.random.percent(5);
        let node = record.head.filter(|_| !strays).map_or(any, |head| head.node);
        self.verify_at(volume, index(node));
        if self.stage == Stage::Working {
            self.plan_verify();
        }
    }

    fn verify_at(&mut self, volume: usize, node: usize) {
        let boot = self.nodes[node].boots;
        let Some(driver) = self.nodes[node].at(self.now_ns) else { return };
        self.verifies.asked += 1;
        let (verify, now_ns) = (self.verifies.asked, self.now_ns);
        driver.tell_verify(number(volume), verify);
        let open = Open { volume, node, boot, since_ns: now_ns, heard_ns: now_ns };
        self.verifies.open.insert(verify, open);
    }

    /// A node tells how a pass stands.
    pub(super) fn heed_report(&mut self, report: &CheckReport) {
        let volume = position(report.volume);
        trace::note(
            self.moment(),
            "checked: volume, compared, repaired",
            [volume as u64, report.compared_blocks, report.repaired_blocks],
        );
        assert_eq!(report.differing_blocks, 0, "replicas differ: {report:#?}\n{}", self.describe());
        if report.unreadable_blocks > 0 {
            let began_ns = match report.purpose {
                Purpose::Verify(verify) => self.verifies.open[&verify].since_ns,
                Purpose::Scrub => self.now_ns.saturating_sub(2 * SCRUB_NS),
            };
            let deserved = self.verifies.feigned_ns.is_some_and(|ended_ns| ended_ns >= began_ns)
                || self.nodes.iter().any(|node| node.may_fail() || node.feigns_damage());
            assert!(deserved, "no disk has given cause: {report:#?}\n{}", self.describe());
        }
        let since_ns = match report.purpose {
            Purpose::Verify(verify) => {
                let open = self.verifies.open.get_mut(&verify).expect("somebody waits for it");
                open.heard_ns = self.now_ns;
                let since_ns = open.since_ns;
                if report.state != PassState::Running {
                    self.verifies.open.remove(&verify);
                }
                Some(since_ns)
            }
            Purpose::Scrub => None,
        };
        if report.state != PassState::Complete {
            return;
        }
        self.report.passes += 1;
        self.report.compared_blocks += report.compared_blocks;
        self.report.repaired_blocks += report.repaired_blocks;
        if let Some(since_ns) = since_ns.filter(|_| report.is_clean()) {
            self.verifies.clean_since_ns[volume] = Some(since_ns);
            for member in
                report.members.iter().filter(|node| self.verifies.rotted_ns[index(**node)] < since_ns)
            {
                self.assert_sound(*member, volume);
            }
        }
    }

    /// All that the map of a replica points at is what it should be. Where the disk's damage keeps its map from being read,
    /// nothing can be said.
    fn assert_sound(&self, member: NodeId, volume: usize) {
        let node = &self.nodes[index(member)];
        let mut reader = StableReader(node.disk());
        let Ok((_, mut lanes)) = node.try_read_pool(&mut reader) else { return };
        for recovered in &mut lanes {
            let Some(place) = recovered.volumes.iter().position(|known| known.number == number(volume).0)
            else {
                continue;
            };
            let mut bytes = [0; BLOCK_BYTES_USIZE];
            let mut bad = Vec::new();
            let visit = |block, mapping: datapath::store::map::Mapping| {
                node.disk().read_stable(mapping.place.offset_bytes(), &mut bytes);
                if crc32c(&bytes) != mapping.crc {
                    bad.push(block);
                }
            };
            let known = recovered.visit_blocks(&mut reader, place, visit);
            assert!(
                known.is_err() || bad.is_empty(),
                "blocks {bad:?} of {member:?} are damaged after a pass over volume {volume}\n{}",
                self.describe()
            );
        }
    }

    /// Nobody waits for ever.
    pub(super) fn watch_verifies(&mut self) {
        let (nodes, now_ns) = (&self.nodes, self.now_ns);
        self.verifies
            .open
            .retain(|_, open| nodes[open.node].life.is_some() && nodes[open.node].boots == open.boot);
        let silent = self.verifies.open.values().find(|open| now_ns - open.heard_ns > SILENT_NS_MAX);
        assert!(silent.is_none(), "nothing is heard of {silent:?}\n{}", self.describe());
    }

    /// Whoever is asked to verify a volume leads it meanwhile.
    pub(super) fn have_it_led(&mut self, volume: usize) {
        let asked = self.verifies.open.values().any(|open| open.volume == volume);
        let record = self.records.get(volume);
        let head = record.attached.or_else(|| record.head.map(|head| head.node)).map(index);
        if let Some(node) = head.filter(|_| !asked) {
            self.verify_at(volume, node);
        }
    }

    /// Whoever keeps the records sees that something has to be done for the volume's replicas, and asks a node.
    pub(super) fn have_it_tended(&mut self, volume: usize) {
        let record = self.records.get(volume);
        let node = index(*self.random.pick(&record.in_sync));
        if let Some(driver) = self.nodes[node].at(self.now_ns) {
            driver.tell_tend(number(volume));
        }
    }

    /// Faults have ended, and what has rotted is not made good by anybody but the nodes: is it?
    pub(super) fn is_all_verified(&mut self) -> bool {
        let since_ns = self.calm_since_ns;
        let mut all = true;
        for volume in 0..self.volumes.len() {
            if self.verifies.clean_since_ns[volume].is_some_and(|at_ns| at_ns >= since_ns) {
                continue;
            }
            all = false;
            self.have_it_led(volume);
        }
        all
    }
}
