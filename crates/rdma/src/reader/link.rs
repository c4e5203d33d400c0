//! One connection to a holder: its queue pair, its side connection, and the reads that are under way on it.

use super::flight::Flight;
use super::join::Joined;
use super::peer::Queued;
use crate::error::RdmaError;
use crate::limits::{ASKED_AHEAD_MAX, FLUSH_TIMEOUT, RETRIES_MAX, STALE_ANSWER_TIMEOUT};
use crate::verbs::{QueuePair, RemoteRegion};
use crate::wire::{FRAME_BYTES, FromHolder, FromReader, Malformed};
use aquifer_core::NodeId;
use aquifer_transport::{OpId, ReadError};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: NodeId,
    pub(super) rail: usize,
    pub(super) stream: TcpStream,
    queue_pair: QueuePair,
    depth: u32,
    heard: Vec<u8>,
    to_say: Vec<u8>,
    pub(super) flights: BTreeMap<u32, Flight>,
    next_number: u32,
    /// Granted reads with pieces that no READ was posted for, in the order of the grants.
    to_post: VecDeque<u32>,
    /// READs under way on the queue pair.
    under_way: u32,
    /// When something last came: an answer, bytes, or a registration of our own.
    pub(super) progress: Instant,
    /// When the last read had landed.
    pub(super) landed: Instant,
    pub(super) ending: Option<Ending>,
    /// The side connection is gone: no more words come.
    deaf: bool,
}

/// A connection that takes no more reads, and ends when its READs have.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) why: Loss,
    until: Instant,
}

