//! The connector's certificates and configuration in the laboratory.
//!
//! Configuration is a [`Value`], so that a test can change any of it in one line before it starts
//! what reads it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Error, Result};
use serde_json::{Value, json};

use super::address::{self, TUNNEL_PORT};
use super::netns::run;

/// The trust domain of every laboratory.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// Addresses at which a server accepts redirected connections, one for each family.
pub const REDIRECT_LISTENERS: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8137),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 8137),
];
/// Ports on a worker that its agent may dial: the kubelet's and the targets'.
pub const WORKER_PORTS: [&str; 2] = ["10250", "7001-7007"];

/// Destinations that agents may dial beyond their own worker: `CIDR:PORTS`, where PORTS is a list
/// such as `22,8000-8100`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allow {
    cidr: String,
    ports: Vec<String>,
}

impl FromStr for Allow {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let form = || format!("{text:?} is not CIDR:PORTS, as in 10.99.1.0/24:22,8000-8100");
        let (cidr, ports) = text.rsplit_once(':').with_context(form)?;
        let ports: Vec<_> = ports.split(',').map(str::to_owned).collect();
        let is_port = |port: &str| port.parse::<u16>().is_ok();
        let is_range = |range: &str| {
            range
                .split_once('-')
                .map_or(is_port(range), |(from, to)| is_port(from) && is_port(to))
        };
        (cidr.contains('/') && ports.iter().all(|range| is_range(range)))
            .then_some(())
            .with_context(form)?;
        Ok(Self {
            cidr: cidr.to_owned(),
            ports,
        })
    }
}

/// The connector's certificate authority, driven through `cpc pki`.
#[derive(Clone, Debug)]
pub struct ConnectorPki {
    cpc: PathBuf,
    folder: PathBuf,
}

impl ConnectorPki {
    /// Creates the authority in `folder`.
    ///
    /// # Errors
    ///
    /// What `cpc` says.
    pub fn create(cpc: &Path, folder: PathBuf) -> Result<Self> {
        let pki = Self {
            cpc: cpc.to_owned(),
            folder,
        };
        pki.run("init", &["--trust-domain", TRUST_DOMAIN])?;
        Ok(pki)
    }

    /// Returns the authority that exists in `folder`.
    pub fn at(cpc: &Path, folder: PathBuf) -> Self {
        Self {
            cpc: cpc.to_owned(),
            folder,
        }
    }

    /// Runs `cpc pki SUBCOMMAND --dir <the authority's>`.
    ///
    /// # Errors
    ///
    /// What `cpc` says.
    pub fn run(&self, subcommand: &str, arguments: &[&str]) -> Result<()> {
        let mut cpc = Command::new(&self.cpc);
        cpc.args(["pki", subcommand, "--dir"])
            .arg(&self.folder)
            .args(arguments);
        run(&mut cpc, "")
    }
}

/// Addresses of server `k`.
#[derive(Clone, Debug)]
pub struct ServerSockets {
    /// Address for agents, UDP.
    pub tunnel: SocketAddr,
    /// Status and metrics.
    pub admin: SocketAddr,
    /// HTTP CONNECT on a Unix socket.
    pub connect_unix: PathBuf,
    /// HTTP CONNECT on TCP, with client certificates.
    pub connect_tcp: SocketAddr,
    /// Addresses for redirected connections; empty without a redirect.
    pub redirect: Vec<SocketAddr>,
}

impl ServerSockets {
    /// Returns those of server `k` (from 1) of a laboratory; the servers share the loopback
    /// address.
    pub fn of_server(k: u8, folder: &Path) -> Self {
        let shift = 10 * (u16::from(k) - 1);
        Self {
            tunnel: (address::server(k), TUNNEL_PORT).into(),
            admin: ([127, 0, 0, 1], 8135 + shift).into(),
            connect_unix: folder.join("connect.sock"),
            connect_tcp: ([127, 0, 0, 1], 8131 + shift).into(),
            redirect: Vec::new(),
        }
    }
}

/// Redirect of a server's configuration.
#[derive(Clone, Debug)]
pub struct Redirect {
    /// Folder of the pinned programs and maps.
    pub pin: PathBuf,
    /// The control group whose sockets are redirected.
    pub cgroup: PathBuf,
}

/// Returns the configuration of a server whose certificate is in `folder`.
pub fn server(
    folder: &Path,
    sockets: &ServerSockets,
    server_count: u8,
    redirect: Option<&Redirect>,
    workers: u8,
) -> Value {
    let grants: Vec<_> = (1..=workers)
        .map(|n| {
            json!({
                "identity": format!("spiffe://{TRUST_DOMAIN}/agent/w{n}"),
                "cidrs": address::pod_networks(n),
            })
        })
        .collect();
    let mut config = json!({
        "version": 1,
        "listen": sockets.tunnel,
        "server_count": server_count,
        "state_dir": folder.join("state"),
        "tls": {"cert": "server.crt", "key": "server.key", "ca": "ca.crt"},
        "policy": {"grants": grants},
        "frontends": {"http_connect": [
            {"unix": sockets.connect_unix, "mode": "0660"},
            {
                "tcp": sockets.connect_tcp,
                "cert": "server.crt",
                "key": "server.key",
                "client_ca": "ca.crt",
            },
        ]},
        "admin": sockets.admin,
    });
    if let Some(redirect) = redirect {
        let capture: Vec<_> = address::WORKER_NETWORKS
            .map(|cidr| json!({"cidr": cidr}))
            .into();
        config["redirect"] = json!({
            "pin": redirect.pin,
            "attachments": [{
                "name": "kube-apiserver",
                "cgroup": redirect.cgroup,
                "listen": sockets.redirect,
                "capture": capture,
            }],
        });
    }
    config
}

/// Returns the configuration of the agent on worker `n`, which dials `servers`.
pub fn agent(n: u8, servers: &[SocketAddr], allow: &[Allow]) -> Value {
    let own = address::nodes(n)
        .map(host_network)
        .into_iter()
        .chain(address::pod_networks(n));
    let allow: Vec<_> = own
        .map(|cidr| json!({"cidr": cidr, "ports": WORKER_PORTS}))
        .chain(
            allow
                .iter()
                .map(|allow| json!({"cidr": allow.cidr, "ports": allow.ports})),
        )
        .collect();
    json!({
        "version": 1,
        "servers": servers,
        "tls": {"cert": "agent.crt", "key": "agent.key", "ca": "ca.crt"},
        "serve": {"cidrs": address::pod_networks(n)},
        "allow": allow,
        "admin": "127.0.0.1:8136",
    })
}

fn host_network(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allow_is_a_network_and_ports() {
        let allow: Allow = "fd00:99::/32:22,8000-8100".parse().unwrap();
        assert_eq!(allow.cidr, "fd00:99::/32");
        assert_eq!(allow.ports, ["22", "8000-8100"]);
        for wrong in [
            "10.0.0.1",
            "10.0.0.0/8",
            "10.0.0.0/8:",
            "10.0.0.0/8:http",
            "10.1.2.3:80",
        ] {
            assert!(wrong.parse::<Allow>().is_err(), "{wrong}");
        }
    }
}
