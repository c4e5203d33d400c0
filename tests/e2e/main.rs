//! Whole meshes of real processes on loopback, and what must not go wrong in them.
//!
//! A test states what is to hold at the end and waits for it; nothing here waits for a time to
//! pass. What an agent says of itself is compared with what the test finds out without it: files
//! on disk, an engine's memory, bytes that went through a proxy.

mod crashes;
mod encryption;
mod joining;
mod keys;
mod lies;
mod noise;
mod packs;
mod records;
mod refusals;
mod releases;
mod sharing;
mod site;
