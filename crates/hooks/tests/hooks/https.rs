//! Receivers behind TLS: believed if the system trusts who vouches for them, and only then.

use super::{PATIENCE, event, finish, quick, until};
use aquifer_hooks::{Hook, Hooks, Limits, StartError};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;

/// Runs one of the tests below in a process that trusts the certificates of `file` alone.
fn run(test: &str, file: &str, url: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env_remove("SSL_CERT_DIR")
        .env("SSL_CERT_FILE", file)
        .env("HOOKS_HTTPS_URL", url)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_receiver_is_believed_if_the_system_trusts_its_certificate() {
    let [ours, other] = [(); 2].map(|()| rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, pem: String| {
        let path = dir.path().join(name);
        fs::write(&path, pem).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (trusted, untrusted) = (file("ours.pem", ours.cert.pem()), file("other.pem", other.cert.pem()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://localhost:{}/hook", listener.local_addr().unwrap().port());
    let key = PrivateKeyDer::Pkcs8(ours.key_pair.serialize_der().into());
    let certificate = ours.cert.der().clone();
    std::thread::spawn(move || serve(&listener, certificate, key));

    run("https::delivers", &trusted, &url);
    run("https::does_not_deliver", &untrusted, &url);
    run("https::does_not_start", &file("none.pem", String::new()), &url);
}

/// Answers each request with 200.
fn serve(listener: &TcpListener, certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(builder.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap());
    for stream in listener.incoming() {
        let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream.unwrap());
        let (mut request, mut buffer) = (String::new(), [0; 4096]);
        while !request.ends_with(&event(1).body) {
            let Ok(bytes @ 1..) = stream.read(&mut buffer) else { break };
            request += std::str::from_utf8(&buffer[..bytes]).unwrap();
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        let _ = stream.flush();
    }
}

fn hook() -> Option<Hook> {
    Some(Hook::webhook(&std::env::var("HOOKS_HTTPS_URL").ok()?, None).unwrap())
}

/// Not a test of its own, as those below: see [`run`].
#[test]
fn delivers() {
    let Some(hook) = hook() else { return };
    let hooks = Hooks::start_with(vec![hook], None, &quick()).unwrap();
    hooks.send(event(1));
    until("delivered", || hooks.stats()[0].delivered == 1);
    assert_eq!(hooks.stats()[0].failed, 0);
    finish(hooks);
}

#[test]
fn does_not_deliver() {
    let Some(hook) = hook() else { return };
    let limits = Limits { retry_first: PATIENCE, retry_last: PATIENCE, ..quick() };
    let hooks = Hooks::start_with(vec![hook], None, &limits).unwrap();
    hooks.send(event(1));
    until("it failed", || hooks.stats()[0].failed == 1);
    let error = hooks.stats()[0].last_error.clone().unwrap();
    assert!(error.contains("certificate"), "{error}");
    eprintln!("{error}");
}

#[test]
fn does_not_start() {
    let Some(hook) = hook() else { return };
    let error = Hooks::start(vec![hook], None).unwrap_err();
    assert!(matches!(error, StartError::NoRoots { .. }), "{error}");
    assert!(error.to_string().contains("install ca-certificates"), "{error}");
}
