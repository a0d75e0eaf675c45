//! The guide's third step, QUIC between both halves, with the guide's own files: agents move one by
//! one and back while clients go on asking.
//!
//! Each agent is replaced as a rollout with `maxSurge` does it: the successor is there before the
//! old one is told to stop. So no request may fail but while the one server is restarted.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tunnel_tests::client::{self, connect_through, eventually, round_trips};
use tunnel_tests::lab::address;
use tunnel_tests::lab::{self, Programs};
use tunnel_tests::ledger::Ledger;
use tunnel_tests::load::ask_through;
use tunnel_tests::target::Behaviour;

use crate::guide;
use crate::loads::{Loads, Window};
use crate::program::Program;
use crate::scene::{AGENTS, Scene, target};
use crate::script::SOON;

/// HTTP CONNECT is what an egress selector uses most.
const MODE: &str = "http-connect";
/// A QUIC packet that is not let through is missed after seconds; this is with room.
const SWITCH: Duration = Duration::from_secs(60);
/// Admin address of `cpc proxy-server`.
const SERVER_ADMIN: u16 = 8095;
/// Size of an upload, in bytes.
const UPLOAD: u64 = 3_000_001;

/// An agent of ours and where its pages are: two at a time are on a worker.
struct Agent {
    program: Program,
    admin: u16,
}

struct Walk {
    /// Ended before the laboratory.
    loads: Loads,
    server: Option<Program>,
    agents: [Option<Agent>; 2],
    windows: Vec<Window>,
    scene: Scene,
}

#[test]
fn step_three_there_and_back_as_the_guide_says() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut walk = Walk::after_step_two(2)?;
    // The server first: agents that ask for QUIC before find gRPC alone.
    let flags = walk.guide("server", 0)?;
    walk.restart_server(&flags)?;
    walk.protocols(&["konnectivity", "konnectivity"])?;
    for n in 1..=2 {
        let flags = walk.guide("agent", n)?;
        walk.replace_agent(n, &flags)?;
        walk.protocols(&["quic", ["konnectivity", "quic"][usize::from(n) - 1]])?;
    }
    walk.what_the_guide_promises()?;

    // Back: from the agents first, then from the server.
    for n in 1..=2 {
        walk.replace_agent(n, &[])?;
        walk.protocols(&["konnectivity", ["quic", "konnectivity"][usize::from(n) - 1]])?;
    }
    walk.restart_server(&[])?;
    walk.protocols(&["konnectivity", "konnectivity"])?;
    walk.loads.judge("step 3", &walk.windows)
}

/// The same files mean gRPC where UDP is blocked. When UDP passes, QUIC takes over, and connections
/// over gRPC continue there to their end.
#[test]
fn quic_takes_over_when_udp_is_let_through() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut walk = Walk::after_step_two(1)?;
    let flags = walk.guide("server", 0)?;
    walk.restart_server(&flags)?;
    let router = walk.scene.lab.router.netns.clone();
    let drop_udp = format!(
        "table inet no_quic {{\nchain forward {{\n\
         type filter hook forward priority -10\nudp dport {AGENTS} drop\n}}\n}}\n"
    );
    router.nft(&drop_udp)?;
    let flags = walk.guide("agent", 1)?;
    walk.replace_agent(1, &flags)?;
    walk.protocols(&["konnectivity"])?;
    let living = connect_through(&walk.socket(), &target(1, Behaviour::Echo))?;
    living.set_read_timeout(Some(SOON))?;
    round_trips(&living, 1)?;

    router.nft("delete table inet no_quic")?;
    walk.wait_agent(1, SWITCH, |rows| {
        let quic = |row: &Value| row["protocol"] == "quic" && row["state"] == "live";
        let rest = |row: &Value| row["protocol"] == "konnectivity" && row["state"] == "draining";
        ensure!(rows.iter().any(quic), "no QUIC");
        ensure!(rows.iter().all(|row| quic(row) || rest(row)), "more gRPC");
        ensure!(rows.iter().any(rest), "gRPC has gone with a connection");
        Ok(())
    })?;
    walk.loads.answered("after QUIC took over")?;
    round_trips(&living, 3).context("what began over gRPC")?;
    drop(living);
    walk.wait_agent(1, SWITCH, |rows| {
        ensure!(rows.iter().all(|row| row["protocol"] == "quic"), "gRPC");
        Ok(())
    })?;
    walk.protocols(&["quic"])?;
    walk.loads.judge("UDP", &walk.windows)
}

