//! Clients' writes that wait for room: they have no number yet, and a number they get only when every replica that must
//! have them has said that it has the space.
//!
//! ```text
//!   write ─▶ new blocks? ─▶ room everywhere? ──▶ numbered
//!              │ none: numbered      │ not known: in line, asked again in every turn
//!              └─ the map is away: loaded first     └ lacking: ENOSPC
//! ```
//!
//! Where there is no own map every block counts as new, until room is short: then members are asked what they hold there.

use super::super::Shard;
use super::{Replica, Work};
use crate::memory::Memory;
use crate::record::ChangeKind;
use crate::replica::head::Room;
use crate::request::RequestError;
use crate::store::lane::BlockRange;
use crate::units::{MemoryRange, Moment};
use crate::wire::peer_message::ChangeHeader;

/// A write that has no number yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitingWrite {
    pub(super) piece: u32,
    pub(super) blocks: (u32, u32),
    pub(super) memory: MemoryRange,
    pub(super) since: Moment,
    /// A leaf of the map is being loaded, to know what it takes. After one has come or cannot, nothing more is loaded.
    pub(super) loading: Loading,
}

/// See [`WaitingWrite::loading`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loading {
    Nothing,
    Leaf(u32),
    Done(u32),
    /// Members read the blocks, to know which of them are there.
    Blocks {
        /// Some of them are released meanwhile.
        released: bool,
    },
    /// They have, and no change has made that untrue since: so many at most are new. Nothing: nobody can tell.
    Found(Option<u32>),
}

impl<M: Memory> Shard<M> {
    /// May the write be numbered now? If so: how many blocks it newly takes, at most.
    pub(super) fn find_room(&mut self, index: usize, write: &mut WaitingWrite) -> (Room, u32) {
        let (block, count) = write.blocks;
        let Replica { served, head, .. } = &self.replication.replicas[index];
        let (lane, volume) = (self.served[*served].lane, self.served[*served].volume);
        if self.is_remote(*served) {
            return self.find_room_elsewhere(index, write);
        }
        let new = self.lanes[lane].lane.count_new(BlockRange { volume, block, count });
        // What trims that are not in effect yet will make free, others may have been promised by then.
        let overlaps =
            |change: &ChangeHeader| change.block < block + count && block < change.block + change.count;
        let released = new.most < count
            && head.pending().any(|change| change.kind != ChangeKind::Data && overlaps(change));
        let most = if released { count } else { new.most };
        let now = self.now;
        let unknown = new.unknown_leaf.filter(|leaf| write.may_load(*leaf));
        let is_loading = matches!(write.loading, Loading::Leaf(_));
        if most > 0 && !released && (unknown.is_some() || is_loading) {
            if let (Some(leaf), false) = (unknown, is_loading) {
                write.loading = Loading::Leaf(leaf);
                let cookie = self.begin_work(Work::Leaf { replica: index, piece: write.piece });
                let here =
                    self.with_lane(lane, |lane, context| lane.want_leaf(context, cookie, volume, leaf));
                assert!(here.is_none(), "just looked for");
            }
            return (Room::Awaited, most);
        }
        let room = self.replication.replicas[index].head.find_room(now, write.since, most);
        (room, most)
    }

    fn find_room_elsewhere(&mut self, index: usize, write: &mut WaitingWrite) -> (Room, u32) {
        let (block, count) = write.blocks;
        let most = match write.loading {
            Loading::Blocks { .. } => return (Room::Awaited, count),
            Loading::Found(Some(new)) => new,
            _ => count,
        };
        let now = self.now;
        let room = self.replication.replicas[index].head.find_room(now, write.since, most);
        let is_known = matches!(write.loading, Loading::Found(_));
        if room == Room::Granted || is_known {
            return (room, most);
        }
        self.look_for_new_blocks(index, write.piece, (block, count));
        let mut pending = self.replication.replicas[index].head.pending();
        let released =
            pending.any(|change| change.kind != ChangeKind::Data && overlap(write.blocks, change.blocks()));
        write.loading = Loading::Blocks { released };
        (Room::Awaited, most)
    }

    /// Members have read the blocks of a write that waits, or cannot.
    pub(super) fn new_blocks_found(&mut self, index: usize, piece: u32, new: Option<u32>) {
        let waiting = &mut self.replication.replicas[index].waiting_room;
        if let Some(write) = waiting.iter_mut().find(|write| write.piece == piece) {
            let is_true = write.loading == Loading::Blocks { released: false };
            write.loading = Loading::Found(new.filter(|_| is_true));
        }
        self.advance_waiting(index);
    }

