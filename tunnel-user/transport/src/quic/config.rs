//! Configuration of all endpoints.
//!
//! A server gives an agent one bidirectional stream, its control stream, and nothing else: agents can
//! open nothing towards the control plane. An agent gives the server [`MAX_DIALS`].

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use quinn_proto::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, EndpointConfig, IdleTimeout, ServerConfig, TransportConfig, VarInt,
};

use super::connection_id::Generator;
use super::ledger::MemoryBounds;
use super::metrics::UdpMetrics;
use super::secret::Secret;
use super::steering::Spread;
use super::udp::Udp;
use super::{Endpoint, offload, path, udp};
use cpc_config::TransportConfig as PathConfig;
use cpc_config::transport::MAX_DIALS;
use cpc_host::report::report;
use cpc_identity::{ALPN, Material, Role, tunnel_provider};

/// Maximum number of unacknowledged bytes on one tunnel, until the path is known to take more.
pub(super) const SEND_WINDOW: u64 = 16 << 20;

/// Time without a packet after which a tunnel ends, with all its streams.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Assumed initial round-trip time. Handshakes are retransmitted after three times this: servers come
/// back in seconds.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Number of streams that an agent may open: the control stream.
const AGENTS_STREAMS: u32 = 1;

/// Maximum payload of a received UDP datagram (RFC 9000 section 18.2).
const MAX_PAYLOAD: u16 = 65_527;

/// Packet and time thresholds of loss detection: a packet is lost when so many later ones have arrived,
/// or one that was sent so much of a round-trip time later. RFC 9002's 3 packets and 1/8 take every
/// packet for lost that others overtake on a path with several ways: where 2 % came up to 10 ms late,
/// of 50 ms, 2.6 Mbit/s were left of 100, and with these 37. The kernel's TCP begins with a quarter of
/// the round-trip time too, and goes by time alone (RACK, RFC 8985); the bound on packets is for fast
/// paths, where a timer is slow.
const OVERTAKEN_BY: u32 = 256;
const LATE: f32 = 1.25;

/// Maximum number of handshakes that wait to be accepted; further ones are refused.
const MAX_INCOMING: usize = 1024;

/// Reason why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket can't be used.
    #[error("UDP socket: {0}")]
    Socket(io::Error),
    /// rustls refuses the configuration.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
    /// rustls has no cipher suite for QUIC's first packets.
    #[error("TLS: {0}")]
    Cipher(NoInitialCipherSuite),
}

impl From<rustls::Error> for EndpointError {
    fn from(why: rustls::Error) -> Self {
        Self::Tls(why)
    }
}

impl From<NoInitialCipherSuite> for EndpointError {
    fn from(why: NoInitialCipherSuite) -> Self {
        Self::Cipher(why)
    }
}

/// State that all endpoints of a process share.
#[derive(Clone, Debug)]
pub struct Setup {
    path: PathConfig,
    /// Whether one call may send many packets.
    is_segmented: bool,
    udp: UdpMetrics,
    memory: MemoryBounds,
}

impl Setup {
    /// Probes the kernel once, and logs missing features.
    pub fn new(path: PathConfig, memory: MemoryBounds, registry: &mut Registry) -> Self {
        let udp = UdpMetrics::register(registry);
        let offload = offload::check().unwrap_or_else(|error| {
            tracing::debug!(
                error = report(&error),
                "UDP offloads can't be tried on loopback"
            );
            // As long as nothing is known against it.
            offload::Offload {
                send: true,
                receive: true,
            }
        });
        for complaint in offload.complaints() {
            tracing::warn!("{complaint}");
        }
        tracing::info!(gso = offload.send, gro = offload.receive, "UDP offloads");
        udp.send.offload.set(offload.send.into());
        udp.receive.offload.set(offload.receive.into());
        Self {
            path,
            is_segmented: offload.send,
            udp,
            memory,
        }
    }

    fn transport(&self, remote: SocketAddr, streams: u32) -> TransportConfig {
        let mut transport = transport();
        transport
            .max_concurrent_bidi_streams(VarInt::from_u32(streams))
            .stream_receive_window(VarInt::from_u32(self.memory.stream_window))
            .enable_segmentation_offload(self.is_segmented);
        path::apply(&self.path, remote, &mut transport);
        transport
    }
}

/// Configuration that a server uses for each agent.
#[derive(Debug)]
pub(super) struct Acceptor {
    common: ServerConfig,
    setup: Setup,
    ids: Generator,
}

