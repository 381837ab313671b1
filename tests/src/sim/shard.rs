//! The real thing as a subject: a pool with lanes, recovered and joined into a [`Shard`].

use datapath::engine::pool_space::PoolSpace;
use datapath::engine::ports::{DeviceIndex, Engine};
use datapath::engine::shard::{Shard, ShardPool};
use datapath::memory::Pages;
use datapath::store::bugs::{Bugs, PlantedBug};
use datapath::store::checkpoint_body::VolumeRecord;
use datapath::store::format::format_writes;
use datapath::store::lane::{AckPolicy, Lane, LaneConfig};
use datapath::store::layout::Layout;
use datapath::store::recovery::{PoolReader, Recovered, RecoveryError, read_layout, recover_lane};
use datapath::units::{BLOCK_BYTES, BLOCK_BYTES_U64, MemoryRange, Moment};

use super::disk::Disk;
use super::memory::SimMemory;
use super::oracle::Promises;
use super::random::Random;
use super::subject::{DiskReader, MemoryPlan, Setup, StartError, Subject, SubjectCounts, Survives};

/// Segments of a lane that hold no client data, and those that it keeps in stock.
const WORKING_SEGMENTS: u64 = 24;

/// What varies from seed to seed.
#[derive(Clone, Copy, Debug)]
struct Tuning {
    layout: Layout,
    checkpoint_log_bytes: u64,
    map_cache_bytes: u64,
    request_bytes: u32,
    receive_buffer_bytes: u32,
    receive_buffers: u16,
    zero_before_use: bool,
}

/// A pool on the simulated disk, served by one shard.
#[derive(Debug, Default)]
pub struct ShardSubject {
    /// A mistake to plant.
    pub bug: Option<PlantedBug>,
    tuning: Option<Tuning>,
}

impl ShardSubject {
    /// A subject with this mistake in it.
    #[must_use]
    pub fn new(bug: Option<PlantedBug>) -> ShardSubject {
        ShardSubject { bug, tuning: None }
    }

    fn tuning(&self) -> Tuning {
        self.tuning.expect("the setup was adapted")
    }

    #[cfg(feature = "planted-bugs")]
    fn bugs(&self) -> Bugs {
        self.bug.map_or(Bugs::none(), Bugs::planted)
    }

    #[cfg(not(feature = "planted-bugs"))]
    fn bugs(&self) -> Bugs {
        assert!(self.bug.is_none(), "bugs can be planted with --features planted-bugs only");
        Bugs::none()
    }

    fn recover(&self, disk: &mut DiskReader<'_>) -> Result<Vec<Recovered>, StartError> {
        let tuning = self.tuning();
        let mut reader = Reader { disk, failed: false };
        let cache_bytes = tuning.map_cache_bytes / u64::from(tuning.layout.lanes);
        let recovered = read_layout(&mut reader).and_then(|layout| {
            (0..layout.lanes)
                .map(|lane| recover_lane(&mut reader, layout, lane, cache_bytes, self.bugs()))
                .collect::<Result<Vec<_>, RecoveryError>>()
        });
        let failed = reader.failed;
        recovered.map_err(|error| match failed {
            true => StartError::Read(error.to_string()),
            false => StartError::Refused(error.to_string()),
        })
    }
}

struct Reader<'a, 'd> {
    disk: &'a mut DiskReader<'d>,
    failed: bool,
}

impl PoolReader for Reader<'_, '_> {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> bool {
        let good = self.disk.read_at(offset_bytes, into).is_ok();
        self.failed |= !good;
        good
    }
}

impl Subject for ShardSubject {
    type Engine = Shard<SimMemory>;

    fn adapt(&mut self, setup: &mut Setup) {
        let mut random = setup.random.fork("shard", 0);
        let lanes = random.range(1..=3);
        let segment_blocks = *random.pick(&[16, 16, 32, 64, 256]);
        // Full pools keep the cleaner busy; pools that are too small refuse writes.
        let fill_percent = *random.pick(&[20, 50, 70, 80, 110]);
        let volume_bytes: u64 = setup.volumes.iter().map(|volume| volume.size_bytes).sum();
        let data_segments = volume_bytes * 100 / fill_percent / BLOCK_BYTES_U64 / (segment_blocks - 2);
        let segments = (data_segments + lanes * WORKING_SEGMENTS + 4).max(32);
        setup.disk_bytes = segments * segment_blocks * BLOCK_BYTES_U64;
        setup.may_fill = fill_percent > 70;
        let layout = Layout::with_segment_blocks(
            pool_id(&mut random),
            setup.disk_bytes,
            u32::try_from(lanes).expect("few"),
            u32::try_from(segment_blocks).expect("few"),
        );
        self.tuning = Some(Tuning {
            layout: layout.expect("the pool is large enough"),
            checkpoint_log_bytes: *random.pick(&[128 << 10, 1 << 20, 8 << 20]),
            map_cache_bytes: *random.pick(&[64 << 10, 1 << 20, 64 << 20]),
            request_bytes: *random.pick(&[8 << 20, 24 << 20]),
            receive_buffer_bytes: *random.pick(&[4 << 10, 32 << 10, 128 << 10]),
            receive_buffers: *random.pick(&[4, 16]),
            zero_before_use: random.percent(50),
        });
    }

