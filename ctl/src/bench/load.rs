//! One connection's work: decides what to send and when, and counts the answers.
//!
//! With a rate, arrivals form a Poisson process and a request's latency counts from its arrival, not from the
//! moment there was room for it: a server that stalls cannot hide the requests that waited meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::args::BenchArgs;
use super::client::{Answer, Ask, Client, ClientError};
use super::random::Random;
use super::report::{Kind, Tally};
use super::verify::{Change, FlushMark, Outcome, ReadMark, SECTOR_BYTES, Trim, fill};
use super::volume::Volume;
use super::{BenchError, Control, Plan};

/// What the verifier wants back with the answer.
#[derive(Clone, Copy, Debug)]
enum Proof {
    None,
    Read(ReadMark),
    Change(Change),
    Trim(Trim),
    Flush(FlushMark),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Tag {
    intended: Instant,
    proof: Proof,
}

/// The work of one connection.
pub(super) struct Worker<'a> {
    pub(super) args: &'a BenchArgs,
    pub(super) plan: &'a Plan,
    pub(super) volume: &'a Volume<'a>,
    /// Some connection failed for good: all stop.
    pub(super) stop: &'a AtomicBool,
    pub(super) control: &'a Control,
    pub(super) random: Random,
    /// The part of the volume that this connection goes through in order: next, first and last byte.
    pub(super) next_offset: u64,
    pub(super) range: std::ops::Range<u64>,
}

/// What one connection counted.
pub(super) struct Counts {
    pub(super) tallies: [Tally; Kind::ALL.len()],
    pub(super) not_sent: u64,
    pub(super) last_answer: Instant,
}

/// When requests arrive.
struct Arrivals {
    end: Instant,
    /// The next arrival and the mean gap in nanoseconds; none: whenever there is room.
    paced: Option<(Instant, f64)>,
}

