//! What the connections to one volume share: what may be on it, and how they come back together after a loss.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::sleep;
use std::time::{Duration, Instant};

use datapath::wire::nbd_transmission::HeaderStyle;

use super::args::BenchArgs;
use super::client::{Ask, Client, ClientError};
use super::report::Kind;
use super::uri::NbdUri;
use super::verify::{ReadMark, SECTOR_BYTES, Verifier};
use super::{BenchError, MISMATCHES_SHOWN};

/// Between two attempts to reach a server that is away: the kernel gives no sign when it comes back.
const RECONNECT_PAUSE: Duration = Duration::from_millis(10);
const READ_BACK_BYTES: u64 = 256 << 10;
const READ_BACK_DEPTH: usize = 16;

/// One volume under test.
pub(super) struct Volume<'a> {
    /// Where it may be found: its own URI, and those of other nodes.
    places: Vec<&'a NbdUri>,
    /// Where it was found last.
    place: AtomicUsize,
    pub(super) wish: HeaderStyle,
    reconnect: Duration,
    /// A server that owes an answer for longer is given up.
    pub(super) patience: Duration,
    verifier: Option<Mutex<Verifier>>,
    /// Set as soon as one connection breaks: all others leave too, so that the loss has one moment.
    broken: AtomicBool,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

struct Meeting {
    /// Connections that are still at work.
    members: u32,
    /// Those that wait for the server to come back.
    waiting: u32,
    /// One of them is trying to reach it.
    led: bool,
    /// How often the server came back.
    returns: u64,
    given_up: bool,
}

