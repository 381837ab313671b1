//! The offline check of a lane: every reference leads to one block, every block has its checksum, all counts agree.

use super::layout::{Layout, Place};
use super::map::{LEAF_BLOCKS, Mapping, Presence};
use super::recovery::{PoolReader, Recovered};
use crate::checksum::crc32c;
use crate::units::BLOCK_BYTES_USIZE;

/// Problems that are listed; further ones are only counted.
const LISTED_MAX: usize = 20;
/// Blocks of a volume that are gathered, to be read in the order in which they lie in the pool: those of 256 MiB.
const GATHERED_MAX: usize = 64 << 10;
/// Blocks of one read.
const READ_BLOCKS_MAX: u32 = 256;
/// So many blocks that nobody asked for are rather read along than left out.
const GAP_BLOCKS_MAX: u32 = 8;

/// What the check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Blocks of volumes that hold data.
    pub data_blocks: u64,
    /// Blocks that were damaged and given up.
    pub lost_blocks: u64,
    /// Leaves of maps on the device.
    pub leaf_blocks: u64,
    /// Problems in all.
    pub problems: u64,
    /// The first of them.
    pub listed: Vec<String>,
}

impl CheckReport {
    /// Is the lane sound?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems == 0
    }

    fn add(&mut self, problem: impl FnOnce() -> String) {
        self.problems += 1;
        if self.listed.len() < LISTED_MAX {
            self.listed.push(problem());
        }
    }
}

/// Checks a recovered lane against its pool. Reads everything that lives, writes nothing.
pub fn check_lane(reader: &mut impl PoolReader, layout: &Layout, recovered: &mut Recovered) -> CheckReport {
    let mut check = Check {
        layout: *layout,
        report: CheckReport::default(),
        referenced: vec![0; (recovered.segments.pool_count() * layout.segment_blocks).div_ceil(64) as usize],
        live: vec![0; recovered.segments.pool_count() as usize],
        gathered: Vec::new(),
        buffer: Vec::new(),
    };
    for place in recovered.body.clone().iter().flatten().flat_map(|run| run.places()) {
        check.refer(place, || "the checkpoint's body".to_owned());
    }
    for volume in 0..recovered.volumes.len() {
        check.check_volume(reader, recovered, volume);
    }
    for segment in recovered.segments.indices() {
        let (counted, kept) = (check.live[segment.0 as usize], recovered.segments.live(segment));
        if counted != kept {
            check
                .report
                .add(|| format!("segment {}: {counted} blocks live, the table says {kept}", segment.0));
        }
    }
    check.report
}

struct Check {
    layout: Layout,
    report: CheckReport,
    /// One bit per block of the pool.
    referenced: Vec<u64>,
    live: Vec<u32>,
    gathered: Vec<Gathered>,
    buffer: Vec<u8>,
}

/// A block of the volume that is being checked, to be read.
#[derive(Clone, Copy)]
struct Gathered {
    mapping: Mapping,
    block: u64,
}

impl Check {
    fn check_volume(&mut self, reader: &mut impl PoolReader, recovered: &mut Recovered, volume: usize) {
        let name = recovered.volumes[volume].name.clone();
        let size_blocks = recovered.volumes[volume].size_blocks;
        let position = u32::try_from(volume).expect("volumes fit 32 bits");
        let leaves = u32::try_from(size_blocks.div_ceil(u64::from(LEAF_BLOCKS))).expect("leaves fit 32 bits");
        let mut next = 0;
        while let Some(leaf) = recovered.map.table(position).next_present(next, leaves) {
            next = leaf + 1;
            let on_device = recovered.map.table(position).leaf_on_device(leaf);
            if on_device.place != Place::NONE {
                self.report.leaf_blocks += 1;
                self.refer(on_device.place, || format!("volume {name}, leaf {leaf}"));
            }
            let frame = match recovered.map.find(position, leaf) {
                Presence::Here(frame) | Presence::Loading(frame) => frame,
                Presence::Nowhere => continue,
                Presence::Away(Mapping { place, crc }) => {
                    let mut block = [0; BLOCK_BYTES_USIZE];
                    if !reader.read_at(place.offset_bytes(), &mut block) || crc32c(&block) != crc {
                        self.report
                            .add(|| format!("volume {name}: leaf {leaf} at block {} is damaged", place.0));
                        continue;
                    }
                    let frame = recovered.map.admit(position, leaf);
                    recovered.map.finish_load(frame, &block);
                    frame
                }
            };
            for offset in 0..LEAF_BLOCKS {
                let mapping = recovered.map.get(frame, offset);
                let block = u64::from(leaf) * u64::from(LEAF_BLOCKS) + u64::from(offset);
                if mapping.place == Place::LOST {
                    self.report.lost_blocks += 1;
                } else if mapping.place != Place::NONE {
                    self.gather_block(&name, block, size_blocks, mapping);
                }
            }
            if self.gathered.len() >= GATHERED_MAX {
                self.read_gathered(reader, &name);
            }
        }
        self.read_gathered(reader, &name);
    }