impl Worker<'_> {
    /// Works until the end of the run, through losses of the server if that is wanted.
    pub(super) fn run(mut self, client: Client<Tag>, start: Instant) -> Result<Counts, BenchError> {
        let mut counts =
            Counts { tallies: std::array::from_fn(|_| Tally::new()), not_sent: 0, last_answer: start };
        let mut arrivals = Arrivals {
            end: start + Duration::from_secs_f64(self.args.duration),
            paced: self.plan.gap_ns.map(|gap_ns| (start, gap_ns)),
        };
        let mut client = Some(client);
        let done = loop {
            let ended = match client.take() {
                Some(client) => self.work(client, &mut arrivals, &mut counts),
                None => match Client::connect(
                    self.volume.uri(),
                    self.volume.wish,
                    self.plan.depth,
                    self.args.verify,
                    self.volume.patience,
                ) {
                    Ok(new) => {
                        client = Some(new);
                        continue;
                    }
                    Err(why) => Err(Ended::Lost(why)),
                },
            };
            match ended {
                Ok(()) => break Ok(()),
                Err(Ended::Failed(error)) => break Err(error),
                Err(Ended::Lost(_)) if self.stop.load(Ordering::Relaxed) => break Ok(()),
                Err(Ended::Lost(why)) => {
                    if let Err(error) = self.volume.come_back(why, &self.control.reconnects) {
                        break Err(error);
                    }
                }
            }
        };
        if done.is_err() {
            self.stop.store(true, Ordering::Relaxed);
            self.volume.give_up();
        }
        self.volume.leave();
        done.map(|()| counts)
    }

    fn work(
        &mut self,
        mut client: Client<Tag>,
        arrivals: &mut Arrivals,
        counts: &mut Counts,
    ) -> Result<(), Ended> {
        let mut last_answer = Instant::now();
        loop {
            let now = Instant::now();
            if self.control.is_finishing() {
                arrivals.end = arrivals.end.min(now);
            }
            self.send_due(&mut client, arrivals, now, counts);
            if client.in_flight() == 0 {
                last_answer = now;
                if now >= arrivals.end {
                    client.disconnect();
                    return Ok(());
                }
            }
            if self.volume.is_broken() || self.stop.load(Ordering::Relaxed) {
                return Err(Ended::Lost(lost("another connection to the volume was lost")));
            }
            if now.duration_since(last_answer) > self.volume.patience {
                return Err(Ended::from(self.volume.overdue()));
            }
            let all_sent = client.send_some()?;
            // A closed loop with everything sent has nothing to do but to receive.
            let idle = arrivals.paced.is_none() && all_sent && client.in_flight() > 0;
            if !idle {
                let due = arrivals.paced.filter(|_| client.has_room()).map(|(at, _)| at);
                client.wait(now, due)?;
            }
            client.receive_some(idle)?;
            let mut received = None;
            while let Some(answer) = client.next_answer()? {
                let at = *received.get_or_insert_with(Instant::now);
                let data = self.count(answer, at, counts).map_err(Ended::Failed)?;
                client.recycle(data);
                last_answer = at;
            }
        }
    }

    /// Queues what has arrived by now, as far as there is room.
    fn send_due(
        &mut self,
        client: &mut Client<Tag>,
        arrivals: &mut Arrivals,
        now: Instant,
        counts: &mut Counts,
    ) {
        match &mut arrivals.paced {
            None => {
                while now < arrivals.end && client.has_room() {
                    self.send_one(client, now);
                }
            }
            Some((next, gap_ns)) => {
                while *next <= now && *next < arrivals.end {
                    if now >= arrivals.end {
                        counts.not_sent += 1;
                    } else if client.has_room() {
                        self.send_one(client, *next);
                    } else {
                        return;
                    }
                    let gap = self.random.poisson_gap_ns(*gap_ns);
                    *next += Duration::from_secs_f64(gap / 1e9);
                }
            }
        }
    }

    fn send_one(&mut self, client: &mut Client<Tag>, intended: Instant) {
        let ask = self.choose();
        let sectors = u64::from(ask.length_bytes) / SECTOR_BYTES;
        let first = ask.offset_bytes / SECTOR_BYTES;
        let mut seed = 0;
        let proof = self.volume.verifier().map_or(Proof::None, |mut verifier| {
            seed = verifier.seed();
            match ask.kind {
                Kind::Read => Proof::Read(verifier.begin_read()),
                Kind::Write => Proof::Change(verifier.begin_change(first, sectors, false)),
                Kind::Zeroes => Proof::Change(verifier.begin_change(first, sectors, true)),
                Kind::Trim => Proof::Trim(verifier.begin_trim(first, sectors)),
                Kind::Flush => Proof::Flush(verifier.begin_flush()),
            }
        });
        let (plan, random) = (self.plan, &mut self.random);
        client.queue(ask, Tag { intended, proof }, |payload| match proof {
            Proof::Change(change) => fill(seed, change, payload),
            _ => {
                let spare = (plan.noise.len() - payload.len()) as u64;
                let start = usize::try_from(random.below(spare + 1)).expect("inside the noise");
                payload.copy_from_slice(&plan.noise[start..start + payload.len()]);
            }
        });
    }

    fn choose(&mut self) -> Ask {
        let mut point = self.random.below(self.plan.weight);
        let mut kind = Kind::Read;
        for (candidate, weight) in self.plan.mix {
            if point < weight {
                kind = candidate;
                break;
            }
            point -= weight;
        }
        if kind == Kind::Flush {
            return Ask { kind, offset_bytes: 0, length_bytes: 0, fua: false };
        }
        let unit = u64::from(self.args.block.least);
        let span = self.range.end - self.range.start;
        let length = self.choose_length().min(span / unit * unit);
        let offset_bytes = if self.args.sequential {
            if self.next_offset + length > self.range.end {
                self.next_offset = self.range.start;
            }
            let offset = self.next_offset;
            self.next_offset += length;
            offset
        } else {
            self.range.start + self.random.below((span - length) / unit + 1) * unit
        };
        let fua = kind != Kind::Read && self.random.percent(self.args.fua);
        Ask { kind, offset_bytes, length_bytes: u32::try_from(length).expect("at most --block"), fua }
    }

    /// All magnitudes are equally frequent, and within one all lengths.
    fn choose_length(&mut self) -> u64 {
        let (least, most) = (u64::from(self.args.block.least), u64::from(self.args.block.most));
        let blocks = most / least;
        let low = 1_u64 << self.random.below(u64::from(blocks.ilog2()) + 1);
        let high = (2 * low).min(blocks + 1);
        (low + self.random.below(high - low)) * least
    }

    /// Counts an answer, lets the verifier judge it, and hands the memory back.
    fn count(
        &mut self,
        answer: Answer<Tag>,
        now: Instant,
        counts: &mut Counts,
    ) -> Result<Vec<u8>, BenchError> {
        let Answer { ask, tag, error, data } = answer;
        let tally = &mut counts.tallies[ask.kind as usize];
        counts.last_answer = now;
        self.control.answered.fetch_add(1, Ordering::Relaxed);
        if error.is_some() {
            tally.errors += 1;
        } else {
            tally.bytes += u64::from(ask.length_bytes);
            let latency = now.saturating_duration_since(tag.intended).as_nanos();
            let latency_ns = u64::try_from(latency).expect("a run is shorter than 500 years");
            tally.latency_ns.record(latency_ns).expect("a resizing histogram takes any value");
        }
        match (tag.proof, error) {
            (Proof::None, _) => {}
            (Proof::Read(_), Some(error)) => return Err(self.volume.read_failed(ask.offset_bytes, error)),
            (Proof::Read(mark), None) => self.volume.check(mark, ask.offset_bytes, &data)?,
            (Proof::Change(change), error) => {
                let mut verifier = self.volume.verifier().expect("proofs come from it");
                verifier.finish_change(change, outcome_of(ask, error));
            }
            (Proof::Trim(trim), error) => {
                let mut verifier = self.volume.verifier().expect("proofs come from it");
                verifier.finish_trim(trim, outcome_of(ask, error));
            }
            (Proof::Flush(_), Some(_)) => {}
            (Proof::Flush(mark), None) => {
                self.volume.verifier().expect("proofs come from it").finish_flush(mark);
            }
        }
        Ok(data)
    }
}

fn outcome_of(ask: Ask, error: Option<u32>) -> Outcome {
    if error.is_some() { Outcome::Failed } else { Outcome::Done { durable: ask.fua } }
}

/// Why a connection stopped working.
enum Ended {
    Lost(ClientError),
    Failed(BenchError),
}

impl From<ClientError> for Ended {
    fn from(why: ClientError) -> Ended {
        Ended::Lost(why)
    }
}

impl From<BenchError> for Ended {
    fn from(error: BenchError) -> Ended {
        match error {
            BenchError::Client { why, .. } => Ended::Lost(why),
            other => Ended::Failed(other),
        }
    }
}

fn lost(why: &str) -> ClientError {
    ClientError::Lost(std::io::Error::new(std::io::ErrorKind::ConnectionAborted, why))
}
