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
use super::serve::Listeners;
use cpc_config::ServerConfig;
use cpc_config::frontend::{Answers, FrontendConfig, UnixFrontend};
use cpc_host::inherited::Inherited;
use cpc_host::listen;
use cpc_host::report::report;
use cpc_identity::TrustDomain;
use cpc_identity::revoked::Revocations;
use cpc_transport::quic::steering::steer;
use cpc_transport::quic::udp::{bind, bind_to_share, enlarge, widen};

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

/// Puts the sockets in force that a predecessor has released: the kernel steers packets to the shards of this
/// process, files of frontends are its own, and sockets that it does not use are closed. Until then a predecessor
/// may go on, so nothing is changed that it uses. Without a predecessor there is no effect.
pub(super) fn take_effect(udp: &[UdpSocket], listeners: &mut Listeners, inherited: &mut Inherited) {
    if !inherited.has_predecessor() {
        return;
    }
    if let Err(error) = steer(udp) {
        tracing::error!(
            error = report(&error),
            "the kernel steers packets to the shards of the predecessor: some agents can't connect"
        );
    }
    for unix in &mut listeners.unix {
        unix.file.released();
    }
    unix::remove_closed(&inherited.close_unused());
}

/// Opens one socket for each shard, or fewer where the port can't be shared.
fn tunnel(
    inherited: &mut Inherited,
    addr: SocketAddr,
    shards: usize,
) -> Result<Vec<UdpSocket>, ServerError> {
    let mut group = Vec::new();
    while group.len() < shards
        && let Some(next) = inherited.udp(addr)
    {
        enlarge(&next);
        group.push(next);
    }
    let is_used = inherited.has_predecessor() && !group.is_empty();
    if group.is_empty() {
        let opened = match shards {
            1 => listen::with_fallback(addr, bind),
            _ => listen::with_fallback(addr, bind_to_share),
        };
        group.push(named(format!("UDP {addr}"), opened)?);
    }
    let widened = widen(&mut group, shards);
    if is_used {
        // The steering stays that of the predecessor, which may go on: further sockets get nothing yet.
        if let Err(error) = widened {
            tracing::warn!(
                %addr, error = report(&error), tunnel_shards = group.len(),
                "no further UDP sockets beside those of the predecessor, so that fewer shards than configured \
                 serve tunnels: one that was opened for a single shard can't be shared"
            );
        }
        return Ok(group);
    }
    // Also for one shard: a successor may open further sockets beside it.
    if let Err(error) = widened.and_then(|()| steer(&group)) {
        if shards > 1 {
            tracing::warn!(
                %addr, error = report(&error),
                "no further UDP sockets beside this one, so that one shard serves all tunnels; one from \
                 a service manager needs ReusePort=yes in its unit, and to be opened by our user"
            );
        }
        group.truncate(1);
    }
    Ok(group)
}

/// Opens a Unix socket, unless the service manager or a predecessor has. That of a predecessor has a file of
/// our own.
fn unix_socket(
    frontend: &UnixFrontend,
    inherited: &mut Inherited,
) -> Result<(UnixListener, SocketFile), ServerError> {
    let what = format!("Unix socket {}", frontend.unix.display());
    let path = &frontend.unix;
    let (listener, mut file) = if let Some(own) = SocketFile::taken_over(frontend, inherited) {
        own
    } else if let Some(other) = inherited.unix(path) {
        (other, SocketFile::inherited(frontend))
    } else {
        named(what.clone(), unix::bind(frontend))?
    };
    named(what, file.note(&listener, inherited))?;
    Ok((listener, file))
}

fn named<T>(what: String, opened: io::Result<T>) -> Result<T, ServerError> {
    opened.map_err(|why| ServerError::Socket { what, why })
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::Ipv4Addr;
    use std::os::fd::OwnedFd;
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    /// Process with `shards` sockets, after the one that has `offered` its own.
    fn process(
        addr: SocketAddr,
        shards: usize,
        offered: Option<&[UdpSocket]>,
    ) -> (Vec<UdpSocket>, Inherited) {
        let mut inherited = Inherited::default();
        if let Some(offered) = offered {
            let copies = offered.iter().map(|socket| socket.try_clone().unwrap());
            inherited.add(copies.map(|socket| (TUNNEL.to_owned(), OwnedFd::from(socket))));
        }
        let group = tunnel(&mut inherited, addr, shards).unwrap();
        assert_eq!(group.len(), shards);
        (group, inherited)
    }

    /// Returns for each of four first packets the number of the socket at which it arrives. They choose the shards
    /// 0 to 3, if there are as many.
    fn arrivals(sockets: &[UdpSocket]) -> [Option<usize>; 4] {
        [0, 1, 2, 3].map(|number| {
            let packet = [&[0xc0, 0, 0, 0, 1, 20, 0, number][..], &[0; 18]].concat();
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            client
                .send_to(&packet, sockets[0].local_addr().unwrap())
                .unwrap();
            // Loopback delivers within the call, but a loaded machine may have it done elsewhere.
            for _ in 0..100 {
                for (at, socket) in sockets.iter().enumerate() {
                    match socket.recv(&mut [0; 64]) {
                        Ok(_) => return Some(at),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                sleep(Duration::from_millis(1));
            }
            None
        })
    }

    #[test]
    fn a_successor_may_have_more_or_fewer_shards_and_may_fail() {
        let any = (Ipv4Addr::LOCALHOST, 0).into();
        let (mut former, _) = process(any, 4, None);
        let addr = former[0].local_addr().unwrap();
        let all = |arrivals: [usize; 4]| arrivals.map(Some);
        for (shards, expected) in [
            (4, [0, 1, 2, 3]),
            (2, [0, 1, 0, 1]),
            (3, [0, 1, 2, 0]),
            (1, [0, 0, 0, 0]),
            (4, [0, 1, 2, 3]),
        ] {
            let before = arrivals(&former);
            let failed = process(addr, shards, Some(&former));
            assert_eq!(arrivals(&former), before, "{shards} shards, before the end");
            drop(failed);
            assert_eq!(arrivals(&former), before, "{shards} shards, after the end");
            let (next, mut inherited) = process(addr, shards, Some(&former));
            assert_eq!(arrivals(&former), before, "{shards} shards, not released");
            take_effect(&next, &mut Listeners::default(), &mut inherited);
            assert_eq!(arrivals(&next), all(expected), "{shards} shards");
            drop(former);
            assert_eq!(arrivals(&next), all(expected), "{shards} shards, alone");
            former = next;
        }
    }

    #[test]
    fn a_port_that_one_shard_has_opened_alone_stays_with_one() {
        let any = (Ipv4Addr::LOCALHOST, 0).into();
        let (former, _) = process(any, 1, None);
        let addr = former[0].local_addr().unwrap();
        let mut inherited = Inherited::default();
        let copy = OwnedFd::from(former[0].try_clone().unwrap());
        inherited.add([(TUNNEL.to_owned(), copy)]);
        let next = tunnel(&mut inherited, addr, 4).unwrap();
        assert_eq!(next.len(), 1);
        take_effect(&next, &mut Listeners::default(), &mut inherited);
        assert_eq!(arrivals(&next), [Some(0); 4]);
    }
}
