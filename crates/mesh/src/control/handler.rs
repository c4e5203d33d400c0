//! One connection's side of the control protocol: one stream out, one stream in, in order.
//!
//! Runs in the connection's own task, so that encoding, decoding and slow peers cost nobody else.

use super::frame::{self, Frames, TooLong};
use crate::limits::{
    BUFFER_BYTES_KEPT, MESSAGE_BYTES_MAX, MESSAGE_OVERHEAD_BYTES, READ_BYTES, STREAM_OPEN, WRITE_BATCH_BYTES,
    WRITE_STALL,
};
use aquifer_core::PeerMessage;
use libp2p::core::upgrade::ReadyUpgrade;
use libp2p::futures::{AsyncRead, AsyncWrite};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{
    ConnectionHandler, ConnectionHandlerEvent, Stream, StreamProtocol, StreamUpgradeError, SubstreamProtocol,
};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use tokio::sync::mpsc;
use tokio::time::Sleep;

const PROTOCOL: StreamProtocol = StreamProtocol::new("/aquifer/control/1");

/// The behaviour's end of a connection's queue of messages to send.
#[derive(Debug)]
pub(super) struct Line {
    frames: mpsc::UnboundedSender<Vec<u8>>,
    queued_bytes: Arc<AtomicUsize>,
}

impl Line {
    pub(super) fn new() -> (Line, Handler) {
        let (frames, outbox) = mpsc::unbounded_channel();
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let handler = Handler {
            outbox: Outbox { frames: outbox, queued_bytes: queued_bytes.clone() },
            writer: Writer::Idle,
            reader: None,
            heard: false,
            news: VecDeque::new(),
            over: false,
        };
        (Line { frames, queued_bytes }, handler)
    }

    /// False if the connection is already gone.
    pub(super) fn push(&self, frame: Vec<u8>) -> bool {
        self.queued_bytes.fetch_add(cost(&frame), Ordering::Relaxed);
        self.frames.send(frame).is_ok()
    }

    pub(super) fn queued_bytes(&self) -> usize {
        self.queued_bytes.load(Ordering::Relaxed)
    }
}

/// What a waiting message counts for.
pub(crate) fn cost(message: &[u8]) -> usize {
    message.len() + MESSAGE_OVERHEAD_BYTES
}

/// What the behaviour hears from a connection. After the last three the handler is silent.
#[derive(Debug)]
pub(crate) enum News {
    /// The peer opened its control stream.
    Opened,
    Message(PeerMessage),
    Malformed(String),
    Broken(String),
    Ended,
}

pub(crate) struct Handler {
    outbox: Outbox,
    writer: Writer,
    reader: Option<Reader>,
    /// A control stream came in, now or earlier.
    heard: bool,
    news: VecDeque<News>,
    over: bool,
}

struct Outbox {
    frames: mpsc::UnboundedReceiver<Vec<u8>>,
    queued_bytes: Arc<AtomicUsize>,
}

enum Writer {
    Idle,
    /// The stream is being opened for this first message.
    Opening(Vec<u8>),
    Open(Box<Sending>),
}

type Event = ConnectionHandlerEvent<ReadyUpgrade<StreamProtocol>, (), News>;

impl Handler {
    fn poll_writer(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        match &mut self.writer {
            Writer::Idle => {
                let Some(first) = ready!(self.outbox.frames.poll_recv(cx)) else { return Poll::Pending };
                self.writer = Writer::Opening(first);
                let protocol = SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ()).with_timeout(STREAM_OPEN);
                Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol })
            }
            Writer::Opening(_) => Poll::Pending,
            Writer::Open(sending) => {
                let reason = ready!(sending.poll(cx, &mut self.outbox));
                Poll::Ready(self.last(News::Broken(reason)))
            }
        }
    }

    fn poll_reader(&mut self, cx: &mut Context<'_>) -> Poll<News> {
        let Some(reader) = &mut self.reader else { return Poll::Pending };
        reader.poll(cx)
    }

    /// Says `news`, and nothing more.
    fn last(&mut self, news: News) -> Event {
        self.over = true;
        self.reader = None;
        self.writer = Writer::Idle;
        self.outbox.frames.close();
        ConnectionHandlerEvent::NotifyBehaviour(news)
    }

    fn on_inbound(&mut self, stream: Stream) {
        let news = match self.heard {
            false => {
                self.reader = Some(Reader::new(stream));
                News::Opened
            }
            true => News::Malformed("opened a second control stream on one connection".to_string()),
        };
        self.heard = true;
        self.news.push_back(news);
    }

    fn on_outbound(&mut self, stream: Stream) {
        if let Writer::Opening(first) = std::mem::replace(&mut self.writer, Writer::Idle) {
            self.writer = Writer::Open(Box::new(Sending::new(stream, &first)));
        }
    }

    fn on_no_outbound(&mut self, error: StreamUpgradeError<Infallible>) {
        let news = match error {
            StreamUpgradeError::NegotiationFailed => News::Malformed(format!(
                "does not speak {PROTOCOL}: the two ends need releases of Aquifer that understand each other"
            )),
            StreamUpgradeError::Timeout => {
                News::Broken(format!("did not accept a control stream within {} s", STREAM_OPEN.as_secs()))
            }
            StreamUpgradeError::Io(error) => News::Broken(format!("opening the control stream: {error}")),
            StreamUpgradeError::Apply(never) => match never {},
        };
        self.news.push_back(news);
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = News;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ()).with_timeout(STREAM_OPEN)
    }

    fn connection_keep_alive(&self) -> bool {
        true
    }

    fn on_behaviour_event(&mut self, never: Infallible) {
        match never {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.over {
            return Poll::Pending;
        }
        if let Some(news) = self.news.pop_front() {
            return Poll::Ready(match news {
                News::Malformed(_) | News::Broken(_) | News::Ended => self.last(news),
                News::Opened | News::Message(_) => ConnectionHandlerEvent::NotifyBehaviour(news),
            });
        }
        if let Poll::Ready(event) = self.poll_writer(cx) {
            return Poll::Ready(event);
        }
        let news = ready!(self.poll_reader(cx));
        Poll::Ready(match news {
            News::Malformed(_) | News::Broken(_) | News::Ended => self.last(news),
            News::Opened | News::Message(_) => ConnectionHandlerEvent::NotifyBehaviour(news),
        })
    }

    /// Hands over what had arrived before the connection ended: a peer's last words often come in
    /// the same packet as the end.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Option<News>> {
        if self.over {
            return Poll::Ready(None);
        }
        match self.poll_reader(cx) {
            Poll::Ready(News::Message(message)) => Poll::Ready(Some(News::Message(message))),
            Poll::Ready(_) | Poll::Pending => {
                self.over = true;
                Poll::Ready(None)
            }
        }
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "libp2p may add events; those we do not know change nothing here"
    )]
    fn on_connection_event(&mut self, event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => {
                self.on_inbound(protocol);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, .. }) => {
                self.on_outbound(protocol);
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => self.on_no_outbound(error),
            _ => {}
        }
    }
}

