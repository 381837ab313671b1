//! PostgreSQL on a volume whose server is killed: every transaction that was answered is there, and every page is right.
//!
//! The database writes to ext4 on the volume, which nbdfuse and the loop driver attach. A kill of Berth takes the disk
//! away under load, so PostgreSQL falls, and everything it and the kernel still had in memory is thrown away with the
//! mount. What comes back is what was flushed: the journal, the write-ahead log, and the pages.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use system_tests::harness::metrics::Page;
use system_tests::harness::mounted::{Mounted, keep_mounts_private};
use system_tests::harness::postgres::{Postgres, check_checksums, make_cluster};
use system_tests::harness::server::{Options, Server};
use system_tests::harness::tools::run;
use system_tests::harness::{Scratch, full_tier, print_figure};

const VOLUME_MIB: u64 = 1024;
const LEDGER_CLIENTS: usize = 2;
const PGBENCH_CLIENTS: u64 = 4;
/// Rows that each ledger client gets in before the kill, and how many more in each further round.
const ROWS_BEFORE_KILL: u64 = 300;
const MORE_ROWS: u64 = 170;
/// A database that takes longer for them is stuck.
const ROUND_TIMEOUT: Duration = Duration::from_secs(120);

/// What one client of the ledger table did, over all rounds.
#[derive(Debug, Default)]
struct Client {
    /// Rows that were answered.
    answered: BTreeSet<u64>,
    /// The last row that was sent.
    sent: u64,
}

