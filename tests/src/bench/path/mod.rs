//! A path: a way from the client to the target, and the programs that it consists of.
//!
//! [`Path`] says which, as data; [`Running`] is one that is up. What a path needs and this machine
//! lacks is said by [`Path::missing`], never skipped in silence.

mod connector;
mod crowd;
mod konnectivity;
mod laboratory;
mod openvpn;
mod quinn;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde_json::{Value, json};

pub use crowd::Crowd;
use crowd::Gate;
pub use laboratory::Installed;

use super::load::Dial;
use super::scene::{Place, Scene, Stage, Wire};
use crate::client::eventually;
use crate::lab::cgroup::{Cgroup, Membership};
use crate::lab::daemon::Daemon;
use crate::lab::process::Process;

/// Time until a byte comes back over a path.
const READY: Duration = Duration::from_secs(20);

/// The programs that paths consist of.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The connector.
    pub cpc: PathBuf,
    /// The target.
    pub target: PathBuf,
    /// The yardstick.
    pub quinn: PathBuf,
    /// Many agents' sessions in one process.
    pub crowd: PathBuf,
    /// The folder of Konnectivity's programs.
    pub konnectivity: Option<PathBuf>,
}

/// The variable that names the folder of Konnectivity's programs.
pub const KONNECTIVITY: &str = "CPC_KONNECTIVITY_BIN";

impl Programs {
    /// Returns the programs in cargo's `folder`, and those of the environment.
    pub fn in_folder(folder: &std::path::Path) -> Self {
        Self {
            cpc: folder.join("cpc"),
            target: folder.join("bench-target"),
            quinn: folder.join("examples/stock-quinn"),
            crowd: folder.join("examples/crowd"),
            konnectivity: std::env::var_os(KONNECTIVITY).map(PathBuf::from),
        }
    }
}

/// Kind of a path.
#[derive(Clone, Debug, PartialEq)]
pub enum PathKind {
    /// TCP without anything in between.
    Direct,
    /// The yardstick.
    Quinn {
        /// Owned pieces, or copies.
        chunks: bool,
    },
    /// The connector.
    Connector {
        /// Redirected in the kernel, or requested by HTTP CONNECT.
        redirect: bool,
        /// Additional configuration of the server.
        server: Value,
        /// Additional configuration of the agent.
        agent: Value,
    },
    /// Konnectivity, by HTTP CONNECT on a Unix socket.
    Konnectivity,
    /// OpenVPN over UDP.
    OpenVpn,
    /// The connector with keepers, behind a NAT router.
    Laboratory,
}

/// A path over a wire.
#[derive(Clone, Debug, PartialEq)]
pub struct Path {
    /// Name in reports.
    pub name: String,
    /// Kind of the path.
    pub way: PathKind,
    /// The wire.
    pub wire: Wire,
}

impl Path {
    /// Creates a path over the usual wire.
    pub fn new(name: &str, way: PathKind) -> Self {
        Self {
            name: name.to_owned(),
            way,
            wire: Wire::USUAL,
        }
    }

    /// Returns the same path over another wire.
    pub fn over(&self, wire: Wire) -> Self {
        Self {
            name: format!("{}, {}", self.name, wire.name),
            way: self.way.clone(),
            wire,
        }
    }

    /// Returns every path: the compared ones, then the variants of the connector, then other wires.
    pub fn all() -> Vec<Self> {
        let quinn = |chunks| PathKind::Quinn { chunks };
        let copy = Self::new("quinn copy", quinn(false));
        let chunks = Self::new("quinn chunks", quinn(true));
        let redirect = Self::new("redirect", connector(true));
        let mut paths = vec![
            Self::new("direct", PathKind::Direct),
            copy,
            chunks.clone(),
            Self::new("connect", connector(false)),
            redirect.clone(),
        ];
        paths.extend(variants());
        paths.push(Self::new("konnectivity", PathKind::Konnectivity));
        paths.push(Self::new("openvpn", PathKind::OpenVpn));
        paths.push(Self::new("redirect, kept", PathKind::Laboratory));
        for wire in [Wire::JUMBO, Wire::NO_USO] {
            paths.push(chunks.over(wire));
            paths.push(redirect.over(wire));
        }
        paths
    }

