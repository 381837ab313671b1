//! Berth's shards as a subject: a pool of one to three lanes on the simulated disk.

use std::ops::Range;

use datapath::engine::pool_space::PoolSpace;
use datapath::engine::ports::{DeviceIndex, Engine};
use datapath::engine::shard::{Shard, ShardPool, shard_of_lane, split};
use datapath::limits::PIECE_BYTES_MAX;
use datapath::memory::Pages;
use datapath::store::bugs::Bugs;
use datapath::store::check::check_lane;
use datapath::store::checkpoint_body::VolumeRecord;
use datapath::store::format::format_writes;
use datapath::store::lane::{AckPolicy, Lane, LaneConfig};
use datapath::store::layout::{ANCHORS, Layout};
use datapath::store::recovery::{PoolReader, Recovered, read_layout, recover_lane};
use datapath::units::{BLOCK_BYTES, BLOCK_BYTES_U64, MemoryRange, Moment};

use super::disk::Disk;
use super::memory::SimMemory;
use super::oracle::Promises;
use super::random::Random;
use super::subject::{
    DiskReader, MemoryPlan, Setup, StableReader, StartError, Subject, SubjectCounts, Survives,
};

const SEGMENT_BLOCKS: u32 = 256;
const MIB: u64 = 1 << 20;
const RECEIVE_BYTES: u32 = 64 << 10;
const RECEIVE_BUFFERS: u16 = 16;
/// Memory for requests: little, so that waiting for it is common.
const REQUEST_BYTES: u32 = 12 << 20;
/// So little that a few clients can hold all of it. The longest request still fits.
const HOARDED_REQUEST_BYTES: u32 = 5 << 20;

/// Berth, with a mistake planted or not.
#[derive(Clone, Debug, Default)]
pub struct BerthSubject {
    bugs: Bugs,
    lanes: u32,
    /// One thread in every life.
    single: bool,
    map_cache_bytes: u64,
    checkpoint_log_bytes: u64,
}

impl BerthSubject {
    /// A subject with these mistakes.
    #[must_use]
    pub fn new(bugs: Bugs) -> BerthSubject {
        BerthSubject { bugs, ..BerthSubject::default() }
    }

    fn recover(&self, reader: &mut DiskReader<'_>) -> Result<(Layout, Vec<Recovered>), StartError> {
        let refused = |error| StartError::Refused(format!("{error}"));
        let layout = read_layout(reader).map_err(refused)?;
        let lanes = (0..layout.lanes)
            .map(|lane| recover_lane(reader, layout, lane, self.map_cache_bytes, self.bugs).map_err(refused))
            .collect::<Result<Vec<_>, _>>()?;
        Ok((layout, lanes))
    }

    fn record(setup: &Setup, index: usize) -> VolumeRecord {
        let volume = &setup.volumes[index];
        VolumeRecord {
            number: u32::try_from(index + 1).expect("few volumes"),
            epoch: 1,
            size_blocks: volume.size_bytes / BLOCK_BYTES_U64,
            sequence: 0,
            identity: [u8::try_from(index).expect("few volumes"); 16],
            name: volume.name.clone(),
            ..VolumeRecord::default()
        }
    }
}

impl PoolReader for StableReader<'_> {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        self.0.read_stable(offset_bytes, into);
        true
    }
}

impl PoolReader for DiskReader<'_> {
    fn len_bytes(&self) -> u64 {
        DiskReader::len_bytes(self)
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        DiskReader::read_at(self, offset_bytes, into).is_ok()
    }
}

impl Subject for BerthSubject {
    type Engine = Shard<SimMemory>;

