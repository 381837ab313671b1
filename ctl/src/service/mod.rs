//! `berth.v1.Control` over a record store.

mod attach;
mod deleting;
mod draining;
pub mod feed;
mod passes;
mod placing;
mod replicas;
pub mod server;

use std::sync::Arc;

use datapath::record::{NodeId, Record, VolumeNumber};
use datapath::replica::check::{CheckReport, PassState};
use nbd_server::control::convert::{
    MessageError, PassHistory, address, check_from_message, check_to_message, facts_from_message,
    history_to_message, node_to_message, optional_address, record_from_message, record_to_message,
    volume_from_number,
};
use nbd_server::control::limits::{PAGE_RECORDS_MAX, VERIFY_SILENCE_MAX};
use nbd_server::control::proto::{
    self, compare_and_swap_reply, control_server, get_volume_request, watch_event,
};
use nbd_server::random::random_number;
use nbd_server::volume_name::VolumeName;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::record_store::{Joining, RecordStore, StoreError, VolumeKey};
use feed::{Cursor, Feed, FeedEnd, News};
use passes::{Passes, Wish};
use replicas::{Absences, Asked};

/// Events that wait for a watcher that does not read.
const WATCH_QUEUE: usize = 16;
/// Watchers at a time.
const WATCHERS_MAX: usize = 8192;

/// The service. Clones share everything.
#[derive(Clone, Debug)]
pub struct ControlService {
    store: Arc<dyn RecordStore>,
    feed: Arc<Feed>,
    watchers: Arc<tokio::sync::Semaphore>,
    passes: Arc<Passes>,
    absences: Arc<Absences>,
    asked: Arc<Asked>,
    /// Held while nodes are chosen and given something.
    placing: Arc<tokio::sync::Mutex<()>>,
    overcommit_percent: u32,
}

impl ControlService {
    /// Reads all records.
    ///
    /// # Errors
    /// The store's.
    pub fn new(store: Arc<dyn RecordStore>) -> Result<ControlService, StoreError> {
        let feed = Arc::new(Feed::default());
        let follower = Arc::clone(&feed);
        store.follow(Box::new(move |change| follower.apply(change)))?;
        let watchers = Arc::new(tokio::sync::Semaphore::new(WATCHERS_MAX));
        Ok(ControlService {
            store,
            feed,
            watchers,
            passes: Arc::default(),
            absences: Arc::default(),
            asked: Arc::default(),
            placing: Arc::default(),
            overcommit_percent: 100,
        })
    }

    /// Volumes may come to so many percent of what their nodes can hold.
    #[must_use]
    pub fn with_overcommit(self, percent: u32) -> ControlService {
        ControlService { overcommit_percent: percent, ..self }
    }

    /// Ends all watches.
    pub fn close(&self) {
        self.feed.close();
    }

    /// Does a call of the store, which blocks, on a thread for such things. It is done even if the caller goes away.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn RecordStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || work(&*store)).await;
        done.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| status_of(&error))
    }
}

/// As the client sees it.
fn status_of(error: &StoreError) -> Status {
    let text = error.to_string();
    match error {
        StoreError::Conflict(_) => Status::aborted(text),
        StoreError::NoVolume(_) => Status::not_found(text),
        StoreError::VolumeExists(_) => Status::already_exists(text),
        StoreError::Attached(..) | StoreError::NodeInUse(..) => Status::failed_precondition(text),
        StoreError::Rule(_)
        | StoreError::NoNode(_)
        | StoreError::NodeTwice(_)
        | StoreError::Replicas(_)
        | StoreError::MinInSync { .. } => Status::invalid_argument(text),
        StoreError::Full(..) | StoreError::Numbers(_) => Status::resource_exhausted(text),
        StoreError::Damaged { .. } => {
            tracing::error!(%error, "record store");
            Status::data_loss(text)
        }
        StoreError::Backend(_) => {
            tracing::error!(%error, "record store");
            Status::internal(text)
        }
    }
}

