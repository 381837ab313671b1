//! `berth ctl`: the service on a TCP address, until the process is told to stop.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nbd_server::control::limits::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, REQUEST_BYTES_MAX};
use nbd_server::control::proto::control_server::ControlServer;
use nbd_server::stop::StopSignals;
use thiserror::Error;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;

use super::ControlService;
use crate::record_store::StoreError;
use crate::record_store::redb::{OpenError, RedbStore};

/// Calls of one connection at a time, watches included.
const STREAMS_MAX: u32 = 256;
/// Bytes of the headers of one call.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// Clients that keep a connection busy for longer after a stop are left.
const DRAIN_MAX: Duration = Duration::from_secs(3);

/// All that `berth ctl` is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CtlConfig {
    /// File of the record store.
    pub store: PathBuf,
    /// `HOST:PORT`.
    pub listen: String,
    /// Listen where other machines can connect, though nobody is asked who he is.
    pub insecure: bool,
    /// A node that is not connected for so long is replaced; nothing: never.
    pub replace_after: Option<Duration>,
    /// Volumes may come to so many percent of what their nodes can hold.
    pub overcommit_percent: u32,
}

/// Why `berth ctl` ended.
#[derive(Debug, Error)]
pub enum CtlError {
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What is in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Anybody could change every volume.
    #[error(
        "--listen {0}: other machines can connect there, and berth ctl has no authentication yet: whoever connects \
         can change and delete every volume. Listen on 127.0.0.1, or give --insecure if the network is trusted"
    )]
    Insecure(SocketAddr),
    /// The address.
    #[error("--listen {address}: cannot listen: {source}")]
    Listen {
        /// As given.
        address: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Signals, threads.
    #[error("{step}: {source}")]
    Process {
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The server.
    #[error("the server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves until it is told to stop. To be called before the process has started a thread.
///
/// # Errors
/// If it cannot start, or fails.
pub fn run(config: &CtlConfig) -> Result<(), CtlError> {
    let process = |step| move |source| CtlError::Process { step, source };
    let signals = StopSignals::block().map_err(process("block signals"))?;
    let listener = bind(config)?;
    let store = RedbStore::open(&config.store)?;
    let (tell_stop, stop) = watch::channel(false);
    signals
        .watch(move |stop| {
            tracing::info!(?stop, "told to stop");
            tell_stop.send_replace(true);
        })
        .map_err(process("watch signals"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let runtime = runtime.map_err(process("start the runtime"))?;
    let address = listener.local_addr().map_err(process("read the address"))?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(process("listen"))?;
        let service = ControlService::new(Arc::new(store))?.with_overcommit(config.overcommit_percent);
        tokio::spawn(service.clone().heal_for_ever(config.replace_after));
        println!("ready http://{address}");
        serve(service, listener, stopped(stop)).await?;
        Ok(())
    })
}

/// Listens where the configuration says, if it may.
fn bind(config: &CtlConfig) -> Result<TcpListener, CtlError> {
    let failed = |source| CtlError::Listen { address: config.listen.clone(), source };
    let addresses: Vec<SocketAddr> = config.listen.to_socket_addrs().map_err(failed)?.collect();
    if let Some(open) = addresses.iter().find(|address| !address.ip().to_canonical().is_loopback()) {
        if !config.insecure {
            return Err(CtlError::Insecure(*open));
        }
        tracing::warn!(address = %open, "whoever can connect can change and delete every volume");
    }
    let listener = TcpListener::bind(&*addresses).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // The thread that watches the signals never ends.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Serves on a socket that listens until `stop`; then ends the watches and answers what was asked.
///
/// # Errors
/// If the server fails.
pub async fn serve(
    service: ControlService,
    listener: tokio::net::TcpListener,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (tell_drain, mut drain) = watch::channel(false);
    let limited = ControlServer::new(service.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
    let routes = Routes::new(limited).prepare().into_axum_router();
    let routes = Routes::from(crate::api::routes(service.clone(), routes));
    let serving = Server::builder()
        // REST; gRPC comes over HTTP/2.
        .accept_http1(true)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .serve_with_incoming_shutdown(routes, TcpListenerStream::new(listener), async move {
            stop.await;
            service.close();
            tell_drain.send_replace(true);
        });
    tokio::select! {
        ended = serving => ended,
        () = async {
            let _ = drain.wait_for(|drain| *drain).await;
            tokio::time::sleep(DRAIN_MAX).await;
        } => {
            tracing::warn!("clients do not end their calls; ending without them");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: &str, insecure: bool) -> CtlConfig {
        CtlConfig {
            store: PathBuf::from("unused"),
            listen: listen.to_owned(),
            insecure,
            replace_after: None,
            overcommit_percent: 100,
        }
    }

    #[test]
    fn off_loopback_it_listens_only_when_told_to() {
        for open in ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"] {
            let error = bind(&config(open, false)).expect_err(open).to_string();
            assert!(error.contains("no authentication yet") && error.contains("--insecure"), "{error}");
        }
        for closed in ["127.0.0.1:0", "localhost:0", "[::ffff:127.0.0.1]:0"] {
            assert!(!matches!(bind(&config(closed, false)), Err(CtlError::Insecure(_))), "{closed}");
        }
        bind(&config("0.0.0.0:0", true)).expect("told to");
    }
}
