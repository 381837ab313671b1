//! Volumes that are attached to one node after the other, and processes that end as they should.

use datapath::record::NodeId;

use super::{Happening, MILLISECOND_NS, SECOND_NS, Stage, World, id, index, position};
use crate::sim::trace;

/// A process that was told to end is killed after this time.
const END_NS_MAX: u64 = 3 * SECOND_NS;
/// From the change of the record to a new head that serves, if nothing goes wrong.
const MOVE_NS_MAX: u64 = 200 * MILLISECOND_NS;
/// After a node has started or stopped, moves may take longer for so long.
const DISTURBED_NS: u64 = SECOND_NS;

/// A move that nothing should hinder.
#[derive(Clone, Copy, Debug)]
struct Awaited {
    node: NodeId,
    since_ns: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Moves {
    awaited: Vec<Option<Awaited>>,
    disturbed_ns: u64,
    /// Processes that were told to end.
    ending: Vec<(usize, u64)>,
}

impl Moves {
    pub(super) fn new(volumes: usize) -> Moves {
        Moves { awaited: vec![None; volumes], disturbed_ns: 0, ending: Vec::new() }
    }

    /// A node starts or stops.
    pub(super) fn disturb(&mut self, now_ns: u64) {
        self.disturbed_ns = now_ns;
        self.awaited.fill(None);
    }
}

impl World {
    /// Somebody attaches a volume to a node, most often to one that has a replica in sync, or detaches it.
    pub(super) fn attach_somewhere(&mut self) {
        let volume = self.random.index(self.volumes.len());
        let in_sync = self.records.get(volume).in_sync.clone();
        let without: Vec<NodeId> =
            (0..self.nodes.len()).map(id).filter(|node| !in_sync.contains(node)).collect();
        let node = match self.random.range(0..=7) {
            0 => None,
            1..=5 if self.options.elsewhere && !without.is_empty() => Some(*self.random.pick(&without)),
            1 => None,
            2..=6 => Some(*self.random.pick(&in_sync)),
            _ => Some(id(self.random.index(self.nodes.len()))),
        };
        self.attach(volume, node);
    }

    pub(super) fn attach(&mut self, volume: usize, node: Option<NodeId>) {
        if self.records.get(volume).attached == node {
            return;
        }
        self.report.attachments += 1;
        let is_swift = self.is_undisturbed(volume);
        let proposal = self.random.bits();
        let before = self.records.get(volume).clone();
        let record = self.records.attach(volume, node, proposal);
        let to = node.map_or(u64::MAX, |node| node.0.into());
        trace::note(
            self.moment(),
            "volume attached: volume, node, version",
            [volume as u64, to, record.version],
        );
        self.moves.awaited[volume] =
            node.filter(|_| is_swift).map(|node| Awaited { node, since_ns: self.now_ns });
        if let Some(node) = node {
            self.volumes[volume].home = index(node);
        }
        self.tell_change(&before, &record);
    }

    /// Is there nothing that could make a move of the volume slow: faults, lost messages, a head that does not serve yet?
    fn is_undisturbed(&self, volume: usize) -> bool {
        let calm = self.stage == Stage::Working && self.now_ns > self.moves.disturbed_ns + DISTURBED_NS;
        let record = self.records.get(volume);
        let led = record.living_head().is_none_or(|head| {
            let life = self.nodes[index(head.node)].life.as_ref();
            let mut replicas = life.into_iter().flat_map(|life| life.driver.engine().replicas());
            replicas.any(|state| {
                position(state.record.volume) == volume && state.serves && state.record == record
            })
        });
        let ending = self.moves.ending.iter().any(|(node, boot)| self.is_living(*node, *boot));
        self.swarm.swift
            && calm
            && !ending
            && led
            && record.started
            && record.in_sync.len() == record.replicas().len()
    }

    /// A node had a turn: does it serve what was attached to it?
    pub(super) fn watch_moves_to(&mut self, node: usize) {
        if self.moves.awaited.iter().all(Option::is_none) {
            return;
        }
        let Some(life) = &self.nodes[node].life else { return };
        for state in life.driver.engine().replicas().filter(|state| state.serves) {
            let awaited = &mut self.moves.awaited[position(state.record.volume)];
            if let Some(moved) = awaited.take_if(|awaited| index(awaited.node) == node) {
                let took_ns = self.now_ns - moved.since_ns;
                self.report.timed_moves += 1;
                self.report.slowest_move_ns = self.report.slowest_move_ns.max(took_ns);
            }
        }
    }

    /// A head has let go, and does not hear that its record says so: whoever reads from it still must not.
    pub(super) fn cut_off_now_and_then(&mut self, volume: usize, node: usize) {
        if self.options.moves && !self.swarm.swift && self.random.percent(20) {
            self.moves.disturb(self.now_ns);
            self.cut_off(volume, node);
        }
    }

    /// No move takes too long, and a volume whose node does not start is detached once faults have ended.
    pub(super) fn watch_attachments(&mut self) {
        for volume in 0..self.volumes.len() {
            if let Some(awaited) = self.moves.awaited[volume] {
                assert!(
                    self.now_ns < awaited.since_ns + MOVE_NS_MAX,
                    "volume {volume} was attached to {:?} at {} and does not move\n{}",
                    awaited.node,
                    awaited.since_ns,
                    self.describe()
                );
            }
            let record = self.records.get(volume);
            let lost = record.attached.is_some_and(|node| self.nodes[index(node)].life.is_none());
            if lost && self.stage != Stage::Working {
                self.attach(volume, None);
            }
        }
    }

    /// A process is told to end. It answers what it was asked, and lets go of its volumes.
    pub(super) fn stop_politely(&mut self, node: usize) {
        let boot = self.nodes[node].boots;
        let Some(driver) = self.nodes[node].at(self.now_ns) else { return };
        trace::note(datapath::units::Moment(self.now_ns), "node is told to end", [node as u64, 0, 0]);
        driver.drain();
        self.moves.disturb(self.now_ns);
        self.moves.ending.push((node, boot));
        self.after(END_NS_MAX, Happening::EndAnyway { node, boot });
    }

    pub(super) fn end_anyway(&mut self, node: usize, boot: u64) {
        if self.is_living(node, boot) {
            self.end_politely(node);
        }
    }

    pub(super) fn end_if_drained(&mut self, node: usize) {
        if self.nodes[node].life.as_ref().is_some_and(|life| life.driver.is_drained()) {
            self.end_politely(node);
        }
    }

    fn end_politely(&mut self, node: usize) {
        self.stop(node, false);
        if self.stage == Stage::Working {
            self.start_later(node);
        } else {
            self.start(node);
        }
    }
}