fn invalid(error: impl Into<MessageError>) -> Status {
    Status::invalid_argument(error.into().to_string())
}

fn volume_reply(record: &datapath::record::Record) -> Response<proto::VolumeReply> {
    Response::new(proto::VolumeReply { record: Some(record_to_message(record)), check: None })
}

/// A record, and what is kept of the passes over its volume.
fn with_passes(store: &dyn RecordStore, record: Record) -> Result<(Record, PassHistory), StoreError> {
    match store.passes(record.volume) {
        Ok(passes) => Ok((record, passes)),
        // It was deleted just now.
        Err(StoreError::NoVolume(_)) => Ok((record, PassHistory::default())),
        Err(error) => Err(error),
    }
}

#[tonic::async_trait]
impl control_server::Control for ControlService {
    async fn join(&self, request: Request<proto::JoinRequest>) -> Result<Response<proto::JoinReply>, Status> {
        let message = request.into_inner();
        let joining = Joining {
            name: message
                .name
                .parse()
                .map_err(|error: nbd_server::node_name::NodeNameError| invalid(error))?,
            boot: message.boot,
            nbd: optional_address("nbd_address", message.nbd_address).map_err(invalid)?,
            peer: address("peer_address", message.peer_address).map_err(invalid)?,
            facts: facts_from_message(message.facts).map_err(invalid)?,
        };
        let node = self.call(move |store| store.join(&joining)).await?;
        tracing::info!(node = %node.name, number = node.node.0, peer = node.peer, "node joined");
        Ok(Response::new(proto::JoinReply { node: node.node.0 }))
    }

    type WatchStream = ReceiverStream<Result<proto::WatchEvent, Status>>;

