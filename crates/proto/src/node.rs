//! The machine: routes inputs to the parts, drains them in its own step, keeps the time.

pub(crate) mod audit;
mod counters;
mod drain;
mod reading;
mod review;
mod rollouts;
mod serving;
mod status;
mod stock;

use crate::io::{Input, LocalStatus, Notice, OpId, Output, Rates, Verdict};
use crate::limits::{REMIND_INTERVAL, REVIEW_INTERVAL, STATUS_INTERVAL};
use crate::manifests::{Liar, Manifests};
use crate::members::{Heard as StatusHeard, Member, Members};
use crate::releases::{RejectionCounts, Releases};
use crate::rollout::{History, Override, Rollout, RolloutInput, Stand};
use crate::swarm::{Budget, CostlyLimit, EarlyAsk, EarlyAsks, Swarm};
use crate::trust::Trust;
use aquifer_core::message::Refusal;
use aquifer_core::{
    ChannelName, ChunkSet, GossipMessage, ManifestHash, NodeId, NodeSecret, PeerMessage, PublisherKey, Release, Report,
    Selector, SignedRelease, SignedStatement, SignedStatus, Time,
};
use drain::Drain;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

pub use counters::Counters;
pub use drain::DrainProgress;

#[derive(Clone, Debug)]
pub struct Config {
    pub identity: NodeSecret,
    /// Must be greater than in any earlier life of this identity.
    pub incarnation: u64,
    pub name: String,
    pub version: String,
    pub labels: Vec<(String, String)>,
    /// Channels to follow, with the publishers trusted for each.
    pub channels: Vec<(ChannelName, Vec<PublisherKey>)>,
    /// Releases accepted in earlier lives, what was said of them, and where the node stood.
    pub accepted: Vec<SignedRelease>,
    pub said: Vec<SignedStatement>,
    pub stands: Vec<(ChannelName, Stand)>,
    /// What the operator wants of this node alone.
    pub overrides: Vec<(ChannelName, Override)>,
    /// Chunk bytes this node lets others read at once.
    pub leased_bytes_max: u64,
    /// Chunk bytes per second that this node uploads at most, on average.
    pub upload_bytes_per_s: Option<u64>,
    /// See [`Input::Costly`].
    pub costly: CostlyLimit,
    pub seed: u64,
}

/// One node's decisions. See the crate.
#[derive(Debug)]
pub struct Node {
    me: NodeId,
    config: Config,
    rng: SmallRng,
    members: Members,
    releases: Releases,
    rollouts: BTreeMap<ChannelName, Rollout>,
    /// For publishers: what becomes of releases that need not be for this node.
    onlookers: BTreeMap<(ChannelName, Selector), Rollout>,
    histories: BTreeMap<ChannelName, History>,
    /// What is said of each in status records.
    reported: BTreeMap<ChannelName, Report>,
    manifests: Manifests,
    trust: Trust,
    swarms: BTreeMap<ManifestHash, Swarm>,
    /// Asks about manifests that are still on their way here.
    early_asks: EarlyAsks,
    budget: Budget,
    ops: BTreeMap<OpId, Op>,
    next_op: OpId,
    /// Chunks whose last read brought nothing of use.
    spoiled: BTreeSet<(ManifestHash, u32)>,
    counters: Counters,
    /// This node is about to leave.
    drain: Option<Drain>,
    local: LocalStatus,
    rates: Rates,
    status_seq: u64,
    status_at: Time,
    status_sent: Option<Time>,
    /// Between the record before and the one due at `status_at`, about: what this node's word says.
    status_interval: Duration,
    review_at: Time,
    /// When the swarms are looked over, if before that.
    swarms_at: Option<Time>,
    /// The membership that `reach` was last settled for.
    ranked: u64,
    reminded: BTreeMap<NodeId, Time>,
    /// Something happened that may allow another grant.
    grants_due: bool,
    out: VecDeque<Output>,
}

/// A read under way, and what its holder is owed at its end.
#[derive(Clone, Copy, Debug)]
struct Op {
    manifest: ManifestHash,
    chunk: u32,
    holder: NodeId,
    lease: u64,
}

/// How far one manifest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwarmProgress {
    pub chunks_wanted: u32,
    pub chunks_have: u32,
    /// Holders that chunks are being read from now.
    pub sources: usize,
}

/// See [`Node::availability`].
#[derive(Debug)]
pub struct Availability<'a>(&'a Swarm);

