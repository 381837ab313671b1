//! The steps: which there are in a state, and what each does. Those of view changes and of catch-up are in modules of
//! their own.

use super::state::{Message, Nodes, Pending, Role, State, Version};
use super::{NODES, Omission, Protocol};

/// One step of one party.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A client writes a block at a head.
    Write { head: usize, block: usize },
    /// A write reaches a member; its acknowledgement arrives or is lost.
    Deliver { message: usize, acked: bool },
    /// The head commits its oldest write and answers the client.
    Commit { head: usize },
    /// The head wants a member out of the record.
    Remove { head: usize, member: usize },
    /// The record store carries out a compare-and-swap, or refuses it.
    Apply { proposal: usize },
    /// A process reads the record.
    Learn { node: usize },
    /// A process wants to be the head.
    Take { node: usize },
    /// A member promises an epoch to its candidate and reports its position.
    Promise { candidate: usize, member: usize },
    /// The candidate brings a member to the highest position reported.
    Bring { candidate: usize, member: usize },
    /// The candidate asks the record store to start its epoch.
    Start { candidate: usize },
    /// A process ends; what it had in memory is gone.
    Crash { node: usize },
    /// It runs again.
    Restart { node: usize },
    /// A member grants the head a lease.
    Grant { head: usize, member: usize },
    /// A lease lapses at the head.
    LapseAtHead { head: usize, member: usize },
    /// A grant lapses at the member.
    LapseAtMember { member: usize },
    /// A client reads a block at a head.
    Read { head: usize, block: usize },
    /// A replica that is not in sync begins to be filled.
    BeginFill { head: usize, member: usize },
    /// An in-sync replica lists what the returning one lacks.
    Enumerate { head: usize, source: usize },
    /// A block is copied to it from an in-sync replica.
    Copy { head: usize, source: usize, block: usize },
    /// It has everything: the head asks for its admission.
    Admit { head: usize },
}

