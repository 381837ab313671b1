//! `berth bench`: loads NBD volumes, measures them, and checks every byte if asked to.
//!
//! ```text
//!   args      what to do                 load      one connection's work: what, when, how long it took
//!   uri       where the volumes are      client    NBD on one socket, without waiting
//!   volume    what connections share     verify    what may be on the volume
//!   report    what was found             random    seeded choices
//! ```
#![expect(clippy::disallowed_methods, reason = "a load generator reads the clock and waits for servers")]

mod args;
mod client;
mod load;
mod random;
mod report;
mod uri;
mod verify;
mod volume;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use datapath::wire::nbd_handshake::transmission_flag;
use datapath::wire::nbd_transmission::HeaderStyle;

pub use self::args::{BenchArgs, BlockRange, Replies};
pub use self::client::ClientError;
pub use self::report::{Kind, Latency, OperationReport, Report};
pub use self::uri::{NbdUri, Server};
pub use self::verify::{Loss, Mismatch, Verifier};

use self::client::Client;
use self::load::{Counts, Tag, Worker};
use self::random::Random;
use self::report::Tally;
use self::verify::{ReadMark, SECTOR_BYTES};
use self::volume::Volume;

/// Wrong sectors that an error message lists.
const MISMATCHES_SHOWN: usize = 8;

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The options make no sense.
    #[error("{0}")]
    Arguments(String),
    /// A connection failed.
    #[error("{uri}: {why}")]
    Client {
        /// The volume.
        uri: String,
        /// What happened.
        why: ClientError,
    },
    /// The server owes an answer for too long.
    #[error("{uri}: a request was not answered within {seconds} s")]
    NoAnswer {
        /// The volume.
        uri: String,
        /// How long the run waits.
        seconds: f64,
    },
    /// A read failed while verifying: the data is not there.
    #[error("{uri}: reading at byte {offset_bytes} failed with error {error}")]
    ReadFailed {
        /// The volume.
        uri: String,
        /// Where.
        offset_bytes: u64,
        /// The NBD error number.
        error: u32,
    },
    /// The volume holds what it must not hold.
    #[error("{uri}: {count} sectors of one read are wrong:{first}")]
    Mismatch {
        /// The volume.
        uri: String,
        /// Wrong sectors in the read that found it.
        count: usize,
        /// The first of them, one per line.
        first: String,
    },
    /// The state file cannot be used.
    #[error("state file {path}: {why}")]
    State {
        /// Where it is.
        path: String,
        /// What happened.
        why: io::Error,
    },
}

/// What all connections do.
struct Plan {
    depth: usize,
    mix: [(Kind, u64); Kind::ALL.len()],
    weight: u64,
    /// Mean time between two arrivals at one connection; none without a rate.
    gap_ns: Option<f64>,
    /// Where the payload of unverified writes comes from: nothing that a server could compress.
    noise: Vec<u8>,
}

impl Plan {
    fn new(args: &BenchArgs) -> Plan {
        let mut mix = [
            (Kind::Read, u64::from(args.read)),
            (Kind::Write, u64::from(args.write)),
            (Kind::Trim, u64::from(args.trim)),
            (Kind::Zeroes, u64::from(args.zeroes)),
            (Kind::Flush, u64::from(args.flush)),
        ];
        if mix.iter().all(|(_, weight)| *weight == 0) {
            mix[0].1 = 1;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of connections")]
        let connections = args.connections as f64 * args.uris.len() as f64;
        let gap_ns = (args.rate > 0.0).then_some(1e9 * connections / args.rate);
        let mut random = Random::new(args.seed);
        let words = (args.block.most as usize + (1 << 20)) / 8;
        let noise = (0..words).flat_map(|_| random.next().to_le_bytes()).collect();
        let weight = mix.iter().map(|(_, weight)| weight).sum();
        Plan { depth: args.depth as usize, mix, weight, gap_ns, noise }
    }
}

/// A run as another thread sees and steers it.
#[derive(Debug, Default)]
pub struct Control {
    finish: AtomicBool,
    begun: AtomicBool,
    reconnects: AtomicU64,
    answered: AtomicU64,
}

impl Control {
    /// Ends the load early: nothing new is sent, what is under way is waited for and verified.
    pub fn finish(&self) {
        self.finish.store(true, Ordering::Relaxed);
    }

