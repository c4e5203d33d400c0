//! TLS 1.3 between two nodes that know each other by their keys: no certificate, no authority.
//!
//! Both ends show their mesh identity as a raw public key (RFC 7250), since a node's name *is* its ed25519
//! key, and prove that they have it. The reader goes on only with the node it meant to reach; the holder
//! learns who reads. Sessions are not resumed: each connection proves both ends anew.

use aquifer_core::{NodeId, NodeSecret};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, ServerConnection, SignatureScheme,
};
use std::fmt;
use std::io;
use std::sync::Arc;

/// What stands before an ed25519 key in its SubjectPublicKeyInfo, and before its seed in PKCS #8 (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// One node's side of every TLS connection it makes or takes.
#[derive(Clone)]
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    key: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
}

impl Tls {
    pub(crate) fn of(identity: &NodeSecret) -> Result<Self, Error> {
        // AES-128 first: every server CPU computes it in hardware.
        let suites = ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
        let provider = CryptoProvider {
            cipher_suites: vec![suites, ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256],
            kx_groups: vec![ring::kx_group::X25519],
            ..ring::default_provider()
        };
        let provider = Arc::new(provider);
        let pkcs8 = [&PKCS8_PREFIX[..], &identity.seed()].concat();
        let signing = provider.key_provider.load_private_key(PrivateKeyDer::Pkcs8(pkcs8.into()))?;
        let shown = CertificateDer::from([&SPKI_PREFIX[..], &identity.public().0].concat());
        let key = Arc::new(CertifiedKey::new(vec![shown], signing));
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Pinned::anybody(&provider)))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key.clone())));
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Tls { provider, key, server: Arc::new(server) })
    }

    /// The client's end of a connection to `peer` and nobody else.
    pub(crate) fn client(&self, peer: NodeId) -> Result<Connection, Error> {
        let resolver = Arc::new(AlwaysResolvesClientRawPublicKeys::new(self.key.clone()));
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned::only(peer, &self.provider)))
            .with_client_cert_resolver(resolver);
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        // Names nobody: whom to believe is settled by the key alone.
        let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
        Ok(ClientConnection::new(Arc::new(config), name)?.into())
    }

    /// The server's end of a connection; who the client is, [`peer`] knows after the handshake.
    pub(crate) fn server(&self) -> Result<Connection, Error> {
        Ok(ServerConnection::new(self.server.clone())?.into())
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// Who is at the other end, once the handshake has proved it.
pub(crate) fn peer(connection: &Connection) -> Option<NodeId> {
    match connection.peer_certificates()? {
        [key] => node_of(key).ok(),
        _ => None,
    }
}

pub(crate) fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}

fn node_of(key: &CertificateDer<'_>) -> Result<NodeId, Error> {
    let key = key.strip_prefix(&SPKI_PREFIX[..]).and_then(|key| key.try_into().ok());
    key.map(NodeId).ok_or(Error::PeerIncompatible(PeerIncompatible::IncorrectCertificateTypeExtension))
}

/// Whose key the other end may show.
#[derive(Debug)]
struct Pinned {
    /// None: anybody's, to be looked at afterwards.
    peer: Option<NodeId>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn only(peer: NodeId, provider: &CryptoProvider) -> Self {
        Pinned { peer: Some(peer), algorithms: provider.signature_verification_algorithms }
    }

    fn anybody(provider: &CryptoProvider) -> Self {
        Pinned { peer: None, algorithms: provider.signature_verification_algorithms }
    }

    fn check(&self, key: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<(), Error> {
        let found = node_of(key)?;
        match self.peer {
            _ if !more.is_empty() => Err(Error::General("it shows more than its key".into())),
            Some(wanted) if wanted != found => {
                Err(Error::General(format!("node {} is there, and not {}", found.short(), wanted.short())))
            }
            _ => Ok(()),
        }
    }

    fn verify(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }
}

/// TLS 1.2 is never offered, so that its signatures are never asked about.
fn not_spoken() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered)
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(key, more).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _key: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(not_spoken())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(key, more).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _key: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(not_spoken())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
