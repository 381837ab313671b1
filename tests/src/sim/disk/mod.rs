//! A virtual disk with a volatile cache, and everything that may go wrong with it.
//!
//! The model is as unkind as real devices are allowed to be:
//!
//! - Operations complete in any order, after random delays; a read overtaken by an overlapping write that is
//!   still in flight may see any part of it.
//! - A completed write is *unsynced* until a sync that was submitted after its completion has completed. A
//!   durable (FUA) write covers itself and nothing else.
//! - A **power cut** keeps any subset of the unsynced writes, later ones without earlier ones too, each of them
//!   possibly torn between sectors, and any part of what was in flight.
//! - A **kill** of the process keeps everything that completed, and any part of what was in flight.
//!
//! # What the store must survive, and what cannot be asked
//!
//! | fault | what must hold on a single replica |
//! |---|---|
//! | power cut, kill, reordering, tearing, stalls | every promise of the durability policy |
//! | a write, read or sync that reports an error | EIO (or a read-only volume) until a restart; nothing that was acknowledged and flushed is lost; after a failed sync what it covered may be |
//! | a flipped bit, but not where the disk itself does not say that the page had been flushed | EIO for what it holds, or a refusal to start; never wrong data, and all is well again once the bit is flipped back |
//! | a flipped bit in a younger page | *not asked*: the end of a log cannot be told from a torn write until a later synced batch proves that it was once whole |
//! | a lost or misdirected write | EIO, a refusal to start, or an older value that once was in the same place; never bytes that no client wrote there. More *cannot be asked* of one replica, which has no second witness |
//! | a kill whose in-flight writes reach the disk after the next start | *not asked*: the pool's lock is held by the file until the kernel has finished them |

mod image;
mod rot;

pub use image::Image;

use super::random::Random;
use datapath::engine::ports::DeviceError;
use std::ops::Range;

/// Smallest unit that a device writes as a whole.
pub const SECTOR_BYTES: usize = 512;

/// How a disk behaves during one life of the engine. Chances are per million operations.
#[derive(Clone, Debug)]
pub struct DiskFaults {
    /// Writes that report an error, and are applied in part.
    pub write_errors: u64,
    /// Reads that report an error.
    pub read_errors: u64,
    /// Syncs that report an error, and lose a part of what they covered.
    pub sync_errors: u64,
    /// Operations that take between 50 ms and 2 s.
    pub stalls: u64,
    /// Writes that report success and are dropped.
    pub lost_writes: u64,
    /// Writes that report success and land elsewhere.
    pub misdirected_writes: u64,
    /// Unit in which writes are torn: 512 or 4096 bytes.
    pub tear_bytes: usize,
    /// Longest delay of an operation that does not stall, in nanoseconds.
    pub delay_ns_max: u64,
}

impl DiskFaults {
    /// A disk without faults other than reordering, tearing and its volatile cache.
    #[must_use]
    pub fn none() -> DiskFaults {
        DiskFaults {
            write_errors: 0,
            read_errors: 0,
            sync_errors: 0,
            stalls: 0,
            lost_writes: 0,
            misdirected_writes: 0,
            tear_bytes: SECTOR_BYTES,
            delay_ns_max: 200_000,
        }
    }
}

/// What the disk did, for reports and for judging whether an error was deserved.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskCounts {
    /// Writes started.
    pub writes: u64,
    /// Bytes of these.
    pub written_bytes: u64,
    /// Reads started.
    pub reads: u64,
    /// Syncs started.
    pub syncs: u64,
    /// Errors reported.
    pub errors: u64,
    /// Syncs that failed and lost data.
    pub failed_syncs: u64,
    /// Lost and misdirected writes.
    pub lies: u64,
}

/// The disk's name for an operation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationIndex(pub usize);

#[derive(Debug)]
enum Operation {
    Read {
        offset_bytes: u64,
        len: usize,
    },
    Write {
        offset_bytes: u64,
        data: Vec<u8>,
        durable: bool,
    },
    /// Covers the first `covers` writes ever completed.
    Sync {
        covers: u64,
    },
}

/// A completed write that no sync has covered yet, or a part of one.
#[derive(Debug)]
struct Record {
    /// Its place in the order of completion.
    number: u64,
    offset_bytes: u64,
    data: Vec<u8>,
}