impl Availability<'_> {
    /// Distinct chunks of the manifest.
    pub fn len(&self) -> u32 {
        self.0.stock.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the chunk is here, whether it is to be here, and copies that this node knows of elsewhere: those of nodes
    /// that ask it, and what it gave.
    pub fn of(&self, chunk: u32) -> (bool, bool, u32) {
        let stock = &self.0.stock;
        (stock.have.contains(chunk), stock.wanted.contains(chunk), self.0.serving.copies(chunk))
    }
}

impl Node {
    pub fn new(config: Config, now: Time) -> Self {
        Self::known_as(config.identity.public(), config, now)
    }

    /// A node that goes by `me`, whoever's the key it signs with is: a replay lacks the key.
    pub(crate) fn known_as(me: NodeId, config: Config, now: Time) -> Self {
        let (mut releases, mut rollouts) = (Releases::default(), BTreeMap::new());
        for (channel, trusted) in &config.channels {
            releases.follow(channel.clone(), trusted.iter().copied());
            let overridden = config.overrides.iter().find(|(c, _)| c == channel).map(|(_, o)| *o).unwrap_or_default();
            let stand = config.stands.iter().find(|(c, _)| c == channel).map(|(_, stand)| stand.clone());
            rollouts.insert(channel.clone(), Rollout::new(me, config.labels.clone(), overridden, stand, now));
        }
        let mut node = Node {
            me,
            rng: SmallRng::seed_from_u64(config.seed),
            members: Members::new(me),
            releases,
            rollouts,
            onlookers: BTreeMap::new(),
            histories: BTreeMap::new(),
            reported: BTreeMap::new(),
            manifests: Manifests::default(),
            trust: Trust::default(),
            swarms: BTreeMap::new(),
            early_asks: EarlyAsks::default(),
            budget: Budget::new(config.leased_bytes_max, config.upload_bytes_per_s, now)
                .with_costly(config.costly, now),
            ops: BTreeMap::new(),
            next_op: 1,
            spoiled: BTreeSet::new(),
            counters: Counters::default(),
            drain: None,
            local: LocalStatus::default(),
            rates: Rates::default(),
            status_seq: 0,
            status_at: now,
            status_sent: None,
            status_interval: STATUS_INTERVAL,
            review_at: now,
            swarms_at: None,
            ranked: 0,
            reminded: BTreeMap::new(),
            grants_due: false,
            out: VecDeque::new(),
            config,
        };
        // What was said comes first: a release is not to be prepared anew that was given up.
        for signed in std::mem::take(&mut node.config.said) {
            node.on_statement(now, me, signed);
        }
        let mut accepted = std::mem::take(&mut node.config.accepted);
        accepted.sort_by_cached_key(|signed| signed.open().ok().map(|release| release.id()));
        node.on_releases(now, me, accepted);
        node
    }

    pub fn handle(&mut self, now: Time, input: Input) {
        match input {
            Input::Connected { node } => self.on_connected(now, node),
            Input::Disconnected { node } => self.on_disconnected(now, node),
            Input::Message { from, message } => self.on_message(now, from, message),
            Input::Gossip { via, token, message } => {
                let verdict = match message {
                    GossipMessage::Status(signed) => self.on_status(now, via, signed, Duration::ZERO),
                    GossipMessage::Release(signed) => self.on_release(now, via, signed),
                    GossipMessage::Statement(signed) => self.on_statement(now, via, signed),
                };
                self.out.push_back(Output::Verdict { token, verdict });
            }
            Input::Local(local) => {
                if self.local != local {
                    self.local = local;
                    self.status_soon(now);
                }
            }
            Input::Rates(rates) => self.rates = rates,
            Input::Publish { release } => self.publish(now, release),
            Input::Say { statement } => self.say(now, statement),
            Input::LookOn { channel, selector } => self.look_on(now, channel, selector),
            Input::Engine { channel, engine, facts } => {
                self.rollout_input(now, &channel, RolloutInput::Engine { engine, facts });
            }
            Input::EngineGone { channel, engine } => {
                self.rollout_input(now, &channel, RolloutInput::EngineGone { engine });
            }
            Input::ManifestWanted { manifest, bytes } => {
                self.manifests.want(manifest, bytes);
                self.review_manifests(now);
            }
            Input::ManifestLoaded { manifest, chunk_bytes } => {
                self.manifests.forget(&manifest);
                self.ranked = 0;
                let early = self.early_asks.take(&manifest);
                let early: Vec<_> = early.into_iter().map(|(from, ask)| (from, self.is_far(&from), ask)).collect();
                let swarm = self.swarms.entry(manifest).or_insert_with(|| Swarm::new(chunk_bytes));
                swarm.serving.gives_costly = self.budget.gives_costly();
                self.grants_due = true;
                // Nothing is refused as long as it is open what this node will want.
                swarm.stock.wanted = ChunkSet::full(swarm.stock.len());
                for (from, is_far, ask) in early {
                    swarm.serving.on_ask(&swarm.stock, from, ask.wanted, ask.have, (ask.terms, is_far));
                }
                swarm.stock.wanted = ChunkSet::empty(swarm.stock.len());
                self.drain_swarm(&manifest);
            }
            Input::Wanted { manifest, chunks } => self.on_wanted(now, manifest, chunks),
            Input::Held { manifest, chunks } => self.on_held(now, manifest, &chunks),
            Input::Costly { manifest, chunks } => self.on_costly(&manifest, chunks),
            Input::Lost { manifest, chunks } => self.on_lost(now, manifest, &chunks),
            Input::Forget { manifest } => self.on_forget(manifest),
            Input::ReadDone { op, outcome } => self.on_read_done(now, op, outcome),
            Input::Drain => self.drain(now),
            Input::Leave => self.leave(),
        }
        self.settle(now);
    }

