//! Replays the seeds of the fuzz targets, and whatever a fuzzer found and somebody committed beside them.

use std::path::PathBuf;

use crate::session::nbd::fuzzing::{check_reply, check_session, run};
use crate::session::nbd::{CloseReason, Step};

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../fuzz/corpus", target].iter().collect();
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{directory:?}: {error}"));
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, std::fs::read(&path).expect("a readable seed"))
    };
    let mut seeds: Vec<_> = entries.map(read).collect();
    seeds.sort();
    assert!(seeds.len() >= 8, "{directory:?} has lost its seeds");
    seeds
}

#[test]
fn sessions_replay() {
    for (name, data) in corpus("nbd_session") {
        println!("{name}");
        check_session(&data);
    }
}

/// A seed that no longer gets anywhere is worth nothing to a fuzzer: the layout of the input has changed under it.
#[test]
fn seeds_reach_what_they_are_named_for() {
    for (name, data) in corpus("nbd_session") {
        let [settings, _, stream @ ..] = &data[..] else { panic!("{name} is too short") };
        let transcript = run(*settings, stream, |left| left);
        let selects = transcript.steps.iter().any(|step| matches!(step, Step::Selected(_)));
        if name.starts_with("transmission-") {
            assert!(selects, "{name} selects no export");
        }
        if name.ends_with("-disc") {
            assert_eq!(transcript.steps.last(), Some(&Step::Close(CloseReason::Disconnected)), "{name}");
        }
        if name.contains("-refused") {
            assert!(!transcript.rejections.is_empty(), "{name} is not refused");
        }
    }
}

#[test]
fn replies_replay() {
    for (name, data) in corpus("nbd_reply") {
        println!("{name}");
        check_reply(&data);
    }
}
