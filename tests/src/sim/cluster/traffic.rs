//! What passes between nodes, and between nodes and the record store.

use std::collections::BTreeSet;

use datapath::engine::ports::ConnectionId;
use datapath::record::Record;

use super::links::{End, Link};
use super::{Happening, MILLISECOND_NS, SECOND_NS, Stage, World, id, index, position};
use crate::sim::trace;

/// A node that is told nothing because the way is blocked asks again after this time.
const NEWS_AGAIN_NS: u64 = 100 * MILLISECOND_NS;

/// The nodes that have a replica or the head, or are to have the head.
pub(super) fn concerned_by(record: &Record) -> BTreeSet<usize> {
    let head = record.head.map(|head| head.node);
    record.replicas().into_iter().chain(record.attached).chain(head).map(index).collect()
}

impl World {
    pub(super) fn network_delay_ns(&mut self) -> u64 {
        if self.random.percent(1) && self.stage == Stage::Working {
            return self.random.range(0..=self.swarm.network_delay_ns_max * 20);
        }
        self.random.range(1_000..=self.swarm.network_delay_ns_max)
    }

    pub(super) fn store_delay_ns(&mut self) -> u64 {
        let longest = if self.random.percent(5) { self.swarm.store_delay_ns_max } else { 5 * MILLISECOND_NS };
        self.random.range(50_000..=longest)
    }

    // Calls.

    pub(super) fn call_arrives(&mut self, caller: usize, boot: u64, called: usize) {
        if !self.is_living(caller, boot) {
            return;
        }
        let blocked = self.blocks.is_blocked(caller, called) || self.blocks.is_blocked(called, caller);
        if blocked || self.nodes[called].life.is_none() {
            let delay = if blocked {
                self.random.skewed(MILLISECOND_NS..=2 * SECOND_NS)
            } else {
                self.network_delay_ns()
            };
            return self.after(delay, Happening::CallFails { caller, boot, called });
        }
        let driver = self.nodes[called].at(self.now_ns).expect("a living node");
        let connection = driver.connect_node(None);
        self.links_made += 1;
        let link = self.links_made;
        trace::note(self.moment(), "node calls: caller, called, link", [caller as u64, called as u64, link]);
        self.links.insert(link, Link::new(caller, called, connection));
        self.ends.insert((called, connection.0), (link, 1));
        let delay = self.network_delay_ns();
        self.after(delay, Happening::CallDone { link });
    }

    pub(super) fn call_fails(&mut self, caller: usize, boot: u64, called: usize) {
        if self.is_living(caller, boot) {
            self.nodes[caller].at(self.now_ns).expect("a living node").refuse_call(id(called));
        }
    }

    pub(super) fn call_done(&mut self, number: u64) {
        let Some(link) = self.links.get_mut(&number).filter(|link| link.ends[0] == End::Unheard) else {
            return;
        };
        let [caller, called] = link.nodes;
        let driver = self.nodes[caller].at(self.now_ns).expect("the end would be gone with its process");
        let connection = driver.connect_node(Some(id(called)));
        let link = self.links.get_mut(&number).expect("looked up above");
        link.ends[0] = End::Open(connection);
        self.ends.insert((caller, connection.0), (number, 0));
        if link.ends[1] == End::Gone {
            let delay = self.network_delay_ns();
            self.after(delay, Happening::EndBreaks { link: number, side: 0 });
        }
        self.plan_arrival(number, 1);
    }

    pub(super) fn is_living(&self, node: usize, boot: u64) -> bool {
        self.nodes[node].life.is_some() && self.nodes[node].boots == boot
    }

    // Bytes.

