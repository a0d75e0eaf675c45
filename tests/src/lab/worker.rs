//! A worker node: a namespace with the kubelet's stand-in, the plain targets and the agent.

use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::address::{self, KUBELET_PORT};
use super::cgroup::Cgroup;
use super::daemon::Daemon;
use super::kubelet::{self, ClusterPki};
use super::netns::Netns;
use super::process::Process;
use crate::client::eventually;
use crate::target::Behaviour;

/// Host part of the other address of a worker that moves.
const OTHER_HOST: u8 = 3;

/// A worker of a laboratory.
#[derive(Debug)]
pub struct Worker {
    /// `w1`, `w2`, ..
    pub name: String,
    /// Number, from 1, which is in all of its addresses.
    pub number: u8,
    /// Namespace; interface `eth0` leads to the router.
    pub netns: Netns,
    /// Agent, once the connector has been started.
    pub agent: Option<Daemon>,
    programs: Vec<Process>,
}

impl Worker {
    /// Starts the servers of worker `number` in `netns`, which is connected to the router already.
    ///
    /// # Errors
    ///
    /// A server can't be started or does not listen within 5 s.
    pub fn start(
        number: u8,
        netns: Netns,
        cgroup: &Cgroup,
        folder: &Path,
        target: &Path,
        pki: &ClusterPki,
    ) -> Result<Self> {
        let nginx_config = kubelet::configure_worker(pki, folder, number)?;
        let mut programs = Vec::new();
        let mut start = |name: &str, program: &Path, arguments: &[&str]| -> Result<()> {
            let mut command = netns.command(program)?;
            command.args(arguments);
            cgroup.place(&mut command)?;
            let log = folder.join(format!("{name}.log"));
            programs.push(Process::start(name, &mut command, &log)?);
            Ok(())
        };
        start("targets", target, &[])?;
        let nginx_config = nginx_config
            .to_str()
            .context("the folder's name is not UTF-8")?;
        start("nginx", Path::new("nginx"), &["-c", nginx_config])?;
        for program in &mut programs {
            program.check()?;
        }
        let worker = Self {
            name: format!("w{number}"),
            number,
            netns,
            agent: None,
            programs,
        };
        worker.wait_listening()?;
        Ok(worker)
    }

    /// Returns its node addresses, IPv4 first.
    pub fn node_addresses(&self) -> [IpAddr; 2] {
        address::nodes(self.number)
    }

    /// Returns the addresses of a pod on it, IPv4 first.
    pub fn pod_addresses(&self) -> [IpAddr; 2] {
        address::pods(self.number)
    }

    /// Moves it to another address of its network, as DHCP may; its servers keep the node address.
    /// Unbound sockets notice with their next packet.
    ///
    /// # Errors
    ///
    /// What `ip` says.
    pub fn change_address(&self) -> Result<Ipv4Addr> {
        let [a, b, c, _] = address::node(self.number).octets();
        let other = Ipv4Addr::new(a, b, c, OTHER_HOST);
        self.netns.ip(&format!(
            "address add {other}/24 dev eth0\n\
             route replace default via {} src {other}\n",
            address::gateway(self.number),
        ))?;
        Ok(other)
    }

    /// Returns the agent.
    ///
    /// # Errors
    ///
    /// The connector has not been started.
    pub fn agent(&mut self) -> Result<&mut Daemon> {
        self.agent
            .as_mut()
            .with_context(|| format!("{} has no agent yet", self.name))
    }

    pub(super) fn programs(&mut self) -> impl Iterator<Item = &mut Process> {
        self.programs.iter_mut()
    }

    fn wait_listening(&self) -> Result<()> {
        let ports = Behaviour::ALL.map(Behaviour::port);
        for port in ports.into_iter().chain([KUBELET_PORT]) {
            self.netns.enter(|| {
                eventually(Duration::from_secs(5), || {
                    TcpStream::connect(("127.0.0.1", port))
                        .with_context(|| format!("nothing listens on port {port} of {}", self.name))
                })
            })?;
        }
        Ok(())
    }
}
