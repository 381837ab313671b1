//! What heads want, carried out.

use super::super::Shard;
use super::content::Content;
use super::fill::CopyWish;
use super::room::{Loading, WaitingWrite};
use super::{Leader, Replica};
use crate::checksum::crc32c;
use crate::engine::ports::ConnectionId;
use crate::memory::Memory;
use crate::record::{ChangeKind, NodeId, VolumeNumber};
use crate::replica::bugs::PlantedBug;
use crate::replica::head::{HeadEffect, Room};
use crate::request::RequestError;
use crate::store::lane::{Completion, HoleMap};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_USIZE, MemoryRange, Moment};
use crate::wire::peer_message::{ChangeHeader, PeerFrame, PeerMessage};

impl<M: Memory> Shard<M> {
    /// A client's change. `memory` is a page for a descriptor and the blocks; it is the replica's from now on.
    pub(in crate::engine::shard) fn submit_change(
        &mut self,
        index: usize,
        piece: u32,
        kind: ChangeKind,
        (block, count): (u32, u32),
        memory: Option<MemoryRange>,
    ) {
        if !self.is_of_this_term(self.pieces.get(piece).task) {
            return self.refuse_untimely(piece, memory);
        }
        let (ChangeKind::Data, Some(memory)) = (kind, memory) else {
            return self.number_change(index, piece, kind, (block, count, 0), memory);
        };
        let since = self.now;
        let mut write =
            WaitingWrite { piece, blocks: (block, count), memory, since, loading: Loading::Nothing };
        // What takes no new blocks passes those that wait for room.
        let in_line = !self.replication.replicas[index].waiting_room.is_empty();
        if in_line && self.takes_new_blocks(index, block, count) {
            return self.replication.replicas[index].waiting_room.push_back(write);
        }
        match self.find_room(index, &mut write) {
            (Room::Granted, new_blocks) => {
                self.number_change(index, piece, kind, (block, count, new_blocks), Some(memory));
            }
            (Room::Awaited | Room::Lacking, _) => {
                self.replication.replicas[index].waiting_room.push_back(write);
                self.progress = true;
            }
        }
        self.settle_head(index);
    }

    fn refuse_untimely(&mut self, piece: u32, memory: Option<MemoryRange>) {
        if let Some(memory) = memory {
            self.pages.release(memory);
        }
        self.finish_later(piece, Err(RequestError::ShuttingDown));
    }

    /// Gives a change its number: there is room for the blocks that it newly takes.
    pub(super) fn number_change(
        &mut self,
        index: usize,
        piece: u32,
        kind: ChangeKind,
        (block, count, new_blocks): (u32, u32, u32),
        memory: Option<MemoryRange>,
    ) {
        let now = self.now;
        let head = &mut self.replication.replicas[index].head;
        let Ok(stamp) = head.submit(now, piece, kind, block, (count, new_blocks)) else {
            return self.refuse_untimely(piece, memory);
        };
        self.replication.replicas[index].peer_reads.note_change(block, count);
        if kind != ChangeKind::Data {
            self.note_released(index, block, count);
        }
        self.replication.replicas[index].checking.checks.note_change(block, count);
        let checksums = memory.map_or_else(Vec::new, |memory| self.checksums_of(memory));
        if let Some(memory) = memory {
            self.use_memory(memory);
        }
        let content =
            Content { sequence: stamp.sequence, piece: Some(piece), memory, checksums, peer_pages: 0 };
        self.replication.replicas[index].contents.push(content);
        self.settle_head(index);
    }

    fn checksums_of(&self, memory: MemoryRange) -> Vec<u32> {
        let blocks = self.memory.bytes(memory.part(BLOCK_BYTES, memory.len - BLOCK_BYTES));
        blocks.chunks_exact(BLOCK_BYTES_USIZE).map(crc32c).collect()
    }

    /// Ends a piece, but not within the call that began it.
    pub(in crate::engine::shard) fn finish_later(&mut self, piece: u32, result: Result<(), RequestError>) {
        self.progress = true;
        self.ended_pieces.push_back(Completion {
            cookie: piece,
            result,
            holes: HoleMap::default(),
            read: None,
        });
    }

