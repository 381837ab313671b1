//! What goes wrong, when, and for how long.

use super::disks::Illness;
use super::links::Blocks;
use super::{ClusterOptions, Happening, MILLISECOND_NS, SECOND_NS, Stage, World, id, index};
use crate::sim::random::Random;
use crate::sim::trace;
use crate::sim::workload::Pattern;
use datapath::record::NodeId;
use datapath::units::Moment;

/// Percentage of seeds in which a node has a bad disk.
const ILL: u64 = 30;

/// Which kinds of trouble a seed has. Each is absent in many seeds, so that none hides behind another.
#[derive(Clone, Debug)]
pub(super) struct Swarm {
    pub(super) faults: u64,
    /// The kinds of faults, as often as they are likely.
    kinds: Vec<Kind>,
    pub(super) clients: u64,
    pub(super) pattern: Pattern,
    /// Answers from one fault to the next, at most.
    answers_max: u64,
    /// The same for time.
    calm_ns_max: u64,
    /// How long a node stays down.
    pub(super) down_ns_max: u64,
    /// How long network, store and clocks stay as they should not be.
    fault_ns_max: u64,
    pub(super) break_ns_max: u64,
    pub(super) network_delay_ns_max: u64,
    pub(super) store_delay_ns_max: u64,
    /// Percentage of messages to and from the record store that are lost.
    pub(super) store_losses: u64,
    /// Percentage of connections that a client makes to another node than the others of its volume.
    pub(super) strays: u64,
    /// Percentage of ended connections after which clients go to another node.
    pub(super) moves_after_end: u64,
    pub(super) patience_ns_max: u64,
    pub(super) think_ns_max: u64,
    /// Chances per million occasions.
    pub(super) disconnects: u64,
    /// Percentage of clients that only read.
    pub(super) readers: u64,
    pub(super) idle_pauses: u64,
    pub(super) tear_bytes: usize,
    pub(super) disk_delay_ns_max: u64,
    /// What disks do besides losing power.
    pub(super) illness: Option<Illness>,
    /// All nodes lose power at the end, once more.
    pub(super) dark_end: bool,
    /// Nothing is slow, and no message is lost.
    pub(super) swift: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    PowerCut,
    PowerCutSeveral,
    PowerCutAll,
    CutLink,
    Isolate,
    BlockWay,
    StoreAway,
    Pause,
    SlowDisk,
    Move,
    Split,
    Rot,
    NewDisk,
    Replacement,
    /// A replica is to go, or to stay after all.
    Leave,
    /// A node is asked to lead a volume for the sake of its replicas.
    Tend,
    /// A volume is attached to another node, or to none.
    Attach,
    /// A process is told to end.
    Stop,
}

/// What ends by itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    Block {
        from: usize,
        to: usize,
    },
    StoreAway,
    SlowDisk {
        node: usize,
        boot: u64,
    },
    /// What others send to this node is held up. When it gets through, the node is cut off.
    Late {
        volume: usize,
        node: usize,
    },
}

