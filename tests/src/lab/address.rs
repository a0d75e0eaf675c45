//! The addresses of a laboratory. They are the same in each: each has its own namespaces.
//!
//! ```text
//!  control plane                NAT router                       worker N
//!  192.0.2.K  (server K) ---- 192.0.2.254 | 10.99.N.1 ---- 10.99.N.2    node address
//!  2001:db8::K                2001:db8::fe | fd00:99:N::1   fd00:99:N::2
//!                                                           10.244.N.2   a pod's address
//!                                                           fd00:244:N::2
//! ```
//!
//! Seen from the control plane only its own network exists: it has no other route.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The UDP port on which every server listens for agents.
pub const TUNNEL_PORT: u16 = 8132;
/// Port of the TLS server that stands in for the kubelet.
pub const KUBELET_PORT: u16 = 10250;
/// Node and pod networks of all workers: the captured ones.
pub const WORKER_NETWORKS: [&str; 4] = [
    "10.99.0.0/16",
    "10.244.0.0/16",
    "fd00:99::/32",
    "fd00:244::/32",
];
/// Address of the router towards the control plane, and so of every worker behind it.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
/// The same in IPv6.
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe);
/// The most workers and the most servers in one laboratory.
pub const MOST: u8 = 200;

/// Returns the address of server `k` (from 1).
pub fn server(k: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, k)
}

/// Returns the same in IPv6.
pub fn server_v6(k: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, k.into())
}

/// Returns the node address of worker `n` (from 1).
pub fn node(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, n, 2)
}

/// Returns the same in IPv6.
pub fn node_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, n.into(), 0, 0, 0, 0, 2)
}

/// Returns the router's address on the side of worker `n`.
pub fn gateway(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, n, 1)
}

/// Returns the same in IPv6.
pub fn gateway_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, n.into(), 0, 0, 0, 0, 1)
}

/// Returns the address of a pod on worker `n`.
pub fn pod(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, n, 2)
}

/// Returns the same in IPv6.
pub fn pod_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, n.into(), 0, 0, 0, 0, 2)
}

/// Returns the networks of the pods on worker `n`.
pub fn pod_networks(n: u8) -> [String; 2] {
    [format!("10.244.{n}.0/24"), format!("fd00:244:{n:x}::/48")]
}

/// Returns both node addresses of worker `n`.
pub fn nodes(n: u8) -> [IpAddr; 2] {
    [node(n).into(), node_v6(n).into()]
}

/// Returns both pod addresses of worker `n`.
pub fn pods(n: u8) -> [IpAddr; 2] {
    [pod(n).into(), pod_v6(n).into()]
}
