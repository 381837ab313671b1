//! The other shards of the process: which lanes and volumes are whose, and what is told to and fro.

use super::lending::PoolPart;
use super::{Shard, ShardLane};
use crate::engine::device_sync::Applicant;
use crate::engine::export_table::ExportTable;
use crate::engine::pool_space::PoolSpace;
use crate::engine::ports::{ConnectionId, DeviceIndex, Effect};
use crate::engine::shard_message::{ShardIndex, ShardMessage};
use crate::memory::Memory;
use crate::store::lane::{Lane, PoolShare};
use crate::units::BLOCK_BYTES_U64;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A pool as a process takes it over.
#[derive(Debug)]
pub struct ShardPool {
    /// The driver's number for it.
    pub device: DeviceIndex,
    /// Its lanes; or, of one shard of several, those that this one runs.
    pub lanes: Vec<Lane>,
    /// The segments that no lane owns.
    pub space: PoolSpace,
}

/// A volume as every shard of the process knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KnownExport {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) home: ShardIndex,
}

/// What one shard has of a pool.
#[derive(Debug)]
pub(super) struct PoolOfPart {
    pub(super) device: DeviceIndex,
    pub(super) lanes: Vec<Lane>,
    /// The shard that runs the pool's first lane.
    pub(super) home: ShardIndex,
    /// At the home the free segments, elsewhere how many segments the pool has.
    pub(super) space: Result<PoolSpace, u32>,
    /// The shards with lanes in the pool, and room for what those of each need now.
    pub(super) rooms: Arc<[(ShardIndex, u32)]>,
}

/// What one shard of a process begins with.
#[derive(Debug)]
pub struct ShardPart {
    pub(super) this: ShardIndex,
    pub(super) shards: u16,
    pub(super) pools: Vec<PoolOfPart>,
    pub(super) exports: Arc<[KnownExport]>,
}

impl ShardPart {
    /// All exports of the process, and where each is served.
    pub(super) fn exports(&self, read_only: bool) -> (ExportTable, Vec<ExportPlace>) {
        let (mut exports, mut places) = (ExportTable::default(), Vec::new());
        // Those of this shard are served in the order in which they are listed.
        let mut here = 0..;
        for known in &*self.exports {
            exports.add(known.name.clone(), known.size_bytes, read_only);
            places.push(if known.home == self.this {
                ExportPlace::Here(here.next().expect("exports fit 32 bits"))
            } else {
                ExportPlace::At(known.home)
            });
        }
        (exports, places)
    }

    /// The lanes to run, and what the shard has of their pools.
    pub(super) fn into_lanes(self) -> (Vec<ShardLane>, Vec<PoolPart>) {
        let (mut lanes, mut pools) = (Vec::new(), Vec::new());
        for pool in self.pools {
            let lane = |lane| ShardLane {
                lane,
                pool: pools.len(),
                device: pool.device,
                write_pages: 0,
                asked_for_segments: false,
            };
            lanes.extend(pool.lanes.into_iter().map(lane));
            pools.push(PoolPart::new(pool.device, pool.home, pool.space, &pool.rooms, self.this));
        }
        (lanes, pools)
    }
}

/// Which of `shards` shards runs a lane: lanes are counted over all pools, so that pools of one lane are spread too.
///
/// # Panics
/// Without shards.
#[must_use]
pub fn shard_of_lane(lane: usize, shards: usize) -> usize {
    lane % shards
}

/// Shares pools out: one part for each of `shards` shards, by [`shard_of_lane`].
///
/// # Panics
/// Without shards.
#[must_use]
pub fn split(pools: Vec<ShardPool>, shards: u16) -> Vec<ShardPart> {
    let mut parts: Vec<Vec<PoolOfPart>> = (0..shards).map(|_| Vec::new()).collect();
    let mut exports = Vec::new();
    let mut first_lane = 0;
    for mut pool in pools {
        let homes: Vec<ShardIndex> = (first_lane..first_lane + pool.lanes.len())
            .map(|lane| shard_of_lane(lane, shards.into()))
            .map(|shard| ShardIndex(u16::try_from(shard).expect("below the number of shards")))
            .collect();
        first_lane += pool.lanes.len();
        for (lane, home) in pool.lanes.iter().zip(&homes) {
            exports.extend(lane.volumes().iter().map(|known| KnownExport {
                name: known.record.name.clone(),
                size_bytes: known.size_blocks() * BLOCK_BYTES_U64,
                home: *home,
            }));
        }
        let rooms = rooms_needed(&mut pool, &homes);
        let home = homes.first().copied().unwrap_or(ShardIndex(0));
        let segments = pool.space.segment_count();
        for part in &mut parts {
            part.push(PoolOfPart {
                device: pool.device,
                lanes: Vec::new(),
                home,
                space: Err(segments),
                rooms: Arc::clone(&rooms),
            });
        }
        for (lane, shard) in pool.lanes.into_iter().zip(homes) {
            parts[usize::from(shard.0)].last_mut().expect("just put there").lanes.push(lane);
        }
        parts[usize::from(home.0)].last_mut().expect("just put there").space = Ok(pool.space);
    }
    let exports: Arc<[KnownExport]> = exports.into();
    let part = |(this, pools)| ShardPart { this, shards, pools, exports: Arc::clone(&exports) };
    (0..).map(ShardIndex).zip(parts).map(part).collect()
}

