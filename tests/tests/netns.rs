//! Volumes replicated over nodes on machines of their own, while these are killed, stopped, cut off and badly connected.
//! Machines are network namespaces (`harness/network.rs`).
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use berth::bench::{self, BenchArgs, BenchError, BlockRange, Control, Report};
use datapath::wire::nbd_transmission::command;
use system_tests::harness::client::Client;
use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::network::Fault;
use system_tests::harness::tools::{fio_verify, run};
use system_tests::harness::{Scratch, full_tier, print_figure};

const VOLUME_MIB: u64 = 64;
const POOL_MIB: u64 = 512;
const BLOCK: u64 = 4096;
/// A member is gone: writes wait for at most so long.
const MEMBER_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A member whose packets are lost comes back and is removed again: that may hold writes for the member's second, and for the
/// 2 s that a fill in its last moments may take.
const LOSSY_PAUSE_MAX: Duration = Duration::from_secs(4);
/// The head is gone: another one serves after at most so long.
const HEAD_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Longer than any lease (3 s) and what is added to it.
const LONGER_THAN_A_LEASE: Duration = Duration::from_secs(5);

fn cluster(scratch: &Scratch) -> Cluster {
    let cluster = Cluster::start_apart(scratch, 3, POOL_MIB);
    cluster.make_volume("v", VOLUME_MIB);
    cluster.make_volume("probe", 16);
    cluster
}

/// What happens to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// kill -9.
    Killed,
    /// SIGSTOP.
    Stopped,
    /// The cable is pulled.
    Unplugged,
    /// It hears, and nobody hears it.
    Mute,
    /// It is heard, and hears nobody.
    Deaf,
    /// A part of all packets is lost, both ways.
    Lossy,
    /// One direction between it and the first node is gone; the others and ctl hear both.
    Estranged,
}

impl Blow {
    fn strike(self, cluster: &mut Cluster, node: usize) {
        let name = cluster.nodes[node].name.clone();
        match self {
            Blow::Killed => cluster.kill_node(node),
            Blow::Stopped => cluster.freeze_node(node, true),
            Blow::Unplugged => cluster.network().plug(&name, false),
            Blow::Mute => cluster.network().add(Fault::From(&name)),
            Blow::Deaf => cluster.network().add(Fault::To(&name)),
            Blow::Lossy => cluster.network().add(Fault::Loss(&name, 20)),
            Blow::Estranged => cluster.network().add(Fault::Between(&name, "n1")),
        }
    }

    fn heal(self, cluster: &mut Cluster, node: usize) {
        match self {
            Blow::Killed => cluster.start_node(node),
            Blow::Stopped => cluster.freeze_node(node, false),
            Blow::Unplugged => cluster.network().plug(&cluster.nodes[node].name, true),
            Blow::Mute | Blow::Deaf | Blow::Lossy | Blow::Estranged => cluster.network().heal(),
        }
    }
}

/// fio writes all over the volume through its head and verifies, again and again, until it is told to stop. Returns how
/// often it went through.
fn fio_until(uri: &str, stop: &AtomicBool) -> u32 {
    let mut rounds = 0;
    while rounds == 0 || !stop.load(Ordering::Relaxed) {
        rounds += 1;
        run(fio_verify(uri, VOLUME_MIB).arg(format!("--randseed={rounds}")));
    }
    rounds
}

