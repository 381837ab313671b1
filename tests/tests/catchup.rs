//! What a replica costs that comes back: it is sent what was changed while it was away, and not much more.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::process::Command;
use std::time::{Duration, Instant};

use system_tests::harness::cluster::Cluster;
use system_tests::harness::tools::{run, tool};
use system_tests::harness::{Scratch, full_tier, print_figure};

/// Bytes sent for each byte that was changed.
const SENT_MAX: f64 = 1.2;
/// A replica that is not in sync by then never will be, even if all of its volume were copied.
const SYNC_MAX: Duration = Duration::from_secs(1800);
const MIB: f64 = 1_048_576.0;
const KINDS: [&str; 4] = ["change", "copy", "fetched", "other"];
/// The volume's head, and the replica that is away.
const HEAD: usize = 0;
const AWAY: usize = 1;

/// How large it all is, in MiB.
struct Sizes {
    volume: u32,
    changed: u32,
    pool: u64,
}

impl Sizes {
    fn of_this_run() -> Sizes {
        if full_tier() {
            Sizes { volume: 16 << 10, changed: 1 << 10, pool: 22 << 10 }
        } else {
            Sizes { volume: 256, changed: 16, pool: 640 }
        }
    }
}

fn fio(cluster: &Cluster) -> Command {
    let mut fio = tool("fio");
    fio.args(["--ioengine=nbd", "--iodepth=32", &format!("--uri={}", cluster.uri(HEAD, "v"))]);
    fio
}

/// Writes the whole volume, in parts, each of which takes no tool too long.
fn write_all(cluster: &Cluster, volume_mib: u32) {
    let part = volume_mib / 16;
    for number in 0..16 {
        let (offset, size) = (format!("--offset={}m", number * part), format!("--size={part}m"));
        run(fio(cluster).args(["--name=fill", "--rw=write", "--bs=256k", &offset, &size]));
    }
}

/// Changes so many MiB in blocks of 4 KiB at random, none of them twice; trims are every fourth of them, if wanted, and may
/// meet what is written.
fn change(cluster: &Cluster, sizes: &Sizes, trims: bool) {
    let trimmed = if trims { sizes.changed / 4 } else { 0 };
    let mut fio = fio(cluster);
    fio.args([format!("--size={}m", sizes.volume), "--bs=4k".to_owned()]);
    fio.args(["--name=write", "--rw=randwrite", &format!("--io_size={}m", sizes.changed - trimmed)]);
    if trims {
        // The options before a name are only its job's.
        fio.args(["--name=trim", "--rw=randtrim", "--bs=4k", "--ioengine=nbd", "--iodepth=32"]);
        fio.args([format!("--uri={}", cluster.uri(HEAD, "v")), format!("--size={}m", sizes.volume)]);
        fio.args([format!("--io_size={trimmed}m"), "--randseed=7".to_owned()]);
    }
    run(&mut fio);
}

/// Bytes that the head's node has sent to the other one, by what for.
fn sent(cluster: &Cluster) -> [f64; KINDS.len()] {
    let page = cluster.metrics(HEAD);
    KINDS.map(|kind| page.sum("berth_peer_bytes_sent_total", &format!("kind=\"{kind}\"")))
}

/// All of the volume is written, a replica is away while some of it is changed, and comes back when nothing is written any
/// more.
fn measure(name: &str, trims: bool) {
    let sizes = Sizes::of_this_run();
    let scratch = Scratch::new(name);
    let mut cluster = Cluster::start(&scratch, 2, sizes.pool);
    cluster.make_volume("v", sizes.volume.into());
    write_all(&cluster, sizes.volume);
    cluster.wait_for_sync("v", 2);
    cluster.kill_node(AWAY);
    change(&cluster, &sizes, trims);
    cluster.wait_for_sync("v", 1);
    let before = sent(&cluster);
    let start = Instant::now();
    cluster.start_node(AWAY);
    let in_sync = |volume: &serde_json::Value| volume["in_sync"].as_array().map(Vec::len) == Some(2);
    cluster.wait_for_volume_within("v", SYNC_MAX, in_sync);
    let took = start.elapsed();
    let after = sent(&cluster);
    cluster.compare_replicas(&scratch, "v", sizes.volume.into());

    let sent: Vec<f64> = after.iter().zip(before).map(|(after, before)| (after - before) / MIB).collect();
    let ratio = sent.iter().sum::<f64>() / f64::from(sizes.changed);
    let parts: Vec<String> = KINDS.iter().zip(&sent).map(|(kind, mib)| format!("{kind} {mib:.1}")).collect();
    print_figure(&format!(
        "{} MiB of 4 KiB {} in {} MiB: {ratio:.2} bytes sent for each changed one (MiB: {}), in sync after {took:.1?}",
        sizes.changed,
        if trims { "writes and trims" } else { "writes" },
        sizes.volume,
        parts.join(", "),
    ));
    assert!(
        ratio <= SENT_MAX,
        "{ratio:.2} bytes were sent for each that was changed, at most {SENT_MAX} may be"
    );
}

#[test]
fn a_replica_is_sent_what_was_written_while_it_was_away() {
    measure("catchup", false);
}

#[test]
fn a_replica_is_sent_what_was_written_and_trimmed_while_it_was_away() {
    measure("catchup-trims", true);
}
