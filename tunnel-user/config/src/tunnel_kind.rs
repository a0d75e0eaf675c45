//! Kinds of tunnels between a server and an agent.

/// Kind of a tunnel: the protocol that its two ends speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TunnelKind {
    /// Our protocol over QUIC.
    Quic,
    /// Konnectivity's protocol: gRPC over TLS.
    Konnectivity,
}

impl TunnelKind {
    /// Returns the name in configuration, status, log and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Konnectivity => "konnectivity",
        }
    }

    /// Whether the two ends speak our protocol, with its control messages and streams.
    pub fn is_native(self) -> bool {
        match self {
            Self::Quic => true,
            Self::Konnectivity => false,
        }
    }
}
