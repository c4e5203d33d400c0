//! `aquifer agent`: the daemon.

use super::{Stop, StopSignal};
use crate::agent;
use crate::http::Where;
use crate::options::{self, AgentOptions, NodeOptions, OperationOptions};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::ExitCode;

/// Ports an agent listens on unless told otherwise: mesh, data, and what is said beside RDMA.
const PORTS: (u16, u16, u16) = (7401, 7402, 7403);

pub(crate) async fn run(
    config: Option<&Path>,
    node: NodeOptions,
    agent: AgentOptions,
    operation: OperationOptions,
) -> Result<ExitCode> {
    let (mut node, options, operation) = options::of_agent(config, node, agent, operation)?;
    node.state = node.state.or_else(|| options::default_state(node.name.as_deref()));
    let channels = options.channels()?;
    let mut config = node.config(&channels, PORTS)?;
    options.configure(&mut config)?;
    operation.configure(&mut config)?;
    if channels.is_empty() {
        bail!("no channel to follow: give --channel NAME, and --trust KEY for its publisher");
    }
    if let Some((channel, _)) = config.channels.iter().find(|(_, trusted)| trusted.is_empty()) {
        bail!("nobody is trusted to publish {channel}: give the publisher's public key with --trust");
    }
    let http = operation.bind(&mut config, Some(Where::Default))?;
    tracing::info!("node {} ({})", config.name, config.identity.public());
    let mut stop = StopSignal::new()?;
    let running = agent::start(config).await?;
    if let Some(http) = http {
        http.serve(running.handle.clone())?;
    }
    tokio::select! {
        () = leaving(&mut stop, &running) => {
            tracing::info!("leaving the mesh");
            running.stop().await?;
        }
        () = ended(&running) => {
            running.ended().await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns when the agent is to leave at once. Asked to terminate it drains first, and then ends by itself; Ctrl-C, or
/// being asked again, does not wait for that. May be dropped and called anew.
pub(super) async fn leaving(stop: &mut StopSignal, running: &agent::Running) {
    while stop.which().await == Stop::Terminate && !stop.drains {
        running.drain().await;
        stop.drains = true;
    }
}

/// Returns when the agent has ended by itself.
pub(super) async fn ended(running: &agent::Running) {
    let mut view = running.view.clone();
    // The view's sender lives as long as the agent does.
    while view.changed().await.is_ok() {}
}