impl Walk {
    /// Both halves are ours and speak gRPC, and clients ask each worker.
    fn after_step_two(workers: u8) -> Result<Self> {
        let mut walk = Self {
            scene: Scene::new(workers)?,
            loads: Loads::default(),
            server: None,
            agents: [None, None],
            windows: Vec::new(),
        };
        walk.server = Some(walk.start_server(&[])?);
        for n in 1..=workers {
            walk.agents[usize::from(n) - 1] = Some(walk.start_agent(n, &[])?);
        }
        walk.wait_served()?;
        for n in 1..=workers {
            let socket = walk.socket();
            let to = target(n, Behaviour::Echo).parse()?;
            let ask = move |request: &str| ask_through(&socket, to, request);
            walk.loads.start(&walk.scene.lab.control_plane, ask)?;
        }
        walk.loads.answered("step 2")?;
        Ok(walk)
    }

    /// The guide's file beside the certificates that `cpc pki` has made, the server's for 0.
    fn guide(&mut self, role: &str, worker: u8) -> Result<Vec<String>> {
        let file = match worker {
            0 => self.scene.cpc_server().config_file(),
            n => self
                .scene
                .lab
                .worker(&format!("w{n}"))?
                .agent()?
                .config_file(),
        };
        guide::configuration(role, file.parent().unwrap_or(Path::new("/")))
    }

    fn socket(&self) -> PathBuf {
        self.scene.frontend(MODE)
    }

    fn start_server(&self, flags: &[String]) -> Result<Program> {
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let mut server = self.scene.proxy_server(&self.scene.ours()?, MODE, &flags)?;
        server.wait_healthy(SOON)?;
        Ok(server)
    }

    /// Ends the server and starts it with these flags in its place. Requests fail meanwhile.
    fn restart_server(&mut self, flags: &[String]) -> Result<()> {
        let start = Instant::now();
        if let Some(mut server) = self.server.take() {
            server.signal(Signal::SIGTERM)?;
            server.wait(SOON)?;
        }
        self.server = Some(self.start_server(flags)?);
        self.wait_served()?;
        self.windows.push(Window {
            start,
            end: Instant::now(),
            worker: None,
        });
        self.loads.answered("the server is back")
    }

    fn start_agent(&self, n: u8, flags: &[String]) -> Result<Agent> {
        // Not those of the one that is there.
        let there = self.agents[usize::from(n) - 1].as_ref();
        let [health, admin] = match there.map(|agent| agent.admin) {
            Some(8094) => [8193, 8194],
            _ => [8093, 8094],
        };
        let port = format!("--admin-server-port={admin}");
        let flags = flags.iter().map(String::as_str).chain([&*port]);
        let flags: Vec<_> = flags.collect();
        let ours = self.scene.ours()?;
        let mut program = self.scene.proxy_agent_at(&ours, n, health, &flags)?;
        program.wait_ready(SOON)?;
        Ok(Agent { program, admin })
    }

    /// Starts an agent with these flags beside the one of worker `n`, then lets that one go.
    fn replace_agent(&mut self, n: u8, flags: &[String]) -> Result<()> {
        let successor = self.start_agent(n, flags)?;
        let old = self.agents[usize::from(n) - 1].replace(successor);
        let Agent { mut program, admin } = old.context("nobody to replace")?;
        program.signal(Signal::SIGTERM)?;
        // What a pod's grace period is for.
        eventually(SOON, || {
            let status = self.server()?.status(SERVER_ADMIN)?;
            let mut leaving = rows(&status, "agents").iter();
            ensure!(leaving.any(|row| row["state"] == "draining"), "{status}");
            let own = program.status(admin)?;
            let busy = rows(&own, "servers").iter().any(|row| row["streams"] != 0);
            ensure!(!busy, "{own}");
            Ok(())
        })?;
        program.signal(Signal::SIGTERM)?;
        program.wait(SOON)?;
        self.loads.answered("the agent's successor")
    }

