//! A connection on which agents may call, and what serves them.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use super::acceptor::Acceptor;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::source_limiter::HandshakePermit;
use cpc_server::extension::ShardHandle;

/// The means of all sessions on one shard.
pub(super) struct Context {
    /// The shard.
    pub shard: ShardHandle,
    /// Parameters of the agents.
    pub acceptor: Acceptor,
}

/// A connection on which agents may call.
pub(super) struct Peer {
    /// Address of the peer.
    pub remote: SocketAddr,
    /// Verified certificate of the peer.
    pub certificate: Option<CertificateDer<'static>>,
    /// The socket, for its statistics.
    pub socket: Arc<OwnedFd>,
    /// Number of calls.
    pub calls: ConcurrencyLimit,
    /// Permit of the handshake, returned with the first agent.
    pub stranger: RefCell<Option<HandshakePermit>>,
}

impl Peer {
    /// Notes that the connection has an agent.
    pub(super) fn is_known(&self) {
        self.stranger.take();
    }
}
