//! The secret that a webhook's receiver shares, and the signature made with it
//! (Standard Webhooks, <https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

use crate::error::HookError;
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use ring::hmac;
use std::fmt;
use std::sync::Arc;

/// Padding may be left out where it is read; it is always written.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A shared secret; never shown.
#[derive(Clone)]
pub struct Secret(Arc<hmac::Key>);

impl Secret {
    /// From a file's content: `whsec_` and base64, or else the bytes themselves; white space around it
    /// does not count. Refuses an empty one, and what only looks like base64.
    pub fn parse(content: &[u8]) -> Result<Secret, HookError> {
        let content = content.trim_ascii();
        let secret = match content.strip_prefix(b"whsec_") {
            Some(encoded) => BASE64.decode(encoded).map_err(|e| HookError::Secret { reason: e.to_string() })?,
            None if content.starts_with(b"whsk_") => return Err(HookError::AsymmetricSecret),
            None => content.to_vec(),
        };
        if secret.is_empty() {
            return Err(HookError::NoSecret);
        }
        Ok(Secret(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &secret))))
    }

    /// The value of `webhook-signature` for a message sent at `unix_seconds`.
    pub(crate) fn sign(&self, id: &str, unix_seconds: u64, body: &str) -> String {
        let tag = hmac::sign(&self.0, format!("{id}.{unix_seconds}.{body}").as_bytes());
        format!("v1,{}", BASE64.encode(tag))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vector that the reference libraries of Standard Webhooks test themselves with.
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const UNIX_SECONDS: u64 = 1_614_265_330;
    const BODY: &str = r#"{"test": 2432232314}"#;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn signs_as_the_reference_libraries_do() {
        let secret = Secret::parse(b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
        assert_eq!(secret.sign(ID, UNIX_SECONDS, BODY), SIGNATURE);
    }

    #[test]
    fn a_secret_without_prefix_is_its_bytes() {
        let raw = BASE64.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        assert_eq!(Secret::parse(&raw).unwrap().sign(ID, UNIX_SECONDS, BODY), SIGNATURE);
        // HMAC-SHA256, RFC 4231 test case 2 has key "Jefe"; here only that white space does not count.
        let plain = Secret::parse(b"Jefe").unwrap().sign("1", 2, "{}");
        assert_eq!(Secret::parse(b"  Jefe\r\n").unwrap().sign("1", 2, "{}"), plain);
    }

    #[test]
    fn padding_may_be_left_out() {
        let [with, without] = [&b"whsec_AAECAw=="[..], b"whsec_AAECAw"].map(|s| Secret::parse(s).unwrap());
        assert_eq!(with.sign("1", 2, "{}"), without.sign("1", 2, "{}"));
    }

    #[test]
    fn refuses_what_is_no_secret() {
        assert!(matches!(Secret::parse(b" \n"), Err(HookError::NoSecret)));
        assert!(matches!(Secret::parse(b"whsec_"), Err(HookError::NoSecret)));
        assert!(matches!(Secret::parse(b"whsec_a*b"), Err(HookError::Secret { .. })));
        assert!(matches!(Secret::parse(b"whsk_AAAA"), Err(HookError::AsymmetricSecret)));
        assert_eq!(format!("{:?}", Secret::parse(b"x").unwrap()), "Secret(…)");
    }
}
