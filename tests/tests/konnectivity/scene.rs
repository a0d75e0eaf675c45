//! A laboratory with room for stand-ins: certificates that a cluster would have, a place for them
//! in each namespace, and the connector configured for Konnectivity but not started.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tonic::metadata::MetadataMap;
use tonic::transport::{ClientTlsConfig, ServerTlsConfig};
use tunnel_tests::client::eventually;
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::puppet::Puppet;
use tunnel_tests::target::Behaviour;

use crate::authority::{Authority, Credentials};
use crate::client::{Client, metadata};
use crate::legacy_agent::{self, LegacyAgent};
use crate::place::Place;
use crate::program::{Maker, Program};
use crate::script::{SOON, Script};
use crate::script_agent::ScriptAgent;
use crate::script_server::ScriptServer;
use crate::wire::PROXY;

/// Address for agents.
pub(crate) const AGENTS: u16 = 8091;
/// Address for gRPC clients with certificates.
pub(crate) const GRPC: u16 = 8090;
/// Ports of the pages of the peer's server and agent.
const SERVER_HEALTH: u16 = 8092;
const AGENT_HEALTH: u16 = 8093;

/// A laboratory. What is in it ends with it.
pub(crate) struct Scene {
    pub(crate) control_plane: Place,
    /// Worker `n` is at index `n - 1`.
    pub(crate) workers: Vec<Place>,
    pub(crate) authority: Authority,
    /// For a server at any of its addresses.
    pub(crate) server: Credentials,
    /// For an agent called `agent`.
    pub(crate) agent: Credentials,
    pub(crate) lab: Lab,
}

impl Scene {
    /// Builds it; nothing of the connector's runs yet.
    pub(crate) fn new(workers: u8) -> Result<Self> {
        let mut lab = Lab::without_connector(LabSpec {
            workers,
            servers: 1,
            allow: vec![Puppet::allow()?],
            redirect: false,
            engine: None,
            programs: Programs::of_this_test()?,
        })?;
        lab.configure_connector()?;
        let authority = Authority::create(lab.folder().join("konnectivity"))?;
        let addresses: [IpAddr; 3] = [
            address::server(1).into(),
            address::server_v6(1).into(),
            Ipv4Addr::LOCALHOST.into(),
        ];
        let scene = Self {
            control_plane: Place::new(&lab.control_plane.netns)?,
            workers: lab
                .workers
                .iter()
                .map(|worker| Place::new(&worker.netns))
                .collect::<Result<_>>()?,
            server: authority.issue("server", &addresses)?,
            agent: authority.issue("agent", &[])?,
            authority,
            lab,
        };
        Ok(scene)
    }

    /// One with a server that takes Konnectivity's agents and believes them, and serves clients in
    /// every way; `change` may change its configuration before it is started.
    pub(crate) fn with_server(workers: u8, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let mut scene = Self::new(workers)?;
        scene.configure_server(change)?;
        scene.cpc_server().start()?;
        let socket = scene.grpc();
        let frontend = || std::os::unix::net::UnixStream::connect(&socket);
        let listens = eventually(SOON, || frontend().context("no gRPC frontend"));
        listens.with_context(|| scene.cpc_server().log())?;
        Ok(scene)
    }

    /// Lets the server's configuration speak of Konnectivity.
    pub(crate) fn configure_server(&mut self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let (unix, server) = (self.grpc(), self.server.clone());
        self.cpc_server().configure(|config| {
            config["server_id"] = json!("s1");
            config["frontends"]["grpc"] = json!([
                {"unix": unix, "mode": "0660"},
                {
                    "tcp": format!("127.0.0.1:{GRPC}"),
                    "cert": server.cert,
                    "key": server.key,
                    "client_ca": server.ca,
                },
            ]);
            config["konnectivity"] = json!({
                "listen": format!("0.0.0.0:{AGENTS}"),
                "cert": server.cert,
                "key": server.key,
                "client_ca": server.ca,
                "believe_identifiers": true,
                "server_ids": 1,
            });
            change(config);
        })
    }

