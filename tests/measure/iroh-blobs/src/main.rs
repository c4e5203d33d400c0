//! An end of iroh-blobs for `tests/measure/peers.py`, which runs one to hold and one to pull.
//!
//!     iroh-blobs-peer SIZE WINDOW hold|pull
//!
//! Obeys JSON lines on standard input and answers each with one, like the workers of `peers.py`. The blob goes over
//! one QUIC connection to a loopback address, from one in-memory store to another: no relay, no discovery. It is
//! verified as it arrives (bao), so a transfer that ends well is a verified one.

use std::net::Ipv4Addr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use iroh::endpoint::{Connection, QuicTransportConfig, VarInt, presets};
use iroh::protocol::Router;
use iroh::{Endpoint, EndpointAddr};
use iroh_blobs::api::blobs::BlobStatus;
use iroh_blobs::store::mem::MemStore;
use iroh_blobs::ticket::BlobTicket;
use iroh_blobs::{ALPN, BlobFormat, BlobsProtocol};
use rand::Rng;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};

/// The bytes that are random; each repetition of them differs in its first eight.
const TILE_BYTES: usize = 4 << 20;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [size, window, role] = arguments.as_slice() else {
        bail!("three arguments: how many bytes, the window in bytes, and hold or pull");
    };
    let endpoint = endpoint(window.parse().context("the window in bytes")?).await?;
    let orders = BufReader::new(tokio::io::stdin()).lines();
    match role.as_str() {
        "hold" => hold(endpoint, size.parse().context("how many bytes")?, orders).await,
        "pull" => pull(endpoint, orders).await,
        other => bail!("{other} is neither hold nor pull"),
    }
}

/// An endpoint on a loopback port, which has up to `window` bytes of a stream under way. Datagrams are of up to 1452
/// bytes, iroh's default: it has no option for endpoints to take more than 1472.
async fn endpoint(window: u32) -> Result<Endpoint> {
    let transport = QuicTransportConfig::builder()
        .stream_receive_window(VarInt::from_u32(window))
        .send_window(window.into())
        .build();
    let builder = Endpoint::builder(presets::Minimal).clear_ip_transports().transport_config(transport);
    Ok(builder.bind_addr((Ipv4Addr::LOCALHOST, 0))?.bind().await?)
}

/// Serves a blob of `size` bytes until standard input ends.
async fn hold(endpoint: Endpoint, size: usize, mut orders: Lines<BufReader<Stdin>>) -> Result<()> {
    let store = MemStore::new();
    let blob = store.add_bytes(content(size)).temp_tag().await?;
    let loopback = endpoint.bound_sockets().into_iter().next().context("the endpoint has no socket")?;
    let address = EndpointAddr::new(endpoint.id()).with_ip_addr(loopback);
    let router = Router::builder(endpoint).accept(ALPN, BlobsProtocol::new(&store, None)).spawn();
    answer(&json!({ "ticket": BlobTicket::new(address, blob.hash(), BlobFormat::Raw).to_string() }));
    while let Some(order) = next(&mut orders).await? {
        match order["do"].as_str() {
            Some("usage") => answer(&usage()),
            other => bail!("a holder does not know {other:?}"),
        }
    }
    Ok(router.shutdown().await?)
}

/// Downloads what it is told to until standard input ends.
async fn pull(endpoint: Endpoint, mut orders: Lines<BufReader<Stdin>>) -> Result<()> {
    answer(&json!({}));
    let mut ticket = None;
    let mut ready = None;
    while let Some(order) = next(&mut orders).await? {
        match order["do"].as_str() {
            Some("prepare") => {
                ticket = Some(order["other"]["ticket"].as_str().context("no ticket")?.parse::<BlobTicket>()?);
                answer(&json!({}));
            }
            Some("spoil") => {
                let ticket = ticket.as_ref().context("not prepared")?;
                forget(ready.take()).await?;
                ready = Some((endpoint.connect(ticket.addr().clone(), ALPN).await?, MemStore::new()));
                answer(&json!({}));
            }
            Some("move") => {
                let ticket = ticket.as_ref().context("not prepared")?;
                let (connection, store) = ready.as_ref().context("nothing was spoiled")?;
                answer(&download(ticket, connection, store).await?);
            }
            Some("usage") => answer(&usage()),
            other => bail!("a puller does not know {other:?}"),
        }
    }
    forget(ready).await?;
    endpoint.close().await;
    Ok(())
}

/// Frees what the last download stored, so that the next one's memory does not come on top of it.
async fn forget(last: Option<(Connection, MemStore)>) -> Result<()> {
    if let Some((connection, store)) = last {
        connection.close(0u32.into(), b"done");
        store.shutdown().await?;
    }
    Ok(())
}

/// The seconds that the download took, and the bytes of it that the store then has.
async fn download(ticket: &BlobTicket, connection: &Connection, store: &MemStore) -> Result<Value> {
    let begun = Instant::now();
    let stats = store.remote().fetch(connection.clone(), ticket.hash_and_format()).complete().await?;
    let seconds = begun.elapsed().as_secs_f64();
    let BlobStatus::Complete { size } = store.blobs().status(ticket.hash()).await? else {
        bail!("the download ended without its blob");
    };
    ensure!(stats.payload_bytes_read == size, "{} bytes of {size} were downloaded", stats.payload_bytes_read);
    Ok(json!({ "seconds": seconds, "bytes": size }))
}

/// `size` bytes of which no two chunks are the same.
fn content(size: usize) -> Vec<u8> {
    let mut tile = vec![0; TILE_BYTES];
    rand::rng().fill_bytes(&mut tile);
    let mut bytes = Vec::with_capacity(size);
    for n in 0u64.. {
        let missing = size - bytes.len();
        if missing == 0 {
            break;
        }
        tile[..8].copy_from_slice(&n.to_le_bytes());
        bytes.extend_from_slice(&tile[..missing.min(TILE_BYTES)]);
    }
    bytes
}

/// The next order, or `None` where there is none to come.
async fn next(orders: &mut Lines<BufReader<Stdin>>) -> Result<Option<Value>> {
    let Some(line) = orders.next_line().await? else {
        return Ok(None);
    };
    Ok(Some(serde_json::from_str(&line)?))
}

/// The CPU seconds of all threads since the process began, in the program and in the kernel for it.
fn usage() -> Value {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    json!({ "cpu_s": spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9 })
}

fn answer(what: &Value) {
    println!("{what}");
}