    pub fn handle_timeout(&mut self, now: Time) {
        if self.review_at <= now {
            self.review_at = now + REVIEW_INTERVAL;
            let mut notices = Vec::new();
            let gone = self.members.on_timeout(now, &mut notices);
            self.out.extend(notices.into_iter().map(Output::Notice));
            gone.into_iter().for_each(|node| self.tell_rollouts(now, node));
            self.count_holders_soon();
            let dials = self.members.to_dial(&mut self.rng);
            self.out.extend(dials.into_iter().map(|(node, addresses)| Output::Dial { node, addresses }));
            let in_vain = self.early_asks.on_timeout(now, |m| self.manifests.is_wanted(m));
            in_vain.into_iter().for_each(|(manifest, node)| self.refuse(node, manifest, Refusal::Nothing));
            self.reminded.retain(|_, at| now.since(*at) < REMIND_INTERVAL);
            self.review_manifests(now);
            self.review_swarms(now);
            self.review_onlookers(now);
        }
        if self.manifests.next_timeout().is_some_and(|at| at <= now) {
            self.review_manifests(now);
        }
        if self.swarms_at.is_some_and(|at| at <= now) || self.swarms.values().any(|s| s.pulling.is_starving(now)) {
            self.review_swarms(now);
        }
        self.grants_due |= self.budget.on_timeout(now);
        for (manifest, swarm) in &mut self.swarms {
            self.grants_due |= swarm.serving.next_timeout().is_some_and(|at| at <= now);
            swarm.pulling.on_timeout(*manifest, &swarm.stock, now, &mut self.out);
            for (reader, lease, chunk) in swarm.serving.on_timeout(&swarm.stock, &mut self.budget, now) {
                self.counters.leases_expired += 1;
                self.out.push_back(Output::LeaseClosed { lease, chunk });
                let message = PeerMessage::Revoke { manifest: *manifest, lease };
                self.out.push_back(Output::Send { to: reader, message });
            }
        }
        self.rollouts_timeout(now);
        if self.status_at <= now {
            self.publish_status(now);
        }
        self.settle(now);
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When to call [`Node::handle_timeout`], and what for.
    pub fn poll_timeout(&self) -> Option<(Time, &'static str)> {
        let swarms = self.swarms.values().flat_map(|s| {
            let news = s.pulling.next_timeout();
            let leases = s.serving.next_timeout().map(|t| (t, "leases"));
            [news, leases].into_iter().flatten()
        });
        let manifests = self.manifests.next_timeout().map(|t| (t, "manifest"));
        let own = [(self.status_at, "status"), (self.review_at, "review")];
        let swarms = swarms.chain(self.swarms_at.map(|t| (t, "swarms")));
        let cap = self.budget.next_timeout().map(|t| (t, "upload cap"));
        let rollouts = self.rollouts.values().filter_map(Rollout::poll_timeout);
        let drain = self.drain.as_ref().and_then(Drain::next_timeout).map(|t| (t, "drain"));
        swarms.chain(manifests).chain(cap).chain(rollouts).chain(drain).chain(own).min_by_key(|(at, _)| *at)
    }

    pub fn id(&self) -> NodeId {
        self.me
    }

    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().map(|(_, m)| m)
    }

    pub fn member(&self, node: &NodeId) -> Option<&Member> {
        self.members.member(node)
    }

    pub fn is_connected(&self, node: &NodeId) -> bool {
        self.members.is_connected(node)
    }

