//! A node gives up what it holds of a volume that has no replica here any more, and its pool has the space again.
//!
//! ```text
//!   record without this node ┐
//!   deleted                  ┴▶ the replica ends ─▶ nothing of it is under way ─▶ its lane takes the volume out ─▶ forgotten
//!                                                            a record that names this node again waits ──────────────▶ anew
//! ```
//!
//! Only what is known for certain counts: a record of the same lineage, and not of an epoch before one that this replica has
//! promised, or that the volume with this lineage was deleted. That nobody knows of a volume says nothing: the records may be
//! lost, or be others.

use super::{Replica, Shard, Work};
use crate::memory::Memory;
use crate::record::{Record, VolumeNumber};
use crate::request::{ExportIndex, RequestError};

/// A volume on its way out.
#[derive(Debug)]
pub(super) struct Departure {
    volume: VolumeNumber,
    /// Its replica here, which has ended. What a lane holds from an earlier process has none.
    replica: Option<usize>,
    /// Its lane has been asked to take it out.
    is_being_removed: bool,
    /// The last record that came since.
    record: Option<Box<Record>>,
}

impl<M: Memory> Shard<M> {
    /// Volumes that lanes have taken out since the process began.
    pub fn volumes_removed(&self) -> u64 {
        self.replication.volumes_removed
    }

    /// A record of a volume that is on its way out waits. One that is older than what made it go comes too late. True if this
    /// is either.
    pub(super) fn waits_for_departure(&mut self, record: &Record) -> bool {
        if self.replication.departed.get(&record.volume).is_some_and(|version| record.version <= *version) {
            return true;
        }
        let departures = &mut self.replication.departures;
        let Some(departure) = departures.iter_mut().find(|it| it.volume == record.volume) else {
            return false;
        };
        if departure.record.as_ref().is_none_or(|known| known.version < record.version) {
            departure.record = Some(Box::new(record.clone()));
        }
        true
    }

    /// What the record of a volume does not name this node for is given up, once the head here has let go of it.
    pub(super) fn depart_if_unnamed(&mut self, index: usize) {
        let node = self.replication.node();
        let Replica { head, departs, is_vacant, .. } = &self.replication.replicas[index];
        let is_free = !head.is_active() && !head.is_releasing();
        if *departs || *is_vacant || !is_free || self.replication.replicas[index].is_named(node) {
            return;
        }
        let record = self.replication.replicas[index].head.record().clone();
        self.depart_as_recorded(&record);
    }

    /// A record does not name this node.
    pub(super) fn depart_as_recorded(&mut self, record: &Record) {
        let Some((lane, position)) = self.position_of(record.volume) else {
            self.replication.departed.insert(record.volume, record.version);
            return;
        };
        let lane = &self.lanes[lane].lane;
        let is_it = lane.volumes()[position as usize].record.identity == record.lineage;
        if is_it && lane.promised(position) <= record.epoch {
            self.depart(record.volume, record.version);
        }
    }

    /// The volume was deleted.
    pub(in crate::engine::shard) fn handle_deletion(&mut self, volume: VolumeNumber, lineage: [u8; 16]) {
        if let Some(departure) = self.replication.departures.iter_mut().find(|it| it.volume == volume) {
            departure.record = None;
            self.replication.departed.insert(volume, u64::MAX);
            return;
        }
        let Some((lane, position)) = self.position_of(volume) else { return };
        if self.lanes[lane].lane.volumes()[position as usize].record.identity == lineage {
            self.depart(volume, u64::MAX);
        }
    }

    /// Lane and position of a volume that this node holds.
    fn position_of(&self, volume: VolumeNumber) -> Option<(usize, u32)> {
        let mut lanes = self.lanes.iter().enumerate();
        lanes.find_map(|(index, shard_lane)| Some((index, shard_lane.lane.volume_position(volume.0)?)))
    }

