//! One key, two names: our node ids are ed25519 keys, libp2p's peer ids wrap them.

use aquifer_core::{NodeId, NodeSecret};
use libp2p::PeerId;
use libp2p::identity::{DecodingError, Keypair, PublicKey, ed25519};

/// The code of a multihash that holds its content unhashed, as peer ids of ed25519 keys do.
const MULTIHASH_IDENTITY: u64 = 0;

pub(crate) fn keypair(secret: &NodeSecret) -> Result<Keypair, DecodingError> {
    Keypair::ed25519_from_bytes(secret.seed())
}

/// None if the id is not the key of anybody: not every 32 bytes are a point of the curve.
pub(crate) fn peer_of(node: NodeId) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&node.0).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// None if the peer's key is not ed25519; none of ours is like that.
pub(crate) fn node_of(peer: PeerId) -> Option<NodeId> {
    let hash = peer.as_ref();
    if hash.code() != MULTIHASH_IDENTITY {
        return None;
    }
    let key = PublicKey::try_decode_protobuf(hash.digest()).ok()?.try_into_ed25519().ok()?;
    Some(NodeId(key.to_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_names_mean_the_same_key() {
        let secret = NodeSecret::from_seed([9; 32]);
        let peer = keypair(&secret).unwrap().public().to_peer_id();
        assert_eq!(peer_of(secret.public()), Some(peer));
        assert_eq!(node_of(peer), Some(secret.public()));
    }

    #[test]
    fn what_is_no_key_is_nobody() {
        let nobody = (0..=255).map(|b| NodeId([b; 32])).find(|id| peer_of(*id).is_none());
        assert!(nobody.is_some());
        assert_eq!(node_of(PeerId::random()), None);
    }
}