    /// Whether the node's chunks are not asked for now, and how many lies it told.
    pub fn trust_of(&self, node: &NodeId, now: Time) -> (bool, u32) {
        (self.trust.is_avoided(node, now), self.trust.record(node).corrupt)
    }

    pub fn rejections(&self) -> RejectionCounts {
        self.releases.counts()
    }

    /// The highest sequence number that any member says it knows of the channel.
    pub fn highest_seq_claimed(&self, channel: &ChannelName) -> Option<u64> {
        let of = |m: &Member| m.status.channels.iter().find(|c| c.channel == *channel).map(|c| c.seq);
        self.members().filter_map(of).max().filter(|seq| *seq > 0)
    }

    pub fn newest_release(&self, channel: &ChannelName) -> Option<&Release> {
        self.releases.newest(channel)
    }

    pub fn progress(&self, manifest: &ManifestHash) -> Option<SwarmProgress> {
        let swarm = self.swarms.get(manifest)?;
        let (chunks_wanted, chunks_have) = swarm.stock.progress();
        Some(SwarmProgress { chunks_wanted, chunks_have, sources: swarm.pulling.sources() })
    }

    /// Bytes of the chunks wanted, and of those that are here.
    pub fn progress_bytes(&self, manifest: &ManifestHash) -> (u64, u64) {
        self.swarms.get(manifest).map_or((0, 0), |s| s.stock.progress_bytes())
    }

    /// Of each chunk of a manifest: whether it is here, whether it is to be, and how many copies are known elsewhere. None
    /// if the manifest is not loaded.
    pub fn availability(&self, manifest: &ManifestHash) -> Option<Availability<'_>> {
        self.swarms.get(manifest).map(Availability)
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes under lease to readers now.
    pub fn leased_bytes(&self) -> u64 {
        self.budget.leased_bytes
    }

    fn on_connected(&mut self, now: Time, node: NodeId) {
        self.members.on_connected(node);
        self.count_holders_soon();
        self.swarms.values_mut().for_each(|s| s.pulling.on_connected());
        let mut statuses = self.members.snapshot(now, &node, &mut self.rng);
        statuses.push((self.sign_status(false), 0));
        let (releases, statements) = self.releases.all();
        self.send(node, PeerMessage::Snapshot { statuses, releases, statements });
        self.review_manifests(now);
        self.review_swarms(now);
    }

    fn on_disconnected(&mut self, now: Time, node: NodeId) {
        self.grants_due = true;
        self.members.on_disconnected(&node);
        self.count_holders_soon();
        self.early_asks.on_disconnected(&node);
        for swarm in self.swarms.values_mut() {
            swarm.pulling.on_disconnected(&node);
            let freed = swarm.serving.on_gone(&swarm.stock, &mut self.budget, &node);
            self.out.extend(freed.into_iter().map(|(lease, chunk)| Output::LeaseClosed { lease, chunk }));
        }
        self.review_manifests(now);
        self.review_swarms(now);
    }

    fn on_message(&mut self, now: Time, from: NodeId, message: PeerMessage) {
        match message {
            PeerMessage::Snapshot { statuses, releases, statements } => {
                for (signed, age_ms) in statuses {
                    self.on_status(now, from, signed, Duration::from_millis(age_ms.into()));
                }
                // A release that was given up is not to be begun.
                for signed in statements {
                    self.on_statement(now, from, signed);
                }
                self.on_releases(now, from, releases);
                self.review_manifests(now);
            }
            PeerMessage::ManifestAsk { manifest, offset } => {
                // Whoever fetches it here asks for chunks next. What this node has not, it may be asked for for ever.
                if self.swarms.contains_key(&manifest) {
                    self.busy_while_draining();
                }
                self.out.push_back(Output::ManifestAsked { to: from, manifest, offset });
            }
            PeerMessage::ManifestPiece { manifest, offset, total, bytes } => {
                let piece = (manifest, offset, total, bytes);
                if let Err(Liar(node)) = self.manifests.on_piece(now, from, piece, &mut self.out) {
                    self.trust.on_failed_read(node, now);
                }
                self.review_manifests(now);
            }
            PeerMessage::Ask { manifest, wanted, have, terms } => {
                self.on_ask(now, from, manifest, EarlyAsk { wanted, have, terms })
            }
            PeerMessage::Progress { manifest, returned, taken, again, terms } => {
                self.on_progress(now, from, manifest, returned, (taken, again, terms));
            }
            PeerMessage::Refuse { manifest, refusal } => {
                if let Some(swarm) = self.swarms.get_mut(&manifest) {
                    swarm.pulling.on_refused(from, refusal, now);
                    self.review_swarms_soon(now);
                }
            }
            PeerMessage::Grant { manifest, lease, chunks, .. } => self.on_grant(now, from, manifest, lease, chunks),
            PeerMessage::Revoke { manifest, lease } => {
                if let Some(swarm) = self.swarms.get_mut(&manifest) {
                    swarm.pulling.on_revoke(manifest, &swarm.stock, now, (from, lease), &mut self.out);
                }
            }
        }
    }

