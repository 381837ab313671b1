//! View changes: a head removes a member, another process becomes the head.
//!
//! ```text
//!   none ──take──▶ proposing ──CAS 1──▶ candidate ──promises, one position, CAS 2──▶ head
//! ```
//!
//! Whoever sent a compare-and-swap does not know its outcome until it has read the record.

use super::BLOCKS;
use super::state::{Head, Node, Nodes, Record, Role, State, Version};
use super::{NODES, Omission, Protocol};

impl Protocol {
    /// The head wants a member out that it cannot reach, or that is slow.
    pub(super) fn remove(&self, state: &mut State, node: usize, member: usize) -> bool {
        let head = state.head(node).expect("listed for heads");
        let left = head.record.in_sync.without(member);
        let may = state.removals < self.bounds.removals && head.open.is_none() && !left.is_empty();
        if !may || !head.record.in_sync.has(member) {
            return false;
        }
        let expected = head.record.version;
        let record = Record { version: expected + 1, in_sync: left, ..head.record.clone() };
        state.removals += 1;
        state.head_mut(node).open = Some(record.clone());
        state.propose(expected, record);
        true
    }

    /// The record store takes a compare-and-swap if nobody came before it.
    pub(super) fn apply(state: &mut State, index: usize) -> bool {
        let proposal = state.proposals.remove(index);
        assert_eq!(state.record.version, proposal.expected, "others were dropped when they became hopeless");
        let starts = proposal.record.started && !state.record.started;
        let same_epoch = proposal.record.epoch == state.record.epoch;
        state.admitted |= same_epoch && !state.record.in_sync.covers(proposal.record.in_sync);
        state.record = proposal.record;
        // None of the others can succeed any more. A process whose first step is among them may know it already: it
        // does nothing before it does.
        state.proposals.clear();
        for node in &mut state.nodes {
            if matches!(&node.role, Role::Proposing(wanted) if *wanted != state.record) {
                node.role = Role::None;
            }
        }
        if starts {
            let data = state.record.in_sync.iter().map(|member| state.nodes[member].data);
            state.unequal |= data.collect::<Vec<_>>().windows(2).any(|pair| pair[0] != pair[1]);
        }
        true
    }

    /// A process reads the record and knows what became of its proposals.
    pub(super) fn learn(state: &mut State, index: usize) -> bool {
        let record = state.record.clone();
        let content = record.in_sync.iter().next().map(|member| &state.nodes[member]);
        let content = content.map(|member| (member.last, member.data)).unwrap_or_default();
        let node = &mut state.nodes[index];
        let mine = record.head == index;
        match &mut node.role {
            Role::None => return false,
            Role::Proposing(wanted) => {
                if record == *wanted {
                    let reports = [None; NODES];
                    node.role = Role::Candidate { record, reports, starting: None };
                } else {
                    return false;
                }
            }
            Role::Candidate { record: known, starting, .. } => {
                if !mine || record.epoch != known.epoch {
                    node.role = Role::None;
                } else if starting.as_ref() == Some(&record) {
                    node.role = Role::Head(Box::new(new_head(record, content)));
                } else {
                    return false;
                }
            }
            Role::Head(head) => {
                if record.epoch != head.record.epoch {
                    node.role = Role::None;
                } else if record.version > head.record.version {
                    learn_outcome(head, record);
                } else {
                    return false;
                }
            }
        }
        true
    }

    /// A process wants to be the head: nobody leads, or the one who does was not heard of.
    pub(super) fn take(&self, state: &mut State, index: usize) -> bool {
        let record = &state.record;
        if state.nodes[index].role != Role::None || record.epoch == self.bounds.epochs {
            return false;
        }
        let (expected, in_sync) = (record.version, record.in_sync);
        let record = Record {
            version: expected + 1,
            epoch: record.epoch + 1,
            head: index,
            started: false,
            in_sync,
            ..record.clone()
        };
        state.nodes[index].role = Role::Proposing(record.clone());
        state.propose(expected, record);
        true
    }