fn rooms_needed(pool: &mut ShardPool, homes: &[ShardIndex]) -> Arc<[(ShardIndex, u32)]> {
    let share = PoolShare { segments: pool.space.segment_count(), ..PoolShare::default() };
    let mut rooms: Vec<(ShardIndex, u32)> = Vec::new();
    for (lane, home) in pool.lanes.iter_mut().zip(homes) {
        lane.set_pool_share(share);
        match rooms.iter_mut().find(|(shard, _)| shard == home) {
            Some((_, room)) => *room += lane.segments_needed(),
            None => rooms.push((*home, lane.segments_needed())),
        }
    }
    rooms.into()
}

/// Where an export is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExportPlace {
    /// Here, at this position of what is served.
    Here(u32),
    /// By another shard.
    At(ShardIndex),
}

/// The process around a shard.
#[derive(Debug)]
pub(super) struct Neighbours {
    this: ShardIndex,
    shards: u16,
    /// Connections that were accepted here and are open elsewhere.
    pub(super) connections_elsewhere: BTreeSet<ConnectionId>,
    /// The others have been told that nothing more will be asked of them.
    told_finished: bool,
}

impl Neighbours {
    pub(super) fn new(part: &ShardPart) -> Neighbours {
        Neighbours {
            this: part.this,
            shards: part.shards,
            connections_elsewhere: BTreeSet::new(),
            told_finished: false,
        }
    }

    /// The number of this shard's lane at a position, counted over all: the other way of [`shard_of_lane`].
    pub(super) fn lane_number(&self, position: usize) -> usize {
        position * usize::from(self.shards) + usize::from(self.this.0)
    }

    /// Does this shard ask nothing more of the others?
    pub(super) fn told_finished(&self) -> bool {
        self.told_finished
    }

    /// The shard itself.
    pub(super) fn this(&self) -> ShardIndex {
        self.this
    }
}

impl<M: Memory> Shard<M> {
    pub(super) fn tell(&mut self, shard: ShardIndex, message: ShardMessage) {
        assert!(shard != self.neighbours.this, "a shard does not talk to itself");
        self.effects.push_back(Effect::Tell { shard, message });
    }

    pub(super) fn tell_all(&mut self, message: ShardMessage) {
        let this = self.neighbours.this;
        let others = (0..self.neighbours.shards).map(ShardIndex).filter(|shard| *shard != this);
        self.effects.extend(others.map(|shard| Effect::Tell { shard, message }));
    }

    /// Another shard says something.
    pub(super) fn told(&mut self, from: ShardIndex, message: ShardMessage) {
        match message {
            ShardMessage::SyncWanted { pool, token } => {
                self.home_of(pool.0.into()).sync.request(Applicant { shard: from, token });
            }
            ShardMessage::SyncEnded { token, good } => self.sync_ended(token, good),
            ShardMessage::PoolFailed { pool } => self.fail_pool(pool.0.into(), false),
            ShardMessage::Report { pool, report } => self.home_of(pool.0.into()).note_report(from, report),
            ShardMessage::News { pool, news } => self.take_news(pool.0.into(), news),
            ShardMessage::Room { pool, segments } => self.take_room(from, pool.0.into(), segments),
            ShardMessage::Want { pool, lane, count } => {
                self.lend_elsewhere(from, pool.0.into(), lane, count);
            }
            ShardMessage::Lent { lane, lot } => self.take_segments(lane, &lot),
            ShardMessage::GiveBack { pool, lot } => self.take_segments_back(pool.0.into(), &lot),
            ShardMessage::CloseAbandoned => self.close_all_abandoned(),
            ShardMessage::Finished => {
                let homes = self.pools.iter_mut().filter_map(|pool| pool.home.as_mut().ok());
                homes.for_each(|home| home.finish(from));
            }
        }
    }

    /// Is everything finished here and safe on the devices?
    pub(super) fn is_finished(&self) -> bool {
        self.last_checkpoint
            && self
                .lanes
                .iter()
                .all(|shard_lane| shard_lane.lane.is_settled() || shard_lane.lane.has_failed())
    }

    /// Once this shard has drained it needs nothing of the others; as long as they need something of it, it goes on.
    pub(super) fn finish_last(&mut self) {
        if self.is_finished() && !std::mem::replace(&mut self.neighbours.told_finished, true) {
            self.tell_all(ShardMessage::Finished);
        }
    }

    pub(super) fn others_need_nothing(&self) -> bool {
        self.neighbours.told_finished
            && self
                .pools
                .iter()
                .filter_map(|pool| pool.home.as_ref().ok())
                .all(|home| home.others_have_finished())
    }
}
