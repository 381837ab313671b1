//! The shard's part of its pools: segments, room and syncs, from books of its own where it is a pool's home, else by asking
//! that (see `engine/pool_home.rs`).

use super::{Shard, lane_of_token, pool_index, sync_token};
use crate::engine::device_sync::Applicant;
use crate::engine::pool_home::PoolHome;
use crate::engine::pool_space::PoolSpace;
use crate::engine::ports::{DeviceIndex, Effect};
use crate::engine::shard_message::{LOT_SEGMENTS, Lot, PoolNews, PoolReport, ShardIndex, ShardMessage};
use crate::memory::Memory;
use crate::store::lane::{Lane, PoolShare};
use crate::store::layout::SegmentIndex;

/// Segments that a shard asks for when it is short, beyond what it has room for: a piece takes no more.
const SHORT_SEGMENTS: u32 = 2;

/// A pool as this shard sees it.
#[derive(Debug)]
pub(super) struct PoolPart {
    device: DeviceIndex,
    /// Its books, if this is its home, else who is.
    pub(super) home: Result<Box<PoolHome>, ShardIndex>,
    /// Segments of the pool, without its anchors.
    segments: u32,
    /// Segments that the lanes of this shard may fill.
    room: u32,
    /// The last report, and since which one the shard has been short, and hungry.
    report: PoolReport,
    short_since: u32,
    hungry_since: u32,
    news: PoolNews,
    /// There are other shards with lanes here.
    is_shared: bool,
    failed: bool,
}

impl PoolPart {
    pub(super) fn new(
        device: DeviceIndex,
        home: ShardIndex,
        space: Result<PoolSpace, u32>,
        rooms: &[(ShardIndex, u32)],
        this: ShardIndex,
    ) -> PoolPart {
        let own_room = rooms.iter().find(|(shard, _)| *shard == this).map_or(0, |(_, room)| *room);
        let mut part = PoolPart {
            device,
            home: Err(home),
            segments: 0,
            room: own_room,
            report: PoolReport::default(),
            short_since: 0,
            hungry_since: 0,
            news: PoolNews::default(),
            is_shared: rooms.iter().any(|(shard, _)| *shard != this),
            failed: false,
        };
        match space {
            Ok(space) => {
                part.segments = space.segment_count();
                let home = PoolHome::new(space, this, rooms.iter().copied());
                part.room = home.own_room();
                part.home = Ok(Box::new(home));
            }
            Err(segments) => part.segments = segments,
        }
        part
    }

    fn free(&self) -> u32 {
        self.home.as_ref().map_or(self.news.free, |home| home.space.free_count())
    }

    /// May there be room for a change that waits for some, in other shards? Until all have been asked, yes.
    fn room_may_come(&self) -> bool {
        let is_out = self.report.short && self.news.room_is_out && self.has_heard_since(self.short_since);
        self.is_shared && self.room < self.segments && !is_out
    }

    /// May another shard give segments back, for a change that waits for one? Until all have been asked, yes.
    fn segments_may_come(&self) -> bool {
        let none = self.report.hungry && self.news.nothing_comes && self.has_heard_since(self.hungry_since);
        self.is_shared && !none
    }

    /// Were the news made after that report had come?
    fn has_heard_since(&self, report: u32) -> bool {
        self.news.heard.wrapping_sub(report) < 1 << 31
    }
}

impl<M: Memory> Shard<M> {
    pub(super) fn lend_segments(&mut self, index: usize) {
        let pool = self.lanes[index].pool;
        let mut share = self.share_of(index);
        if share.others_are_hungry {
            self.give_segments_back(index);
        } else {
            self.borrow_segments(index);
        }
        share.free = self.pools[pool].free();
        self.lanes[index].lane.set_pool_share(share);
    }

    fn share_of(&self, index: usize) -> PoolShare {
        let pool = self.lanes[index].pool;
        let part = &self.pools[pool];
        let others =
            || self.lanes.iter().enumerate().filter(|(other, lane)| *other != index && lane.pool == pool);
        let needed: u32 = others().map(|(_, other)| other.lane.segments_needed()).sum();
        // Whether it is hungry would say less: that goes by what the pool had free when the lane was last told.
        let waits = self.lanes[index].lane.has_blocked_changes();
        PoolShare {
            segments: part.segments,
            free: part.free(),
            needed_elsewhere: needed + (part.segments - part.room.min(part.segments)),
            others_are_hungry: part.news.others_hungry || others().any(|(_, other)| other.lane.is_hungry()),
            others_may_give: waits
                && (part.segments_may_come() || others().any(|(_, other)| other.lane.may_give())),
            room_may_come: part.room_may_come(),
        }
    }

