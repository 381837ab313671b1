//! `berth pool` on pools that a server has written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use system_tests::harness::Scratch;
use system_tests::harness::server::{Options, Server, berth};
use system_tests::harness::tools::{run, run_to_fail, tool};

const BLOCK_BYTES: u64 = 4096;

fn pool(command: &str, file: &Path, more: &[&str]) -> Command {
    let mut berth = berth(&["pool", command]);
    berth.arg(file).args(more);
    berth
}

fn qemu_io(uri: &str, commands: &[&str]) {
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "raw"]);
    commands.iter().for_each(|command| {
        qemu_io.args(["-c", command]);
    });
    let output = run(qemu_io.arg(uri));
    assert!(!output.contains("verification failed"), "{output}");
}

/// The number after `"key":` in JSON that was printed for people, at its `nth` occurrence.
fn number(json: &str, key: &str, nth: usize) -> u64 {
    let rest = json.split(&format!("\"{key}\": ")).nth(nth + 1).unwrap_or_else(|| panic!("{key} in {json}"));
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a number")
}

/// A pool of one lane with volumes `a` and `b`, each with 8 MiB of data.
fn two_volumes(scratch: &Scratch) -> Options {
    let mut options = Options::new(scratch, 64);
    options.volumes = vec![("a".to_owned(), 32), ("b".to_owned(), 32)];
    run(&mut pool("format", &options.pool, &["--size=128M", "--lanes=1"]));
    let server = Server::start(&options);
    qemu_io(&server.uris()[0], &["write -P 0xaa 0 8M"]);
    qemu_io(&server.uris()[1], &["write -P 0xbb 0 8M"]);
    server.stop();
    options
}

#[test]
fn format_destroys_nothing_unless_told_to() {
    let scratch = Scratch::new("pool-format");
    let file = scratch.file("pool");
    let refused = |command: &mut Command, part: &str| {
        let output = run_to_fail(command);
        assert!(output.contains(part), "{output}");
    };
    refused(&mut pool("format", &file, &[]), "there is no such file; give --size to make it");
    refused(&mut pool("format", &file, &["--size=16M"]), "a pool needs at least 33554432 bytes");
    assert!(!file.exists(), "nothing is left of a pool that could not be made");
    refused(&mut pool("format", &file, &["--size=64M", "--lanes=16"]), "16 is not in 1..=15");
    run(&mut pool("format", &file, &["--size=64M"]));
    refused(&mut pool("format", &file, &["--size=64M"]), "holds a Berth pool; --force destroys it");
    refused(&mut pool("format", &file, &["--size=32M", "--force"]), "cannot become 33554432");
    let output = run(&mut pool("format", &file, &["--size=80M", "--lanes=2", "--force", "--output=json"]));
    assert_eq!((number(&output, "length_bytes", 0), number(&output, "lanes", 0)), (80 << 20, 2));

    std::fs::write(&file, vec![1; 64 << 20]).expect("written");
    refused(&mut pool("format", &file, &[]), "holds data that is not a Berth pool; --force destroys it");
    refused(&mut pool("inspect", &file, &[]), "this is not a Berth pool");
    refused(&mut pool("check", &file, &[]), "this is not a Berth pool");
    refused(&mut pool("grow", &file, &["--size=1G"]), "this is not a Berth pool");
    assert_eq!(std::fs::metadata(&file).expect("there").len(), 64 << 20);
    File::create(&file).and_then(|blank| blank.set_len(64 << 20)).expect("a blank file");
    run(&mut pool("format", &file, &[]));
    run(&mut pool("check", &file, &[]));
}

#[test]
fn a_served_pool_is_left_alone() {
    let scratch = Scratch::new("pool-served");
    let options = Options::new(&scratch, 64);
    let server = Server::start(&options);
    for (command, more) in [
        ("format", &["--force"][..]),
        ("inspect", &[]),
        ("check", &[]),
        ("grow", &["--size=1G"]),
        ("rm-volume", &["v"]),
    ] {
        let output = run_to_fail(&mut pool(command, &options.pool, more));
        assert!(output.contains("the pool is in use by another process"), "{command}: {output}");
    }
    qemu_io(server.uri(), &["write -P 1 0 1M", "read -P 1 0 1M"]);
    server.stop();
}