/// See the module's description.
#[derive(Debug)]
pub struct Disk {
    /// What a read sees.
    current: Image,
    /// What is left if power is cut and every unsynced write is lost.
    stable: Image,
    unsynced: Vec<Record>,
    completed: u64,
    operations: Vec<Option<Operation>>,
    /// Buffers for reuse.
    spare: Vec<Vec<u8>>,
    rot: rot::Rot,
    /// Behaviour from now on.
    pub faults: DiskFaults,
    /// What happened so far.
    pub counts: DiskCounts,
    random: Random,
}

impl Disk {
    /// A disk of `len_bytes` zeroes.
    #[must_use]
    pub fn new(len_bytes: u64, random: Random) -> Disk {
        Disk {
            current: Image::new(len_bytes),
            stable: Image::new(len_bytes),
            unsynced: Vec::new(),
            completed: 0,
            operations: Vec::new(),
            spare: Vec::new(),
            rot: rot::Rot::new(len_bytes),
            faults: DiskFaults::none(),
            counts: DiskCounts::default(),
            random,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.current.len_bytes()
    }

    /// Reads at once, as a store does before its engine runs.
    ///
    /// # Errors
    /// When the disk is told to fail reads and this is one of them.
    pub fn read_now(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<(), DeviceError> {
        self.counts.reads += 1;
        if self.random.per_million(self.faults.read_errors) {
            self.counts.errors += 1;
            return Err(DeviceError::Failed);
        }
        self.current.read(offset_bytes, target);
        Ok(())
    }

    /// Reads what a loss of power would leave if it took every write that no sync has covered.
    pub fn read_stable(&self, offset_bytes: u64, target: &mut [u8]) {
        self.stable.read(offset_bytes, target);
    }

    /// Writes at once and for good, as the formatting tool does.
    pub fn write_now(&mut self, offset_bytes: u64, source: &[u8]) {
        self.current.write(offset_bytes, source);
        self.stable.write(offset_bytes, source);
        self.rot.note_stable(offset_bytes, source.len());
    }

    /// Starts a read; it is done after the returned number of nanoseconds.
    pub fn start_read(&mut self, offset_bytes: u64, len: usize) -> (OperationIndex, u64) {
        self.counts.reads += 1;
        self.start(Operation::Read { offset_bytes, len })
    }

    /// Starts a write; it is done after the returned number of nanoseconds.
    pub fn start_write(&mut self, offset_bytes: u64, source: &[u8], durable: bool) -> (OperationIndex, u64) {
        self.counts.writes += 1;
        self.counts.written_bytes += source.len() as u64;
        let mut data = self.spare.pop().unwrap_or_default();
        data.clear();
        data.extend_from_slice(source);
        self.start(Operation::Write { offset_bytes, data, durable })
    }

    /// Starts a sync of everything that has completed; it is done after the returned number of nanoseconds.
    pub fn start_sync(&mut self) -> (OperationIndex, u64) {
        self.counts.syncs += 1;
        self.start(Operation::Sync { covers: self.completed })
    }

    /// Ends an operation. A read puts its bytes into `target`, which is empty for the others.
    ///
    /// # Errors
    /// As the faults of this life command.
    pub fn finish(&mut self, index: OperationIndex, target: &mut [u8]) -> Result<(), DeviceError> {
        let operation = self.operations[index.0].take().expect("the operation is under way");
        let chance = match operation {
            Operation::Read { .. } => self.faults.read_errors,
            Operation::Write { .. } => self.faults.write_errors,
            Operation::Sync { .. } => self.faults.sync_errors,
        };
        let failed = self.random.per_million(chance);
        match operation {
            Operation::Read { offset_bytes, len } => {
                assert_eq!(target.len(), len, "a read fills what it was given");
                self.finish_read(offset_bytes, target, failed);
            }
            Operation::Write { offset_bytes, data, durable } => {
                self.finish_write(offset_bytes, data, durable, failed);
            }
            Operation::Sync { covers } => self.finish_sync(covers, failed),
        }
        if failed {
            self.counts.errors += 1;
            return Err(DeviceError::Failed);
        }
        Ok(())
    }

    /// From now on nothing is reported to have failed, and nothing is slow or lies.
    pub fn end_faults(&mut self) {
        let DiskFaults { tear_bytes, delay_ns_max, .. } = self.faults;
        self.faults = DiskFaults { tear_bytes, delay_ns_max, ..DiskFaults::none() };
    }

    /// Power is lost, and comes back.
    pub fn cut_power(&mut self) {
        let mut records = std::mem::take(&mut self.unsynced);
        let completed = records.len();
        for operation in std::mem::take(&mut self.operations).into_iter().flatten() {
            if let Operation::Write { offset_bytes, data, .. } = operation {
                records.push(Record { number: 0, offset_bytes, data });
            }
        }
        // Some cuts find the cache all written, some find nothing of it written.
        let survival = *self.random.pick(&[0, 0, 10, 50, 90, 100, 100]);
        let torn = *self.random.pick(&[0, 20, 100]);
        for (position, record) in records.iter().enumerate() {
            let in_flight = position >= completed;
            let torn = if in_flight { 70 } else { torn };
            if self.random.percent(torn) {
                self.tear(record.offset_bytes, &record.data, |disk, at, part| disk.make_stable(at, part));
            } else if self.random.percent(survival) {
                self.make_stable(record.offset_bytes, &record.data);
            }
        }
        for record in records {
            self.current.copy_pages_from(&self.stable, record.offset_bytes, record.data.len());
            self.spare.push(record.data);
        }
    }

    /// The process is killed and its operations in flight end somehow. The disk keeps its power.
    pub fn kill(&mut self) {
        for operation in std::mem::take(&mut self.operations).into_iter().flatten() {
            if let Operation::Write { offset_bytes, data, .. } = operation {
                self.tear(offset_bytes, &data, Disk::apply);
                self.spare.push(data);
            }
        }
    }

    /// Flips up to `count` bits, each in a page that became stable some syncs ago and is not in one of the `fragile`
    /// ranges of bytes. Returns how many were flipped.
    pub fn flip_bits(&mut self, count: usize, fragile: &[Range<u64>]) -> usize {
        self.flip_bits_of(count, fragile, |_| true)
    }

    /// The same where `wanted` says so of the first byte of a page.
    pub fn flip_bits_of(
        &mut self,
        count: usize,
        fragile: &[Range<u64>],
        wanted: impl Fn(u64) -> bool,
    ) -> usize {
        let busy: Vec<(u64, usize)> =
            self.unsynced.iter().map(|record| (record.offset_bytes, record.data.len())).collect();
        let flips = self.rot.choose(&mut self.random, &self.stable, count, |page_start| {
            let page_end = page_start + image::PAGE_BYTES as u64;
            wanted(page_start)
                && fragile.iter().all(|range| page_end <= range.start || range.end <= page_start)
                && busy.iter().all(|(start, len)| page_end <= *start || start + *len as u64 <= page_start)
        });
        for (offset_bytes, bit) in &flips {
            self.current.flip(*offset_bytes, *bit);
            self.stable.flip(*offset_bytes, *bit);
        }
        flips.len()
    }

    /// Are there flipped bits that were not overwritten on stable media since?
    #[must_use]
    pub fn is_rotten(&self) -> bool {
        self.rot.is_present()
    }

    /// Flips the bits back that were not overwritten since.
    pub fn repair_rot(&mut self) {
        for (offset_bytes, bit) in self.rot.take() {
            self.stable.flip(offset_bytes, bit);
            let overwritten = self.unsynced.iter().any(|record| {
                (record.offset_bytes..record.offset_bytes + record.data.len() as u64).contains(&offset_bytes)
            });
            if !overwritten {
                self.current.flip(offset_bytes, bit);
            }
        }
    }

    fn start(&mut self, operation: Operation) -> (OperationIndex, u64) {
        let index = match self.operations.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.operations.push(None);
                self.operations.len() - 1
            }
        };
        self.operations[index] = Some(operation);
        (OperationIndex(index), self.draw_delay_ns())
    }

