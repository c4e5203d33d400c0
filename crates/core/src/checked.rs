//! A memory that a signature was checked, shared by a value and its copies.
//!
//! One release passes through many hands of a process: gossip, snapshots, a simulation's thousand
//! nodes. What is found right once is right for all copies, because nothing can change a value of the
//! types that carry this. It takes no bytes on the wire: what was decoded is checked anew.

use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use std::sync::{Arc, OnceLock};

#[derive(Clone, Debug, Default)]
pub(crate) struct Checked(Arc<OnceLock<()>>);

impl Checked {
    /// Runs `check` unless it succeeded before.
    pub(crate) fn once<E>(&self, check: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if self.0.get().is_none() {
            check()?;
            self.0.get_or_init(|| ());
        }
        Ok(())
    }
}

impl PartialEq for Checked {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Checked {}

impl Encode for Checked {
    fn encode<E: Encoder>(&self, _: &mut E) -> Result<(), EncodeError> {
        Ok(())
    }
}

impl<C> Decode<C> for Checked {
    fn decode<D: Decoder<Context = C>>(_: &mut D) -> Result<Self, DecodeError> {
        Ok(Checked::default())
    }
}

impl<'de, C> BorrowDecode<'de, C> for Checked {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(_: &mut D) -> Result<Self, DecodeError> {
        Ok(Checked::default())
    }
}