    fn give_segments_back(&mut self, index: usize) {
        let pool = self.lanes[index].pool;
        let mut lot = Lot::default();
        while let Some(segment) = self.lanes[index].lane.spare_segment() {
            match &mut self.pools[pool].home {
                Ok(home) => home.space.take_back(segment),
                Err(home) => {
                    let home = *home;
                    assert!(lot.add(segment, false), "a full lot was sent");
                    if lot.is_full() {
                        let lot = std::mem::take(&mut lot);
                        self.tell(home, ShardMessage::GiveBack { pool: pool_index(pool), lot });
                    }
                }
            }
        }
        if let (Err(home), false) = (&self.pools[pool].home, lot.is_empty()) {
            let home = *home;
            self.tell(home, ShardMessage::GiveBack { pool: pool_index(pool), lot });
        }
    }

    fn borrow_segments(&mut self, index: usize) {
        let (pool, wanted) = (self.lanes[index].pool, self.lanes[index].lane.segments_wanted());
        let (shard_lane, part) = (&mut self.lanes[index], &mut self.pools[pool]);
        match &mut part.home {
            Ok(home) => {
                for _ in 0..wanted {
                    let Some((segment, pristine)) = home.space.lend() else { break };
                    shard_lane.lane.lend(segment, pristine);
                }
            }
            Err(_) if wanted == 0 || part.news.free == 0 || shard_lane.asked_for_segments => {}
            Err(home) => {
                let home = *home;
                shard_lane.asked_for_segments = true;
                let lane = u8::try_from(index).expect("tokens have room for 255 lanes");
                let count = u8::try_from(wanted).unwrap_or(u8::MAX);
                self.tell(home, ShardMessage::Want { pool: pool_index(pool), lane, count });
            }
        }
    }

    /// A lane of another shard would like to borrow segments.
    pub(super) fn lend_elsewhere(&mut self, to: ShardIndex, pool: usize, lane: u8, count: u8) {
        let home = self.home_of(pool);
        let mut lot = Lot::default();
        for _ in 0..usize::from(count).min(LOT_SEGMENTS) {
            let Some((segment, pristine)) = home.space.lend() else { break };
            assert!(lot.add(segment, pristine), "no more than a lot");
        }
        self.tell(to, ShardMessage::Lent { lane, lot });
    }

    pub(super) fn take_segments(&mut self, lane: u8, lot: &Lot) {
        let shard_lane = &mut self.lanes[usize::from(lane)];
        shard_lane.asked_for_segments = false;
        lot.segments().for_each(|(segment, pristine)| shard_lane.lane.lend(segment, pristine));
    }

    pub(super) fn take_segments_back(&mut self, pool: usize, lot: &Lot) {
        let home = self.home_of(pool);
        lot.segments().for_each(|(segment, _): (SegmentIndex, bool)| home.space.take_back(segment));
    }

    pub(super) fn take_room(&mut self, from: ShardIndex, pool: usize, segments: u32) {
        let part = &mut self.pools[pool];
        match &mut part.home {
            Ok(home) => home.take_room(from, segments),
            Err(_) => part.room += segments,
        }
    }

    pub(super) fn take_news(&mut self, pool: usize, news: PoolNews) {
        self.pools[pool].news = news;
    }

    /// The books of a pool that has its home here.
    pub(super) fn home_of(&mut self, pool: usize) -> &mut PoolHome {
        self.pools[pool].home.as_mut().expect("only a pool's home is asked for what is its")
    }

    /// Tells the homes how things stand here, and, where this is a home, the others how the pool stands.
    pub(super) fn upkeep_pools(&mut self) {
        for pool in 0..self.pools.len() {
            if !self.pools[pool].is_shared {
                continue;
            }
            let changed = self.make_report(pool);
            let (report, room) = (self.pools[pool].report, self.pools[pool].room);
            let part = &mut self.pools[pool];
            match &mut part.home {
                Ok(home) => {
                    if changed {
                        home.note_report(self.neighbours.this(), report);
                    }
                    self.tell_news(pool);
                }
                Err(home) => {
                    let home = *home;
                    self.return_room(pool, home);
                    if changed {
                        self.tell(home, ShardMessage::Report { pool: pool_index(pool), report });
                    }
                }
            }
            if self.pools[pool].room != room {
                self.tell_lanes_room(pool);
            }
        }
    }

    /// Lanes take writes before their next turn: room that was given away is not to be promised once more.
    fn tell_lanes_room(&mut self, pool: usize) {
        for index in 0..self.lanes.len() {
            if self.lanes[index].pool == pool {
                let share = self.share_of(index);
                self.lanes[index].lane.set_pool_share(share);
            }
        }
    }

