//! Knows every change of a volume and checks every sector that is read back.
//!
//! Each 512-byte sector of a write carries (seed, sector, version) and a pattern made of the three, so a sector
//! tells which write it came from, and a torn or misplaced one is recognised. For each sector the verifier keeps
//! the versions that may be read now. Requests may overlap in time and in place:
//!
//! ```text
//!   submitted ──────── answered                    a change may be visible from its submission on;
//!        │  running        │  done                 once it is done, all that had ended before it was
//!                                                  submitted is superseded
//!   read of version v, started at r:               all that had ended before r or before v was submitted
//!                                                  is superseded: no later read may return it
//!   flush started at f, answered:                  changes done before f are durable; what one of them
//!                                                  supersedes is dead: not even a loss of power revives it
//! ```
//!
//! A crash turns running changes into lost ones, which may have happened or not; the next read of the sector
//! decides, once and for all. A loss of power also revives what is superseded but not dead. Where only the process
//! dies ([`Loss::Kill`]) an answer is as good as a flush, and every change done counts as durable.

mod sector;
mod state;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub(super) use sector::fill;
use sector::{Found, decode};

/// Bytes in a sector: the unit of verification, and the smallest unit that storage writes without tearing.
pub(super) const SECTOR_BYTES: u64 = 512;
const SECTOR_LEN: usize = 512;
/// What a server may round a trim to; it is advice (NBD protocol, NBD_CMD_TRIM).
const TRIM_BLOCK_SECTORS: u64 = 8;
const NEVER: u64 = u64::MAX;
/// The version of a sector that reads as zeroes: never written, or trimmed.
const ZEROES: u64 = 0;

/// What a broken connection means for changes that were answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Loss {
    /// The process died and its machine did not: nothing answered is lost.
    Kill,
    /// The power went: what was neither flushed nor FUA may be lost.
    PowerCut,
}

/// A change that was submitted and has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Names the change; unique in the volume's life.
    pub version: u64,
    /// First sector concerned.
    pub first_sector: u64,
    /// Number of sectors.
    pub sector_count: u64,
    zeroes: bool,
}

/// A trim that was submitted and has not ended: its whole blocks, which are to read as zeroes, and the parts of blocks
/// at its ends, which the server may leave as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    whole: Option<Change>,
    edges: [Option<Change>; 2],
}

/// A read that was submitted and has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReadMark(u64);

/// A flush that was submitted and has not ended.
#[derive(Clone, Copy, Debug)]
pub struct FlushMark(u64);

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server said that it is done; FUA makes it durable at once.
    Done {
        /// FUA was asked for.
        durable: bool,
    },
    /// The server said that it failed: any part of it may have happened.
    Failed,
}

/// A sector that holds what it must not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Which sector of the volume.
    pub sector: u64,
    /// What was read, in words.
    pub found: String,
    /// What would have been right, in words.
    pub allowed: String,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sector {}: found {}, allowed {}", self.sector, self.found, self.allowed)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Running,
    Done(u64),
    Lost(u64),
}

/// One version that a sector may hold. The numbers are moments of the verifier's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    version: u64,
    zeroes: bool,
    durable: bool,
    submitted: u64,
    stage: Stage,
    superseded: u64,
    dead: u64,
}

impl Candidate {
    fn settled(version: u64) -> Candidate {
        Candidate {
            version,
            zeroes: version == ZEROES,
            durable: true,
            submitted: 0,
            stage: Stage::Done(0),
            superseded: NEVER,
            dead: NEVER,
        }
    }

    fn ended_before(&self, moment: u64) -> bool {
        match self.stage {
            Stage::Running => false,
            Stage::Done(at) | Stage::Lost(at) => at < moment,
        }
    }

    fn holds(&self, found: Found) -> bool {
        match found {
            Found::Zeroes => self.zeroes,
            Found::Version(version) => !self.zeroes && self.version == version,
            Found::Foreign(_) => false,
        }
    }
}

/// All that may be on one volume.
#[derive(Debug, PartialEq, Eq)]
pub struct Verifier {
    seed: u64,
    loss: Loss,
    clock: u64,
    next_version: u64,
    /// The only version a sector may hold, where `open` says nothing else.
    settled: Vec<u64>,
    open: BTreeMap<u64, Vec<Candidate>>,
    /// Changes done and not yet durable, in the order of their answers.
    unflushed: VecDeque<(u64, Change)>,
    reads: BTreeSet<ReadMark>,
    sectors_checked: u64,
}

