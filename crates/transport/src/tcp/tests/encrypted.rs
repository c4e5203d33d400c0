//! The same over TLS, and what it keeps out.

use super::*;
use crate::conformance::identity;
use crate::limits::TLS_PIECE_BYTES;
use crate::tcp::link::Link;
use crate::tls::Tls;
use crate::{Endpoint, ReadDone};
use std::time::Instant;

const MIB: usize = 1 << 20;

fn config(identity: NodeSecret, encryption: Encryption) -> TcpConfig {
    TcpConfig { identity: Some(identity), encryption, ..TcpConfig::default() }
}

fn tls(identity: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    node(config(identity, Encryption::Tls), grants, completions)
}

/// Speaks TLS where it is demanded.
fn able(identity: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion) -> Node {
    node(config(identity, Encryption::Off), grants, completions)
}

mod one_connection {
    crate::conformance_tests!(super::tls);
}

mod four_connections {
    use super::*;
    crate::conformance_tests!(|identity, grants, completions| {
        node(TcpConfig { connections_per_peer: 4, ..config(identity, Encryption::Tls) }, grants, completions)
    });
}

fn read_between(holder: crate::conformance::Factory, reader: crate::conformance::Factory, demanded: bool) -> Outcome {
    let (holding, reading) = (Holding::start(holder, HOLDER), Reading::start(reader));
    let bytes = noise(1, MIB);
    holding.book.put(1, &bytes);
    let mut op = holding.read(1, MIB);
    if demanded {
        let demanding = |endpoint: &Endpoint| endpoint.tcp().map_or(endpoint.clone(), Endpoint::Tls);
        op.endpoints = op.endpoints.iter().map(demanding).collect();
    }
    let result = reading.outcome(&op);
    assert!(result.is_err() || content(&op.into) == bytes);
    result
}

type Outcome = Result<ReadDone, ReadError>;

fn assert_unreachable(result: &Outcome, why: &str) {
    assert!(matches!(result, Err(ReadError::Unreachable(reason)) if reason.contains(why)), "{result:?}");
}

#[test]
fn a_fleet_can_be_switched_node_by_node() {
    read_between(able, tls, false).unwrap();
    read_between(tls, able, true).unwrap();
    // Who was not told yet, or cannot.
    assert_unreachable(&read_between(tls, able, false), "none but encrypted");
    assert_unreachable(&read_between(tls, plain, false), "none but encrypted");
    assert_unreachable(&read_between(tls, plain, true), "not set up here");
    // A holder without an identity takes a TLS greeting for garbage.
    assert!(read_between(plain, tls, false).is_err());
}

#[test]
fn tls_is_refused_without_an_identity() {
    let config = TcpConfig { encryption: Encryption::Tls, ..TcpConfig::default() };
    let error = TcpTransport::start((Ipv4Addr::LOCALHOST, 0).into(), book(), |_| {}, config).unwrap_err();
    assert!(error.to_string().contains("identity"), "{error}");
}

/// Somebody between the two, with a key of its own, or in the holder's place.
#[test]
fn another_node_is_not_read_from() {
    let result = read_between(|_, grants, completions| tls(identity(66), grants, completions), tls, false);
    let (there, meant) = (identity(66).public().short(), holder().short());
    assert_unreachable(&result, &format!("node {there} is there, and not {meant}"));
}

#[test]
fn a_stolen_ticket_opens_nothing() {
    let thief =
        |_: NodeSecret, grants: Arc<dyn Grants>, completions: OnCompletion| tls(identity(66), grants, completions);
    let result = read_between(tls, thief, false);
    assert_eq!(result, Err(ReadError::Refused(Refusal::Ticket)));
}

#[test]
fn garbage_for_a_greeting_closes_its_connection_and_no_other() {
    let (holding, reading) = (Holding::start(tls, HOLDER), Reading::start(tls));
    let address = holding.node.endpoints[0].tcp().unwrap();
    for garbage in [&[0x16][..], &[0x16; 5], &[0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0, 0], &[0x16; 100_000]] {
        let mut stream = TcpStream::connect(address).unwrap();
        // It may be closed while we send.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    holding.book.put(1, &noise(1, 100));
    reading.outcome(&holding.read(1, 100)).unwrap();
}

/// Who sends a byte of its greeting now and then does not keep a place for itself.
#[test]
fn a_greeting_without_end_is_ended() {
    let config =
        TcpConfig { handshake_timeout: Duration::from_millis(200), ..config(identity(HOLDER), Encryption::Tls) };
    let transport = start(config, book(), |_| {});
    let mut stream = TcpStream::connect(transport.local_addr()).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let begun = Instant::now();
    stream.write_all(&[0x16, 3, 1, 0x40, 0]).unwrap();
    loop {
        let over = stream.write_all(&[0]).is_err() || matches!(stream.read(&mut [0; 64]), Ok(0));
        if over {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "it is still listened to");
    }
    assert_eq!(transport.stats().accepted, 0);
}

/// Pieces of any length, in either direction, with nothing lost between them.
#[test]
fn bytes_of_any_length_arrive() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let lengths = [1, 16_384, 16_385, TLS_PIECE_BYTES - 1, TLS_PIECE_BYTES, 3 * MIB + 7];
    let sending = std::thread::spawn(move || {
        let stream = Arc::new(listener.accept().unwrap().0);
        let link = Link::from_anybody(stream, &Tls::of(&identity(HOLDER)).unwrap(), deadline).unwrap();
        assert_eq!(link.peer(), Some(reader()));
        for (seed, len) in (0..).zip(lengths) {
            let span = memory(len);
            span.write(0, &noise(seed, len)).unwrap();
            link.send_before(b"header").unwrap();
            let mut done = 0;
            while done < len as u64 {
                done += link.send(&span, done, len as u64 - done).unwrap();
            }
            (&link).write_all(b"trailer").unwrap();
        }
    });
    let stream = Arc::new(TcpStream::connect(address).unwrap());
    let link = Link::to(stream, &Tls::of(&identity(0xaa)).unwrap(), holder(), deadline).unwrap();
    for (seed, len) in (0..).zip(lengths) {
        let mut got = vec![0; 6 + len + 7];
        (&link).read_exact(&mut got).unwrap();
        assert!(got.starts_with(b"header") && got.ends_with(b"trailer"));
        assert!(got[6..6 + len] == noise(seed, len), "{len} bytes came wrong");
    }
    sending.join().unwrap();
    // Cut without a goodbye, which is not the same as a whole message.
    assert!((&link).read_exact(&mut [0]).is_err());
}
