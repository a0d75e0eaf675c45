//! The control-plane host: the servers and the control group of the API server.

use std::process::Command;

use anyhow::Result;

use super::address;
use super::cgroup::Cgroup;
use super::config::ServerSockets;
use super::daemon::Daemon;
use super::netns::Netns;

/// The control-plane host of a laboratory.
#[derive(Debug)]
pub struct ControlPlane {
    /// Namespace, which has a route to the servers' own network and no other.
    pub netns: Netns,
    /// Control group that stands for kube-apiserver: its sockets are redirected.
    pub apiserver: Cgroup,
    /// The servers, once the connector has been started. They share the authority that issued
    /// their certificates and nothing else; the first has the redirect.
    pub servers: Vec<Server>,
}

/// A server and where it is reached.
#[derive(Debug)]
pub struct Server {
    /// The program.
    pub daemon: Daemon,
    /// Addresses of the server.
    pub sockets: ServerSockets,
}

impl ControlPlane {
    /// Lets `command` start as the API server: in this namespace and in the redirected group.
    ///
    /// # Errors
    ///
    /// The namespace or the group does not exist.
    pub fn place(&self, command: &mut Command) -> Result<()> {
        self.netns.place(command)?;
        self.apiserver.place(command)
    }

    /// Runs `work` as the API server would run it: in this namespace and in the redirected group.
    ///
    /// # Errors
    ///
    /// Those of `work`, or the namespace or group can't be entered.
    pub fn as_apiserver<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.apiserver.join(|| self.netns.enter(work))
    }

    /// Adds a default route to the router, which drops and counts packets for a worker
    /// ([`Router::leaked`]).
    ///
    /// [`Router::leaked`]: super::router::Router::leaked
    ///
    /// # Errors
    ///
    /// What `ip` says.
    pub fn add_ordinary_route(&self) -> Result<()> {
        self.netns.ip(&format!(
            "route add default via {}\nroute add default via {}\n",
            address::ROUTER,
            address::ROUTER_V6,
        ))
    }
}