impl Client {
    /// Inserts numbered rows, each a transaction, until the database goes away.
    fn work(&mut self, database: &Postgres, number: usize, answered: &AtomicU64) {
        let mut psql = database.client("psql");
        psql.args(["-X", "-v", "ON_ERROR_STOP=1"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut psql = psql.stderr(Stdio::null()).spawn().expect("psql starts");
        let mut input = psql.stdin.take().expect("piped");
        let mut answers = BufReader::new(psql.stdout.take().expect("piped")).lines();
        loop {
            let row = self.sent + 1;
            self.sent = row;
            let line = format!("INSERT INTO ledger VALUES ({number}, {row}, repeat(md5('{row}'), 30));\n");
            if input.write_all(line.as_bytes()).is_err() {
                break;
            }
            let Some(Ok(answer)) = answers.next() else { break };
            assert_eq!(answer, "INSERT 0 1", "psql answers one line for one statement");
            self.answered.insert(row);
            answered.fetch_add(1, Ordering::Relaxed);
        }
        drop(input);
        psql.wait().expect("our child");
    }
}

/// Everything that clients were told, over all rounds.
#[derive(Debug, Default)]
struct Told {
    clients: [Client; LEDGER_CLIENTS],
    /// Transactions that pgbench saw committed.
    pgbench: u64,
    rounds: u64,
}

/// Loads the database until the ledger has so many rows more, and kills Berth. Returns with the database down.
fn load_until_kill(server: &mut Server, database: Postgres, told: &mut Told, rows: u64) {
    let mut pgbench = database.client("pgbench");
    pgbench.args(["--no-vacuum", "--time=600", "--jobs=1", &format!("--client={PGBENCH_CLIENTS}")]);
    let mut pgbench = pgbench.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("pgbench starts");
    let answered: [AtomicU64; LEDGER_CLIENTS] = Default::default();
    let deadline = Instant::now() + ROUND_TIMEOUT;
    let flushes = |server: &Server| {
        Page::fetch(server.metrics_url()).sum("berth_requests_total", "operation=\"flush\"")
    };
    let before = flushes(server);
    // Nothing may panic in here: the clients end only when the database does.
    let (most, flushed) = thread::scope(|scope| {
        for ((number, client), answered) in told.clients.iter_mut().enumerate().zip(&answered) {
            let database = &database;
            scope.spawn(move || client.work(database, number, answered));
        }
        let behind = || answered.iter().any(|answered| answered.load(Ordering::Relaxed) < rows);
        while behind() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        let most = answered.iter().map(|answered| answered.load(Ordering::Relaxed)).max().expect("clients");
        let flushed = flushes(server) - before;
        server.kill();
        database.put_down();
        (most, flushed)
    });
    database.crash();
    assert!(
        answered.iter().all(|answered| answered.load(Ordering::Relaxed) >= rows),
        "too slow: {answered:?}"
    );
    // One client's transactions come one after the other, so each needed a flush that none before it had.
    #[expect(clippy::cast_precision_loss, reason = "a count of rows")]
    let needed = most as f64;
    assert!(flushed >= needed, "{flushed} flushes for {needed} transactions in a row: fsync is not honoured");
    let output = BufReader::new(pgbench.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let processed = output
        .filter_map(|line| {
            line.strip_prefix("number of transactions actually processed: ")?.parse::<u64>().ok()
        })
        .next()
        .expect("pgbench counts its transactions");
    pgbench.wait().expect("our child");
    assert!(processed > 0, "pgbench had no turn");
    told.pgbench += processed;
    told.rounds += 1;
    println!(
        "round {}: {answered:?} rows, {processed} transactions of pgbench, {flushed} flushes",
        told.rounds
    );
}

/// Everything that clients were told is in the database, and nothing that nobody wrote.
fn check(database: &Postgres, told: &Told) {
    for (number, client) in told.clients.iter().enumerate() {
        let sql = format!(
            "SELECT number FROM ledger WHERE client = {number} AND filler = repeat(md5(number::text), 30)"
        );
        let found: BTreeSet<u64> =
            database.query(&sql).iter().map(|row| row.parse().expect("a number")).collect();
        let lost: Vec<_> = client.answered.difference(&found).collect();
        assert!(lost.is_empty(), "client {number}: answered and lost: {lost:?}");
        assert!(found.last().is_none_or(|last| *last <= client.sent), "client {number} never sent {found:?}");
        let whole = database.query(&format!("SELECT count(*) FROM ledger WHERE client = {number}"));
        assert_eq!(whole, [found.len().to_string()], "rows of client {number} that it never wrote, or twice");
    }
    let history: u64 = database.query("SELECT count(*) FROM pgbench_history")[0].parse().expect("a count");
    // Of each client of each round one more may have been committed and not answered.
    let most = told.pgbench + told.rounds * PGBENCH_CLIENTS;
    assert!(
        (told.pgbench..=most).contains(&history),
        "{history} in the history, {} were answered",
        told.pgbench
    );
    let sums = database.query(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
                (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)",
    );
    let sums: BTreeSet<&str> = sums[0].split('|').collect();
    assert_eq!(sums.len(), 1, "a transaction is there in parts: {sums:?}");
}

#[test]
fn every_answered_transaction_survives_kills_of_the_disk() {
    let (rounds, scale) = if full_tier() { (5, 20) } else { (2, 3) };
    keep_mounts_private();
    let scratch = Scratch::new("database");
    let mut options = Options::new(&scratch, VOLUME_MIB);
    options.more.push("--metrics=127.0.0.1:0".to_owned());
    let mut server = Server::start(&options);
    let mut disk = Mounted::attach(&scratch, server.uri());
    disk.make_ext4();
    let data = disk.mount().join("data");
    make_cluster(&data);
    let mut database = Postgres::start(&scratch, &data);
    run(database.client("pgbench").args(["--initialize", "--quiet", &format!("--scale={scale}")]));
    let table = "CREATE TABLE ledger (client int, number bigint, filler text, PRIMARY KEY (client, number))";
    assert!(database.query(table).is_empty());
    let mut told = Told::default();
    for round in 0..rounds {
        load_until_kill(&mut server, database, &mut told, ROWS_BEFORE_KILL + MORE_ROWS * round);
        disk.detach();
        server = Server::start(&options);
        disk = Mounted::attach(&scratch, server.uri());
        // The mount replays the journal; what comes out of that must be a filesystem without a fault.
        disk.mount();
        disk.unmount();
        disk.check_ext4();
        disk.mount();
        database = Postgres::start(&scratch, &data);
        database.check_tables();
        check(&database, &told);
        database.stop();
        check_checksums(&data);
        database = Postgres::start(&scratch, &data);
    }
    database.stop();
    disk.detach();
    server.stop();
    let rows: usize = told.clients.iter().map(|client| client.answered.len()).sum();
    print_figure(&format!(
        "{rounds} kills, none of {} answered transactions lost",
        rows as u64 + told.pgbench
    ));
}
