//! Whether traffic may come here: every engine serves exactly the release it should.

use super::view::View;
use super::{Agent, EngineConn, Hold};
use aquifer_core::report::Phase;
use aquifer_core::{ChannelName, ReleaseId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What `/readyz` answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Readiness {
    /// Every registered engine serves exactly the release that it should, and there is one; on a node that holds
    /// whole releases, they are here where no engine follows them; on a publisher, its release is announced. Never while
    /// the node drains.
    pub(crate) ready: bool,
    pub(crate) draining: bool,
    pub(crate) node: String,
    pub(crate) name: String,
    /// Why it is not ready; empty if it is.
    pub(crate) reason: String,
    /// Seconds until what is being fetched is here, as it goes now; null: not known, or nothing is fetched.
    pub(crate) eta_seconds: Option<f64>,
    pub(crate) channels: Vec<ChannelReadiness>,
    pub(crate) engines: Vec<EngineReadiness>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ChannelReadiness {
    pub(crate) channel: String,
    /// Number and manifest of the release that is for this node; 0 and empty: none is known.
    pub(crate) seq: u64,
    pub(crate) manifest: String,
    /// What all of its engines here serve; empty: they differ, or serve nothing yet, or there are none.
    pub(crate) serving: String,
    /// Null: no engine here follows it, and the node is not to hold it.
    pub(crate) ready: Option<bool>,
    pub(crate) reason: String,
    pub(crate) eta_seconds: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct EngineReadiness {
    pub(crate) engine: String,
    pub(crate) channel: String,
    /// The manifest that it serves, wholly verified; empty: none.
    pub(crate) manifest: String,
    pub(crate) ready: bool,
    pub(crate) reason: String,
}

/// What readiness of engines depends on, and how far each channel's release is: cheap enough to look at after every
/// event. Whether a node without engines holds all takes counting its chunks: that is looked at when the view is renewed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags {
    ready: Vec<bool>,
    draining: bool,
    phases: Vec<Option<(ReleaseId, Phase)>>,
}

impl Readiness {
    /// The same, asked for one channel or one engine alone.
    pub(crate) fn of(mut self, channel: Option<&str>, engine: Option<&str>) -> Self {
        if channel.is_none() && engine.is_none() {
            return self;
        }
        self.channels.retain(|c| channel.is_none_or(|name| c.channel == name));
        self.engines
            .retain(|e| channel.is_none_or(|name| e.channel == name) && engine.is_none_or(|name| e.engine == name));
        let verdict = match (engine, channel) {
            (Some(name), _) => match self.engines.as_slice() {
                [] => Err(format!("no engine called '{name}' has registered")),
                engines => engines.iter().find(|e| !e.ready).map_or(Ok(()), |e| Err(e.reason.clone())),
            },
            (None, name) => match self.channels.first() {
                None => Err(format!("channel '{}' is not followed here", name.unwrap_or_default())),
                Some(c) if c.ready == Some(true) => Ok(()),
                Some(c) => Err(c.reason.clone()),
            },
        };
        let draining = self.draining.then(|| self.reason.clone());
        self.reason = draining.or(verdict.err()).unwrap_or_default();
        self.ready = self.reason.is_empty();
        self.eta_seconds = self.channels.iter().filter_map(|c| c.eta_seconds).reduce(f64::max);
        self
    }
}

impl Agent {
    /// Tells whoever watches readiness, if that changed; with `again`, also when only words did. If more did, what is
    /// counted, shown and told is renewed soon: another release may follow this one before the next view.
    pub(super) fn renew_readiness(&mut self, again: bool) {
        let flags = self.flags();
        let is_new = flags != self.flags;
        self.news_due |= is_new;
        if again || is_new {
            self.flags = flags;
            let readiness = self.readiness();
            self.shared.readiness.send_if_modified(|known| {
                let is_new = *known != readiness;
                *known = readiness;
                is_new
            });
        }
    }

    fn flags(&self) -> Flags {
        let engines = self.sessions.values().filter(|c| c.channel.is_some()).map(|c| self.is_ready(c));
        let phase = |channel| self.node.rollout(channel)?.report().map(|report| (report.wanted, report.phase));
        Flags {
            ready: engines.collect(),
            draining: self.draining.is_some(),
            phases: self.channels.keys().map(phase).collect(),
        }
    }

    pub(super) fn readiness(&self) -> Readiness {
        let engines: Vec<EngineReadiness> =
            self.sessions.values().filter(|c| c.channel.is_some()).map(|c| self.engine_readiness(c)).collect();
        let channels: Vec<ChannelReadiness> =
            self.channels.keys().map(|channel| self.channel_readiness(channel, &engines)).collect();
        let waits = channels.iter().find(|c| c.ready == Some(false));
        let reason = match waits {
            _ if self.draining.is_some() => "the node is draining: it is about to leave".to_string(),
            Some(channel) if channels.len() > 1 => format!("{}: {}", channel.channel, channel.reason),
            Some(channel) => channel.reason.clone(),
            None if channels.iter().all(|c| c.ready.is_none()) => "no engine has registered yet".to_string(),
            None => String::new(),
        };
        Readiness {
            ready: reason.is_empty(),
            draining: self.draining.is_some(),
            node: self.node.id().to_string(),
            name: self.name.clone(),
            reason,
            eta_seconds: channels.iter().filter_map(|c| c.eta_seconds).reduce(f64::max),
            channels,
            engines,
        }
    }

    fn engine_readiness(&self, conn: &EngineConn) -> EngineReadiness {
        let ready = self.is_ready(conn);
        let report = conn.channel.as_ref().and_then(|channel| self.node.rollout(channel)?.report());
        let reason = match (ready, conn.session.refusal(), report) {
            (true, _, _) => String::new(),
            (false, Some((_, reason)), _) => reason.clone(),
            (false, None, report) => match (conn.session.progress(), report) {
                ((done, total), _) if done < total => {
                    format!("engine {} is {}: {done} of {total} chunks", conn.name, conn.session.phase())
                }
                (_, Some(report)) if !report.reason.is_empty() => report.reason.clone(),
                (_, _) => format!("engine {} is {}", conn.name, conn.session.phase()),
            },
        };
        EngineReadiness {
            engine: conn.name.clone(),
            channel: conn.channel.as_ref().map(ChannelName::to_string).unwrap_or_default(),
            manifest: conn.session.verified().map(|m| m.to_string()).unwrap_or_default(),
            ready,
            reason,
        }
    }

    fn channel_readiness(&self, channel: &ChannelName, engines: &[EngineReadiness]) -> ChannelReadiness {
        let release = self.channels.get(channel).and_then(|c| c.release.as_ref()).map(|(release, _)| release);
        let mut here = engines.iter().filter(|e| e.channel == channel.as_str()).peekable();
        // Its own release may be for other nodes.
        let newest = || self.node.newest_release(channel).map_or(0, |release| release.seq);
        let publication = self.publication.as_ref().filter(|p| p.channel == *channel);
        let lacks = publication.map(|publication| publication.lacks(newest()));
        let ready = match here.peek() {
            Some(_) => Some(here.clone().all(|e| e.ready)),
            None if self.hold == Hold::All => Some(self.holds_all(channel)),
            None => lacks.as_ref().map(Option::is_none),
        };
        let report = self.node.rollout(channel).and_then(|rollout| rollout.report());
        let serving = report.and_then(|report| report.served).map(|m| m.to_string()).unwrap_or_default();
        let engine = here.find(|e| !e.ready).map(|e| e.reason.clone());
        let problem = || self.channels.get(channel).and_then(|c| c.problem.clone());
        let waits = || match (release, self.progress_of(channel)) {
            (None, _) => "no release is known yet".to_string(),
            (Some(release), None) => format!("waits for manifest {}", release.manifest.short()),
            (Some(release), Some((done, total))) => {
                let (done, total) = (crate::units::bytes(done), crate::units::bytes(total));
                format!("fetches release {}: {done} of {total}", release.seq)
            }
        };
        let reason = match ready {
            Some(true) => String::new(),
            Some(false) => lacks.flatten().or_else(problem).or(engine).unwrap_or_else(waits),
            None => "no engine has registered yet".to_string(),
        };
        ChannelReadiness {
            channel: channel.to_string(),
            seq: release.map_or(0, |release| release.seq),
            manifest: release.map(|release| release.manifest.to_string()).unwrap_or_default(),
            serving,
            ready,
            reason,
            eta_seconds: self.eta(channel),
        }
    }

    /// Whether all of the channel's release lies here, on a node that is to hold it.
    fn holds_all(&self, channel: &ChannelName) -> bool {
        let loaded = |m: &aquifer_core::ManifestHash| self.manifests.get(m).is_some_and(|loaded| loaded.checked);
        let manifest = self.current_manifest(channel).filter(loaded);
        let progress = manifest.and_then(|manifest| self.node.progress(&manifest));
        self.hold == Hold::All && progress.is_some_and(|p| p.chunks_have >= p.chunks_wanted)
    }
}

impl View {
    pub(crate) fn is_ready(&self) -> bool {
        self.readiness.ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readiness() -> Readiness {
        let engine = |name: &str, channel: &str, ready: bool| EngineReadiness {
            engine: name.into(),
            channel: channel.into(),
            ready,
            reason: if ready { String::new() } else { format!("{name} hydrates") },
            ..EngineReadiness::default()
        };
        let channel = |name: &str, ready| ChannelReadiness {
            channel: name.into(),
            ready,
            reason: if ready == Some(true) { String::new() } else { "e1 hydrates".into() },
            ..ChannelReadiness::default()
        };
        Readiness {
            reason: "b: e1 hydrates".into(),
            channels: vec![channel("a", Some(true)), channel("b", Some(false)), channel("c", None)],
            engines: vec![engine("e0", "a", true), engine("e1", "b", false), engine("e2", "b", true)],
            ..Readiness::default()
        }
    }

    #[test]
    fn one_engine_is_asked_about_alone() {
        let of = |channel, engine| {
            let of = readiness().of(channel, engine);
            (of.ready, of.reason)
        };
        assert_eq!(of(None, None), (false, "b: e1 hydrates".into()));
        assert_eq!(of(None, Some("e0")), (true, String::new()));
        assert_eq!(of(None, Some("e1")), (false, "e1 hydrates".into()));
        assert_eq!(of(Some("b"), Some("e2")), (true, String::new()));
        assert_eq!(of(Some("a"), None), (true, String::new()));
        assert_eq!(of(Some("b"), None), (false, "e1 hydrates".into()));
        assert!(!of(Some("c"), None).0 && !of(Some("d"), None).0 && !of(None, Some("e9")).0);
    }

    #[test]
    fn nothing_is_ready_while_the_node_drains() {
        let draining = Readiness { draining: true, reason: "draining".into(), ..readiness() };
        let of = draining.of(None, Some("e0"));
        assert_eq!((of.ready, of.reason.as_str()), (false, "draining"));
    }
}