impl<'a> Volume<'a> {
    pub(super) fn new(
        args: &'a BenchArgs,
        uri: &'a NbdUri,
        wish: HeaderStyle,
        verifier: Option<Verifier>,
    ) -> Volume<'a> {
        let members = args.connections;
        Volume {
            places: std::iter::once(uri).chain(&args.failover).collect(),
            place: AtomicUsize::new(0),
            wish,
            reconnect: Duration::from_secs_f64(args.reconnect),
            patience: Duration::from_secs_f64(args.answer_timeout),
            verifier: verifier.map(Mutex::new),
            broken: AtomicBool::new(false),
            meeting: Mutex::new(Meeting { members, waiting: 0, led: false, returns: 0, given_up: false }),
            changed: Condvar::new(),
        }
    }

    /// Where it was found last, or is looked for now.
    pub(super) fn uri(&self) -> &'a NbdUri {
        self.places[self.place.load(Ordering::Relaxed) % self.places.len()]
    }

    /// The verifier, if the run verifies.
    pub(super) fn verifier(&self) -> Option<MutexGuard<'_, Verifier>> {
        self.verifier.as_ref().map(|verifier| verifier.lock().expect("no holder panics"))
    }

    pub(super) fn into_verifier(self) -> Option<Verifier> {
        self.verifier.map(|verifier| verifier.into_inner().expect("no holder panics"))
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// The server owes an answer for longer than the run waits. If the volume may be elsewhere, that server is lost.
    pub(super) fn overdue(&self) -> BenchError {
        let (uri, seconds) = (self.uri().to_string(), self.patience.as_secs_f64());
        if self.places.len() == 1 {
            return BenchError::NoAnswer { uri, seconds };
        }
        let text = format!("no answer within {seconds} s");
        BenchError::Client {
            uri,
            why: ClientError::Lost(std::io::Error::new(std::io::ErrorKind::TimedOut, text)),
        }
    }

    /// A connection has done its part.
    pub(super) fn leave(&self) {
        self.meeting.lock().expect("no holder panics").members -= 1;
        self.changed.notify_all();
    }

    /// The caller's connection is lost and closed. Returns when the server is back and, if the run verifies,
    /// everything on it was checked.
    ///
    /// All connections meet here first, because a change may only be judged once nothing of the time before the
    /// loss is on its way; one of them then does the work for all.
    pub(super) fn come_back(&self, why: ClientError, reconnects: &AtomicU64) -> Result<(), BenchError> {
        self.broken.store(true, Ordering::Relaxed);
        let lost = |why| BenchError::Client { uri: self.uri().to_string(), why };
        if self.reconnect.is_zero() || !matches!(why, ClientError::Lost(_)) {
            return Err(lost(why));
        }
        let mut meeting = self.meeting.lock().expect("no holder panics");
        let returns = meeting.returns;
        meeting.waiting += 1;
        self.changed.notify_all();
        while meeting.returns == returns && !meeting.given_up {
            if meeting.waiting < meeting.members || meeting.led {
                meeting = self.changed.wait(meeting).expect("no holder panics");
                continue;
            }
            meeting.led = true;
            drop(meeting);
            let reached = self.reach_and_check(why);
            meeting = self.meeting.lock().expect("no holder panics");
            meeting.led = false;
            meeting.waiting = 0;
            self.changed.notify_all();
            if let Err(error) = reached {
                meeting.given_up = true;
                return Err(error);
            }
            meeting.returns += 1;
            reconnects.fetch_add(1, Ordering::Relaxed);
            self.broken.store(false, Ordering::Relaxed);
            return Ok(());
        }
        if meeting.given_up { Err(lost(why)) } else { Ok(()) }
    }

    /// Someone failed for good: those that wait must not wait for ever.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        self.meeting.lock().expect("no holder panics").given_up = true;
        self.changed.notify_all();
    }

    fn reach_and_check(&self, mut why: ClientError) -> Result<(), BenchError> {
        loop {
            if let Some(mut verifier) = self.verifier() {
                verifier.crashed();
            }
            let client = self.reach().map_err(|_| BenchError::Client { uri: self.uri().to_string(), why })?;
            match self.read_back(client) {
                // The server may be lost again while everything is read, or another one be found to lead.
                Err(BenchError::Client { why: again @ ClientError::Lost(_), .. }) => {
                    self.place.fetch_add(1, Ordering::Relaxed);
                    why = again;
                }
                other => return other,
            }
        }
    }

    /// A connection to wherever the volume is served now.
    fn reach(&self) -> Result<Client<ReadMark>, ClientError> {
        let deadline = Instant::now() + self.reconnect;
        loop {
            match Client::connect(self.uri(), self.wish, READ_BACK_DEPTH, true, self.patience) {
                Ok(client) => return Ok(client),
                Err(_) if Instant::now() < deadline => {
                    self.place.fetch_add(1, Ordering::Relaxed);
                    sleep(RECONNECT_PAUSE);
                }
                Err(why) => return Err(why),
            }
        }
    }

    /// The load has ended: reads and checks the whole volume once more.
    pub(super) fn conclude(&self) -> Result<(), BenchError> {
        self.read_back(self.reach().map_err(|why| BenchError::Client { uri: self.uri().to_string(), why })?)
    }

    /// Reads and checks the whole volume. Without verification there is nothing to do.
    pub(super) fn read_back(&self, mut client: Client<ReadMark>) -> Result<(), BenchError> {
        let Some(size_bytes) = self.verifier().map(|verifier| verifier.sector_count() * SECTOR_BYTES) else {
            client.disconnect();
            return Ok(());
        };
        let failed = |why| BenchError::Client { uri: self.uri().to_string(), why };
        let mut next = 0;
        let mut last_answer = Instant::now();
        while next < size_bytes || client.in_flight() > 0 {
            if last_answer.elapsed() > self.patience {
                return Err(self.overdue());
            }
            while next < size_bytes && client.has_room() {
                let length = READ_BACK_BYTES.min(size_bytes - next);
                let length_bytes = u32::try_from(length).expect("at most READ_BACK_BYTES");
                let mark = self.verifier().expect("checked above").begin_read();
                let ask = Ask { kind: Kind::Read, offset_bytes: next, length_bytes, fua: false };
                client.queue(ask, mark, |_| {});
                next += length;
            }
            let all_sent = client.send_some().map_err(failed)?;
            if !all_sent {
                client.wait(Instant::now(), None).map_err(failed)?;
            }
            client.receive_some(all_sent).map_err(failed)?;
            while let Some(answer) = client.next_answer().map_err(failed)? {
                last_answer = Instant::now();
                if let Some(error) = answer.error {
                    return Err(self.read_failed(answer.ask.offset_bytes, error));
                }
                self.check(answer.tag, answer.ask.offset_bytes, &answer.data)?;
                client.recycle(answer.data);
            }
        }
        client.disconnect();
        Ok(())
    }

    pub(super) fn read_failed(&self, offset_bytes: u64, error: u32) -> BenchError {
        BenchError::ReadFailed { uri: self.uri().to_string(), offset_bytes, error }
    }

    /// Checks what a read brought.
    pub(super) fn check(&self, mark: ReadMark, offset_bytes: u64, data: &[u8]) -> Result<(), BenchError> {
        let Some(mut verifier) = self.verifier() else { return Ok(()) };
        let wrong = verifier.finish_read(mark, offset_bytes / SECTOR_BYTES, data);
        if wrong.is_empty() {
            return Ok(());
        }
        let first = wrong.iter().take(MISMATCHES_SHOWN).map(|one| format!("\n  {one}")).collect();
        Err(BenchError::Mismatch { uri: self.uri().to_string(), count: wrong.len(), first })
    }
}