    fn draw_delay_ns(&mut self) -> u64 {
        if self.random.per_million(self.faults.stalls) {
            return self.random.range(50_000_000..=2_000_000_000);
        }
        if self.random.percent(2) {
            return self.random.range(0..=self.faults.delay_ns_max * 20);
        }
        self.random.range(2_000..=self.faults.delay_ns_max.max(2_000))
    }

    fn finish_read(&mut self, offset_bytes: u64, target: &mut [u8], failed: bool) {
        if failed {
            // A failed read may have transferred anything.
            self.random.fill(&mut target[..SECTOR_BYTES]);
            return;
        }
        self.current.read(offset_bytes, target);
        for operation in self.operations.iter().flatten() {
            let Operation::Write { offset_bytes: start, data, .. } = operation else { continue };
            if *start >= offset_bytes + target.len() as u64 || start + data.len() as u64 <= offset_bytes {
                continue;
            }
            for (at, sector) in (*start..).step_by(SECTOR_BYTES).zip(data.chunks(SECTOR_BYTES)) {
                let inside = at >= offset_bytes && at < offset_bytes + target.len() as u64;
                if inside && self.random.percent(50) {
                    let position = crate::to_usize(at - offset_bytes);
                    target[position..position + sector.len()].copy_from_slice(sector);
                }
            }
        }
    }

