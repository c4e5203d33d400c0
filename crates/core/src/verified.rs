//! Whether a signature has been checked, shared by all copies of what was signed.

use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use std::sync::{Arc, OnceLock};

/// Remembers that a check succeeded, for a value that cannot change. A copy shares it; what comes
/// from a wire has not been checked. A simulator, where thousands of nodes look at copies of one
/// record, spends most of its time on signatures without this.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verified(Arc<OnceLock<()>>);

impl Verified {
    /// Checks, unless that has succeeded before.
    pub(crate) fn or_check<E>(&self, check: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if self.0.get().is_none() {
            check()?;
            self.0.get_or_init(|| ());
        }
        Ok(())
    }
}

/// What is remembered of a value is no part of it.
impl PartialEq for Verified {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Verified {}

impl Encode for Verified {
    fn encode<E: Encoder>(&self, _: &mut E) -> Result<(), EncodeError> {
        Ok(())
    }
}

impl<Context> Decode<Context> for Verified {
    fn decode<D: Decoder<Context = Context>>(_: &mut D) -> Result<Self, DecodeError> {
        Ok(Verified::default())
    }
}

impl<'de, Context> BorrowDecode<'de, Context> for Verified {
    fn borrow_decode<D: BorrowDecoder<'de, Context = Context>>(_: &mut D) -> Result<Self, DecodeError> {
        Ok(Verified::default())
    }
}
