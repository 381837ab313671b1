//! Records, from the node's link through `berth ctl` to its store, and the commands that show them.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::time::Duration;

use datapath::record::{HeadSession, NodeId, Record, VolumeNumber};
use nbd_server::control::convert::record_to_message;
use nbd_server::control::link::{Command, News};
use nbd_server::control::proto::control_client::ControlClient;
use nbd_server::control::proto::{self, CompareAndSwapRequest, JoinRequest};
use system_tests::harness::Scratch;
use system_tests::harness::ctl::{Ctl, Node};
use system_tests::harness::server::berth;
use system_tests::harness::tools::{run, run_to_fail};
use tonic::Code;
use tonic::transport::Channel;

/// The record with the next version, by this proposer.
fn next(record: &Record, proposal: u64) -> Record {
    Record { version: record.version + 1, proposal, ..record.clone() }
}

/// What becomes of a proposal for the version after `record`, whose answer may have been lost. An older version than the
/// proposed one decides nothing, so another proposal is made, which wins or loses against the first.
fn decide(node: &mut Node, record: &Record, proposal: u64) -> Record {
    let told = node.wait_for_version(record.volume, record.version);
    if told.version > record.version {
        return told;
    }
    node.link.send(Command::Propose(next(record, proposal)));
    node.wait_for_version(record.volume, record.version + 1)
}

/// A ctl with the nodes n1 and n2, and the volume `v` on both, which both have been told.
fn cluster(scratch: &Scratch) -> (Ctl, Node, Node, Record) {
    let ctl = Ctl::start(&scratch.file("records"));
    let (mut one, mut two) = (Node::join(&ctl.url(), "n1"), Node::join(&ctl.url(), "n2"));
    run(&mut ctl.command("volume create v --size 1G --on n1,n2"));
    let record = one.wait_for_version(VolumeNumber(1), 1);
    assert_eq!(two.wait_for_version(VolumeNumber(1), 1), record);
    (ctl, one, two, record)
}

#[test]
fn of_two_proposers_one_wins_each_version_and_both_learn_it() {
    let scratch = Scratch::new("records-race");
    let (_ctl, mut one, mut two, mut record) = cluster(&scratch);
    let mut wins = [0, 0];
    for _ in 0..40 {
        let version = record.version + 1;
        for (proposal, node) in [(1, &one), (2, &two)] {
            node.link.send(Command::Propose(next(&record, proposal)));
        }
        let seen = [&mut one, &mut two].map(|node| node.wait_for_version(record.volume, version));
        assert_eq!(seen[0], seen[1], "both read the same record");
        assert_eq!(seen[0].version, version, "one proposal, one version");
        wins[usize::from(seen[0].proposal == 2)] += 1;
        record = seen[0].clone();
    }
    assert_eq!(wins[0] + wins[1], 40);
    // Whoever proposes too late is told again what there is, though it was told before.
    one.link.send(Command::Propose(Record { version: 3, proposal: 9, ..record.clone() }));
    assert_eq!(one.wait_for_version(record.volume, 1), record);
    // The same for a proposal that breaks a rule.
    let broken = Record { in_sync: vec![NodeId(2), NodeId(1)], ..next(&record, 9) };
    one.link.send(Command::Propose(broken));
    assert_eq!(one.wait_for_version(record.volume, 1), record);
    one.check_wakes();
}

#[test]
fn a_node_hears_of_its_own_volumes_and_of_all_nodes() {
    let scratch = Scratch::new("records-own");
    let (ctl, mut one, mut two, record) = cluster(&scratch);
    run(&mut ctl.command("volume create w --size 1G --on n2"));
    two.wait_for_version(VolumeNumber(2), 1);
    let three = Node::join(&ctl.url(), "n3");
    assert_eq!(three.id, NodeId(3));
    let nodes = one.wait_for("three nodes", |news| match news {
        News::Nodes(nodes) if nodes.len() == 3 => Some(nodes),
        News::Record(record) => panic!("not its volume: {record:?}"),
        _ => None,
    });
    assert_eq!(nodes[2].name.as_str(), "n3");
    // The version that takes it out is the last that it hears of, until it has the head.
    let without = Record { in_sync: vec![NodeId(2)], ..next(&record, 1) };
    one.link.send(Command::Propose(without.clone()));
    assert_eq!(one.wait_for_version(record.volume, 2), without);
    two.wait_for_version(record.volume, 2);
    let unheard = next(&without, 2);
    two.link.send(Command::Propose(unheard.clone()));
    two.wait_for_version(record.volume, 3);
    let head = Some(HeadSession { node: NodeId(1), session: 77 });
    let led = Record { epoch: 1, head, ..next(&unheard, 3) };
    one.link.send(Command::Propose(led.clone()));
    assert_eq!(one.wait_for("the next version", Some), News::Record(Box::new(led)));
    // What it has nothing to do with, it can ask for.
    one.link.send(Command::Read(VolumeNumber(2)));
    assert_eq!(one.wait_for_version(VolumeNumber(2), 1).name, "w");
    one.link.send(Command::Read(VolumeNumber(99)));
    assert_eq!(one.wait_for("an answer", Some), News::Gone(VolumeNumber(99)));
}