    /// Takes what a node has sent, and sends it on.
    pub(super) fn send_on(&mut self, number: u64, side: usize) {
        let link = self.links.get_mut(&number).expect("an open link");
        let Some(connection) = link.open(side) else { return };
        let node = link.nodes[side];
        let driver = self.nodes[node].at(self.now_ns).expect("open ends have a process");
        let input = driver.client_input(connection);
        let bytes = input.peek().to_vec();
        input.skip(bytes.len());
        let is_over = driver.is_at_end_for_client(connection);
        let arrives_ns = self.now_ns + self.network_delay_ns();
        let link = self.links.get_mut(&number).expect("an open link");
        if !bytes.is_empty() {
            link.flows[side].send(arrives_ns, bytes);
        }
        if is_over {
            link.flows[side].send(arrives_ns, Vec::new());
            let driver = self.nodes[node].at(self.now_ns).expect("open ends have a process");
            driver.forget(connection);
            self.lose_end(number, side, connection);
        } else if link.flows[side].is_full() {
            link.flows[side].held = true;
            self.nodes[node].at(self.now_ns).expect("as above").hold_reading(connection, true);
        }
        self.plan_arrival(number, side);
    }

    fn plan_arrival(&mut self, number: u64, from: usize) {
        let Some(link) = self.links.get_mut(&number) else { return };
        let flow = &mut link.flows[from];
        let Some(at_ns) = flow.next_ns() else { return };
        if !std::mem::replace(&mut flow.arrival_planned, true) {
            let delay = at_ns.saturating_sub(self.now_ns);
            self.after(delay, Happening::Arrive { link: number, from });
        }
    }

    /// Bytes that are due reach the other node.
    pub(super) fn arrive(&mut self, number: u64, from: usize) {
        let Some(link) = self.links.get_mut(&number) else { return };
        link.flows[from].arrival_planned = false;
        let to = 1 - from;
        if self.blocks.is_blocked(link.nodes[from], link.nodes[to]) || link.ends[to] == End::Unheard {
            return;
        }
        while let Some(bytes) = link.flows[from].take(self.now_ns) {
            let Some(connection) = link.open(to) else { continue };
            let driver = self.nodes[link.nodes[to]].at(self.now_ns).expect("open ends have a process");
            if bytes.is_empty() {
                driver.client_leaves(connection);
                self.lose_end(number, to, connection);
                return;
            }
            self.report.messages += 1;
            driver.client_writes(connection, &bytes);
        }
        if link.flows[from].held && !link.flows[from].is_full() {
            link.flows[from].held = false;
            if let Some(connection) = link.open(from) {
                let driver = self.nodes[link.nodes[from]].at(self.now_ns).expect("open ends have a process");
                driver.hold_reading(connection, false);
            }
        }
        self.plan_arrival(number, from);
    }

    /// A way is open again.
    pub(super) fn flow_again(&mut self) {
        for number in self.links.keys().copied().collect::<Vec<_>>() {
            self.plan_arrival(number, 0);
            self.plan_arrival(number, 1);
        }
    }

    // Ends.

    fn lose_end(&mut self, number: u64, side: usize, connection: ConnectionId) {
        let link = self.links.get_mut(&number).expect("a link with an open end");
        self.ends.remove(&(link.nodes[side], connection.0));
        link.ends[side] = End::Gone;
        if link.is_over() {
            self.links.remove(&number);
        }
    }

    pub(super) fn end_breaks(&mut self, number: u64, side: usize) {
        let Some(link) = self.links.get(&number) else { return };
        let Some(connection) = link.open(side) else { return };
        let driver = self.nodes[link.nodes[side]].at(self.now_ns).expect("open ends have a process");
        driver.client_leaves(connection);
        self.lose_end(number, side, connection);
    }

    /// A link breaks: what is on its way is lost from somewhere on, and the ends learn of it each in its time.
    pub(super) fn cut_link(&mut self, number: u64) {
        for side in 0..2 {
            let delay = self.random.skewed(1_000..=self.swarm.break_ns_max);
            self.after(delay, Happening::EndBreaks { link: number, side });
        }
        let link = self.links.get_mut(&number).expect("the caller chose it");
        for flow in &mut link.flows {
            flow.break_off(&mut self.random);
        }
    }

