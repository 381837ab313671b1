//! Replays the seeds of the fuzz target, and mutations of them.

use super::check_pool_image;
use super::damage::KINDS;
use std::path::PathBuf;

fn corpus() -> Vec<(String, Vec<u8>)> {
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../fuzz/corpus/pool_image"].iter().collect();
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{directory:?}: {error}"));
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, std::fs::read(&path).expect("a readable seed"))
    };
    let mut seeds: Vec<_> = entries.map(read).collect();
    seeds.sort();
    assert!(seeds.len() >= 12, "{directory:?} has lost its seeds");
    seeds
}

/// A seed that no longer gets anywhere is worth nothing to a fuzzer: the layout of the input has changed under it.
#[test]
fn seeds_replay_and_reach_what_they_are_named_for() {
    let seeds = corpus();
    for kind in KINDS {
        assert!(seeds.iter().any(|(name, _)| name.starts_with(kind)), "no seed damages a {kind}");
    }
    for (name, data) in seeds {
        println!("{name}");
        let outcome = check_pool_image(&data);
        println!("  {outcome:?}");
        let is_refused = outcome.refused.is_some();
        if name.contains("-refused") {
            assert!(is_refused, "{name} is not refused");
        }
        if name.contains("-errors") {
            assert!(!is_refused && outcome.errors > 0 && outcome.problems > 0, "{name} damages nothing");
        }
        if name.contains("-harmless") {
            assert!(!is_refused && outcome.errors == 0 && outcome.data > 0, "{name} is not survived");
        }
        if name.contains("-exact") {
            assert!(outcome.exact, "{name} asks for little");
        }
    }
}

#[test]
fn mutations_of_the_seeds_hold() {
    let seeds = corpus();
    let mut state = 0x5eed_u64;
    let mut below = |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).expect("fits") % end
    };
    for _ in 0..60 {
        let (name, mut data) = seeds[below(seeds.len())].clone();
        for _ in 0..=below(6) {
            let at = below(data.len());
            match below(4) {
                0 => _ = data.remove(at),
                1 => data.insert(at, u8::try_from(below(256)).expect("a byte")),
                _ => data[at] = u8::try_from(below(256)).expect("a byte"),
            }
            if data.is_empty() {
                data.push(0);
            }
        }
        println!("{name}: {data:?}");
        check_pool_image(&data);
    }
}
