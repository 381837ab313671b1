//! Records in one file, by redb: for a single ctl.
//!
//! | table | key | value |
//! |---|---|---|
//! | `volumes` | number | `berth.v1.Record` |
//! | `volume_names` | name | number |
//! | `passes` | number of a volume | `berth.v1.CheckState` |
//! | `nodes` | number | `berth.v1.Node` |
//! | `node_names` | name | number |
//! | `numbers` | `format`, `node`, `volume` | format of the file; the last number that was given |

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use datapath::record::{NodeId, Record, VolumeNumber};
use nbd_server::control::convert::{
    NodeInfo, PassHistory, history_from_message, history_to_message, node_from_message, node_to_message,
    record_from_message, record_to_message,
};
use nbd_server::control::limits::{NODES_MAX, VOLUMES_MAX};
use nbd_server::control::proto;
use nbd_server::node_name::NodeName;
use prost::Message;
use redb::backends::FileBackend;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table, TableDefinition,
    WriteTransaction,
};
use thiserror::Error;

use super::rules::{RuleError, check_new_volume, check_succession};
use super::{Change, DamageError, Joining, Listener, NewVolume, RecordStore, StoreError, VolumeKey};

const VOLUMES: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("volumes");
const VOLUME_NAMES: TableDefinition<'_, &str, u32> = TableDefinition::new("volume_names");
const DELETED: TableDefinition<'_, u32, &[u8; 16]> = TableDefinition::new("deleted");
const PASSES: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("passes");
const NODES: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("nodes");
const NODE_NAMES: TableDefinition<'_, &str, u32> = TableDefinition::new("node_names");
const NUMBERS: TableDefinition<'_, &str, u32> = TableDefinition::new("numbers");

/// The only format there is.
const FORMAT: u32 = 1;
/// Records are small, and the service keeps them in memory itself.
const CACHE_BYTES: usize = 16 << 20;
/// The file names volumes and nodes: the owner's business.
const FILE_MODE: u32 = 0o600;

/// A file of records. One process has it open.
pub struct RedbStore {
    database: Database,
    /// Held from the beginning of a change until the listener has been told of it, so that it is told in order.
    listener: Mutex<Option<Listener>>,
}

impl std::fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedbStore").finish_non_exhaustive()
    }
}

/// Why a file cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("{0}: another `berth ctl` has it open; stop that one, or give --store another file")]
    InUse(PathBuf),
    /// Written by a version that is not this one.
    #[error("{path}: format {found}, and this berth knows format {FORMAT} only")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The file, or its folder.
    #[error("{path}: cannot open the record store: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Any of redb's errors.
fn backend(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Backend(Box::new(error.into()))
}

impl RedbStore {
    /// Opens the file, made with its folder if there is none.
    ///
    /// # Errors
    /// If another process has it open, or it is not a record store.
    pub fn open(path: &Path) -> Result<RedbStore, OpenError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Open {
            path: path.to_owned(),
            source,
        };
        let file = open_file(path).map_err(|error| failed(error.into()))?;
        let made = FileBackend::new(file)
            .and_then(|file| Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(file));
        let database = match made {
            Ok(database) => database,
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => return Err(OpenError::InUse(path.to_owned())),
            Err(error) => return Err(failed(error.into())),
        };
        let store = RedbStore { database, listener: Mutex::new(None) };
        match store.prepare().map_err(|error| failed(error.into()))? {
            FORMAT => Ok(store),
            found => Err(OpenError::Format { path: path.to_owned(), found }),
        }
    }

    /// Makes the tables of a new file. Returns the format.
    fn prepare(&self) -> Result<u32, StoreError> {
        let write = self.begin()?;
        let format = {
            let mut numbers = write.open_table(NUMBERS).map_err(backend)?;
            let known = numbers.get("format").map_err(backend)?.map(|format| format.value());
            if known.is_none() {
                numbers.insert("format", FORMAT).map_err(backend)?;
            }
            known.unwrap_or(FORMAT)
        };
        if format == FORMAT {
            write.open_table(VOLUMES).map_err(backend)?;
            write.open_table(VOLUME_NAMES).map_err(backend)?;
            write.open_table(PASSES).map_err(backend)?;
            write.open_table(DELETED).map_err(backend)?;
            write.open_table(NODES).map_err(backend)?;
            write.open_table(NODE_NAMES).map_err(backend)?;
            write.commit().map_err(backend)?;
        }
        Ok(format)
    }

    /// A change that is on stable media when its commit returns.
    fn begin(&self) -> Result<WriteTransaction, StoreError> {
        let mut write = self.database.begin_write().map_err(backend)?;
        write.set_durability(Durability::Immediate).map_err(|error| StoreError::Backend(Box::new(error)))?;
        Ok(write)
    }

    /// Nothing that is guarded can be left half done: a panic ends the process.
    fn lock(&self) -> MutexGuard<'_, Option<Listener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits, then tells the listener.
    fn commit(
        write: WriteTransaction,
        listener: &MutexGuard<'_, Option<Listener>>,
        change: impl FnOnce() -> Change,
    ) -> Result<(), StoreError> {
        write.commit().map_err(backend)?;
        if let Some(listener) = &**listener {
            listener(change());
        }
        Ok(())
    }
}

