//! When to look for whom among the addresses a node was configured with.
//!
//! Each target goes round and round: wait, look up its addresses, dial some of those we are not
//! connected to, wait again. The addresses say nothing about who answers, so what was learnt from
//! dialling is kept: some lead to ourselves.

use crate::backoff;
use crate::limits::{
    BACKOFF_LAST, BOOTSTRAP_ADDRESSES_MAX, BOOTSTRAP_DIALS_MAX, BOOTSTRAP_REVISIT, CONNECTION_SHORT, CONNECTIONS_WANTED,
};
use crate::place::Place;
use aquifer_core::NodeId;
use rand::seq::SliceRandom;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Bootstrap {
    targets: Vec<Target>,
    /// Connections in a row that did not last. A node that is full lets us in and throws us out.
    short_lived: u32,
}

#[derive(Debug)]
struct Target {
    place: Place,
    phase: Phase,
    /// Rounds in a row that reached nobody.
    failures: u32,
    known: BTreeMap<SocketAddr, Who>,
}

#[derive(Debug)]
enum Phase {
    Waiting { until: Instant },
    LookingUp,
    Dialing { left: usize, reached: bool, reasons: BTreeSet<String> },
}

/// Who answers at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ourselves,
    Node(NodeId),
}

/// How a round ended: somebody was reached, or the reason why nobody was.
pub(crate) type RoundEnd = Result<(), String>;

impl Bootstrap {
    pub(crate) fn new(places: Vec<Place>, now: Instant) -> Self {
        let target =
            |place| Target { place, phase: Phase::Waiting { until: now }, failures: 0, known: BTreeMap::new() };
        Bootstrap { targets: places.into_iter().map(target).collect(), short_lived: 0 }
    }

    pub(crate) fn place(&self, target: usize) -> &Place {
        &self.targets[target].place
    }

    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.targets.iter().filter_map(Target::until).min()
    }

    /// A target whose addresses are to be looked up now; answer with [`Bootstrap::on_found`].
    pub(crate) fn due(&mut self, now: Instant) -> Option<usize> {
        let index = self.targets.iter().position(|target| target.until().is_some_and(|until| until <= now))?;
        self.targets[index].phase = Phase::LookingUp;
        Some(index)
    }

    /// The addresses to dial; answer each with [`Bootstrap::on_dialed`]. Without any, the round is
    /// over and its end is given instead.
    pub(crate) fn on_found(
        &mut self,
        target: usize,
        found: Result<Vec<SocketAddr>, String>,
        connected: &BTreeSet<NodeId>,
        now: Instant,
    ) -> Result<Vec<SocketAddr>, RoundEnd> {
        let target = &mut self.targets[target];
        match found {
            Ok(found) if found.is_empty() => Err(target.end(Err("the name has no addresses".into()), connected, now)),
            Ok(found) => target.pick(found, connected, now),
            Err(reason) => Err(target.end(Err(reason), connected, now)),
        }
    }

    /// How the round ended, if this was the last of its dials.
    pub(crate) fn on_dialed(
        &mut self,
        target: usize,
        address: SocketAddr,
        outcome: Result<Who, String>,
        connected: &BTreeSet<NodeId>,
        now: Instant,
    ) -> Option<RoundEnd> {
        let target = &mut self.targets[target];
        let Phase::Dialing { left, reached, reasons } = &mut target.phase else { return None };
        *left -= 1;
        match outcome {
            Ok(who) => {
                *reached = true;
                target.known.insert(address, who);
            }
            Err(reason) => {
                target.known.remove(&address);
                reasons.insert(reason);
            }
        }
        if *left > 0 {
            return None;
        }
        let end = match *reached {
            true => Ok(()),
            false => Err(std::mem::take(reasons).into_iter().collect::<Vec<_>>().join("; ")),
        };
        Some(target.end(end, connected, now))
    }

    /// A node was lost after it was connected for so long: with too few left, the targets are
    /// tried soon.
    pub(crate) fn on_lost(&mut self, lasted: Duration, connected: &BTreeSet<NodeId>, now: Instant) {
        self.short_lived = if lasted < CONNECTION_SHORT { self.short_lived.saturating_add(1) } else { 0 };
        if connected.len() >= CONNECTIONS_WANTED {
            return;
        }
        let soon = now + backoff::wait(self.short_lived);
        for target in &mut self.targets {
            if let Phase::Waiting { until } = &mut target.phase
                && target.failures == 0
            {
                *until = soon.min(*until);
            }
        }
    }

    /// Our own addresses changed, so what led to us may lead elsewhere.
    pub(crate) fn on_moved(&mut self) {
        for target in &mut self.targets {
            target.known.retain(|_, who| *who != Who::Ourselves);
        }
    }
}

