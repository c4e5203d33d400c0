//! What plain TCP can do: std's blocking sockets and large buffers, between two processes. It
//! shares no code with the transports.

use super::content::{self, PIECE_BYTES};
use super::cores::{CHUNK_BYTES, Took, hash_chunks};
use super::figures::Run;
use super::lab::{Child, Lab};
use super::machine;
use super::part::Part;
use anyhow::{Context, Result};
use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Instant;

/// What sends in place of BBR, the first that the system has and allows: as between agents, so that
/// both sides of a comparison send alike. Measured on loopback: BBR takes 0.27 CPU s/GB, Reno 0.19.
const INSTEAD_OF_BBR: [&str; 2] = ["cubic", "reno"];

/// Both ends.
#[derive(Debug)]
pub(super) struct Pair {
    sender: Child<Sender>,
    receiver: Child<Receiver>,
    bytes: u64,
    congestion: String,
}

impl Pair {
    /// To move `bytes` at a time, from and to memory of `region` bytes at each end: as much as what
    /// this is compared with has, so that caches and page tables weigh on both alike.
    pub(super) fn start(lab: &Lab, bytes: u64, region: u64) -> Result<Self> {
        let region = usize::try_from(region)?;
        let (sender, Listening { port, congestion }) = lab.start::<Sender>(&region)?;
        let (receiver, ()) = lab.start::<Receiver>(&ReceiverSetup { region, port })?;
        Ok(Pair { sender, receiver, bytes, congestion })
    }

    /// A note on how it sends.
    pub(super) fn sends_by(&self) -> String {
        format!("plain TCP is sent by congestion control '{}'", self.congestion)
    }

    pub(super) fn tcp(&mut self, connections: u16) -> Result<Run> {
        self.receive(connections, Then::Nothing)
    }

    pub(super) fn tcp_and_hash(&mut self, connections: u16) -> Result<Run> {
        self.receive(connections, Then::Hash)
    }

    /// BLAKE3 alone, by one thread, of as many bytes as the other runs move.
    pub(super) fn hash(&mut self) -> Result<Run> {
        let heard = self.receiver.ask(&ReceiverTask::Hash { bytes: self.bytes })?;
        let Took { bytes, seconds } = heard.reply;
        Ok(Run { bytes, seconds, processes: vec![heard.usage("hasher")] })
    }

    fn receive(&mut self, connections: u16, then: Then) -> Result<Run> {
        self.sender.tell(&Sending { bytes: self.bytes, connections })?;
        let received = self.receiver.ask(&ReceiverTask::Receive { bytes: self.bytes, connections, then })?;
        let sent = self.sender.hear()?;
        let Took { bytes, seconds } = received.reply;
        Ok(Run { bytes, seconds, processes: vec![sent.usage("sender"), received.usage("receiver")] })
    }
}

#[derive(Debug)]
pub(super) struct Sender {
    listener: TcpListener,
    region: Vec<u8>,
}

/// Where it is, and by which congestion control it sends.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listening {
    port: u16,
    congestion: String,
}

/// So many bytes, to so many connections together.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Sending {
    bytes: u64,
    connections: u16,
}

impl Part for Sender {
    const NAME: &'static str = "sender";
    /// Bytes of its region.
    type Setup = usize;
    type Ready = Listening;
    type Task = Sending;
    type Reply = ();

    fn set_up(region: usize) -> Result<(Self, Listening)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on loopback")?;
        let (port, congestion) = (listener.local_addr()?.port(), congestion(&listener)?);
        Ok((Sender { listener, region: content::memory(region) }, Listening { port, congestion }))
    }

    fn work(&mut self, task: Sending) -> Result<()> {
        let shares = shares(task.bytes, task.connections);
        let accept = || Ok(self.listener.accept().context("nobody connects")?.0);
        let streams = shares.iter().map(|_| accept()).collect::<Result<Vec<_>>>()?;
        let size = self.region.len().div_ceil(streams.len());
        let regions = self.region.chunks(size);
        let parts = streams.into_iter().zip(regions).zip(shares);
        machine::each(parts, |((stream, region), share)| send(&stream, region, share)).map(drop)
    }
}