impl Verifier {
    /// A volume of this size that reads as zeroes everywhere. The seed tells volumes apart; `loss` is what its
    /// server may go through.
    #[must_use]
    pub fn new(size_bytes: u64, seed: u64, loss: Loss) -> Verifier {
        let sectors = usize::try_from(size_bytes / SECTOR_BYTES).expect("volume fits the address space");
        Verifier {
            seed,
            loss,
            clock: 1,
            next_version: 1,
            settled: vec![ZEROES; sectors],
            open: BTreeMap::new(),
            unflushed: VecDeque::new(),
            reads: BTreeSet::new(),
            sectors_checked: 0,
        }
    }

    /// What the volume's server may go through.
    #[must_use]
    pub fn loss(&self) -> Loss {
        self.loss
    }

    /// Seed that the sectors carry.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Sectors that the volume had when it was first seen.
    #[must_use]
    pub fn sector_count(&self) -> u64 {
        self.settled.len() as u64
    }

    /// Sectors compared so far, in this process.
    #[must_use]
    pub fn sectors_checked(&self) -> u64 {
        self.sectors_checked
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write (or, with `zeroes`, a trim or a write of zeroes) is about to be sent.
    pub fn begin_change(&mut self, first_sector: u64, sector_count: u64, zeroes: bool) -> Change {
        assert!(first_sector + sector_count <= self.sector_count(), "change leaves the volume");
        let change = Change { version: self.next_version, first_sector, sector_count, zeroes };
        self.next_version += 1;
        let candidate = Candidate {
            version: change.version,
            zeroes,
            durable: false,
            submitted: self.tick(),
            stage: Stage::Running,
            superseded: NEVER,
            dead: NEVER,
        };
        for sector in first_sector..first_sector + sector_count {
            let settled = self.settled[index(sector)];
            self.open.entry(sector).or_insert_with(|| vec![Candidate::settled(settled)]).push(candidate);
        }
        change
    }

    /// The answer to a change has come.
    pub fn finish_change(&mut self, change: Change, outcome: Outcome) {
        let now = self.tick();
        let durable = outcome == Outcome::Done { durable: true } || self.loss == Loss::Kill;
        for sector in change.first_sector..change.first_sector + change.sector_count {
            let list = self.open.get_mut(&sector).expect("a running change is a candidate");
            let own = position(list, change.version).expect("a running change is a candidate");
            if outcome == Outcome::Failed {
                list[own].stage = Stage::Lost(now);
                continue;
            }
            list[own].stage = Stage::Done(now);
            list[own].durable = durable;
            let submitted = list[own].submitted;
            supersede(list, own, now, |other| other.ended_before(submitted));
            self.tidy(sector);
        }
        if outcome != Outcome::Failed && !durable {
            self.unflushed.push_back((now, change));
        }
    }

    /// A trim is about to be sent.
    pub fn begin_trim(&mut self, first_sector: u64, sector_count: u64) -> Trim {
        let end = first_sector + sector_count;
        let whole_start = first_sector.next_multiple_of(TRIM_BLOCK_SECTORS).min(end);
        let whole_end = (end / TRIM_BLOCK_SECTORS * TRIM_BLOCK_SECTORS).max(whole_start);
        let mut part = |from, to| (from < to).then(|| self.begin_change(from, to - from, true));
        Trim {
            edges: [part(first_sector, whole_start), part(whole_end, end)],
            whole: part(whole_start, whole_end),
        }
    }

    /// The answer to a trim has come.
    pub fn finish_trim(&mut self, trim: Trim, outcome: Outcome) {
        trim.whole.into_iter().for_each(|change| self.finish_change(change, outcome));
        // As after a failure, both what was there and zeroes are right, until a read has decided.
        trim.edges.into_iter().flatten().for_each(|change| self.finish_change(change, Outcome::Failed));
    }

    /// A flush is about to be sent.
    pub fn begin_flush(&mut self) -> FlushMark {
        FlushMark(self.tick())
    }

    /// The flush was answered with success: all that was done when it was sent is durable.
    pub fn finish_flush(&mut self, mark: FlushMark) {
        let now = self.tick();
        while let Some(&(done, change)) = self.unflushed.front()
            && done < mark.0
        {
            self.unflushed.pop_front();
            for sector in change.first_sector..change.first_sector + change.sector_count {
                let Some(list) = self.open.get_mut(&sector) else { continue };
                let Some(own) = position(list, change.version) else { continue };
                list[own].durable = true;
                let submitted = list[own].submitted;
                supersede(list, own, now, |other| other.ended_before(submitted));
                self.tidy(sector);
            }
        }
    }

    /// A read is about to be sent.
    pub fn begin_read(&mut self) -> ReadMark {
        let mark = ReadMark(self.tick());
        self.reads.insert(mark);
        mark
    }

    /// The read ended without data.
    pub fn abandon_read(&mut self, mark: ReadMark) {
        assert!(self.reads.remove(&mark), "a read ends once");
    }

    /// The read returned `data`, whole sectors from `first_sector` on. Hands back what is wrong with them.
    pub fn finish_read(&mut self, mark: ReadMark, first_sector: u64, data: &[u8]) -> Vec<Mismatch> {
        let mut wrong = Vec::new();
        let now = self.tick();
        for (sector, bytes) in (first_sector..).zip(data.chunks_exact(SECTOR_LEN)) {
            self.sectors_checked += 1;
            let found = decode(bytes, self.seed, sector);
            if !self.check_sector(sector, found, mark, now) {
                wrong.push(self.mismatch(sector, found, mark));
            }
        }
        assert!(self.reads.remove(&mark), "a read ends once");
        wrong
    }

    fn check_sector(&mut self, sector: u64, found: Found, mark: ReadMark, now: u64) -> bool {
        let Some(list) = self.open.get_mut(&sector) else {
            return Candidate::settled(self.settled[index(sector)]).holds(found);
        };
        let mut matching = (0..list.len()).filter(|&i| list[i].superseded > mark.0 && list[i].holds(found));
        let Some(own) = matching.next() else { return false };
        // Two changes to zeroes cannot be told apart, so such a read proves nothing about their order.
        if matching.next().is_some() {
            return true;
        }
        if matches!(list[own].stage, Stage::Lost(_)) {
            // The lost change did happen. From here on it is like any answered one.
            list[own].stage = Stage::Done(now);
            list[own].durable = self.loss == Loss::Kill;
            let Candidate { version, zeroes, .. } = list[own];
            self.unflushed
                .push_back((now, Change { version, first_sector: sector, sector_count: 1, zeroes }));
        }
        let submitted = list[own].submitted;
        supersede(list, own, now, |other| other.ended_before(submitted.max(mark.0)));
        self.tidy(sector);
        true
    }

    /// The server is gone and every connection to it is closed.
    pub fn crashed(&mut self) {
        let now = self.tick();
        let power_cut = self.loss == Loss::PowerCut;
        self.reads.clear();
        if power_cut {
            self.unflushed.clear();
        }
        for list in self.open.values_mut() {
            for candidate in list.iter_mut() {
                let maybe_gone = match candidate.stage {
                    Stage::Running => true,
                    Stage::Done(_) => power_cut && !candidate.durable,
                    Stage::Lost(_) => false,
                };
                if maybe_gone {
                    candidate.stage = Stage::Lost(now);
                }
                if power_cut {
                    candidate.superseded = candidate.dead;
                }
            }
            list.retain(|candidate| candidate.dead == NEVER);
        }
    }

    /// Forgets candidates that no read, not even one under way, may return; settles a sector with only one.
    fn tidy(&mut self, sector: u64) {
        let oldest_read = self.reads.first().map_or(NEVER, |mark| mark.0);
        let list = self.open.get_mut(&sector).expect("tidied sectors are open");
        list.retain(|candidate| candidate.dead == NEVER || candidate.dead > oldest_read);
        if let [only] = list[..]
            && only.durable
            && matches!(only.stage, Stage::Done(_))
            && only.superseded == NEVER
        {
            self.settled[index(sector)] = if only.zeroes { ZEROES } else { only.version };
            self.open.remove(&sector);
        }
    }

    fn mismatch(&self, sector: u64, found: Found, mark: ReadMark) -> Mismatch {
        let name = |version: u64, zeroes: bool| {
            if zeroes { format!("zeroes (change {version})") } else { format!("version {version}") }
        };
        let allowed = match self.open.get(&sector) {
            None => name(self.settled[index(sector)], self.settled[index(sector)] == ZEROES),
            Some(list) => list
                .iter()
                .filter(|candidate| candidate.superseded > mark.0)
                .map(|candidate| {
                    let durable = if candidate.durable { ", durable" } else { "" };
                    format!("{} ({:?}{durable})", name(candidate.version, candidate.zeroes), candidate.stage)
                })
                .collect::<Vec<_>>()
                .join(" or "),
        };
        let found = match found {
            Found::Zeroes => "zeroes".to_owned(),
            Found::Version(version) if version >= self.next_version => {
                format!("version {version}, which was never written")
            }
            Found::Version(version) => format!("version {version}, which may not come back"),
            Found::Foreign(why) => why.to_owned(),
        };
        Mismatch { sector, found, allowed }
    }
}

/// Marks as superseded by `list[own]` every other candidate that `older` picks; as dead if that one is durable.
fn supersede(list: &mut [Candidate], own: usize, now: u64, older: impl Fn(&Candidate) -> bool) {
    let durable = list[own].durable;
    for (i, other) in list.iter_mut().enumerate() {
        if i != own && older(other) {
            other.superseded = other.superseded.min(now);
            if durable {
                other.dead = other.dead.min(now);
            }
        }
    }
}

fn position(list: &[Candidate], version: u64) -> Option<usize> {
    list.iter().position(|candidate| candidate.version == version)
}

fn index(sector: u64) -> usize {
    usize::try_from(sector).expect("volume fits the address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 7;
    const DONE: Outcome = Outcome::Done { durable: false };
    const FUA: Outcome = Outcome::Done { durable: true };

    fn volume() -> Verifier {
        Verifier::new(8 * SECTOR_BYTES, SEED, Loss::PowerCut)
    }

    fn sector_of(change: Change, sector: u64) -> Vec<u8> {
        let mut payload = vec![0; SECTOR_LEN * usize::try_from(change.sector_count).unwrap()];
        fill(SEED, change, &mut payload);
        let skip = SECTOR_LEN * usize::try_from(sector - change.first_sector).unwrap();
        payload[skip..skip + SECTOR_LEN].to_vec()
    }

    fn reads(verifier: &mut Verifier, sector: u64, bytes: &[u8]) -> bool {
        let mark = verifier.begin_read();
        verifier.finish_read(mark, sector, bytes).is_empty()
    }

    fn written(verifier: &mut Verifier, outcome: Outcome) -> Vec<u8> {
        let change = verifier.begin_change(3, 2, false);
        verifier.finish_change(change, outcome);
        sector_of(change, 3)
    }

    #[test]
    fn a_sector_reads_its_last_write_and_nothing_else() {
        let mut verifier = volume();
        assert!(reads(&mut verifier, 3, &[0; SECTOR_LEN]));
        let old = written(&mut verifier, DONE);
        let new = written(&mut verifier, DONE);
        assert!(reads(&mut verifier, 3, &new));
        assert!(!reads(&mut verifier, 3, &old), "superseded");
        assert!(!reads(&mut verifier, 3, &[0; SECTOR_LEN]), "lost");
        assert!(!reads(&mut verifier, 2, &new), "misplaced");
        let mut torn = new.clone();
        torn[256..].copy_from_slice(&old[256..]);
        assert!(!reads(&mut verifier, 3, &torn), "torn");
        let flush = verifier.begin_flush();
        verifier.finish_flush(flush);
        assert!(reads(&mut verifier, 3, &new));
        assert!(verifier.open.is_empty(), "flushed sectors settle");
    }

    #[test]
    fn overlapping_writes_may_end_either_way_but_only_once() {
        for winner in [0, 1] {
            let mut verifier = volume();
            let changes = [verifier.begin_change(0, 4, false), verifier.begin_change(2, 4, false)];
            verifier.finish_change(changes[1], DONE);
            verifier.finish_change(changes[0], DONE);
            assert!(reads(&mut verifier, 2, &sector_of(changes[winner], 2)));
            assert!(!reads(&mut verifier, 2, &sector_of(changes[1 - winner], 2)), "the order is fixed now");
        }
    }

    #[test]
    fn a_read_under_way_may_return_the_old_version_a_later_one_not() {
        let mut verifier = volume();
        let old = written(&mut verifier, FUA);
        let early = verifier.begin_read();
        let new = written(&mut verifier, FUA);
        let late = verifier.begin_read();
        assert!(!verifier.finish_read(late, 3, &old).is_empty());
        assert!(verifier.finish_read(early, 3, &old).is_empty());
        assert!(reads(&mut verifier, 3, &new));
    }

    #[test]
    fn a_running_write_that_was_seen_stays() {
        let mut verifier = volume();
        let old = written(&mut verifier, DONE);
        let running = verifier.begin_change(3, 1, false);
        assert!(reads(&mut verifier, 3, &old));
        assert!(reads(&mut verifier, 3, &sector_of(running, 3)));
        assert!(!reads(&mut verifier, 3, &old));
    }

    #[test]
    fn a_kill_loses_nothing_answered_and_decides_the_rest_once() {
        let mut verifier = Verifier::new(8 * SECTOR_BYTES, SEED, Loss::Kill);
        let old = written(&mut verifier, DONE);
        let new = written(&mut verifier, DONE);
        let running = verifier.begin_change(3, 1, false);
        verifier.crashed();
        assert!(!reads(&mut verifier, 3, &old));
        assert!(reads(&mut verifier, 3, &new));
        assert!(!reads(&mut verifier, 3, &sector_of(running, 3)), "it was seen not to have happened");

        let running = verifier.begin_change(3, 1, false);
        verifier.crashed();
        assert!(reads(&mut verifier, 3, &sector_of(running, 3)));
        assert!(!reads(&mut verifier, 3, &new), "it was seen to have happened");
    }

    #[test]
    fn a_power_cut_may_lose_what_was_not_flushed_and_nothing_more() {
        let setup = || {
            let mut verifier = volume();
            let dead = written(&mut verifier, DONE);
            let flushed = written(&mut verifier, DONE);
            let flush = verifier.begin_flush();
            let late = written(&mut verifier, DONE);
            verifier.finish_flush(flush);
            assert!(reads(&mut verifier, 3, &late));
            verifier.crashed();
            (verifier, dead, flushed, late)
        };
        let (mut verifier, dead, flushed, late) = setup();
        assert!(!reads(&mut verifier, 3, &dead));
        assert!(!reads(&mut verifier, 3, &[0; SECTOR_LEN]));
        assert!(reads(&mut verifier, 3, &flushed));
        assert!(!reads(&mut verifier, 3, &late), "it was seen to be gone");
        let (mut verifier, _, flushed, late) = setup();
        assert!(reads(&mut verifier, 3, &late));
        assert!(!reads(&mut verifier, 3, &flushed));
    }

    #[test]
    fn fua_survives_a_power_cut_by_itself() {
        let mut verifier = volume();
        let old = written(&mut verifier, DONE);
        let new = written(&mut verifier, FUA);
        verifier.crashed();
        assert!(!reads(&mut verifier, 3, &old));
        assert!(reads(&mut verifier, 3, &new));
    }

    #[test]
    fn a_trim_reads_zeroes_and_a_failed_write_may_be_anywhere() {
        let mut verifier = volume();
        let old = written(&mut verifier, DONE);
        let trim = verifier.begin_change(3, 1, true);
        verifier.finish_change(trim, DONE);
        assert!(!reads(&mut verifier, 3, &old));
        assert!(reads(&mut verifier, 3, &[0; SECTOR_LEN]));
        let failed = verifier.begin_change(3, 1, false);
        verifier.finish_change(failed, Outcome::Failed);
        assert!(reads(&mut verifier, 3, &sector_of(failed, 3)));
        assert!(!reads(&mut verifier, 3, &[0; SECTOR_LEN]));
    }

    #[test]
    fn the_edges_of_a_trim_may_stay_until_a_read_has_decided() {
        let mut verifier = Verifier::new(16 * SECTOR_BYTES, SEED, Loss::Kill);
        let change = verifier.begin_change(0, 16, false);
        verifier.finish_change(change, DONE);
        let trim = verifier.begin_trim(3, 10);
        verifier.finish_trim(trim, DONE);
        assert!(reads(&mut verifier, 3, &sector_of(change, 3)));
        assert!(!reads(&mut verifier, 3, &[0; SECTOR_LEN]), "it was seen to be there");
        assert!(reads(&mut verifier, 7, &[0; SECTOR_LEN]));
        assert!(!reads(&mut verifier, 7, &sector_of(change, 7)), "it was seen to be gone");
        let inside = verifier.begin_trim(8, 8);
        verifier.finish_trim(inside, DONE);
        assert!(!reads(&mut verifier, 8, &sector_of(change, 8)), "whole blocks read as zeroes");
    }

    #[test]
    fn the_state_survives_a_file_and_a_damaged_file_is_refused() {
        let mut verifier = volume();
        written(&mut verifier, FUA);
        written(&mut verifier, DONE);
        verifier.begin_change(0, 8, true);
        let mut file = Vec::new();
        verifier.save(&mut file).unwrap();
        let loaded = Verifier::load(&mut &file[..]).unwrap();
        verifier.crashed();
        assert_eq!(loaded, verifier);
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 0x10;
            assert!(Verifier::load(&mut &damaged[..]).is_err(), "byte {at}");
            assert!(Verifier::load(&mut &file[..at]).is_err(), "length {at}");
        }
    }
}