#[test]
fn inspect_and_check_tell_what_is_there_and_change_nothing() {
    let scratch = Scratch::new("pool-inspect");
    let options = two_volumes(&scratch);
    let before = std::fs::read(&options.pool).expect("read");
    let shown = run(&mut pool("inspect", &options.pool, &["--output=json"]));
    assert_eq!(number(&shown, "headers_good", 0), 4);
    assert_eq!(number(&shown, "roots_good", 0), 4);
    // One lane's blocks, then those of its two volumes.
    assert_eq!((number(&shown, "live_blocks", 1), number(&shown, "live_blocks", 2)), (2048, 2048));
    assert!(number(&shown, "live_blocks", 0) > 4096, "{shown}");
    assert_eq!(number(&shown, "size_bytes", 1), 32 << 20);
    let text = run(&mut pool("inspect", &options.pool, &[]));
    assert!(
        text.contains("volume a: 32M, number 1, identity ") && text.contains("2048 live blocks"),
        "{text}"
    );
    let clean = run(&mut pool("check", &options.pool, &["--output=json"]));
    assert_eq!((number(&clean, "problems", 0), number(&clean, "data_blocks", 0)), (0, 4096));
    assert!(before == std::fs::read(&options.pool).expect("read"), "looking changes nothing");
}

#[test]
fn check_names_every_kind_of_damage() {
    let scratch = Scratch::new("pool-check");
    let options = two_volumes(&scratch);
    let bytes = std::fs::read(&options.pool).expect("read");
    let blocks = bytes.chunks_exact(4096);
    let find = |wanted: &dyn Fn(&[u8]) -> bool| {
        let found: Vec<u64> =
            (0..).zip(blocks.clone()).filter(|(_, block)| wanted(block)).map(|(at, _)| at).collect();
        assert!(!found.is_empty(), "such a block is in the pool");
        found
    };
    let data = find(&|block| block.iter().all(|byte| *byte == 0xbb));
    let headers = find(&|block| block.starts_with(b"BERTHPOL"));
    let roots = find(&|block| block.starts_with(b"BERTHROT"));
    let file = File::options().write(true).open(&options.pool).expect("open");
    // Flips one bit, lets `look` see, and puts it right.
    let with_damage = |block: u64, look: &dyn Fn()| {
        let at = block * BLOCK_BYTES + 99;
        let right = bytes[usize::try_from(at).expect("in memory")];
        file.write_all_at(&[right ^ 4], at).expect("written");
        look();
        file.write_all_at(&[right], at).expect("written");
    };
    with_damage(data[5], &|| {
        let output = run_to_fail(&mut pool("check", &options.pool, &[]));
        assert!(output.contains("problem: lane 0: volume b: block 5 has a wrong checksum"), "{output}");
        assert!(output.contains(": 1 problems; 2 volumes, 4096 data blocks"), "{output}");
    });
    for (copy, block) in headers.iter().enumerate() {
        with_damage(*block, &|| {
            let output = run_to_fail(&mut pool("check", &options.pool, &[]));
            assert!(output.contains(&format!("copy {copy} of the header is damaged")), "{output}");
        });
    }
    with_damage(roots[1], &|| {
        let output = run(&mut pool("check", &options.pool, &[]));
        assert!(output.contains("note: lane 0: root 1 is damaged; the next start"), "{output}");
    });
    let root = &bytes[usize::try_from(roots[0] * BLOCK_BYTES).expect("in memory")..][..4096];
    // Extent 0 of the root is the first copy of the checkpoint's body.
    let body = u64::from(u32::from_le_bytes(root[144..148].try_into().expect("four bytes")));
    with_damage(body, &|| {
        let output = run_to_fail(&mut pool("check", &options.pool, &["--output=json"]));
        assert!(output.contains("lane 0: copy 0 of checkpoint"), "{output}");
    });
    run(&mut pool("check", &options.pool, &[]));
}