    fn gather_block(&mut self, name: &str, block: u64, size_blocks: u64, mapping: Mapping) {
        self.report.data_blocks += 1;
        if block >= size_blocks {
            self.report.add(|| format!("volume {name}: block {block} lies past its end"));
        }
        if self.refer(mapping.place, || format!("volume {name}, block {block}")) {
            self.gathered.push(Gathered { mapping, block });
        }
    }

    /// Reads what was gathered, in runs as they lie in the pool.
    fn read_gathered(&mut self, reader: &mut impl PoolReader, name: &str) {
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.sort_unstable_by_key(|found| found.mapping.place.0);
        let mut rest = &gathered[..];
        while let Some(first) = rest.first() {
            let start = first.mapping.place.0;
            let mut end = start + 1;
            let in_run = rest.iter().take_while(|found| {
                let place = found.mapping.place.0;
                let goes_on = place.saturating_sub(end) <= GAP_BLOCKS_MAX && place - start < READ_BLOCKS_MAX;
                end = if goes_on { place + 1 } else { end };
                goes_on
            });
            let (run, others) = rest.split_at(in_run.count());
            self.read_run(reader, name, run, end - start);
            rest = others;
        }
        gathered.clear();
        self.gathered = gathered;
    }

    /// Reads the blocks of a run at once, or one by one if there is one that cannot be read.
    fn read_run(&mut self, reader: &mut impl PoolReader, name: &str, run: &[Gathered], blocks: u32) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(blocks as usize * BLOCK_BYTES_USIZE, 0);
        let start = run[0].mapping.place;
        let all_here = reader.read_at(start.offset_bytes(), &mut buffer);
        for Gathered { mapping, block } in run {
            let at = (mapping.place.0 - start.0) as usize * BLOCK_BYTES_USIZE;
            let bytes = &mut buffer[at..at + BLOCK_BYTES_USIZE];
            if !all_here && !reader.read_at(mapping.place.offset_bytes(), bytes) {
                self.report
                    .add(|| format!("volume {name}: block {block} cannot be read at {}", mapping.place.0));
            } else if crc32c(bytes) != mapping.crc {
                self.report.add(|| {
                    format!("volume {name}: block {block} has a wrong checksum at {}", mapping.place.0)
                });
            }
        }
        self.buffer = buffer;
    }

    /// Notes a reference. False if the place is outside the pool.
    fn refer(&mut self, place: Place, who: impl Fn() -> String) -> bool {
        let segment = self.layout.segment_of(place);
        let Some(live) = self.live.get_mut(segment.0 as usize) else {
            self.report.add(|| format!("{} refers to block {}, which is outside the pool", who(), place.0));
            return false;
        };
        *live += 1;
        let (word, bit) = (place.0 as usize / 64, 1 << (place.0 % 64));
        if self.referenced[word] & bit != 0 {
            self.report.add(|| format!("{} refers to block {}, which has another owner", who(), place.0));
        }
        self.referenced[word] |= bit;
        if self.layout.is_anchor(segment) {
            self.report.add(|| format!("{} refers to block {} in an anchor", who(), place.0));
        }
        true
    }
}
