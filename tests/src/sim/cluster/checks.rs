//! What must hold at any time, seen from outside.

use std::collections::{BTreeMap, BTreeSet};

use datapath::checksum::crc32c;
use datapath::record::{NodeId, Stamp};
use datapath::units::BLOCK_BYTES_USIZE;

use super::{World, id, index, position};
use crate::sim::subject::StableReader;

/// Percentage of starts of epochs after which replicas are compared block for block.
const COMPARED_STARTS: u64 = 25;

/// What was seen before.
#[derive(Debug)]
pub(super) struct Checks {
    /// By node and volume: up to where its head, in this epoch, has committed.
    committed: Vec<Vec<(u32, u64)>>,
    /// By volume and epoch: the node and the session that committed something.
    leads: BTreeMap<(usize, u32), (usize, u64)>,
    /// By node and volume: the highest promise that was given.
    promised: Vec<Vec<u32>>,
    /// Volumes and epochs that have started.
    started: BTreeSet<(usize, u32)>,
    /// By node: volumes that its lanes had taken out in this process.
    removed: Vec<u64>,
}

impl Checks {
    pub(super) fn new(nodes: usize, volumes: usize) -> Checks {
        Checks {
            committed: vec![vec![(0, 0); volumes]; nodes],
            promised: vec![vec![0; volumes]; nodes],
            leads: BTreeMap::new(),
            started: BTreeSet::new(),
            removed: vec![0; nodes],
        }
    }

    pub(super) fn forget_node(&mut self, node: usize) {
        self.committed[node].fill((0, 0));
        self.removed[node] = 0;
    }

    /// The node promised on a disk that is no more.
    pub(super) fn forget_disk(&mut self, node: usize) {
        self.promised[node].fill(0);
    }
}

/// What stable media hold of a volume: its last change, and its blocks that are not zero.
type Content = (Stamp, BTreeMap<u32, u32>);

impl World {
    /// Looks at the heads of a node that had a turn.
    pub(super) fn check_node(&mut self, node: usize) {
        let Some(life) = &self.nodes[node].life else { return };
        let mut started = Vec::new();
        let removed = life.driver.engine().volumes_removed();
        if std::mem::replace(&mut self.checks.removed[node], removed) != removed {
            // What was promised for a replica that is no more binds nobody.
            for volume in 0..self.volumes.len() {
                let mut states = life.driver.engine().replicas();
                let state = states.find(|state| position(state.record.volume) == volume);
                if state.is_none_or(|state| state.promised.is_none()) {
                    self.checks.promised[node][volume] = 0;
                }
            }
        }
        for state in life.driver.engine().replicas() {
            let volume = position(state.record.volume);
            if let Some(promised) = state.promised {
                let before = std::mem::replace(&mut self.checks.promised[node][volume], promised);
                assert!(promised >= before, "node {node} promised epoch {before} and then only {promised}");
            }
            if !state.leads {
                continue;
            }
            let epoch = state.record.epoch;
            let session = state.record.head.expect("an epoch has a head");
            let own = (node, session.session);
            if self.checks.started.insert((volume, epoch)) {
                started.push((volume, state.record == self.records.get(volume)));
            }
            let seen = &mut self.checks.committed[node][volume];
            if seen.0 != epoch {
                *seen = (epoch, state.committed);
            }
            if state.committed > seen.1 {
                self.report.commits += state.committed - seen.1;
                *seen = (epoch, state.committed);
                let lead = *self.checks.leads.entry((volume, epoch)).or_insert(own);
                assert_eq!(lead, own, "two heads commit in epoch {epoch} of volume {volume}");
                self.assert_held_by_all(volume, state.committed);
            }
        }
        for (volume, is_present) in started {
            if is_present && self.random.percent(COMPARED_STARTS) {
                // When an epoch starts, all have the same.
                if let Err(difference) = self.compare_replicas(volume) {
                    panic!("{difference}\n{}", self.describe());
                }
            }
        }
    }

    /// Everybody in sync has on stable media what a head has committed.
    fn assert_held_by_all(&self, volume: usize, committed: u64) {
        let record = self.records.get(volume);
        for member in record.in_sync.iter().map(|member| index(*member)) {
            let durable = match &self.nodes[member].life {
                Some(life) => {
                    let mut replicas = life.driver.engine().replicas();
                    let state = replicas.find(|state| position(state.record.volume) == volume);
                    state.and_then(|state| state.durable)
                }
                None => self.content(member, volume).map(|content| content.0.sequence),
            };
            if let Some(durable) = durable {
                assert!(
                    durable >= committed,
                    "change {committed} of volume {volume} is committed, and node {member}, in sync, has {durable}\n{}",
                    self.describe()
                );
            }
        }
    }

    /// Are the replicas in sync equal, block for block, on stable media?
    ///
    /// # Errors
    /// What differs.
    pub(super) fn compare_replicas(&mut self, volume: usize) -> Result<(), String> {
        self.report.comparisons += 1;
        let record = self.records.get(volume);
        let known = |member: &NodeId| Some((*member, self.content(index(*member), volume)?));
        let mut contents = record.in_sync.iter().filter_map(known);
        let Some((first, expected)) = contents.next() else { return Ok(()) };
        for (member, content) in contents {
            if content == expected {
                continue;
            }
            let differing: Vec<_> = expected
                .1
                .iter()
                .filter(|(block, crc)| content.1.get(block) != Some(crc))
                .chain(content.1.iter().filter(|(block, _)| !expected.1.contains_key(block)))
                .take(5)
                .collect();
            return Err(format!(
                "replicas of volume {volume} differ in epoch {}: {first:?} is at {:?}, {member:?} at {:?}, blocks \
                 {differing:?}",
                record.epoch, expected.0, content.0
            ));
        }
        Ok(())
    }

    /// Nothing where the disk has given cause for not having it.
    fn content(&self, node: usize, volume: usize) -> Option<Content> {
        if self.nodes[node].disk().is_rotten() || self.nodes[node].has_lost() {
            return None;
        }
        let mut reader = StableReader(self.nodes[node].disk());
        let (_, mut lanes) = self.nodes[node].read_pool(&mut reader);
        let number = super::number(volume).0;
        for recovered in &mut lanes {
            let Some(place) = recovered.volumes.iter().position(|known| known.number == number) else {
                continue;
            };
            let stamp = recovered.volumes[place].stamp();
            let mut found = Vec::new();
            recovered
                .visit_blocks(&mut reader, place, |block, mapping| found.push((block, mapping.place)))
                .expect("an undamaged map");
            let mut bytes = [0; BLOCK_BYTES_USIZE];
            let mut blocks = BTreeMap::new();
            for (block, place) in found {
                self.nodes[node].disk().read_stable(place.offset_bytes(), &mut bytes);
                if bytes.iter().any(|byte| *byte != 0) {
                    blocks.insert(block, crc32c(&bytes));
                }
            }
            return Some((stamp, blocks));
        }
        assert!(
            self.nodes[node].is_replaced(),
            "{:?} is in sync and does not know volume {volume}",
            id(node)
        );
        None
    }
}
