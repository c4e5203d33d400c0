//! Hash maps for keys that are numbers of nodes and reads, or node ids: they need spreading, not
//! protection from an attacker. They are looked up; whoever goes through one sorts what it finds.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

pub(crate) type SpreadMap<K, V> = HashMap<K, V, BuildHasherDefault<Spread>>;
pub(crate) type SpreadSet<K> = HashSet<K, BuildHasherDefault<Spread>>;

#[derive(Debug, Default)]
pub(crate) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for eight in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..eight.len()].copy_from_slice(eight);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        // The odd constant is 2^64 divided by the golden ratio (Knuth, TAOCP 3, 6.4).
        let mixed = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}
