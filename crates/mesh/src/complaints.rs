//! Saying what is wrong once, and again only when it changes.

use crate::limits::COMPLAINTS_MAX;
use crate::secure::{Fault, fault_of};
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::DialError;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;
use std::net::IpAddr;
use tracing::{debug, info, warn};

/// The last thing that was said about each target.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    said: BTreeMap<String, String>,
}

impl Complaints {
    pub(crate) fn complain(&mut self, what: &'static str, target: &str, reason: &str) {
        if self.said.get(target).is_some_and(|said| said == reason) {
            debug!(at = target, reason, "still {what}");
            return;
        }
        warn!(at = target, reason, "{what}");
        if self.said.len() >= COMPLAINTS_MAX {
            self.said.pop_first();
        }
        self.said.insert(target.to_string(), reason.to_string());
    }

    pub(crate) fn settle(&mut self, target: &str) {
        if self.said.remove(target).is_some() {
            info!(at = target, "reached after all");
        }
    }
}

/// Who tried to connect and could not be let in; each is mentioned once.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    warned: BTreeSet<IpAddr>,
}

impl Refused {
    pub(crate) fn note(&mut self, from: IpAddr, fault: &Fault) {
        if self.warned.len() < COMPLAINTS_MAX && self.warned.insert(from) {
            warn!(%from, reason = %fault, "refused a connection; further ones from there are only counted");
        }
    }
}

/// How an attempt to dial ended without a connection.
#[derive(Debug)]
pub(crate) enum DialEnd {
    /// It would have been a connection with ourselves.
    Ourselves,
    /// One is being made already.
    Busy,
    Failed(String),
}

/// In plain words, for whoever wrote the address.
pub(crate) fn words_for(error: &DialError) -> DialEnd {
    match error {
        DialError::LocalPeerId { .. } => DialEnd::Ourselves,
        // libp2p leaves out the addresses it listens on itself.
        DialError::NoAddresses => DialEnd::Ourselves,
        DialError::DialPeerConditionFalse(_) => DialEnd::Busy,
        DialError::Aborted => DialEnd::Failed("given up".to_string()),
        DialError::WrongPeerId { address, .. } => {
            DialEnd::Failed(format!("{}: another node answers there", place_of(address)))
        }
        DialError::Denied { cause } => {
            DialEnd::Failed(cause.source().map_or_else(|| cause.to_string(), ToString::to_string))
        }
        DialError::Transport(errors) => DialEnd::Failed(words_for_all(errors)),
    }
}

/// The most telling address's account: one that answered says more than one that did not.
fn words_for_all(errors: &[(Multiaddr, TransportError<io::Error>)]) -> String {
    let accounts = errors.iter().map(|(address, error)| {
        let (rank, words) = words_for_one(error);
        (rank, format!("{}: {words}", place_of(address)))
    });
    accounts.max().map_or_else(|| "no address could be dialled".to_string(), |(_, words)| words)
}

fn words_for_one(error: &TransportError<io::Error>) -> (u8, String) {
    let error = match error {
        TransportError::MultiaddrNotSupported(_) => return (0, "not an address that can be dialled".to_string()),
        TransportError::Other(error) => error,
    };
    let Some(fault) = fault_of(error) else { return (1, error.to_string()) };
    let rank = match fault {
        Fault::Connect(_) | Fault::ConnectTimeout => 1,
        Fault::HungUp | Fault::Silent => 2,
        Fault::Handshake(_) => 3,
        Fault::Key { .. } => 4,
    };
    (rank, fault.to_string())
}

fn place_of(address: &Multiaddr) -> String {
    crate::place::socket_addr_of(address).map_or_else(|| address.to_string(), |address| address.to_string())
}