    /// A member stores the promise and says how far it has come. From then on it takes nothing of earlier epochs.
    pub(super) fn promise(&self, state: &mut State, index: usize, member: usize) -> bool {
        let Role::Candidate { record, reports, .. } = &state.nodes[index].role else { return false };
        let (epoch, in_sync) = (record.epoch, record.in_sync);
        let done = reports[member].is_some();
        let holder = &mut state.nodes[member];
        if done || !in_sync.has(member) || !holder.up || holder.promise > epoch {
            return false;
        }
        holder.promise = epoch;
        let last = holder.last;
        if !self.omits(Omission::VolatilePromise) {
            // What it will refuse need not be kept.
            state.messages.retain(|message| message.to != member || message.version.epoch >= epoch);
        }
        let Role::Candidate { reports, .. } = &mut state.nodes[index].role else {
            unreachable!("seen above")
        };
        reports[member] = Some(last);
        true
    }

    /// A member is brought to the highest position reported, by replaying the entries that it lacks.
    pub(super) fn bring(&self, state: &mut State, index: usize, member: usize) -> bool {
        let Some((highest, holder)) = highest_report(&state.nodes[index].role) else { return false };
        let Role::Candidate { record, reports, starting } = &state.nodes[index].role else {
            unreachable!("it has reports")
        };
        let epoch = record.epoch;
        let behind = starting.is_none() && reports[member].is_some_and(|report| report < highest);
        let reachable = |node: &Node| node.up && node.promise == epoch;
        if !behind || !reachable(&state.nodes[holder]) || !reachable(&state.nodes[member]) {
            return false;
        }
        let data = state.nodes[holder].data;
        let target = &mut state.nodes[member];
        (target.data, target.last) = (data, highest);
        let Role::Candidate { reports, .. } = &mut state.nodes[index].role else {
            unreachable!("seen above")
        };
        reports[member] = Some(highest);
        true
    }

    /// The candidate asks to start its epoch with those who stand at the highest position.
    pub(super) fn start(&self, state: &mut State, index: usize) -> bool {
        let Some((highest, _)) = highest_report(&state.nodes[index].role) else { return false };
        let Role::Candidate { record, reports, starting } = &state.nodes[index].role else {
            unreachable!("it has reports")
        };
        if starting.is_some() {
            return false;
        }
        let unequal = self.omits(Omission::UnequalStart);
        let stands = |report: Option<Version>| report.is_some_and(|report| report == highest || unequal);
        let members = (0..NODES).filter(|member| stands(reports[*member]));
        let in_sync = members.fold(Nodes::default(), Nodes::with);
        // Of the members that it relies on, none may still honour a lease of an earlier head.
        let lapsed = in_sync.iter().all(|member| {
            let granted = state.nodes[member].granted;
            granted == 0 || granted == record.epoch
        });
        if !lapsed && !self.omits(Omission::GrantsNotAwaited) {
            return false;
        }
        let mut ends = record.ends.clone();
        ends.push((record.last_started, highest.sequence));
        let expected = record.version;
        let started = Record {
            version: expected + 1,
            started: true,
            in_sync,
            ends,
            last_started: record.epoch,
            ..record.clone()
        };
        let Role::Candidate { starting, .. } = &mut state.nodes[index].role else {
            unreachable!("seen above")
        };
        *starting = Some(started.clone());
        state.propose(expected, started);
        true
    }
}

/// The highest position among the reports, and who has it.
fn highest_report(role: &Role) -> Option<(Version, usize)> {
    let Role::Candidate { reports, .. } = role else { return None };
    let known = (0..NODES).filter_map(|member| Some((reports[member]?, member)));
    known.max_by_key(|(version, member)| (*version, std::cmp::Reverse(*member)))
}

/// What the new head serves is what its members have; it may have no replica of its own.
fn new_head(record: Record, (last, committed): (Version, [Version; BLOCKS])) -> Head {
    Head {
        open: None,
        last,
        pending: Vec::new(),
        committed_through: last,
        committed,
        leases: Nodes::default(),
        fill: None,
        record,
    }
}

fn learn_outcome(head: &mut Head, record: Record) {
    head.open = None;
    if head.fill.is_some_and(|fill| fill.offered && record.in_sync.has(fill.member)) {
        head.fill = None;
    }
    head.leases =
        record.in_sync.iter().filter(|member| head.leases.has(*member)).fold(Nodes::default(), Nodes::with);
    head.record = record;
}
