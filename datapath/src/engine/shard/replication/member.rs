//! What heads ask of this node's members, carried out.

use super::super::Shard;
use super::fill::CopyPayload;
use super::peer_read::PeerPiece;
use super::{Leader, Replica, Work};
use crate::checksum::crc32c;
use crate::engine::ports::ConnectionId;
use crate::memory::Memory;
use crate::record::{NodeId, Record, VolumeNumber};
use crate::replica::bugs::PlantedBug;
use crate::replica::member::{Member, Step};
use crate::request::RequestError;
use crate::store::lane::{BlockRange, FetchOutcome, Fetched, OwnedPayload, Payload};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange};
use crate::wire::peer_message::{
    ChangeHeader, PEER_PAYLOAD_BYTES_MAX, PeerFrame, PeerMessage, RoomAnswer, RoomQuestion,
};

impl<M: Memory> Shard<M> {
    /// The member of a volume begins when the volume lasts in its lane.
    pub(super) fn start_member(&mut self, index: usize) {
        let Replica { served, member, failed, .. } = &self.replication.replicas[index];
        if member.is_some() || *failed {
            return;
        }
        let (lane, volume) = (self.served[*served].lane, self.served[*served].volume);
        let lane = &self.lanes[lane].lane;
        if !lane.is_open() || lane.has_failed() || !lane.is_lasting(volume) {
            return;
        }
        let filling = lane.filling_from(volume);
        let node = self.replication.node();
        let replica = &mut self.replication.replicas[index];
        // It is silent until others have left it out; then it is filled.
        replica.lost = filling.is_some() && replica.head.record().is_in_sync(node);
        if replica.lost {
            return;
        }
        let may_be_led = replica.head.record().is_in_sync(node) && replica.head.record().last_started > 0;
        let mut member = Member::new(self.now, lane.promised(volume), lane.last_stamp(volume), filling);
        let now = self.now;
        member.plant(now, self.replication.bugs);
        let replica = &mut self.replication.replicas[index];
        replica.member = Some(member);
        replica.head.member_up(now, node);
        if may_be_led {
            let served = &self.served[replica.served];
            self.lanes[served.lane].lane.assume_room_promised(served.volume);
        }
    }

    /// A head on another node asks.
    pub(super) fn handle_request_of_head(
        &mut self,
        id: ConnectionId,
        volume: VolumeNumber,
        message: PeerMessage,
        memory: Option<MemoryRange>,
    ) {
        match self.replication.find(volume) {
            Some(index) => {
                let leader = Leader::Link(id, self.link(id).generation);
                self.ask_member_here(index, leader, message, memory);
            }
            // The record that names this node has not been read yet: the head will ask again.
            None => self.drop_payload_of_peer(memory),
        }
    }

    /// The head on this node asks. The payload is the head's.
    pub(super) fn ask_own_member(&mut self, index: usize, message: PeerMessage, memory: Option<MemoryRange>) {
        self.ask_member_here(index, Leader::ThisNode, message, memory);
    }

    pub(super) fn drop_payload_of_peer(&mut self, memory: Option<MemoryRange>) {
        if let Some(memory) = memory {
            self.give_back_for_peer(memory);
        }
    }

