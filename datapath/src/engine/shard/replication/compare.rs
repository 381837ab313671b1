//! What a replica that comes back lacks: found in two logs, the one it has and the one that it is filled from.
//!
//! ```text
//!   the replica's log, what is kept ──▶ blocks that it changed beyond what is in common ──┐
//!   the own log, back to there ───────▶ blocks that were changed since ───────────────────┴─▶ lacking
//!   the own map ──────────────────────▶ leaves changed since: their holes are lacking
//! ```
//!
//! A head without a replica in sync of its own has a member look through its log and its map instead.

use super::super::Shard;
use super::fill::{CopyPiece, CopyWish};
use super::{Leader, Work};
use crate::block_set::BlockSet;
use crate::limits::PIECE_BLOCKS_MAX;
use crate::memory::Memory;
use crate::record::{NodeId, Stamp};
use crate::replica::bugs::PlantedBug;
use crate::store::lane::{Changed, Extent};
use crate::store::map::LEAF_BLOCKS;
use crate::units::{MemoryRange, Moment};
use crate::wire::peer_message::PeerMessage;

/// Pages for reading the log.
const WALK_PAGES: u32 = 32;
/// A member that looks through its log for so long is not waited for.
const SEARCH_PATIENCE_NS: u64 = 5_000_000_000;
/// Blocks that are not lacking are read along if so few lie between two that are.
const GAP_BLOCKS: u32 = 8;

/// What is known of a replica that is filled from here.
#[derive(Debug)]
pub(super) struct Source {
    fill: u64,
    /// What the replica has beyond what is in common; later also what was changed here since.
    lacking: BlockSet,
    /// Blocks whose holes are lacking, if a member has told them. If not, the own map knows.
    lacking_if_holes: Option<BlockSet>,
    search: Search,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    NotBegun,
    UnderWay,
    /// A member looks for it, since this moment.
    Asked(NodeId, Moment),
    Done,
    /// The log cannot tell: all is copied.
    Failed,
}

/// A question of a head about this node's replica.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparing {
    asker: Leader,
    epoch: u32,
    fill: u64,
    base: Stamp,
}

impl<M: Memory> Shard<M> {
    /// A replica is asked what it has beyond what is in common.
    pub(super) fn expect_surplus(&mut self, index: usize, fill: u64, base: Stamp) {
        let source =
            Source { fill, lacking: BlockSet::default(), lacking_if_holes: None, search: Search::NotBegun };
        self.replication.replicas[index].source = Some(Box::new(source));
        if self.replication.bugs.has(PlantedBug::SourceTooEarly) {
            self.search_own_log(index, fill, base);
        }
    }

    /// It has these blocks.
    pub(super) fn note_surplus(&mut self, index: usize, fill: u64, (block, count): (u32, u32)) {
        if let Some(source) = self.source_of(index, fill) {
            source.lacking.insert(block, count);
        }
    }

    fn source_of(&mut self, index: usize, fill: u64) -> Option<&mut Source> {
        self.replication.replicas[index].source.as_deref_mut().filter(|source| source.fill == fill)
    }

    /// Was what it is to be compared with forgotten, since the replica is filled anew?
    pub(super) fn is_of_an_earlier_fill(&mut self, index: usize, wish: &CopyWish) -> bool {
        wish.base != Stamp::default() && self.source_of(index, wish.fill).is_none()
    }

    /// Is it known what must be copied? If not it soon is, and copying goes on by itself.
    pub(super) fn knows_what_is_lacking(&mut self, index: usize, wish: &CopyWish) -> bool {
        if wish.base == Stamp::default() {
            return true;
        }
        let search = self.source_of(index, wish.fill).expect("what is in common was compared").search;
        match search {
            Search::Done | Search::Failed => return true,
            Search::UnderWay => return false,
            Search::Asked(member, since) if !self.is_asked_in_vain(index, member, since) => return false,
            Search::NotBegun | Search::Asked(..) => {}
        }
        if self.replication.replicas[index].reads_here(self.replication.node(), self.replication.bugs) {
            self.search_own_log(index, wish.fill, wish.base);
        } else {
            self.search_log_of_a_member(index, wish);
        }
        false
    }

