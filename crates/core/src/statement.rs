//! Statements: "switch to that release now", "give that release up", signed by who holds a
//! publisher's key. A release that waits for a word waits for one of these.

use crate::checked::Checked;
use crate::codec::{self, CodecError, Kind};
use crate::id::{ChannelName, IdError, PublisherKey, PublisherSecret, SIGNATURE_BYTES};
use crate::limits::{RELEASE_NOTE_BYTES_MAX, STATEMENT_BYTES_MAX};
use crate::release::ReleaseId;
use bincode::{Decode, Encode};
use thiserror::Error;

const CONTEXT: &str = "aquifer statement v1";

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Statement {
    pub channel: ChannelName,
    /// What it speaks of.
    pub release: ReleaseId,
    pub word: Word,
    /// For people.
    pub reason: String,
    /// The signer's clock, milliseconds since 1970. For people; nothing is decided by it.
    pub created_unix_ms: u64,
}

/// Where both were said of one release, by two who hold the key, the greater counts: once somebody
/// switched, all must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub enum Word {
    Abort,
    Commit,
}

/// A statement as it travels: its exact bytes, who signed them, and the signature.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SignedStatement {
    pub publisher: PublisherKey,
    body: Vec<u8>,
    signature: [u8; SIGNATURE_BYTES],
    checked: Checked,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum StatementError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("statement: {0}")]
    Signature(#[from] IdError),
    #[error("statement: a reason of {0} bytes, allowed are {RELEASE_NOTE_BYTES_MAX}")]
    Reason(usize),
}

impl SignedStatement {
    pub fn sign(statement: &Statement, secret: &PublisherSecret) -> Self {
        let body = codec::encode(Kind::Statement, statement);
        let signature = secret.sign(CONTEXT, &body);
        SignedStatement { publisher: secret.public(), body, signature, checked: Checked::default() }
    }

    /// The statement, if the signature is the publisher's. Whether the publisher is *trusted* for
    /// the channel is the node's own business.
    pub fn open(&self) -> Result<Statement, StatementError> {
        self.checked.once(|| self.publisher.verify(CONTEXT, &self.body, &self.signature))?;
        let statement: Statement = codec::decode::<_, STATEMENT_BYTES_MAX>(Kind::Statement, &self.body)?;
        match statement.reason.len() {
            long if long > RELEASE_NOTE_BYTES_MAX => Err(StatementError::Reason(long)),
            _ => Ok(statement),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        codec::encode(Kind::SignedStatement, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StatementError> {
        Ok(codec::decode::<_, { STATEMENT_BYTES_MAX * 2 }>(Kind::SignedStatement, bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::ManifestHash;
    use proptest::prelude::*;

    fn statement() -> impl Strategy<Value = Statement> {
        let word = prop_oneof![Just(Word::Abort), Just(Word::Commit)];
        let whole = |(seq, manifest, word, reason, created_unix_ms): (_, [u8; 32], _, _, _)| Statement {
            channel: "a/b".parse().unwrap(),
            release: ReleaseId { seq, manifest: ManifestHash::of(&manifest) },
            word,
            reason,
            created_unix_ms,
        };
        (any::<u64>(), any::<[u8; 32]>(), word, ".{0,40}", any::<u64>()).prop_map(whole)
    }

    proptest! {
        #[test]
        fn it_arrives_as_it_was_signed(statement in statement(), seed: [u8; 32]) {
            let signed = SignedStatement::sign(&statement, &PublisherSecret::from_seed(seed));
            let arrived = SignedStatement::decode(&signed.encode()).unwrap();
            prop_assert_eq!(arrived.open(), Ok(statement));
        }

        #[test]
        fn nothing_of_it_can_be_changed(statement in statement(), at: prop::sample::Index, bit in 0..8u8) {
            let mut bytes = SignedStatement::sign(&statement, &PublisherSecret::from_seed([1; 32])).encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(SignedStatement::decode(&bytes).and_then(|s| s.open()).is_err());
        }

        #[test]
        fn any_bytes_are_a_statement_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let headed = [codec::encode(Kind::SignedStatement, &()), bytes.clone()].concat();
            prop_assert!(SignedStatement::decode(&bytes).and_then(|s| s.open()).is_err());
            prop_assert!(SignedStatement::decode(&headed).and_then(|s| s.open()).is_err());
        }
    }

    #[test]
    fn what_another_key_signed_is_not_its_own() {
        let statement = Statement {
            channel: "a/b".parse().unwrap(),
            release: ReleaseId { seq: 1, manifest: ManifestHash::of(b"m") },
            word: Word::Commit,
            reason: String::new(),
            created_unix_ms: 0,
        };
        let mut foreign = SignedStatement::sign(&statement, &PublisherSecret::from_seed([1; 32]));
        foreign.publisher = PublisherSecret::from_seed([2; 32]).public();
        let foreign = SignedStatement::decode(&foreign.encode()).unwrap();
        assert!(matches!(foreign.open(), Err(StatementError::Signature(_))));
        let long = Statement { reason: "x".repeat(RELEASE_NOTE_BYTES_MAX + 1), ..statement };
        let long = SignedStatement::sign(&long, &PublisherSecret::from_seed([1; 32]));
        assert_eq!(long.open(), Err(StatementError::Reason(RELEASE_NOTE_BYTES_MAX + 1)));
    }
}
