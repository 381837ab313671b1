//! A node: a shard with a disk and a clock of its own, which dies and is started again.

use std::collections::BTreeSet;

use datapath::engine::pool_space::PoolSpace;
use datapath::engine::ports::DeviceIndex;
use datapath::engine::shard::{NodeConfig, Shard, ShardPool};
use datapath::memory::Pages;
use datapath::record::{NodeId, VolumeNumber};
use datapath::replica::bugs::Bugs;
use datapath::store::bugs::Bugs as StoreBugs;
use datapath::store::format::format_writes;
use datapath::store::lane::{AckPolicy, Lane, LaneConfig};
use datapath::store::layout::Layout;
use datapath::store::map::Mapping;
use datapath::store::recovery::{PoolReader, Recovered, read_layout, recover_lane};
use datapath::units::{BLOCK_BYTES, MemoryRange, Moment};

use super::faults::Swarm;
use super::{ClusterOptions, id};
use crate::sim::berth::fragile_ranges;
use crate::sim::disk::Disk;
use crate::sim::driver::Driver;
use crate::sim::memory::SimMemory;
use crate::sim::random::Random;
use crate::sim::subject::{DiskReader, MemoryPlan, StableReader};

const SEGMENT_BLOCKS: u32 = 256;
const MIB: u64 = 1 << 20;
const RECEIVE_BYTES: u32 = 64 << 10;
const RECEIVE_BUFFERS: u16 = 16;
const MILLION: u64 = 1_000_000;
/// Two passes of a scrub are made in this time.
pub(super) const SCRUB_NS: u64 = 4_000_000_000;

/// What a node is like, for good.
#[derive(Clone, Debug)]
pub(super) struct NodePlan {
    pub(super) id: NodeId,
    pub(super) lanes: u32,
    pub(super) disk_bytes: u64,
    pub(super) request_bytes: u32,
    pub(super) map_cache_bytes: u64,
    pub(super) checkpoint_log_bytes: u64,
    pub(super) bugs: Bugs,
}

/// A clock that runs at its own pace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// The world's time when it showed `shown`.
    world_ns: u64,
    shown: Moment,
    /// Its nanoseconds in a million of the world's.
    pace: u64,
}

impl Clock {
    /// What it shows at a moment of the world.
    pub(super) fn show(&self, world_ns: u64) -> Moment {
        self.shown.after_ns((world_ns - self.world_ns) * self.pace / MILLION)
    }

    /// When it shows `moment`.
    pub(super) fn world_ns(&self, moment: Moment) -> u64 {
        self.world_ns + (moment.since_ns(self.shown) * MILLION).div_ceil(self.pace)
    }
}

/// One start of a node's process.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) driver: Driver<Shard<SimMemory>>,
    pub(super) clock: Clock,
    /// Volumes whose record it has been told.
    pub(super) told: Vec<bool>,
    /// It takes good reads for damaged now and then.
    feigns_damage: bool,
}

/// A lane of each, as recovery finds it.
type Pool = (Layout, Vec<Recovered>);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) plan: NodePlan,
    /// Nothing while it is down.
    pub(super) life: Option<Life>,
    /// Lent to the process while there is one.
    disk: Option<Disk>,
    memory: Option<SimMemory>,
    /// Counts starts.
    pub(super) boots: u64,
    /// Errors that the disk had reported when the process started.
    errors_at_start: u64,
    /// Bits have flipped, and are not known to be as they were.
    rotted: bool,
    /// Damaged blocks were given up for good.
    lost: bool,
    /// It once had another disk.
    replaced: bool,
    random: Random,
}

impl Node {
    /// A node with an empty pool.
    pub(super) fn new(plan: NodePlan, tear_bytes: usize, delay_ns_max: u64, random: Random) -> Node {
        let mut disk = format(&plan, random.fork("disk", 0));
        disk.faults.tear_bytes = tear_bytes;
        disk.faults.delay_ns_max = delay_ns_max;
        Node {
            plan,
            life: None,
            disk: Some(disk),
            memory: None,
            boots: 0,
            errors_at_start: 0,
            rotted: false,
            lost: false,
            replaced: false,
            random,
        }
    }

