//! The inside of a node's link to ctl: connects, joins, watches, calls, and begins anew when the connection fails.
//!
//! One rule keeps proposals honest: a call whose outcome is not known is never made again. Its volume is *owed*: its record
//! is read and told, as soon as there is a connection.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender};
use datapath::record::{NodeId, Record, VolumeNumber};
use datapath::replica::check::{CheckReport, PassState};
use thiserror::Error;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use super::backoff::Backoff;
use super::convert::{
    MessageError, NodeInfo, check_to_message, facts_to_message, node_from_message, node_from_number,
    record_from_message, record_to_message, volume_from_number,
};
use super::limits::{CALL_TIMEOUT, REPLY_BYTES_MAX};
use super::link::{Command, LinkSettings, News, Signal, Waker};
use super::proto::{
    CompareAndSwapRequest, GetDeletedRequest, GetVolumeRequest, JoinRequest, ReportCheckRequest, WatchEvent,
    WatchRequest, compare_and_swap_reply, control_client::ControlClient, get_volume_request, watch_event,
};

/// Calls at a time.
const CALLS_MAX: usize = 32;
/// Reports of a volume that wait for a connection; without one for long, the oldest go.
const REPORTS_MAX: usize = 8;

/// Why a connection ended.
#[derive(Debug, Error)]
enum Ended {
    #[error("{0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] Status),
    #[error("ctl sent what it must not: {0}")]
    Message(#[from] MessageError),
    #[error("this node was number {was} and shall now be {now}: that ctl has the records of another cluster")]
    OtherCluster { was: u32, now: u32 },
    #[error("ctl has ended the watch")]
    Watch,
}

/// How a call ended.
#[derive(Debug)]
enum Outcome {
    /// The proposal has become the volume's record.
    Swapped(Record),
    /// This is the volume's record.
    Current(Record),
    /// There is no such volume.
    Gone,
    /// Its lineage, if it is known to have been deleted.
    Deleted(Option<[u8; 16]>),
    /// Whether it was deleted is to be asked again.
    NotSaid(Ended),
    /// A proposal broke a rule, or nobody knows what became of it.
    Unknown(Status),
    /// A read failed.
    Failed(Ended),
    /// ctl has taken note of a pass, or will not.
    Noted,
    /// Whether it has is not known.
    NotNoted(Ended),
}

/// The state that outlives connections.
pub(super) struct Session {
    settings: LinkSettings,
    endpoint: Endpoint,
    commands: Receiver<Command>,
    signal: Arc<Signal>,
    teller: Teller,
    /// Not sent yet, one for each volume.
    proposals: BTreeMap<VolumeNumber, Record>,
    /// Not sent yet: of each volume the newest report, and those before it that ended a pass.
    reports: BTreeMap<VolumeNumber, VecDeque<CheckReport>>,
    /// Those of them that end a pass and are being sent.
    telling: BTreeMap<VolumeNumber, CheckReport>,
    /// To be read and told.
    owed: BTreeSet<VolumeNumber>,
    /// Volumes without a record: were they deleted?
    doubted: BTreeSet<VolumeNumber>,
    /// With a call under way: one at a time for each volume.
    busy: BTreeSet<VolumeNumber>,
    backoff: Backoff,
}

type Client = ControlClient<Channel>;
type Calls = JoinSet<(VolumeNumber, Outcome)>;

impl Session {
    pub(super) fn new(
        settings: LinkSettings,
        endpoint: Endpoint,
        commands: Receiver<Command>,
        news: Sender<News>,
        signal: Arc<Signal>,
    ) -> Session {
        let wake = Arc::clone(&settings.wake);
        let backoff = Backoff::new(settings.boot);
        Session {
            settings,
            endpoint,
            commands,
            signal,
            teller: Teller { news, wake, told: BTreeMap::new(), nodes: None, node: None },
            proposals: BTreeMap::new(),
            reports: BTreeMap::new(),
            telling: BTreeMap::new(),
            owed: BTreeSet::new(),
            doubted: BTreeSet::new(),
            busy: BTreeSet::new(),
            backoff,
        }
    }