/// The stream out: frames put together into a buffer, the buffer written.
struct Sending {
    stream: Stream,
    buffer: Vec<u8>,
    written: usize,
    /// What the frames in the buffer counted for while they waited.
    cost: usize,
    unflushed: bool,
    stall: Option<Pin<Box<Sleep>>>,
}

impl Sending {
    fn new(stream: Stream, first: &[u8]) -> Self {
        let mut sending = Sending { stream, buffer: Vec::new(), written: 0, cost: 0, unflushed: false, stall: None };
        sending.take(first);
        sending
    }

    fn take(&mut self, message: &[u8]) {
        frame::put(&mut self.buffer, message);
        self.cost += cost(message);
    }

    /// Ready with the reason when no more can be sent.
    fn poll(&mut self, cx: &mut Context<'_>, outbox: &mut Outbox) -> Poll<String> {
        loop {
            if self.written < self.buffer.len() {
                match Pin::new(&mut self.stream).poll_write(cx, &self.buffer[self.written..]) {
                    Poll::Ready(Ok(0)) => return Poll::Ready("the control stream takes no more bytes".to_string()),
                    Poll::Ready(Ok(count)) => {
                        self.written += count;
                        self.unflushed = true;
                        self.stall = None;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(format!("writing the control stream: {error}")),
                    Poll::Pending => return self.poll_stall(cx),
                }
            } else if self.refill(cx, outbox) {
                continue;
            } else if self.unflushed {
                match Pin::new(&mut self.stream).poll_flush(cx) {
                    Poll::Ready(Ok(())) => self.unflushed = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(format!("writing the control stream: {error}")),
                    Poll::Pending => return self.poll_stall(cx),
                }
            } else {
                return Poll::Pending;
            }
        }
    }

    /// Puts the next waiting messages in the buffer; false if there are none.
    fn refill(&mut self, cx: &mut Context<'_>, outbox: &mut Outbox) -> bool {
        outbox.queued_bytes.fetch_sub(self.cost, Ordering::Relaxed);
        (self.cost, self.written) = (0, 0);
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER_BYTES_KEPT);
        while self.buffer.len() < WRITE_BATCH_BYTES {
            match outbox.frames.poll_recv(cx) {
                Poll::Ready(Some(message)) => self.take(&message),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        !self.buffer.is_empty()
    }

    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        let stall = self.stall.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_STALL)));
        ready!(stall.as_mut().poll(cx));
        Poll::Ready(format!("took nothing we sent for {} s", WRITE_STALL.as_secs()))
    }
}

/// The stream in.
struct Reader {
    stream: Stream,
    frames: Frames,
    chunk: Box<[u8]>,
}

impl Reader {
    fn new(stream: Stream) -> Self {
        Reader { stream, frames: Frames::default(), chunk: vec![0; READ_BYTES].into_boxed_slice() }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<News> {
        loop {
            match self.frames.next() {
                Ok(Some(body)) => {
                    return Poll::Ready(match PeerMessage::decode(body) {
                        Ok(message) => News::Message(message),
                        Err(error) => News::Malformed(error.to_string()),
                    });
                }
                Ok(None) => {}
                Err(TooLong(length)) => {
                    let reason = format!("a message of {length} bytes; the limit is {MESSAGE_BYTES_MAX}");
                    return Poll::Ready(News::Malformed(reason));
                }
            }
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut self.chunk)) {
                Ok(0) => return Poll::Ready(News::Ended),
                Ok(count) => self.frames.push(&self.chunk[..count]),
                Err(error) => return Poll::Ready(News::Broken(format!("reading the control stream: {error}"))),
            }
        }
    }
}