impl Protocol {
    pub(super) fn list_actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend(
            (0..state.messages.len())
                .flat_map(|message| [true, false].map(|acked| Action::Deliver { message, acked })),
        );
        actions.extend((0..state.proposals.len()).map(|proposal| Action::Apply { proposal }));
        for node in 0..NODES {
            if !state.nodes[node].up {
                actions.push(Action::Restart { node });
                continue;
            }
            if state.crashes < self.bounds.crashes {
                actions.push(Action::Crash { node });
            }
            actions.push(Action::Learn { node });
            actions.push(Action::Take { node });
            match &state.nodes[node].role {
                Role::Candidate { .. } => {
                    for member in 0..NODES {
                        actions.push(Action::Promise { candidate: node, member });
                        actions.push(Action::Bring { candidate: node, member });
                    }
                    actions.push(Action::Start { candidate: node });
                }
                Role::Head(_) => self.list_head_actions(node, actions),
                Role::None | Role::Proposing(_) => {}
            }
        }
        if self.bounds.reads {
            actions.extend((0..NODES).map(|member| Action::LapseAtMember { member }));
        }
    }

    fn list_head_actions(&self, head: usize, actions: &mut Vec<Action>) {
        let blocks = usize::from(self.bounds.blocks);
        actions.extend((0..blocks).map(|block| Action::Write { head, block }));
        actions.push(Action::Commit { head });
        for member in 0..NODES {
            actions.push(Action::Remove { head, member });
            if self.bounds.fills > 0 {
                actions.push(Action::BeginFill { head, member });
                actions.push(Action::Enumerate { head, source: member });
                actions.extend((0..blocks).map(|block| Action::Copy { head, source: member, block }));
            }
            if self.bounds.reads {
                actions.push(Action::Grant { head, member });
                actions.push(Action::LapseAtHead { head, member });
            }
        }
        actions.push(Action::Admit { head });
        if self.bounds.reads {
            actions.extend((0..blocks).map(|block| Action::Read { head, block }));
        }
    }

    /// Takes a step. False if it cannot be taken now.
    pub(super) fn act(&self, state: &mut State, action: Action) -> bool {
        match action {
            Action::Write { head, block } => self.write(state, head, block),
            Action::Deliver { message, acked } => self.deliver(state, message, acked),
            Action::Commit { head } => self.commit(state, head),
            Action::Remove { head, member } => self.remove(state, head, member),
            Action::Apply { proposal } => Self::apply(state, proposal),
            Action::Learn { node } => Self::learn(state, node),
            Action::Take { node } => self.take(state, node),
            Action::Promise { candidate, member } => self.promise(state, candidate, member),
            Action::Bring { candidate, member } => self.bring(state, candidate, member),
            Action::Start { candidate } => self.start(state, candidate),
            Action::Crash { node } => self.crash(state, node),
            Action::Restart { node } => self.restart(state, node),
            Action::Grant { head, member } => grant(state, head, member),
            Action::LapseAtHead { head, member } => lapse_at_head(state, head, member),
            Action::LapseAtMember { member } => self.lapse_at_member(state, member),
            Action::Read { head, block } => self.read(state, head, block),
            Action::BeginFill { head, member } => self.begin_fill(state, head, member),
            Action::Enumerate { head, source } => self.enumerate(state, head, source),
            Action::Copy { head, source, block } => self.copy(state, head, source, block),
            Action::Admit { head } => self.admit(state, head),
        }
    }

    fn write(&self, state: &mut State, node: usize, block: usize) -> bool {
        if state.writes == self.bounds.writes {
            return false;
        }
        state.writes += 1;
        let union = !self.omits(Omission::NoUnion);
        let head = state.head_mut(node);
        let previous = head.last;
        let version = Version { epoch: head.record.epoch, sequence: previous.sequence + 1 };
        head.last = version;
        head.pending.push(Pending { version, block, acked: Nodes::default() });
        let filled = head.fill.map_or_else(Nodes::default, |fill| Nodes::default().with(fill.member));
        for to in head.needed(union).union(filled).iter() {
            state.send(Message { to, version, previous, block });
        }
        true
    }

    /// A member takes only the successor of its last entry, of an epoch that its promise allows. One that it has is
    /// acknowledged again.
    fn deliver(&self, state: &mut State, index: usize, acked: bool) -> bool {
        let message = state.messages[index];
        let Message { to, version, previous, block } = message;
        let node = &mut state.nodes[to];
        if !node.up || version.epoch < node.promise {
            return false;
        }
        if node.last == previous {
            node.data[block] = version;
            node.last = version;
            node.live |= u8::from(node.base.is_some()) << block;
        } else if !has_entry(node.last, version) {
            return false;
        }
        if !acked {
            return true;
        }
        state.messages.remove(index);
        for sender in 0..NODES {
            if let Role::Head(head) = &mut state.nodes[sender].role
                && let Some(pending) = head.pending.iter_mut().find(|pending| pending.version == version)
            {
                pending.acked = pending.acked.with(to);
            }
        }
        true
    }

    fn commit(&self, state: &mut State, node: usize) -> bool {
        let union = !self.omits(Omission::NoUnion);
        let head = state.head_mut(node);
        let Some(first) = head.pending.first().copied() else { return false };
        let needed = head.needed(union);
        let enough = |acked: Nodes| {
            let one_missing = needed.iter().any(|member| acked.with(member).covers(needed));
            acked.covers(needed) || self.omits(Omission::AckBeforeRemoval) && one_missing && !acked.is_empty()
        };
        if !enough(first.acked) {
            return false;
        }
        head.pending.remove(0);
        head.committed[first.block] = first.version;
        head.committed_through = first.version;
        let by = (head.record.epoch, node);
        let (acked, seen) = (&mut state.acked[first.block], &mut state.seen[first.block]);
        *acked = first.version.max(*acked);
        *seen = first.version.max(*seen);
        if !state.acked_by.contains(&by) {
            state.acked_by.push(by);
            state.acked_by.sort_unstable();
        }
        true
    }

    fn read(&self, state: &mut State, node: usize, block: usize) -> bool {
        let head = state.head(node).expect("listed for heads");
        let leased = head.leases.covers(head.needed(true)) || self.omits(Omission::LeaseNotChecked);
        if !leased {
            return false;
        }
        let newest = head.pending.iter().rev().find(|pending| pending.block == block);
        let version = match newest {
            Some(pending) if self.omits(Omission::ReadBeforeCommit) => pending.version,
            _ => head.committed[block],
        };
        let seen = &mut state.seen[block];
        if version < *seen {
            state.went_back = true;
            return true;
        }
        // A read that teaches nothing new leads to no new state.
        let news = version > *seen;
        *seen = version;
        news
    }

    fn crash(&self, state: &mut State, node: usize) -> bool {
        state.crashes += 1;
        // The head notices another incarnation and begins again.
        for other in 0..NODES {
            if let Role::Head(head) = &mut state.nodes[other].role
                && head.fill.is_some_and(|fill| fill.member == node && !fill.offered)
            {
                head.fill = None;
            }
        }
        let node = &mut state.nodes[node];
        node.up = false;
        node.role = Role::None;
        node.live = 0;
        if self.omits(Omission::VolatilePromise) {
            node.promise = 0;
        }
        if self.omits(Omission::GrantForgotten) {
            node.granted = 0;
        }
        true
    }

    fn restart(&self, state: &mut State, node: usize) -> bool {
        state.nodes[node].up = true;
        true
    }

    /// Not before it has lapsed at the head: the head counts from when it asked, less the drift of clocks, the member
    /// from its answer, plus the drift.
    fn lapse_at_member(&self, state: &mut State, member: usize) -> bool {
        let granted = state.nodes[member].granted;
        let held = (0..NODES)
            .filter_map(|node| state.head(node))
            .any(|head| head.record.epoch == granted && head.leases.has(member));
        if granted == 0 || held && !self.omits(Omission::GrantLapsesEarly) {
            return false;
        }
        state.nodes[member].granted = 0;
        true
    }
}

/// Is `version` surely an entry of the order that ends at `last`?
fn has_entry(last: Version, version: Version) -> bool {
    last.epoch == version.epoch && last.sequence >= version.sequence
}

fn grant(state: &mut State, node: usize, member: usize) -> bool {
    let epoch = state.head(node).expect("listed for heads").record.epoch;
    let holder = &mut state.nodes[member];
    if !holder.up || holder.promise != epoch || holder.base.is_some() {
        return false;
    }
    holder.granted = epoch;
    let head = state.head_mut(node);
    if head.leases.has(member) {
        return false;
    }
    head.leases = head.leases.with(member);
    true
}

fn lapse_at_head(state: &mut State, node: usize, member: usize) -> bool {
    let head = state.head_mut(node);
    let held = head.leases.has(member);
    head.leases = head.leases.without(member);
    held
}