#[test]
fn a_killed_ctl_comes_back_with_everything_and_its_nodes_catch_up() {
    let scratch = Scratch::new("records-kill");
    let (mut ctl, mut one, mut two, mut record) = cluster(&scratch);
    run(&mut ctl.command("volume create w --size 1G --on n2"));
    two.wait_for_version(VolumeNumber(2), 1);
    for round in 0..4 {
        // Killed while proposals are under way: each one has an effect or not, and its proposer learns which.
        for proposal in 1..=round {
            one.link.send(Command::Propose(next(&record, proposal)));
            record = one.wait_for_version(record.volume, record.version + 1);
        }
        let proposed = next(&record, 100 + round);
        one.link.send(Command::Propose(proposed.clone()));
        std::thread::sleep(Duration::from_micros(300 * round));
        ctl.kill();
        ctl.restart();
        let after = decide(&mut one, &record, 200 + round);
        assert!([100 + round, 200 + round].contains(&after.proposal), "{after:?}");
        assert_eq!(two.wait_for_version(record.volume, after.version), after);
        record = after;
    }
    // What happens while a node's connection is away is found when it is back.
    ctl.kill();
    one.link.send(Command::Propose(next(&record, 7)));
    ctl.restart();
    // The link may have tried before it knew that ctl was gone; then nothing is decided.
    let after = decide(&mut one, &record, 8);
    assert!([7, 8].contains(&after.proposal), "{after:?}");
    run(&mut ctl.command("volume delete w"));
    two.wait_for("the deletion", |news| (news == News::Gone(VolumeNumber(2))).then_some(()));
    let again = Node::join(&ctl.url(), "n1");
    assert_eq!((again.id, one.id), (NodeId(1), NodeId(1)), "a name keeps its number");
    let took = ctl.stop();
    assert!(took < Duration::from_secs(2), "with watchers connected, the stop took {took:?}");
}

#[test]
fn a_deletion_that_a_node_missed_is_found() {
    let scratch = Scratch::new("records-missed");
    let (mut ctl, mut one, two, record) = cluster(&scratch);
    drop(two);
    // The node's link is frozen out by taking ctl's place away: the volume is deleted through another address.
    ctl.kill();
    let mut elsewhere = Ctl::start(&scratch.file("records"));
    run(&mut elsewhere.command("volume delete v"));
    elsewhere.stop();
    ctl.restart();
    one.wait_for("the deletion", |news| (news == News::Gone(record.volume)).then_some(()));
    one.link.send(Command::Propose(next(&record, 1)));
    one.wait_for("the deletion, again", |news| (news == News::Gone(record.volume)).then_some(()));
}

/// Sends a request that must be refused with this code and text, and then one that must not.
async fn refused(client: &mut ControlClient<Channel>, message: proto::Record, code: Code, text: &str) {
    let request = CompareAndSwapRequest { record: Some(message) };
    let status = client.compare_and_swap(request).await.expect_err(text);
    assert!(status.code() == code && status.message().contains(text), "{status:?}, not {text}");
}