    /// The server's process.
    pub(crate) fn cpc_server(&mut self) -> &mut Daemon {
        &mut self.lab.control_plane.servers[0].daemon
    }

    /// The socket of its gRPC frontend.
    pub(crate) fn grpc(&self) -> PathBuf {
        self.lab.folder().join("grpc.sock")
    }

    /// The socket of its HTTP CONNECT frontend.
    pub(crate) fn connect(&self) -> PathBuf {
        self.lab.control_plane.servers[0]
            .sockets
            .connect_unix
            .clone()
    }

    /// A stand-in for the agent of worker `n`, and its command line; it offers the addresses of
    /// its worker.
    pub(crate) fn agent_options(&self, n: u8) -> Result<legacy_agent::Options> {
        let [v4, v6] = address::nodes(n);
        Ok(legacy_agent::Options {
            server: agents().to_string(),
            tls: self.agent.client()?,
            id: format!("legacy-{n}"),
            identifiers: format!(
                "ipv4={v4}&ipv6={}&host=w{n}",
                v6.to_string().replace(':', "%3A")
            ),
            token: None,
            interval: Duration::from_millis(200),
        })
    }

    /// Starts the stand-in for the agent of worker `n`.
    pub(crate) fn legacy_agent(&self, n: u8) -> Result<LegacyAgent> {
        let options = self.agent_options(n)?;
        Ok(LegacyAgent::start(
            &self.workers[usize::from(n) - 1],
            options,
        ))
    }

    /// Starts a program that is called as the peer's server. Its socket for clients is
    /// [`Self::frontend`].
    pub(crate) fn proxy_server(&self, maker: &Maker, mode: &str, more: &[&str]) -> Result<Program> {
        self.proxy_server_at(maker, mode, ("proxy-server", SERVER_HEALTH), more)
    }

    /// The same with a log and a health port of its own. What else two servers can't share `more`
    /// has to say.
    pub(crate) fn proxy_server_at(
        &self,
        maker: &Maker,
        mode: &str,
        (name, health): (&str, u16),
        more: &[&str],
    ) -> Result<Program> {
        let file = |path: &PathBuf| path.display().to_string();
        let mut flags = vec![
            format!("--mode={mode}"),
            format!("--uds-name={}", file(&self.frontend(mode))),
            "--server-port=0".to_owned(),
            format!("--agent-port={AGENTS}"),
            format!("--health-port={health}"),
            format!("--cluster-cert={}", file(&self.server.cert)),
            format!("--cluster-key={}", file(&self.server.key)),
            format!("--cluster-ca-cert={}", file(&self.server.ca)),
            "--server-id=legacy-server".to_owned(),
            "--proxy-strategies=destHost,default".to_owned(),
        ];
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        let netns = &self.lab.control_plane.netns;
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, health));
        let names = ("proxy-server", name);
        Program::start(&self.lab, netns, maker, names, health, &flags)
    }

    /// The socket of a [`Self::proxy_server`] in this mode.
    pub(crate) fn frontend(&self, mode: &str) -> PathBuf {
        self.lab.folder().join(format!("{mode}.sock"))
    }

    /// Starts a program that is called as the peer's agent, on worker `n`.
    pub(crate) fn proxy_agent(&self, maker: &Maker, n: u8, more: &[&str]) -> Result<Program> {
        self.proxy_agent_at(maker, n, AGENT_HEALTH, more)
    }

    /// The same with a health port of its own, for two on one worker. The port of the other pages
    /// `more` has to say.
    pub(crate) fn proxy_agent_at(
        &self,
        maker: &Maker,
        n: u8,
        health: u16,
        more: &[&str],
    ) -> Result<Program> {
        let file = |path: &PathBuf| path.display().to_string();
        let [v4, v6] = address::nodes(n);
        let mut flags = vec![
            format!("--proxy-server-host={}", address::server(1)),
            format!("--proxy-server-port={AGENTS}"),
            format!("--ca-cert={}", file(&self.agent.ca)),
            format!("--agent-cert={}", file(&self.agent.cert)),
            format!("--agent-key={}", file(&self.agent.key)),
            format!("--agent-id=legacy-{n}"),
            format!("--agent-identifiers=ipv4={v4}&ipv6={v6}&host=w{n}"),
            format!("--health-server-port={health}"),
        ];
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        let netns = &self.lab.workers[usize::from(n) - 1].netns;
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, health));
        let name = format!("proxy-agent-{n}");
        let names = ("proxy-agent", &*name);
        Program::start(&self.lab, netns, maker, names, health, &flags)
    }

    /// Ours.
    pub(crate) fn ours(&self) -> Result<Maker> {
        Maker::ours()
    }
}

