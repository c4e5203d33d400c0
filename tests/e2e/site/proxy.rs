//! A stretch of wire between a holder's data plane and its readers, which a test may stop in the
//! middle of a chunk, and which may lie.
//!
//! It knows the frames' lengths (see the transport's `wire` module), so that it can tell payload
//! from protocol, and nothing of what they prove.

use rustix::net::sockopt::set_socket_recv_buffer_size;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

const HANDSHAKE_BYTES: [usize; 2] = [40, 36];
const HEADER_BYTES: usize = 16;
/// Small, so that a stop is inside a chunk.
const PIECE_BYTES: u64 = 4096;
const BUFFER_BYTES: usize = 64 << 10;

pub(crate) struct Proxy {
    address: SocketAddr,
    wire: Arc<Wire>,
}

struct Wire {
    target: SocketAddr,
    valve: Mutex<Valve>,
    turned: Condvar,
}

struct Valve {
    /// Payload bytes that may still pass.
    allowed: u64,
    passed: u64,
    /// One bit of every chunk comes out wrong.
    lies: bool,
}

impl Proxy {
    /// For a holder that is to listen at [`Proxy::target`]. Lets everything pass.
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for a proxy");
        let address = listener.local_addr().expect("its address");
        let valve = Mutex::new(Valve { allowed: u64::MAX, passed: 0, lies: false });
        let wire = Arc::new(Wire { target: free_address(), valve, turned: Condvar::new() });
        let accepting = wire.clone();
        std::thread::spawn(move || {
            for reader in listener.incoming().map_while(Result::ok) {
                let wire = accepting.clone();
                // A connection that breaks is the business of those at its ends.
                std::thread::spawn(move || drop(wire.carry(&reader)));
            }
        });
        Proxy { address, wire }
    }

    /// Where readers are to connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the holder is to listen: an address of this proxy's own, so that its port is free.
    pub(crate) fn target(&self) -> SocketAddr {
        self.wire.target
    }

    /// Lets `bytes` of payload pass from now on, and then none.
    pub(crate) fn allow(&self, bytes: u64) {
        self.wire.lock().allowed = bytes;
        self.wire.turned.notify_all();
    }

    pub(crate) fn allow_all(&self) {
        self.allow(u64::MAX);
    }

    pub(crate) fn lie(&self) {
        self.wire.lock().lies = true;
    }

    /// Payload bytes that have passed.
    pub(crate) fn passed(&self) -> u64 {
        self.wire.lock().passed
    }

    /// Waits until nothing more can pass.
    pub(crate) fn until_stopped(&self) {
        super::until("the proxy has let through what it may", || (self.wire.lock().allowed == 0).then_some(()));
    }
}

impl Wire {
    fn carry(&self, reader: &TcpStream) -> io::Result<()> {
        let holder = TcpStream::connect(self.target)?;
        // What waits here has left the holder, and its file: not much may.
        set_socket_recv_buffer_size(&holder, BUFFER_BYTES)?;
        holder.set_nodelay(true)?;
        reader.set_nodelay(true)?;
        let (mut requests, mut to_holder) = (reader.try_clone()?, holder.try_clone()?);
        std::thread::spawn(move || {
            // When either side is gone, so is the other.
            let _ = io::copy(&mut requests, &mut to_holder);
            let _ = to_holder.shutdown(Shutdown::Both);
            let _ = requests.shutdown(Shutdown::Both);
        });
        let carried = self.carry_answers(&holder, reader);
        let _ = holder.shutdown(Shutdown::Both);
        let _ = reader.shutdown(Shutdown::Both);
        carried
    }

    fn carry_answers(&self, mut holder: &TcpStream, mut reader: &TcpStream) -> io::Result<()> {
        for bytes in HANDSHAKE_BYTES {
            let mut frame = vec![0; bytes];
            holder.read_exact(&mut frame)?;
            reader.write_all(&frame)?;
        }
        loop {
            let mut header = [0; HEADER_BYTES];
            holder.read_exact(&mut header)?;
            reader.write_all(&header)?;
            let has_data = header[4] == 0;
            if has_data {
                let len = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
                self.carry_payload(holder, reader, len.into())?;
            }
        }
    }

    /// Payload, and the byte that ends it.
    fn carry_payload(&self, mut holder: &TcpStream, mut reader: &TcpStream, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            let (n, lies) = self.take(left.min(PIECE_BYTES));
            let mut piece = vec![0; usize::try_from(n).expect("a short piece")];
            holder.read_exact(&mut piece)?;
            if lies && left == len {
                piece[0] ^= 1;
            }
            reader.write_all(&piece)?;
            left -= n;
        }
        let mut trailer = [0];
        holder.read_exact(&mut trailer)?;
        reader.write_all(&trailer)
    }

    /// Waits until something may pass: at most `most` bytes.
    fn take(&self, most: u64) -> (u64, bool) {
        let mut valve = self.lock();
        while valve.allowed == 0 {
            valve = self.turned.wait(valve).unwrap_or_else(PoisonError::into_inner);
        }
        let n = most.min(valve.allowed);
        if valve.allowed < u64::MAX {
            valve.allowed -= n;
        }
        valve.passed += n;
        (n, valve.lies)
    }

    fn lock(&self) -> MutexGuard<'_, Valve> {
        self.valve.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place to listen at that is nobody else's: all of 127/8 is this machine, and the address is made
/// of this process's id, so that only this process counts its ports.
pub(crate) fn free_address() -> SocketAddr {
    static NEXT_PORT: AtomicU16 = AtomicU16::new(7402);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, high | 0x80, middle, low], NEXT_PORT.fetch_add(1, Ordering::Relaxed)))
}