    /// Goes on until the link is dropped.
    pub(super) async fn run(mut self) {
        let mut complained = false;
        while !self.signal.is_stopped() {
            let Err(ended) = self.connection(&mut complained).await else { return };
            // The calls have ended with the connection; what they did has to be read.
            self.owed.append(&mut self.busy);
            for (volume, report) in std::mem::take(&mut self.telling) {
                self.reports.entry(volume).or_default().push_front(report);
            }
            let wait = self.backoff.next_wait();
            let ctl = &self.settings.ctl;
            if complained {
                tracing::debug!(%ctl, error = %ended, "no connection to ctl");
            } else {
                tracing::warn!(%ctl, error = %ended, "no connection to ctl; trying again until there is one");
            }
            complained = true;
            self.pause(wait).await;
        }
    }

    /// Waits, but not longer than the link lives. Commands that come meanwhile stay where they are.
    async fn pause(&self, wait: std::time::Duration) {
        let sleep = tokio::time::sleep(wait);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => return,
                () = self.signal.notify.notified() => if self.signal.is_stopped() { return },
            }
        }
    }

    /// Does everything over one connection. Ok: the link was dropped.
    async fn connection(&mut self, complained: &mut bool) -> Result<(), Ended> {
        let signal = Arc::clone(&self.signal);
        let connect = self.endpoint.clone();
        let Some(channel) = until_stopped(&signal, async move { connect.connect().await }).await else {
            return Ok(());
        };
        let mut client = ControlClient::new(channel?).max_decoding_message_size(REPLY_BYTES_MAX);
        let Some(node) = until_stopped(&signal, self.join(&mut client)).await else { return Ok(()) };
        let node = node?;
        let watch = in_time(client.watch(WatchRequest { node: node.0 }));
        let Some(watch) = until_stopped(&signal, watch).await else { return Ok(()) };
        let mut watch = watch?;
        let mut calls = Calls::new();
        // Volumes told over this connection, until the watch is in sync.
        let mut seen = Some(BTreeSet::new());
        loop {
            self.take_commands();
            self.start_calls(&client, &mut calls);
            tokio::select! {
                event = watch.message() => {
                    self.handle_event(event?.ok_or(Ended::Watch)?, &mut seen)?;
                    if seen.is_none() && *complained {
                        tracing::info!(ctl = %self.settings.ctl, "connected to ctl");
                        *complained = false;
                    }
                }
                Some(call) = calls.join_next() => {
                    let (volume, outcome) = call.expect("a call neither panics nor is cut off");
                    self.handle_outcome(volume, outcome)?;
                }
                () = signal.notify.notified() => if signal.is_stopped() { return Ok(()) },
            }
        }
    }

    async fn join(&mut self, client: &mut Client) -> Result<NodeId, Ended> {
        let request = JoinRequest {
            name: self.settings.name.to_string(),
            boot: self.settings.boot,
            nbd_address: self.settings.nbd.clone().unwrap_or_default(),
            peer_address: self.settings.peer.clone(),
            facts: Some(facts_to_message(&self.settings.facts)),
        };
        let reply = in_time(client.join(request)).await?;
        let node = node_from_number("node", reply.node)?;
        match self.teller.node {
            Some(was) if was != node => Err(Ended::OtherCluster { was: was.0, now: node.0 }),
            Some(_) => Ok(node),
            None => {
                self.teller.node = Some(node);
                self.teller.tell(News::Joined(node));
                Ok(node)
            }
        }
    }

    fn take_commands(&mut self) {
        for command in self.commands.try_iter() {
            match command {
                Command::Propose(record) => {
                    self.proposals.insert(record.volume, record);
                }
                Command::Read(volume) => {
                    self.owed.insert(volume);
                }
                Command::Checked(report) => {
                    let waiting = self.reports.entry(report.volume).or_default();
                    if waiting.back().is_some_and(|last| last.state == PassState::Running) {
                        waiting.pop_back();
                    }
                    if waiting.len() == REPORTS_MAX {
                        waiting.pop_front();
                    }
                    waiting.push_back(report);
                }
            }
        }
    }

    /// What is owed first: a later proposal is better made by one who knows the present record.
    fn start_calls(&mut self, client: &Client, calls: &mut Calls) {
        while calls.len() < CALLS_MAX
            && let Some(volume) = self.owed.iter().find(|volume| !self.busy.contains(volume)).copied()
        {
            self.owed.remove(&volume);
            self.busy.insert(volume);
            calls.spawn(read(client.clone(), volume));
        }
        while calls.len() < CALLS_MAX
            && let Some(volume) = self.doubted.iter().find(|volume| !self.busy.contains(volume)).copied()
        {
            self.doubted.remove(&volume);
            self.busy.insert(volume);
            calls.spawn(ask_whether_deleted(client.clone(), volume));
        }
        while calls.len() < CALLS_MAX
            && let Some(volume) = self.proposals.keys().find(|volume| !self.busy.contains(volume)).copied()
        {
            let record = self.proposals.remove(&volume).expect("just found");
            self.busy.insert(volume);
            calls.spawn(swap(client.clone(), record));
        }
        while calls.len() < CALLS_MAX
            && let Some(volume) = self.reports.keys().find(|volume| !self.busy.contains(volume)).copied()
        {
            let waiting = self.reports.get_mut(&volume).expect("just found");
            let report = waiting.pop_front().expect("none is empty");
            if waiting.is_empty() {
                self.reports.remove(&volume);
            }
            if report.state != PassState::Running {
                self.telling.insert(volume, report.clone());
            }
            self.busy.insert(volume);
            calls.spawn(tell_check(client.clone(), report));
        }
    }

    fn handle_outcome(&mut self, volume: VolumeNumber, outcome: Outcome) -> Result<(), Ended> {
        self.busy.remove(&volume);
        match outcome {
            // If the watch was faster, the proposer knows already.
            Outcome::Swapped(record) => self.teller.tell_record(record, false),
            Outcome::Current(record) => self.teller.tell_record(record, true),
            Outcome::Gone => {
                self.teller.tell_gone(volume, true);
                self.doubted.insert(volume);
            }
            Outcome::Deleted(lineage) => {
                self.doubted.remove(&volume);
                if let Some(lineage) = lineage {
                    self.teller.tell(News::Deleted { volume, lineage });
                }
            }
            Outcome::NotSaid(ended) => {
                self.doubted.insert(volume);
                return Err(ended);
            }
            Outcome::Unknown(status) => {
                let (code, error) = (status.code(), status.message());
                tracing::warn!(volume = volume.0, %code, error, "a proposal was not carried out for sure");
                self.owed.insert(volume);
            }
            Outcome::Failed(ended) => {
                self.owed.insert(volume);
                return Err(ended);
            }
            Outcome::Noted => drop(self.telling.remove(&volume)),
            Outcome::NotNoted(ended) => return Err(ended),
        }
        Ok(())
    }

    fn handle_event(
        &mut self,
        event: WatchEvent,
        seen: &mut Option<BTreeSet<VolumeNumber>>,
    ) -> Result<(), Ended> {
        match event.event.ok_or(MessageError::Missing("event"))? {
            watch_event::Event::Record(message) => {
                let record = record_from_message(message)?;
                if let Some(seen) = seen {
                    seen.insert(record.volume);
                }
                self.teller.tell_record(record, false);
            }
            watch_event::Event::Gone(volume) => {
                let volume = volume_from_number(volume)?;
                self.teller.tell_gone(volume, false);
                self.doubted.insert(volume);
            }
            watch_event::Event::Tend(volume) => {
                self.teller.tell(News::Tend { volume: volume_from_number(volume)? });
            }
            watch_event::Event::Verify(wish) => {
                let volume = volume_from_number(wish.volume)?;
                self.teller.tell(News::Verify { volume, verify: wish.verify });
            }
            watch_event::Event::Nodes(list) => {
                let nodes: Result<Vec<_>, _> = list.nodes.into_iter().map(node_from_message).collect();
                self.teller.tell_nodes(nodes?);
            }
            watch_event::Event::Synced(_) => {
                self.backoff.reset();
                // Deleted, or taken from this node, while there was no connection.
                let seen = seen.take().unwrap_or_default();
                self.owed.extend(self.teller.volumes().filter(|volume| !seen.contains(volume)));
            }
        }
        Ok(())
    }
}

