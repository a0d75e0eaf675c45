//! The way from Konnectivity to the connector and back, walked while clients go on asking.
//!
//! A request may fail only where it fails with Konnectivity alone: one under way while there was no
//! server at all, or none of its worker's agents. Such a window begins when the old program is
//! ended and ends when the new one reports that it is ready. Outside of them every client must get
//! an answer, and requests for the other worker are answered during an agent's window too. No
//! window of ours may be longer than the peer's own, by more than a second.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunnel_tests::client::eventually;
use tunnel_tests::lab;
use tunnel_tests::load::{Failure, ask_through};
use tunnel_tests::target::Behaviour;

use crate::legacy_agent::LegacyAgent;
use crate::legacy_frontend;
use crate::legacy_server::{self, Frontend, LegacyServer};
use crate::loads::{Loads, Window};
use crate::place::Place;
use crate::program::{Maker, Program};
use crate::scene::{Scene, agents, target};
use crate::script::SOON;

/// Number of agents, or their identifiers, that may be asked.
const READY_BACKENDS: &str = "konnectivity_network_proxy_server_ready_backends";
/// Permitted excess of a window of ours over the peer's.
const SLACK: Duration = Duration::from_secs(1);
/// Timeout of a client's connection: the peer leaves some dials without any answer.
const DIAL: Duration = Duration::from_secs(4);
/// Time of a stopped program for requests under way.
const IN_FLIGHT: Duration = Duration::from_secs(1);

#[test]
fn there_and_back_with_http_connect() -> Result<()> {
    rehearse("http-connect")
}

#[test]
fn there_and_back_with_grpc() -> Result<()> {
    rehearse("grpc")
}

/// A server that may stand where the peer's stands.
enum Server {
    StandIn(LegacyServer),
    Program(Program),
    /// `cpc server`, which the laboratory holds.
    Native,
}

/// An agent that may.
enum Agent {
    StandIn(LegacyAgent),
    Program(Program),
}

struct Rehearsal {
    mode: &'static str,
    /// Ended before the laboratory.
    loads: Loads,
    scene: Scene,
    server: Option<Server>,
    agents: [Option<Agent>; 2],
    windows: Vec<Window>,
}

fn rehearse(mode: &'static str) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(2)?;
    let socket = scene.frontend(mode);
    // The same sockets for every server, whoever made it.
    let (http, grpc) = (scene.frontend("http-connect"), scene.frontend("grpc"));
    scene.configure_server(|config| {
        config["frontends"]["http_connect"] = json!([{"unix": http, "mode": "0770"}]);
        config["frontends"]["grpc"] = json!([{"unix": grpc, "mode": "0770"}]);
    })?;
    let mut rehearsal = Rehearsal {
        mode,
        scene,
        loads: Loads::default(),
        server: None,
        agents: [None, None],
        windows: Vec::new(),
    };
    rehearsal.walk(socket)
}

