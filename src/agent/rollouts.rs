//! What the rollout decides for this node's engines, and what the engines come to.

use super::Agent;
use aquifer_core::{ChannelName, ManifestHash};
use aquifer_engine::ConnId;
use aquifer_proto::rollout::Order;
use aquifer_proto::{EngineInput, Input, Plan, Target};
use std::sync::Arc;

impl Agent {
    pub(super) fn on_order(&mut self, conn: ConnId, order: Order) {
        if let Some(entry) = self.sessions.get_mut(&conn) {
            if entry.order.is_none_or(|before| before.manifest != order.manifest) {
                entry.unfit = None;
            }
            entry.order = Some(order);
            self.obey(conn);
        }
    }

    /// All engines of a channel do what they were told, as far as they can now.
    pub(super) fn obey_all(&mut self, channel: &ChannelName) {
        let of = |conn: &super::EngineConn| conn.channel.as_ref() == Some(channel);
        let conns: Vec<ConnId> = self.sessions.iter().filter(|(_, c)| of(c)).map(|(id, _)| *id).collect();
        conns.into_iter().for_each(|conn| self.obey(conn));
    }

    /// Points the engine at the manifest of its order, once that is here, and says how far it may go.
    fn obey(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.get(&conn) else { return };
        let Some(Order { manifest, until }) = entry.order.filter(|_| !entry.session.is_registering()) else { return };
        if entry.session.aim().is_some_and(|target| target.manifest == manifest) {
            return self.engine_input(conn, EngineInput::Until(until));
        }
        // One that does not fit will not do so later.
        if entry.unfit == Some(manifest) {
            return;
        }
        let Some(loaded) = self.manifests.get(&manifest).filter(|l| l.checked) else { return };
        let regions = super::engines::region_bytes(&entry.regions);
        let input = match Plan::of(&loaded.manifest, &loaded.layout, &entry.bindings, &entry.rows, &regions) {
            Ok(plan) => {
                let target = Target { manifest, plan: Arc::new(plan), layout: loaded.layout.clone() };
                EngineInput::Order { target, until }
            }
            Err(error) => {
                tracing::warn!("engine {} cannot take release {}: {error}", entry.name, manifest.short());
                let reason = error.to_string();
                self.sessions.get_mut(&conn).into_iter().for_each(|entry| entry.unfit = Some(manifest));
                EngineInput::Unfit { manifest, reason }
            }
        };
        self.engine_input(conn, input);
    }

    /// A manifest that cannot be used fits no engine that was to take it.
    pub(super) fn unfit(&mut self, channel: &ChannelName, manifest: ManifestHash, problem: &str) {
        let told = |c: &super::EngineConn| {
            c.channel.as_ref() == Some(channel) && c.order.is_some_and(|order| order.manifest == manifest)
        };
        let conns: Vec<ConnId> = self.sessions.iter().filter(|(_, c)| told(c)).map(|(id, _)| *id).collect();
        for conn in conns {
            self.engine_input(conn, EngineInput::Unfit { manifest, reason: problem.to_string() });
        }
    }

    /// Tells the brain how an engine is, if that is news.
    pub(super) fn report_engine(&mut self, conn: ConnId) {
        let Some(entry) = self.sessions.get_mut(&conn).filter(|c| !c.session.is_registering()) else { return };
        let (Some(channel), facts) = (entry.channel.clone(), entry.session.facts()) else { return };
        if entry.told.as_ref() != Some(&facts) {
            entry.told = Some(facts.clone());
            self.input(Input::Engine { channel, engine: conn.0, facts });
        }
    }
}
