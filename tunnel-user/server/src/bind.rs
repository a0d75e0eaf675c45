//! All sockets of a server, opened or inherited before it serves.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::ServerError;
use super::extension::{BoundAgents, Extension, Sockets};
use super::frontend::protocol::Protocol;
use super::frontend::refusals::{Detailed, Refusals};
use super::frontend::unix::{self, SocketFile};
use super::frontend::{FrontendTls, Scope};
use cpc_config::ServerConfig;
use cpc_config::frontend::{Answers, FrontendConfig, UnixFrontend};
use cpc_host::inherited::Inherited;
use cpc_host::listen;
use cpc_host::report::report;
use cpc_identity::TrustDomain;
use cpc_identity::revoked::Revocations;
use cpc_transport::quic::udp::{beside, bind, bind_to_share, enlarge};

/// First word of the name, for a successor, of a Unix listener whose file this process has made. Its path
/// follows.
const OWN_FILE: &str = "unix";

/// Name of the sockets of the tunnel.
const TUNNEL: &str = "tunnel";

/// Listening sockets.
pub(super) struct Bound {
    /// Sockets of the tunnel, one for each of the first shards; none without a tunnel.
    pub udp: Vec<UdpSocket>,
    /// Listener of health for load balancers, at the tunnel's port, unless agents use that over gRPC.
    pub health: Option<TcpListener>,
    /// Listener of health, metrics and status.
    pub admin: TcpListener,
    /// Listener of health in the form of the extension.
    pub probes: Option<TcpListener>,
    /// Listener of joining workers.
    pub join: Option<TcpListener>,
    /// Frontends on Unix sockets.
    pub unix: Vec<UnixBound>,
    /// Frontends on TCP with TLS.
    pub tls: Vec<TlsBound>,
    /// Listener of the extension's agents.
    pub agents: Option<Box<dyn BoundAgents>>,
}

/// A Unix socket of a frontend.
pub(super) struct UnixBound {
    /// The socket.
    pub listener: UnixListener,
    /// File of the socket.
    pub file: SocketFile,
    /// Tenant and allow-list of the clients.
    pub scope: Arc<Scope>,
    /// Protocol of the frontend.
    pub protocol: Protocol,
}

/// A TCP socket of a frontend, with its TLS.
pub(super) struct TlsBound {
    /// The socket.
    pub listener: TcpListener,
    /// Tenant and allow-list of the clients.
    pub scope: Arc<Scope>,
    /// Protocol of the frontend.
    pub protocol: Protocol,
    /// TLS of the frontend.
    pub tls: FrontendTls,
}