    /// Is there a connection to every server, so that losing one is part of the run?
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// How often, so far, a server came back and (with `--verify`) was found in order.
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Answers so far, errors too.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    fn is_finishing(&self) -> bool {
        self.finish.load(Ordering::Relaxed)
    }
}

/// Runs the load and reports what it found.
///
/// # Errors
/// Those of [`run_with`].
pub fn run(args: &BenchArgs) -> Result<Report, BenchError> {
    run_with(args, &Control::default())
}

/// Like [`run`], under another thread's control.
///
/// # Errors
/// When the options make no sense, a server cannot be reached or breaks the protocol, or verification finds
/// anything wrong. Requests that a server answers with an error are counted, not failures of the run, except
/// for reads while verifying.
pub fn run_with(args: &BenchArgs, control: &Control) -> Result<Report, BenchError> {
    args.check().map_err(BenchError::Arguments)?;
    let plan = Plan::new(args);
    let wish = match args.replies {
        Replies::Simple => HeaderStyle::Simple,
        Replies::Structured => HeaderStyle::Structured,
        Replies::Extended => HeaderStyle::Extended,
    };
    let mut volumes = Vec::new();
    let mut clients = Vec::new();
    for (position, uri) in args.uris.iter().enumerate() {
        for _ in 0..args.connections {
            clients.push(connect::<Tag>(args, uri, wish, plan.depth)?);
        }
        let newest = clients.last().expect("at least one connection");
        check_export(args, uri, newest)?;
        let size_bytes = newest.size_bytes;
        let loaded = prepare_verifier(args, position, size_bytes)?;
        let fresh = loaded.as_ref().is_none_or(|(_, fresh)| *fresh);
        let verifier = loaded.map(|(verifier, _)| verifier);
        let volume = Volume::new(args, uri, wish, verifier);
        if !fresh {
            volume.read_back(connect::<ReadMark>(args, uri, wish, 16)?)?;
        }
        volumes.push((volume, size_bytes));
    }
    let start = Instant::now();
    control.begun.store(true, Ordering::Relaxed);
    let counts = run_workers(args, &plan, &volumes, clients, (start, control))?;
    let report = summarize(args, control, &counts, start);
    conclude(args, volumes, report)
}

fn connect<T>(
    args: &BenchArgs,
    uri: &NbdUri,
    wish: HeaderStyle,
    depth: usize,
) -> Result<Client<T>, BenchError> {
    let patience = Duration::from_secs_f64(args.answer_timeout);
    Client::connect(uri, wish, depth, args.verify, patience)
        .map_err(|why| BenchError::Client { uri: uri.to_string(), why })
}

/// Refuses a run that this export cannot serve.
fn check_export(args: &BenchArgs, uri: &NbdUri, client: &Client<Tag>) -> Result<(), BenchError> {
    let refuse = |why: String| Err(BenchError::Arguments(format!("{uri}: {why}")));
    let changes = args.write + args.trim + args.zeroes > 0;
    if changes && client.offers(transmission_flag::READ_ONLY) {
        return refuse("the volume is read-only".to_owned());
    }
    let wanted = [
        (args.flush > 0, transmission_flag::SEND_FLUSH, "FLUSH (--flush)"),
        (args.fua > 0, transmission_flag::SEND_FUA, "FUA (--fua)"),
        (args.trim > 0, transmission_flag::SEND_TRIM, "TRIM (--trim)"),
        (args.zeroes > 0, transmission_flag::SEND_WRITE_ZEROES, "WRITE_ZEROES (--zeroes)"),
    ];
    for (used, flag, name) in wanted {
        if used && !client.offers(flag) {
            return refuse(format!("the server does not offer {name}"));
        }
    }
    if args.verify && args.connections > 1 && !client.offers(transmission_flag::CAN_MULTI_CONN) {
        return refuse(
            "the server does not promise that several connections see each other's writes".to_owned(),
        );
    }
    if args.block.most > client.payload_bytes_max {
        return refuse(format!("--block is above the server's limit of {} bytes", client.payload_bytes_max));
    }
    if client.size_bytes / u64::from(args.connections) < u64::from(args.block.most) {
        return refuse(format!("the volume's {} bytes are too few for --block", client.size_bytes));
    }
    Ok(())
}

/// What may be on the volume at the start, and whether that is nothing but zeroes.
fn prepare_verifier(
    args: &BenchArgs,
    position: usize,
    size_bytes: u64,
) -> Result<Option<(Verifier, bool)>, BenchError> {
    if !args.verify {
        return Ok(None);
    }
    let fresh = || Verifier::new(size_bytes, args.seed.wrapping_add(position as u64), args.after_loss);
    let Some(path) = &args.state else { return Ok(Some((fresh(), true))) };
    let failed = |why| BenchError::State { path: path.display().to_string(), why };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some((fresh(), true))),
        Err(error) => return Err(failed(error)),
    };
    let verifier = Verifier::load(&mut BufReader::new(file)).map_err(failed)?;
    let other = |what: &str| Err(failed(io::Error::other(format!("it is about a volume of another {what}"))));
    if verifier.sector_count() != size_bytes / SECTOR_BYTES {
        return other("size");
    }
    if verifier.loss() != args.after_loss {
        return other("--after-loss");
    }
    Ok(Some((verifier, false)))
}