    fn ask_member_here(
        &mut self,
        index: usize,
        asker: Leader,
        message: PeerMessage,
        memory: Option<MemoryRange>,
    ) {
        let (now, node) = (self.now, self.replication.node());
        let theirs = if asker == Leader::ThisNode { None } else { memory };
        if let (PeerMessage::Change { change, .. }, Leader::Link(id, _)) = (message, asker)
            && self.lies_beyond(index, change.blocks())
        {
            // No head numbers what lies beyond the volume.
            self.drop_payload_of_peer(theirs);
            return self.close_link(id);
        }
        let replica = &mut self.replication.replicas[index];
        let Some(member) = &mut replica.member else { return self.drop_payload_of_peer(theirs) };
        if let PeerMessage::Promise { epoch } = message
            && member.holds_no_order()
            && !may_be_filled(replica.head.record(), node, epoch)
        {
            return;
        }
        let before = member.epoch();
        if asker != replica.leader && epoch_of_order(message) == Some(before) {
            // It went on its way before the head called again, and what it asks for has been asked for since.
            return self.drop_payload_of_peer(theirs);
        }
        let step = member.handle(now, message);
        if matches!(message, PeerMessage::Promise { epoch } if epoch >= before) {
            replica.leader = asker;
        }
        match (step, message) {
            (Step::Append, PeerMessage::Change { epoch, change, committed }) => {
                self.note_committed(index, committed);
                if change.stamp.epoch == epoch {
                    // What others have left behind was numbered within what their heads had been promised.
                    let volume = self.served[self.replication.replicas[index].served].volume;
                    self.lane_of_replica(index).use_room(volume, change.new_blocks);
                }
                return self.append_change(index, asker, change, memory);
            }
            (Step::StorePromise(epoch), _) => self.store_promise(index, epoch),
            (Step::Fetch(sequence), PeerMessage::Fetch { epoch, .. }) => {
                self.fetch(index, asker, epoch, sequence);
            }
            (Step::Compare { fill, base }, PeerMessage::Compare { epoch, .. }) => {
                self.compare_here(index, asker, epoch, fill, base);
            }
            (Step::BeginFill { fill, after, base }, _) => self.begin_fill_here(index, fill, (base, after)),
            (Step::ListChanged, PeerMessage::ListChanged { epoch, fill, base }) => {
                self.list_changed_here(index, asker, epoch, fill, base);
            }
            (Step::Read, PeerMessage::Read { epoch, read, block, count }) => {
                self.read_for_head(index, asker, PeerPiece { epoch, read, block, count });
            }
            (Step::Check, PeerMessage::Check(message)) => {
                return self.check_here(index, asker, message, memory);
            }
            (Step::Copy { fill, runs }, PeerMessage::Copy { copy, .. }) => {
                let payload =
                    memory.map(|memory| CopyPayload { lender: memory, pages: memory, is_own: false });
                return self.append_copy(index, asker, (fill, copy), &runs, payload);
            }
            (Step::EndFill { fill }, _) => self.end_fill_here(index, fill),
            (Step::Lease { asked_ns, room }, PeerMessage::Lease { epoch, committed, .. }) => {
                self.grant_lease(index, asker, (epoch, asked_ns), committed, room);
            }
            (Step::Answer(answer), _) => self.send_answer(index, asker, answer),
            (Step::Violation, _) => match asker {
                Leader::Link(id, _) => self.close_link(id),
                Leader::ThisNode | Leader::Nobody => panic!("the own head sent {message:?}"),
            },
            _ => {}
        }
        self.drop_payload_of_peer(theirs);
    }

    fn grant_lease(
        &mut self,
        index: usize,
        asker: Leader,
        (epoch, asked_ns): (u32, u64),
        committed: u64,
        question: Option<RoomQuestion>,
    ) {
        self.note_committed(index, committed);
        let room = question.and_then(|question| self.promise_room(index, question));
        self.send_answer(index, asker, PeerMessage::Leased { epoch, asked_ns, room });
    }

    /// Are some of these blocks none of the volume's, as its lane here knows it?
    pub(super) fn lies_beyond(&self, index: usize, (block, count): (u32, u32)) -> bool {
        let served = &self.served[self.replication.replicas[index].served];
        let size_blocks = self.lanes[served.lane].lane.volumes()[served.volume as usize].size_blocks();
        u64::from(block) + u64::from(count) > size_blocks
    }

    fn promise_room(&mut self, index: usize, question: RoomQuestion) -> Option<RoomAnswer> {
        let RoomQuestion { keeps, needs, wants } = question;
        let volume = self.served[self.replication.replicas[index].served].volume;
        let promised = self.lane_of_replica(index).promise_room(volume, keeps, needs, wants)?;
        Some(RoomAnswer { granted: promised.blocks, may_grow: promised.may_grow })
    }

