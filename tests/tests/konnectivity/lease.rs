//! Servers that hold leases, and an agent that counts them: behind one address it finds as many
//! servers as there are, looks no further, and notices when one goes and comes.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tunnel_fake_kubernetes::FakeKubernetes;
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::{self, address};
use tunnel_tests::target::Behaviour;

use crate::balancer::Balancer;
use crate::place::Place;
use crate::program::{Maker, Program};
use crate::scene::{Scene, target};
use crate::script::SOON;

/// Address at which agents find all servers.
const BALANCER: u16 = 8100;
/// A lease lasts 30 s, and every 15 s those are cleared away that have run out. A busy machine has
/// as long again.
const RUN_OUT: Duration = Duration::from_secs(75);
/// An agent that misses a server dials at least as often as that.
const PACE: Duration = Duration::from_secs(14);
/// Time without a new server after which an agent has found all.
const QUIET: Duration = Duration::from_secs(60);

#[test]
fn our_agent_counts_our_leases() -> Result<()> {
    count(Some(Maker::ours()?), Some(Maker::ours()?))
}

#[test]
fn our_agent_counts_the_peers_leases() -> Result<()> {
    count(Maker::peer(), Some(Maker::ours()?))
}

#[test]
fn the_peers_agent_counts_our_leases() -> Result<()> {
    count(Some(Maker::ours()?), Maker::peer())
}

/// Two servers, the agent on worker 1 and what is between them.
struct Leases {
    servers: [Option<Program>; 2],
    agent: Program,
    balancer: Balancer,
    kubernetes: FakeKubernetes,
    scene: Scene,
}

fn count(servers: Option<Maker>, agent: Option<Maker>) -> Result<()> {
    let (true, Some(servers), Some(agent)) = (lab::available()?, &servers, &agent) else {
        return Ok(());
    };
    let mut leases = Leases::new(servers, agent)?;
    // Ours presents several ids to agents, and holds a lease for each.
    let one = match servers {
        Maker::Ours(_) => 3,
        Maker::Peer(_) => 1,
    };
    leases.found(2 * one).context("at first")?;
    leases.answers(&[0, 1])?;
    leases.wait_quiet()?;

    leases.stop(1, Signal::SIGTERM)?;
    leases.found(one).context("one was stopped")?;
    leases.answers(&[0])?;
    leases.wait_quiet()?;

    leases.servers[1] = Some(leases.start(servers, 1)?);
    leases.found(2 * one).context("it came back")?;
    leases.answers(&[0, 1])?;

    // One that crashes gives up nothing: its leases run out, and the other clears them away.
    leases.stop(1, Signal::SIGKILL)?;
    ensure!(leases.kubernetes.leases().len() == 2 * one);
    leases.found(one).context("one crashed")?;
    leases.answers(&[0])
}

impl Leases {
    fn new(servers: &Maker, agent: &Maker) -> Result<Self> {
        let scene = Scene::new(1)?;
        let netns = &scene.lab.control_plane.netns;
        // The worker has to reach it too.
        let listen = || Ok(TcpListener::bind((address::server(1), 0))?);
        let kubernetes = FakeKubernetes::serve(netns.enter(listen)?)?;
        std::fs::write(
            scene.lab.folder().join("kubeconfig"),
            kubernetes.kubeconfig(),
        )?;
        let to = |n| (Ipv4Addr::LOCALHOST, agent_port(n)).into();
        let balancer = Balancer::start(
            Place::new(netns)?,
            (address::server(1), BALANCER).into(),
            vec![to(0), to(1)],
        )?;
        let flags = [
            format!("--proxy-server-port={BALANCER}"),
            format!("--kubeconfig={}", kubeconfig(&scene)),
            "--count-server-leases".to_owned(),
            "--kube-api-content-type=application/json".to_owned(),
        ];
        let flags = flags.each_ref().map(String::as_str);
        let mut leases = Self {
            agent: scene.proxy_agent(agent, 1, &flags)?,
            servers: [None, None],
            balancer,
            kubernetes,
            scene,
        };
        for n in [0, 1] {
            leases.servers[n] = Some(leases.start(servers, n)?);
        }
        Ok(leases)
    }

    fn start(&self, maker: &Maker, n: usize) -> Result<Program> {
        let flags = [
            format!("--uds-name={}", self.socket(n).display()),
            format!("--agent-port={}", agent_port(n)),
            format!("--admin-port={}", agent_port(n) + 2),
            format!("--server-id=server-{n}"),
            format!("--kubeconfig={}", kubeconfig(&self.scene)),
            "--enable-lease-controller".to_owned(),
            "--kube-api-content-type=application/json".to_owned(),
        ];
        let flags = flags.each_ref().map(String::as_str);
        let (name, health) = (format!("server-{n}"), agent_port(n) + 1);
        let started = self
            .scene
            .proxy_server_at(maker, "http-connect", (&name, health), &flags);
        let mut server = started?;
        server.wait_healthy(SOON)?;
        Ok(server)
    }

    fn stop(&mut self, n: usize, signal: Signal) -> Result<()> {
        let mut server = self.servers[n].take().context("it does not run")?;
        server.signal(signal)?;
        server.wait(SOON)
    }

    fn socket(&self, n: usize) -> PathBuf {
        self.scene.frontend(&format!("server-{n}"))
    }

    /// There are so many leases, and the agent knows of so many servers and has a stream to each.
    fn found(&self, count: usize) -> Result<()> {
        eventually(RUN_OUT, || {
            let held = self.kubernetes.leases().len();
            ensure!(held == count, "{held} leases");
            let (_, metrics) = self.agent.get("/metrics")?;
            for name in ["known_server_count", "open_server_connections"] {
                let line = format!("\nkonnectivity_network_proxy_agent_{name} {count}\n");
                let told = metrics
                    .lines()
                    .find(|line| line.contains(&format!("_{name} ")));
                ensure!(metrics.contains(&line), "not {count}: {told:?}");
            }
            Ok(())
        })
        .with_context(|| format!("the agent said:\n{}", self.agent.log()))
    }

    /// The target is reached through each of these servers.
    fn answers(&self, servers: &[usize]) -> Result<()> {
        for &n in servers {
            eventually(SOON, || {
                let stream = connect_through(&self.socket(n), &target(1, Behaviour::Echo))?;
                stream.set_read_timeout(Some(SOON))?;
                round_trips(stream, 1)
            })
            .with_context(|| format!("server {n}"))?;
        }
        Ok(())
    }

    /// Waits until the agent stops searching, because it knows all servers.
    fn wait_quiet(&self) -> Result<()> {
        eventually(QUIET, || {
            let before = self.balancer.accepted();
            sleep(PACE);
            let more = self.balancer.accepted() - before;
            ensure!(more == 0, "{more} more dials");
            Ok(())
        })
    }
}

fn kubeconfig(scene: &Scene) -> String {
    scene.lab.folder().join("kubeconfig").display().to_string()
}

/// Returns the port of server 0 or 1 for agents; its pages are beside it.
fn agent_port(n: usize) -> u16 {
    [8191, 8291][n]
}