    fn depart(&mut self, volume: VolumeNumber, version: u64) {
        self.replication.departed.insert(volume, version);
        let replica = self.replication.find(volume);
        if let Some(index) = replica {
            self.replication.replicas[index].departs = true;
            let export = self.replication.replicas[index].served;
            self.exports.withdraw(ExportIndex(u32::try_from(export).expect("exports fit 32 bits")));
            self.fail_member(index);
            // Those who wait for a head here: none will come.
            for id in self.connections_of(export) {
                self.close(id);
            }
            let served = &self.served[self.replication.replicas[index].served];
            let position = served.volume;
            self.with_lane(served.lane, |lane, context| lane.leave_out(context, position));
        }
        let departure = Departure { volume, replica, is_being_removed: false, record: None };
        self.replication.departures.push(departure);
        self.progress = true;
    }

    /// Once per turn: lanes take out what nothing is under way of.
    pub(super) fn advance_departures(&mut self) {
        for index in 0..self.replication.departures.len() {
            let Departure { volume, replica, is_being_removed, .. } = self.replication.departures[index];
            if is_being_removed || self.draining || !replica.is_none_or(|replica| self.is_at_rest(replica)) {
                continue;
            }
            self.replication.departures[index].is_being_removed = true;
            let (lane, position) =
                self.position_of(volume).expect("it was there, and nobody else removes it");
            let cookie = self.begin_work(Work::Remove { volume });
            self.lanes[lane].lane.remove_volume(cookie, position);
        }
    }

    /// Is nothing under way of a replica that has ended?
    fn is_at_rest(&mut self, index: usize) -> bool {
        let Replica { served, head, contents, held, .. } = &self.replication.replicas[index];
        let served = *served;
        let export = u32::try_from(served).expect("exports fit 32 bits");
        !head.is_active()
            && !head.is_releasing()
            && contents.len() == 0
            && held.is_empty()
            && !self.replication.works.iter().any(|(_, work)| work.replica() == Some(index))
            && !self.tasks.iter().any(|(_, task)| task.export == export)
            && self.connections_of(served).is_empty()
    }

    /// A lane has taken a volume out, or could not.
    pub(super) fn finish_departure(&mut self, volume: VolumeNumber, result: Result<(), RequestError>) {
        let departures = &mut self.replication.departures;
        let index = departures.iter().position(|it| it.volume == volume).expect("it was on its way out");
        if let Err(error) = result {
            // It stays as it is, and known as such, until the next process tries again.
            self.replication.removals_failed += u64::from(error != RequestError::ShuttingDown);
            return;
        }
        let Departure { replica, record, .. } = departures.swap_remove(index);
        self.replication.volumes_removed += 1;
        if let Some(index) = replica {
            self.replication.replicas[index].is_vacant = true;
        }
        if let Some(record) = record {
            self.handle_record(*record);
        }
    }

    /// The process ends: what a lane has begun to take out is left for the next one.
    pub(super) fn stop_departures(&mut self) {
        for shard_lane in &mut self.lanes {
            shard_lane.lane.stop_removals();
        }
    }
}

impl Work {
    /// The replica that it is of.
    fn replica(&self) -> Option<usize> {
        match self {
            Work::Append { replica, .. }
            | Work::Promise { replica, .. }
            | Work::BeginFill { replica, .. }
            | Work::EndFill { replica, .. }
            | Work::Copy { replica, .. }
            | Work::CopyRead { replica, .. }
            | Work::Fetch { replica, .. }
            | Work::FindChanged { replica, .. }
            | Work::Compare { replica, .. }
            | Work::ReadForHead { replica, .. }
            | Work::Repair { replica, .. }
            | Work::Leaf { replica, .. }
            | Work::LookForNew { replica, .. }
            | Work::ListChanged { replica, .. }
            | Work::Check { replica, .. }
            | Work::CheckRepair { replica, .. }
            | Work::Mend { replica, .. } => Some(*replica),
            Work::Remove { .. } => None,
        }
    }
}