    /// Small pools, so that the cleaner works in every seed; sometimes volumes that do not fit.
    fn adapt(&mut self, setup: &mut Setup) {
        let mut random = setup.random.fork("berth", 0);
        self.lanes = *random.pick(&[1, 1, 2, 2, 2, 3]);
        if setup.slant.failing_syncs {
            self.lanes = 2;
        }
        self.single = random.percent(40);
        let segments = match self.lanes {
            1 => random.range(32..=40),
            2 => random.range(52..=64),
            _ => random.range(84..=96),
        };
        setup.disk_bytes = segments * MIB;
        setup.may_fill = random.percent(20) || setup.slant.fills;
        // What a pool of this size holds besides its working space.
        let room = match self.lanes {
            1 => segments - 22,
            2 => segments - 40,
            _ => segments - 64,
        } * MIB;
        // Several lanes keep so much for their work that the cleaner would have none if they held little.
        let usual = if self.lanes == 1 { 30..=85 } else { 60..=80 };
        let count = u64::try_from(setup.volumes.len()).expect("few volumes");
        let part = room / count;
        for volume in &mut setup.volumes {
            let percent = if setup.may_fill { random.range(100..=400) } else { random.range(usual.clone()) };
            volume.size_bytes = (part * percent / 100 / BLOCK_BYTES_U64).max(16) * BLOCK_BYTES_U64;
        }
        self.map_cache_bytes = *random.pick(&[0, 256 << 10, 64 << 20]);
        self.checkpoint_log_bytes = *random.pick(&[MIB, 4 * MIB, 64 * MIB]);
    }

    fn memory_plan(&self, setup: &Setup) -> MemoryPlan {
        let layout = Layout::with_segment_blocks([0; 16], 64 * MIB, 1, SEGMENT_BLOCKS).expect("a small pool");
        let lane_bytes = self.lanes * Lane::pages_needed(&layout) * BLOCK_BYTES;
        let receive_bytes = RECEIVE_BYTES * u32::from(RECEIVE_BUFFERS);
        let request_bytes = if setup.slant.hoarding { HOARDED_REQUEST_BYTES } else { REQUEST_BYTES };
        MemoryPlan {
            total_bytes: receive_bytes + lane_bytes + request_bytes,
            receive_buffer: MemoryRange { start: 0, len: RECEIVE_BYTES },
            receive_buffer_count: RECEIVE_BUFFERS,
        }
    }

    fn promises(&self, setup: &Setup) -> Promises {
        Promises { durable_acks: setup.durable_acks, atomic_window_bytes: PIECE_BYTES_MAX.into() }
    }

    fn survives(&self, _setup: &Setup) -> Survives {
        Survives { errors: true, rot: true, lies: true }
    }

    fn format(&mut self, setup: &Setup, disk: &mut Disk) {
        let layout = Layout::with_segment_blocks([7; 16], setup.disk_bytes, self.lanes, SEGMENT_BLOCKS)
            .expect("the pool is large enough");
        for write in format_writes(&layout) {
            disk.write_now(write.place.offset_bytes(), &write.block[..]);
        }
    }

    /// Another number in every life, sometimes more than there are lanes.
    fn draw_threads(&self, _setup: &Setup, random: &mut Random) -> usize {
        if self.single { 1 } else { random.index(self.lanes as usize + 1) + 1 }
    }

    fn start(
        &mut self,
        setup: &Setup,
        _now: Moment,
        disk: &mut DiskReader<'_>,
        memories: Vec<SimMemory>,
    ) -> Result<Vec<Shard<SimMemory>>, StartError> {
        let (layout, recovered) = self.recover(disk)?;
        let plan = self.memory_plan(setup);
        let receive_bytes = RECEIVE_BYTES * u32::from(RECEIVE_BUFFERS);
        let free = MemoryRange { start: receive_bytes, len: plan.total_bytes - receive_bytes };
        let mut pages: Vec<Pages> = memories.iter().map(|_| Pages::new(free)).collect();
        let ack = if setup.durable_acks { AckPolicy::Durable } else { AckPolicy::Device };
        let mut lanes = Vec::new();
        for (index, recovered) in (0..).zip(recovered) {
            let config = LaneConfig {
                lane: index,
                layout,
                ack,
                checkpoint_log_bytes: self.checkpoint_log_bytes,
                bugs: self.bugs,
            };
            let shard = shard_of_lane(index as usize, pages.len());
            let mut lane = Lane::new(config, recovered, &mut pages[shard]);
            for volume in 0..setup.volumes.len() {
                let known =
                    lane.volumes().iter().any(|known| known.record.name == setup.volumes[volume].name);
                if volume % self.lanes as usize == index as usize && !known {
                    lane.put_volume(BerthSubject::record(setup, volume));
                }
            }
            lanes.push(lane);
        }
        let segments = layout.segments_in(setup.disk_bytes);
        let space = PoolSpace::new(layout, segments, lanes.iter().map(Lane::segments), true);
        let pool = ShardPool { device: DeviceIndex(0), lanes, space };
        let shards = u16::try_from(memories.len()).expect("few threads");
        let parts = split(vec![pool], shards).into_iter().zip(memories.into_iter().zip(pages));
        Ok(parts.map(|(part, (memory, pages))| Shard::of_part(memory, pages, part, false, None)).collect())
    }