#[test]
fn a_grown_pool_holds_more() {
    let scratch = Scratch::new("pool-grow");
    let mut options = two_volumes(&scratch);
    let output = run_to_fail(&mut pool("grow", &options.pool, &["--size=100M"]));
    assert!(output.contains("has 134217728 bytes and cannot become 104857600"), "{output}");
    let output = run_to_fail(&mut pool("grow", &options.pool, &["--size=17T"]));
    assert!(output.contains("make several pools"), "{output}");
    let output = run(&mut pool("grow", &options.pool, &["--size=256M"]));
    assert!(output.contains("grown from 128M to 256M"), "{output}");
    run(&mut pool("check", &options.pool, &[]));
    options.pool_mib = 256;
    options.volumes.push(("c".to_owned(), 128));
    let server = Server::start(&options);
    qemu_io(&server.uris()[2], &["write -P 0xcc 0 120M", "read -P 0xcc 0 120M"]);
    qemu_io(&server.uris()[0], &["read -P 0xaa 0 8M"]);
    server.stop();
    run(&mut pool("check", &options.pool, &[]));
}

#[test]
fn a_removed_volume_is_gone_with_its_data_and_the_others_stay() {
    let scratch = Scratch::new("pool-rm");
    let mut options = two_volumes(&scratch);
    let output = run_to_fail(&mut pool("rm-volume", &options.pool, &["c"]));
    assert!(output.contains("has no volume c; it has: a, b"), "{output}");
    let before = run(&mut pool("inspect", &options.pool, &["--output=json"]));
    let output = run(&mut pool("rm-volume", &options.pool, &["a"]));
    assert!(output.contains("volume a is removed, 2048 blocks are free"), "{output}");
    let check = run(&mut pool("check", &options.pool, &["--output=json"]));
    assert_eq!((number(&check, "volumes", 0), number(&check, "data_blocks", 0)), (1, 2048));
    let after = run(&mut pool("inspect", &options.pool, &["--output=json"]));
    assert!(number(&after, "live_blocks", 0) + 2048 <= number(&before, "live_blocks", 0), "{after}");

    // A new volume of the name is another one: empty.
    options.volumes.rotate_left(1);
    let server = Server::start(&options);
    let uri_of =
        |name: &str| server.uris().iter().find(|uri| uri.contains(&format!(":///{name}"))).expect("served");
    qemu_io(uri_of("a"), &["read -P 0 0 32M", "write -P 0xa1 0 24M"]);
    qemu_io(uri_of("b"), &["read -P 0xbb 0 8M", "write -P 0xb1 8M 16M"]);
    server.stop();
    run(&mut pool("check", &options.pool, &[]));
}

#[test]
fn a_lane_that_loses_its_last_volume_is_as_new() {
    let scratch = Scratch::new("pool-rm-last");
    let options = two_volumes(&scratch);
    for name in ["b", "a"] {
        run(&mut pool("rm-volume", &options.pool, &[name]));
        run(&mut pool("check", &options.pool, &[]));
    }
    let empty = run(&mut pool("inspect", &options.pool, &["--output=json"]));
    assert_eq!((number(&empty, "live_blocks", 0), number(&empty, "segments_free", 0)), (0, 124));
    let server = Server::start(&options);
    for uri in server.uris() {
        qemu_io(uri, &["read -P 0 0 32M", "write -P 0xee 0 24M"]);
    }
    server.stop();
    let server = Server::start(&options);
    for uri in server.uris() {
        qemu_io(uri, &["read -P 0xee 0 24M", "read -P 0 24M 8M"]);
    }
    server.stop();
    run(&mut pool("check", &options.pool, &[]));
}
