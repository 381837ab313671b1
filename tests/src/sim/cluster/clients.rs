//! Clients that follow a volume from node to node.

use datapath::engine::ports::ConnectionId;
use datapath::record::Record;
use datapath::units::Moment;

use super::{Happening, MILLISECOND_NS, SECOND_NS, Stage, World, id, index};
use crate::sim::client::{Client, ClientCounts, ClientPlan, Tolerance};
use crate::sim::doubts::Came;
use crate::sim::trace;
use crate::sim::workload::{Ask, AskKind, Workload};

/// Bytes that a verifying client reads at once.
const VERIFY_BYTES: u64 = 128 << 10;
const VERIFY_DEPTH: usize = 3;
/// What was sent and not answered stays in doubt for good: the fewer there are, the more is known.
const DEPTH_MAX: usize = 16;
/// Readers go on for as long as others are stuck, so they take their time.
const READER_PAUSE_NS_MAX: u64 = 40 * MILLISECOND_NS;
const READER_BYTES_MAX: u64 = 64 << 10;
/// Replicas are equal so long after the last fault, however slow they were.
const EQUAL_NS_MAX: u64 = 60 * SECOND_NS;
/// How long clients of a calm cluster wait before they try elsewhere.
const CALM_PATIENCE_NS: u64 = 15 * SECOND_NS;

#[derive(Debug)]
enum Role {
    Worker(Box<Workload>),
    /// Reads the volume from this byte on.
    Verifier(u64),
    /// Has read everything, or has no more to do.
    Retired,
}

/// A client's connection.
#[derive(Debug)]
struct Connected {
    client: Client,
    node: usize,
    connection: ConnectionId,
    since_ns: u64,
    came: Came,
    patience_ns: u64,
}

/// Somebody who uses a volume, over one connection after the other.
#[derive(Debug)]
pub(super) struct Session {
    role: Role,
    volume: usize,
    /// Changes nothing: it sees what becomes of the others' changes, also where no change is possible.
    reader: bool,
    connected: Option<Connected>,
    think_planned: bool,
}

impl Session {
    pub(super) fn describe(&self) -> String {
        let role = match &self.role {
            Role::Worker(_) => "worker".to_owned(),
            Role::Verifier(next) => format!("verifier at {next}"),
            Role::Retired => "retired".to_owned(),
        };
        let at = self.connected.as_ref().map(|at| {
            let pending = at.client.pending_count();
            format!(
                "{} on node {} ready {} pending {pending}",
                at.connection.0,
                at.node,
                at.client.is_ready()
            )
        });
        format!("session on volume {}: {role}, connected {at:?}", self.volume)
    }
}

impl World {
    pub(super) fn add_workers(&mut self) {
        for number in 0..self.swarm.clients {
            let mut random = self.random.fork("worker", number);
            let volume = random.index(self.volumes.len());
            let size_bytes = self.volumes[volume].size_bytes;
            let workload = Workload::new(self.swarm.pattern.clone(), size_bytes, random.fork("workload", 0));
            self.add_session(volume, Role::Worker(Box::new(workload)));
            self.sessions.last_mut().expect("just added").reader = random.percent(self.swarm.readers);
        }
    }

    fn add_session(&mut self, volume: usize, role: Role) {
        self.sessions.push(Session { role, volume, reader: false, connected: None, think_planned: false });
        let delay = self.random.range(0..=MILLISECOND_NS);
        self.plan_think(self.sessions.len() - 1, delay);
    }

    /// Faults have ended: whoever works stops, and each volume is read back.
    pub(super) fn begin_verifying(&mut self) {
        for index in 0..self.sessions.len() {
            self.leave(index);
            self.sessions[index].role = Role::Retired;
        }
        for volume in 0..self.volumes.len() {
            self.add_session(volume, Role::Verifier(0));
        }
    }