    async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let node = request.into_inner().node;
        let node = (node != 0).then_some(NodeId(node));
        let permit = Arc::clone(&self.watchers).try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted("there are too many watchers already"))?;
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        let (feed, passes) = (Arc::clone(&self.feed), Arc::clone(&self.passes));
        tokio::spawn(async move {
            tell(&feed, &passes, node, &sender).await;
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn compare_and_swap(
        &self,
        request: Request<proto::CompareAndSwapRequest>,
    ) -> Result<Response<proto::CompareAndSwapReply>, Status> {
        use compare_and_swap_reply::Outcome;
        let record = request.into_inner().record.ok_or_else(|| invalid(MessageError::Missing("record")))?;
        let record = record_from_message(record).map_err(invalid)?;
        let expected = record.version - 1;
        let swapped = self.call(move |store| match store.compare_and_swap(expected, &record) {
            Ok(()) => Ok(Outcome::Swapped(proto::Swapped {})),
            Err(StoreError::Conflict(current)) => Ok(Outcome::Conflict(record_to_message(&current))),
            Err(error) => Err(error),
        });
        Ok(Response::new(proto::CompareAndSwapReply { outcome: Some(swapped.await?) }))
    }

    async fn create_volume(
        &self,
        request: Request<proto::CreateVolumeRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        self.create(request.into_inner()).await
    }

    async fn get_volume(
        &self,
        request: Request<proto::GetVolumeRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        use get_volume_request::Which;
        let key = match request.into_inner().which {
            Some(Which::Name(name)) => VolumeKey::Name(
                name.parse().map_err(|error: nbd_server::volume_name::VolumeNameError| invalid(error))?,
            ),
            Some(Which::Volume(number)) => VolumeKey::Number(volume_from_number(number).map_err(invalid)?),
            None => return Err(invalid(MessageError::Missing("name or volume"))),
        };
        let found = self.call(move |store| store.get(&key).and_then(|record| with_passes(store, record)));
        let (record, passes) = found.await?;
        let check = Some(history_to_message(&passes));
        Ok(Response::new(proto::VolumeReply { record: Some(record_to_message(&record)), check }))
    }

    async fn list_volumes(
        &self,
        request: Request<proto::ListVolumesRequest>,
    ) -> Result<Response<proto::ListVolumesReply>, Status> {
        let after = VolumeNumber(request.into_inner().after);
        let page = self.call(move |store| {
            let records = store.list(after, PAGE_RECORDS_MAX + 1)?;
            records.into_iter().map(|record| with_passes(store, record)).collect::<Result<Vec<_>, _>>()
        });
        let mut page = page.await?;
        let more = page.len() > PAGE_RECORDS_MAX;
        page.truncate(PAGE_RECORDS_MAX);
        // Whoever wants to know which blocks were found asks for the volume.
        page.iter_mut()
            .filter_map(|(_, passes)| passes.last.as_mut())
            .for_each(|last| last.report.findings.clear());
        let records = page.iter().map(|(record, _)| record_to_message(record)).collect();
        let checks = page.iter().map(|(_, passes)| history_to_message(passes)).collect();
        Ok(Response::new(proto::ListVolumesReply { records, more, checks }))
    }

    async fn delete_volume(
        &self,
        request: Request<proto::DeleteVolumeRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        self.delete(request.into_inner()).await
    }

    async fn get_deleted(
        &self,
        request: Request<proto::GetDeletedRequest>,
    ) -> Result<Response<proto::GetDeletedReply>, Status> {
        self.deleted(request.into_inner()).await
    }

    async fn add_replica(
        &self,
        request: Request<proto::ReplicaRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        self.add_replica_to(request).await
    }

    async fn remove_replica(
        &self,
        request: Request<proto::ReplicaRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        self.remove_replica_from(request).await
    }

    async fn attach_volume(
        &self,
        request: Request<proto::AttachRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        self.attach(request.into_inner()).await
    }

    async fn detach_volume(
        &self,
        request: Request<proto::DetachRequest>,
    ) -> Result<Response<proto::VolumeReply>, Status> {
        self.detach(request.into_inner()).await
    }

    async fn list_nodes(
        &self,
        _: Request<proto::ListNodesRequest>,
    ) -> Result<Response<proto::ListNodesReply>, Status> {
        Ok(Response::new(self.nodes_and_states().await?))
    }

    async fn drain_node(
        &self,
        request: Request<proto::DrainNodeRequest>,
    ) -> Result<Response<proto::NodeReply>, Status> {
        self.drain(request.into_inner()).await
    }

    async fn remove_node(
        &self,
        request: Request<proto::RemoveNodeRequest>,
    ) -> Result<Response<proto::NodeReply>, Status> {
        self.remove(request.into_inner()).await
    }

    type VerifyVolumeStream = ReceiverStream<Result<proto::CheckReport, Status>>;

    async fn verify_volume(
        &self,
        request: Request<proto::VerifyVolumeRequest>,
    ) -> Result<Response<Self::VerifyVolumeStream>, Status> {
        let name: VolumeName = request
            .into_inner()
            .name
            .parse()
            .map_err(|error: nbd_server::volume_name::VolumeNameError| invalid(error))?;
        let key = VolumeKey::Name(name);
        let record = self.call(move |store| store.get(&key)).await?;
        let verify = random_number().map_err(|error| Status::internal(error.to_string()))?.max(1);
        let Some(reports) = self.passes.verify(&record, verify) else {
            let text = format!("no node with a replica in sync of {} is connected to berth ctl", record.name);
            return Err(Status::failed_precondition(text));
        };
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        let passes = Arc::clone(&self.passes);
        tokio::spawn(async move {
            tell_reports(reports, &sender).await;
            passes.forget(verify);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn report_check(
        &self,
        request: Request<proto::ReportCheckRequest>,
    ) -> Result<Response<proto::ReportCheckReply>, Status> {
        let report = request.into_inner().report.ok_or_else(|| invalid(MessageError::Missing("report")))?;
        let report = check_from_message(report).map_err(invalid)?;
        if report.differing_blocks > 0 && report.state != PassState::Running {
            let (volume, blocks) = (report.volume.0, report.differing_blocks);
            tracing::error!(volume, blocks, findings = ?report.findings, "THE REPLICAS OF A VOLUME DIFFER");
        }
        if self.passes.take(&report) {
            self.call(move |store| passes::keep(store, report)).await?;
        }
        Ok(Response::new(proto::ReportCheckReply {}))
    }
}

/// Tells whoever waits how a pass stands, until it has ended, nothing is heard of it, or nobody waits any more.
async fn tell_reports(
    mut reports: UnboundedReceiver<CheckReport>,
    client: &mpsc::Sender<Result<proto::CheckReport, Status>>,
) {
    loop {
        let next = tokio::select! {
            next = tokio::time::timeout(VERIFY_SILENCE_MAX, reports.recv()) => next,
            () = client.closed() => return,
        };
        let Ok(Some(report)) = next else {
            let text = "nothing is heard from the head any more; look who leads, and start it again";
            // Nobody is left to be told.
            let _ = client.send(Err(Status::unavailable(text))).await;
            return;
        };
        let gone = client.send(Ok(check_to_message(&report))).await.is_err();
        if gone || report.state != PassState::Running {
            return;
        }
    }
}

type Watcher = mpsc::Sender<Result<proto::WatchEvent, Status>>;

/// Tells a watcher everything until it goes away or the feed ends.
async fn tell(feed: &Feed, passes: &Passes, node: Option<NodeId>, watcher: &Watcher) {
    let Some(node) = node else { return tell_feed(feed, None, None, watcher).await };
    let (watch, mut wishes) = passes.watch(node);
    tell_feed(feed, Some(node), Some(&mut wishes), watcher).await;
    passes.unwatch(node, watch);
}

async fn tell_feed(
    feed: &Feed,
    node: Option<NodeId>,
    mut wishes: Option<&mut UnboundedReceiver<Wish>>,
    watcher: &Watcher,
) {
    let (mut cursor, mut changed) = feed.watch(node);
    let mut synced = false;
    loop {
        // Before the feed is read: what comes meanwhile is found by the next turn.
        changed.borrow_and_update();
        match tell_news(feed, &mut cursor, watcher).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(end) => {
                let status = match end {
                    FeedEnd::Closed => Status::unavailable("berth ctl is about to end"),
                    FeedEnd::FellBehind => Status::aborted("too much was missed; begin anew"),
                };
                // Nobody is left to be told.
                let _ = watcher.send(Err(status)).await;
                return;
            }
        }
        if !synced && !send(watcher, watch_event::Event::Synced(proto::Synced {})).await {
            return;
        }
        synced = true;
        tokio::select! {
            () = watcher.closed() => return,
            alive = changed.changed() => if alive.is_err() { return },
            wish = next_wish(&mut wishes) => {
                let event = match wish {
                    Wish::Verify { volume, verify } => {
                        watch_event::Event::Verify(proto::Verify { volume: volume.0, verify })
                    }
                    Wish::Tend { volume } => watch_event::Event::Tend(volume.0),
                };
                if !send(watcher, event).await {
                    return;
                }
            }
        }
    }
}

/// What is wanted of the node next; whoever is no node, or watches again elsewhere, waits for ever.
async fn next_wish(wishes: &mut Option<&mut UnboundedReceiver<Wish>>) -> Wish {
    match wishes {
        Some(receiver) => match receiver.recv().await {
            Some(wish) => wish,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// Tells all the news that there are now. False if the watcher is gone.
async fn tell_news(feed: &Feed, cursor: &mut Cursor, watcher: &Watcher) -> Result<bool, FeedEnd> {
    use watch_event::Event;
    while let Some(news) = feed.take(cursor)? {
        for news in news {
            let event = match news {
                News::Record(record) => Event::Record(record_to_message(&record)),
                News::Gone(volume) => Event::Gone(volume.0),
                News::Nodes(nodes) => {
                    Event::Nodes(proto::NodeList { nodes: nodes.iter().map(node_to_message).collect() })
                }
            };
            if !send(watcher, event).await {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

async fn send(watcher: &Watcher, event: watch_event::Event) -> bool {
    watcher.send(Ok(proto::WatchEvent { event: Some(event) })).await.is_ok()
}