    /// Carries out what the head wants, until it wants nothing.
    pub(super) fn settle_head(&mut self, index: usize) {
        while let Some(effect) = self.replication.replicas[index].head.poll_effect() {
            match effect {
                HeadEffect::Propose(record) => self.replication.proposals.push_back(record),
                HeadEffect::Promise { member, epoch } => {
                    self.ask_member(index, member, PeerMessage::Promise { epoch });
                }
                HeadEffect::Fetch { member, epoch, sequence } => {
                    self.ask_member(index, member, PeerMessage::Fetch { epoch, sequence });
                }
                HeadEffect::Lease { member, epoch, asked, room } => {
                    let committed = self.replication.replicas[index].head.settled();
                    let lease = PeerMessage::Lease { epoch, asked_ns: asked.0, committed, room };
                    self.ask_member(index, member, lease);
                }
                HeadEffect::Change { member, epoch, change } => {
                    self.send_change(index, member, epoch, change);
                }
                HeadEffect::Compare { member, epoch, fill, base } => {
                    self.expect_surplus(index, fill, base);
                    self.ask_member(index, member, PeerMessage::Compare { epoch, fill, base });
                }
                HeadEffect::Fill { member, epoch, fill, after } => {
                    self.ask_member(index, member, PeerMessage::Fill { epoch, after, fill });
                }
                HeadEffect::Copy { member, epoch, fill, base, block } => {
                    self.queue_copy(index, CopyWish { member, epoch, fill, base, block });
                }
                HeadEffect::Filled { member, epoch, fill } => {
                    self.ask_member(index, member, PeerMessage::Filled { epoch, fill });
                }
                HeadEffect::Committed { sequence, .. } | HeadEffect::Dropped { sequence } => {
                    let content = self.replication.replicas[index].contents.pop(sequence);
                    self.let_go(content, Ok(()));
                }
                HeadEffect::Started => self.lead_began(index),
                HeadEffect::Ended => self.lead_ended(index),
            }
        }
    }

    fn let_go(&mut self, content: Content, result: Result<(), RequestError>) {
        self.replication.peer_pages -= content.peer_pages;
        if let Some(memory) = content.memory {
            self.unuse(memory);
        }
        if let Some(piece) = content.piece {
            self.finish_later(piece, result);
        }
    }

    pub(super) fn ask_member(&mut self, index: usize, member: NodeId, message: PeerMessage) {
        if member == self.replication.node() {
            return self.ask_own_member(index, message, None);
        }
        let volume = self.replication.replicas[index].volume;
        if let Some(link) = self.replication.dials.up(member) {
            self.send_on_link(link, volume, message);
        }
    }

    fn send_change(&mut self, index: usize, member: NodeId, epoch: u32, change: ChangeHeader) {
        let replica = &self.replication.replicas[index];
        let committed = replica.head.settled();
        let message = PeerMessage::Change { epoch, change, committed };
        let content = replica.contents.get(change.stamp.sequence).expect("kept until it is committed");
        let memory = content.memory;
        if member == self.replication.node() {
            return self.ask_own_member(index, message, memory);
        }
        let Some(link) = self.replication.dials.up(member) else { return };
        let volume = replica.volume;
        let Some(memory) = memory else { return self.send_on_link(link, volume, message) };
        let checksums = std::mem::take(&mut self.content_checksums(index, change.stamp.sequence).checksums);
        self.send_payload(link, PeerFrame { volume, message }, &checksums, memory);
        self.content_checksums(index, change.stamp.sequence).checksums = checksums;
    }

    fn content_checksums(&mut self, index: usize, sequence: u64) -> &mut Content {
        self.replication.replicas[index].contents.get_mut(sequence).expect("looked at by the caller")
    }

    /// A message of a member to the heads of this node.
    pub(super) fn handle_answer(
        &mut self,
        member: NodeId,
        volume: VolumeNumber,
        message: PeerMessage,
        checksums: Vec<u32>,
        memory: Option<MemoryRange>,
    ) {
        let Some(index) = self.replication.find(volume) else {
            if let Some(memory) = memory {
                self.give_back_for_peer(memory);
            }
            return;
        };
        self.answer_head(index, member, message, checksums, memory);
        self.settle_head(index);
    }

    /// The same for one volume; the caller settles.
    pub(super) fn answer_head(
        &mut self,
        index: usize,
        member: NodeId,
        message: PeerMessage,
        checksums: Vec<u32>,
        memory: Option<MemoryRange>,
    ) {
        let now = self.now;
        let head = &mut self.replication.replicas[index].head;
        match message {
            PeerMessage::Promised { epoch, last, granted_ns } => {
                head.promised(now, member, epoch, last, granted_ns);
            }
            PeerMessage::Ack { epoch, through } => head.acked(now, member, epoch, through),
            PeerMessage::Gap { epoch, last } => head.gap(now, member, epoch, last),
            PeerMessage::FetchGone { epoch, .. } => head.fetch_gone(now, member, epoch),
            PeerMessage::Leased { epoch, asked_ns, room } => {
                let late = self.replication.bugs.has(PlantedBug::LeaseFromReceipt);
                let asked = if late { now } else { Moment(asked_ns) };
                let head = &mut self.replication.replicas[index].head;
                head.leased(now, member, epoch, asked);
                head.granted(now, member, epoch, Moment(asked_ns), room);
                self.progress |= !self.replication.replicas[index].waiting_room.is_empty();
            }
            PeerMessage::Surplus { fill, block, count, .. } => self.note_surplus(index, fill, (block, count)),
            PeerMessage::Compared { epoch, fill, known } => head.compared(now, member, epoch, fill, known),
            PeerMessage::Changed { fill, if_holes, block, count, .. } => {
                self.note_changed(index, fill, if_holes, (block, count));
            }
            PeerMessage::Listed { fill, known, .. } => self.all_listed(index, member, fill, known),
            PeerMessage::Filling { epoch, fill } => head.filling(now, member, epoch, fill),
            PeerMessage::Copied { epoch, fill, copies } => head.copied(now, member, epoch, fill, copies),
            PeerMessage::Complete { epoch, fill } => head.complete(now, member, epoch, fill),
            PeerMessage::NoRoom { epoch } => {
                self.replication.repairs.fills_without_room += 1;
                head.no_room(now, member, epoch);
            }
            // The record will tell what has become of this head.
            PeerMessage::Refused { .. } => {}
            PeerMessage::Fetched { epoch, change } => {
                return self.fetched(index, member, epoch, change, checksums, memory);
            }
            PeerMessage::Blocks { read, block, count, .. }
            | PeerMessage::Holes { read, block, count, .. } => {
                return self.blocks_came(index, member, read, (block, count), memory);
            }
            PeerMessage::Unreadable { read, .. } => {
                self.replication.replicas[index].peer_reads.refused(now, member, read);
                self.advance_peer_reads(index);
            }
            PeerMessage::Check(answer) => self.check_answered(index, member, answer, checksums),
            request => unreachable!("{request:?} is no answer"),
        }
        assert!(memory.is_none(), "only what was fetched or read has a payload");
    }

