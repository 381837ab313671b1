//! What the home of a pool keeps for all shards that have lanes in it: the free segments, the room, the syncs.
//!
//! **Room** is how many segments the lanes of a shard may fill. Whether a write still fits is decided by its lane alone,
//! without a message, so the shards' rooms must never add up to more than the pool: room passes from one to the other
//! like money. A shard other than the home holds what its lanes need and a little more; the rest is the home's.
//!
//! A shard that lacks room or segments, or the home itself, has all others **asked**: they return what they do not need,
//! and say whether a segment may yet come of them. Only when all have answered is there a verdict that there is nothing to
//! be had. Before that a change waits, it is not refused.

use super::device_sync::DeviceSync;
use super::pool_space::PoolSpace;
use super::shard_message::{PoolNews, PoolReport, ShardIndex};

/// Room that a shard is given beyond what it needs, at most: enough to write while it asks for more.
const LOT_MAX: u32 = 32;

/// See the module's text.
#[derive(Debug)]
pub(super) struct PoolHome {
    pub(super) space: PoolSpace,
    pub(super) sync: DeviceSync,
    this: ShardIndex,
    /// This one is among them.
    members: Vec<Member>,
    /// Counts the questions to all.
    number: u32,
}

#[derive(Debug)]
struct Member {
    shard: ShardIndex,
    report: PoolReport,
    /// Given to it; nothing for the home, which has the rest.
    room: u32,
    told: PoolNews,
    /// What others must have heard before there is a verdict for it.
    asked: u32,
    finished: bool,
}

impl PoolHome {
    /// The books when a process starts: `rooms` says what each shard other than `this` begins with.
    pub(super) fn new(
        space: PoolSpace,
        this: ShardIndex,
        rooms: impl Iterator<Item = (ShardIndex, u32)>,
    ) -> PoolHome {
        let member = |(shard, room)| Member {
            shard,
            report: PoolReport::default(),
            room: if shard == this { 0 } else { room },
            told: PoolNews::default(),
            asked: 0,
            finished: false,
        };
        PoolHome { space, sync: DeviceSync::default(), this, members: rooms.map(member).collect(), number: 0 }
    }

    fn member(&mut self, shard: ShardIndex) -> &mut Member {
        self.members.iter_mut().find(|member| member.shard == shard).expect("a shard with lanes in the pool")
    }

    /// A shard tells how its lanes stand.
    pub(super) fn note_report(&mut self, from: ShardIndex, report: PoolReport) {
        let next = self.number + 1;
        let member = self.member(from);
        let before = std::mem::replace(&mut member.report, report);
        if report.short && !before.short || report.hungry && !before.hungry {
            member.asked = next;
            self.number = next;
        }
    }

    /// A shard returns room.
    pub(super) fn take_room(&mut self, from: ShardIndex, segments: u32) {
        let member = self.member(from);
        member.room = member.room.checked_sub(segments).expect("a shard returns room that it has");
    }

    /// A shard has drained: it needs nothing, and nothing comes of it.
    pub(super) fn finish(&mut self, shard: ShardIndex) {
        // Not all shards have lanes here.
        if let Some(member) = self.members.iter_mut().find(|member| member.shard == shard) {
            member.finished = true;
            member.report = PoolReport { needed: member.report.needed, ..PoolReport::default() };
        }
    }

    /// Have all shards but this one drained?
    pub(super) fn others_have_finished(&self) -> bool {
        self.members.iter().all(|member| member.finished || member.shard == self.this)
    }

    /// Room that the home's own lanes have.
    pub(super) fn own_room(&self) -> u32 {
        let given: u32 = self.members.iter().map(|member| member.room).sum();
        self.space.segment_count().saturating_sub(given)
    }

    /// Gives room to those that need it: to whom, and how much.
    pub(super) fn give_room(&mut self, mut given: impl FnMut(ShardIndex, u32)) {
        let lot = self.lot();
        let mut left = self.room_left();
        let this = self.this;
        for member in self.members.iter_mut().filter(|member| member.shard != this && !member.finished) {
            let needed = member.report.needed;
            if needed + lot / 2 <= member.room {
                continue;
            }
            let more = (needed + lot).saturating_sub(member.room).min(left);
            if more > 0 {
                member.room += more;
                left -= more;
                given(member.shard, more);
            }
        }
    }

    /// Room that nobody needs.
    fn room_left(&self) -> u32 {
        let own = self.members.iter().find(|member| member.shard == self.this);
        self.own_room().saturating_sub(own.map_or(0, |own| own.report.needed))
    }

    fn lot(&self) -> u32 {
        if self.members.iter().any(|member| member.report.short) {
            return 0;
        }
        let members = u32::try_from(self.members.len()).expect("few shards");
        (self.room_left() / (2 * members)).min(LOT_MAX)
    }