    fn memory_plan(&self) -> MemoryPlan {
        let layout = Layout::with_segment_blocks([0; 16], 64 * MIB, 1, SEGMENT_BLOCKS).expect("a small pool");
        let lane_bytes = self.plan.lanes * Lane::pages_needed(&layout) * BLOCK_BYTES;
        MemoryPlan {
            total_bytes: RECEIVE_BYTES * u32::from(RECEIVE_BUFFERS) + lane_bytes + self.plan.request_bytes,
            receive_buffer: MemoryRange { start: 0, len: RECEIVE_BYTES },
            receive_buffer_count: RECEIVE_BUFFERS,
        }
    }

    /// Starts the process.
    ///
    /// # Errors
    /// Why the store does not start.
    pub(super) fn start(&mut self, world_ns: u64, volumes: usize) -> Result<(), String> {
        self.boots += 1;
        let disk = self.disk.as_mut().expect("a node that is down has its disk");
        self.errors_at_start = disk.counts.errors;
        let pool = read_pool(&self.plan, &mut DiskReader::new(disk))?;
        let mut random = self.random.fork("life", self.boots);
        let clock = Clock {
            world_ns,
            shown: Moment(random.skewed(0..=1 << 44)),
            pace: MILLION + random.range(0..=40_000) - 20_000,
        };
        let plan = self.memory_plan();
        let disk = self.disk.take().expect("a node that is down has its disk");
        let mut memory = self.memory.take().unwrap_or_else(|| SimMemory::new(plan.total_bytes));
        memory.reset();
        let boot = random.bits();
        let shard = self.open(pool, memory, boot);
        let mut driver =
            Driver::new(vec![shard], disk, clock.show(world_ns), &plan, random.fork("driver", 0));
        driver.allow_calls();
        let feigns_damage = feigns_damage(boot);
        self.life = Some(Life { driver, clock, told: vec![false; volumes], feigns_damage });
        Ok(())
    }

    fn open(&self, (layout, recovered): Pool, memory: SimMemory, boot: u64) -> Shard<SimMemory> {
        let receive_bytes = RECEIVE_BYTES * u32::from(RECEIVE_BUFFERS);
        let total_bytes = self.memory_plan().total_bytes;
        let mut pages = Pages::new(MemoryRange { start: receive_bytes, len: total_bytes - receive_bytes });
        let mut lanes = Vec::new();
        for (lane, recovered) in (0..).zip(recovered) {
            let config = LaneConfig {
                lane,
                layout,
                ack: AckPolicy::Durable,
                checkpoint_log_bytes: self.plan.checkpoint_log_bytes,
                bugs: StoreBugs::none(),
            };
            lanes.push(Lane::new(config, recovered, &mut pages));
        }
        let segments = layout.segments_in(self.plan.disk_bytes);
        let space = PoolSpace::new(layout, segments, lanes.iter().map(Lane::segments), true);
        let pool = ShardPool { device: DeviceIndex(0), lanes, space };
        let config = NodeConfig { node: self.plan.id, boot, steals: boot.is_multiple_of(2) };
        let mut shard = Shard::new(memory, pages, vec![pool], false, Some(config));
        shard.plant(self.plan.bugs);
        if feigns_damage(boot) {
            shard.feign_damage_in(4);
        }
        if boot.is_multiple_of(2) {
            shard.scrub_within(SCRUB_NS);
        }
        shard
    }

    /// What recovery makes of the pool, which is not damaged.
    pub(super) fn read_pool(&self, reader: &mut impl PoolReader) -> Pool {
        read_pool(&self.plan, reader).unwrap_or_else(|error| panic!("an undamaged pool is refused: {error}"))
    }