/// None: the link was dropped first.
async fn until_stopped<T>(signal: &Signal, work: impl Future<Output = T>) -> Option<T> {
    tokio::pin!(work);
    loop {
        if signal.is_stopped() {
            return None;
        }
        tokio::select! {
            done = &mut work => return Some(done),
            () = signal.notify.notified() => {}
        }
    }
}

/// The answer to a call, if it comes in time.
async fn in_time<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}

async fn read(mut client: Client, volume: VolumeNumber) -> (VolumeNumber, Outcome) {
    let which = Some(get_volume_request::Which::Volume(volume.0));
    let outcome = match in_time(client.get_volume(GetVolumeRequest { which })).await {
        Ok(reply) => reply
            .record
            .ok_or(MessageError::Missing("record"))
            .and_then(record_from_message)
            .map_or_else(|error| Outcome::Failed(error.into()), Outcome::Current),
        Err(status) if status.code() == Code::NotFound => Outcome::Gone,
        Err(status) => Outcome::Failed(status.into()),
    };
    (volume, outcome)
}

/// That ctl has no record of a volume may also mean that it has lost it, or is another cluster's.
async fn ask_whether_deleted(mut client: Client, volume: VolumeNumber) -> (VolumeNumber, Outcome) {
    let outcome = match in_time(client.get_deleted(GetDeletedRequest { volume: volume.0 })).await {
        Ok(reply) => match <[u8; 16]>::try_from(reply.lineage.as_slice()) {
            Ok(lineage) => Outcome::Deleted(Some(lineage)),
            Err(_) => Outcome::NotSaid(MessageError::Missing("lineage").into()),
        },
        Err(status) if matches!(status.code(), Code::NotFound | Code::Unimplemented) => {
            Outcome::Deleted(None)
        }
        Err(status) => Outcome::NotSaid(status.into()),
    };
    (volume, outcome)
}

