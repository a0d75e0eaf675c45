//! Tunnels ([`tunnel`]): QUIC ([`quic`]), and the control stream of a session ([`control_stream`]).

pub mod control_stream;
pub mod quic;
pub mod tunnel;
