//! Gossip: signed records to everybody, over gossipsub.
//!
//! Records are signed by whom they speak of, so the messages themselves are anonymous, and named
//! by their content. Nothing is passed on before the agent has judged it.

use crate::identity::node_of;
use crate::limits::{
    GOSSIP_BYTES_MAX, GOSSIP_HEARTBEAT_FIRST, GOSSIP_HINT_HEARTBEATS, GOSSIP_HINT_PART, GOSSIP_HISTORY_HEARTBEATS,
    GOSSIP_PEERS, GOSSIP_PEERS_HIGH, GOSSIP_PEERS_LOW, GOSSIP_QUEUE_MAX, GOSSIP_REMEMBERED,
};
use aquifer_core::{GossipMessage, NodeId};
use libp2p::PeerId;
use libp2p::gossipsub::{
    self, ConfigBuilder, IdentityTransform, MessageAcceptance, MessageAuthenticity, MessageId, PublishError, TopicHash,
    ValidationMode, WhitelistSubscriptionFilter,
};
use std::fmt;
use tracing::{debug, warn};

pub(crate) type Gossip = gossipsub::Behaviour<IdentityTransform, WhitelistSubscriptionFilter>;

const TOPIC_STATUS: &str = "aquifer/status/1";
const TOPIC_RELEASE: &str = "aquifer/release/1";

/// One gossip message as it came to us, for [`crate::Mesh::verdict`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GossipId {
    content: [u8; 32],
    via: PeerId,
}

impl fmt::Debug for GossipId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GossipId({})", hex::encode(&self.content[..6]))
    }
}

/// What is to become of a gossip message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is passed on.
    Accept,
    /// It is not passed on, and nobody is to blame: for example, it is old.
    Ignore,
    /// It is not passed on, and whoever passed it to us should not have.
    Reject,
}

/// A message as it came: what it says, or why it says nothing.
pub(crate) struct Heard {
    pub(crate) via: NodeId,
    pub(crate) id: GossipId,
    pub(crate) message: Result<GossipMessage, String>,
}

pub(crate) fn behaviour() -> Result<Gossip, String> {
    let topics = [TOPIC_STATUS, TOPIC_RELEASE].map(topic);
    let config = ConfigBuilder::default()
        .validation_mode(ValidationMode::Anonymous)
        .validate_messages()
        .message_id_fn(|message| MessageId::from(blake3::hash(&message.data).as_bytes().to_vec()))
        .max_transmit_size(GOSSIP_BYTES_MAX)
        .heartbeat_initial_delay(GOSSIP_HEARTBEAT_FIRST)
        .mesh_n(GOSSIP_PEERS)
        .mesh_n_low(GOSSIP_PEERS_LOW)
        .mesh_n_high(GOSSIP_PEERS_HIGH)
        .gossip_factor(GOSSIP_HINT_PART)
        .history_gossip(GOSSIP_HINT_HEARTBEATS)
        .history_length(GOSSIP_HISTORY_HEARTBEATS)
        .duplicate_cache_time(GOSSIP_REMEMBERED)
        .connection_handler_queue_len(GOSSIP_QUEUE_MAX)
        .flood_publish(true)
        .build()
        .map_err(|e| e.to_string())?;
    let filter = WhitelistSubscriptionFilter(topics.iter().map(|topic| topic.hash()).collect());
    let mut gossip = Gossip::new_with_subscription_filter(MessageAuthenticity::Anonymous, config, filter)?;
    for topic in &topics {
        gossip.subscribe(topic).map_err(|e| format!("{e:?}"))?;
    }
    Ok(gossip)
}

/// Tells everybody; false if nobody is there to be told.
pub(crate) fn publish(gossip: &mut Gossip, message: &GossipMessage) -> bool {
    let Err(error) = gossip.publish(topic_of(message), message.encode()) else { return true };
    let too_long = matches!(error, PublishError::MessageTooLarge);
    match too_long {
        true => warn!(%error, "a record is too long to gossip"),
        false => debug!(%error, "not gossiped"),
    }
    !matches!(error, PublishError::NoPeersSubscribedToTopic)
}

pub(crate) fn judge(gossip: &mut Gossip, id: GossipId, verdict: Verdict) {
    let acceptance = match verdict {
        Verdict::Accept => MessageAcceptance::Accept,
        Verdict::Ignore => MessageAcceptance::Ignore,
        Verdict::Reject => MessageAcceptance::Reject,
    };
    gossip.report_message_validation_result(&MessageId::from(id.content.to_vec()), &id.via, acceptance);
}

/// None if it came from nobody we know.
pub(crate) fn hear(from: PeerId, id: &MessageId, message: &gossipsub::Message) -> Option<Heard> {
    let (via, content) = (node_of(from)?, id.0.as_slice().try_into().ok()?);
    let message = match GossipMessage::decode(&message.data) {
        Ok(heard) if topic_of(&heard) == message.topic => Ok(heard),
        Ok(_) => Err("a record under the other topic".to_string()),
        Err(error) => Err(error.to_string()),
    };
    Some(Heard { via, id: GossipId { content, via: from }, message })
}

fn topic(name: &str) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(name)
}

fn topic_of(message: &GossipMessage) -> TopicHash {
    match message {
        GossipMessage::Status(_) => topic(TOPIC_STATUS).hash(),
        GossipMessage::Release(_) | GossipMessage::Statement(_) => topic(TOPIC_RELEASE).hash(),
    }
}

#[cfg(test)]
pub(crate) fn any_topic() -> TopicHash {
    topic(TOPIC_RELEASE).hash()
}
