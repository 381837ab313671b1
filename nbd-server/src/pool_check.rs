//! `berth pool check`: reads all that a pool holds and compares it with what the pool says of it. Writes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use datapath::checksum::crc32c;
use datapath::reactor::pool_file::PoolFile;
use datapath::store::bugs::Bugs;
use datapath::store::check::check_lane;
use datapath::store::layout::{ANCHORS, Layout};
use datapath::store::recovery::{PoolReader, Recovered, recover_lane};
use datapath::store::root::{Root, choose_root};
use datapath::store::segment::SegmentState;
use datapath::units::BLOCK_BYTES_USIZE;
use serde::Serialize;

use crate::pool_tools::{PoolToolError, SETTINGS, header_is_good, layout_of, read_root};
use crate::pools::Reader;

/// What the check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolCheck {
    /// Which pool.
    pub path: PathBuf,
    /// Volumes.
    pub volumes: u64,
    /// Blocks of volumes that hold data; each was read.
    pub data_blocks: u64,
    /// Leaves of maps; each was read.
    pub leaf_blocks: u64,
    /// Problems in all.
    pub problems: u64,
    /// The problems; of each lane the first ones.
    pub listed: Vec<String>,
    /// What a loss of power may leave behind, and the next start puts right.
    pub notes: Vec<String>,
}

impl PoolCheck {
    /// Is the pool sound?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems == 0
    }

    fn add(&mut self, problem: String) {
        self.problems += 1;
        self.listed.push(problem);
    }
}

/// Checks a pool.
///
/// # Errors
/// If it is in use, or is no pool. Everything else is a problem in the report.
pub fn check(path: &Path) -> Result<PoolCheck, PoolToolError> {
    let pool = PoolFile::open(path)?;
    let layout = layout_of(&pool)?;
    let mut report = PoolCheck { path: path.to_owned(), ..PoolCheck::default() };
    let mut reader = Reader(&pool);
    for anchor in 0..ANCHORS {
        if !header_is_good(&mut reader, &layout, anchor) {
            report.add(format!("copy {anchor} of the header is damaged"));
        }
    }
    let mut lanes = Vec::new();
    let cache_bytes = SETTINGS.map_cache.map_or(0, |size| size.bytes);
    for lane in 0..layout.lanes {
        check_roots(&mut reader, &layout, lane, &mut report);
        match recover_lane(&mut reader, layout, lane, cache_bytes, Bugs::none()) {
            Ok(mut recovered) => {
                let found = check_lane(&mut reader, &layout, &mut recovered);
                report.data_blocks += found.data_blocks;
                report.leaf_blocks += found.leaf_blocks;
                report.problems += found.problems;
                if found.lost_blocks > 0 {
                    report.add(format!(
                        "lane {lane}: {} blocks of volumes were damaged and given up; reading them is an error \
                         until they are written again",
                        found.lost_blocks
                    ));
                }
                report
                    .listed
                    .extend(found.listed.into_iter().map(|problem| format!("lane {lane}: {problem}")));
                lanes.push((lane, recovered));
            }
            Err(error) => report.add(error.to_string()),
        }
    }
    compare_lanes(&lanes, &mut report);
    Ok(report)
}

/// The four roots, and both copies of the checkpoint that the best of them names.
fn check_roots(reader: &mut Reader<'_>, layout: &Layout, lane: u32, report: &mut PoolCheck) {
    let slots: [Option<Root>; ANCHORS as usize] =
        std::array::from_fn(|slot| read_root(reader, layout, lane, u32::try_from(slot).expect("four")));
    // Without a root recovery has the same to say.
    let Some(root) = choose_root(slots.clone()) else { return };
    for (slot, found) in slots.iter().enumerate() {
        match found {
            Some(found) if *found == root => {}
            Some(found) => report.notes.push(format!(
                "lane {lane}: root {slot} states checkpoint {}, the others {}",
                found.checkpoint, root.checkpoint
            )),
            None => report.notes.push(format!("lane {lane}: root {slot} is damaged")),
        }
    }
    for copy in (0..2).filter(|_| root.body_bytes > 0) {
        if !body_is_good(reader, &root, copy) {
            report.add(format!("lane {lane}: copy {copy} of checkpoint {} is damaged", root.checkpoint));
        }
    }
}

fn body_is_good(reader: &mut Reader<'_>, root: &Root, copy: usize) -> bool {
    let mut bytes = Vec::new();
    for run in &root.body[copy] {
        let at = bytes.len();
        let length = run.blocks as usize * BLOCK_BYTES_USIZE;
        let end = run.place.offset_bytes().checked_add(length as u64);
        if end.is_none_or(|end| end > reader.len_bytes()) {
            return false;
        }
        bytes.resize(at + length, 0);
        if !reader.read_at(run.place.offset_bytes(), &mut bytes[at..]) {
            return false;
        }
    }
    let length = usize::try_from(root.body_bytes).unwrap_or(usize::MAX);
    bytes.get(..length).is_some_and(|body| crc32c(body) == root.body_crc)
}

/// What must be unique in the pool: the owner of a segment, a volume's name and its number.
fn compare_lanes(lanes: &[(u32, Recovered)], report: &mut PoolCheck) {
    let (mut owners, mut names, mut numbers) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (lane, recovered) in lanes {
        let table = &recovered.segments;
        for segment in table.indices().filter(|segment| table.state(*segment) != SegmentState::Foreign) {
            if let Some(other) = owners.insert(segment, *lane) {
                report.add(format!("segment {} belongs to lanes {other} and {lane}", segment.0));
            }
        }
        for record in &recovered.volumes {
            report.volumes += 1;
            if let Some(other) = names.insert(record.name.as_str(), *lane) {
                report.add(format!("lanes {other} and {lane} have a volume {}", record.name));
            }
            if let Some(other) = numbers.insert(record.number, record.name.as_str()) {
                report.add(format!("volumes {other} and {} have the number {}", record.name, record.number));
            }
        }
    }
}