    /// What is new for whom, since the last time.
    pub(super) fn tell_news(&mut self, mut tell: impl FnMut(ShardIndex, PoolNews)) {
        for index in 0..self.members.len() {
            let news = self.news_for(index);
            let member = &mut self.members[index];
            if !member.finished && std::mem::replace(&mut member.told, news) != news {
                tell(member.shard, news);
            }
        }
    }

    fn news_for(&self, index: usize) -> PoolNews {
        let member = &self.members[index];
        let others = || self.members.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, o)| o);
        let all_have_heard =
            others().all(|other| other.finished || other.report.heard.wrapping_sub(member.asked) < 1 << 31);
        let free = self.space.free_count();
        PoolNews {
            number: self.number,
            heard: member.report.number,
            free,
            lot: self.lot(),
            others_hungry: others().any(|other| other.report.hungry),
            room_is_out: member.report.short && all_have_heard && self.room_left() == 0,
            nothing_comes: member.report.hungry
                && all_have_heard
                && free == 0
                && !others().any(|other| other.report.may_give),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::layout::Layout;
    use crate::store::segment::SegmentTable;

    const HOME: ShardIndex = ShardIndex(0);
    const OTHER: ShardIndex = ShardIndex(1);

    /// A pool of 252 segments.
    fn home(other_room: u32) -> PoolHome {
        let layout = Layout::with_segment_blocks([0; 16], 256 << 20, 2, 256).unwrap();
        let table = SegmentTable::new(layout, 256);
        let space = PoolSpace::new(layout, 256, [&table].into_iter(), true);
        PoolHome::new(space, HOME, [(HOME, 0), (OTHER, other_room)].into_iter())
    }

    fn report(number: u32, heard: u32, needed: u32) -> PoolReport {
        PoolReport { number, heard, needed, ..PoolReport::default() }
    }

    fn news_of(home: &mut PoolHome, shard: ShardIndex) -> Option<PoolNews> {
        let mut found = None;
        home.tell_news(|to, news| {
            if to == shard {
                found = Some(news);
            }
        });
        found
    }

    fn given(home: &mut PoolHome) -> u32 {
        let mut sum = 0;
        home.give_room(|to, more| {
            assert_eq!(to, OTHER);
            sum += more;
        });
        sum
    }

    #[test]
    fn rooms_never_add_up_to_more_than_the_pool() {
        let mut home = home(20);
        assert_eq!(home.own_room(), 232);
        home.note_report(HOME, report(1, 0, 150));
        home.note_report(OTHER, report(1, 0, 30));
        // 82 are left: a quarter of them on top of what is needed.
        assert_eq!((given(&mut home), home.own_room()), (30, 202));
        home.note_report(OTHER, report(2, 0, 300));
        assert_eq!((given(&mut home), home.own_room()), (52, 150));
        assert_eq!(given(&mut home), 0);
        home.take_room(OTHER, 60);
        assert_eq!(home.own_room(), 210);
    }

    #[test]
    fn there_is_a_verdict_only_when_all_others_have_answered() {
        let mut home = home(100);
        home.note_report(HOME, report(1, 0, 152));
        home.note_report(OTHER, PoolReport { short: true, ..report(1, 0, 102) });
        assert_eq!(given(&mut home), 0);
        let news = news_of(&mut home, OTHER).expect("a question makes news");
        assert_eq!((news.number, news.heard, news.lot, news.room_is_out), (1, 1, 0, false));
        home.note_report(HOME, report(2, 1, 152));
        assert!(news_of(&mut home, OTHER).expect("a verdict").room_is_out);
        // Room has come free: no verdict any more.
        home.note_report(HOME, report(3, 1, 140));
        assert_eq!(given(&mut home), 2);
        home.note_report(OTHER, report(2, 1, 102));
        assert!(!news_of(&mut home, OTHER).expect("something new").room_is_out);
    }

    #[test]
    fn the_hungry_wait_while_somebody_may_give() {
        let mut home = home(100);
        while home.space.lend().is_some() {}
        home.note_report(OTHER, PoolReport { hungry: true, ..report(1, 0, 10) });
        assert!(news_of(&mut home, HOME).expect("a question").others_hungry);
        home.note_report(HOME, PoolReport { may_give: true, ..report(1, 1, 10) });
        assert!(!news_of(&mut home, OTHER).is_some_and(|news| news.nothing_comes));
        home.note_report(HOME, report(2, 1, 10));
        assert!(news_of(&mut home, OTHER).expect("a verdict").nothing_comes);
        home.finish(OTHER);
        assert!(home.others_have_finished());
        assert!(!news_of(&mut home, HOME).expect("one hungry shard less").others_hungry);
    }
}
