//! The suite on redb, and what is redb's own: the file, and kills of the process that writes it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::record_store::suite::{joining, next, suite, wish, with_volume};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn folder(name: &str) -> Folder {
    let path = std::env::temp_dir().join(format!("berth-redb-{}-{name}", std::process::id()));
    fs::create_dir_all(&path).expect("a scratch folder");
    Folder(path)
}

fn open(name: &str) -> (RedbStore, Folder) {
    let folder = folder(name);
    (RedbStore::open(&folder.0.join("records")).expect("a new store"), folder)
}

suite!(open);

#[test]
fn all_is_there_after_a_restart() {
    let folder = folder("restart");
    let path = folder.0.join("deep").join("records");
    let store = RedbStore::open(&path).expect("a new store");
    let record = next(&with_volume(&store));
    store.compare_and_swap(1, &record).expect("swapped");
    store.create(&wish("w", &["n1"])).expect("created");
    store.delete(&VolumeKey::Name("w".parse().expect("a name"))).expect("deleted");
    let nodes = store.nodes().expect("a list");
    drop(store);
    let store = RedbStore::open(&path).expect("the same store");
    assert_eq!(store.list(VolumeNumber(0), 9).expect("a list"), [record]);
    assert_eq!(store.nodes().expect("a list"), nodes);
    assert_eq!(store.create(&wish("w", &["n1"])).expect("created").volume, VolumeNumber(3));
}

#[test]
fn what_is_not_a_store_of_ours_is_refused() {
    let folder = folder("refused");
    let path = folder.0.join("records");
    let store = RedbStore::open(&path).expect("a new store");
    let error = RedbStore::open(&path).expect_err("it is open").to_string();
    assert!(error.contains("another `berth ctl` has it open; stop that one"), "{error}");
    let write = store.begin().expect("a change");
    write.open_table(NUMBERS).expect("a table").insert("format", 2).expect("inserted");
    write.commit().expect("committed");
    drop(store);
    let error = RedbStore::open(&path).expect_err("from the future").to_string();
    assert!(error.ends_with("format 2, and this berth knows format 1 only"), "{error}");
    fs::write(&path, "precious").expect("written");
    let error = RedbStore::open(&path).expect_err("not a store").to_string();
    assert!(error.contains("cannot open the record store: "), "{error}");
    assert_eq!(fs::read(&path).expect("there"), b"precious");
}

#[test]
fn a_damaged_record_is_named_and_the_others_are_served() {
    let (store, _folder) = open("damaged");
    let record = with_volume(&store);
    store.create(&wish("w", &["n1"])).expect("created");
    let write = store.begin().expect("a change");
    let broken = proto::Record { min_in_sync: 0, ..record_to_message(&record) };
    let bytes = broken.encode_to_vec();
    write.open_table(VOLUMES).expect("a table").insert(1, bytes.as_slice()).expect("inserted");
    write.commit().expect("committed");
    let error = store.get(&VolumeKey::Number(VolumeNumber(1))).expect_err("damaged").to_string();
    assert_eq!(error, "the record store is damaged: the record of volume number 1: min_in_sync is 0");
    store.get(&VolumeKey::Number(VolumeNumber(2))).expect("there");
}

/// Says in which file the process that is to be killed works.
const VICTIM_FILE: &str = "BERTH_TEST_VICTIM_FILE";

/// Swaps, and says after each one which version it was, until it is killed.
#[test]
#[ignore = "run by nothing_answered_is_lost_by_kill_9"]
fn victim() {
    let path = std::env::var_os(VICTIM_FILE).expect("run by the other test");
    let store = RedbStore::open(Path::new(&path)).expect("a store");
    let mut records = store.list(VolumeNumber(0), 9).expect("a list");
    loop {
        for record in &mut records {
            let proposed = next(record);
            store.compare_and_swap(record.version, &proposed).expect("swapped");
            *record = proposed;
            // The number in the line is all that the other side looks for.
            println!("\nswapped {} {}", record.volume.0, record.version);
        }
    }
}

fn start_victim(path: &Path) -> Child {
    Command::new(std::env::current_exe().expect("the test"))
        .args(["--exact", "record_store::redb::tests::victim", "--ignored", "--nocapture"])
        .env(VICTIM_FILE, path)
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child process")
}

#[test]
fn nothing_answered_is_lost_by_kill_9() {
    let folder = folder("kill");
    let path = folder.0.join("records");
    let store = RedbStore::open(&path).expect("a new store");
    with_volume(&store);
    store.create(&wish("w", &["n2"])).expect("created");
    drop(store);
    let mut answered = [1, 1];
    for round in 0..8 {
        let mut victim = start_victim(&path);
        let mut lines = BufReader::new(victim.stdout.take().expect("piped")).lines();
        let mut swaps = 0;
        let mut note = |line: &str| {
            let Some(numbers) = line.strip_prefix("swapped ") else { return false };
            let (volume, version) = numbers.split_once(' ').expect("two numbers");
            let volume: usize = volume.parse().expect("a volume");
            answered[volume - 1] = version.parse().expect("a version");
            true
        };
        while swaps < 5 + 3 * round {
            swaps += i32::from(note(&lines.next().expect("it goes on until it is killed").expect("text")));
        }
        victim.kill().expect("our child");
        victim.wait().expect("our child");
        // What it said before it died, the last line perhaps cut short.
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        rest.iter().take(rest.len().saturating_sub(1)).for_each(|line| {
            note(line);
        });
        let store = RedbStore::open(&path).expect("the store after a kill");
        let records = store.list(VolumeNumber(0), 9).expect("a list");
        for (record, answered) in records.iter().zip(answered) {
            // One swap may have been done and not answered, and one more answered in a line cut short.
            let possible = answered..=answered + 2;
            assert!(possible.contains(&record.version), "round {round}: {} of {answered}", record.version);
        }
        assert_eq!(records.len(), 2);
        assert_eq!(store.join(&joining("n3")).expect("joined").node, NodeId(3));
    }
}
