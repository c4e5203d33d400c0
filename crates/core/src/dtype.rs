//! Element types, by the names safetensors gives them.

use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use std::borrow::Cow;
use std::fmt;

/// Those of safetensors 0.8, with the bits of an element.
const KNOWN: [(&str, u64); 22] = [
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("BOOL", 8),
    ("U8", 8),
    ("I8", 8),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("F16", 16),
    ("BF16", 16),
    ("I16", 16),
    ("U16", 16),
    ("F32", 32),
    ("I32", 32),
    ("U32", 32),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
    ("C64", 64),
];

/// A dtype's name. Names this build does not know are carried as they are: such a tensor has a
/// length and bytes, but no element size. A known name takes no memory of its own: a manifest has
/// one for each of maybe a million tensors.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dtype(Cow<'static, str>);

impl Dtype {
    pub fn new(name: impl AsRef<str> + Into<String>) -> Self {
        match KNOWN.iter().find(|(known, _)| *known == name.as_ref()) {
            Some((known, _)) => Dtype(Cow::Borrowed(known)),
            None => Dtype(Cow::Owned(name.into())),
        }
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// Bits of one element, for the dtypes of safetensors 0.8; `None` for any other.
    pub fn bits(&self) -> Option<u64> {
        KNOWN.iter().find(|(known, _)| *known == self.0).map(|(_, bits)| *bits)
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

impl Encode for Dtype {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.name().encode(encoder)
    }
}

impl<Context> Decode<Context> for Dtype {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        String::decode(decoder).map(Dtype::new)
    }
}

impl<'de, Context> BorrowDecode<'de, Context> for Dtype {
    fn borrow_decode<D: BorrowDecoder<'de, Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        String::borrow_decode(decoder).map(Dtype::new)
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