impl Swarm {
    pub(super) fn draw(random: &mut Random, options: ClusterOptions) -> Swarm {
        let mut likely = likely_kinds(random, options);
        // A stream of its own: seeds without it are what they would be if it did not exist.
        let mut disks = random.fork("disks", 0);
        let sound = options.peace || options.splits || options.moves;
        let ill = options.disks || options.rot || !sound && disks.percent(ILL);
        let draw = if options.rot { Illness::rot_only } else { Illness::draw };
        let illness = ill.then(|| draw(&mut disks));
        if illness.is_some_and(|illness| illness.rot) {
            likely.extend([Kind::Rot; 3]);
        }
        if illness.is_some_and(|illness| illness.new_disks) {
            likely.extend([Kind::NewDisk; 2]);
        }
        if options.replacements {
            likely.extend(std::iter::repeat_n(Kind::Replacement, 3 + likely.len()));
            likely.extend([Kind::Leave, Kind::Leave, Kind::Leave, Kind::Tend]);
        }
        if options.elsewhere {
            likely.extend([Kind::Attach, Kind::Attach, Kind::Attach, Kind::Attach, Kind::Tend]);
            // In some seeds nodes get a replica, those that lead without one, too.
            let often = if random.fork("elsewhere", 0).percent(50) { 3 } else { 0 };
            likely.extend(std::iter::repeat_n(Kind::Replacement, often));
            likely.extend(std::iter::repeat_n(Kind::Leave, often));
        }
        if likely.is_empty() {
            likely.push(Kind::Move);
        }
        let some =
            |random: &mut Random, percent: u64, value: u64| if random.percent(percent) { value } else { 0 };
        let swift = options.moves && random.fork("swift", 0).percent(60);
        let bytes_max = *random.pick(&[16 << 10, 128 << 10, 1 << 20]);
        let swarm = Swarm {
            swift,
            faults: match options {
                ClusterOptions { peace: true, .. } | ClusterOptions { splits: true, .. } => 3,
                ClusterOptions { replacements: true, .. }
                | ClusterOptions { moves: true, .. }
                | ClusterOptions { elsewhere: true, .. } => random.range(6..=20),
                _ => random.range(2..=9),
            },
            kinds: likely,
            clients: random.range(if options.splits { 3 } else { 1 }..=4),
            pattern: match Pattern::draw(random, bytes_max) {
                pattern if options.full => pattern.filling(512 << 10),
                pattern => pattern,
            },
            answers_max: if options.full { 300 } else { *random.pick(&[20, 100, 300]) },
            calm_ns_max: *random.pick(&[2 * SECOND_NS, 10 * SECOND_NS]),
            down_ns_max: *random.pick(&[100 * MILLISECOND_NS, 2 * SECOND_NS, 8 * SECOND_NS]),
            fault_ns_max: *random.pick(&[SECOND_NS, 8 * SECOND_NS]),
            break_ns_max: *random.pick(&[5 * MILLISECOND_NS, 10 * SECOND_NS]),
            network_delay_ns_max: *random.pick(&[50_000, 500_000, 20 * MILLISECOND_NS]),
            store_delay_ns_max: *random.pick(&[10 * MILLISECOND_NS, 3 * SECOND_NS]),
            store_losses: some(random, 50, 15),
            strays: some(random, 15, 15) + if options.fights { 60 } else { 0 },
            moves_after_end: *random.pick(&[5, 30]),
            patience_ns_max: if options.splits { 12 } else { *random.pick(&[2, 12]) } * SECOND_NS,
            think_ns_max: *random.pick(&[400_000, 20 * MILLISECOND_NS]),
            disconnects: some(random, 40, 5_000),
            readers: if options.splits || options.moves { 50 } else { *random.pick(&[0, 30, 60]) },
            idle_pauses: some(random, 40, 5_000),
            tear_bytes: *random.pick(&[512, 4096]),
            disk_delay_ns_max: *random.pick(&[5_000, 50_000, 200_000, 2 * MILLISECOND_NS]),
            dark_end: random.percent(40),
            illness,
        };
        if !swift {
            return swarm;
        }
        Swarm {
            network_delay_ns_max: 50_000,
            store_delay_ns_max: 10 * MILLISECOND_NS,
            store_losses: 0,
            disk_delay_ns_max: 50_000,
            ..swarm
        }
    }
}

/// The kinds of faults that this run may meet, each as often as it weighs.
fn likely_kinds(random: &mut Random, options: ClusterOptions) -> Vec<Kind> {
    let kinds = [
        (Kind::Kill, 3),
        (Kind::PowerCut, 3),
        (Kind::PowerCutSeveral, 1),
        (Kind::PowerCutAll, 1),
        (Kind::CutLink, 3),
        (Kind::Isolate, 2),
        (Kind::BlockWay, 2),
        (Kind::StoreAway, 1),
        (Kind::Pause, 3),
        (Kind::SlowDisk, 1),
        (Kind::Move, 2),
        (Kind::Split, 3),
        (Kind::Attach, 2),
        (Kind::Stop, 2),
    ];
    let mut likely = Vec::new();
    for (kind, often) in kinds {
        let gentle = matches!(
            kind,
            Kind::Kill | Kind::CutLink | Kind::Move | Kind::SlowDisk | Kind::Attach | Kind::Stop
        );
        let drawn = random.percent(55);
        let wanted = match options {
            ClusterOptions { splits: true, .. } => kind == Kind::Split,
            ClusterOptions { moves: true, .. } => kind == Kind::Attach || kind == Kind::Stop && drawn,
            _ => drawn && (gentle || !options.rot),
        };
        if wanted && !options.peace {
            likely.extend(std::iter::repeat_n(kind, often));
        }
    }
    likely
}