    /// A change was numbered: what it releases is not there any more for the writes that wait.
    pub(super) fn note_released(&mut self, index: usize, block: u32, count: u32) {
        let waiting = &mut self.replication.replicas[index].waiting_room;
        for write in waiting.iter_mut().filter(|write| overlap(write.blocks, (block, count))) {
            match &mut write.loading {
                Loading::Found(new) => *new = None,
                Loading::Blocks { released } => *released = true,
                Loading::Nothing | Loading::Leaf(_) | Loading::Done(_) => {}
            }
        }
    }

    /// Does a write take a block that has no place yet, as far as is known?
    pub(super) fn takes_new_blocks(&mut self, index: usize, block: u32, count: u32) -> bool {
        if self.is_remote(self.replication.replicas[index].served) {
            return true;
        }
        let volume = self.served[self.replication.replicas[index].served].volume;
        self.lane_of_replica(index).count_new(BlockRange { volume, block, count }).most > 0
    }

    /// A leaf of the map has come, or cannot be read: then what it maps counts as new.
    pub(super) fn leaf_for_room_came(&mut self, index: usize, piece: u32) {
        let waiting = &mut self.replication.replicas[index].waiting_room;
        if let Some(write) = waiting.iter_mut().find(|write| write.piece == piece)
            && let Loading::Leaf(leaf) = write.loading
        {
            write.loading = Loading::Done(leaf);
        }
        self.advance_waiting(index);
    }

    /// Writes that wait for room go on if they can, in order.
    pub(super) fn advance_waiting(&mut self, index: usize) {
        if self.replication.replicas[index].waiting_room.is_empty() {
            return;
        }
        for _ in 0..self.replication.replicas[index].waiting_room.len() {
            let waiting = &mut self.replication.replicas[index].waiting_room;
            let write = waiting.pop_front().expect("counted");
            let task = self.pieces.get(write.piece).task;
            let error = self.tasks.get(task).error;
            match error.filter(|_| !matches!(write.loading, Loading::Leaf(_) | Loading::Blocks { .. })) {
                Some(error) => self.refuse_write(write, error),
                None => self.replication.replicas[index].waiting_room.push_back(write),
            }
        }
        while let Some(mut write) = self.replication.replicas[index].waiting_room.pop_front() {
            match self.find_room(index, &mut write) {
                (Room::Awaited, _) => {
                    self.replication.replicas[index].waiting_room.push_front(write);
                    break;
                }
                (Room::Granted, new_blocks) => {
                    let WaitingWrite { piece, blocks, memory, .. } = write;
                    self.number_change(
                        index,
                        piece,
                        ChangeKind::Data,
                        (blocks.0, blocks.1, new_blocks),
                        Some(memory),
                    );
                }
                (Room::Lacking, _) => {
                    self.lane_of_replica(index).note_refused();
                    self.refuse_write(write, RequestError::NoSpace);
                }
            }
        }
        if self.replication.replicas[index].waiting_room.is_empty() {
            self.replication.replicas[index].head.needs_no_room();
        }
        self.settle_head(index);
    }

    /// The volume is not led here any more.
    pub(super) fn end_waiting(&mut self, index: usize) {
        while let Some(write) = self.replication.replicas[index].waiting_room.pop_front() {
            self.refuse_write(write, RequestError::ShuttingDown);
        }
    }

    fn refuse_write(&mut self, write: WaitingWrite, error: RequestError) {
        self.pages.release(write.memory);
        self.finish_later(write.piece, Err(error));
    }

    pub(super) fn lane_of_replica(&mut self, index: usize) -> &mut crate::store::lane::Lane {
        let served = &self.served[self.replication.replicas[index].served];
        &mut self.lanes[served.lane].lane
    }

    /// The lane has left changes out: for want of room, or because nobody counts on this replica any more. They come again
    /// when it is filled the next time.
    pub(super) fn changes_left_out(&mut self, index: usize, lacks_room: bool) {
        let served = &self.served[self.replication.replicas[index].served];
        let last = self.lanes[served.lane].lane.resume_order(served.volume);
        if let Some(member) = &mut self.replication.replicas[index].member {
            if lacks_room { member.lacks_room(last) } else { member.cut_back(last) }
        }
        self.answer_leader(index);
    }
}

fn overlap((first, count): (u32, u32), (other, other_count): (u32, u32)) -> bool {
    first < other + other_count && other < first + count
}

impl WaitingWrite {
    /// Leaves are loaded one after the other, each once.
    fn may_load(&self, leaf: u32) -> bool {
        match self.loading {
            Loading::Nothing => true,
            Loading::Leaf(_) | Loading::Blocks { .. } => false,
            Loading::Done(done) => leaf > done,
            // The own replica has come back since.
            Loading::Found(_) => true,
        }
    }
}