    fn finish_write(&mut self, offset_bytes: u64, data: Vec<u8>, durable: bool, failed: bool) {
        if failed {
            self.tear(offset_bytes, &data, Disk::apply);
        } else if self.random.per_million(self.faults.lost_writes) {
            self.counts.lies += 1;
        } else if self.random.per_million(self.faults.misdirected_writes) {
            self.counts.lies += 1;
            let places = (self.len_bytes() - data.len() as u64) / image::PAGE_BYTES as u64;
            let elsewhere = self.random.range(0..=places) * image::PAGE_BYTES as u64;
            self.apply(elsewhere, &data);
        } else if durable {
            self.sync_overlapping(offset_bytes, data.len());
            self.current.write(offset_bytes, &data);
            self.make_stable(offset_bytes, &data);
        } else {
            return self.apply_owned(offset_bytes, data);
        }
        self.spare.push(data);
    }

    fn finish_sync(&mut self, covers: u64, failed: bool) {
        let count = self.unsynced.partition_point(|record| record.number <= covers);
        let mut covered: Vec<Record> = self.unsynced.drain(..count).collect();
        if failed {
            self.counts.failed_syncs += 1;
            return self.lose_some(covered);
        }
        for record in &covered {
            self.make_stable(record.offset_bytes, &record.data);
        }
        if count > 0 {
            self.rot.note_sync();
        }
        self.spare.extend(covered.drain(..).map(|record| record.data));
    }

    /// After a failed sync a part of what it covered is gone, at once and without a word; the rest stays
    /// unsynced.
    fn lose_some(&mut self, covered: Vec<Record>) {
        let (lost, kept): (Vec<_>, Vec<_>) = covered.into_iter().partition(|_| self.random.percent(50));
        self.unsynced.splice(0..0, kept);
        for record in lost {
            self.current.copy_pages_from(&self.stable, record.offset_bytes, record.data.len());
            self.spare.push(record.data);
        }
        for record in &self.unsynced {
            self.current.write(record.offset_bytes, &record.data);
        }
    }

    /// A durable write must not be overwritten by older cached data when power is cut. The device may write
    /// such data out early at any time, so it does, with all that is older still: a record may only reach
    /// stable media before those that it overwrote if these are dropped.
    fn sync_overlapping(&mut self, offset_bytes: u64, len: usize) {
        let end = offset_bytes + len as u64;
        let overlaps = |record: &Record| {
            record.offset_bytes < end && offset_bytes < record.offset_bytes + record.data.len() as u64
        };
        let count = self.unsynced.iter().rposition(overlaps).map_or(0, |position| position + 1);
        for record in self.unsynced.drain(..count).collect::<Vec<_>>() {
            self.make_stable(record.offset_bytes, &record.data);
            self.spare.push(record.data);
        }
    }

    fn apply(&mut self, offset_bytes: u64, source: &[u8]) {
        let mut data = self.spare.pop().unwrap_or_default();
        data.clear();
        data.extend_from_slice(source);
        self.apply_owned(offset_bytes, data);
    }

    fn apply_owned(&mut self, offset_bytes: u64, data: Vec<u8>) {
        self.completed += 1;
        self.current.write(offset_bytes, &data);
        self.unsynced.push(Record { number: self.completed, offset_bytes, data });
    }

    fn make_stable(&mut self, offset_bytes: u64, data: &[u8]) {
        self.stable.write(offset_bytes, data);
        self.rot.note_stable(offset_bytes, data.len());
    }

    /// Applies any part of a write: none, a head, a tail, or scattered sectors.
    fn tear(&mut self, offset_bytes: u64, data: &[u8], apply: fn(&mut Disk, u64, &[u8])) {
        let unit = self.faults.tear_bytes;
        let units = data.len().div_ceil(unit);
        let cut = self.random.index(units + 1);
        let style = self.random.below(4);
        for (number, part) in data.chunks(unit).enumerate() {
            let keep = match style {
                0 => false,
                1 => number < cut,
                2 => number >= cut,
                _ => self.random.percent(50),
            };
            if keep {
                apply(self, offset_bytes + (number * unit) as u64, part);
            }
        }
    }
}

#[cfg(test)]
mod tests;