    fn memory_plan(&self, _setup: &Setup) -> MemoryPlan {
        let tuning = self.tuning();
        let lanes = Lane::pages_needed(&tuning.layout) * tuning.layout.lanes * BLOCK_BYTES;
        let receive = u32::from(tuning.receive_buffers) * tuning.receive_buffer_bytes;
        MemoryPlan {
            total_bytes: receive + tuning.request_bytes + lanes,
            receive_buffer: MemoryRange { start: 0, len: tuning.receive_buffer_bytes },
            receive_buffer_count: tuning.receive_buffers,
        }
    }

    fn promises(&self, setup: &Setup) -> Promises {
        Promises { durable_acks: setup.durable_acks, atomic_bytes: 1 << 20 }
    }

    fn survives(&self, _setup: &Setup) -> Survives {
        Survives { errors: true, rot: true, lies: true }
    }

    fn format(&mut self, _setup: &Setup, disk: &mut Disk) {
        for write in format_writes(&self.tuning().layout) {
            disk.write_now(write.place.offset_bytes(), &write.block[..]);
        }
    }

    fn start(
        &mut self,
        setup: &Setup,
        _now: Moment,
        disk: &mut DiskReader<'_>,
        memory: SimMemory,
    ) -> Result<Shard<SimMemory>, StartError> {
        let tuning = self.tuning();
        let recovered = self.recover(disk)?;
        let plan = self.memory_plan(setup);
        let receive = u32::from(plan.receive_buffer_count) * plan.receive_buffer.len;
        let mut pages = Pages::new(MemoryRange { start: receive, len: plan.total_bytes - receive });
        let mut wishes = missing_volumes(setup, &recovered);
        let mut lanes = Vec::new();
        for (number, recovered) in (0..).zip(recovered) {
            let config = LaneConfig {
                lane: number,
                layout: tuning.layout,
                ack: if setup.durable_acks { AckPolicy::Durable } else { AckPolicy::Device },
                checkpoint_log_bytes: tuning.checkpoint_log_bytes,
                bugs: self.bugs(),
            };
            let mut lane = Lane::new(config, recovered, &mut pages);
            let own = wishes.extract_if(.., |(wanted, _)| *wanted == number);
            own.for_each(|(_, record)| lane.put_volume(record));
            lanes.push(lane);
        }
        let segments = tuning.layout.segments_in(setup.disk_bytes);
        let tables = lanes.iter().map(Lane::segments);
        let space = PoolSpace::new(tuning.layout, segments, tables, tuning.zero_before_use);
        let pool = ShardPool { device: DeviceIndex(0), lanes, space };
        Ok(Shard::new(memory, pages, vec![pool], false))
    }

    fn counts(&self, engine: &Shard<SimMemory>) -> SubjectCounts {
        let lanes = engine.report().lanes;
        let sum = |count: fn(&datapath::store::lane::LaneCounters) -> u64| {
            lanes.iter().map(|lane| count(&lane.counters)).sum()
        };
        SubjectCounts {
            checkpoints: sum(|counters| counters.checkpoints),
            cleaned_segments: sum(|counters| counters.cleaned_segments),
            batches: sum(|counters| counters.batches),
        }
    }

    fn check(&mut self, setup: &Setup, disk: &mut DiskReader<'_>) -> Result<(), String> {
        let recovered = self.recover(disk).map_err(|error| error.to_string())?;
        for (lane, recovered) in recovered.iter().enumerate() {
            if recovered.batches_rolled_forward > 0 {
                return Err(format!("lane {lane} stopped without a checkpoint of its last batches"));
            }
        }
        let missing = missing_volumes(setup, &recovered);
        if let Some((_, volume)) = missing.first() {
            return Err(format!("volume {} is gone", volume.name));
        }
        Ok(())
    }
}

/// The volumes of the setup that no lane has, each with the lane where it is to be.
fn missing_volumes(setup: &Setup, recovered: &[Recovered]) -> Vec<(u32, VolumeRecord)> {
    let lanes = crate::to_u32(recovered.len());
    let wanted = (0..).zip(&setup.volumes).map(|(index, volume)| {
        let mut identity = [0; 16];
        setup.random.fork("volume", u64::from(index)).fill(&mut identity);
        let record = VolumeRecord {
            number: index + 1,
            epoch: 1,
            size_blocks: volume.size_bytes / BLOCK_BYTES_U64,
            sequence: 0,
            identity,
            name: volume.name.clone(),
        };
        (index % lanes, record)
    });
    let known = |record: &VolumeRecord| {
        recovered.iter().flat_map(|lane| &lane.volumes).any(|known| known.name == record.name)
    };
    wanted.filter(|(_, record)| !known(record)).collect()
}

fn pool_id(random: &mut Random) -> [u8; 16] {
    let mut id = [0; 16];
    random.fill(&mut id);
    id
}