    fn counts(&self, engine: &Shard<SimMemory>) -> SubjectCounts {
        let mut counts = SubjectCounts::default();
        for lane in engine.lanes().map(Lane::counters) {
            counts.checkpoints += lane.checkpoints;
            counts.lost_blocks += lane.lost_blocks;
            counts.cleaned_segments += lane.cleaned_segments;
            counts.batches += lane.batches;
        }
        let report = engine.report();
        counts.inputs_parked = report.inputs_parked;
        counts.connections_put_out = report.connections_put_out;
        counts
    }

    fn describe(&self, engine: &Shard<SimMemory>) -> String {
        engine.describe()
    }

    fn check(&mut self, _setup: &Setup, disk: &mut DiskReader<'_>) -> Result<(), String> {
        let (layout, lanes) = self.recover(disk).map_err(|error| error.to_string())?;
        for mut recovered in lanes {
            let report = check_lane(disk, &layout, &mut recovered);
            if !report.is_clean() {
                return Err(format!("{} problems: {}", report.problems, report.listed.join("; ")));
            }
        }
        Ok(())
    }

    fn fragile(&self, setup: &Setup, stable: &mut StableReader<'_>) -> Vec<Range<u64>> {
        let layout = Layout::with_segment_blocks([7; 16], setup.disk_bytes, self.lanes, SEGMENT_BLOCKS);
        let layout = layout.expect("the pool is large enough");
        fragile_ranges(&layout, stable, self.map_cache_bytes, self.bugs)
    }
}

/// Where bits must not flip: what no pool survives, and what nothing on the disk says to have been flushed.
pub(super) fn fragile_ranges(
    layout: &Layout,
    stable: &mut StableReader<'_>,
    map_cache_bytes: u64,
    bugs: Bugs,
) -> Vec<Range<u64>> {
    let segment_bytes = u64::from(layout.segment_bytes());
    // Three of four roots rotted together are beyond what a pool survives; bits flip in one anchor at most.
    let anchors = (1..ANCHORS).map(|number| u64::from(layout.anchor(number).0) * segment_bytes);
    let mut fragile: Vec<_> = anchors.map(|start| start..start + segment_bytes).collect();
    for lane in 0..layout.lanes {
        match recover_lane(stable, *layout, lane, map_cache_bytes, bugs) {
            // The end of the log, of which nothing on the disk says that it had been flushed, and what comes
            // behind it.
            Ok(recovered) => {
                let unproven = recovered.unproven.iter().map(|run| (run.place, run.blocks));
                let ahead = recovered.log_ends.iter().flatten().flat_map(|end| {
                    let rest = (layout.place(end.segment, 0).plus(end.block), SEGMENT_BLOCKS - end.block);
                    [rest, (layout.place(end.next_segment, 0), SEGMENT_BLOCKS)]
                });
                fragile.extend(unproven.chain(ahead).map(|(place, blocks)| {
                    let start = place.offset_bytes();
                    start..start + u64::from(blocks) * BLOCK_BYTES_U64
                }));
            }
            // Damaged enough already to be refused.
            Err(_) => fragile.push(0..stable.len_bytes()),
        }
    }
    fragile
}