    /// The same for a pool that may be damaged.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn try_read_pool(&self, reader: &mut impl PoolReader) -> Result<Pool, String> {
        read_pool(&self.plan, reader)
    }

    /// Does the process take good reads for damaged now and then?
    pub(super) fn feigns_damage(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.feigns_damage)
    }

    /// Flips up to `count` bits of what volumes hold, and says how many.
    pub(super) fn rot_data(&mut self, count: usize) -> usize {
        let reader = &mut StableReader(self.disk());
        let Ok((layout, mut lanes)) = read_pool(&self.plan, reader) else { return 0 };
        let fragile = fragile_ranges(&layout, reader, self.plan.map_cache_bytes, StoreBugs::none());
        let mut held = BTreeSet::new();
        for recovered in &mut lanes {
            for volume in 0..recovered.volumes.len() {
                let visit = |_, mapping: Mapping| {
                    held.insert(mapping.place.offset_bytes());
                };
                if recovered.visit_blocks(reader, volume, visit).is_err() {
                    return 0;
                }
            }
        }
        let flipped = self.disk_mut().flip_bits_of(count, &fragile, |page| held.contains(&page));
        self.rotted |= flipped > 0;
        flipped
    }

    /// Flips up to `count` bits, and says how many.
    pub(super) fn rot(&mut self, count: usize) -> usize {
        let reader = &mut StableReader(self.disk());
        let Ok(layout) = read_layout(reader) else { return 0 };
        let fragile = fragile_ranges(&layout, reader, self.plan.map_cache_bytes, StoreBugs::none());
        let flipped = self.disk_mut().flip_bits(count, &fragile);
        self.rotted |= flipped > 0;
        flipped
    }

    /// An empty pool takes the place of the one that there was.
    pub(super) fn replace_disk(&mut self) {
        let faults = self.disk().faults.clone();
        let mut disk = format(&self.plan, self.random.fork("disk", self.boots));
        disk.faults = faults;
        self.errors_at_start = 0;
        (self.rotted, self.lost, self.replaced) = (false, false, true);
        assert!(self.disk.replace(disk).is_some(), "a node that is down has its disk");
    }

    /// Bits are as they were, and what failed is forgotten.
    pub(super) fn repair(&mut self) {
        let disk = self.disk_mut();
        disk.repair_rot();
        self.errors_at_start = self.disk().counts.errors;
        self.rotted = false;
    }

    /// Has the disk reported an error since the process started?
    pub(super) fn has_errors(&self) -> bool {
        self.disk().counts.errors > self.errors_at_start
    }

    pub(super) fn is_rotted(&self) -> bool {
        self.rotted
    }

    pub(super) fn is_replaced(&self) -> bool {
        self.replaced
    }

    /// Were blocks given up because they could not be read?
    pub(super) fn has_lost(&self) -> bool {
        self.lost || self.life.as_ref().is_some_and(|life| lost_blocks(life.driver.engine()) > 0)
    }

    /// Has the disk given cause for errors?
    pub(super) fn may_fail(&self) -> bool {
        self.has_errors() || self.rotted || self.has_lost()
    }

    /// Ends the process. Without power the disk loses what it had not flushed.
    pub(super) fn stop(&mut self, power_cut: bool) {
        let Some(life) = self.life.take() else {
            if power_cut {
                self.disk.as_mut().expect("a node that is down has its disk").cut_power();
            }
            return;
        };
        let (memories, mut disk, _, engines) = life.driver.dismantle();
        self.lost |= engines.iter().any(|engine| lost_blocks(engine) > 0);
        if power_cut {
            disk.cut_power();
        } else {
            disk.kill();
        }
        disk.faults.stalls = 0;
        (self.disk, self.memory) = (Some(disk), memories.into_iter().next());
    }

    pub(super) fn disk(&self) -> &Disk {
        match &self.life {
            Some(life) => &life.driver.disk,
            None => self.disk.as_ref().expect("a node that is down has its disk"),
        }
    }

    pub(super) fn disk_mut(&mut self) -> &mut Disk {
        match &mut self.life {
            Some(life) => &mut life.driver.disk,
            None => self.disk.as_mut().expect("a node that is down has its disk"),
        }
    }

    /// The world's time of the next thing that happens here.
    pub(super) fn next_ns(&self) -> Option<u64> {
        let life = self.life.as_ref()?;
        life.driver.next_moment().map(|moment| life.clock.world_ns(moment))
    }

    /// Lets the node's time pass, and gives access to its driver.
    pub(super) fn at(&mut self, world_ns: u64) -> Option<&mut Driver<Shard<SimMemory>>> {
        let life = self.life.as_mut()?;
        life.driver.advance_to(life.clock.show(world_ns));
        Some(&mut life.driver)
    }

    pub(super) fn describe(&self) -> String {
        match &self.life {
            Some(life) => format!(
                "{:?}, boot {}, shows {:?}, told {:?}\n{}",
                self.plan.id,
                self.boots,
                life.driver.now(),
                life.told,
                life.driver.engine().describe()
            ),
            None => format!("{:?} is down", self.plan.id),
        }
    }

    pub(super) fn report_no_space(&self) -> u64 {
        let lanes = self.life.iter().flat_map(|life| life.driver.engine().lanes());
        lanes.map(|lane| lane.counters().refused_no_space).sum()
    }

    /// Does one of its lanes hold the volume?
    pub(super) fn holds(&self, volume: VolumeNumber) -> bool {
        let mut lanes = self.life.iter().flat_map(|life| life.driver.engine().lanes());
        lanes.any(|lane| lane.volume_position(volume.0).is_some())
    }

    /// In this process.
    pub(super) fn volumes_removed(&self) -> u64 {
        self.life.as_ref().map_or(0, |life| life.driver.engine().volumes_removed())
    }

    pub(super) fn report_turns(&self) -> u64 {
        self.life.as_ref().map_or(0, |life| life.driver.counts.turns)
    }
}