impl Bound {
    /// Opens all sockets.
    ///
    /// # Errors
    /// [`ServerError::Socket`] naming the socket, or the fault of a frontend's certificates.
    pub(super) fn open(
        config: &ServerConfig,
        own: &TrustDomain,
        revocations: &Arc<Revocations>,
        inherited: &mut Inherited,
        extension: Option<&dyn Extension>,
    ) -> Result<Self, ServerError> {
        let (mut udp, mut health) = (Vec::new(), None);
        if config.tls.cert.is_some() {
            udp = tunnel(inherited, config.listen, config.shards)?;
            for socket in &udp {
                named(
                    format!("UDP {}", config.listen),
                    inherited.note(TUNNEL, socket),
                )?;
            }
            let konnectivity = config.konnectivity.as_ref().map(|k| k.listen.port());
            // Agents of both kinds may come to one number: then a load balancer's TCP check meets
            // those that speak gRPC.
            if konnectivity != Some(config.listen.port()) {
                health = Some(Sockets(inherited).tcp(config.listen)?);
            }
        }
        let mut bound = Self {
            udp,
            health,
            admin: Sockets(inherited).tcp(config.admin)?,
            probes: config
                .health
                .map(|addr| Sockets(inherited).tcp(addr))
                .transpose()?,
            join: { config.join.as_ref() }
                .map(|join| Sockets(inherited).tcp(join.listen))
                .transpose()?,
            unix: Vec::new(),
            tls: Vec::new(),
            agents: None,
        };
        if let Some(extension) = extension {
            let sockets = &mut Sockets(inherited);
            bound.agents = extension.bind_agents(config, own, revocations, sockets)?;
        }
        for frontend in &config.frontends.http_connect {
            let refusals: &'static dyn Refusals = match (frontend.answers(), extension) {
                (Answers::Konnectivity, Some(extension)) => extension.refusals(),
                _ => &Detailed,
            };
            bound.frontend(
                frontend,
                Protocol::HttpConnect(refusals),
                (own, revocations),
                inherited,
            )?;
        }
        if let (Some(extension), [_, ..]) = (extension, &config.frontends.grpc[..]) {
            let protocol = Protocol::Foreign(extension.clients(&config.limits));
            for frontend in &config.frontends.grpc {
                bound.frontend(frontend, protocol.clone(), (own, revocations), inherited)?;
            }
        }
        Ok(bound)
    }

    fn frontend(
        &mut self,
        config: &FrontendConfig,
        protocol: Protocol,
        (own, revocations): (&TrustDomain, &Arc<Revocations>),
        inherited: &mut Inherited,
    ) -> Result<(), ServerError> {
        let scope = Scope::of_frontend(protocol.name(), config, own);
        match config {
            FrontendConfig::Unix(frontend) => {
                let (listener, file) = unix_socket(frontend, inherited)?;
                self.unix.push(UnixBound {
                    listener,
                    file,
                    scope,
                    protocol,
                });
            }
            FrontendConfig::Tcp(frontend) => {
                let listener = Sockets(inherited).tcp(frontend.tcp)?;
                let (files, revocations) = (frontend.clone(), revocations.clone());
                let tenant = scope.tenant.clone();
                let tls = FrontendTls::load(files, tenant, protocol.clone(), revocations)?;
                self.tls.push(TlsBound {
                    listener,
                    scope,
                    protocol,
                    tls,
                });
            }
        }
        Ok(())
    }
}

/// Opens one socket for each shard, or one alone where the port can't be shared.
fn tunnel(
    inherited: &mut Inherited,
    addr: SocketAddr,
    shards: usize,
) -> Result<Vec<UdpSocket>, ServerError> {
    let name = || format!("UDP {addr}");
    let open = || match shards {
        1 => listen::with_fallback(addr, bind),
        _ => listen::with_fallback(addr, bind_to_share),
    };
    let first = match inherited.udp(addr) {
        Some(udp) => {
            enlarge(&udp);
            udp
        }
        None => named(name(), open())?,
    };
    if shards == 1 {
        return Ok(vec![first]);
    }
    let kept = named(name(), first.try_clone())?;
    let mut group = vec![first];
    while group.len() < shards
        && let Some(next) = inherited.udp(addr)
    {
        group.push(next);
    }
    beside(group, shards).or_else(|error| {
        tracing::warn!(
            %addr, error = report(&error),
            "no further UDP sockets beside this one, so that one shard serves all tunnels; one from \
             a service manager needs ReusePort=yes in its unit, and to be opened by our user"
        );
        Ok(vec![kept])
    })
}

/// Opens a Unix socket, unless the service manager or a predecessor has. That of a predecessor has a file of
/// our own.
fn unix_socket(
    frontend: &UnixFrontend,
    inherited: &mut Inherited,
) -> Result<(UnixListener, SocketFile), ServerError> {
    let what = format!("Unix socket {}", frontend.unix.display());
    let path = &frontend.unix;
    // A listener that this program has made was bound under another name.
    let name = format!("{OWN_FILE} {}", path.display());
    let (listener, file) = if let Some(own) = inherited.named(&name) {
        (own.into(), SocketFile::taken_over(frontend))
    } else if let Some(other) = inherited.unix(path) {
        (other, SocketFile::inherited(frontend))
    } else {
        named(what.clone(), unix::bind(frontend))?
    };
    let name = if file.is_own() { &name } else { "" };
    named(what, inherited.note(name, &listener))?;
    Ok((listener, file))
}

fn named<T>(what: String, opened: io::Result<T>) -> Result<T, ServerError> {
    opened.map_err(|why| ServerError::Socket { what, why })
}
