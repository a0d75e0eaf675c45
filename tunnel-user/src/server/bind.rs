//! Every socket that a server listens on, opened or inherited before anything is served.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;

use super::ServerError;
use super::frontend::FrontendTls;
use super::frontend::http_connect::bind_unix;
use crate::config::ServerConfig;
use crate::config::server::HttpConnectConfig;
use crate::process::inherited::Inherited;
use crate::tls::TrustDomain;
use crate::transport::socket::{bind, enlarge};

/// Sockets that listen.
pub(super) struct Bound {
    /// The tunnel's.
    pub udp: UdpSocket,
    /// Health for load balancers, at the tunnel's port.
    pub health: TcpListener,
    /// Everything that is to be seen.
    pub admin: TcpListener,
    /// HTTP CONNECT on Unix sockets.
    pub unix: Vec<UnixBound>,
    /// HTTP CONNECT on TCP with TLS.
    pub tls: Vec<TlsBound>,
}

/// A Unix socket, and the tenant that its callers are.
pub(super) struct UnixBound {
    /// The socket.
    pub listener: UnixListener,
    /// The tenant.
    pub tenant: TrustDomain,
}

/// A TCP socket, its TLS, and the tenant that its callers are.
pub(super) struct TlsBound {
    /// The socket.
    pub listener: TcpListener,
    /// The tenant.
    pub tenant: TrustDomain,
    /// Certificates.
    pub tls: FrontendTls,
}

impl Bound {
    /// Opens all of them.
    ///
    /// # Errors
    /// [`ServerError::Socket`] naming the one, or what is wrong with a frontend's certificates.
    pub(super) fn open(
        config: &ServerConfig,
        own: &TrustDomain,
        inherited: &mut Inherited,
    ) -> Result<Self, ServerError> {
        let udp = match inherited.udp(config.listen) {
            Some(udp) => {
                enlarge(&udp);
                udp
            }
            None => named(format!("UDP {}", config.listen), bind(config.listen))?,
        };
        let mut bound = Self {
            udp,
            health: listen(inherited, config.listen)?,
            admin: listen(inherited, config.admin)?,
            unix: Vec::new(),
            tls: Vec::new(),
        };
        for frontend in &config.frontends.http_connect {
            let tenant = |given: &Option<TrustDomain>| given.as_ref().unwrap_or(own).clone();
            match frontend {
                HttpConnectConfig::Unix(frontend) => {
                    let name = format!("Unix socket {}", frontend.unix.display());
                    let listener = match inherited.unix(&frontend.unix) {
                        Some(listener) => listener,
                        None => named(name, bind_unix(frontend))?,
                    };
                    let tenant = tenant(&frontend.tenant);
                    bound.unix.push(UnixBound { listener, tenant });
                }
                HttpConnectConfig::Tcp(frontend) => {
                    let listener = listen(inherited, frontend.tcp)?;
                    let tenant = tenant(&frontend.tenant);
                    let tls = FrontendTls::load(frontend.clone(), tenant.clone())?;
                    bound.tls.push(TlsBound {
                        listener,
                        tenant,
                        tls,
                    });
                }
            }
        }
        Ok(bound)
    }
}

fn listen(inherited: &mut Inherited, addr: SocketAddr) -> Result<TcpListener, ServerError> {
    if let Some(listener) = inherited.tcp(addr, None) {
        return Ok(listener);
    }
    let listener = TcpListener::bind(addr);
    let listener = listener.and_then(|l| l.set_nonblocking(true).map(|()| l));
    named(format!("TCP {addr}"), listener)
}

fn named<T>(what: String, opened: io::Result<T>) -> Result<T, ServerError> {
    opened.map_err(|why| ServerError::Socket { what, why })
}