impl World {
    /// Decides when the next fault comes: after so many answers, or so much time.
    pub(super) fn plan_fault(&mut self) {
        self.fault_at_answers = self.answers + self.random.range(1..=self.swarm.answers_max);
        let longest = if self.options.splits { 10 * SECOND_NS } else { self.swarm.calm_ns_max };
        let soon = self.faults_made > 0 && !self.options.splits && self.random.percent(40);
        let delay = if soon {
            self.random.skewed(MILLISECOND_NS..=longest)
        } else {
            self.random.range(longest / 2..=longest)
        };
        self.after(delay, Happening::Fault(self.faults_made));
    }

    /// The next thing goes wrong; after the last one everything is repaired.
    pub(super) fn fault(&mut self) {
        if self.stage != Stage::Working {
            return;
        }
        self.faults_made += 1;
        if self.faults_left == 0 {
            return self.heal();
        }
        self.faults_left -= 1;
        let kind = *self.random.pick(&self.swarm.kinds);
        trace::note(Moment(self.now_ns), "fault of kind", [kind as u64, 0, 0]);
        let node = self.random.index(self.nodes.len());
        match kind {
            Kind::Kill => self.go_down(node, false),
            Kind::PowerCut => self.go_down(node, true),
            Kind::PowerCutSeveral => {
                for node in 0..self.nodes.len() {
                    if self.random.percent(60) {
                        self.go_down(node, true);
                    }
                }
            }
            Kind::PowerCutAll => (0..self.nodes.len()).for_each(|node| self.go_down(node, true)),
            Kind::CutLink => self.cut_some_link(),
            Kind::Isolate => self.isolate(node),
            Kind::BlockWay => self.block_some_way(node),
            Kind::StoreAway => {
                self.report.network_faults += 1;
                self.store_away = true;
                self.undo_later(Fault::StoreAway);
            }
            Kind::Pause => self.pause(node),
            Kind::SlowDisk => self.slow_disk(node),
            Kind::Split => self.split(),
            Kind::Rot => self.rot(),
            Kind::NewDisk => self.lose_disk(),
            Kind::Replacement => self.replace_replica(node),
            Kind::Leave => self.have_a_replica_go(),
            Kind::Tend => {
                let volume = self.random.index(self.volumes.len());
                self.have_it_tended(volume);
            }
            Kind::Attach => self.attach_somewhere(),
            Kind::Stop => self.stop_politely(node),
            Kind::Move => {
                let volume = self.random.index(self.volumes.len());
                self.volumes[volume].home = node;
                (0..self.sessions.len()).for_each(|session| self.leave_and_return(session, volume));
            }
        }
        self.plan_fault();
        if kind == Kind::Split {
            // It takes its time, however much is answered meanwhile.
            self.fault_at_answers = u64::MAX;
        }
    }

    fn undo_later(&mut self, fault: Fault) {
        let delay = self.random.skewed(10 * MILLISECOND_NS..=self.swarm.fault_ns_max);
        self.after(delay, Happening::Undo(fault));
    }

    fn go_down(&mut self, node: usize, power_cut: bool) {
        if self.nodes[node].life.is_none() {
            return;
        }
        if power_cut {
            self.report.power_cuts += 1;
        } else {
            self.report.kills += 1;
        }
        self.stop(node, power_cut);
        self.start_later(node);
    }

    /// Somebody takes out the replica of a node, if it is not in sync, or gives it one.
    fn replace_replica(&mut self, node: usize) {
        let volume = self.random.index(self.volumes.len());
        let (present, proposal) = (self.records.get(volume), self.random.bits());
        let changed = if present.replicas().contains(&id(node)) {
            present.without_replica(id(node), proposal).ok().filter(|next| next.replicas().len() > 1)
        } else {
            present.with_replica(id(node), proposal).ok()
        };
        let Some(record) = changed else { return };
        trace::note(
            Moment(self.now_ns),
            "replica added or taken out: volume, node, version",
            [volume as u64, node as u64, record.version],
        );
        let before = present.clone();
        self.records.replace(volume, record.clone());
        self.tell_change(&before, &record);
    }

