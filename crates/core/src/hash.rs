//! Names of content: BLAKE3 hashes, one type per thing named.

use bincode::{Decode, Encode};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// A BLAKE3 hash (32 bytes).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Hash(pub [u8; 32]);

#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a hash: expected 64 hexadecimal digits")]
pub struct HashParseError(String);

impl Hash {
    pub fn of(bytes: &[u8]) -> Self {
        Hash(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..6]))
    }
}

impl FromStr for Hash {
    type Err = HashParseError;
    fn from_str(s: &str) -> Result<Self, HashParseError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(s, &mut bytes).map_err(|_| HashParseError(s.to_string()))?;
        Ok(Hash(bytes))
    }
}

macro_rules! hash_of {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name(pub Hash);

        impl $name {
            /// Where a name must be written and there is nothing to name.
            pub const NONE: $name = $name(Hash([0; 32]));

            pub fn of(bytes: &[u8]) -> Self {
                $name(Hash::of(bytes))
            }
            /// The first twelve hexadecimal digits, for people.
            pub fn short(&self) -> String {
                format!("{:?}", self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
        impl FromStr for $name {
            type Err = HashParseError;
            fn from_str(s: &str) -> Result<Self, HashParseError> {
                s.parse().map($name)
            }
        }
    };
}

hash_of!(
    /// The name of a chunk: the BLAKE3 hash of its bytes.
    ChunkHash
);
hash_of!(
    /// The name of a manifest: the BLAKE3 hash of its canonical bytes.
    ManifestHash
);