    fn plan_think(&mut self, session: usize, nanoseconds: u64) {
        if !std::mem::replace(&mut self.sessions[session].think_planned, true) {
            self.after(nanoseconds, Happening::Think(session));
        }
    }

    /// A client has time: it connects, sends or leaves.
    pub(super) fn think(&mut self, session: usize) {
        self.sessions[session].think_planned = false;
        if matches!(self.sessions[session].role, Role::Retired) {
            return;
        }
        let rests_until_ns = self.volumes[self.sessions[session].volume].rests_until_ns;
        if !self.sessions[session].reader && self.now_ns < rests_until_ns {
            return self.plan_think(session, rests_until_ns - self.now_ns);
        }
        if self.sessions[session].connected.is_none() {
            return self.connect(session);
        }
        let is_worker = matches!(self.sessions[session].role, Role::Worker(_));
        if is_worker && self.random.per_million(self.swarm.disconnects) {
            self.leave(session);
            let pause = self.random.skewed(1_000..=10 * MILLISECOND_NS);
            return self.plan_think(session, pause);
        }
        self.send_some(session);
        let connected = self.sessions[session].connected.as_ref();
        if connected.is_none_or(|at| at.client.free_depth() == 0) {
            // Answers bring it back.
            return;
        }
        let idle = is_worker && self.random.per_million(self.swarm.idle_pauses);
        let slow = self.sessions[session].reader;
        let longest = match (idle, slow) {
            (true, _) => 2 * SECOND_NS,
            (_, true) => READER_PAUSE_NS_MAX,
            _ if self.options.splits => READER_PAUSE_NS_MAX,
            _ => self.swarm.think_ns_max,
        };
        let pause = self.random.skewed(2_000..=longest);
        self.plan_think(session, pause);
    }

    /// May a client of the volume be served there?
    fn is_open_to_clients(&self, node: usize, volume: usize) -> bool {
        let told = self.nodes[node].life.as_ref().is_some_and(|life| life.told[volume]);
        let record = self.records.get(volume);
        told && (record.replicas().contains(&id(node)) || record.attached == Some(id(node)))
    }

    fn choose_node(&mut self, volume: usize) -> Option<usize> {
        if let Some(node) = self.records.get(volume).attached.map(index)
            && self.is_open_to_clients(node, volume)
            && !self.random.percent(10)
        {
            return Some(node);
        }
        let home = self.volumes[volume].home;
        let alone =
            self.options.fights && self.stage == Stage::Working || self.random.percent(self.swarm.strays);
        if !alone && self.is_open_to_clients(home, volume) {
            return Some(home);
        }
        let record = self.records.get(volume);
        let mut nodes: Vec<usize> = record.in_sync.iter().map(|node| index(*node)).collect();
        if self.stage == Stage::Working && self.random.percent(10) {
            // It does not know who is in sync.
            nodes = self.records.get(volume).replicas().into_iter().map(index).collect();
        }
        nodes.retain(|node| self.is_open_to_clients(*node, volume));
        if nodes.is_empty() {
            return None;
        }
        let chosen = *self.random.pick(&nodes);
        if !alone {
            self.volumes[volume].home = chosen;
        }
        Some(chosen)
    }

    fn connect(&mut self, session: usize) {
        let volume = self.sessions[session].volume;
        let Some(node) = self.choose_node(volume) else {
            return self.plan_think(session, 50 * MILLISECOND_NS);
        };
        let state = &self.volumes[volume];
        let mut plan = ClientPlan::draw(&mut self.random, &state.name, state.size_bytes);
        let reader = self.sessions[session].reader;
        plan.depth = plan.depth.min(if reader { 2 } else { DEPTH_MAX });
        if matches!(self.sessions[session].role, Role::Verifier(_)) {
            plan.depth = VERIFY_DEPTH;
        }
        plan.elsewhere = true;
        plan.may_be_unknown = state.strangers.contains(&node);
        let connection = self.nodes[node].at(self.now_ns).expect("open to clients").connect();
        self.clients_made += 1;
        let labels = [self.clients_made, node as u64, connection.0.into()];
        trace::note(Moment(self.now_ns), "client connects: client, node, connection", labels);
        let calm = self.stage != Stage::Working;
        let patience_ns =
            if calm { CALM_PATIENCE_NS } else { self.random.range(SECOND_NS..=self.swarm.patience_ns_max) };
        let came = self.volumes[volume].doubts.come();
        self.sessions[session].connected = Some(Connected {
            client: Client::new(self.clients_made, crate::to_u32(volume), plan),
            node,
            connection,
            since_ns: self.now_ns,
            came,
            patience_ns,
        });
    }