    fn fetched(
        &mut self,
        index: usize,
        member: NodeId,
        epoch: u32,
        change: ChangeHeader,
        checksums: Vec<u32>,
        memory: Option<MemoryRange>,
    ) {
        let now = self.now;
        // The content must be there before the head sends it on.
        let head = &mut self.replication.replicas[index].head;
        if !head.expects(member, epoch, change) {
            if let Some(memory) = memory {
                self.give_back_for_peer(memory);
            }
            return;
        }
        let peer_pages = memory.map_or(0, |memory| memory.len / BLOCK_BYTES);
        if let Some(memory) = memory {
            self.use_memory(memory);
        }
        let Replica { head, contents, .. } = &mut self.replication.replicas[index];
        contents.push(Content {
            sequence: change.stamp.sequence,
            piece: None,
            memory,
            checksums,
            peer_pages,
        });
        head.fetched(now, member, epoch, change);
    }

    /// The volume is served here from now on: those who wait for it go on.
    fn lead_began(&mut self, index: usize) {
        let served = self.replication.replicas[index].served;
        self.progress = true;
        self.note_whence_is_read(index);
        self.wake_connections(served);
    }

    /// Requests of the volume may go on.
    pub(super) fn wake_connections(&mut self, served: usize) {
        for id in self.connections_of(served) {
            self.ready.push_back(id);
        }
    }

    /// The volume is not led here, or not any more. Nobody knows what becomes of the changes under way: their clients are
    /// not answered but disconnected, so that they ask the next head.
    fn lead_ended(&mut self, index: usize) {
        let served = self.replication.replicas[index].served;
        self.served[served].terms += 1;
        for id in self.connections_of(served) {
            self.close(id);
        }
        while let Some(content) = self.replication.replicas[index].contents.pop_any() {
            self.let_go(content, Err(RequestError::ShuttingDown));
        }
        self.fail_held(index);
        self.end_waiting(index);
        let replica = &mut self.replication.replicas[index];
        replica.leaving_since = None;
        (replica.waiting_copy, replica.source) = (None, None);
        self.fail_peer_reads(index);
        self.end_checks(index);
        // The replica stays, and follows whoever leads.
        if self.replication.replicas[index].leader == Leader::ThisNode {
            self.replication.replicas[index].leader = Leader::Nobody;
        }
    }

    pub(super) fn connections_of(&mut self, served: usize) -> Vec<ConnectionId> {
        let chosen = |id: &ConnectionId| {
            self.connections[id.0 as usize]
                .as_ref()
                .is_some_and(|connection| connection.export.is_some_and(|export| export.0 as usize == served))
        };
        (0..crate::limits::CONNECTIONS_MAX).map(ConnectionId).filter(chosen).collect()
    }

    /// A client has chosen the volume, or it is attached here, and nobody leads it here: this node becomes the head. Where
    /// it cannot, its clients are not kept waiting.
    pub(super) fn take_over_if_asked(&mut self, index: usize) {
        let (now, config) = (self.now, self.replication.config());
        let replica = &self.replication.replicas[index];
        let is_asked = self.served[replica.served].connections > 0 || replica.attached_since.is_some();
        if replica.head.is_active() || self.draining || !is_asked {
            return;
        }
        if replica.refusal(config, now).is_some() {
            // Its clients came before that was known: they look for another node.
            let served = replica.served;
            for id in self.connections_of(served) {
                self.close(id);
            }
        } else if replica.may_take(config, now) {
            let (now, random) = (self.now, self.replication.random());
            self.replication.replicas[index].head.take(now, random);
        }
    }
}
