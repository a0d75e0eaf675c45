//! The other end, in hostile hands: QUIC with any certificate, and nothing of the connector's own
//! behaviour. Part of the program `lab-hostile` and of the tests beside it.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, ConnectionError, Endpoint, EndpointConfig, TokioRuntime, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use tokio::runtime::Handle;
use tunnel_proto::control::VERSION;
use tunnel_proto::route::Claim;
use tunnel_proto::session::{AgentSession, Hello, InstanceId, Timers};

/// Protocol name of the connector's two ends.
pub(crate) const ALPN: &[u8] = b"cpc/1";

/// A certificate and its key, as `cpc pki` writes them.
#[derive(Debug)]
pub(crate) struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Credentials {
    /// Reads `ROLE.crt` and `ROLE.key` in `folder`.
    pub(crate) fn read(folder: &Path, role: &str) -> Result<Self> {
        let path = folder.join(role);
        let chain = CertificateDer::pem_file_iter(path.with_extension("crt"))?;
        Ok(Self {
            chain: chain.collect::<Result<_, _>>()?,
            key: PrivateKeyDer::from_pem_file(path.with_extension("key"))?,
        })
    }
}

/// Opens a socket for an agent, in the namespace of the caller.
pub(crate) fn any_port() -> Result<UdpSocket> {
    Ok(UdpSocket::bind("0.0.0.0:0")?)
}

/// Returns TLS of a client that accepts every server, with these credentials or none.
pub(crate) fn client_tls(
    credentials: Option<&Credentials>,
    alpn: &[u8],
) -> Result<rustls::ClientConfig> {
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider())));
    let mut tls = match credentials {
        Some(it) => tls.with_client_auth_cert(it.chain.clone(), it.key.clone_key())?,
        None => tls.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    Ok(tls)
}

/// Returns an endpoint that dials servers from `socket` and accepts every server. `dials` is the
/// number of streams that a server may open.
pub(crate) fn agent(
    runtime: &Handle,
    socket: UdpSocket,
    credentials: Option<&Credentials>,
    dials: u32,
) -> Result<Endpoint> {
    let tls = client_tls(credentials, ALPN)?;
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(dials.into())
        .keep_alive_interval(Some(Duration::from_secs(1)));
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    let mut endpoint = open(runtime, socket, None)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// Returns an endpoint that listens on `socket` with these credentials and accepts every agent.
/// `streams` is the number of streams that an agent may open.
pub(crate) fn server(
    runtime: &Handle,
    socket: UdpSocket,
    credentials: &Credentials,
    streams: u32,
) -> Result<Endpoint> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Gullible(provider())))
        .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(streams.into())
        .keep_alive_interval(Some(Duration::from_secs(1)));
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    open(runtime, socket, Some(config))
}

fn open(
    runtime: &Handle,
    socket: UdpSocket,
    server: Option<quinn::ServerConfig>,
) -> Result<Endpoint> {
    let _entered = runtime.enter();
    let config = EndpointConfig::default();
    Ok(Endpoint::new(
        config,
        server,
        socket,
        Arc::new(TokioRuntime),
    )?)
}

/// Dials `server`. That the handshake has ended here does not mean that the server is content: it
/// judges a certificate after that.
pub(crate) async fn dial(endpoint: &Endpoint, server: SocketAddr) -> Result<Connection> {
    Ok(endpoint.connect(server, "cpc.invalid")?.await?)
}

/// Waits until the connector ends the connection, and gives the reason that it sent along.
pub(crate) async fn ended_by_peer(
    connection: &Connection,
    limit: Duration,
) -> Result<(VarInt, String)> {
    let ended = tokio::time::timeout(limit, connection.closed()).await;
    let text = |reason: &Bytes| String::from_utf8_lossy(reason).into_owned();
    match ended.context("the connector kept the connection")? {
        ConnectionError::ApplicationClosed(close) => Ok((close.error_code, text(&close.reason))),
        ConnectionError::ConnectionClosed(close) => bail!("ended by QUIC: {close}"),
        other => bail!("ended, but not by the connector: {other}"),
    }
}

/// Returns the Hello of an honest agent of that name, with an offer of `addresses`.
pub(crate) fn introduction(name: &str, addresses: &[IpAddr]) -> Result<Bytes> {
    let hello = Hello {
        version: VERSION,
        agent_id: name.into(),
        instance_id: InstanceId([7; 16]),
        node: name.into(),
        software_version: "0".into(),
        features: Vec::new(),
        offer: addresses.iter().copied().map(Claim::Address).collect(),
        predecessor: None,
        incarnation: 0,
    };
    let mut session = AgentSession::new(hello, Timers::default(), Instant::now())?;
    session.poll_transmit().context("an agent says nothing")
}

/// Believes everybody.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Gullible {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
