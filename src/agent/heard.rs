//! What comes from the mesh, and what the brain makes of it that is worth telling.

use super::Agent;
use super::lifecycle::Kind;
use aquifer_core::PeerMessage;
use aquifer_mesh::MeshEvent;
use aquifer_proto::{Input, Notice, Verdict};

impl Agent {
    pub(super) fn on_mesh(&mut self, event: MeshEvent) {
        match event {
            MeshEvent::Listening { address } => {
                tracing::info!("mesh: listening on {address}");
                if !self.local.addresses.contains(&address) {
                    self.local.addresses.push(address);
                }
                self.local.data_endpoints =
                    self.transports.endpoints().into_iter().chain([self.data_endpoint.clone()]).collect();
                self.input(Input::Local(self.local.clone()));
            }
            MeshEvent::ListeningEnded { address } => {
                self.local.addresses.retain(|a| *a != address);
                self.input(Input::Local(self.local.clone()));
            }
            MeshEvent::Connected { node, address } => {
                if let Some(address) = address {
                    self.addresses.insert(node, address);
                }
                self.input(Input::Connected { node });
                if !std::mem::replace(&mut self.lifecycle.joined, true) {
                    self.tell_of_peer(Kind::Joined, &node, "");
                }
            }
            MeshEvent::Disconnected { node } => {
                self.grants.forget(&node);
                self.access.remove(&node);
                self.addresses.remove(&node);
                self.input(Input::Disconnected { node });
            }
            MeshEvent::Message { from, message } => {
                if let PeerMessage::Grant { access, .. } = &message {
                    self.access.insert(from, access.clone());
                }
                if matches!(message, PeerMessage::Snapshot { .. })
                    && let Some(publication) = &mut self.publication
                {
                    (publication.heard_the_mesh, publication.may_decide) = (true, true);
                }
                self.input(Input::Message { from, message });
            }
            MeshEvent::Gossip { via, id, message } => {
                self.publication.iter_mut().for_each(|publication| publication.may_decide = true);
                self.next_token += 1;
                let token = self.next_token;
                self.tokens.insert(token, id);
                self.input(Input::Gossip { via, token, message });
            }
            MeshEvent::Malformed { from, reason } => {
                self.tell_once(format!("malformed {from}"), || {
                    tracing::warn!("peer {from} sent what cannot be read: {reason}");
                });
            }
            MeshEvent::Unreachable { target, reason } => tracing::debug!("mesh: {target}: {reason}"),
        }
    }

    pub(super) fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::MemberJoined { node, name } => {
                tracing::info!("{name} ({}) is in the mesh", node.short());
                self.tell_of_peer(Kind::PeerJoined, &node, &name);
            }
            Notice::MemberLeft { node, name, said_goodbye } => {
                let how = if said_goodbye { "goodbye" } else { "silence" };
                match said_goodbye {
                    true => tracing::info!("{name} ({}) left", node.short()),
                    false => tracing::info!("{name} ({}) is not heard of any more", node.short()),
                }
                self.meters.members_left.with_label_values(&[how]).inc();
                self.tell_of_peer(Kind::PeerLeft, &node, &format!("{name}: {how}"));
                self.tally.forget(&node);
            }
            Notice::ReleaseRejected { via, rejection, detail } => {
                tracing::warn!("a release brought by {} is refused ({rejection:?}): {detail}", via.short());
            }
            Notice::StatusRejected { via, detail } => {
                self.tell_once(format!("status {via}"), || {
                    tracing::warn!("a status record brought by {} is refused: {detail}", via.short());
                });
            }
            Notice::PeerBlamed { node, manifest, chunk, avoid } => tracing::warn!(
                "{} sent wrong bytes for chunk {chunk} of {}; it is not asked again for {avoid:?}",
                node.short(),
                manifest.short()
            ),
            Notice::PeerFailing { node, avoid } => {
                tracing::info!("reading from {} failed; trying others for {avoid:?}", node.short());
            }
        }
    }

    pub(super) fn verdict(&mut self, token: u64, verdict: Verdict) {
        let Some(id) = self.tokens.remove(&token) else { return };
        let verdict = match verdict {
            Verdict::Accept => aquifer_mesh::Verdict::Accept,
            Verdict::Ignore => aquifer_mesh::Verdict::Ignore,
            Verdict::Reject => aquifer_mesh::Verdict::Reject,
        };
        self.mesh.verdict(id, verdict);
    }
}
