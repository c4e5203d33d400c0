//! Element types, by the names safetensors gives them.

use bincode::{Decode, Encode};
use std::fmt;

/// A dtype's name. Names this build does not know are carried as they are: such a tensor has a
/// length and bytes, but no element size.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Dtype(String);

impl Dtype {
    pub fn new(name: impl Into<String>) -> Self {
        Dtype(name.into())
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// Bits of one element, for the dtypes of safetensors 0.8; `None` for any other.
    pub fn bits(&self) -> Option<u64> {
        Some(match self.0.as_str() {
            "F4" => 4,
            "F6_E2M3" | "F6_E3M2" => 6,
            "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
            "F16" | "BF16" | "I16" | "U16" => 16,
            "F32" | "I32" | "U32" => 32,
            "F64" | "I64" | "U64" | "C64" => 64,
            _ => return None,
        })
    }

    /// Bytes of one element; `None` if unknown or not a whole number.
    pub fn bytes(&self) -> Option<u64> {
        self.bits().filter(|bits| bits % 8 == 0).map(|bits| bits / 8)
    }

    /// Bytes of a whole tensor of `shape`: `Some(Err)` if that is no whole number or does not fit
    /// 64 bits, `None` if the dtype is unknown.
    pub fn tensor_bytes(&self, shape: &[u64]) -> Option<Result<u64, &'static str>> {
        let bits = self.bits()?;
        let total = shape.iter().try_fold(bits, |n, &d| n.checked_mul(d));
        Some(match total {
            None => Err("its size does not fit 64 bits"),
            Some(n) if n % 8 != 0 => Err("its elements do not fill whole bytes"),
            Some(n) => Ok(n / 8),
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