    /// Somebody wants a replica to go, or does not want that any more.
    fn have_a_replica_go(&mut self) {
        let volume = self.random.index(self.volumes.len());
        let replicas = self.records.get(volume).replicas();
        let node = *self.random.pick(&replicas);
        let leaves = !self.records.get(volume).leaving.contains(&node);
        self.mark_leaving(volume, node, leaves);
    }

    fn mark_leaving(&mut self, volume: usize, node: NodeId, leaves: bool) {
        let before = self.records.get(volume).clone();
        let proposal = self.random.bits();
        let record = before.with_leaving(node, leaves, proposal).expect("it has a replica");
        trace::note(
            Moment(self.now_ns),
            "replica is to go: volume, node, or to stay",
            [volume as u64, node.0.into(), u64::from(!leaves)],
        );
        self.records.replace(volume, record.clone());
        self.tell_change(&before, &record);
    }

    /// What was to go and is not in sync any more is taken out. In the end nothing goes that is needed.
    pub(super) fn watch_leaving(&mut self) {
        for volume in 0..self.volumes.len() {
            let record = self.records.get(volume).clone();
            let out = record.leaving.iter().copied().find(|node| !record.is_in_sync(*node));
            if let Some(node) = out.filter(|_| record.replicas().len() > 1) {
                let proposal = self.random.bits();
                let next = record.without_replica(node, proposal).expect("it is not in sync");
                self.records.replace(volume, next.clone());
                self.tell_change(&record, &next);
            } else if let Some(node) = record.leaving.first().copied()
                && self.stage != Stage::Working
                && record.staying().count() < record.replicas_wanted as usize
            {
                self.mark_leaving(volume, node, false);
            }
        }
    }

    fn cut_some_link(&mut self) {
        let links: Vec<u64> = self.links.keys().copied().collect();
        if !links.is_empty() {
            self.report.network_faults += 1;
            let link = *self.random.pick(&links);
            self.cut_link(link);
        }
    }

    /// A node is alone, without knowing it; it may still reach the record store.
    fn isolate(&mut self, node: usize) {
        self.report.network_faults += 1;
        let store = self.blocks.store();
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        let others: Vec<usize> = others.chain(self.random.percent(60).then_some(store)).collect();
        let cut = self.random.percent(30);
        let delay = self.random.skewed(10 * MILLISECOND_NS..=self.swarm.fault_ns_max);
        for other in others {
            for (from, to) in [(node, other), (other, node)] {
                self.blocks.set(from, to, true);
                self.after(delay, Happening::Undo(Fault::Block { from, to }));
            }
        }
        if cut {
            let touching = self.links.iter().filter(|(_, link)| link.nodes.contains(&node));
            for link in touching.map(|(link, _)| *link).collect::<Vec<_>>() {
                self.cut_link(link);
            }
        }
    }

    /// A head is cut off with clients who read from it, and others ask another node for the volume. Whatever let it read
    /// must have ended before another head takes changes.
    fn split(&mut self) {
        let volume = self.random.index(self.volumes.len());
        let Some(head) = self.records.get(volume).head else { return };
        let node = index(head.node);
        if self.random.percent(40) {
            // First it hears late of what it was granted. Nobody writes meanwhile: a member that owes is removed.
            let quiet_ns = 200 * MILLISECOND_NS;
            let late_ns = self.random.range(300 * MILLISECOND_NS..=2_700 * MILLISECOND_NS);
            self.rest_writers(volume, quiet_ns + late_ns + 30 * MILLISECOND_NS);
            return self.after(quiet_ns, Happening::HoldUp { volume, node, late_ns });
        }
        self.cut_off(volume, node);
    }

    pub(super) fn hold_up(&mut self, volume: usize, node: usize, late_ns: u64) {
        if self.stage == Stage::Working {
            (0..self.nodes.len()).for_each(|other| self.blocks.set(other, node, true));
            self.after(late_ns, Happening::Undo(Fault::Late { volume, node }));
        }
    }

