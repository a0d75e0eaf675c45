//! Adds the connector to a laboratory: certificates, configuration, servers, agents.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Lab;
use super::address;
use super::config::{self, ConnectorPki, ServerSockets};
use super::daemon::{Daemon, Role};
use super::server::Server;

/// Time for servers and agents to find each other.
const READY: Duration = Duration::from_secs(15);

impl Lab {
    /// Issues the certificates, starts the servers and agents, and waits until each agent has a
    /// tunnel to each server.
    ///
    /// # Errors
    ///
    /// One of them did not start or was not ready in time; the error has the end of its log.
    pub fn start_connector(&mut self) -> Result<()> {
        self.configure_connector()?;
        self.start_configured()
    }

    /// Starts the servers and agents with the configuration that they have, and waits until each
    /// is ready.
    ///
    /// # Errors
    ///
    /// As [`Self::start_connector`].
    pub fn start_configured(&mut self) -> Result<()> {
        for server in &mut self.control_plane.servers {
            server.daemon.start()?;
        }
        for worker in &mut self.workers {
            worker.agent()?.start()?;
        }
        let [workers, servers] = [self.spec.workers, self.spec.servers].map(usize::from);
        for worker in &mut self.workers {
            let agent = worker.agent()?;
            agent.wait_ready(READY)?;
            agent.wait_status(READY, |status| {
                live(status, "servers", "server_id") == servers
            })?;
        }
        for server in &mut self.control_plane.servers {
            server.daemon.wait_ready(READY)?;
            let all = |status: &Value| live(status, "agents", "identity") == workers;
            server.daemon.wait_status(READY, all)?;
        }
        self.describe().write(&self.site)
    }

    /// Issues the certificates and writes the configuration of servers and agents, but starts
    /// none: for tests that [change](Daemon::configure) it first.
    ///
    /// # Errors
    ///
    /// What `cpc pki` says, or a file can't be written.
    pub fn configure_connector(&mut self) -> Result<()> {
        let pki = ConnectorPki::create(&self.spec.programs.cpc, self.site.subfolder("pki")?)?;
        self.control_plane.servers = (1..=self.spec.servers)
            .map(|k| self.server(&pki, k))
            .collect::<Result<_>>()?;
        let servers = self.control_plane.servers.iter();
        let servers: Vec<_> = servers.map(|server| server.sockets.tunnel).collect();
        let agents: Vec<_> = (1..=self.spec.workers)
            .map(|n| self.agent(&pki, n, &servers))
            .collect::<Result<_>>()?;
        for (worker, agent) in self.workers.iter_mut().zip(agents) {
            worker.agent = Some(agent);
        }
        self.connector_pki = Some(pki);
        Ok(())
    }

    fn choose_engine(&self, config: &mut Value) {
        if let Some(engine) = self.spec.engine {
            config["datapath"] = json!({"engine": engine.name()});
        }
    }

    fn server(&self, pki: &ConnectorPki, k: u8) -> Result<Server> {
        let id = format!("s{k}");
        let folder = self.site.subfolder(&id)?;
        let out = folder.to_str().context("the folder's name is not UTF-8")?;
        let address = address::server(k).to_string();
        let addresses = ["--ip", &address, "--ip", "127.0.0.1"];
        pki.run(
            "server",
            &[&["--id", &id, "--out", out], &addresses[..]].concat(),
        )?;
        let mut sockets = ServerSockets::of_server(k, &folder);
        let redirect = self.redirect.as_ref().filter(|_| k == 1);
        if redirect.is_some() {
            sockets.redirect = config::REDIRECT_LISTENERS.into();
        }
        let (servers, workers) = (self.spec.servers, self.spec.workers);
        let mut config = config::server(&folder, &sockets, servers, redirect, workers);
        self.choose_engine(&mut config);
        let place = Some((
            self.control_plane.netns.clone(),
            self.site.cgroup("servers")?,
        ));
        let cpc = &self.spec.programs.cpc;
        let daemon = Daemon::new(Role::Server, &id, cpc, folder, place, config)?;
        Ok(Server { daemon, sockets })
    }

    fn agent(&self, pki: &ConnectorPki, n: u8, servers: &[SocketAddr]) -> Result<Daemon> {
        let name = format!("w{n}");
        let folder = self.site.subfolder(&format!("{name}/agent"))?;
        let out = folder.to_str().context("the folder's name is not UTF-8")?;
        let [node, node_v6] = address::nodes(n).map(|address| address.to_string());
        let addresses = ["--ip", &node, "--ip", &node_v6];
        pki.run(
            "agent",
            &[&["--node", &name, "--out", out], &addresses[..]].concat(),
        )?;
        let mut config = config::agent(n, servers, &self.spec.allow);
        self.choose_engine(&mut config);
        let place = Some((self.site.netns(&name), self.site.cgroup("agents")?));
        let cpc = &self.spec.programs.cpc;
        Daemon::new(Role::Agent, &name, cpc, folder, place, config)
    }
}

/// Returns how many of the rows called `of` in a status, by their name in `by`, are live. Each may
/// have several tunnels.
fn live(status: &Value, of: &str, by: &str) -> usize {
    let rows = status[of].as_array().into_iter().flatten();
    let live = rows.filter(|row| row["state"] == "live");
    let names = live.filter_map(|row| row[by].as_str());
    names.collect::<HashSet<_>>().len()
}