/// Chooses what accepted connections send by, and names it.
fn congestion(listener: &TcpListener) -> Result<String> {
    if tcp_congestion(listener)? == "bbr" {
        // If none is allowed, it stays as it is.
        let _ = INSTEAD_OF_BBR.into_iter().any(|name| set_tcp_congestion(listener, name).is_ok());
    }
    Ok(tcp_congestion(listener)?)
}

fn send(mut stream: &TcpStream, region: &[u8], bytes: u64) -> Result<()> {
    let mut left = bytes;
    for chunk in region.chunks(CHUNK_BYTES).cycle() {
        let n = at_most(chunk.len(), left);
        stream.write_all(&chunk[..n]).context("cannot send")?;
        left -= n as u64;
        if left == 0 {
            break;
        }
    }
    Ok(())
}

#[derive(Debug)]
pub(super) struct Receiver {
    port: u16,
    region: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ReceiverSetup {
    region: usize,
    port: u16,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum ReceiverTask {
    Receive { bytes: u64, connections: u16, then: Then },
    Hash { bytes: u64 },
}

/// What becomes of a piece that was received and is still in cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Then {
    Nothing,
    Hash,
}

impl Part for Receiver {
    const NAME: &'static str = "receiver";
    type Setup = ReceiverSetup;
    type Ready = ();
    type Task = ReceiverTask;
    type Reply = Took;

    fn set_up(setup: ReceiverSetup) -> Result<(Self, ())> {
        Ok((Receiver { port: setup.port, region: content::memory(setup.region) }, ()))
    }

    fn work(&mut self, task: ReceiverTask) -> Result<Took> {
        match task {
            ReceiverTask::Receive { bytes, connections, then } => self.receive(bytes, connections, then),
            ReceiverTask::Hash { bytes } => {
                let start = Instant::now();
                let mut left = bytes;
                while left > 0 {
                    let n = at_most(self.region.len(), left);
                    hash_chunks(&self.region[..n]);
                    left -= n as u64;
                }
                Ok(Took::since(start, bytes))
            }
        }
    }
}

impl Receiver {
    fn receive(&mut self, bytes: u64, connections: u16, then: Then) -> Result<Took> {
        let start = Instant::now();
        let shares = shares(bytes, connections);
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).context("cannot connect");
        let streams = shares.iter().map(|_| connect()).collect::<Result<Vec<_>>>()?;
        let size = self.region.len().div_ceil(streams.len());
        let regions = self.region.chunks_mut(size);
        machine::each(streams.into_iter().zip(regions).zip(shares), |((stream, region), share)| {
            receive(&stream, region, share, then)
        })?;
        Ok(Took::since(start, bytes))
    }
}

fn receive(stream: &TcpStream, region: &mut [u8], bytes: u64, then: Then) -> Result<()> {
    let mut left = bytes;
    while left > 0 {
        for chunk in region.chunks_mut(CHUNK_BYTES) {
            let n = at_most(chunk.len(), left);
            receive_chunk(stream, &mut chunk[..n], then)?;
            left -= n as u64;
        }
    }
    Ok(())
}

fn receive_chunk(mut stream: &TcpStream, chunk: &mut [u8], then: Then) -> Result<()> {
    if then == Then::Nothing {
        return stream.read_exact(chunk).context("cannot receive");
    }
    let mut hasher = blake3::Hasher::new();
    for piece in chunk.chunks_mut(PIECE_BYTES) {
        stream.read_exact(piece).context("cannot receive")?;
        hasher.update(piece);
    }
    black_box(hasher.finalize());
    Ok(())
}

/// What each connection carries.
fn shares(bytes: u64, connections: u16) -> Vec<u64> {
    let n = u64::from(connections.max(1));
    (0..n).map(|i| bytes / n + u64::from(i < bytes % n)).collect()
}

fn at_most(len: usize, left: u64) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_it() {
        assert_eq!(shares(10, 1), [10]);
        assert_eq!(shares(11, 3), [4, 4, 3]);
    }
}