fn run_workers(
    args: &BenchArgs,
    plan: &Plan,
    volumes: &[(Volume<'_>, u64)],
    clients: Vec<Client<Tag>>,
    (start, control): (Instant, &Control),
) -> Result<Vec<Counts>, BenchError> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, client) in clients.into_iter().enumerate() {
            let (volume, size_bytes) = &volumes[number / args.connections as usize];
            let range = part_of_volume(args, *size_bytes, number % args.connections as usize);
            let random = Random::new(args.seed ^ (number as u64 + 1) << 32);
            let next_offset = range.start;
            let worker = Worker { args, plan, volume, stop: &stop, control, random, next_offset, range };
            threads.push(scope.spawn(move || worker.run(client, start)));
        }
        let results: Vec<_> =
            threads.into_iter().map(|one| one.join().expect("workers do not panic")).collect();
        let (done, mut failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        // A connection that was given up because another one found out what is wrong has less to tell.
        failed.sort_by_key(|result| matches!(result, Err(BenchError::Client { .. })));
        failed.into_iter().take(1).chain(done).collect()
    })
}

/// Random access goes everywhere; in order, each connection has its own part.
fn part_of_volume(args: &BenchArgs, size_bytes: u64, connection: usize) -> std::ops::Range<u64> {
    let unit = u64::from(args.block.least);
    if !args.sequential {
        return 0..size_bytes / unit * unit;
    }
    let part = size_bytes / u64::from(args.connections) / unit * unit;
    let start = part * connection as u64;
    start..start + part
}

fn summarize(args: &BenchArgs, control: &Control, counts: &[Counts], start: Instant) -> Report {
    let last_answer = counts.iter().map(|counts| counts.last_answer).max().unwrap_or(start);
    let seconds = last_answer.duration_since(start).as_secs_f64().max(1e-9);
    let mut operations = Vec::new();
    for kind in Kind::ALL {
        let mut sum = Tally::new();
        for counts in counts {
            sum.add(&counts.tallies[kind as usize]);
        }
        if !sum.latency_ns.is_empty() || sum.errors > 0 {
            operations.push(OperationReport::new(kind, &sum, seconds));
        }
    }
    Report {
        uris: args.uris.iter().map(NbdUri::to_string).collect(),
        seconds,
        operations,
        reconnects: control.reconnects(),
        not_sent: counts.iter().map(|counts| counts.not_sent).sum(),
        sectors_verified: None,
    }
}

/// The full read-back, and the state for the next run.
fn conclude(
    args: &BenchArgs,
    volumes: Vec<(Volume<'_>, u64)>,
    mut report: Report,
) -> Result<Report, BenchError> {
    if !args.verify {
        return Ok(report);
    }
    let mut sectors = 0;
    for (volume, _) in volumes {
        volume.conclude()?;
        let verifier = volume.into_verifier().expect("the run verifies");
        sectors += verifier.sectors_checked();
        if let Some(path) = &args.state {
            save(&verifier, path)
                .map_err(|why| BenchError::State { path: path.display().to_string(), why })?;
        }
    }
    report.sectors_verified = Some(sectors);
    Ok(report)
}

fn save(verifier: &Verifier, path: &Path) -> io::Result<()> {
    // Written beside and renamed, so that an interrupted run leaves the old state.
    let beside = path.with_extension("new");
    let mut out = BufWriter::new(File::create(&beside)?);
    verifier.save(&mut out)?;
    out.flush()?;
    std::fs::rename(&beside, path)
}
