//! QUIC ([`quic`]), and the control stream that a session is driven over ([`control_stream`]). And
//! gRPC over HTTP/2, for those who speak Konnectivity ([`grpc`]).

pub mod control_stream;
pub mod grpc;
pub mod quic;