    /// Returns why this machine can't have the path, if so.
    pub fn missing(&self, programs: &Programs) -> Option<String> {
        let root = nix::unistd::geteuid().is_root();
        let redirect = matches!(self.way, PathKind::Connector { redirect: true, .. });
        let needs_root = matches!(self.way, PathKind::OpenVpn | PathKind::Laboratory);
        if !root && (redirect || needs_root || self.wire != Wire::LOOPBACK) {
            return Some("needs root".to_owned());
        }
        match &self.way {
            PathKind::Direct => None,
            PathKind::Quinn { .. } => absent(&programs.quinn),
            PathKind::Connector { .. } => absent(&programs.cpc),
            PathKind::Konnectivity => match &programs.konnectivity {
                Some(folder) => ["proxy-server", "proxy-agent"]
                    .iter()
                    .find_map(|program| absent(&folder.join(program))),
                None => Some(format!(
                    "{KONNECTIVITY} does not name the folder of its programs"
                )),
            },
            PathKind::OpenVpn => openvpn::missing(),
            PathKind::Laboratory => absent(&programs.cpc),
        }
    }

    /// Starts it as path `number` (from 1, of its own in a run) and waits until it carries a byte.
    ///
    /// `restart` is how often it has been started before.
    ///
    /// # Errors
    ///
    /// A program does not start or is not ready in time.
    pub fn start(
        &self,
        stage: &mut Stage,
        programs: &Programs,
        number: u8,
        restart: usize,
    ) -> Result<Running> {
        let folder = stage.subfolder(&format!("path-{number}-{restart}"))?;
        let bpffs = match self.way {
            PathKind::Connector { redirect: true, .. } => Some(stage.bpffs()?),
            _ => None,
        };
        let group = match bpffs {
            Some(_) => Some(stage.cgroup(&format!("client-{number}"))?),
            None => None,
        };
        let scene = stage.scene(self.wire)?;
        scene.add_nodes(number)?;
        let place = Start {
            scene,
            programs,
            number,
            folder,
        };
        let mut running = match &self.way {
            PathKind::Direct => Running::new(Dial::Tcp(scene.direct())),
            PathKind::Quinn { chunks } => quinn::start(&place, *chunks)?,
            PathKind::Connector { server, agent, .. } => {
                let redirect = bpffs.zip(group.as_ref());
                connector::start(&place, redirect, server, agent).map_err(connector::explain)?
            }
            PathKind::Konnectivity => konnectivity::start(&place)?,
            PathKind::OpenVpn => openvpn::start(&place)?,
            PathKind::Laboratory => laboratory::start(&place)?,
        };
        running.client = scene.control_plane.clone();
        running.group = group;
        running.direct = Dial::Tcp(scene.direct());
        running.wait_ready()?;
        Ok(running)
    }
}

/// Variants of the connector that are compared with its defaults: a name, and the keys that make
/// it. One that this `cpc` does not know yet is reported as it refuses it.
fn variants() -> Vec<Path> {
    let both = |name: &str, keys: Value| {
        let way = PathKind::Connector {
            redirect: true,
            server: keys.clone(),
            agent: keys,
        };
        Path::new(name, way)
    };
    vec![
        both("redirect, one shard", json!({"shards": 1})),
        both("redirect, no log", json!({"log": {"access": false}})),
        both("redirect, plain", json!({"limits": {"resume": "0s"}})),
        both("redirect, epoll", json!({"datapath": {"engine": "epoll"}})),
        both(
            "redirect, io_uring",
            json!({"datapath": {"engine": "io_uring"}}),
        ),
    ]
}

/// Returns the connector with its defaults.
fn connector(redirect: bool) -> PathKind {
    PathKind::Connector {
        redirect,
        server: json!({}),
        agent: json!({}),
    }
}

fn absent(program: &std::path::Path) -> Option<String> {
    (!program.exists()).then(|| format!("there is no {}", program.display()))
}