impl Rehearsal {
    fn walk(&mut self, socket: PathBuf) -> Result<()> {
        let ours = self.scene.ours()?;
        self.server = Some(self.legacy_server()?);
        for n in 1..=2 {
            self.agents[usize::from(n) - 1] = Some(self.legacy_agent(n)?);
        }
        self.wait_agents()?;
        let place = Arc::new(Place::new(&self.scene.lab.control_plane.netns)?);
        for n in 1..=2 {
            let (place, socket, mode) = (place.clone(), socket.clone(), self.mode);
            let ask = move |request: &str| ask(&place, mode, &socket, n, request);
            self.loads.start(&self.scene.lab.control_plane, ask)?;
        }
        self.loads.answered("Konnectivity alone")?;

        // What the peer itself costs.
        let peers = self.replace_server("the peer's server again", Self::legacy_server)?;
        let peers_agent = self.replace_agent(1, "the peer's agent again", Self::legacy_agent)?;

        let maker = ours.clone();
        let proxy_server = move |this: &mut Self| this.program_server(&maker);
        let window = self.replace_server("cpc proxy-server", proxy_server)?;
        compare_windows("cpc proxy-server", window, peers)?;
        for n in 1..=2 {
            let maker = ours.clone();
            let agent = move |this: &mut Self, n: u8| this.program_agent(&maker, n);
            let window = self.replace_agent(n, "cpc proxy-agent", agent)?;
            compare_windows("cpc proxy-agent", window, peers_agent)?;
        }
        let window = self.replace_server("cpc server", Self::native_server)?;
        compare_windows("cpc server", window, peers)?;

        // From here agents overlap: nothing may fail.
        for n in [0, 1] {
            self.scene.lab.workers[n].agent()?.start()?;
            self.scene.lab.workers[n].agent()?.wait_ready(SOON)?;
            self.retire(n)?;
            self.loads.answered("cpc agent")?;
        }
        // And back.
        for n in [0, 1_u8] {
            let agent = self.program_agent(&ours, n + 1)?;
            self.agents[usize::from(n)] = Some(agent);
            self.wait_agents()?;
            self.scene.lab.workers[usize::from(n)]
                .agent()?
                .terminate()?;
            self.loads.answered("cpc proxy-agent again")?;
        }
        let window = self.replace_server("back to the peer's server", Self::legacy_server)?;
        compare_windows("back to the peer's server", window, peers)?;
        for n in 1..=2 {
            let window = self.replace_agent(n, "back to the peer's agent", Self::legacy_agent)?;
            compare_windows("back to the peer's agent", window, peers_agent)?;
        }
        self.loads.judge(self.mode, &self.windows)
    }

    /// Ends the server and starts another one; gives how long there was none with its agents.
    fn replace_server(
        &mut self,
        what: &str,
        start: impl FnOnce(&mut Self) -> Result<Server>,
    ) -> Result<Duration> {
        let begin = Instant::now();
        match self.server.take() {
            Some(Server::StandIn(server)) => drop(server),
            Some(Server::Program(mut server)) => server.kill()?,
            Some(Server::Native) => self.scene.cpc_server().kill()?,
            None => (),
        }
        self.server = Some(start(self).with_context(|| what.to_owned())?);
        self.wait_agents().with_context(|| what.to_owned())?;
        self.window(begin, None, what)
    }

    /// Ends the agent of worker `n` and starts another one.
    fn replace_agent(
        &mut self,
        n: u8,
        what: &str,
        start: impl FnOnce(&mut Self, u8) -> Result<Agent>,
    ) -> Result<Duration> {
        let begin = Instant::now();
        let index = usize::from(n) - 1;
        match self.agents[index].take() {
            Some(Agent::StandIn(agent)) => drop(agent),
            Some(Agent::Program(mut agent)) => agent.kill()?,
            None => (),
        }
        let agent = start(self, n).with_context(|| what.to_owned())?;
        self.agents[index] = Some(agent);
        self.wait_agents().with_context(|| what.to_owned())?;
        self.window(begin, Some(n), what)
    }