    fn send_some(&mut self, session: usize) {
        let now = Moment(self.now_ns);
        let Session { role, volume, reader, connected, .. } = &mut self.sessions[session];
        let Some(at) = connected else { return };
        let state = &mut self.volumes[*volume];
        let free = at.client.free_depth();
        let count = if free == 0 { 0 } else { 1 + self.random.index(free) };
        match role {
            Role::Worker(workload) => {
                for _ in 0..count {
                    let mut ask = workload.draw();
                    if *reader && matches!(ask.kind, AskKind::Write | AskKind::Trim | AskKind::Zeroes { .. })
                    {
                        ask = Ask { kind: AskKind::Read { one_piece: false }, fua: false, ..ask };
                        ask.length_bytes = ask.length_bytes.min(READER_BYTES_MAX);
                    }
                    at.client.send(now, ask, &mut state.oracle);
                }
            }
            Role::Verifier(next) => {
                for _ in 0..count {
                    let length_bytes = VERIFY_BYTES.min(state.size_bytes - *next);
                    if length_bytes > 0 {
                        let kind = AskKind::Read { one_piece: false };
                        let ask = Ask { kind, offset_bytes: *next, length_bytes, fua: false };
                        at.client.send(now, ask, &mut state.oracle);
                        *next += length_bytes;
                    }
                }
            }
            Role::Retired => {}
        }
        self.write_output(session);
    }

    fn write_output(&mut self, session: usize) {
        let Some(at) = &mut self.sessions[session].connected else { return };
        let output = at.client.output();
        if !output.is_empty() {
            let driver = self.nodes[at.node].at(self.now_ns).expect("a connection has a process");
            driver.client_writes(at.connection, output);
            output.clear();
        }
    }

    pub(super) fn client_can_read(&mut self, node: usize, connection: ConnectionId) {
        let is_it = |at: &Connected| at.node == node && at.connection == connection;
        let Some(session) =
            self.sessions.iter().position(|session| session.connected.as_ref().is_some_and(is_it))
        else {
            return;
        };
        // A head that has lost its volume may say so.
        let tolerance =
            Tolerance { io: self.nodes[node].may_fail(), no_space: self.options.full, shutting_down: true };
        let Session { connected, volume, .. } = &mut self.sessions[session];
        let at = connected.as_mut().expect("just found");
        let before = at.client.counts.answers;
        let oracle = &mut self.volumes[*volume].oracle;
        let driver = self.nodes[node].at(self.now_ns).expect("it was stepped");
        at.client.handle_input(Moment(self.now_ns), driver.client_input(connection), oracle, tolerance);
        let answers = at.client.counts.answers - before;
        if answers > 0 {
            let state = &mut self.volumes[*volume];
            state.doubts.settle(at.came, &mut state.oracle);
        }
        let is_over = driver.is_at_end_for_client(connection);
        let free = at.client.free_depth();
        self.answers += answers;
        let turned_away = at.client.is_turned_away();
        if is_over {
            return self.server_closed(session);
        }
        if turned_away {
            return self.go_elsewhere(session);
        }
        self.write_output(session);
        if self.finish_verifier(session) {
            return;
        }
        if answers > 0 || free > 0 {
            let reader = self.sessions[session].reader;
            let longest = if reader || self.options.splits { READER_PAUSE_NS_MAX } else { 50_000 };
            let pause = self.random.skewed(100..=longest);
            self.plan_think(session, pause);
        }
        if self.answers >= self.fault_at_answers && self.stage == Stage::Working {
            self.fault();
        }
    }

