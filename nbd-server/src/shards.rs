//! The shards' threads: one reactor each, pinned. The first one listens, as one thread does in SPDK's targets: a handshake
//! is little work, and limits of the process hold where all connections come in. What its client has chosen decides where a
//! connection goes.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use datapath::engine::ports::Engine;
use datapath::engine::shard_message::ShardIndex;
use datapath::reactor::affinity::{AffinityError, pin_thread};
use datapath::reactor::features::{Feature, Features};
use datapath::reactor::mailbox::{Mailbox, Message, PostError, mailbox};
use datapath::reactor::{Arena, Outside, Reactor, ReactorConfig, ReactorError};
use thiserror::Error;

use crate::listener::Listener;
use crate::stop::Stop;

/// How long a drain may take. Container runtimes kill after 10 s; what was answered is safe either way, but the next
/// start then reads more of the log.
const DRAIN_MAX: Duration = Duration::from_secs(8);

/// Why the shards could not start, or did not end well.
#[derive(Debug, Error)]
pub enum ShardsError {
    /// A reactor's.
    #[error("shard {shard}: {source}")]
    Reactor {
        /// Which.
        shard: usize,
        /// Why.
        #[source]
        source: ReactorError,
    },
    /// A thread could not be pinned.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// No thread, or no file for its mailbox.
    #[error("cannot start a shard: {0}")]
    Start(#[from] io::Error),
}

/// What all shards have in common.
#[derive(Debug)]
pub struct ShardsConfig<'a> {
    /// Where clients come in.
    pub listeners: &'a [Listener],
    /// Where other nodes come in.
    pub peer_listeners: &'a [Listener],
    /// What the shards of a node ask of other threads.
    pub outside: Option<Arc<dyn Outside>>,
    /// The pools, in the order of the engines' device indices.
    pub devices: Vec<Arc<File>>,
    /// One processor per engine.
    pub cpus: Vec<usize>,
    /// Features of io_uring that may be used.
    pub features: Features,
}

/// Shards at work.
#[derive(Debug)]
pub struct Shards<E: Engine<Memory = Arena>> {
    mailboxes: Vec<Mailbox<E::Report>>,
    threads: Vec<JoinHandle<Result<E, ShardsError>>>,
}

impl<E> Shards<E>
where
    E: Engine<Memory = Arena> + Send + 'static,
{
    /// Makes a reactor for each engine, and starts them only when all could be made.
    ///
    /// # Errors
    /// If io_uring is not to be had, or a thread is not.
    ///
    /// # Panics
    /// If there is not one processor for each engine.
    pub fn start(engines: Vec<E>, config: &ShardsConfig<'_>) -> Result<Shards<E>, ShardsError> {
        assert_eq!(engines.len(), config.cpus.len(), "one processor for each shard");
        let mut reactors = Vec::with_capacity(engines.len());
        let (mailboxes, inboxes): (Vec<_>, Vec<_>) =
            engines.iter().map(|_| mailbox()).collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        for (shard, (engine, inbox)) in engines.into_iter().zip(inboxes).enumerate() {
            let allowed = config.features;
            let listeners = |listeners: &[Listener]| match shard {
                0 => listeners.iter().map(Listener::socket).collect(),
                _ => Vec::new(),
            };
            let config = ReactorConfig {
                listeners: listeners(config.listeners),
                peer_listeners: listeners(config.peer_listeners),
                outside: config.outside.clone(),
                devices: config.devices.clone(),
                features: allowed,
                ..ReactorConfig::default()
            };
            let mut reactor = Reactor::new(engine, config, inbox)
                .map_err(|source| ShardsError::Reactor { shard, source })?;
            let index = u16::try_from(shard).expect("few shards");
            reactor.join(ShardIndex(index), mailboxes.clone());
            if shard == 0 {
                report_features(reactor.features(), allowed);
            }
            reactors.push(reactor);
        }
        let mut shards = Shards { mailboxes, threads: Vec::with_capacity(reactors.len()) };
        for (shard, (reactor, cpu)) in reactors.into_iter().zip(&config.cpus).enumerate() {
            let (cpu, others) = (*cpu, shards.mailboxes.clone());
            let thread = std::thread::Builder::new().name(format!("shard-{shard}")).spawn(move || {
                let result = pin_thread(cpu)
                    .map_err(ShardsError::from)
                    .and_then(|()| reactor.run().map_err(|source| ShardsError::Reactor { shard, source }));
                if result.is_err() {
                    // A node with a dead shard is no node. The others cannot finish without it: it may be a pool's home.
                    // What was answered is safe.
                    post_all(&others, || Message::Abort);
                }
                result
            });
            match thread {
                Ok(thread) => shards.threads.push(thread),
                Err(error) => {
                    post_all(&shards.mailboxes, || Message::Abort);
                    return Err(error.into());
                }
            }
        }
        Ok(shards)
    }

    /// To talk to the shards, in their order.
    #[must_use]
    pub fn mailboxes(&self) -> &[Mailbox<E::Report>] {
        &self.mailboxes
    }

    /// Waits until every shard takes requests. False if one has ended instead.
    #[must_use]
    pub fn wait_until_open(&self) -> bool {
        self.mailboxes.iter().all(|mailbox| {
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            mailbox.post(Message::TellWhenOpen(sender)).is_ok() && receiver.recv().is_ok()
        })
    }

    /// Tells all shards to finish.
    pub fn drain(&self) {
        post_all(&self.mailboxes, || Message::Drain);
    }

    /// Passes on what `stops` brings until all shards have ended. Gives the engines back in order. A drain that takes
    /// longer than [`DRAIN_MAX`], because a client does not take its answers, is cut short.
    ///
    /// # Errors
    /// The first error of a shard.
    pub fn run(self, stops: Receiver<Stop>) -> Result<Vec<E>, ShardsError> {
        let mailboxes = self.mailboxes;
        std::thread::Builder::new().name("stop".to_owned()).spawn(move || {
            let Ok(mut stop) = stops.recv() else { return };
            if stop == Stop::Drain {
                post_all(&mailboxes, || Message::Drain);
                stop = match stops.recv_timeout(DRAIN_MAX) {
                    Ok(stop) => stop,
                    Err(RecvTimeoutError::Timeout) => {
                        tracing::warn!("clients do not take their answers; ending without them");
                        Stop::Now
                    }
                    // Nobody is left to be impatient.
                    Err(RecvTimeoutError::Disconnected) => return,
                };
            }
            if stop == Stop::Now {
                post_all(&mailboxes, || Message::Abort);
            }
        })?;
        // All of them, before the first error is told: a shard that still runs still writes.
        let results: Vec<_> = self
            .threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        results.into_iter().collect()
    }
}

/// Tells every shard; one that has ended needs no telling, and one with a full mailbox is told until it has room.
fn post_all<R>(mailboxes: &[Mailbox<R>], message: impl Fn() -> Message<R>) {
    for mailbox in mailboxes {
        while let Err(PostError::Full(_)) = mailbox.post(message()) {
            std::thread::yield_now();
        }
    }
}

/// One line about what the kernel gives, and how to get more.
fn report_features(features: Features, allowed: Features) {
    tracing::info!(%features, "io_uring");
    if allowed.has(Feature::RegisteredBuffers) && !features.has(Feature::RegisteredBuffers) {
        tracing::warn!(
            "the limit of locked memory is too small to register the buffers; the server works, slower. Raise it \
             with `ulimit -l unlimited`, LimitMEMLOCK=infinity (systemd) or --ulimit memlock=-1 (containers)"
        );
    }
}