    fn on_status(&mut self, now: Time, via: NodeId, signed: SignedStatus, age: Duration) -> Verdict {
        let mut notices = Vec::new();
        let heard = self.members.on_status(now, signed, age, &mut notices);
        self.out.extend(notices.into_iter().map(Output::Notice));
        match heard {
            StatusHeard::News(node) => {
                self.count_holders_soon();
                self.tell_rollouts(now, node);
                self.on_member_news(now, node);
                Verdict::Accept
            }
            // A goodbye is told to neighbours directly, and may overtake its own gossip.
            StatusHeard::Known => Verdict::Accept,
            StatusHeard::OldNews => Verdict::Ignore,
            StatusHeard::Refused(error) => {
                self.out.push_back(Output::Notice(Notice::StatusRejected { via, detail: error.to_string() }));
                Verdict::Reject
            }
        }
    }

    /// A member is ahead of us: get to where its release can be heard. Behind us: remind it.
    fn on_member_news(&mut self, now: Time, node: NodeId) {
        let Some(member) = self.members.member(&node) else { return };
        let (mut ahead, mut behind) = (false, false);
        let mut holds_new = false;
        for theirs in &member.status.channels {
            let Some(ours) = self.releases.newest(&theirs.channel) else {
                ahead |= theirs.seq > 0;
                continue;
            };
            ahead |= theirs.seq > ours.seq;
            behind |= theirs.seq < ours.seq;
            behind |= theirs.report.as_ref().is_some_and(|r| self.lacks_a_word(&theirs.channel, r));
            let looking = |manifest| self.swarms.get(manifest).is_some_and(|s| s.pulling.is_looking(&s.stock, now));
            holds_new |= looking(&ours.manifest) || looking(&theirs.manifest) || theirs.also.iter().any(looking);
        }
        let follows = |c: &(ChannelName, Vec<PublisherKey>)| member.status.channels.iter().any(|t| t.channel == c.0);
        let shared = self.config.channels.iter().any(follows);
        let addresses = member.status.addresses.clone();
        if !self.members.is_connected(&node) {
            if ahead && shared {
                self.out.push_back(Output::Dial { node, addresses });
            }
        } else if behind {
            self.remind(now, node);
        }
        if holds_new {
            // A newcomer may be a holder: look the swarm over before the next review.
            self.review_swarms_soon(now);
        }
    }

    /// After every step: hand out what can be granted, send what is due, tell what is done.
    fn settle(&mut self, now: Time) {
        self.dismiss(now);
        self.grant(now);
        self.note_quiet(now);
        let mut hydrated = false;
        for (manifest, swarm) in &mut self.swarms {
            swarm.pulling.flush_news(*manifest, &swarm.stock, now, &mut self.out);
            if !swarm.told_hydrated && !swarm.stock.wanted.is_empty() && swarm.stock.is_complete() {
                swarm.told_hydrated = true;
                swarm.pulling.on_wants_changed(*manifest, &swarm.stock, now, &mut self.out);
                self.out.push_back(Output::Hydrated { manifest: *manifest });
                hydrated = true;
            }
        }
        if hydrated {
            self.status_soon(now);
        }
    }

    fn review_manifests(&mut self, now: Time) {
        if self.manifests.wanted().next().is_none() {
            return;
        }
        let members = &self.members;
        let likely = |manifest: &ManifestHash| -> Vec<NodeId> {
            let has = |m: &Member| {
                m.status.channels.iter().any(|c| c.has(manifest) && c.chunks_wanted > 0)
                    && members.is_connected(&m.status.node)
            };
            members.iter().filter(|(_, m)| has(m)).map(|(n, _)| *n).collect()
        };
        let connected: Vec<NodeId> = members.connected().copied().collect();
        self.manifests.review(now, likely, &connected, &mut self.rng, &mut self.out);
    }

    fn send(&mut self, to: NodeId, message: PeerMessage) {
        self.out.push_back(Output::Send { to, message });
    }
}

#[cfg(test)]
mod tests;