    /// A node's process is gone: its ends too, and the other ends learn of it sooner or later.
    pub(super) fn links_lose(&mut self, node: usize, power_cut: bool) {
        let touching = self.links.iter().filter(|(_, link)| link.nodes.contains(&node));
        for number in touching.map(|(number, _)| *number).collect::<Vec<_>>() {
            let link = self.links.get_mut(&number).expect("listed above");
            let side = usize::from(link.nodes[0] != node);
            if let End::Open(connection) = link.ends[side] {
                self.ends.remove(&(node, connection.0));
            }
            link.ends[side] = End::Gone;
            if link.is_over() {
                self.links.remove(&number);
                continue;
            }
            // A machine without power says nothing; the kernel of one that lives closes what its process had.
            let longest = if power_cut { self.swarm.break_ns_max } else { 20 * MILLISECOND_NS };
            let delay = self.random.skewed(10_000..=longest);
            self.after(delay, Happening::EndBreaks { link: number, side: 1 - side });
        }
    }

    // Records.

    pub(super) fn proposal_arrives(&mut self, node: usize, boot: u64, record: &Record) {
        let store = self.blocks.store();
        let lost = self.random.percent(self.swarm.store_losses) && self.stage == Stage::Working;
        if lost || self.store_away || self.blocks.is_blocked(node, store) {
            return;
        }
        let volume = position(record.volume);
        let lets_go = record.released != self.records.get(volume).released;
        let mut concerned = concerned_by(self.records.get(volume));
        let accepted = self.records.propose(volume, record);
        trace::note(
            self.moment(),
            "record proposed: version, epoch, accepted",
            [record.version, record.epoch.into(), accepted.into()],
        );
        let present = self.records.get(volume).clone();
        if accepted && lets_go {
            self.cut_off_now_and_then(volume, node);
        }
        if accepted {
            concerned.extend(concerned_by(&present));
            for other in concerned.into_iter().filter(|other| *other != node) {
                self.send_news(other, present.clone());
            }
        }
        let answer_lost = self.random.percent(self.swarm.store_losses) && self.stage == Stage::Working;
        if !answer_lost && self.is_living(node, boot) {
            self.send_news(node, present);
        } else if accepted {
            // What has changed is told to all in the end.
            let delay = self.random.range(0..=4 * SECOND_NS);
            let boot = self.nodes[node].boots;
            self.after(delay, Happening::News { node, boot, record: Box::new(present) });
        }
    }

    /// A version of a record is told to those who have to do with it, and to those who had until now.
    pub(super) fn tell_change(&mut self, before: &Record, record: &Record) {
        let mut concerned = concerned_by(before);
        let named = |node: usize| record.has_replica(id(node)) || record.attached == Some(id(node));
        let strangers = (0..self.nodes.len()).filter(|node| !named(*node));
        self.volumes[position(record.volume)].strangers.extend(strangers);
        concerned.extend(concerned_by(record));
        concerned.into_iter().for_each(|node| self.send_news(node, record.clone()));
    }

    pub(super) fn send_news(&mut self, node: usize, record: Record) {
        let delay = self.store_delay_ns();
        let boot = self.nodes[node].boots;
        self.after(delay, Happening::News { node, boot, record: Box::new(record) });
    }

    pub(super) fn news_arrives(&mut self, node: usize, boot: u64, record: Box<Record>) {
        if !self.is_living(node, boot) {
            return;
        }
        if self.store_away || self.blocks.is_blocked(self.blocks.store(), node) {
            return self.after(NEWS_AGAIN_NS, Happening::News { node, boot, record });
        }
        let volume = position(record.volume);
        self.nodes[node].at(self.now_ns).expect("a living node").tell_record(*record);
        self.nodes[node].life.as_mut().expect("a living node").told[volume] = true;
    }
}
