//! QUIC endpoints, configured once for all.
//!
//! A server gives an agent one bidirectional stream, its control stream, and nothing else: agents
//! can open nothing towards the control plane. An agent gives the server [`MAX_DIALS`].

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, IdleTimeout, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
};

use super::connection_id::Generator;
use super::secret::Secret;
use super::socket;
use crate::tls::{ALPN, Material, Role, provider};

/// Connections that a server may hold open over one tunnel at once.
pub const MAX_DIALS: u32 = 8192;

/// Bytes that the far side may send on one stream before they are read: what a stopped reader can
/// cost. Above the bandwidth-delay product of 1 Gbit/s at 8 ms.
pub const STREAM_WINDOW: u32 = 1 << 20;

/// Bytes of memory that a stream may cost whose reader has stopped: up to 2.6 times its window was
/// measured (`cargo nextest run --test stalled --no-capture` prints it); quinn's assembler allows
/// it, since it joins chunks only once they take that much more than they hold.
pub const STREAM_HELD: u32 = STREAM_WINDOW / 2 * 5;

/// Bytes sent and not yet acknowledged on one tunnel.
const SEND_WINDOW: u64 = 16 << 20;

/// A tunnel without a sign of life for so long is over, with all its streams.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Packets of a handshake are sent again after three times this: servers come back in seconds.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Handshakes that may be waiting to be accepted; further ones are refused.
const MAX_INCOMING: usize = 1024;

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket can't be used.
    #[error("UDP socket: {0}")]
    Socket(io::Error),
    /// rustls refuses the configuration.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// rustls has no cipher suite for QUIC's first packets.
    #[error("TLS: {0}")]
    Cipher(#[from] NoInitialCipherSuite),
}

/// An endpoint, and what is wrong with the host for the job.
#[derive(Debug)]
pub struct Opened {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Complaints with their remedies.
    pub complaints: Vec<String>,
}

/// Opens a server's endpoint for one shard on the running runtime, over a bound socket.
///
/// # Errors
/// [`EndpointError`].
pub fn server(
    udp: UdpSocket,
    material: &Arc<Material>,
    secret: &Secret,
    shard: u8,
) -> Result<Opened, EndpointError> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(material.verifier(Role::Agent))
        .with_cert_resolver(material.clone());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would skip the check of a certificate that may have been replaced.
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;

    let mut transport = transport();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(1));
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    config.token_key(Arc::new(secret.token_key()));
    config.max_incoming(MAX_INCOMING);

    let ids = Generator::new(secret.connection_id_key(), &material.identity().name, shard);
    let mut endpoint = EndpointConfig::new(Arc::new(secret.reset_key()));
    endpoint.cid_generator(move || Box::new(ids.clone()));
    open(udp, endpoint, Some(config))
}

/// Opens an agent's endpoint for one tunnel, on a source port of its own: behind a virtual address
/// each tunnel may then reach another server.
///
/// # Errors
/// [`EndpointError`].
pub fn client(server: SocketAddr, material: &Arc<Material>) -> Result<Opened, EndpointError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        // Stricter than the default: by identity and role (see `tls::verify`).
        .with_custom_certificate_verifier(material.verifier(Role::Server))
        .with_client_cert_resolver(material.clone());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();

    let mut transport = transport();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(MAX_DIALS));
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));

    let any = match server {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let udp = socket::bind(any).map_err(EndpointError::Socket)?;
    let mut opened = open(udp, EndpointConfig::default(), None)?;
    opened.endpoint.set_default_client_config(config);
    Ok(opened)
}

fn open(
    udp: UdpSocket,
    config: EndpointConfig,
    server: Option<ServerConfig>,
) -> Result<Opened, EndpointError> {
    let kept = udp.try_clone().map_err(EndpointError::Socket)?;
    let wrapped = socket::wrap(udp).map_err(EndpointError::Socket)?;
    let complaints = socket::complaints(&kept, &*wrapped);
    let runtime = Arc::new(TokioRuntime);
    let endpoint = Endpoint::new_with_abstract_socket(config, server, wrapped, runtime)
        .map_err(EndpointError::Socket)?;
    Ok(Opened {
        endpoint,
        complaints,
    })
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        // Never the bound: unread streams must not use up the credit of the others. What they may
        // hold is bounded by the stream window and the budget of stalled streams (see `datapath`).
        .receive_window(VarInt::MAX)
        .send_window(SEND_WINDOW)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .datagram_receive_buffer_size(None);
    // 30 s fit the 62 bits of the field.
    if let Ok(idle) = IdleTimeout::try_from(IDLE_TIMEOUT) {
        transport.max_idle_timeout(Some(idle));
    }
    transport
}
