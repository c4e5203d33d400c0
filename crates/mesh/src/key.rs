//! The mesh key: 32 secret bytes that all agents of one mesh share. Who does not have them cannot
//! even begin to speak.

use std::fmt;
use std::str::FromStr;
use thiserror::Error;

const HEAD: &str = "aquifer-mesh-key-v1:";

#[derive(Clone, PartialEq, Eq)]
pub struct MeshKey([u8; 32]);

#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a mesh key: expected one line, '{HEAD}' and 64 hexadecimal digits, as `aquifer keygen` writes it")]
pub struct MeshKeyError;

impl MeshKey {
    /// The key made of `random`, which must come from the system's generator.
    pub fn generate(random: [u8; 32]) -> Self {
        MeshKey(random)
    }

    /// The secret itself, as it stands in a key file: one line, without its end.
    pub fn to_text(&self) -> String {
        format!("{HEAD}{}", hex::encode(self.0))
    }

    /// Eight hexadecimal digits that tell keys apart and give nothing away.
    pub fn fingerprint(&self) -> String {
        hex::encode(&blake3::derive_key("aquifer mesh key fingerprint v1", &self.0)[..4])
    }

    pub(crate) fn bytes(&self) -> [u8; 32] {
        self.0
    }
}

impl FromStr for MeshKey {
    type Err = MeshKeyError;
    fn from_str(text: &str) -> Result<Self, MeshKeyError> {
        let digits = text.trim().strip_prefix(HEAD).ok_or(MeshKeyError)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| MeshKeyError)?;
        Ok(MeshKey(bytes))
    }
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshKey(fingerprint {})", self.fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_its_file() {
        let key = MeshKey::generate([7; 32]);
        assert_eq!(format!("{}\n", key.to_text()).parse(), Ok(key));
    }

    #[test]
    fn anything_else_is_refused() {
        let text = MeshKey::generate([7; 32]).to_text();
        for bad in ["", &text[1..], &text[..text.len() - 1], &format!("{text}0"), &format!("{text}\n{text}")] {
            assert_eq!(bad.parse::<MeshKey>(), Err(MeshKeyError), "{bad}");
        }
    }

    #[test]
    fn printing_for_logs_keeps_the_secret() {
        let key = MeshKey::generate([7; 32]);
        assert_eq!(key.fingerprint().len(), 8);
        assert!(!format!("{key:?}").contains("0707"));
        assert_ne!(key.fingerprint(), MeshKey::generate([8; 32]).fingerprint());
    }
}
