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
        let opened = match self.0.tcp(addr, None) {
            Some(listener) => Ok(listener),
            None => listen::tcp(addr),
        };
        let noted = opened.and_then(|listener| {
            self.0.note("", &listener)?;
            Ok(listener)
        });
        noted.map_err(|why| ServerError::Socket {
            what: format!("TCP {addr}"),
            why,
        })
    }
}
