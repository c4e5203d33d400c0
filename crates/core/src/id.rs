//! Who is who: node identities, publisher keys, channel names.

use crate::limits::CHANNEL_BYTES_MAX;
use bincode::{Decode, Encode};
use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// Length of an ed25519 signature, in bytes.
pub const SIGNATURE_BYTES: usize = 64;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdError {
    #[error("'{text}' is not a {what}: expected 64 hexadecimal digits")]
    Hex { what: &'static str, text: String },
    #[error("the signature does not match: the bytes were changed, or another key signed them")]
    Signature,
    #[error("channel name '{name}': {reason}")]
    Channel { name: String, reason: &'static str },
}

macro_rules! key_pair {
    ($public:ident, $public_doc:literal, $secret:ident, $secret_doc:literal, $what:literal) => {
        #[doc = $public_doc]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
        pub struct $public(pub [u8; 32]);

        /// The order of the bytes. Keys differ early, and maps compare them all the time: eight bytes
        /// at once, without a call.
        impl Ord for $public {
            #[inline]
            fn cmp(&self, other: &Self) -> Ordering {
                words(&self.0).cmp(&words(&other.0))
            }
        }
        impl PartialOrd for $public {
            #[inline]
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $public {
            /// Checks an ed25519 signature (RFC 8032, strict) over `context` and `body`.
            pub fn verify(&self, context: &str, body: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> Result<(), IdError> {
                let key = VerifyingKey::from_bytes(&self.0).map_err(|_| IdError::Signature)?;
                let signature = ed25519_dalek::Signature::from_bytes(signature);
                key.verify_strict(&in_context(context, body), &signature).map_err(|_| IdError::Signature)
            }
            /// The first twelve hexadecimal digits, for people.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..6])
            }
        }
        impl fmt::Display for $public {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl fmt::Debug for $public {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }
        impl FromStr for $public {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                parse_hex($what, s).map($public)
            }
        }

        #[doc = $secret_doc]
        #[derive(Clone)]
        pub struct $secret(SigningKey);

        impl $secret {
            /// The key whose RFC 8032 seed is `seed`.
            pub fn from_seed(seed: [u8; 32]) -> Self {
                $secret(SigningKey::from_bytes(&seed))
            }
            pub fn seed(&self) -> [u8; 32] {
                self.0.to_bytes()
            }
            pub fn public(&self) -> $public {
                $public(self.0.verifying_key().to_bytes())
            }
            pub fn sign(&self, context: &str, body: &[u8]) -> [u8; SIGNATURE_BYTES] {
                self.0.sign(&in_context(context, body)).to_bytes()
            }
        }
        impl fmt::Debug for $secret {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($secret), "(of {})"), self.public().short())
            }
        }
    };
}

key_pair!(
    NodeId,
    "A node: the ed25519 public key of its libp2p identity.",
    NodeSecret,
    "A node's identity key.",
    "node id"
);
key_pair!(
    PublisherKey,
    "A publisher: the ed25519 public key that signs its releases.",
    PublisherSecret,
    "The key a publisher signs releases with.",
    "publisher key"
);

#[inline]
fn words(bytes: &[u8; 32]) -> [u64; 4] {
    let word = |w: usize| std::array::from_fn(|b| bytes[w * 8 + b]);
    std::array::from_fn(|w| u64::from_be_bytes(word(w)))
}

/// Separates uses of one key: a signature made in one context is worthless in another.
fn in_context(context: &str, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(context.len() + 1 + body.len());
    message.extend_from_slice(context.as_bytes());
    message.push(0);
    message.extend_from_slice(body);
    message
}

fn parse_hex(what: &'static str, text: &str) -> Result<[u8; 32], IdError> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text.trim(), &mut bytes).map_err(|_| IdError::Hex { what, text: text.to_string() })?;
    Ok(bytes)
}

/// A named line of releases, e.g. `prod/kimi-k2`: 1–128 bytes of letters, digits, `.`, `_`, `-`
/// and `/`, without empty segments.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode)]
pub struct ChannelName(String);

impl ChannelName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ChannelName {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        let refuse = |reason| Err(IdError::Channel { name: s.chars().take(64).collect(), reason });
        if s.is_empty() || s.len() > CHANNEL_BYTES_MAX {
            return refuse("must be 1 to 128 bytes long");
        }
        if !s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b)) {
            return refuse("may hold letters, digits, '.', '_', '-' and '/' only");
        }
        if s.split('/').any(str::is_empty) {
            return refuse("has an empty part between slashes");
        }
        Ok(ChannelName(s.to_string()))
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<C> Decode<C> for ChannelName {
    fn decode<D: bincode::de::Decoder<Context = C>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let text = String::decode(decoder)?;
        text.parse().map_err(|e: IdError| bincode::error::DecodeError::OtherString(e.to_string()))
    }
}
bincode::impl_borrow_decode!(ChannelName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_holds_in_its_context_only() {
        let secret = PublisherSecret::from_seed([3; 32]);
        let signature = secret.sign("a", b"body");
        assert_eq!(secret.public().verify("a", b"body", &signature), Ok(()));
        assert_eq!(secret.public().verify("b", b"body", &signature), Err(IdError::Signature));
        assert_eq!(secret.public().verify("a", b"bodz", &signature), Err(IdError::Signature));
    }

    #[test]
    fn channel_names() {
        assert!("prod/kimi-k2".parse::<ChannelName>().is_ok());
        for bad in ["", "/a", "a//b", "a b", "ä", &"x".repeat(129)] {
            assert!(bad.parse::<ChannelName>().is_err(), "{bad}");
        }
    }
}
