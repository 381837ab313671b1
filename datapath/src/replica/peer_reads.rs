//! Reads that the head's own replica cannot answer, because what it holds is damaged, or because there is none in sync:
//! another replica is asked.
//!
//! ```text
//!   damaged ──▶ waiting ──▶ asked of a member ──▶ its blocks: for whoever reads, and for the own log
//!                  ▲               │ cannot give them, is silent, or is gone
//!                  └───────────────┘ until nobody is left: an error
//! ```
//!
//! Where there is no own replica, the volume is served as long as members are: such a read waits for those that are silent or
//! gone, and is an error only when each has said that it cannot give the blocks.
//!
//! A member in sync has everything that was committed when it is asked, so what it answers is no older than the read. It is
//! asked while no change of these blocks is under way. If one comes before the answer, the answer may be of before or after
//! it: whoever reads waits until that change is committed, like any read, and the blocks are not put into the own log, where
//! they would come behind the change. If none comes, they are what the volume holds there in every continuation of the
//! order, so they may enter the own log anywhere before the next change of these blocks.

use crate::limits::PIECE_BLOCKS_MAX;
use crate::record::NodeId;
use crate::units::Moment;

/// A member that does not answer for so long is not waited for. So long, too, a read waits for a member that can be asked,
/// and for changes under way.
const PATIENCE_NS: u64 = 3_000_000_000;
/// Reads of a volume that are asked for at a time: each may bring a piece of data.
const ASKED_MAX: usize = 4;
/// Where every read goes to a member: so many blocks are asked for at a time, or one read.
const BLOCKS_ASKED_MAX: u32 = 4 * PIECE_BLOCKS_MAX;

#[derive(Debug)]
struct PeerRead {
    read: u64,
    block: u32,
    count: u32,
    /// There is no own replica.
    elsewhere: bool,
    /// Whom it was asked of in vain.
    tried: Vec<NodeId>,
    /// Those of them that have said that they cannot give the blocks.
    refused: Vec<NodeId>,
    asked: Option<NodeId>,
    /// Since when it waits, or is asked for.
    since: Moment,
    /// A change of its blocks was under way or has come since it was asked for.
    disturbed: bool,
}

impl PeerRead {
    fn overlaps(&self, block: u32, count: u32) -> bool {
        self.block < block + count && block < self.block + self.count
    }

    fn wait(&mut self, now: Moment) {
        self.tried.extend(self.asked.take());
        self.since = now;
    }

    /// Nobody is left who could be asked. True if that is for good.
    fn is_without_source(&mut self, now: Moment, others: &[NodeId]) -> bool {
        let refused = &self.refused;
        if !self.elsewhere || !others.is_empty() && others.iter().all(|node| refused.contains(node)) {
            return true;
        }
        self.tried.clone_from(&self.refused);
        self.since = now;
        false
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Ask a member for these blocks.
    Ask {
        /// Whom.
        member: NodeId,
        /// Which read.
        read: u64,
        /// First block.
        block: u32,
        /// How many.
        count: u32,
    },
    /// Nobody can give them.
    GiveUp {
        /// Which read.
        read: u64,
    },
}

/// What came for a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// May the blocks be put into the own log?
    pub may_repair: bool,
}

/// Those of one volume, while this node leads it.
#[derive(Debug, Default)]
pub struct PeerReads {
    reads: Vec<PeerRead>,
    begun: u64,
}

impl PeerReads {
    /// The own replica cannot give these blocks. Returns the read's number, which is given once.
    pub fn begin(&mut self, now: Moment, block: u32, count: u32) -> u64 {
        self.begin_read(now, (block, count), false)
    }

    /// There is no own replica that could give these blocks.
    pub fn begin_elsewhere(&mut self, now: Moment, block: u32, count: u32) -> u64 {
        self.begin_read(now, (block, count), true)
    }

    fn begin_read(&mut self, now: Moment, (block, count): (u32, u32), elsewhere: bool) -> u64 {
        self.begun += 1;
        self.reads.push(PeerRead {
            read: self.begun,
            block,
            count,
            elsewhere,
            tried: Vec::new(),
            refused: Vec::new(),
            asked: None,
            since: now,
            disturbed: false,
        });
        self.begun
    }

    /// The head has numbered a change.
    pub fn note_change(&mut self, block: u32, count: u32) {
        let overlapping = self.reads.iter_mut().filter(|read| read.overlaps(block, count));
        overlapping.for_each(|read| read.disturbed = true);
    }

