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
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The port that is taken unless another is asked for; if that is taken, any.
pub(crate) const PORT: u16 = 7404;

/// Where to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// On loopback, at [`PORT`] if nobody else has it.
    Default,
    At(SocketAddr),
}

/// A port that is taken, and who may write.
#[derive(Debug)]
pub(crate) struct Bound {
    listener: TcpListener,
    pub(crate) address: SocketAddr,
    token: Option<Arc<str>>,
}

impl Bound {
    pub(crate) async fn new(at: Where, token: Option<&Path>) -> Result<Self> {
        let token = token.map(guard::read_token).transpose()?;
        let listener = match at {
            Where::At(address) => TcpListener::bind(address).await.with_context(|| {
                format!("cannot answer HTTP on {address}: if the port is taken, choose another with --http")
            })?,
            Where::Default => match TcpListener::bind(("127.0.0.1", PORT)).await {
                Ok(listener) => listener,
                // Another agent on this machine has it.
                Err(_) => TcpListener::bind(("127.0.0.1", 0)).await.context("cannot answer HTTP on loopback")?,
            },
        };
        let address = listener.local_addr()?;
        Ok(Bound { listener, address, token })
    }

    /// Answers until the agent's process ends.
    pub(crate) fn serve(self, agent: Handle) -> JoinHandle<()> {
        tracing::info!("http: http://{}", self.address);
        let guard = guard::Guard { token: self.token, is_local: self.address.ip().is_loopback() };
        let router = routes::router(agent, guard);
        tokio::spawn(async move {
            if let Err(error) = axum::serve(self.listener, router).await {
                tracing::warn!("http: nobody is answered any more: {error}");
            }
        })
    }
}
