//! Tunnels ([`tunnel`]): QUIC ([`quic`]), the control stream of a session ([`control_stream`]), and gRPC
//! over HTTP/2 for peers that speak Konnectivity's protocol ([`grpc`]).

pub mod control_stream;
pub mod grpc;
pub mod quic;
pub mod tunnel;
