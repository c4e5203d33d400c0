//! A few bytes there and back over plain TCP, on threads of their own: what a message takes at
//! least, as the machine is at that moment.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// About a control message.
const MESSAGE_BYTES: usize = 64;

/// Answers one connection until it ends. Returns the port.
pub(super) fn answer() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on loopback")?;
    let port = listener.local_addr()?.port();
    let answer = move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut message = [0; MESSAGE_BYTES];
        loop {
            stream.read_exact(&mut message)?;
            stream.write_all(&message)?;
        }
    };
    // It ends with an error when the other side goes.
    std::thread::Builder::new().name("bench-echo".into()).spawn(answer).context("cannot start a thread")?;
    Ok(port)
}

/// The asking side.
#[derive(Debug)]
pub(super) struct Echo(TcpStream);

impl Echo {
    pub(super) fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).context("cannot connect")?;
        stream.set_nodelay(true)?;
        Ok(Echo(stream))
    }

    /// Asks every `interval` until `ended`; returns round trips in ms, each from when it was due.
    pub(super) fn ask_until(&mut self, interval: Duration, ended: &AtomicBool) -> Result<Vec<f64>> {
        let mut message = [0; MESSAGE_BYTES];
        let (mut due, mut round_trips) = (Instant::now(), Vec::new());
        while !ended.load(Ordering::Relaxed) {
            self.0.write_all(&message).and_then(|()| self.0.read_exact(&mut message)).context("no echo comes")?;
            round_trips.push(due.elapsed().as_secs_f64() * 1e3);
            due += interval;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(round_trips)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_comes_back() {
        let mut echo = Echo::connect(answer().unwrap()).unwrap();
        let ended = AtomicBool::new(false);
        let round_trips = std::thread::scope(|scope| {
            let asked = scope.spawn(|| echo.ask_until(Duration::from_millis(1), &ended));
            std::thread::sleep(Duration::from_millis(10));
            ended.store(true, Ordering::Relaxed);
            asked.join().unwrap().unwrap()
        });
        assert!(!round_trips.is_empty() && round_trips.iter().all(|ms| *ms > 0.0), "{round_trips:?}");
    }
}