/// Returns the address for agents, as a worker sees it.
pub(crate) fn agents() -> SocketAddr {
    (address::server(1), AGENTS).into()
}

/// A target on worker `n`.
pub(crate) fn target(n: u8, behaviour: Behaviour) -> String {
    SocketAddr::from((address::node(n), behaviour.port())).to_string()
}

/// Runs `test` beside our proxy-server, and beside the peer's where there is one: what both are
/// to do, both have to do.
pub(crate) fn each_server(
    mode: &str,
    flags: &[&str],
    test: impl Fn(&Scene, &Maker) -> Result<()>,
) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for maker in Maker::all()? {
        let scene = Scene::new(1)?;
        let mut server = scene.proxy_server(&maker, mode, flags)?;
        let result = server
            .wait_healthy(SOON)
            .and_then(|()| test(&scene, &maker));
        let told = || format!("beside {maker:?}, which said:\n{}", server.log());
        result.with_context(told)?;
    }
    Ok(())
}

impl Scene {
    /// An agent of worker `n` in the test's hands, which has these identifiers; the server has
    /// answered.
    pub(crate) fn script_agent(&self, n: u8, id: &str, identifiers: &str) -> Result<ScriptAgent> {
        let entries = [("agentid", id), ("agentidentifiers", identifiers)];
        let mut agent = self.agent_stream(n, &entries, self.agent.client()?)?;
        agent.headers()?;
        // A server may send its headers before it has told everybody of the agent.
        std::thread::sleep(Duration::from_millis(100));
        Ok(agent)
    }

    /// An agent of worker `n` in the test's hands, with any metadata.
    pub(crate) fn agent_stream(
        &self,
        n: u8,
        entries: &[(&'static str, &str)],
        tls: ClientTlsConfig,
    ) -> Result<ScriptAgent> {
        let place = &self.workers[usize::from(n) - 1];
        let client = place.run(Client::tls(agents().to_string(), tls))?;
        Ok(client.agent(place, metadata(entries)?))
    }

    /// A gRPC client of a [`Self::proxy_server`] in the test's hands.
    pub(crate) fn script_client(&self) -> Result<Script> {
        self.client_at(self.frontend("grpc"))
    }

    /// The same at any Unix socket.
    pub(crate) fn client_at(&self, socket: PathBuf) -> Result<Script> {
        let place = &self.control_plane;
        let client = place.run(Client::unix(socket))?;
        Ok(client.script(place, PROXY, MetadataMap::new(), 1))
    }
}

/// Runs `test` beside our proxy-agent on worker 1, and beside the peer's where there is one. The
/// server is in the test's hands and listens before the agent starts.
pub(crate) fn each_agent(
    flags: &[&str],
    test: impl Fn(&Scene, &Maker, &mut Program, &ScriptServer) -> Result<()>,
) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for maker in Maker::all()? {
        let scene = Scene::new(1)?;
        let server = scene.script_server(scene.server.server()?)?;
        let mut agent = scene.proxy_agent(&maker, 1, flags)?;
        let result = agent
            .wait_healthy(SOON)
            .and_then(|()| test(&scene, &maker, &mut agent, &server));
        let told = || format!("beside {maker:?}, which said:\n{}", agent.log());
        result.with_context(told)?;
    }
    Ok(())
}

impl Scene {
    /// A server in the test's hands, where agents look for it.
    pub(crate) fn script_server(&self, tls: ServerTlsConfig) -> Result<ScriptServer> {
        ScriptServer::start(Place::new(&self.lab.control_plane.netns)?, agents(), tls)
    }
}