    fn server_closed(&mut self, session: usize) {
        let at = self.sessions[session].connected.take().expect("the caller knows it");
        self.nodes[at.node].at(self.now_ns).expect("it was stepped").forget(at.connection);
        self.forget_client(session, at);
        let often = self.stage == Stage::Working;
        let longest = if often { 500 * MILLISECOND_NS } else { SECOND_NS };
        let pause = self.random.range(MILLISECOND_NS..=longest);
        self.plan_think(session, pause);
    }

    /// Another node leads the volume, or may still do so.
    fn go_elsewhere(&mut self, session: usize) {
        let volume = self.sessions[session].volume;
        self.leave(session);
        let record = self.records.get(volume);
        let leader = record.head.map(|head| index(head.node));
        let any = index(*self.random.pick(&record.in_sync));
        self.volumes[volume].home = leader.filter(|_| self.random.percent(50)).unwrap_or(any);
        let pause = self.random.skewed(MILLISECOND_NS..=SECOND_NS);
        self.plan_think(session, pause);
    }

    /// What it asked and did not hear of may take effect later, or never.
    fn forget_client(&mut self, session: usize, mut at: Connected) {
        let Session { role, volume, .. } = &mut self.sessions[session];
        let state = &mut self.volumes[*volume];
        state.doubts.go(at.client.leave(&mut state.oracle));
        if let Role::Verifier(next) = role {
            *next = 0;
        }
        add_counts(&mut self.report.clients, &at.client.counts);
        // Where it was not served, the next one may not be either.
        let volume = self.sessions[session].volume;
        if self.volumes[volume].home == at.node && self.random.percent(self.swarm.moves_after_end) {
            let record = self.records.get(volume);
            self.volumes[volume].home = index(*self.random.pick(&record.in_sync));
        }
    }

    /// The client leaves without a word.
    pub(super) fn leave(&mut self, session: usize) {
        let Some(at) = self.sessions[session].connected.take() else { return };
        trace::note(
            Moment(self.now_ns),
            "client leaves: node, connection",
            [at.node as u64, at.connection.0.into(), 0],
        );
        self.nodes[at.node].at(self.now_ns).expect("a connection has a process").client_leaves(at.connection);
        self.forget_client(session, at);
    }

    /// Whoever writes to the volume leaves, and comes back later.
    pub(super) fn rest_writers(&mut self, volume: usize, nanoseconds: u64) {
        self.volumes[volume].rests_until_ns = self.now_ns + nanoseconds;
        for session in 0..self.sessions.len() {
            if !self.sessions[session].reader {
                self.leave_and_return(session, volume);
            }
        }
    }

    /// About half of those who write to the volume go elsewhere; whoever reads stays.
    pub(super) fn move_writers(&mut self, volume: usize, node: usize) {
        self.volumes[volume].home = node;
        for session in 0..self.sessions.len() {
            if !self.sessions[session].reader && self.random.percent(60) {
                self.leave_and_return(session, volume);
            }
        }
    }

    /// The client goes elsewhere, as its task does.
    pub(super) fn leave_and_return(&mut self, session: usize, volume: usize) {
        if self.sessions[session].volume == volume && self.sessions[session].connected.is_some() {
            self.leave(session);
            self.plan_think(session, MILLISECOND_NS);
        }
    }

    /// The process of a node is gone, and with it all connections.
    pub(super) fn clients_lose(&mut self, node: usize) {
        for session in 0..self.sessions.len() {
            if self.sessions[session].connected.as_ref().is_some_and(|at| at.node == node) {
                let at = self.sessions[session].connected.take().expect("looked at");
                self.forget_client(session, at);
                let pause = self.random.skewed(MILLISECOND_NS..=500 * MILLISECOND_NS);
                self.plan_think(session, pause);
            }
        }
    }

