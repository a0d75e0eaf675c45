//! Clients of an extension.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use cpc_config::tls_floor::TlsFloor;
use futures_util::future::LocalBoxFuture;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

use super::shard::ShardHandle;
use crate::frontend::scope::Scope;

/// A protocol of clients that share a connection.
pub trait ClientProtocol: Send + Sync + fmt::Debug {
    /// Returns the protocols of ALPN.
    fn alpn(&self) -> Vec<Vec<u8>>;

    /// Returns the default TLS floor.
    fn floor(&self) -> TlsFloor;

    /// Prepares a listener, whose accepted sockets inherit its options.
    ///
    /// # Errors
    /// The error of the system call.
    fn prepare(&self, listener: &TcpListener) -> io::Result<()>;

    /// Serves a connection on a Unix socket to its end.
    fn serve_unix(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        socket: UnixStream,
    ) -> LocalBoxFuture<'static, ()>;

    /// Serves a connection with TLS to its end.
    fn serve_tls(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        client: SocketAddr,
        session: TlsStream<TcpStream>,
    ) -> LocalBoxFuture<'static, ()>;
}