/// The nodes of a seed.
pub(super) fn draw_nodes(
    draw: &mut Random,
    random: &Random,
    options: ClusterOptions,
    swarm: &Swarm,
) -> Vec<Node> {
    let count = *draw.pick(match options {
        ClusterOptions { replacements: true, .. } => &[3, 4],
        ClusterOptions { elsewhere: true, .. } => &[3, 4, 4, 5],
        _ => &[2, 3, 3, 3, 3, 4, 5][..],
    });
    let lanes = if draw.percent(80) || options.full { 1 } else { 2 };
    // Where pools are small, it is the first one's or everybody's.
    let all_small = options.full && draw.percent(40);
    let mut node = |node: usize| {
        let segments = match lanes {
            1 if options.full && (node == 0 || all_small) => draw.range(32..=34),
            1 if options.full => draw.range(80..=90),
            1 => draw.range(34..=40),
            _ => draw.range(54..=64),
        };
        let plan = NodePlan {
            id: id(node),
            lanes,
            disk_bytes: segments * MIB,
            request_bytes: if draw.percent(70) { 12 << 20 } else { 7 << 20 },
            map_cache_bytes: *draw.pick(&[0, 256 << 10, 64 << 20]),
            checkpoint_log_bytes: *draw.pick(&[MIB, 4 * MIB, 64 * MIB]),
            bugs: options.bugs,
        };
        Node::new(plan, swarm.tear_bytes, swarm.disk_delay_ns_max, random.fork("node", node as u64))
    };
    (0..count).map(&mut node).collect()
}

fn feigns_damage(boot: u64) -> bool {
    boot.is_multiple_of(3)
}

fn format(plan: &NodePlan, random: Random) -> Disk {
    let mut disk = Disk::new(plan.disk_bytes, random);
    let layout = Layout::with_segment_blocks([7; 16], plan.disk_bytes, plan.lanes, SEGMENT_BLOCKS);
    for write in format_writes(&layout.expect("the pool is large enough")) {
        disk.write_now(write.place.offset_bytes(), &write.block[..]);
    }
    disk
}

fn read_pool(plan: &NodePlan, reader: &mut impl PoolReader) -> Result<Pool, String> {
    let refused = |error: &dyn std::fmt::Display| error.to_string();
    let layout = read_layout(reader).map_err(|error| refused(&error))?;
    let lanes = (0..layout.lanes)
        .map(|lane| recover_lane(reader, layout, lane, plan.map_cache_bytes, StoreBugs::none()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| refused(&error))?;
    Ok((layout, lanes))
}

fn lost_blocks(engine: &Shard<SimMemory>) -> u64 {
    engine.lanes().map(|lane| lane.counters().lost_blocks).sum()
}