/// Why a connection cannot be used any more.
#[derive(Clone, Debug)]
pub(super) enum Loss {
    /// Nothing to do for a while: nobody's fault.
    Unneeded,
    /// This node wants it so, and its reads end with it.
    Told(&'static str),
    /// To get rid of an answer that does not come: the other reads try another connection.
    Renewed,
    /// No byte for as long as the read of this number wanted to wait.
    Stalled(u32),
    Broken(String),
}

/// A READ to be posted.
pub(super) struct Piece {
    pub(super) number: u32,
    pub(super) len: u32,
}

impl Link {
    pub(super) fn new(peer: NodeId, rail: usize, joined: Joined, now: Instant) -> Self {
        let Joined { stream, queue_pair, depth, .. } = joined;
        Link {
            peer,
            rail,
            stream,
            queue_pair,
            depth,
            heard: Vec::new(),
            to_say: Vec::new(),
            flights: BTreeMap::new(),
            next_number: 0,
            to_post: VecDeque::new(),
            under_way: 0,
            progress: now,
            landed: now,
            ending: None,
            deaf: false,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.ending.is_none() && self.flights.len() < ASKED_AHEAD_MAX
    }

    /// Asks the holder for a chunk; returns the number of the read.
    pub(super) fn ask(&mut self, read: Queued, now: Instant) -> u32 {
        self.next_number = self.next_number.wrapping_add(1);
        let number = self.next_number;
        let (chunk, lease) = (read.op.chunk, read.op.lease);
        let flight = Flight::new(read, now);
        let len = flight.len();
        if self.flights.is_empty() {
            self.progress = now;
        }
        self.flights.insert(number, flight);
        self.say(FromReader::Request { number, chunk, len, lease });
        number
    }

    pub(super) fn number_of(&self, id: OpId) -> Option<u32> {
        self.flights.iter().find(|(_, flight)| flight.id() == Some(id)).map(|(number, _)| *number)
    }

    pub(super) fn say(&mut self, words: FromReader) {
        self.to_say.extend_from_slice(&words.encode());
    }

    /// Whether words wait for room in the socket.
    pub(super) fn has_words(&self) -> bool {
        !self.to_say.is_empty() && !self.deaf
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Hands what is to be said to the socket, as far as it takes it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.has_words() {
            match (&self.stream).write(&self.to_say) {
                Ok(n) => drop(self.to_say.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.deaf = true;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Takes what the socket has; the error is how it ended.
    pub(super) fn listen(&mut self) -> io::Result<()> {
        let mut bytes = [0; 64 * FRAME_BYTES];
        loop {
            let end = match (&self.stream).read(&mut bytes) {
                Ok(0) => io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"),
                Ok(n) => {
                    self.heard.extend_from_slice(&bytes[..n]);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            self.deaf = true;
            return Err(end);
        }
    }

    /// The next whole answer that was heard.
    pub(super) fn next_answer(&mut self) -> Result<Option<FromHolder>, Malformed> {
        let Some(frame) = self.heard.first_chunk::<FRAME_BYTES>() else { return Ok(None) };
        let answer = FromHolder::decode(frame)?;
        self.heard.drain(..FRAME_BYTES);
        Ok(Some(answer))
    }

    /// The read can be posted for if it is granted and its landing place registered.
    pub(super) fn on_ready(&mut self, number: u32) {
        if self.flights.get(&number).is_some_and(Flight::can_post) {
            self.to_post.push_back(number);
        }
    }

    /// The next READ to post, if the queue pair has room for one.
    pub(super) fn next_piece(&mut self, piece_bytes: u32) -> Option<Piece> {
        if self.ending.is_some() || self.under_way >= self.depth {
            return None;
        }
        while let Some(&number) = self.to_post.front() {
            match self.flights.get(&number) {
                Some(flight) if flight.can_post() => {
                    let len = piece_bytes.max(1).min(flight.len() - flight.posted);
                    return Some(Piece { number, len });
                }
                _ => drop(self.to_post.pop_front()),
            }
        }
        None
    }

    pub(super) fn post(&mut self, id: u64, piece: &Piece) -> Result<(), RdmaError> {
        let Some(flight) = self.flights.get_mut(&piece.number) else { return Ok(()) };
        let (Some(read), Some(region), Some(grant)) = (&flight.read, &flight.region, &flight.grant) else {
            return Ok(());
        };
        let begin = u64::from(flight.posted);
        let into = read.op.into.slice(begin..begin + u64::from(piece.len));
        let into = into.map_err(|e| RdmaError::System { call: "a piece of a chunk", source: io::Error::other(e) })?;
        let from = RemoteRegion { address: grant.address + begin, len: piece.len, key: grant.key };
        self.queue_pair.read(id, region, &into, from)?;
        flight.posted += piece.len;
        flight.under_way += 1;
        self.under_way += 1;
        Ok(())
    }

    /// A READ has completed, well or not.
    pub(super) fn on_posted_ended(&mut self, id: u64, number: u32) -> Option<&mut Flight> {
        self.queue_pair.completed(id);
        self.under_way -= 1;
        let flight = self.flights.get_mut(&number)?;
        flight.under_way -= 1;
        Some(flight)
    }

    /// Takes no more reads. READs under way are stopped, but for an end by nobody's fault, when there are none.
    pub(super) fn end(&mut self, why: Loss, now: Instant) {
        if let Some(ending) = &mut self.ending {
            // What this node wants comes before what happened to it.
            if matches!(why, Loss::Told(_)) {
                ending.why = why;
            }
            return;
        }
        if let Err(error) = self.queue_pair.stop() {
            tracing::debug!("{error}");
        }
        self.ending = Some(Ending { why, until: now + FLUSH_TIMEOUT });
    }

    /// Whether an ending connection has nothing more to wait for: no READ under way, no word that
    /// decides about a read.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let Some(ending) = &self.ending else { return false };
        let wanted = |f: &Flight| f.read.is_some() && f.told && f.valid.is_none();
        let waits = !self.deaf && !matches!(ending.why, Loss::Told(_)) && self.flights.values().any(wanted);
        now >= ending.until || (self.under_way == 0 && !waits)
    }

    /// The read that has been waited for too long, if one has.
    pub(super) fn stalled(&self, now: Instant) -> Option<u32> {
        let mut waiting = self.flights.iter().filter(|(_, f)| f.read.is_some() && f.waits_for_holder());
        let (number, flight) = waiting.next()?;
        let stall = flight.read.as_ref()?.op.stall.max(Duration::from_millis(1));
        (now.duration_since(self.progress.max(flight.asked)) >= stall).then_some(*number)
    }

    /// Whether a word that nobody waits for has not come for too long.
    pub(super) fn is_stuck(&self, now: Instant) -> bool {
        let old = |since: Instant| now.duration_since(since) >= STALE_ANSWER_TIMEOUT;
        self.flights.values().any(|f| f.stale.is_some_and(old))
    }
}

/// How a read ends that was under way on a lost connection; `None` if it may try another.
pub(super) fn verdict(number: u32, flight: &Flight, read: &Queued, why: &Loss, now: Instant) -> Option<ReadError> {
    if let Some(fate) = &flight.fate {
        return Some(fate.clone());
    }
    let patient = now.duration_since(flight.asked) < read.op.stall;
    match why {
        Loss::Told(reason) => Some(ReadError::Disconnected((*reason).into())),
        Loss::Stalled(first) if *first == number || !patient => Some(ReadError::Stalled),
        Loss::Broken(reason) if read.retries >= RETRIES_MAX => Some(ReadError::Disconnected(reason.clone())),
        Loss::Stalled(_) | Loss::Broken(_) | Loss::Renewed | Loss::Unneeded => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_core::Access;
    use aquifer_memory::Mapping;
    use aquifer_transport::ReadOp;

    fn read(retries: u8) -> Queued {
        let op = ReadOp {
            id: 1,
            peer: NodeId([1; 32]),
            endpoints: Vec::new(),
            access: Access { ticket: 1, secret: [0; 32] },
            lease: 1,
            chunk: 1,
            into: Mapping::anonymous(1).expect("a byte").span(),
            adopts: false,
            stall: Duration::from_secs(5),
        };
        Queued { op, retries, node: None }
    }

    #[test]
    fn a_lost_connection_costs_a_read_one_attempt() {
        let now = Instant::now();
        let end = |retries, why: &Loss| {
            let read = read(retries);
            verdict(7, &Flight::new(read.clone(), now), &read, why, now)
        };
        let broken = Loss::Broken("cut".into());
        assert_eq!(end(0, &broken), None);
        assert_eq!(end(RETRIES_MAX, &broken), Some(ReadError::Disconnected("cut".into())));
        assert_eq!(end(0, &Loss::Told("asked to")), Some(ReadError::Disconnected("asked to".into())));
        assert_eq!(end(RETRIES_MAX, &Loss::Renewed), None);
    }

    #[test]
    fn who_waited_too_long_stalls_and_younger_reads_try_again() {
        let now = Instant::now();
        let read = read(0);
        let flight = Flight::new(read.clone(), now);
        let later = now + Duration::from_secs(6);
        assert_eq!(verdict(1, &flight, &read, &Loss::Stalled(1), now), Some(ReadError::Stalled));
        assert_eq!(verdict(2, &flight, &read, &Loss::Stalled(1), now), None);
        assert_eq!(verdict(2, &flight, &read, &Loss::Stalled(1), later), Some(ReadError::Stalled));
    }

    #[test]
    fn what_this_node_decided_comes_first() {
        let read = read(0);
        let mut flight = Flight::new(read.clone(), Instant::now());
        flight.fate = Some(ReadError::Cancelled);
        let end = verdict(1, &flight, &read, &Loss::Stalled(1), Instant::now());
        assert_eq!(end, Some(ReadError::Cancelled));
    }
}
