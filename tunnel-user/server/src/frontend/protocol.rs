//! Protocol of a frontend's listener.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use bytes::Bytes;
use tunnel_proto::http_connect::response;

use super::refusals::Refusals;
use super::scope;
use crate::extension::clients::ClientProtocol;
use cpc_config::tls_floor::{TlsFloor, TlsVersion};
use cpc_datapath::socket::prepare_listener;

/// Protocol of a listener.
#[derive(Clone, Debug)]
pub(crate) enum Protocol {
    /// HTTP CONNECT, with the form of its refusals.
    HttpConnect(&'static dyn Refusals),
    /// A protocol of an extension.
    Foreign(Arc<dyn ClientProtocol>),
}

impl Protocol {
    /// Returns the name in the configuration and in logs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::HttpConnect(_) => scope::HTTP_CONNECT,
            Self::Foreign(_) => scope::GRPC,
        }
    }

    /// Prepares a listener, whose accepted sockets inherit its options.
    ///
    /// # Errors
    /// The error of the system call.
    pub(crate) fn prepare(&self, listener: &TcpListener) -> io::Result<()> {
        match self {
            Self::HttpConnect(_) => prepare_listener(listener),
            Self::Foreign(protocol) => protocol.prepare(listener),
        }
    }

    /// Returns the default TLS floor.
    pub(super) fn floor(&self) -> TlsFloor {
        match self {
            Self::HttpConnect(_) => TlsFloor {
                min_version: TlsVersion::Tls13,
                ..TlsFloor::default()
            },
            Self::Foreign(protocol) => protocol.floor(),
        }
    }

    /// Returns the answer to a client without TLS for which there is no descriptor.
    pub(super) fn no_descriptor(&self) -> Bytes {
        match self {
            Self::HttpConnect(_) => response(503, "the server has no file descriptor left"),
            Self::Foreign(_) => Bytes::new(),
        }
    }

    /// Returns the protocols of ALPN.
    pub(super) fn alpn(&self) -> Vec<Vec<u8>> {
        match self {
            Self::HttpConnect(_) => Vec::new(),
            Self::Foreign(protocol) => protocol.alpn(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::version::TLS13;

    use super::super::refusals::Detailed;
    use super::*;
    use cpc_identity::floor::accepted;

    #[test]
    fn http_connect_has_tls_1_3() {
        let floor = Protocol::HttpConnect(&Detailed).floor();
        assert_eq!(accepted(&floor).versions, [&TLS13]);
    }
}
