//! Hosts, programs and targets of a simulation, their configurations, and the model of who may serve what.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use cpc_config::agent::ServeConfig;
use cpc_config::server::GrantConfig;
use cpc_config::{AgentConfig, AllowRule, PortRange, Rule, ServerConfig};
use ipnet::{IpNet, Ipv4Net};

use crate::endpoint::Script;
use crate::pki::{DOMAIN, Pki};
use crate::random::Random;
use crate::world::{SECOND, Shared};

/// Port of the listener of redirected connections.
pub const CAPTURE_PORT: u16 = 8137;

/// Port of the tunnel.
pub const TUNNEL_PORT: u16 = 8132;

/// Port of the targets.
pub const PORT: u16 = 10250;

/// Port at which no target listens.
const REFUSING: u16 = 10251;

/// Largest numbers of servers and agents.
pub const MAX_SERVERS: usize = 2;
/// Largest number of agents.
pub const MAX_AGENTS: usize = 3;

/// Host of a target that several agents are granted.
pub const SHARED: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
/// Host of a target that an agent claims without a grant.
pub const UNGRANTED: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 1);
/// Host of a target that is granted, but not on an agent's allow-list.
pub const DENIED: Ipv4Addr = Ipv4Addr::new(10, 4, 0, 1);
/// Host of a target that no agent claims.
pub const UNSERVED: Ipv4Addr = Ipv4Addr::new(10, 5, 0, 1);
/// Host of an attacker.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A server or an agent.
#[derive(Clone, Debug)]
pub struct Member {
    /// Name in its certificate.
    pub name: String,
    /// Host of the member.
    pub host: usize,
    /// Address of the host.
    pub address: Ipv4Addr,
}

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Host of the target.
    pub host: usize,
    /// Port of the target.
    pub port: u16,
}

/// Everything of a simulation that does not change.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Addresses of all hosts.
    pub hosts: Vec<Ipv4Addr>,
    /// The servers.
    pub servers: Vec<Member>,
    /// The agents.
    pub agents: Vec<Member>,
    /// The targets.
    pub targets: Vec<Target>,
    /// Room of a TCP connection.
    pub window: usize,
    /// Largest IP packet on every path. It stays: a tunnel that has found a larger one takes minutes to
    /// find out that its packets vanish, in which its connections wait.
    pub mtu: usize,
    /// Configured time of a dial, in nanoseconds.
    pub dial_timeout: u64,
    shards: usize,
    tunnels: u8,
    keeps_state: bool,
    drain: u64,
    /// Time in seconds for which a connection waits for another tunnel.
    resume: u64,
}

fn server_name(index: usize) -> String {
    format!("s{index}")
}

fn agent_name(index: usize) -> String {
    format!("w{index}")
}

fn agent_address(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, 1 + index as u8)
}

/// Makes the certificates of all members that a simulation may have.
///
/// # Errors
/// A file can't be written.
pub fn pki() -> Result<Pki> {
    let servers: Vec<_> = (0..MAX_SERVERS).map(server_name).collect();
    let agents = (0..MAX_AGENTS).map(|index| (agent_name(index), agent_address(index)));
    let pki = Pki::new(&servers, &agents.collect::<Vec<_>>())?;
    for name in servers {
        // Of one content: keys of connection ids would else differ from run to run.
        let state = pki.directory().join(format!("{name}.state"));
        std::fs::create_dir(&state)?;
        std::fs::write(state.join("secret"), [7; 32])?;
    }
    Ok(pki)
}

impl Topology {
    /// Chooses the members and their parameters.
    pub fn new(random: &mut Random) -> Self {
        let mut hosts = vec![STRANGER];
        let mut member = |name, address| {
            hosts.push(address);
            Member {
                name,
                host: hosts.len() - 1,
                address,
            }
        };
        let (servers, agents) = (random.between(1, 2), random.between(1, 3));
        let server = |index| Ipv4Addr::new(10, 0, 0, 1 + index as u8);
        let servers: Vec<_> = (0..servers as usize)
            .map(|index| member(server_name(index), server(index)))
            .collect();
        let agents: Vec<_> = (0..agents as usize)
            .map(|index| member(agent_name(index), agent_address(index)))
            .collect();
        let nodes = agents.iter().map(|agent| agent.host);
        let mut targets: Vec<_> = nodes.map(|host| Target { host, port: PORT }).collect();
        for address in [SHARED, UNGRANTED, DENIED, UNSERVED] {
            hosts.push(address);
            targets.push(Target {
                host: hosts.len() - 1,
                port: PORT,
            });
        }
        Self {
            hosts,
            servers,
            agents,
            targets,
            window: random.pick(&[2 << 10, 16 << 10, 64 << 10, 256 << 10]),
            mtu: random.pick(&[1500, 1500, 1500, 1280, 9000]),
            dial_timeout: random.pick(&[3, 10, 10]) * SECOND,
            shards: random.pick(&[1, 1, 2, 3]),
            tunnels: random.pick(&[1, 1, 1, 2]),
            keeps_state: random.chance(1, 2),
            drain: random.pick(&[1, 5, 15]),
            resume: random.pick(&[0, 3, 12, 12]),
        }
    }