async fn swap(mut client: Client, record: Record) -> (VolumeNumber, Outcome) {
    let volume = record.volume;
    let request = CompareAndSwapRequest { record: Some(record_to_message(&record)) };
    let outcome = match in_time(client.compare_and_swap(request)).await {
        Ok(reply) => match reply.outcome {
            Some(compare_and_swap_reply::Outcome::Swapped(_)) => Outcome::Swapped(record),
            Some(compare_and_swap_reply::Outcome::Conflict(current)) => record_from_message(current)
                .map_or_else(|error| Outcome::Failed(error.into()), Outcome::Current),
            None => Outcome::Failed(MessageError::Missing("outcome").into()),
        },
        Err(status) if status.code() == Code::NotFound => Outcome::Gone,
        Err(status) => Outcome::Unknown(status),
    };
    (volume, outcome)
}

async fn tell_check(mut client: Client, report: CheckReport) -> (VolumeNumber, Outcome) {
    let volume = report.volume;
    let request = ReportCheckRequest { report: Some(check_to_message(&report)) };
    let outcome = match in_time(client.report_check(request)).await {
        Ok(_) => Outcome::Noted,
        // A ctl that does not know passes, or not this volume any more, need not hear of it again.
        Err(status)
            if matches!(status.code(), Code::NotFound | Code::Unimplemented | Code::InvalidArgument) =>
        {
            tracing::debug!(volume = volume.0, error = status.message(), "ctl takes no note of a pass");
            Outcome::Noted
        }
        Err(status) => Outcome::NotNoted(status.into()),
    };
    (volume, outcome)
}

/// Tells news in order, and each only once unless it is owed.
struct Teller {
    news: Sender<News>,
    wake: Waker,
    /// The version of each volume that was told last; [`GONE`] for one that is gone.
    told: BTreeMap<VolumeNumber, u64>,
    nodes: Option<Vec<NodeInfo>>,
    node: Option<NodeId>,
}

/// After every version: numbers of volumes never come back.
const GONE: u64 = u64::MAX;

impl Teller {
    fn tell(&self, news: News) {
        // The other end lives as long as the link, and without it nobody wants to know.
        let _ = self.news.send(news);
        (self.wake)();
    }

    fn tell_record(&mut self, record: Record, owed: bool) {
        let told = self.told.get(&record.volume).copied().unwrap_or(0);
        // A read may be overtaken by the watch; what was told since is what it would have read.
        if record.version > told || (owed && record.version == told) {
            self.told.insert(record.volume, record.version);
            self.tell(News::Record(Box::new(record)));
        }
    }

    fn tell_gone(&mut self, volume: VolumeNumber, owed: bool) {
        if self.told.insert(volume, GONE) != Some(GONE) || owed {
            self.tell(News::Gone(volume));
        }
    }

    fn tell_nodes(&mut self, nodes: Vec<NodeInfo>) {
        if self.nodes.as_ref() != Some(&nodes) {
            self.nodes = Some(nodes.clone());
            self.tell(News::Nodes(nodes));
        }
    }

    /// Those that were told and are not known to be gone.
    fn volumes(&self) -> impl Iterator<Item = VolumeNumber> {
        self.told.iter().filter(|(_, version)| **version != GONE).map(|(volume, _)| *volume)
    }
}