/// Place of a path's start.
struct Start<'a> {
    scene: &'a Scene,
    programs: &'a Programs,
    number: u8,
    folder: PathBuf,
}

impl Start<'_> {
    /// Returns a port for this path alone, with `base` far from the others.
    fn port(&self, base: u16) -> u16 {
        base + 10 * u16::from(self.number)
    }

    fn run(&self, place: &Place, name: &str, command: &mut Command) -> Result<Process> {
        place.put(command)?;
        Process::start(name, command, &self.folder.join(format!("{name}.log")))
    }

    fn server(&self, command: &mut Command) -> Result<Process> {
        self.run(&self.scene.control_plane, "server", command)
    }

    fn agent(&self, command: &mut Command) -> Result<Process> {
        self.run(&self.scene.worker, "agent", command)
    }
}

/// A path that is up. Dropping it ends its programs.
#[derive(Debug)]
pub struct Running {
    /// Ways to open connections, one for each node of the path.
    pub dials: Vec<Dial>,
    /// The direct way over the same wire.
    pub direct: Dial,
    /// Place of the client.
    client: Place,
    /// The group whose sockets are redirected.
    group: Option<Cgroup>,
    /// Entrance for more agents.
    gate: Option<Gate>,
    /// The laboratory of a path that is one.
    pub(super) installed: Option<Installed>,
    processes: [Vec<Process>; 2],
    daemons: [Vec<Daemon>; 2],
}

/// The two ends of a tunnel.
pub const SIDES: [&str; 2] = ["server", "agent"];

impl Running {
    fn new(dial: Dial) -> Self {
        Self {
            direct: dial.clone(),
            dials: vec![dial],
            client: Place::default(),
            group: None,
            gate: None,
            installed: None,
            processes: Default::default(),
            daemons: Default::default(),
        }
    }

    /// Returns the processes of a side: 0 is the server's, 1 the agents'. The direct path has none.
    pub fn processes(&self, side: usize) -> Vec<Pid> {
        let processes = self.processes[side].iter().map(Process::pid);
        processes
            .chain(self.daemons[side].iter().filter_map(Daemon::pid))
            .collect()
    }

    /// Returns the first way to open a connection.
    pub fn dial(&self) -> &Dial {
        &self.dials[0]
    }

    /// Lets so many more agents in, which offer so many routes between them; returns when the server
    /// has taken all of them.
    ///
    /// # Errors
    ///
    /// The path takes no agents, or the server not so many.
    pub fn crowd(&self, sessions: usize, routes: usize) -> Result<Crowd> {
        let gate = self.gate.as_ref().context("this path takes no agents")?;
        gate.open(sessions, routes)
    }

    /// Runs `work` where the client is: in its namespace, and in the group that is redirected.
    ///
    /// # Errors
    ///
    /// Those of `work`.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let _member: Option<Membership> = self.group.as_ref().map(Cgroup::enter).transpose()?;
        self.client.enter(work)
    }

    /// Does the same with a work that needs the path.
    pub(super) fn inside<T: Send>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send,
    ) -> Result<T> {
        self.enter(|| work(self))
    }

    fn check(&mut self) -> Result<()> {
        for process in self.processes.iter_mut().flatten() {
            process.check()?;
        }
        for daemon in self.daemons.iter_mut().flatten() {
            daemon.check()?;
        }
        Ok(())
    }

    /// Waits until every node answers.
    fn wait_ready(&mut self) -> Result<()> {
        for dial in self.dials.clone() {
            let ready = eventually(READY, || {
                // A program that has ended says why; waiting would not help.
                if let Err(error) = self.check() {
                    return Ok(Err(error));
                }
                let opened = self.enter(|| dial.open_echo());
                Ok(Ok(opened.map(drop)?))
            });
            ready.with_context(|| format!("no byte comes back over {dial:?}"))??;
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The agents first, so that none dials anew. One that has ended already is no error.
        for side in [1, 0] {
            for daemon in &mut self.daemons[side] {
                let _ = daemon.kill();
            }
            for process in &mut self.processes[side] {
                let _ = process.kill();
            }
        }
    }
}