    /// The head that this member follows says so.
    fn note_committed(&mut self, index: usize, committed: u64) {
        let replica = &self.replication.replicas[index];
        let Some(member) = &replica.member else { return };
        let served = &self.served[replica.served];
        let through = member.may_let_go(committed);
        let volume = served.volume;
        self.lanes[served.lane].lane.note_committed(volume, through);
    }

    fn append_change(
        &mut self,
        index: usize,
        asker: Leader,
        change: ChangeHeader,
        memory: Option<MemoryRange>,
    ) {
        let own = asker == Leader::ThisNode;
        let payload = memory
            .map(|whole| if own { Payload::Lent(whole) } else { Payload::Owned(OwnedPayload { whole }) });
        let lent = memory.filter(|_| own);
        if let Some(memory) = lent {
            self.use_memory(memory);
        }
        let pages = memory.filter(|_| !own).map_or(0, |memory| memory.len / BLOCK_BYTES);
        let sequence = change.stamp.sequence;
        let cookie = self.begin_work(Work::Append { replica: index, sequence, lent, pages });
        let served = &self.served[self.replication.replicas[index].served];
        let range = BlockRange { volume: served.volume, block: change.block, count: change.count };
        self.with_lane(served.lane, |lane, context| {
            lane.append(context, cookie, change.kind, range, payload, change.stamp);
        });
    }

    fn store_promise(&mut self, index: usize, epoch: u32) {
        if self.replication.bugs.has(PlantedBug::PromiseInMemory) {
            return self.finish_promise(index, epoch, true);
        }
        let cookie = self.begin_work(Work::Promise { replica: index, epoch });
        let served = &self.served[self.replication.replicas[index].served];
        let volume = served.volume;
        self.with_lane(served.lane, |lane, context| lane.promise(context, cookie, volume, epoch));
    }

    pub(super) fn finish_append(&mut self, index: usize, sequence: u64, result: Result<(), RequestError>) {
        if let Err(error) = result {
            return self.append_failed(index, error);
        }
        if let Some(member) = &mut self.replication.replicas[index].member {
            member.appended(sequence);
        }
        self.answer_leader(index);
    }

    /// A change, a copy or a mark has no place in the log: for want of room, or for good.
    pub(super) fn append_failed(&mut self, index: usize, error: RequestError) {
        match error {
            RequestError::NoSpace => self.changes_left_out(index, true),
            RequestError::ShuttingDown => self.changes_left_out(index, false),
            _ => self.fail_member(index),
        }
    }

    pub(super) fn finish_promise(&mut self, index: usize, epoch: u32, good: bool) {
        if !good {
            return self.fail_member(index);
        }
        if let Some(member) = &mut self.replication.replicas[index].member {
            member.promise_stored(epoch);
        }
        self.answer_leader(index);
    }

    /// The replica cannot go on: it steps out, and the head will go on without it. If that is here, another node's turn
    /// has come, unless the volume is attached here.
    pub(super) fn fail_member(&mut self, index: usize) {
        let now = self.now;
        let node = self.replication.node();
        let replica = &mut self.replication.replicas[index];
        if std::mem::replace(&mut replica.failed, true) {
            return;
        }
        replica.member = None;
        replica.head.member_down(now, node);
        if replica.departs || !replica.is_attached_here(node) {
            replica.head.resign();
        }
        self.settle_head(index);
    }

    /// Sends the leader what is due.
    pub(super) fn answer_leader(&mut self, index: usize) {
        let now = self.now;
        let replica = &mut self.replication.replicas[index];
        let Some(member) = &mut replica.member else { return };
        let leader = replica.leader;
        let due = [member.poll_report(now), member.poll_ack(), member.poll_fill()];
        for answer in due.into_iter().flatten() {
            self.send_answer(index, leader, answer);
        }
    }

    pub(super) fn send_answer(&mut self, index: usize, asker: Leader, answer: PeerMessage) {
        match asker {
            Leader::ThisNode => {
                let node = self.replication.node();
                self.answer_head(index, node, answer, Vec::new(), None);
                self.settle_head(index);
            }
            Leader::Link(id, generation) => {
                let volume = self.replication.replicas[index].volume;
                if self.is_same_link(id, generation) {
                    self.send_on_link(id, volume, answer);
                }
            }
            Leader::Nobody => {}
        }
    }