    fn server(&self) -> Result<&Program> {
        self.server.as_ref().context("no server")
    }

    /// The server has a live agent for each worker.
    fn wait_served(&self) -> Result<()> {
        let running = self.agents.iter().flatten().count();
        eventually(SOON, || {
            let status = self.server()?.status(SERVER_ADMIN)?;
            for node in (1..=200).map(address::node).take(running) {
                live_of(&status, &node.to_string())?;
            }
            Ok(())
        })
    }

    /// Checks by the server's status which protocol each worker uses, and that it uses no other.
    fn protocols(&self, expected: &[&str]) -> Result<()> {
        eventually(SOON, || {
            let status = self.server()?.status(SERVER_ADMIN)?;
            for (n, expected) in (1..).zip(expected) {
                let found = live_of(&status, &address::node(n).to_string())?;
                let all = found.iter().all(|protocol| protocol == expected);
                ensure!(all, "worker {n} is no {expected}: {status}");
            }
            Ok(())
        })
    }

    /// Waits until the tunnels of worker `n`'s agent are as they should be.
    fn wait_agent(
        &self,
        n: u8,
        limit: Duration,
        right: impl Fn(&[Value]) -> Result<()>,
    ) -> Result<()> {
        let agent = self.agents[usize::from(n) - 1].as_ref();
        let Agent { program, admin } = agent.context("no agent")?;
        eventually(limit, || {
            let status = program.status(*admin)?;
            right(rows(&status, "servers")).with_context(|| status.to_string())
        })
    }

    /// "`cpc status` on the server lists the agent as `quic`. From then on [..] half-close works,
    /// and nothing is lost at a close." And agents serve what they are granted: what no node has.
    fn what_the_guide_promises(&self) -> Result<()> {
        let mut status = Command::new(Programs::of_this_test()?.cpc);
        self.scene.lab.control_plane.netns.place(&mut status)?;
        status.args(["status", "--admin", "127.0.0.1:8095"]);
        let shown = String::from_utf8(status.output()?.stdout)?;
        for agent in ["agent/w1", "agent/w2"] {
            let mut lines = shown.lines();
            let listed = lines.any(|line| line.contains(agent) && line.contains("quic"));
            ensure!(listed, "no {agent} over QUIC in:\n{shown}");
        }
        let (netns, elsewhere) = (&self.scene.lab.router.netns, (address::gateway(1), 9000));
        let ledger = Ledger::start(netns, elsewhere.into(), "router")?;
        let answer = ask_through(&self.socket(), elsewhere.into(), "hello");
        ensure!(answer.is_ok(), "{answer:?}");
        assert_eq!(ledger.requests(), ["hello"]);
        for n in 1..=2 {
            let finish = |stream: &UnixStream| stream.shutdown(Shutdown::Write);
            let stream = connect_through(&self.socket(), &target(n, Behaviour::Sink))?;
            stream.set_read_timeout(Some(SOON))?;
            client::upload(stream, UPLOAD, finish).with_context(|| format!("worker {n}"))?;
        }
        Ok(())
    }
}

fn rows<'a>(status: &'a Value, of: &str) -> &'a [Value] {
    status[of].as_array().map_or(&[], Vec::as_slice)
}

/// The protocols of the live agents that serve `node`.
fn live_of(status: &Value, node: &str) -> Result<Vec<String>> {
    let serves = |row: &&Value| {
        let routes = row["routes"].as_array();
        let own = |route: &Value| route.as_str().is_some_and(|route| route.contains(node));
        row["state"] == "live" && routes.is_some_and(|routes| routes.iter().any(own))
    };
    let live = rows(status, "agents").iter().filter(serves);
    let protocols: Vec<_> = live
        .map(|row| row["protocol"].as_str().unwrap_or_default().to_owned())
        .collect();
    if protocols.is_empty() {
        bail!("nobody serves {node}: {status}");
    }
    Ok(protocols)
}