    /// Clients who wait too long try somewhere else.
    pub(super) fn watch_clients(&mut self) {
        for session in 0..self.sessions.len() {
            let Some(at) = &self.sessions[session].connected else { continue };
            let since_ns = if at.client.is_ready() {
                at.client.oldest_pending().map_or(self.now_ns, |moment| moment.0)
            } else {
                at.since_ns
            };
            if self.now_ns - since_ns > at.patience_ns {
                let volume = self.sessions[session].volume;
                self.leave(session);
                let record = self.records.get(volume);
                self.volumes[volume].home = index(*self.random.pick(&record.in_sync));
                self.plan_think(session, MILLISECOND_NS);
            }
        }
    }

    /// A verifier that has read everything leaves; after the last one the replicas are compared.
    fn finish_verifier(&mut self, session: usize) -> bool {
        let Session { role, volume, connected, .. } = &mut self.sessions[session];
        let Role::Verifier(next) = *role else { return false };
        let done = next == self.volumes[*volume].size_bytes
            && connected.as_ref().is_some_and(|at| at.client.pending_count() == 0);
        if !done {
            return false;
        }
        *role = Role::Retired;
        self.leave(session);
        true
    }

    /// Once everything was read and what is under way has come to its end, the replicas are equal.
    pub(super) fn end_if_all_is_well(&mut self) {
        let all_read = self.sessions.iter().all(|session| matches!(session.role, Role::Retired));
        if self.stage == Stage::Working || !all_read {
            return;
        }
        let compared = (0..self.volumes.len()).try_for_each(|volume| self.compare_replicas(volume));
        if let Err(difference) = compared {
            let waited_ns = self.now_ns - self.calm_since_ns;
            assert!(waited_ns < EQUAL_NS_MAX, "{difference}\n{}", self.describe());
            return;
        }
        let changes = self.options.replacements || self.options.elsewhere;
        if changes && self.swarm.illness.is_none() && !self.is_whole() {
            return;
        }
        // What rots may be a leaf, which keeps its volume.
        if self.swarm.illness.is_none() && self.holds_too_much() {
            return;
        }
        if self.options.rot && !self.is_all_verified() {
            return;
        }
        if self.stage == Stage::Calm && self.swarm.dark_end {
            for node in 0..self.nodes.len() {
                self.stop(node, true);
            }
            for node in 0..self.nodes.len() {
                self.start(node);
            }
            (self.stage, self.calm_since_ns) = (Stage::CalmAgain, self.now_ns);
            self.begin_verifying();
            return;
        }
        self.stage = Stage::Done;
    }
}

impl World {
    /// Has every replica that was added been filled, and every other one come back? That takes a head.
    fn is_whole(&mut self) -> bool {
        let goes = |record: &Record| record.leaving.iter().any(|node| record.is_in_sync(*node));
        let whole =
            |record: &Record| record.catching_up.is_empty() && record.stale.is_empty() && !goes(record);
        let lacking = (0..self.volumes.len()).find(|volume| !whole(self.records.get(*volume)));
        lacking.into_iter().for_each(|volume| self.have_it_tended(volume));
        lacking.is_none()
    }
}

impl World {
    /// Does a node that lives hold what has no replica there any more?
    fn holds_too_much(&self) -> bool {
        let nodes = || self.nodes.iter().enumerate();
        self.records.all().iter().any(|record| {
            let named = |node| record.replicas().contains(&node) || record.attached == Some(node);
            nodes().any(|(node, living)| living.holds(record.volume) && !named(id(node)))
        })
    }
}

fn add_counts(total: &mut ClientCounts, counts: &ClientCounts) {
    total.requests += counts.requests;
    total.answers += counts.answers;
    total.errors += counts.errors;
    total.written_bytes += counts.written_bytes;
    total.read_bytes += counts.read_bytes;
}