#[test]
fn hostile_requests_are_refused_by_name_and_hurt_nobody() {
    let scratch = Scratch::new("records-hostile");
    let (ctl, one, mut two, record) = cluster(&scratch);
    let good = record_to_message(&next(&record, 1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut client = ControlClient::connect(ctl.url()).await.expect("connected");
        type Break = fn(&mut proto::Record);
        let cases: &[(Break, Code, &str)] = &[
            (|m| m.name = "x".repeat(60_000), Code::InvalidArgument, "has 1 to 63 characters, not 60000"),
            (|m| m.name = "x".repeat(1 << 20), Code::OutOfRange, "length too large"),
            (|m| m.in_sync.reverse(), Code::InvalidArgument, "in_sync is not in ascending order"),
            (|m| m.in_sync = (1..=1000).collect(), Code::InvalidArgument, "1000 entries, more than 64"),
            (|m| m.version = 0, Code::InvalidArgument, "version is 0"),
            (|m| m.volume = 77, Code::NotFound, "there is no volume number 77"),
            (|m| m.lineage[3] ^= 1, Code::InvalidArgument, "changes the volume's lineage"),
        ];
        for (break_it, code, text) in cases {
            let mut message = good.clone();
            break_it(&mut message);
            refused(&mut client, message, *code, text).await;
        }
        // A version that jumps is a conflict with what there is, and tells it.
        let jump = CompareAndSwapRequest { record: Some(proto::Record { version: 9, ..good.clone() }) };
        let reply = client.compare_and_swap(jump).await.expect("an answer").into_inner();
        let current = proto::compare_and_swap_reply::Outcome::Conflict(record_to_message(&record));
        assert_eq!(reply.outcome, Some(current));
        let nothing = client.compare_and_swap(CompareAndSwapRequest { record: None }).await;
        assert_eq!(nothing.expect_err("nothing").message(), "record is missing");
        for (name, peer, text) in [
            ("x".repeat(50_000), "h:1", "a name has 1 to 63 of a-z"),
            ("n9".to_owned(), "", "peer_address: \"\" is not an address"),
            ("n9".to_owned(), "unix:/x", "peer_address: \"unix:/x\" is not an address"),
        ] {
            let request = JoinRequest {
                name,
                boot: 0,
                nbd_address: String::new(),
                peer_address: peer.to_owned(),
                facts: None,
            };
            let status = client.join(request).await.expect_err(text);
            assert!(status.code() == Code::InvalidArgument && status.message().contains(text), "{status:?}");
        }
    });
    assert_eq!(run(&mut ctl.command("node list --output=json")).matches("\"name\"").count(), 2);
    one.link.send(Command::Propose(next(&record, 5)));
    assert_eq!(two.wait_for_version(record.volume, 2).proposal, 5);
}

#[test]
fn the_commands_do_what_they_say_and_say_what_to_do() {
    let scratch = Scratch::new("records-cli");
    let mut ctl = Ctl::start(&scratch.file("records"));
    let text = |words: &str| run(&mut ctl.command(words));
    let wrong = |words: &str, expected: &str| {
        let output = run_to_fail(&mut ctl.command(words));
        assert!(output.contains(expected), "{words}: {output}");
    };
    assert_eq!(text("node list"), "no node has joined yet\n");
    let _nodes = ["n1", "n2", "n3"].map(|name| Node::join(&ctl.url(), name));
    let list = text("node list");
    assert!(
        list.starts_with("NAME  STATE      ZONE") && list.contains("\nn2    connected  -     0 "),
        "{list}"
    );
    assert!(text("volume list").contains("make one with `berth volume create NAME"));
    let made = text("volume create data --size 10G --on n1,n2,n3");
    assert_eq!(made, "volume data: 10G, replicas on n1, n2, n3\n");
    text("volume create logs --size 4096 --on n2 --min-in-sync 1");
    let list = text("volume list");
    assert_eq!(list.lines().nth(1), Some("data  10G   -     n1,n2,n3  -     never"), "{list}");
    let json = text("volume show data --output json");
    for part in ["\"name\": \"data\"", "\"size_bytes\": 10737418240", "\"min_in_sync\": 2", "\"version\": 1"]
    {
        assert!(json.contains(part), "{part}: {json}");
    }
    assert!(text("volume show data").contains("in sync: n1, n2, n3 (at least 2, wanted 3)"));
    wrong("volume create data --size 1G --on n1", "there is a volume data already; choose another name");
    wrong("volume create Data --size 1G --on n1", "'D' is not one of a-z");
    wrong("volume create x --size 1000 --on n1", "1000 is not a multiple of 4096 bytes");
    wrong("volume create x --size 1G --on n1,n9", "there is no node n9; `berth node list` shows the nodes");
    wrong("volume create x --size 1G --on n1,n1", "node n1 is named twice");
    wrong("volume create x --size 1G --on n1 --min-in-sync 2", "with 1 replicas it is 1 to 1");
    wrong("volume show x", "there is no volume x; `berth volume list` shows what there is");
    assert_eq!(text("volume delete data"), "volume data is deleted\n");
    wrong("volume delete data", "there is no volume data");

    let second = run_to_fail(
        berth(&["ctl", "--listen=127.0.0.1:0"])
            .arg(format!("--store=redb:{}", scratch.file("records").display())),
    );
    assert!(second.contains("another `berth ctl` has it open"), "{second}");
    let open = run_to_fail(
        berth(&["ctl", "--listen=0.0.0.0:0"])
            .arg(format!("--store=redb:{}", scratch.file("other").display())),
    );
    assert!(open.contains("no authentication yet") && open.contains("--insecure"), "{open}");
    ctl.stop();
    let away = run_to_fail(&mut ctl.command("volume list"));
    assert!(
        away.contains("cannot reach berth ctl at http://127.0.0.1:") && away.contains("--ctl URL"),
        "{away}"
    );
    let from_environment = run_to_fail(berth(&["node", "list"]).env("BERTH_CTL", "https://h:1"));
    assert!(from_environment.contains("write http://HOST:PORT (there is no TLS yet)"), "{from_environment}");
}