    /// Will a member that looks through its log not answer any more?
    fn is_asked_in_vain(&self, index: usize, member: NodeId, since: Moment) -> bool {
        let head = &self.replication.replicas[index].head;
        let can_answer = head.record().is_in_sync(member) && head.is_following(member);
        !can_answer || since.after_ns(SEARCH_PATIENCE_NS) <= self.now
    }

    /// Has a member in sync say what was changed after what is in common. It has all that was committed when it is asked,
    /// and the replica that is filled is sent everything since.
    fn search_log_of_a_member(&mut self, index: usize, wish: &CopyWish) {
        let now = self.now;
        let head = &self.replication.replicas[index].head;
        let asked = match self.replication.replicas[index].source.as_deref().map(|source| source.search) {
            Some(Search::Asked(member, _)) => Some(member),
            _ => None,
        };
        let mut ready = head.others_in_sync();
        ready.retain(|node| head.is_following(*node));
        // The one after the one that was asked in vain.
        let next = ready.iter().copied().find(|node| asked.is_none_or(|asked| *node > asked));
        let member = next.or_else(|| ready.first().copied());
        let source = self.source_of(index, wish.fill).expect("what is in common was compared");
        let Some(member) = member else {
            // When one follows again there will be a turn: until then there is nothing to wait for.
            source.search = Search::NotBegun;
            return;
        };
        source.lacking_if_holes.get_or_insert_default();
        source.search = Search::Asked(member, now);
        let CopyWish { epoch, fill, base, .. } = *wish;
        self.ask_member(index, member, PeerMessage::ListChanged { epoch, fill, base });
    }

    /// A member has changed these blocks.
    pub(super) fn note_changed(
        &mut self,
        index: usize,
        fill: u64,
        if_holes: bool,
        (block, count): (u32, u32),
    ) {
        let Some(source) = self.source_of(index, fill) else { return };
        match &mut source.lacking_if_holes {
            Some(holes) if if_holes => holes.insert(block, count),
            _ => source.lacking.insert(block, count),
        }
    }

    /// That was all that it has changed, or it cannot tell.
    pub(super) fn all_listed(&mut self, index: usize, member: NodeId, fill: u64, known: bool) {
        let Some(source) = self.source_of(index, fill) else { return };
        if matches!(source.search, Search::Asked(asked, _) if asked == member) {
            source.search = if known { Search::Done } else { Search::Failed };
            self.start_copy(index);
        }
    }

    /// Begins the search for what was changed here after what is in common. Without memory it is asked for again.
    fn search_own_log(&mut self, index: usize, fill: u64, base: Stamp) {
        let work = |memory| Work::FindChanged { replica: index, fill, memory };
        if self.walk_log(index, base, Extent::All, work) {
            let source = self.source_of(index, fill).expect("it was asked for");
            // What a member may have told of its map is not all.
            (source.search, source.lacking_if_holes) = (Search::UnderWay, None);
        }
    }

    /// Has the lane here look through its log for what was changed after `base`. False if there is no memory for it.
    fn walk_log(
        &mut self,
        index: usize,
        base: Stamp,
        extent: Extent,
        work: impl FnOnce(MemoryRange) -> Work,
    ) -> bool {
        let Some(memory) = self.allocate_for_peer(WALK_PAGES) else { return false };
        let cookie = self.begin_work(work(memory));
        let served = &self.served[self.replication.replicas[index].served];
        let (lane, volume, after) = (served.lane, served.volume, base.sequence);
        self.with_lane(lane, |lane, _| lane.find_changed(cookie, volume, after, extent, memory));
        self.progress = true;
        true
    }