    /// Returns the host of an address.
    pub fn host_of(&self, address: Ipv4Addr) -> Option<usize> {
        self.hosts.iter().position(|it| *it == address)
    }

    /// Whether the agent at `from` may dial `to`.
    pub fn may_serve(&self, from: Ipv4Addr, to: SocketAddrV4) -> bool {
        let is_agent = self.agents.iter().any(|agent| agent.address == from);
        is_agent && to.port() == PORT && (*to.ip() == from || *to.ip() == SHARED)
    }

    /// Returns the destinations that are served once all agents are connected.
    pub fn served(&self) -> Vec<SocketAddrV4> {
        self.claimed(PORT)
    }

    /// Returns destinations that are served, and where no program listens.
    pub fn refusing(&self) -> Vec<SocketAddrV4> {
        self.claimed(REFUSING)
    }

    fn claimed(&self, port: u16) -> Vec<SocketAddrV4> {
        let nodes = self.agents.iter().map(|agent| agent.address);
        let all = nodes.chain([SHARED]);
        all.map(|address| SocketAddrV4::new(address, port))
            .collect()
    }

    /// Returns the number of tunnels at each server once all agents are connected.
    pub fn tunnels(&self) -> usize {
        self.agents.len() * usize::from(self.tunnels)
    }

    /// Returns destinations that no dial may reach.
    pub fn unserved(&self) -> Vec<SocketAddrV4> {
        let hosts = [UNGRANTED, DENIED, UNSERVED, Ipv4Addr::new(10, 6, 0, 1)];
        hosts.map(|address| SocketAddrV4::new(address, PORT)).into()
    }

    /// State of a target until it knows its request.
    pub fn until_header(&self) -> Script {
        Script {
            send: 0,
            start: 0,
            rest: 0,
            write: 1,
            stall_at: 0,
            stall: 0,
            abort_at: None,
            waits: true,
        }
    }

    /// Returns the configuration of a server.
    pub fn server_config(&self, shared: &Shared, index: usize) -> ServerConfig {
        let Member { name, address, .. } = &self.servers[index];
        let mut config = shared.server.clone();
        config.listen = SocketAddr::from((*address, TUNNEL_PORT));
        config.server_count = self.servers.len() as u32;
        config.shards = self.shards;
        config.admin = SERVER_ADMIN.into();
        config.state_dir = shared.pki.directory().join(format!("{name}.state"));
        config.tls = shared.pki.tls(name);
        config.limits.dial_timeout = Duration::from_nanos(self.dial_timeout);
        config.limits.drain = Duration::from_secs(self.drain);
        config.limits.resume = Duration::from_secs(self.resume);
        // Failed dials must not hide the invariants behind an open breaker.
        config.limits.breaker_failures = 0;
        config.policy.grants = vec![GrantConfig {
            identity: format!("spiffe://{DOMAIN}/agent/*"),
            cidrs: vec![net(SHARED), net(DENIED)],
            ..GrantConfig::default()
        }];
        config
    }

    /// Returns the configuration of the agent's process number `run`, which may start while an earlier one
    /// drains.
    pub fn agent_config(
        &self,
        shared: &Shared,
        index: usize,
        run: u16,
        state: &Path,
    ) -> AgentConfig {
        let Member { name, address, .. } = &self.agents[index];
        let mut config = shared.agent.clone();
        let servers = self.servers.iter();
        let servers = servers.map(|it| format!("{}:{TUNNEL_PORT}", it.address).into());
        config.servers = servers.collect();
        config.tls = shared.pki.tls(name);
        config.admin = agent_admin(run).into();
        config.shards = self.shards;
        config.tunnels = self.tunnels;
        config.state_dir = self.keeps_state.then(|| state.join(name));
        config.serve = ServeConfig {
            cidrs: vec![net(SHARED), net(DENIED), net(UNGRANTED)],
            ..ServeConfig::default()
        };
        let allow = |address| {
            AllowRule::Addresses(Rule {
                cidr: net(address),
                ports: vec![PortRange::one(PORT), PortRange::one(REFUSING)],
            })
        };
        config.allow = Some(vec![allow(*address), allow(SHARED), allow(UNGRANTED)]);
        config.limits.drain = Some(Duration::from_secs(self.drain));
        config.limits.resume = Duration::from_secs(self.resume);
        config
    }
}

/// Address of the pages of a server.
pub const SERVER_ADMIN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8135);

/// Returns the address of the pages of an agent's process.
pub fn agent_admin(run: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9000 + run)
}

fn net(address: Ipv4Addr) -> IpNet {
    Ipv4Net::from(address).into()
}