/// Sets the flag however the scope is left: a load that nobody stops would hide why the test failed.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn fio_finds_no_error_while_members_fail() {
    let scratch = Scratch::new("members");
    let mut cluster = cluster(&scratch);
    let mut blows = vec![
        (Blow::Killed, 2),
        (Blow::Stopped, 1),
        (Blow::Unplugged, 2),
        (Blow::Mute, 1),
        (Blow::Deaf, 2),
        (Blow::Estranged, 1),
        (Blow::Lossy, 2),
    ];
    if full_tier() {
        let others = blows.clone().into_iter().map(|(blow, node)| (blow, 3 - node));
        blows.extend(others.collect::<Vec<_>>());
        blows = blows.repeat(5);
    }
    let uri = cluster.uri(0, "v");
    let mut probe = Probe::new(&cluster.nodes[0], "probe");
    probe.write();
    let stop = AtomicBool::new(false);
    let mut longest = Duration::ZERO;
    let rounds = thread::scope(|scope| {
        let fio = scope.spawn(|| fio_until(&uri, &stop));
        let _stop = StopAtEnd(&stop);
        for (blow, node) in &blows {
            blow.strike(&mut cluster, *node);
            let pause = probe.write_for(Duration::from_secs(3));
            if *blow != Blow::Lossy {
                // Else nothing would have happened to it.
                cluster.wait_for_sync("v", 2);
            }
            blow.heal(&mut cluster, *node);
            let start = Instant::now();
            // A lossy member is removed or not.
            let after = probe.write_for(Duration::from_millis(500));
            cluster.wait_for_sync("v", 3);
            cluster.wait_for_sync("probe", 3);
            let back = start.elapsed();
            let name = &cluster.nodes[*node].name;
            println!(
                "{name} {blow:?}: a write waited for {pause:?}, later for {after:?}; in sync after {back:?}"
            );
            assert!(!fio.is_finished(), "fio has ended");
            let most = if *blow == Blow::Lossy { LOSSY_PAUSE_MAX } else { MEMBER_PAUSE_MAX };
            assert!(pause.max(after) <= most, "a write waited for {pause:?}, later for {after:?}");
            longest = longest.max(pause).max(after);
        }
        stop.store(true, Ordering::Relaxed);
        fio.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    cluster.compare_replicas(&scratch, "v", VOLUME_MIB);
    let blows = blows.len();
    print_figure(&format!(
        "{blows} faults of members, fio went through {rounds} times, longest wait {longest:?}"
    ));
}

/// Verified load on the volume `v`, from a machine of its own, through whichever node leads.
fn load(cluster: &Cluster) -> BenchArgs {
    let uri = |index| cluster.tcp_uri(index, "v").parse().expect("a URI");
    BenchArgs {
        read: 30,
        write: 50,
        trim: 5,
        zeroes: 5,
        flush: 3,
        fua: 10,
        block: BlockRange { least: 512, most: 256 << 10 },
        duration: 24.0 * 3600.0,
        reconnect: 60.0,
        failover: (1..cluster.nodes.len()).map(uri).collect(),
        answer_timeout: 3.0,
        verify: true,
        destroy_data: true,
        ..BenchArgs::new(uri(0))
    }
}

/// Runs the load while `disturb` works, and returns the number of requests.
fn under_load(cluster: &mut Cluster, disturb: impl FnOnce(&mut Cluster, &Watch<'_>)) -> u64 {
    let (args, client) = (load(cluster), cluster.network().place("client"));
    let control = Control::default();
    let report: Result<Report, BenchError> = thread::scope(|scope| {
        let load = scope.spawn(|| client.visit(|| bench::run_with(&args, &control)));
        let finish = FinishAtEnd(&control);
        disturb(cluster, &Watch { control: &control, load: &|| load.is_finished() });
        drop(finish);
        load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.errors(), 0, "{report}");
    report.operations.iter().map(|operation| operation.count).sum()
}

/// Ends the load, also when the test fails.
struct FinishAtEnd<'a>(&'a Control);

impl Drop for FinishAtEnd<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// The load, as the test looks at it.
struct Watch<'a> {
    control: &'a Control,
    load: &'a dyn Fn() -> bool,
}

impl Watch<'_> {
    /// Waits until the load has come back, and found everything in order, once more than `before`.
    fn wait_for_return(&self, before: u64) -> Duration {
        let start = Instant::now();
        while self.control.reconnects() == before {
            // It says why when it is joined.
            if (self.load)() {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the load does not come back");
            thread::park_timeout(Duration::from_millis(5));
        }
        start.elapsed()
    }
}

/// The node that leads a volume, as soon as there is one: whoever makes it the head may have begun just now.
fn head_of(cluster: &Cluster, volume: &str) -> usize {
    cluster.wait_for_volume(volume, |record| record["head"].is_string());
    let record = cluster.volume(volume);
    let head = record["head"].as_str().expect("a head");
    cluster.nodes.iter().position(|node| node.name == head).expect("one of ours")
}

/// Makes a node the head of the probe's volume, too, so that one fault strikes both: the node that leads it stands still for
/// as long as that takes.
fn bring_probe_to(cluster: &mut Cluster, probe: &mut Probe, node: usize) {
    let leads = head_of(cluster, "probe");
    probe.move_to(&cluster.nodes[node]);
    if leads != node {
        cluster.freeze_node(leads, true);
        probe.write();
        cluster.freeze_node(leads, false);
        cluster.wait_for_sync("probe", 3);
        cluster.wait_for_sync("v", 3);
    }
    probe.write();
}

/// A client that was connected to the head before it was struck, and asks it when another leads already.
struct Leftover {
    client: Client,
    read: Option<u64>,
    write: Option<u64>,
}

/// A block of the volume that the others do not write, and what is on it before and after.
const OWN_OFFSET: u64 = 1 << 20;
const OLD: [u8; 4096] = [1; 4096];
const NEW: [u8; 4096] = [2; 4096];
const LATE: [u8; 4096] = [3; 4096];

impl Leftover {
    fn connect(cluster: &Cluster, node: usize) -> Leftover {
        let mut client = Client::connect(&cluster.nodes[node].socket, "probe").expect("the head");
        let answer = client.call(command::WRITE, OWN_OFFSET, BLOCK, &OLD).expect("the head answers");
        assert_eq!(answer.error, 0);
        Leftover { client, read: None, write: None }
    }

    /// The old head may be dead, or know already that it is none any more: then nothing is asked.
    fn ask(&mut self) {
        self.read = self.client.ask(command::READ, OWN_OFFSET, BLOCK, &[]).ok();
        self.write = self.client.ask(command::WRITE, OWN_OFFSET + BLOCK, BLOCK, &LATE).ok();
    }

    /// Everything that the old head still says must be true: the block is [`NEW`] by now, and what it acknowledges is there.
    fn check(mut self, now: &mut Client) {
        let mut acknowledged = false;
        while self.client.in_flight() > 0 {
            // It closes the connection when it learns that it is deposed.
            let Ok(answer) = self.client.answer() else { break };
            if Some(answer.cookie) == self.read && answer.error == 0 {
                assert!(answer.data == NEW, "the old head has served what was overwritten elsewhere");
            }
            acknowledged |= Some(answer.cookie) == self.write && answer.error == 0;
        }
        let late = now.call(command::READ, OWN_OFFSET + BLOCK, BLOCK, &[]).expect("the new head");
        assert!(!acknowledged || late.data == LATE, "a write that the old head acknowledged is not there");
        let new = now.call(command::READ, OWN_OFFSET, BLOCK, &[]).expect("the new head");
        assert!(new.error == 0 && new.data == NEW, "an acknowledged write is not there");
    }
}

#[test]
fn another_node_takes_over_from_a_head_that_fails() {
    let scratch = Scratch::new("heads");
    let mut cluster = cluster(&scratch);
    // The first one's connections stand still when the second is struck, and are needed then.
    let mut blows = vec![Blow::Deaf, Blow::Unplugged, Blow::Stopped, Blow::Killed];
    if full_tier() {
        blows.push(Blow::Mute);
        blows = blows.repeat(6);
    }
    let mut probe = Probe::new(&cluster.nodes[0], "probe");
    probe.write();
    let mut longest = Duration::ZERO;
    let requests = under_load(&mut cluster, |cluster, watch| {
        for blow in &blows {
            let old = head_of(cluster, "v");
            bring_probe_to(cluster, &mut probe, old);
            let mut leftover = Leftover::connect(cluster, old);
            probe.write_for(Duration::from_millis(500));
            let before = watch.control.reconnects();
            let struck = Instant::now();
            blow.strike(cluster, old);
            let next = (old + 1) % cluster.nodes.len();
            probe.move_to(&cluster.nodes[next]);
            probe.write();
            let pause = struck.elapsed();
            let mut client = Client::connect(&cluster.nodes[next].socket, "probe").expect("the new head");
            let answer = client.call(command::WRITE, OWN_OFFSET, BLOCK, &NEW).expect("the new head answers");
            assert_eq!(answer.error, 0);
            leftover.ask();
            watch.wait_for_return(before);
            let back = struck.elapsed();
            if struck.elapsed() < LONGER_THAN_A_LEASE {
                probe.write_for(LONGER_THAN_A_LEASE.saturating_sub(struck.elapsed()));
            }
            blow.heal(cluster, old);
            leftover.check(&mut client);
            drop(client);
            let filled = cluster.wait_for_sync("v", 3) + cluster.wait_for_sync("probe", 3);
            let name = &cluster.nodes[old].name;
            println!(
                "head {name} {blow:?}: next write after {pause:?}, load verified all after {back:?}, in sync {filled:?} after its return"
            );
            longest = longest.max(pause);
        }
    });
    assert!(longest <= HEAD_PAUSE_MAX, "nobody served for {longest:?}");
    cluster.compare_replicas(&scratch, "v", VOLUME_MIB);
    let blows = blows.len();
    print_figure(&format!(
        "{blows} heads struck, {requests} requests verified, next write after at most {longest:?}"
    ));
}

#[test]
fn every_answered_write_is_there_when_all_nodes_were_killed() {
    let orders = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];
    let rounds = if full_tier() { 18 } else { 2 };
    let scratch = Scratch::new("all-apart");
    let mut cluster = cluster(&scratch);
    let requests = under_load(&mut cluster, |cluster, watch| {
        for round in 0..rounds {
            thread::sleep(Duration::from_millis(600 + 130 * (round as u64 % 5)));
            let before = watch.control.reconnects();
            let struck = Instant::now();
            (0..3).for_each(|node| cluster.kill_node(node));
            let order = orders[round % orders.len()];
            order.into_iter().for_each(|node| cluster.start_node(node));
            watch.wait_for_return(before);
            println!("all killed, started as {order:?}: load verified all after {:?}", struck.elapsed());
        }
    });
    cluster.compare_replicas(&scratch, "v", VOLUME_MIB);
    print_figure(&format!(
        "{rounds} times all nodes killed, {requests} requests, nothing answered lost, replicas equal"
    ));
}
