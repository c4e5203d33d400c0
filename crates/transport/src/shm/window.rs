//! Memory of a holder's own that one reader sees: what may not be shared is copied there.
//!
//! Measured, CPU seconds a GB of both sides (docs/measured/shm.md): 0.19 through a window, whose pages
//! both have mapped and in cache; 0.27 where the reader reads the holder's memory itself, by pread(2) or
//! by a mapping, because each of its pages is new to the reader; 0.34 through a socket.

use crate::limits::SHM_WINDOW_BYTES_MIN;
use aquifer_memory::{Mapping, Span};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bytes that windows of a holder may still take.
#[derive(Clone, Debug)]
pub(super) struct Windows(Arc<AtomicU64>);

#[derive(Debug)]
pub(super) struct Window {
    mapping: Arc<Mapping>,
    windows: Windows,
}

impl Windows {
    pub(super) fn new(bytes: u64) -> Self {
        Windows(Arc::new(AtomicU64::new(bytes)))
    }

    /// A window of at least `len` bytes, if there is room for it.
    pub(super) fn window(&self, len: u64) -> Option<Window> {
        let len = len.max(SHM_WINDOW_BYTES_MIN).checked_next_power_of_two()?;
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(len)).ok()?;
        let made = Mapping::window("aquifer-window", len);
        let failed = |error: &_| {
            tracing::debug!("no window for a reader: {error}");
            self.0.fetch_add(len, Ordering::Relaxed);
        };
        Some(Window { mapping: made.inspect_err(failed).ok()?, windows: self.clone() })
    }
}

impl Window {
    pub(super) fn len(&self) -> u64 {
        self.mapping.len()
    }

    /// Copies a span to the window's beginning.
    pub(super) fn fill(&self, span: &Span) -> io::Result<Arc<Mapping>> {
        span.copy_to(0, &self.mapping.span(), 0, span.len())?;
        Ok(self.mapping.clone())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.windows.0.fetch_add(self.mapping.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_bounded_together() {
        let windows = Windows::new(64 << 20);
        let all: Vec<Window> = (0..5).map_while(|_| windows.window((16 << 20) - 5)).collect();
        assert_eq!(all.iter().map(Window::len).collect::<Vec<_>>(), [16 << 20; 4]);
        assert!(windows.window(1).is_none());
        drop(all);
        assert_eq!(windows.window(1).map(|window| window.len()), Some(SHM_WINDOW_BYTES_MIN));
        assert_eq!(windows.0.load(Ordering::Relaxed), 64 << 20);
        assert!(windows.window(u64::MAX).is_none());
    }
}
