//! Sockets of a start, from the service manager or opened here.

use std::net::{SocketAddr, TcpListener};

use crate::error::ServerError;
use cpc_host::inherited::Inherited;
use cpc_host::listen;

/// Sockets from the service manager, or opened where there are none.
#[derive(Debug)]
pub struct Sockets<'a>(pub(crate) &'a mut Inherited);

impl Sockets<'_> {
    /// Opens a TCP listener.
    ///
    /// # Errors
    /// [`ServerError::Socket`].
    pub fn tcp(&mut self, addr: SocketAddr) -> Result<TcpListener, ServerError> {
        if let Some(listener) = self.0.tcp(addr, None) {
            return Ok(listener);
        }
        listen::tcp(addr).map_err(|why| ServerError::Socket {
            what: format!("TCP {addr}"),
            why,
        })
    }
}