    /// A head stands still for longer than it may read, and does not hear at once what became of the volume meanwhile.
    fn stand_still(&mut self, volume: usize, node: usize, delay_ns: u64) {
        let late = self.random.percent(50);
        let Some(driver) = self.nodes[node].at(self.now_ns) else { return };
        driver.pause(delay_ns, late);
        self.report.pauses += 1;
        let store = self.nodes.len();
        for (from, to) in [(node, store), (store, node)] {
            self.blocks.set(from, to, true);
            self.after(delay_ns + SECOND_NS, Happening::Undo(Fault::Block { from, to }));
        }
        self.ask_another_node(volume, node);
    }

    pub(super) fn cut_off(&mut self, volume: usize, node: usize) {
        if self.stage != Stage::Working {
            return;
        }
        let delay = self.random.range(SECOND_NS..=7 * SECOND_NS);
        if self.options.stalls {
            return self.stand_still(volume, node, delay);
        }
        self.report.network_faults += 1;
        for other in (0..=self.nodes.len()).filter(|other| *other != node) {
            for (from, to) in [(node, other), (other, node)] {
                self.blocks.set(from, to, true);
                self.after(delay, Happening::Undo(Fault::Block { from, to }));
            }
        }
        self.ask_another_node(volume, node);
    }

    /// Those who write to the volume go to another node in sync, whatever that remembers.
    fn ask_another_node(&mut self, volume: usize, node: usize) {
        let others: Vec<usize> = self
            .records
            .get(volume)
            .in_sync
            .iter()
            .map(|other| index(*other))
            .filter(|it| *it != node)
            .collect();
        if others.is_empty() {
            return;
        }
        let (next, struck) = (*self.random.pick(&others), *self.random.pick(&others));
        if self.random.percent(50) && self.nodes[struck].life.is_some() {
            // What it had granted must not be forgotten.
            self.report.kills += 1;
            self.stop(struck, false);
            let delay = self.random.range(MILLISECOND_NS..=50 * MILLISECOND_NS);
            let boots = self.nodes[struck].boots;
            self.after(delay, Happening::Start { node: struck, boots });
        }
        self.move_writers(volume, next);
    }

    /// Bytes go one way only.
    fn block_some_way(&mut self, from: usize) {
        self.report.network_faults += 1;
        let to = self.random.index(self.nodes.len() + 1);
        if to != from {
            self.blocks.set(from, to, true);
            self.undo_later(Fault::Block { from, to });
        }
    }

    fn pause(&mut self, node: usize) {
        let late = self.random.percent(50);
        let nanoseconds = self.random.skewed(10 * MILLISECOND_NS..=self.swarm.fault_ns_max);
        if let Some(driver) = self.nodes[node].at(self.now_ns) {
            self.report.pauses += 1;
            driver.pause(nanoseconds, late);
        }
    }

    fn slow_disk(&mut self, node: usize) {
        let boot = self.nodes[node].boots;
        let stalls = *self.random.pick(&[20_000, 300_000]);
        if let Some(driver) = self.nodes[node].at(self.now_ns) {
            driver.disk.faults.stalls = stalls;
            self.undo_later(Fault::SlowDisk { node, boot });
        }
    }

    pub(super) fn undo(&mut self, fault: Fault) {
        match fault {
            Fault::Block { from, to } => {
                self.blocks.set(from, to, false);
                self.flow_again();
            }
            Fault::StoreAway => self.store_away = false,
            Fault::Late { volume, node } => {
                (0..self.nodes.len()).for_each(|other| self.blocks.set(other, node, false));
                self.flow_again();
                if self.stage == Stage::Working {
                    let delay = self.random.range(MILLISECOND_NS..=20 * MILLISECOND_NS);
                    self.after(delay, Happening::Split { volume, node });
                }
            }
            Fault::SlowDisk { node, boot } => {
                if self.is_living(node, boot)
                    && let Some(driver) = self.nodes[node].at(self.now_ns)
                {
                    driver.disk.faults.stalls = 0;
                }
            }
        }
    }

    /// All faults end: from here on everything must come right by itself.
    fn heal(&mut self) {
        trace::note(Moment(self.now_ns), "faults end", [0; 3]);
        (self.stage, self.calm_since_ns) = (Stage::Calm, self.now_ns);
        self.blocks = Blocks::new(self.nodes.len());
        self.flow_again();
        self.store_away = false;
        for node in 0..self.nodes.len() {
            self.cure(node);
            if self.nodes[node].life.is_none() {
                self.start(node);
            }
        }
        self.begin_verifying();
    }
}