    fn fetch(&mut self, index: usize, leader: Leader, epoch: u32, sequence: u64) {
        let pages = 1 + PEER_PAYLOAD_BYTES_MAX / BLOCK_BYTES;
        // Without memory the question is dropped, and asked again.
        let Some(memory) = self.allocate_for_peer(pages) else { return };
        let cookie = self.begin_work(Work::Fetch { replica: index, epoch, sequence, memory, leader });
        let served = &self.served[self.replication.replicas[index].served];
        let volume = served.volume;
        let blocks = memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES);
        self.with_lane(served.lane, |lane, context| lane.fetch(context, cookie, volume, sequence, blocks));
    }

    pub(in crate::engine::shard) fn finish_fetch(&mut self, fetched: &Fetched) {
        let work = self.replication.works.remove(fetched.cookie & !super::COOKIE);
        let Work::Fetch { replica, epoch, sequence, memory, leader } = work else { unreachable!("a fetch") };
        let FetchOutcome::Found { stamp, kind, block, count } = fetched.outcome else {
            self.give_back_for_peer(memory);
            return self.send_answer(replica, leader, PeerMessage::FetchGone { epoch, sequence });
        };
        // The head knows the predecessor's epoch.
        let previous = crate::record::Stamp { epoch: stamp.epoch, sequence: sequence - 1 };
        let mut change = ChangeHeader { kind, block, count, stamp, previous, new_blocks: 0 };
        // What it took when it was numbered is not in the log.
        change.new_blocks = change.payload_blocks();
        let message = PeerMessage::Fetched { epoch, change };
        let payload_pages = change.payload_blocks();
        let kept = if payload_pages > 0 { 1 + payload_pages } else { 0 };
        let all = memory.len / BLOCK_BYTES;
        self.give_back_for_peer(memory.part(kept * BLOCK_BYTES, (all - kept) * BLOCK_BYTES));
        let memory = (kept > 0).then(|| memory.part(0, kept * BLOCK_BYTES));
        let checksums = memory.map_or_else(Vec::new, |memory| {
            let blocks = self.memory.bytes(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES));
            blocks.chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect()
        });
        match leader {
            Leader::ThisNode => {
                let node = self.replication.node();
                self.answer_head(replica, node, message, checksums, memory);
                self.settle_head(replica);
            }
            Leader::Link(id, generation) => {
                self.send_fetched((id, generation), replica, message, &checksums, memory);
            }
            Leader::Nobody => self.drop_payload_of_peer(memory),
        }
    }

    pub(super) fn send_fetched(
        &mut self,
        (id, generation): (ConnectionId, u64),
        index: usize,
        message: PeerMessage,
        checksums: &[u32],
        memory: Option<MemoryRange>,
    ) {
        let volume = self.replication.replicas[index].volume;
        let there = self.is_same_link(id, generation);
        let Some(memory) = memory else {
            if there {
                self.send_on_link(id, volume, message);
            }
            return;
        };
        if !there {
            return self.give_back_for_peer(memory);
        }
        // From now on its users hold it.
        self.replication.peer_pages -= memory.len / BLOCK_BYTES;
        self.send_payload(id, PeerFrame { volume, message }, checksums, memory);
    }
}

/// Can only a head that is going to fill the replica here ask it for its promise of this epoch? One that makes a view
/// would take its position for that of a replica in sync.
fn may_be_filled(record: &Record, node: NodeId, epoch: u32) -> bool {
    record.epoch == epoch && record.started && !record.is_in_sync(node)
}

/// The epoch of what only the head may ask for whose promise the member gave.
fn epoch_of_order(message: PeerMessage) -> Option<u32> {
    match message {
        PeerMessage::Change { epoch, .. }
        | PeerMessage::Fetch { epoch, .. }
        | PeerMessage::Read { epoch, .. }
        | PeerMessage::ListChanged { epoch, .. }
        | PeerMessage::Lease { epoch, .. } => Some(epoch),
        PeerMessage::Check(check) => Some(check.epoch()),
        _ => None,
    }
}