impl Acceptor {
    /// Returns the configuration for an agent, which depends on its address.
    pub(super) fn config(&self, remote: SocketAddr) -> Arc<ServerConfig> {
        let mut config = self.common.clone();
        config.transport_config(Arc::new(self.setup.transport(remote, AGENTS_STREAMS)));
        Arc::new(config)
    }

    /// Returns the generator of the shard's connection ids.
    pub(super) fn ids(&self) -> &Generator {
        &self.ids
    }

    /// Returns the configuration that all agents share.
    pub(super) fn common(&self) -> Arc<ServerConfig> {
        Arc::new(self.common.clone())
    }
}

/// An endpoint, with complaints about the host.
#[derive(Debug)]
pub struct Opened {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Complaints with their remedies.
    pub complaints: Vec<String>,
}

/// Opens a server's endpoint for one shard on the current runtime, over a bound socket.
///
/// # Errors
/// [`EndpointError`].
pub fn server(
    udp: UdpSocket,
    material: &Arc<Material>,
    secret: &Secret,
    shard: u8,
    setup: &Setup,
) -> Result<Opened, EndpointError> {
    let mut tls = rustls::ServerConfig::builder_with_provider(tunnel_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(material.verifier(Role::Agent))
        .with_cert_resolver(material.clone());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would skip the check of a certificate that may have been replaced.
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;

    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.token_key(Arc::new(secret.token_key()));
    config.max_incoming(MAX_INCOMING);

    let ids = Generator::new(secret.connection_id_key(), &material.identity().name, shard);
    let mut endpoint = EndpointConfig::new(Arc::new(secret.reset_key()));
    let acceptor = Acceptor {
        common: config,
        setup: setup.clone(),
        ids: ids.clone(),
    };
    endpoint.cid_generator(move || Box::new(ids.clone()));
    open(udp, endpoint, Some(acceptor), setup)
}

/// Opens an agent's endpoint for one tunnel, on a source port of its own: behind a virtual address each
/// tunnel may then reach another server.
///
/// The configuration is for [`Endpoint::connect`]. `number` distinguishes this tunnel from the others
/// of `spread`: they arrive at different shards of the server.
///
/// # Errors
/// [`EndpointError`].
pub fn client(
    server: SocketAddr,
    material: &Arc<Material>,
    (spread, number): (Spread, u8),
    setup: &Setup,
) -> Result<(Opened, ClientConfig), EndpointError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(tunnel_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        // Stricter than the default: by identity and role (see `tls::verify`).
        .with_custom_certificate_verifier(material.verifier(Role::Server))
        .with_client_cert_resolver(material.clone());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();

    // Beside the dials there is the stream of notices about sessions.
    let transport = setup.transport(server, MAX_DIALS + 1);
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    config.initial_dst_cid_provider(spread.ids(number));

    let any = match server {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let udp = udp::bind(any).map_err(EndpointError::Socket)?;
    let endpoint = EndpointConfig::default();
    Ok((open(udp, endpoint, None, setup)?, config))
}

fn open(
    udp: UdpSocket,
    mut config: EndpointConfig,
    acceptor: Option<Acceptor>,
    setup: &Setup,
) -> Result<Opened, EndpointError> {
    // Whatever the path takes: the default would stop the peer's search at 1472. It is within the
    // bounds, so there is no error to have.
    let _ = config.max_udp_payload_size(MAX_PAYLOAD);
    let udp = Udp::new(udp, setup.udp.clone()).map_err(EndpointError::Socket)?;
    let endpoint = Endpoint::new(udp, config, acceptor, setup.memory.clone());
    Ok(Opened {
        complaints: endpoint.complaints(),
        endpoint,
    })
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        // Never the bound: unread streams must not use up the credit of the others. What they may
        // hold is bounded by the stream window and by what is charged for it (see `ledger`).
        .receive_window(VarInt::MAX)
        .send_window(SEND_WINDOW)
        // Runs, see `send_scheduler`.
        .send_fairness(false)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .packet_threshold(OVERTAKEN_BY)
        .time_threshold(LATE)
        .datagram_receive_buffer_size(None);
    // 30 s fit the 62 bits of the field.
    if let Ok(idle) = IdleTimeout::try_from(IDLE_TIMEOUT) {
        transport.max_idle_timeout(Some(idle));
    }
    transport
}