    /// Is no read waiting or asked for?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.reads.is_empty()
    }

    /// The next thing to do. `others` are the other replicas in sync; `can_ask` says which of them follow; `is_pending`
    /// whether a change that is not committed overlaps a range.
    pub fn turn(
        &mut self,
        now: Moment,
        others: &[NodeId],
        can_ask: impl Fn(NodeId) -> bool,
        is_pending: impl Fn(u32, u32) -> bool,
    ) -> Option<Turn> {
        for read in &mut self.reads {
            let silent = read.since.after_ns(PATIENCE_NS) <= now;
            if read.asked.is_some_and(|member| silent || !others.contains(&member) || !can_ask(member)) {
                read.wait(now);
            }
        }
        let asked = || self.reads.iter().filter(|read| read.asked.is_some());
        let (reads_asked, blocks_asked) = (asked().count(), asked().map(|read| read.count).sum::<u32>());
        for index in 0..self.reads.len() {
            let read = &mut self.reads[index];
            if read.asked.is_some() {
                continue;
            }
            let waited = read.since.after_ns(PATIENCE_NS) <= now;
            let untried = || others.iter().copied().filter(|node| !read.tried.contains(node));
            let ready: Vec<NodeId> = untried().filter(|node| can_ask(*node)).collect();
            if untried().next().is_none() || waited && ready.is_empty() {
                if read.is_without_source(now, others) {
                    let read = self.reads.remove(index).read;
                    return Some(Turn::GiveUp { read });
                }
                continue;
            }
            let disturbed = is_pending(read.block, read.count);
            let room = match read.elsewhere {
                true => blocks_asked == 0 || blocks_asked + read.count <= BLOCKS_ASKED_MAX,
                false => reads_asked < ASKED_MAX,
            };
            if ready.is_empty() || !waited && (disturbed || !room) {
                continue;
            }
            // Where every read goes to a member, each has its share.
            let turn = if read.elsewhere { usize::try_from(read.read).unwrap_or(0) % ready.len() } else { 0 };
            let member = ready[turn];
            let PeerRead { read: number, block, count, .. } = *read;
            (read.asked, read.since, read.disturbed) = (Some(member), now, disturbed);
            return Some(Turn::Ask { member, read: number, block, count });
        }
        None
    }

    /// A member's blocks have come. Nothing if they are of no use any more, or not those that were asked for.
    pub fn answered(&mut self, member: NodeId, read: u64, block: u32, count: u32) -> Option<Answer> {
        let is_it = |known: &PeerRead| {
            known.read == read && known.asked == Some(member) && (known.block, known.count) == (block, count)
        };
        let index = self.reads.iter().position(is_it)?;
        Some(Answer { may_repair: !self.reads.remove(index).disturbed })
    }

    /// A member cannot give the blocks either.
    pub fn refused(&mut self, now: Moment, member: NodeId, read: u64) {
        let found = self.reads.iter_mut().find(|known| known.read == read && known.asked == Some(member));
        if let Some(read) = found {
            read.refused.push(member);
            read.wait(now);
        }
    }

    /// The volume is not led here any more.
    pub fn clear(&mut self) {
        self.reads.clear();
    }

    /// When to call [`Self::turn`] though nothing has happened.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.reads.iter().map(|read| read.since.after_ns(PATIENCE_NS)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const BOTH: [NodeId; 2] = [A, B];

    fn at(milliseconds: u64) -> Moment {
        Moment::default().after_ms(milliseconds)
    }

    fn turn(reads: &mut PeerReads, now: u64) -> Option<Turn> {
        reads.turn(at(now), &BOTH, |_| true, |_, _| false)
    }

    fn ask(member: NodeId, read: u64) -> Option<Turn> {
        Some(Turn::Ask { member, read, block: 100, count: 8 })
    }

    #[test]
    fn one_after_the_other_is_asked_and_then_it_is_given_up() {
        let mut reads = PeerReads::default();
        let read = reads.begin(at(0), 100, 8);
        assert_eq!(turn(&mut reads, 0), ask(A, read));
        assert_eq!(turn(&mut reads, 0), None, "asked once");
        reads.refused(at(1), B, read);
        assert_eq!(turn(&mut reads, 1), None, "it was not asked");
        reads.refused(at(2), A, read);
        assert_eq!(turn(&mut reads, 2), ask(B, read));
        assert_eq!(reads.poll_timeout(), Some(at(3002)));
        assert_eq!(turn(&mut reads, 3001), None);
        assert_eq!(turn(&mut reads, 3002), Some(Turn::GiveUp { read }), "silent");
        assert_eq!((turn(&mut reads, 9000), reads.poll_timeout()), (None, None));
    }

    #[test]
    fn an_answer_counts_once_and_only_from_whom_was_asked() {
        let mut reads = PeerReads::default();
        let read = reads.begin(at(0), 100, 8);
        assert_eq!(reads.answered(A, read, 100, 8), None, "nobody was asked");
        assert_eq!(turn(&mut reads, 0), ask(A, read));
        assert_eq!(reads.answered(B, read, 100, 8), None);
        assert_eq!(reads.answered(A, read + 1, 100, 8), None);
        assert_eq!(reads.answered(A, read, 100, 7), None);
        assert_eq!(reads.answered(A, read, 100, 8), Some(Answer { may_repair: true }));
        assert_eq!(reads.answered(A, read, 100, 8), None);
    }

    #[test]
    fn a_change_of_these_blocks_forbids_to_repair_them() {
        let mut reads = PeerReads::default();
        for (block, count, may_repair) in [(92, 8, true), (108, 1, true), (107, 1, false), (99, 2, false)] {
            let read = reads.begin(at(0), 100, 8);
            assert_eq!(turn(&mut reads, 0), ask(A, read));
            reads.note_change(block, count);
            assert_eq!(reads.answered(A, read, 100, 8), Some(Answer { may_repair }), "{block}, {count}");
        }
    }

    #[test]
    fn nobody_is_asked_while_a_change_is_under_way_unless_that_lasts() {
        let mut reads = PeerReads::default();
        let read = reads.begin(at(0), 100, 8);
        let is_pending = |block, count| (block, count) == (100, 8);
        assert_eq!(reads.turn(at(0), &BOTH, |_| true, is_pending), None);
        // It was numbered before the question, and is committed now.
        reads.note_change(100, 8);
        assert_eq!(turn(&mut reads, 1), ask(A, read));
        assert_eq!(reads.answered(A, read, 100, 8), Some(Answer { may_repair: true }));
        let read = reads.begin(at(0), 100, 8);
        assert_eq!(reads.turn(at(2999), &BOTH, |_| true, is_pending), None);
        assert_eq!(reads.turn(at(3000), &BOTH, |_| true, is_pending), ask(A, read));
        assert_eq!(reads.answered(A, read, 100, 8), Some(Answer { may_repair: false }));
    }

    #[test]
    fn a_member_that_is_gone_is_not_waited_for_and_one_that_comes_is() {
        let mut reads = PeerReads::default();
        let read = reads.begin(at(0), 100, 8);
        assert_eq!(reads.turn(at(0), &BOTH, |_| false, |_, _| false), None);
        assert_eq!(turn(&mut reads, 1000), ask(A, read));
        assert_eq!(reads.turn(at(1001), &BOTH, |node| node != A, |_, _| false), ask(B, read));
        // B is not in sync any more.
        assert_eq!(reads.turn(at(1002), &[A], |_| true, |_, _| false), Some(Turn::GiveUp { read }));
        let read = reads.begin(at(2000), 100, 8);
        assert_eq!(reads.turn(at(4999), &BOTH, |_| false, |_, _| false), None);
        assert_eq!(reads.turn(at(5000), &BOTH, |_| false, |_, _| false), Some(Turn::GiveUp { read }));
        let read = reads.begin(at(0), 100, 8);
        assert_eq!(reads.turn(at(0), &[], |_| true, |_, _| false), Some(Turn::GiveUp { read }), "alone");
    }

    #[test]
    fn where_there_is_no_own_replica_a_read_waits_for_those_that_are_silent() {
        let mut reads = PeerReads::default();
        let read = reads.begin_elsewhere(at(0), 100, 8);
        assert_eq!(turn(&mut reads, 0), ask(B, read), "each has its share");
        assert_eq!(turn(&mut reads, 3000), ask(A, read));
        assert_eq!((turn(&mut reads, 6000), reads.poll_timeout()), (None, Some(at(9000))), "both are silent");
        assert_eq!(turn(&mut reads, 6000), ask(B, read), "and asked again");
        reads.refused(at(6001), B, read);
        assert_eq!(turn(&mut reads, 6001), ask(A, read));
        // Nobody is there now, and only one has said that it cannot give them.
        for later in [9001, 12_001, 15_001] {
            assert_eq!(reads.turn(at(later), &BOTH, |_| false, |_, _| false), None);
            assert_eq!(reads.turn(at(later), &[], |_| false, |_, _| false), None);
        }
        assert_eq!(turn(&mut reads, 15_002), ask(A, read));
        reads.refused(at(15_003), A, read);
        assert_eq!(turn(&mut reads, 15_003), Some(Turn::GiveUp { read }), "nobody has it");
    }

    #[test]
    fn where_every_read_goes_to_a_member_blocks_are_counted() {
        let mut reads = PeerReads::default();
        let small: Vec<u64> = (0..100).map(|block| reads.begin_elsewhere(at(0), block, 1)).collect();
        let asked = |reads: &mut PeerReads| std::iter::from_fn(|| turn(reads, 0)).count();
        assert_eq!(asked(&mut reads), small.len());
        let large: Vec<u64> = (0..5)
            .map(|piece| reads.begin_elsewhere(at(0), piece * PIECE_BLOCKS_MAX, PIECE_BLOCKS_MAX))
            .collect();
        assert_eq!(asked(&mut reads), 3, "of four pieces' worth a part is taken");
        reads.clear();
        let huge = reads.begin_elsewhere(at(0), 0, BLOCKS_ASKED_MAX + 1);
        assert_eq!(asked(&mut reads), 1, "one is always asked for: {huge} after {large:?}");
    }

    #[test]
    fn few_are_asked_for_at_a_time() {
        let mut reads = PeerReads::default();
        let all: Vec<u64> = (0..6).map(|_| reads.begin(at(0), 100, 8)).collect();
        for read in &all[..4] {
            assert_eq!(turn(&mut reads, 0), ask(A, *read));
        }
        assert_eq!(turn(&mut reads, 0), None);
        reads.answered(A, all[1], 100, 8).expect("asked");
        assert_eq!(turn(&mut reads, 0), ask(A, all[4]));
        reads.clear();
        assert_eq!(turn(&mut reads, 0), None);
    }
}
