//! The description of a laboratory, in JSON: for scripts, and for later invocations of `cargo xtask
//! lab`.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Lab;
use super::address::KUBELET_PORT;
use super::site::Site;
use crate::target::Behaviour;

/// A laboratory.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Description {
    /// Id, which is in the names of all its parts.
    pub id: String,
    /// Folder of its certificates, configuration, logs and sockets.
    pub folder: PathBuf,
    /// The control-plane host.
    pub control_plane: ControlPlane,
    /// The NAT router's namespace; from here workers are reached directly.
    pub router: Router,
    /// The workers.
    pub workers: Vec<Worker>,
    /// Certificates of the cluster, for the connections inside the tunnel.
    pub cluster: Cluster,
}

/// The control-plane host.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ControlPlane {
    /// Name of its network namespace, below `/run/netns`.
    pub netns: String,
    /// The control group whose sockets are redirected.
    pub cgroup: PathBuf,
    /// The servers.
    pub servers: Vec<Server>,
}

/// A server.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Server {
    /// Server id.
    pub id: String,
    /// Process id; null when it does not run.
    pub pid: Option<i32>,
    /// Address for agents (UDP).
    pub address: SocketAddr,
    /// Admin HTTP, in the control plane's namespace.
    pub admin: SocketAddr,
    /// The ways in.
    pub frontends: Frontends,
    /// Configuration file.
    pub config: PathBuf,
    /// Log file.
    pub log: PathBuf,
}

/// The ways into a server.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Frontends {
    /// HTTP CONNECT on a Unix socket.
    pub connect_unix: PathBuf,
    /// HTTP CONNECT on TCP, with a client certificate.
    pub connect_tcp: SocketAddr,
    /// Addresses for redirected connections; empty without a redirect.
    pub redirect: Vec<SocketAddr>,
}

/// The NAT router.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Router {
    /// Name of its network namespace.
    pub netns: String,
}

/// A worker.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Worker {
    /// Name.
    pub name: String,
    /// Name of its network namespace.
    pub netns: String,
    /// IPv4 node address.
    pub node_address: IpAddr,
    /// All its node addresses.
    pub node_addresses: Vec<IpAddr>,
    /// Addresses of pods on it; they serve the same as the node addresses.
    pub pod_addresses: Vec<IpAddr>,
    /// The agent's process id; null when it is not running.
    pub agent_pid: Option<i32>,
    /// The agent's admin HTTP, in the worker's namespace.
    pub agent_admin: Option<SocketAddr>,
    /// The agent's log.
    pub agent_log: Option<PathBuf>,
    /// TCP ports by their server.
    pub ports: BTreeMap<String, u16>,
}

/// The cluster's own certificates.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Cluster {
    /// The authority that signed the kubelets' certificates.
    pub ca: PathBuf,
    /// The API server's client certificate, which the kubelets accept.
    pub client_cert: PathBuf,
    /// Key of the certificate.
    pub client_key: PathBuf,
}

impl Description {
    pub(super) fn of(lab: &Lab) -> Self {
        let servers = lab.control_plane.servers.iter().map(|server| Server {
            id: server.daemon.name.clone(),
            pid: server.daemon.pid().map(nix::unistd::Pid::as_raw),
            address: server.sockets.tunnel,
            admin: server.sockets.admin,
            frontends: Frontends {
                connect_unix: server.sockets.connect_unix.clone(),
                connect_tcp: server.sockets.connect_tcp,
                redirect: server.sockets.redirect.clone(),
            },
            config: server.daemon.config_file(),
            log: server.daemon.log_file(),
        });
        let ports = Behaviour::ALL.map(|it| (it.name().to_owned(), it.port()));
        let ports = ports
            .into_iter()
            .chain([("kubelet".to_owned(), KUBELET_PORT)]);
        let ports: BTreeMap<_, _> = ports.collect();
        let workers = lab.workers.iter().map(|worker| Worker {
            name: worker.name.clone(),
            netns: worker.netns.name().to_owned(),
            node_address: worker.node_addresses()[0],
            node_addresses: worker.node_addresses().into(),
            pod_addresses: worker.pod_addresses().into(),
            agent_pid: worker
                .agent
                .as_ref()
                .and_then(|it| Some(it.pid()?.as_raw())),
            agent_admin: worker.agent.as_ref().map(|it| it.admin),
            agent_log: worker.agent.as_ref().map(|it| it.log_file()),
            ports: ports.clone(),
        });
        Self {
            id: lab.site.id().to_owned(),
            folder: lab.site.folder().to_owned(),
            control_plane: ControlPlane {
                netns: lab.control_plane.netns.name().to_owned(),
                cgroup: lab.control_plane.apiserver.path().to_owned(),
                servers: servers.collect(),
            },
            router: Router {
                netns: lab.router.netns.name().to_owned(),
            },
            workers: workers.collect(),
            cluster: Cluster {
                ca: lab.cluster_pki.ca(),
                client_cert: lab.cluster_pki.client_cert(),
                client_key: lab.cluster_pki.client_key(),
            },
        }
    }

    pub(super) fn write(&self, site: &Site) -> Result<()> {
        let file = Self::file(site);
        fs::write(&file, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// Reads the description of the laboratory at `site`.
    ///
    /// # Errors
    ///
    /// It was never finished.
    pub fn read(site: &Site) -> Result<Self> {
        let file = Self::file(site);
        let text = fs::read(&file).with_context(|| {
            format!(
                "laboratory {} was never finished: no {}",
                site.id(),
                file.display()
            )
        })?;
        serde_json::from_slice(&text).with_context(|| format!("cannot read {}", file.display()))
    }

    fn file(site: &Site) -> PathBuf {
        site.folder().join("lab.json")
    }
}
