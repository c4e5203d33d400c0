//! What an agent says over HTTP: readiness for routers and probes, metrics, its state, its events, and a page.
//!
//! Everything but `POST` only reads. A call that writes needs the token of `--http-token`; who may use the agent's
//! Unix socket needs none (`aquifer drain`).

mod autoscale;
mod guard;
mod metrics;
mod openapi;
mod page;
mod routes;
mod stream;
mod swarm;

pub(crate) use autoscale::{Autoscale, Hydrating};
pub(crate) use metrics::help;
pub(crate) use swarm::{Bucket, SwarmView};

use crate::agent::Handle;
use anyhow::{Context, Result};
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// The port that is taken unless another is asked for; if that is taken, any.
pub(crate) const PORT: u16 = 7404;

/// Where to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// On loopback, at [`PORT`] if nobody else has it.
    Default,
    At(SocketAddr),
}

/// Connections at once. Each may cost a view's worth of memory and an open file; probes and scrapers need a handful, a page two.
const CONNECTIONS_MAX: usize = 512;
/// Between two tries to accept when that fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// A request's head is a few hundred bytes: who takes longer is not going to send it.
const HEAD_WAIT: Duration = Duration::from_secs(15);

/// A port that is taken, and who may write.
#[derive(Debug)]
pub(crate) struct Bound {
    listener: std::net::TcpListener,
    pub(crate) address: SocketAddr,
    token: Option<Arc<str>>,
}

impl Bound {
    pub(crate) fn new(at: Where, token: Option<&Path>) -> Result<Self> {
        let token = token.map(guard::read_token).transpose()?;
        let listener = match at {
            Where::At(address) => std::net::TcpListener::bind(address).with_context(|| {
                format!("cannot answer HTTP on {address}: if the port is taken, choose another with --http")
            })?,
            Where::Default => std::net::TcpListener::bind(("127.0.0.1", PORT))
                // Another agent on this machine has it.
                .or_else(|_| std::net::TcpListener::bind(("127.0.0.1", 0)))
                .context("cannot answer HTTP on loopback")?,
        };
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Bound { listener, address, token })
    }

    /// Answers until the process ends, on a thread of its own: whoever asks much, or reads slowly, takes nothing from
    /// the agent's threads.
    pub(crate) fn serve(self, agent: Handle) -> Result<()> {
        tracing::info!("http: http://{}", self.address);
        let guard = guard::Guard { token: self.token, is_local: self.address.ip().is_loopback() };
        let router = routes::router(agent, guard);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = self.listener;
        let serve = move || runtime.block_on(accept(listener, router));
        std::thread::Builder::new().name("aquifer-http".into()).spawn(serve)?;
        Ok(())
    }
}

async fn accept(listener: std::net::TcpListener, router: Router) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!("http: nobody is answered: {error}"),
    };
    let seats = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // It is closed by nobody.
    while let Ok(seat) = seats.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = TowerToHyperService::new(router.clone());
                tokio::spawn(async move {
                    let mut http = hyper::server::conn::http1::Builder::new();
                    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WAIT);
                    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                        tracing::trace!("http: {error}");
                    }
                    drop(seat);
                });
            }
            Err(error) => {
                tracing::debug!("http: cannot accept: {error}");
                // Out of open files, most likely: some will be closed.
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
