//! A stretch of wire between a holder's data plane and its readers that somebody listens to. It knows
//! no protocol: it carries bytes, and looks for some.

use super::free_address;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(crate) struct Wiretap {
    address: SocketAddr,
    ear: Arc<Ear>,
}

struct Ear {
    target: SocketAddr,
    sample: Vec<u8>,
    passed: AtomicU64,
    seen: AtomicBool,
}

impl Wiretap {
    /// For a holder that is to listen at [`Wiretap::target`]; listens for `sample`.
    pub(crate) fn new(sample: &[u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for a wiretap");
        let address = listener.local_addr().expect("its address");
        let (passed, seen) = (AtomicU64::new(0), AtomicBool::new(false));
        let ear = Arc::new(Ear { target: free_address(), sample: sample.to_vec(), passed, seen });
        let accepting = ear.clone();
        std::thread::spawn(move || {
            for reader in listener.incoming().map_while(Result::ok) {
                let Ok(holder) = TcpStream::connect(accepting.target) else { continue };
                for (from, to) in [(&reader, &holder), (&holder, &reader)] {
                    let (ear, from, to) = (accepting.clone(), from.try_clone(), to.try_clone());
                    let (Ok(from), Ok(to)) = (from, to) else { continue };
                    std::thread::spawn(move || ear.carry(&from, &to));
                }
            }
        });
        Wiretap { address, ear }
    }

    /// Where readers are to connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the holder is to listen.
    pub(crate) fn target(&self) -> SocketAddr {
        self.ear.target
    }

    pub(crate) fn passed_bytes(&self) -> u64 {
        self.ear.passed.load(Ordering::Relaxed)
    }

    /// Whether the sample went by in the clear.
    pub(crate) fn has_seen(&self) -> bool {
        self.ear.seen.load(Ordering::Relaxed)
    }
}

impl Ear {
    fn carry(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let mut piece = vec![0; 64 << 10];
        // What is looked at: the end of the piece before, in case the sample lies across, and this one.
        let mut heard = Vec::new();
        while let Ok(n @ 1..) = from.read(&mut piece) {
            heard.extend_from_slice(&piece[..n]);
            if heard.windows(self.sample.len()).any(|w| w == self.sample) {
                self.seen.store(true, Ordering::Relaxed);
            }
            heard.drain(..heard.len().saturating_sub(self.sample.len()));
            self.passed.fetch_add(n as u64, Ordering::Relaxed);
            if to.write_all(&piece[..n]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