/// The file, with its name on stable media: a record must not get lost with the file that it is in.
fn open_file(path: &Path) -> std::io::Result<File> {
    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(folder)?;
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(FILE_MODE).open(path)?;
    File::open(folder)?.sync_all()?;
    Ok(file)
}

impl RecordStore for RedbStore {
    fn get(&self, key: &VolumeKey) -> Result<Record, StoreError> {
        let read = self.database.begin_read().map_err(backend)?;
        let names = read.open_table(VOLUME_NAMES).map_err(backend)?;
        let volumes = read.open_table(VOLUMES).map_err(backend)?;
        find(&names, &volumes, key)
    }

    fn list(&self, after: VolumeNumber, most: usize) -> Result<Vec<Record>, StoreError> {
        let read = self.database.begin_read().map_err(backend)?;
        let volumes = read.open_table(VOLUMES).map_err(backend)?;
        let Some(first) = after.0.checked_add(1) else { return Ok(Vec::new()) };
        let range = volumes.range(first..).map_err(backend)?;
        range
            .take(most)
            .map(|entry| {
                let (number, bytes) = entry.map_err(backend)?;
                decode_record(number.value(), bytes.value())
            })
            .collect()
    }

    fn compare_and_swap(&self, expected: u64, record: &Record) -> Result<(), StoreError> {
        let listener = self.lock();
        let write = self.begin()?;
        {
            let mut volumes = write.open_table(VOLUMES).map_err(backend)?;
            let current = find_number(&volumes, record.volume)?;
            if current.version != expected {
                return Err(StoreError::Conflict(Box::new(current)));
            }
            check_succession(&current, record)?;
            put_record(&mut volumes, record)?;
        }
        Self::commit(write, &listener, || Change::Record(Box::new(record.clone())))
    }

    fn create(&self, volume: &NewVolume) -> Result<Record, StoreError> {
        let listener = self.lock();
        let write = self.begin()?;
        let record = {
            let mut names = write.open_table(VOLUME_NAMES).map_err(backend)?;
            if names.get(volume.name.as_str()).map_err(backend)?.is_some() {
                return Err(StoreError::VolumeExists(volume.name.clone()));
            }
            check_room(names.len().map_err(backend)?, VOLUMES_MAX, "volumes")?;
            let node_names = write.open_table(NODE_NAMES).map_err(backend)?;
            let find_node = |name: &NodeName| {
                let number = node_names.get(name.as_str()).map_err(backend)?;
                Ok(number.map(|number| NodeId(number.value())))
            };
            let nodes = check_new_volume(volume, find_node)?;
            let number = VolumeNumber(next_number(&write, "volume")?);
            let mut record =
                Record::new(number, volume.name.as_str(), volume.lineage, volume.size_blocks, &nodes);
            record.min_in_sync = volume.min_in_sync.unwrap_or(record.min_in_sync);
            nbd_server::control::convert::check_record(&record).map_err(RuleError::from)?;
            names.insert(volume.name.as_str(), number.0).map_err(backend)?;
            put_record(&mut write.open_table(VOLUMES).map_err(backend)?, &record)?;
            record
        };
        Self::commit(write, &listener, || Change::Record(Box::new(record.clone())))?;
        Ok(record)
    }

    fn deleted(&self, volume: VolumeNumber) -> Result<Option<[u8; 16]>, StoreError> {
        let read = self.database.begin_read().map_err(backend)?;
        let deleted = read.open_table(DELETED).map_err(backend)?;
        Ok(deleted.get(volume.0).map_err(backend)?.map(|lineage| *lineage.value()))
    }

    fn delete(&self, key: &VolumeKey) -> Result<Record, StoreError> {
        let listener = self.lock();
        let write = self.begin()?;
        let record = {
            let mut names = write.open_table(VOLUME_NAMES).map_err(backend)?;
            let mut volumes = write.open_table(VOLUMES).map_err(backend)?;
            let record = find(&names, &volumes, key)?;
            if let Some(node) = record.attached {
                return Err(StoreError::Attached(record.name, node));
            }
            names.remove(record.name.as_str()).map_err(backend)?;
            volumes.remove(record.volume.0).map_err(backend)?;
            write.open_table(PASSES).map_err(backend)?.remove(record.volume.0).map_err(backend)?;
            let mut deleted = write.open_table(DELETED).map_err(backend)?;
            deleted.insert(record.volume.0, &record.lineage).map_err(backend)?;
            record
        };
        Self::commit(write, &listener, || Change::Gone(record.volume))?;
        Ok(record)
    }

