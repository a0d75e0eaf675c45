//! Configuration of a path, and the host's knowledge of it: packet sizes, congestion control,
//! acknowledgements.
//!
//! Configuration counts IP packets, as interfaces do; QUIC counts the payload of UDP datagrams.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use quinn_proto::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn_proto::{AckFrequencyConfig, MtuDiscoveryConfig, VarInt};

use super::send_scheduler::Watched;
use cpc_config::TransportConfig;
use cpc_config::transport::{Congestion, Mtu};

/// Minimum UDP payload of a path (RFC 9000 section 14).
const FLOOR: u16 = 1200;

/// Number of packets per acknowledgement without a request (RFC 9000 section 13.2.2).
const USUAL_ACK_EVERY: u32 = 2;

/// Returns the size of the headers below QUIC, in bytes.
pub(super) fn overhead(remote: IpAddr) -> u16 {
    match remote.to_canonical() {
        IpAddr::V4(_) => 20 + 8,
        IpAddr::V6(_) => 40 + 8,
    }
}

/// Configures the transport towards `remote`.
pub(super) fn apply(
    config: &TransportConfig,
    remote: SocketAddr,
    transport: &mut quinn_proto::TransportConfig,
) {
    let payload = |mtu: u16| (mtu - overhead(remote.ip())).max(FLOOR);
    let mut discovery = MtuDiscoveryConfig::default();
    match config.mtu {
        Mtu::Fixed(mtu) => {
            // The search ends where it starts. It is on, so that a size that was given up because
            // packets of it vanished is tried again.
            transport.initial_mtu(payload(mtu));
            discovery.upper_bound(payload(mtu));
        }
        Mtu::Auto => {
            // Our own interface knows what can't leave; trying it would take three losses a step.
            let most = route_mtu(remote).map_or(config.max_mtu, |mtu| mtu.min(config.max_mtu));
            discovery.upper_bound(payload(most.max(FLOOR + overhead(remote.ip()))));
        }
    }
    let congestion: Arc<dyn ControllerFactory + Send + Sync> = match config.congestion {
        Congestion::Cubic => Arc::new(CubicConfig::default()),
        Congestion::Bbr => Arc::new(BbrConfig::default()),
        Congestion::NewReno => Arc::new(NewRenoConfig::default()),
    };
    transport
        .mtu_discovery_config(Some(discovery))
        .congestion_controller_factory(Arc::new(Watched(congestion)));
    if config.ack_every != USUAL_ACK_EVERY {
        let mut acks = AckFrequencyConfig::default();
        // How many may come without an acknowledgement of theirs.
        acks.ack_eliciting_threshold(VarInt::from_u32(config.ack_every - 1));
        transport.ack_frequency_config(Some(acks));
    }
}

/// Returns the size of the largest IP packet towards `remote`, by the kernel's route.
fn route_mtu(remote: SocketAddr) -> Option<u16> {
    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
    let (any, level, option) = match remote {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU,
        ),
    };
    // It only asks: nothing is sent.
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(remote).ok()?;
    let mut mtu: libc::c_int = 0;
    let mut size = size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes, an int, to a place that lives through the
    // call.
    let done = unsafe {
        let value = (&raw mut mtu).cast();
        libc::getsockopt(socket.as_raw_fd(), level, option, value, &raw mut size)
    };
    // Loopback has 65536.
    (done == 0).then(|| u16::try_from(mtu).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_knows_its_interfaces() {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        assert_eq!(route_mtu(loopback), Some(u16::MAX));
        let mapped = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 1));
        assert_eq!(route_mtu(mapped), Some(u16::MAX));
        assert_eq!(overhead(mapped.ip()), 28);
        assert_eq!(overhead(Ipv6Addr::LOCALHOST.into()), 48);
    }

    #[test]
    fn sizes_are_those_of_ip_packets() {
        let to = |text: &str, mtu| {
            let config = TransportConfig {
                mtu,
                ..TransportConfig::default()
            };
            let mut transport = quinn_proto::TransportConfig::default();
            apply(&config, text.parse().unwrap(), &mut transport);
            format!("{transport:?}")
        };
        let text = to("127.0.0.1:1", Mtu::Auto);
        assert!(text.contains("upper_bound: 8972"), "{text}");
        assert!(text.contains("initial_mtu: 1200"), "{text}");
        let text = to("[::1]:1", Mtu::Fixed(1280));
        assert!(text.contains("upper_bound: 1232"), "{text}");
        assert!(text.contains("initial_mtu: 1232"), "{text}");
    }
}
