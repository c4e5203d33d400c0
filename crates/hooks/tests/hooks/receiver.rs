//! A receiver of webhooks that answers as it is told, or does not.

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    pub(crate) at: Instant,
    /// Of the connection, from 0.
    pub(crate) connection: usize,
}

impl Request {
    pub(crate) fn id(&self) -> String {
        self.headers["webhook-id"].clone()
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Status(&'static str),
    /// A status and header lines.
    With(&'static str, String),
    /// None, until the receiver ends.
    Hang,
    /// These bytes, then the connection is closed.
    Cut(&'static str),
}

pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    requests: mpsc::Receiver<Request>,
    state: Arc<State>,
    acceptor: Option<JoinHandle<()>>,
}

struct State {
    ended: AtomicBool,
    /// Used up first; then all is well.
    script: Mutex<Vec<Answer>>,
    connections: Mutex<Vec<TcpStream>>,
}

/// An address that is taken, and where nobody listens yet.
pub(crate) struct Place(OwnedFd);

impl Place {
    pub(crate) fn new() -> Place {
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        Place(socket)
    }

    pub(crate) fn url(&self) -> String {
        let address: SocketAddr = getsockname(&self.0).unwrap().try_into().unwrap();
        format!("http://{address}/hook")
    }

    pub(crate) fn open(self) -> TcpListener {
        listen(&self.0, 64).unwrap();
        self.0.into()
    }
}

impl Receiver {
    pub(crate) fn start(script: &[Answer]) -> Receiver {
        Receiver::at(Place::new(), script)
    }

    pub(crate) fn at(place: Place, script: &[Answer]) -> Receiver {
        let listener = place.open();
        let address = listener.local_addr().unwrap();
        let script = Mutex::new(script.iter().rev().cloned().collect());
        let state = Arc::new(State { ended: AtomicBool::new(false), script, connections: Mutex::default() });
        let (sender, requests) = mpsc::channel();
        let acceptor = Some(std::thread::spawn({
            let state = state.clone();
            move || accept(&listener, &state, &sender)
        }));
        Receiver { address, requests, state, acceptor }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub(crate) fn next(&self) -> Request {
        self.requests.recv_timeout(super::PATIENCE).expect("a request")
    }

    pub(crate) fn ids(&self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.next().id()).collect()
    }

    /// Of all requests that came until now.
    pub(crate) fn rest(&self) -> Vec<String> {
        self.requests.try_iter().map(|request| request.id()).collect()
    }

    pub(crate) fn assert_no_more(&self) {
        assert!(self.requests.try_recv().is_err());
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.acceptor.take().map(JoinHandle::join);
        for connection in self.state.connections.lock().unwrap().drain(..) {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>, sender: &Sender<Request>) {
    for number in 0.. {
        let Ok((stream, _)) = listener.accept() else { return };
        if state.ended.load(Ordering::SeqCst) {
            return;
        }
        state.connections.lock().unwrap().push(stream.try_clone().unwrap());
        let (state, sender) = (state.clone(), sender.clone());
        std::thread::spawn(move || serve(&stream, number, &state, &sender));
    }
}

fn serve(stream: &TcpStream, connection: usize, state: &State, sender: &Sender<Request>) {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader, connection) {
        let answer = state.script.lock().unwrap().pop().unwrap_or(Answer::Status("200 OK"));
        let _ = sender.send(request);
        let text = match answer {
            Answer::Status(status) => format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n"),
            Answer::With(status, headers) => format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n{headers}\r\n\r\n"),
            Answer::Hang => continue,
            Answer::Cut(text) => {
                let mut stream = stream;
                let _ = stream.write_all(text.as_bytes());
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return;
            }
        };
        let mut stream = stream;
        if stream.write_all(text.as_bytes()).is_err() {
            return;
        }
    }
}

fn read(reader: &mut BufReader<&TcpStream>, connection: usize) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
    let mut headers = BTreeMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok().filter(|bytes| *bytes > 0)?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    let (line, body) = (line.trim().to_string(), String::from_utf8(body).ok()?);
    Some(Request { line, headers, body, at: Instant::now(), connection })
}