    /// A lane has looked through its log.
    pub(in crate::engine::shard) fn finish_changed(&mut self, changed: Changed) {
        match self.replication.works.remove(changed.cookie & !super::COOKIE) {
            Work::FindChanged { replica, fill, memory } => {
                self.give_back_for_peer(memory);
                if let Some(source) = self.source_of(replica, fill) {
                    source.search = if changed.blocks.is_some() { Search::Done } else { Search::Failed };
                    changed.blocks.iter().for_each(|blocks| source.lacking.extend(blocks));
                    self.start_copy(replica);
                }
            }
            Work::Compare { replica, comparing, memory } => {
                self.give_back_for_peer(memory);
                self.answer_comparison(replica, comparing, changed.blocks);
            }
            Work::ListChanged { replica, comparing, memory } => {
                self.give_back_for_peer(memory);
                self.tell_changed(replica, comparing, changed.blocks.as_ref());
            }
            _ => unreachable!("no other work walks through the log"),
        }
    }

    /// Does the replica lack what this block holds?
    pub(super) fn lacks(&self, index: usize, wish: &CopyWish, block: u32) -> bool {
        if wish.base == Stamp::default() {
            return true;
        }
        match self.replication.replicas[index].source.as_deref().filter(|source| source.fill == wish.fill) {
            Some(source) => source.search == Search::Failed || source.lacking.contains(block),
            // The fill has ended: whatever is sent is of no account.
            None => false,
        }
    }

    /// The first blocks from `wish.block` on that are lacking, or nothing.
    pub(super) fn next_lacking(&self, index: usize, wish: CopyWish) -> Option<CopyPiece> {
        let replica = &self.replication.replicas[index];
        let end =
            u32::try_from(replica.head.record().size_blocks).expect("volumes have less than 2^32 blocks");
        let source = replica.source.as_deref().filter(|source| source.fill == wish.fill);
        let source = source.filter(|source| wish.base != Stamp::default() && source.search == Search::Done);
        let Some(source) = source else {
            let count = (end - wish.block).min(PIECE_BLOCKS_MAX - wish.block % PIECE_BLOCKS_MAX);
            return Some(CopyPiece { wish, first: wish.block, count, holes: true }).filter(|_| count > 0);
        };
        let next = source.lacking.next_from(wish.block).filter(|block| *block < end);
        let served = &self.served[replica.served];
        let lane = &self.lanes[served.lane].lane;
        let changed = |leaf: &u32| match &source.lacking_if_holes {
            Some(holes) => {
                holes.next_from(leaf * LEAF_BLOCKS).is_some_and(|block| block / LEAF_BLOCKS == *leaf)
            }
            None => lane.may_have_changed(served.volume, *leaf, wish.base.sequence),
        };
        let leaves = wish.block / LEAF_BLOCKS..=next.unwrap_or(end - 1) / LEAF_BLOCKS;
        if let Some(leaf) = leaves.into_iter().find(changed) {
            let first = wish.block.max(leaf * LEAF_BLOCKS);
            let leaf_end = end.min((leaf + 1).saturating_mul(LEAF_BLOCKS));
            let count = (leaf_end - first).min(PIECE_BLOCKS_MAX);
            return Some(CopyPiece { wish, first, count, holes: true });
        }
        let first = next?;
        let most = (LEAF_BLOCKS - first % LEAF_BLOCKS).min(PIECE_BLOCKS_MAX).min(end - first);
        let mut count = 1;
        for further in 1..most {
            if source.lacking.contains(first + further) {
                count = further + 1;
            } else if further - count >= GAP_BLOCKS {
                break;
            }
        }
        Some(CopyPiece { wish, first, count, holes: false })
    }

    /// A head asks what the replica here has beyond what is in common.
    pub(super) fn compare_here(&mut self, index: usize, asker: Leader, epoch: u32, fill: u64, base: Stamp) {
        let comparing = Comparing { asker, epoch, fill, base };
        // Without memory the question is dropped; the head gives up and begins anew.
        self.walk_log(index, base, Extent::Kept, |memory| Work::Compare {
            replica: index,
            comparing,
            memory,
        });
    }