    fn passes(&self, volume: VolumeNumber) -> Result<PassHistory, StoreError> {
        let read = self.database.begin_read().map_err(backend)?;
        find_number(&read.open_table(VOLUMES).map_err(backend)?, volume)?;
        let passes = read.open_table(PASSES).map_err(backend)?;
        let Some(bytes) = passes.get(volume.0).map_err(backend)? else { return Ok(PassHistory::default()) };
        let damaged = |source| StoreError::Damaged {
            what: format!("the passes over volume number {}", volume.0),
            source,
        };
        let message = proto::CheckState::decode(bytes.value()).map_err(|error| damaged(error.into()))?;
        history_from_message(message).map_err(|error| damaged(error.into()))
    }

    fn put_passes(&self, volume: VolumeNumber, history: &PassHistory) -> Result<(), StoreError> {
        let write = self.begin()?;
        {
            find_number(&write.open_table(VOLUMES).map_err(backend)?, volume)?;
            let bytes = history_to_message(history).encode_to_vec();
            let mut passes = write.open_table(PASSES).map_err(backend)?;
            passes.insert(volume.0, bytes.as_slice()).map_err(backend)?;
        }
        write.commit().map_err(backend)
    }

    fn join(&self, joining: &Joining) -> Result<NodeInfo, StoreError> {
        let listener = self.lock();
        let write = self.begin()?;
        let (node, all) = {
            let mut names = write.open_table(NODE_NAMES).map_err(backend)?;
            let mut nodes = write.open_table(NODES).map_err(backend)?;
            let known = names.get(joining.name.as_str()).map_err(backend)?.map(|number| number.value());
            let number = match known {
                Some(number) => number,
                None => {
                    check_room(names.len().map_err(backend)?, NODES_MAX, "nodes")?;
                    next_number(&write, "node")?
                }
            };
            let Joining { name, boot, nbd, peer, facts } = joining.clone();
            // What is wanted of it stays wanted.
            let draining = known.is_some() && find_node(&nodes, number)?.draining;
            let node = NodeInfo { node: NodeId(number), name, boot, nbd, peer, facts, draining };
            let message = node_to_message(&node).encode_to_vec();
            // A node that joins again after a lost connection is no change, and costs no sync.
            let same =
                nodes.get(number).map_err(backend)?.is_some_and(|known| known.value() == message.as_slice());
            if same {
                return Ok(node);
            }
            names.insert(node.name.as_str(), number).map_err(backend)?;
            nodes.insert(number, message.as_slice()).map_err(backend)?;
            (node, read_nodes(&nodes)?)
        };
        Self::commit(write, &listener, || Change::Nodes(all))?;
        Ok(node)
    }

    fn set_draining(&self, name: &NodeName, draining: bool) -> Result<NodeInfo, StoreError> {
        let listener = self.lock();
        let write = self.begin()?;
        let (node, all) = {
            let names = write.open_table(NODE_NAMES).map_err(backend)?;
            let mut nodes = write.open_table(NODES).map_err(backend)?;
            let known = find_named(&names, &nodes, name)?;
            if known.draining == draining {
                return Ok(known);
            }
            let node = NodeInfo { draining, ..known };
            let message = node_to_message(&node).encode_to_vec();
            nodes.insert(node.node.0, message.as_slice()).map_err(backend)?;
            (node, read_nodes(&nodes)?)
        };
        Self::commit(write, &listener, || Change::Nodes(all))?;
        Ok(node)
    }

    fn remove_node(&self, name: &NodeName) -> Result<NodeInfo, StoreError> {
        let listener = self.lock();
        let write = self.begin()?;
        let (node, all) = {
            let mut names = write.open_table(NODE_NAMES).map_err(backend)?;
            let mut nodes = write.open_table(NODES).map_err(backend)?;
            let node = find_named(&names, &nodes, name)?;
            let volumes = write.open_table(VOLUMES).map_err(backend)?;
            for entry in volumes.iter().map_err(backend)? {
                let (number, bytes) = entry.map_err(backend)?;
                let record = decode_record(number.value(), bytes.value())?;
                let leads = record.living_head().is_some_and(|head| head.node == node.node);
                if leads || record.attached == Some(node.node) || record.has_replica(node.node) {
                    return Err(StoreError::NodeInUse(name.clone(), record.name));
                }
            }
            names.remove(name.as_str()).map_err(backend)?;
            nodes.remove(node.node.0).map_err(backend)?;
            (node, read_nodes(&nodes)?)
        };
        Self::commit(write, &listener, || Change::Nodes(all))?;
        Ok(node)
    }

