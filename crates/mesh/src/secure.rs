//! From a TCP connection to an authenticated one: mesh key, greeting, Noise, Yamux.
//!
//! The greeting is what the usual stack lacks. With different mesh keys both ends of a libp2p
//! connection read noise and guess, or wait for a time-out; here each side's first sixteen bytes
//! under the key are fixed, so that a wrong key is known for what it is after one round trip.
//! They also carry the version of everything below the control protocol, which is why nothing
//! further is negotiated.

use crate::key::MeshKey;
use crate::limits::{CLOSE, CONNECT, GREET, HANDSHAKE, STREAMS_PER_CONNECTION_MAX};
use libp2p::core::Transport;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerBox, StreamMuxerEvent};
use libp2p::core::transport::Boxed;
use libp2p::core::transport::timeout::{TransportTimeout, TransportTimeoutError};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::identity::Keypair;
use libp2p::pnet::{PnetConfig, PnetError, PnetOutput, PreSharedKey};
use libp2p::{PeerId, noise, tcp, yamux};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use thiserror::Error;
use tokio::time::{Sleep, timeout};

/// First bytes under the mesh key. They differ by side so that an echo is no answer.
const GREETING_OF_DIALER: &[u8; 16] = b"aquifer/mesh/1 d";
const GREETING_OF_LISTENER: &[u8; 16] = b"aquifer/mesh/1 l";

/// Why there is no connection, in words for the person who configured the address.
#[derive(Debug, Error)]
pub(crate) enum Fault {
    #[error("{}", connect_words(.0))]
    Connect(io::Error),
    #[error("no answer within {} s", CONNECT.as_secs())]
    ConnectTimeout,
    #[error("hung up before it said anything: it is overloaded, or no Aquifer agent")]
    HungUp,
    #[error("answered, but said nothing for {} s: it is overloaded, or no Aquifer agent", GREET.as_secs())]
    Silent,
    #[error(
        "answered, but the connection could not be secured: most likely its mesh key is not ours (ours has fingerprint {ours})"
    )]
    Key { ours: String },
    #[error("answered with our mesh key, but the handshake failed: {0}")]
    Handshake(String),
}

fn connect_words(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::ConnectionRefused {
        return "connection refused: nothing listens there".to_string();
    }
    error.to_string()
}

pub(crate) fn transport(identity: &Keypair, key: &MeshKey) -> Result<Boxed<(PeerId, StreamMuxerBox)>, noise::Error> {
    let layers = Layers { noise: noise::Config::new(identity)?, key: key.clone() };
    let sockets = tcp::tokio::Transport::new(tcp::Config::default());
    let transport = TransportTimeout::with_outgoing_timeout(sockets, CONNECT)
        .map_err(|error| match error {
            TransportTimeoutError::Timeout => Fault::ConnectTimeout,
            TransportTimeoutError::TimerError(error) | TransportTimeoutError::Other(error) => Fault::Connect(error),
        })
        .and_then(move |socket, point| layers.apply(socket, point.is_dialer()))
        .map_err(|error| error.into_inner());
    Ok(transport.boxed())
}

#[derive(Clone)]
struct Layers {
    noise: noise::Config,
    key: MeshKey,
}

impl Layers {
    async fn apply<S>(self, socket: S, dialer: bool) -> Result<(PeerId, StreamMuxerBox), Fault>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let greeted = timeout(GREET, greet(self.key, socket, dialer)).await.map_err(|_| Fault::Silent)??;
        let secured = timeout(HANDSHAKE, async {
            match dialer {
                true => self.noise.upgrade_outbound(greeted, "/noise").await,
                false => self.noise.upgrade_inbound(greeted, "/noise").await,
            }
        });
        let too_slow = |_| Fault::Handshake(format!("not done after {} s", HANDSHAKE.as_secs()));
        let (peer, secured) = secured.await.map_err(too_slow)?.map_err(|e| Fault::Handshake(e.to_string()))?;
        let mut config = yamux::Config::default();
        config.set_max_num_streams(STREAMS_PER_CONNECTION_MAX);
        let muxer = match dialer {
            true => config.upgrade_outbound(secured, "/yamux/1.0.0").await,
            false => config.upgrade_inbound(secured, "/yamux/1.0.0").await,
        };
        let muxer = muxer.map_err(|e| Fault::Handshake(e.to_string()))?;
        Ok((peer, StreamMuxerBox::new(Closing { muxer, patience: None })))
    }
}

/// The socket under the mesh key, if the other side has the same.
async fn greet<S>(key: MeshKey, socket: S, dialer: bool) -> Result<PnetOutput<S>, Fault>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (ours, theirs) = match dialer {
        true => (GREETING_OF_DIALER, GREETING_OF_LISTENER),
        false => (GREETING_OF_LISTENER, GREETING_OF_DIALER),
    };
    let hung_up = |_: io::Error| Fault::HungUp;
    let shared = PreSharedKey::new(key.bytes());
    let mut socket = PnetConfig::new(shared).handshake(socket).await.map_err(|error| match error {
        PnetError::HandshakeError(error) | PnetError::IoError(error) => hung_up(error),
    })?;
    socket.write_all(ours).await.map_err(hung_up)?;
    socket.flush().await.map_err(hung_up)?;
    let mut heard = [0; 16];
    socket.read_exact(&mut heard).await.map_err(hung_up)?;
    match heard == *theirs {
        true => Ok(socket),
        false => Err(Fault::Key { ours: key.fingerprint() }),
    }
}

/// A muxer that does not wait for ever to close: a peer that stopped reading would otherwise keep
/// the socket.
struct Closing<M> {
    muxer: M,
    patience: Option<Pin<Box<Sleep>>>,
}

impl<M: StreamMuxer + Unpin> Closing<M> {
    fn inner(self: Pin<&mut Self>) -> Pin<&mut M> {
        Pin::new(&mut self.get_mut().muxer)
    }
}

impl<M: StreamMuxer + Unpin> StreamMuxer for Closing<M> {
    type Substream = M::Substream;
    type Error = M::Error;

    fn poll_inbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
        self.inner().poll_inbound(cx)
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
        self.inner().poll_outbound(cx)
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        self.inner().poll(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(CLOSE)));
        if patience.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.inner().poll_close(cx)
    }
}

/// Our own account of a failed connection, if it is one.
pub(crate) fn fault_of(error: &io::Error) -> Option<&Fault> {
    error.get_ref()?.downcast_ref()
}
