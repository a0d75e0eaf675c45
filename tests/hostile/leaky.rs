//! A QUIC client that withholds: packets of its choice are lost, and it never sends them again.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, TokioRuntime, UdpPoller};

use crate::peer::{self, Credentials};

/// A socket that drops every packet it sends while `loses` is set.
#[derive(Debug)]
struct Leaky {
    socket: Arc<dyn AsyncUdpSocket>,
    loses: Arc<AtomicBool>,
}

impl AsyncUdpSocket for Leaky {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.loses.load(Ordering::Relaxed) {
            true => Ok(()),
            false => self.socket.try_send(transmit),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }
}

/// Creates an endpoint on `socket` that loses its packets while `loses` is set, and never counts
/// one as lost. It sends `window` bytes without an acknowledgement. Needs a running runtime.
///
/// # Errors
///
/// The credentials or the socket can't be used.
pub(crate) fn agent(
    socket: UdpSocket,
    credentials: &Credentials,
    window: u64,
    loses: Arc<AtomicBool>,
) -> Result<Endpoint> {
    let mut transport = quinn::TransportConfig::default();
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(window);
    transport
        .congestion_controller_factory(Arc::new(congestion))
        .max_concurrent_bidi_streams(4096_u32.into())
        .keep_alive_interval(Some(Duration::from_secs(1)))
        // What is withheld keeps all behind it in the sender's hands.
        .send_window(u64::MAX)
        .packet_threshold(u32::MAX)
        .time_threshold(1e6);
    let tls = peer::client_tls(Some(credentials), peer::ALPN)?;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    let socket = TokioRuntime.wrap_udp_socket(socket)?;
    let mut endpoint = Endpoint::new_with_abstract_socket(
        EndpointConfig::default(),
        None,
        Arc::new(Leaky { socket, loses }),
        Arc::new(TokioRuntime),
    )?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}