    fn nodes(&self) -> Result<Vec<NodeInfo>, StoreError> {
        let read = self.database.begin_read().map_err(backend)?;
        read_nodes(&read.open_table(NODES).map_err(backend)?)
    }

    fn follow(&self, new: Listener) -> Result<(), StoreError> {
        let mut listener = self.lock();
        new(Change::Nodes(self.nodes()?));
        for record in self.list(VolumeNumber(0), usize::MAX)? {
            new(Change::Record(Box::new(record)));
        }
        *listener = Some(new);
        Ok(())
    }
}

fn check_room(count: u64, most: usize, what: &'static str) -> Result<(), StoreError> {
    match usize::try_from(count) {
        Ok(count) if count < most => Ok(()),
        _ => Err(StoreError::Full(most, what)),
    }
}

/// A number that was never given: the counter moves with the change that uses it.
fn next_number(write: &WriteTransaction, of: &'static str) -> Result<u32, StoreError> {
    let mut numbers = write.open_table(NUMBERS).map_err(backend)?;
    let last = numbers.get(of).map_err(backend)?.map_or(0, |last| last.value());
    let next = last.checked_add(1).ok_or(StoreError::Numbers(of))?;
    numbers.insert(of, next).map_err(backend)?;
    Ok(next)
}

fn find(
    names: &impl ReadableTable<&'static str, u32>,
    volumes: &impl ReadableTable<u32, &'static [u8]>,
    key: &VolumeKey,
) -> Result<Record, StoreError> {
    match key {
        VolumeKey::Number(volume) => find_number(volumes, *volume),
        VolumeKey::Name(name) => {
            let number = names.get(name.as_str()).map_err(backend)?;
            let number = number.ok_or_else(|| StoreError::NoVolume(key.clone()))?.value();
            find_number(volumes, VolumeNumber(number)).map_err(|error| match error {
                StoreError::NoVolume(_) => StoreError::Damaged {
                    what: format!("the name of volume {name}"),
                    source: DamageError::Dangling,
                },
                other => other,
            })
        }
    }
}

fn find_number(
    volumes: &impl ReadableTable<u32, &'static [u8]>,
    volume: VolumeNumber,
) -> Result<Record, StoreError> {
    let bytes = volumes.get(volume.0).map_err(backend)?;
    let bytes = bytes.ok_or(StoreError::NoVolume(VolumeKey::Number(volume)))?;
    decode_record(volume.0, bytes.value())
}

fn put_record(volumes: &mut Table<'_, u32, &'static [u8]>, record: &Record) -> Result<(), StoreError> {
    let bytes = record_to_message(record).encode_to_vec();
    volumes.insert(record.volume.0, bytes.as_slice()).map_err(backend)?;
    Ok(())
}

fn decode_record(number: u32, bytes: &[u8]) -> Result<Record, StoreError> {
    let damaged =
        |source| StoreError::Damaged { what: format!("the record of volume number {number}"), source };
    let message = proto::Record::decode(bytes).map_err(|error| damaged(error.into()))?;
    let record = record_from_message(message).map_err(|error| damaged(error.into()))?;
    if record.volume.0 != number {
        return Err(damaged(DamageError::Dangling));
    }
    Ok(record)
}

fn find_named(
    names: &impl ReadableTable<&'static str, u32>,
    nodes: &impl ReadableTable<u32, &'static [u8]>,
    name: &NodeName,
) -> Result<NodeInfo, StoreError> {
    let number = names.get(name.as_str()).map_err(backend)?;
    find_node(nodes, number.ok_or_else(|| StoreError::NoNode(name.clone()))?.value())
}

fn find_node(nodes: &impl ReadableTable<u32, &'static [u8]>, number: u32) -> Result<NodeInfo, StoreError> {
    let damaged = |source| StoreError::Damaged { what: format!("node number {number}"), source };
    let bytes = nodes.get(number).map_err(backend)?.ok_or_else(|| damaged(DamageError::Dangling))?;
    let message = proto::Node::decode(bytes.value()).map_err(|error| damaged(error.into()))?;
    node_from_message(message).map_err(|error| damaged(error.into()))
}

fn read_nodes(nodes: &impl ReadableTable<u32, &'static [u8]>) -> Result<Vec<NodeInfo>, StoreError> {
    let entries = nodes.iter().map_err(backend)?;
    entries
        .map(|entry| {
            let (number, bytes) = entry.map_err(backend)?;
            let what = || format!("node number {}", number.value());
            let damaged = |source| StoreError::Damaged { what: what(), source };
            let message = proto::Node::decode(bytes.value()).map_err(|error| damaged(error.into()))?;
            node_from_message(message).map_err(|error| damaged(error.into()))
        })
        .collect()
}

#[cfg(test)]
mod tests;