    /// A new report, if there is anything new to tell.
    fn make_report(&mut self, pool: usize) -> bool {
        let lanes = || self.lanes.iter().filter(|lane| lane.pool == pool).map(|lane| &lane.lane);
        let part = &self.pools[pool];
        let needed: u32 = lanes().map(Lane::segments_needed).sum();
        let short = lanes().any(Lane::is_short);
        let report = PoolReport {
            number: part.report.number,
            heard: part.news.number,
            // What is needed may not tell all, as when segments cannot be emptied.
            needed: if short { needed.max(part.room) + SHORT_SEGMENTS } else { needed },
            short,
            hungry: lanes().any(Lane::is_hungry),
            may_give: part.news.others_hungry && lanes().any(Lane::may_give),
        };
        let part = &mut self.pools[pool];
        let before = part.report;
        if report == before {
            return false;
        }
        let number = before.number.wrapping_add(1);
        if report.short && !before.short {
            part.short_since = number;
        }
        if report.hungry && !before.hungry {
            part.hungry_since = number;
        }
        part.report = PoolReport { number, ..report };
        true
    }

    /// Room beyond what is needed, and a little more, goes back.
    fn return_room(&mut self, pool: usize, home: ShardIndex) {
        let part = &mut self.pools[pool];
        let kept = part.report.needed + part.news.lot;
        let surplus = part.room.saturating_sub(kept);
        if surplus > 0 {
            part.room -= surplus;
            self.tell(home, ShardMessage::Room { pool: pool_index(pool), segments: surplus });
        }
    }

    fn tell_news(&mut self, pool: usize) {
        let this = self.neighbours.this();
        let part = &mut self.pools[pool];
        let home = part.home.as_mut().expect("the home tells");
        let mut tell = |shard, message| self.effects.push_back(Effect::Tell { shard, message });
        home.give_room(|shard, segments| {
            tell(shard, ShardMessage::Room { pool: pool_index(pool), segments });
        });
        let mut own = None;
        home.tell_news(|shard, news| {
            if shard == this {
                own = Some(news);
            } else {
                tell(shard, ShardMessage::News { pool: pool_index(pool), news });
            }
        });
        let room = home.own_room();
        if own.is_some() || room != part.room {
            part.room = room;
            part.news = own.unwrap_or(part.news);
            // The lanes are to hear of it.
            self.settled_turn = false;
        }
    }

    pub(super) fn start_syncs(&mut self) {
        for pool in 0..self.pools.len() {
            let part = &mut self.pools[pool];
            let Ok(home) = &mut part.home else { continue };
            if home.sync.begin() {
                self.effects.push_back(Effect::DeviceSync { token: sync_token(pool), device: part.device });
            }
            while let Some(applicant) = self.home_of(pool).sync.refuse_next() {
                self.answer_sync(applicant, false);
            }
        }
    }

    pub(super) fn finish_sync(&mut self, pool: usize, good: bool) {
        let mut served = std::mem::take(&mut self.synced);
        self.home_of(pool).sync.finish(good, &mut served);
        if !good {
            // The others hear of it before they are answered.
            self.fail_pool(pool, true);
        }
        for applicant in served.drain(..) {
            self.answer_sync(applicant, good);
        }
        self.synced = served;
    }

    fn answer_sync(&mut self, Applicant { shard, token }: Applicant, good: bool) {
        if shard == self.neighbours.this() {
            self.finish_lane_operation(token, good);
        } else {
            self.tell(shard, ShardMessage::SyncEnded { token, good });
        }
    }

    /// A failed sync is told to one caller only and may have dropped what another lane wrote, whose own next sync
    /// would then succeed: all lanes of the device stop writing. `found_here` says that the other shards do not know.
    pub(super) fn fail_pool(&mut self, pool: usize, found_here: bool) {
        if std::mem::replace(&mut self.pools[pool].failed, true) {
            return;
        }
        if let Ok(home) = &mut self.pools[pool].home {
            home.sync.fail();
        }
        if found_here {
            self.tell_all(ShardMessage::PoolFailed { pool: pool_index(pool) });
        }
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].pool == pool && !self.lanes[lane].lane.has_failed() {
                self.with_lane(lane, Lane::fail);
                self.take_completions(lane);
            }
        }
    }

    /// A sync that another shard was asked for has ended.
    pub(super) fn sync_ended(&mut self, token: crate::engine::ports::Token, good: bool) {
        let pool = self.lanes[lane_of_token(token)].pool;
        if !good {
            self.fail_pool(pool, false);
        }
        self.finish_lane_operation(token, good);
    }
}
