//! The yardstick: the simplest honest TCP tunnel over stock quinn.
//!
//! The server takes TCP connections and opens a stream to the agent for each, which begins with the
//! destination (an IPv4 address and a port, 6 bytes); the agent dials it. Nothing is asked, refused,
//! counted or logged. What costs nothing to give is the connector's: cipher, windows, socket buffers,
//! one thread a process.
//!
//! ```text
//! stock-quinn server COPY|CHUNKS MTU CERTIFICATE UDP TCP DESTINATION
//! stock-quinn agent  COPY|CHUNKS MTU CERTIFICATE UDP
//! ```
//!
//! The server writes a certificate of its own to the file CERTIFICATE, the agent trusts it.

mod relay;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite::TLS13_AES_128_GCM_SHA256, default_provider};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};

use relay::Variant;

const NAME: &str = "yardstick";
const ALPN: &[u8] = b"yardstick";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let (role, variant, mtu, certificate, udp, rest) = match arguments[..] {
        [role, variant, mtu, certificate, udp, ref rest @ ..] => {
            (role, variant, mtu, Path::new(certificate), udp, rest)
        }
        _ => bail!("arguments: server|agent copy|chunks MTU CERTIFICATE UDP [TCP DESTINATION]"),
    };
    let variant = Variant::named(variant).context("neither copy nor chunks")?;
    let (mtu, udp) = (mtu.parse()?, udp.parse()?);
    match (role, rest) {
        ("server", [tcp, destination]) => {
            let endpoint = server_endpoint(udp, certificate, mtu)?;
            serve(&endpoint, tcp.parse()?, destination.parse()?, variant).await
        }
        ("agent", []) => {
            let connection = connect(udp, certificate, mtu).await?;
            dial_all(&connection, variant).await
        }
        _ => bail!("a server takes two addresses more, an agent none"),
    }
}

/// Serves one agent; each connection to `tcp` is one to `destination` from there.
async fn serve(
    endpoint: &Endpoint,
    tcp: SocketAddr,
    destination: SocketAddrV4,
    variant: Variant,
) -> Result<()> {
    let listener = TcpListener::bind(tcp).await?;
    let agent = endpoint.accept().await.context("the endpoint is closed")?;
    let agent = agent.await?;
    let mut header = [0; 6];
    header[..4].copy_from_slice(&destination.ip().octets());
    header[4..].copy_from_slice(&destination.port().to_be_bytes());
    loop {
        let (socket, _) = listener.accept().await?;
        let agent = agent.clone();
        tokio::spawn(async move {
            socket.set_nodelay(true)?;
            let (mut send, recv) = agent.open_bi().await?;
            send.write_all(&header).await?;
            relay::both(socket, send, recv, variant).await
        });
    }
}

/// Dials the destinations that the server's streams request.
async fn dial_all(server: &Connection, variant: Variant) -> Result<()> {
    loop {
        let (send, mut recv) = server.accept_bi().await?;
        tokio::spawn(async move {
            let mut header = [0; 6];
            recv.read_exact(&mut header).await?;
            let [a, b, c, d, port @ ..] = header;
            let destination = (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes(port));
            let socket = TcpStream::connect(destination).await?;
            socket.set_nodelay(true)?;
            relay::both(socket, send, recv, variant).await
        });
    }
}

fn server_endpoint(udp: SocketAddr, certificate: &Path, mtu: u16) -> Result<Endpoint> {
    let own = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let key =
        PrivateKeyDer::try_from(own.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport(mtu)));
    let endpoint = endpoint(udp, mtu, Some(config))?;
    // Whole or not at all: the agent may be waiting for it.
    let part = certificate.with_extension("part");
    fs::write(&part, own.cert.der())?;
    fs::rename(part, certificate)?;
    Ok(endpoint)
}

async fn connect(server: SocketAddr, certificate: &Path, mtu: u16) -> Result<Connection> {
    while !certificate.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(fs::read(certificate)?))?;
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport(mtu)));
    let endpoint = endpoint((Ipv4Addr::UNSPECIFIED, 0).into(), mtu, None)?;
    Ok(endpoint.connect_with(config, server, NAME)?.await?)
}

fn endpoint(udp: SocketAddr, mtu: u16, server: Option<quinn::ServerConfig>) -> Result<Endpoint> {
    let socket = UdpSocket::bind(udp)?;
    let buffers = socket2::SockRef::from(&socket);
    buffers.set_recv_buffer_size(4 << 20)?;
    buffers.set_send_buffer_size(4 << 20)?;
    // What this side says it takes; by default no more than Ethernet's.
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(mtu.max(1472))?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(Endpoint::new(config, server, socket, runtime)?)
}

/// Returns the connector's settings; `mtu` bounds the UDP payload.
fn transport(mtu: u16) -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(mtu);
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::MAX)
        .send_window(16 << 20)
        .max_concurrent_bidi_streams(VarInt::from_u32(16_384))
        .keep_alive_interval(Some(Duration::from_secs(10)))
        .mtu_discovery_config(Some(discovery));
    transport
}

/// Returns the cipher that the connector negotiates.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256],
        ..default_provider()
    })
}