    /// Lets an agent drain and ends it when nothing can be under way.
    fn retire(&mut self, index: usize) -> Result<()> {
        match self.agents[index].take() {
            Some(Agent::Program(mut agent)) => {
                agent.signal(Signal::SIGTERM)?;
                std::thread::sleep(IN_FLIGHT);
                agent.signal(Signal::SIGTERM)?;
                agent.wait(SOON)
            }
            Some(Agent::StandIn(agent)) => {
                agent.drain();
                std::thread::sleep(IN_FLIGHT);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn window(&mut self, start: Instant, worker: Option<u8>, what: &str) -> Result<Duration> {
        let end = Instant::now();
        self.windows.push(Window { start, end, worker });
        println!("{}: {what} took {:?}", self.mode, end - start);
        self.loads.answered(what)?;
        Ok(end - start)
    }

    /// Every agent that runs has found the server, and the server has found it.
    fn wait_agents(&mut self) -> Result<()> {
        let running = self.agents.iter().flatten().count();
        match &self.server {
            Some(Server::StandIn(server)) => drop(server.wait_agents(running)?),
            Some(Server::Program(server)) => eventually(SOON, || {
                let (_, metrics) = server.get("/metrics")?;
                // The peer counts identifiers, of which each agent has three; ours counts agents.
                let told = [running, 3 * running].iter().any(|count| {
                    let line = format!("{READY_BACKENDS}{{proxy_strategy=\"destHost\"}} {count}\n");
                    metrics.contains(&line)
                });
                ensure!(told, "not {running} agents:\n{metrics}");
                Ok(())
            })?,
            Some(Server::Native) => {
                let streams = |status: &Value| status["agents"].as_array().map_or(0, Vec::len);
                let server = &self.scene.lab.control_plane.servers[0].daemon;
                server.wait_status(SOON, |status| streams(status) >= running)?;
            }
            None => (),
        }
        for agent in self.agents.iter_mut().flatten() {
            match agent {
                Agent::StandIn(agent) => agent.wait_any()?,
                Agent::Program(agent) => agent.wait_ready(SOON)?,
            }
        }
        Ok(())
    }

    fn legacy_server(&mut self) -> Result<Server> {
        if let Some(peer) = Maker::peer() {
            return self.program_server(&peer);
        }
        let socket = self.scene.frontend(self.mode);
        let options = legacy_server::Options {
            id: "legacy-server".to_owned(),
            count: 1,
            agents: agents(),
            any: false,
            tls: self.scene.server.server()?,
            frontend: Some(match self.mode {
                "grpc" => Frontend::Grpc(socket),
                _ => Frontend::HttpConnect(socket),
            }),
        };
        let place = Place::new(&self.scene.lab.control_plane.netns)?;
        Ok(Server::StandIn(LegacyServer::start(place, options)?))
    }

    fn program_server(&mut self, maker: &Maker) -> Result<Server> {
        let mut server =
            self.scene
                .proxy_server(maker, self.mode, &["--proxy-strategies=destHost"])?;
        server.wait_healthy(SOON)?;
        Ok(Server::Program(server))
    }

    fn native_server(&mut self) -> Result<Server> {
        self.scene.cpc_server().start()?;
        Ok(Server::Native)
    }

    fn legacy_agent(&mut self, n: u8) -> Result<Agent> {
        match Maker::peer() {
            Some(peer) => self.program_agent(&peer, n),
            None => {
                let mut options = self.scene.agent_options(n)?;
                options.interval = Duration::from_secs(1);
                let place = &self.scene.workers[usize::from(n) - 1];
                Ok(Agent::StandIn(LegacyAgent::start(place, options)))
            }
        }
    }

    fn program_agent(&mut self, maker: &Maker, n: u8) -> Result<Agent> {
        let mut agent = self.scene.proxy_agent(maker, n, &[])?;
        agent.wait_healthy(SOON)?;
        Ok(Agent::Program(agent))
    }
}

fn compare_windows(what: &str, window: Duration, peers: Duration) -> Result<()> {
    ensure!(
        window <= peers + SLACK,
        "{what} took {window:?}, the peer's {peers:?}"
    );
    Ok(())
}

/// One request: a connection, a line and the same back.
fn ask(place: &Place, mode: &str, socket: &Path, n: u8, request: &str) -> Result<String, Failure> {
    let to = target(n, Behaviour::Echo);
    if mode != "grpc" {
        let address = to.parse().map_err(|_| Failure::Proxy(to.clone()))?;
        return ask_through(socket, address, request);
    }
    let proxy = |error: anyhow::Error| Failure::Proxy(format!("{error:#}"));
    let client = legacy_frontend::connect(place, socket).map_err(proxy)?;
    let dialled = legacy_frontend::dial_within(place, &client, &to, DIAL);
    let mut connection = dialled.map_err(proxy)?;
    let mut asked = || {
        connection.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&mut connection).read_line(&mut answer)?;
        match answer.strip_suffix('\n') {
            Some(answer) => Ok(answer.to_owned()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    };
    let answer = asked().map_err(Failure::Broken)?;
    connection.close().map_err(proxy)?;
    Ok(answer)
}