    fn answer_comparison(&mut self, index: usize, comparing: Comparing, blocks: Option<BlockSet>) {
        let Comparing { asker, epoch, fill, base } = comparing;
        let is_kept = self.replication.bugs.has(PlantedBug::SurplusKept);
        let blocks = if is_kept { Some(BlockSet::default()) } else { blocks };
        let Some(member) = &mut self.replication.replicas[index].member else { return };
        if blocks.is_some() {
            member.compared(fill, base);
        }
        for (block, count) in blocks.iter().flat_map(runs_in_leaves) {
            self.send_answer(index, asker, PeerMessage::Surplus { epoch, fill, block, count });
        }
        let known = blocks.is_some();
        self.send_answer(index, asker, PeerMessage::Compared { epoch, fill, known });
    }

    /// A head without a replica of its own asks what was changed here after what it has in common with another one.
    pub(super) fn list_changed_here(
        &mut self,
        index: usize,
        asker: Leader,
        epoch: u32,
        fill: u64,
        base: Stamp,
    ) {
        let comparing = Comparing { asker, epoch, fill, base };
        let work = |memory| Work::ListChanged { replica: index, comparing, memory };
        // Without memory the question is dropped, and asked again.
        self.walk_log(index, base, Extent::All, work);
    }

    fn tell_changed(&mut self, index: usize, comparing: Comparing, blocks: Option<&BlockSet>) {
        let Comparing { asker, epoch, fill, base } = comparing;
        for (block, count) in blocks.into_iter().flat_map(runs_in_leaves) {
            let changed = PeerMessage::Changed { epoch, fill, if_holes: false, block, count };
            self.send_answer(index, asker, changed);
        }
        let known = blocks.is_some();
        let served = &self.served[self.replication.replicas[index].served];
        let (lane, volume) = (&self.lanes[served.lane].lane, served.volume);
        let size_blocks = lane.volumes()[volume as usize].size_blocks();
        let leaves = u32::try_from(size_blocks.div_ceil(u64::from(LEAF_BLOCKS))).expect("leaves fit 32 bits");
        let changed = |leaf: &u32| lane.may_have_changed(volume, *leaf, base.sequence);
        let is_told = known && !self.replication.bugs.has(PlantedBug::ReleasesNotListed);
        let changed: Vec<u32> = (0..leaves).filter(changed).collect();
        for leaf in changed.into_iter().filter(|_| is_told) {
            let (block, count) = (leaf * LEAF_BLOCKS, LEAF_BLOCKS);
            let changed = PeerMessage::Changed { epoch, fill, if_holes: true, block, count };
            self.send_answer(index, asker, changed);
        }
        self.send_answer(index, asker, PeerMessage::Listed { epoch, fill, known });
    }
}

impl super::Replication {
    /// When a member that looks through its log has had time enough for it.
    pub(super) fn poll_search_timeout(&self) -> Option<Moment> {
        // Of a fill that has ended nobody wants to know any more.
        let wanted = self.replicas.iter().filter(|replica| replica.waiting_copy.is_some());
        let searches = wanted.filter_map(|replica| Some(replica.source.as_ref()?.search));
        let asked = searches.filter_map(|search| match search {
            Search::Asked(_, since) => Some(since.after_ns(SEARCH_PATIENCE_NS)),
            _ => None,
        });
        asked.min()
    }
}

/// Runs of these blocks, first and count, each within a leaf.
fn runs_in_leaves(blocks: &BlockSet) -> Vec<(u32, u32)> {
    let mut runs = Vec::new();
    let mut next = blocks.next_from(0);
    while let Some(block) = next {
        let most = LEAF_BLOCKS - block % LEAF_BLOCKS;
        let count = (1..most).find(|further| !blocks.contains(block + further)).unwrap_or(most);
        runs.push((block, count));
        next = blocks.next_from(block + count);
    }
    runs
}