impl Target {
    fn until(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting { until } => Some(until),
            Phase::LookingUp | Phase::Dialing { .. } => None,
        }
    }

    fn pick(
        &mut self,
        mut found: Vec<SocketAddr>,
        connected: &BTreeSet<NodeId>,
        now: Instant,
    ) -> Result<Vec<SocketAddr>, RoundEnd> {
        found.truncate(BOOTSTRAP_ADDRESSES_MAX);
        self.known.retain(|address, _| found.contains(address));
        found.retain(|address| match self.known.get(address) {
            None => true,
            Some(Who::Ourselves) => false,
            Some(Who::Node(node)) => !connected.contains(node),
        });
        if found.is_empty() {
            return Err(self.end(Ok(()), connected, now));
        }
        found.shuffle(&mut rand::rng());
        found.truncate(if connected.len() < CONNECTIONS_WANTED { BOOTSTRAP_DIALS_MAX } else { 1 });
        self.phase = Phase::Dialing { left: found.len(), reached: false, reasons: BTreeSet::new() };
        Ok(found)
    }

    fn end(&mut self, end: RoundEnd, connected: &BTreeSet<NodeId>, now: Instant) -> RoundEnd {
        self.failures = if end.is_ok() { 0 } else { self.failures.saturating_add(1) };
        let wait = match (&end, connected.len() < CONNECTIONS_WANTED) {
            (_, false) => backoff::shortened(BOOTSTRAP_REVISIT),
            (Ok(()), true) => backoff::shortened(BACKOFF_LAST),
            (Err(_), true) => backoff::wait(self.failures),
        };
        self.phase = Phase::Waiting { until: now + wait };
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 7000);
    const B: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)), 7000);

    fn bootstrap(now: Instant) -> Bootstrap {
        Bootstrap::new(vec!["mesh:7000".parse().unwrap()], now)
    }

    fn nodes(count: u8) -> BTreeSet<NodeId> {
        (0..count).map(|n| NodeId([n; 32])).collect()
    }

    #[test]
    fn failures_are_retried_for_ever_and_ever_slower() {
        let (mut now, nobody) = (Instant::now(), nodes(0));
        let mut bootstrap = bootstrap(now);
        for round in 0..100 {
            assert_eq!(bootstrap.due(now), Some(0), "round {round}");
            assert_eq!(bootstrap.due(now), None);
            assert_eq!(bootstrap.on_found(0, Ok(vec![A]), &nobody, now), Ok(vec![A]));
            assert_eq!(bootstrap.on_dialed(0, A, Err("refused".into()), &nobody, now), Some(Err("refused".into())));
            let next = bootstrap.timeout().unwrap();
            assert!(next - now <= BACKOFF_LAST && (round < 10 || next - now >= BACKOFF_LAST / 2));
            now = next;
        }
    }

    #[test]
    fn a_round_says_each_reason_once() {
        let (now, nobody) = (Instant::now(), nodes(0));
        let mut bootstrap = bootstrap(now);
        bootstrap.due(now);
        assert_eq!(bootstrap.on_found(0, Ok(vec![A, B]), &nobody, now).map(|dials| dials.len()), Ok(2));
        assert_eq!(bootstrap.on_dialed(0, B, Err("wrong key".into()), &nobody, now), None);
        assert_eq!(bootstrap.on_dialed(0, A, Err("wrong key".into()), &nobody, now), Some(Err("wrong key".into())));
    }

    #[test]
    fn a_name_without_addresses_is_said_and_retried() {
        let (now, nobody) = (Instant::now(), nodes(0));
        let mut bootstrap = bootstrap(now);
        bootstrap.due(now);
        assert!(matches!(bootstrap.on_found(0, Ok(vec![]), &nobody, now), Err(Err(_))));
        assert!(bootstrap.timeout().is_some());
    }

    #[test]
    fn whom_we_know_there_is_not_dialled_again_while_connected() {
        let (now, one, nobody) = (Instant::now(), nodes(1), nodes(0));
        let mut bootstrap = bootstrap(now);
        bootstrap.due(now);
        assert!(bootstrap.on_found(0, Ok(vec![A, B]), &nobody, now).is_ok());
        bootstrap.on_dialed(0, A, Ok(Who::Node(NodeId([0; 32]))), &one, now);
        assert_eq!(bootstrap.on_dialed(0, B, Ok(Who::Ourselves), &one, now), Some(Ok(())));
        let later = now + BACKOFF_LAST;
        bootstrap.due(later);
        assert_eq!(bootstrap.on_found(0, Ok(vec![A, B]), &one, later), Err(Ok(())), "nobody new to dial");

        bootstrap.on_lost(CONNECTION_SHORT, &nobody, later);
        let soon = bootstrap.timeout().unwrap();
        assert!(soon - later < Duration::from_secs(1));
        bootstrap.due(soon);
        assert_eq!(bootstrap.on_found(0, Ok(vec![A, B]), &nobody, soon), Ok(vec![A]), "never ourselves");
    }

    #[test]
    fn who_throws_us_out_again_and_again_is_not_hurried() {
        let (mut now, nobody, mut waits) = (Instant::now(), nodes(0), Vec::new());
        let mut bootstrap = bootstrap(now);
        for _ in 0..10 {
            bootstrap.due(now);
            assert!(bootstrap.on_found(0, Ok(vec![A]), &nobody, now).is_ok());
            assert_eq!(bootstrap.on_dialed(0, A, Ok(Who::Node(NodeId([0; 32]))), &nodes(1), now), Some(Ok(())));
            bootstrap.on_lost(Duration::from_millis(1), &nobody, now);
            let next = bootstrap.timeout().unwrap();
            waits.push(next - now);
            now = next;
        }
        assert!(waits[0] < Duration::from_secs(1) && waits[9] >= BACKOFF_LAST / 2, "{waits:?}");
    }

    #[test]
    fn with_enough_connections_one_address_is_revisited_now_and_then() {
        let (now, enough) = (Instant::now(), nodes(9));
        let mut bootstrap = bootstrap(now);
        bootstrap.due(now);
        let dials = bootstrap.on_found(0, Ok(vec![A, B]), &enough, now).unwrap();
        assert_eq!(dials.len(), 1);
        bootstrap.on_dialed(0, dials[0], Err("refused".into()), &enough, now);
        let wait = bootstrap.timeout().unwrap() - now;
        assert!(wait >= BOOTSTRAP_REVISIT / 2 && wait <= BOOTSTRAP_REVISIT);
    }
}
