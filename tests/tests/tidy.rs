//! The source tree keeps its own rules.

use std::path::Path;

use system_tests::tidy::{RATCHET, complaints, read_sources};

#[test]
fn the_tree_is_tidy() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above this package");
    let sources = read_sources(top).expect("the sources can be read");
    assert!(sources.len() > 30, "only {} sources found below {}", sources.len(), top.display());
    let complaints = complaints(&sources, &RATCHET);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}
