//! Hostile peers, each a program of its own in the laboratory, beside a well-behaved pair.
//!
//! One laboratory, one server with every port that there is, worker 1 with its agent, and worker 2,
//! whose certificate is in the wrong hands. The pair works from beginning to end; first alone, then
//! beside one misdeed after the other. [`run`] fails when a misdeed gained anything,
//! when the pair lost anything, or when the server held more memory than it may. How fast the pair
//! was is reported, and nothing more.

mod misdeeds;
mod pair;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use self::misdeeds::{Aim, Misdeed, Place};
use self::pair::{Pair, Window};
use crate::client::connect_through;
use crate::lab::daemon::Daemon;
use crate::lab::{Lab, LabSpec, Programs, address};
use crate::ledger::Ledger;
use crate::puppet::Puppet;
use crate::target::Behaviour;

/// Timeout of an action that takes no time on an idle machine.
const SOON: Duration = Duration::from_secs(15);
/// Time for which the pair works alone, for comparison.
const ALONE: Duration = Duration::from_secs(4);
/// Permitted growth of the server's memory during a misdeed, in KiB: far above the need of each,
/// far below the sum of the configured bounds.
const GROWTH: u64 = 256 * 1024;
/// Clients of the agents that pour and withhold: each holds a window of the server's memory.
const POURED: usize = 50;
/// Port of Konnectivity's agents.
const KONNECTIVITY: u16 = 8091;
const GRPC: u16 = 8090;
const JOIN: u16 = 8138;
/// First port of the impostors.
const IMPOSTORS: u16 = 9000;
/// Ports to which no connection may arrive: on loopback, and one that no agent may dial.
const TRAP: u16 = 8099;
const FORBIDDEN: u16 = 8199;

/// Effect of one misdeed on the pair, and counts of the misdeed.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name of the misdeed; the first row is of the pair alone.
    pub title: String,
    /// Counts of the program.
    pub came_to: BTreeMap<String, u64>,
    /// Requests of the pair meanwhile.
    pub requests: usize,
    /// Number of failed requests.
    pub failures: usize,
    /// Median of the requests.
    pub p50: Duration,
    /// All but a hundredth were faster.
    pub p99: Duration,
    /// Bytes of the pair's long stream meanwhile.
    pub bytes: u64,
    /// The server's memory at its highest, in KiB.
    pub memory: u64,
}

impl Row {
    /// Returns the program's counts in one line.
    pub fn sentence(&self) -> String {
        let counts = self.came_to.iter().map(|(name, n)| format!("{name}: {n}"));
        counts.collect::<Vec<_>>().join("; ")
    }
}

/// Rows as a table of Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| beside | requests | failed | p50, ms | p99, ms | long stream, MB | server's memory, MiB |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for row in rows {
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.1} | {:.1} | {:.1} | {} |",
            row.title,
            row.requests,
            row.failures,
            row.p50.as_secs_f64() * 1e3,
            row.p99.as_secs_f64() * 1e3,
            row.bytes as f64 / 1e6,
            row.memory >> 10,
        );
    }
    text
}

/// A past period, until the pair's results for it are known.
struct ClosedWindow {
    title: String,
    came_to: BTreeMap<String, u64>,
    from: Instant,
    to: Instant,
    bytes: u64,
    memory: u64,
}

/// Runs all misdeeds, with the program `lab-hostile`.
///
/// # Errors
///
/// Whatever a misdeed has gained, or the pair has lost.
pub fn run(programs: Programs, hostile: &Path) -> Result<Vec<Row>> {
    let mut scene = Scene::new(programs, hostile.to_owned())?;
    let pair = Pair::start(&scene.lab)?;
    // The first requests fill caches and pools.
    std::thread::sleep(Duration::from_secs(1));
    let mut past = vec![scene.alone(&pair)?];
    let memory = past[0].memory;
    let mut wrong = Vec::new();
    for misdeed in misdeeds::ALL {
        match scene.beside(misdeed, &pair) {
            Ok(done) if done.memory > memory + GROWTH => wrong.push(format!(
                "{}: the server grew from {memory} to {} KiB",
                done.title, done.memory
            )),
            Ok(done) => past.push(done),
            // The others are done all the same.
            Err(error) => wrong.push(format!("{}: {error:#}", misdeed.title)),
        }
    }
    let done = pair.finish()?;
    let failed = done.attempts.iter().find(|it| it.result.is_err());
    let rows: Vec<_> = past
        .into_iter()
        .map(|past| {
            let window = Window::of(&done.attempts, past.from, past.to);
            Row {
                title: past.title,
                came_to: past.came_to,
                requests: window.requests,
                failures: window.failures,
                p50: window.p50,
                p99: window.p99,
                bytes: past.bytes,
                memory: past.memory,
            }
        })
        .collect();
    if let Some(failed) = failed {
        wrong.push(format!("a request of the pair failed: {failed:?}"));
    }
    ensure!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), table(&rows));
    for row in &rows {
        ensure!(
            row.requests > 20 && row.bytes > 0,
            "the pair stood still: {row:?}"
        );
    }
    ensure!(done.bytes > 0, "nothing came back on the long stream");
    Ok(rows)
}

/// The laboratory, ready for misdeeds.
struct Scene {
    lab: Lab,
    hostile: PathBuf,
    /// Ports that must have no connection.
    traps: Vec<Ledger>,
    audit: PathBuf,
}

impl Scene {
    fn new(programs: Programs, hostile: PathBuf) -> Result<Self> {
        ensure!(hostile.exists(), "there is no {}", hostile.display());
        let spec = LabSpec {
            workers: 2,
            allow: vec![Puppet::allow()?],
            ..LabSpec::new(programs)
        };
        let mut lab = Lab::without_connector(spec)?;
        // The pair opens thousands of connections to one destination in the minute that TIME_WAIT takes:
        // once half of the ports are in it, connect(2) searches for milliseconds.
        for netns in [&lab.control_plane.netns, &lab.workers[0].netns] {
            netns.sysctl("ipv4/ip_local_port_range", "10000 65000")?;
            netns.sysctl("ipv4/tcp_tw_reuse", "1")?;
        }
        lab.configure_connector()?;
        let folder = lab.folder().to_owned();
        let server = &mut lab.control_plane.servers[0].daemon;
        let audit = server.config_file().with_file_name("audit");
        server.configure(|config| {
            let tls = json!({"cert": "server.crt", "key": "server.key", "client_ca": "ca.crt"});
            let with = |more: Value| {
                let (mut all, more) = (tls.clone(), more);
                if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
                    all.extend(more);
                }
                all
            };
            config["konnectivity"] = with(json!({"listen": format!("0.0.0.0:{KONNECTIVITY}")}));
            config["frontends"]["grpc"] = json!([
                {"unix": folder.join("grpc.sock"), "mode": "0660"},
                with(json!({"tcp": format!("127.0.0.1:{GRPC}")})),
            ]);
            config["join"] = json!({
                "listen": SocketAddr::from((address::server(1), JOIN)),
                "ca": folder.join("pki"),
            });
            config["audit"] = json!({"directory": "audit"});
            config["limits"] = json!({"dial_timeout": "2s"});
            config["server_count"] = json!(1);
        })?;
        let impostors =
            [IMPOSTORS, IMPOSTORS + 1].map(|port| SocketAddr::from((address::server(1), port)));
        lab.workers[0].agent()?.configure(|config| {
            if let Some(servers) = config["servers"].as_array_mut() {
                servers.extend(impostors.map(|at| json!(at)));
            }
        })?;
        lab.control_plane.servers[0].daemon.start()?;
        lab.workers[0].agent()?.start()?;
        let ready = lab.workers[0].agent()?.wait_ready(SOON);
        ready.with_context(|| lab.control_plane.servers[0].daemon.log())?;
        lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
        let mut scene = Self {
            lab,
            hostile,
            traps: Vec::new(),
            audit,
        };
        scene.set_traps()?;
        Ok(scene)
    }

    fn set_traps(&mut self) -> Result<()> {
        let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let worker = &self.lab.workers[0].netns;
        let forbidden = SocketAddr::from((address::node(1), FORBIDDEN));
        let places = [
            (&self.lab.control_plane.netns, loopback(TRAP)),
            (worker, loopback(TRAP)),
            (worker, forbidden),
        ];
        for (netns, at) in places {
            self.traps.push(Ledger::start(netns, at, "trap")?);
        }
        Ok(())
    }

    fn server(&self) -> &Daemon {
        &self.lab.control_plane.servers[0].daemon
    }

    fn alone(&self, pair: &Pair) -> Result<ClosedWindow> {
        let (from, bytes) = (Instant::now(), pair.bytes());
        std::thread::sleep(ALONE);
        Ok(ClosedWindow {
            title: "nothing".to_owned(),
            came_to: BTreeMap::new(),
            from,
            to: Instant::now(),
            bytes: pair.bytes() - bytes,
            memory: self.server().memory()?,
        })
    }

    /// Runs one misdeed, and checks that it had no effect.
    fn beside(&mut self, misdeed: &Misdeed, pair: &Pair) -> Result<ClosedWindow> {
        let said = self.server().log().len();
        let agent_said = match misdeed.agent_says.is_empty() {
            true => 0,
            // It may have said so when the impostor was not there yet.
            false => self.lab.workers[0].agent()?.log().len(),
        };
        let before = self.metrics(misdeed.metrics)?;
        let (from, bytes) = (Instant::now(), pair.bytes());
        let mut program = self.start(misdeed)?;
        let dialled = match misdeed.name {
            "pours" | "withholds" => self.dial_worker_2()?,
            _ => Vec::new(),
        };
        let memory = self.watch(&mut program)?;
        let to = Instant::now();
        let came_to = outcome(program)?;
        drop(dialled);

        let count = |name: &&&str| came_to.get(**name).copied().unwrap_or_default();
        if let Some(name) = misdeed.some.iter().find(|name| count(name) == 0) {
            bail!("nothing was shown, {name:?} is 0: {came_to:?}");
        }
        if let Some(name) = misdeed.none.iter().find(|name| count(name) > 0) {
            bail!("it managed {name:?}: {came_to:?}");
        }
        for pieces in misdeed.server_says {
            self.server().wait_log(SOON, said, pieces)?;
        }
        for pieces in misdeed.agent_says {
            self.lab.workers[0]
                .agent()?
                .wait_log(SOON, agent_said, pieces)?;
        }
        crate::client::eventually(SOON, || {
            let after = self.metrics(misdeed.metrics)?;
            for (name, (before, after)) in misdeed.metrics.iter().zip(before.iter().zip(after)) {
                ensure!(after > *before, "{name} stays at {after}");
            }
            Ok(())
        })?;
        for pieces in misdeed.audit {
            self.audited(pieces)?;
        }
        self.gained_nothing()?;
        Ok(ClosedWindow {
            title: misdeed.title.to_owned(),
            came_to,
            from,
            to,
            bytes: pair.bytes() - bytes,
            memory,
        })
    }

    fn start(&self, misdeed: &Misdeed) -> Result<Child> {
        let netns = match misdeed.place {
            Place::Worker => &self.lab.workers[1].netns,
            Place::ControlPlane | Place::ApiServer => &self.lab.control_plane.netns,
        };
        let mut command = netns.command(&self.hostile)?;
        match misdeed.place {
            Place::ApiServer => self.lab.control_plane.apiserver.place(&mut command)?,
            _ => self.lab.cgroup("hostile")?.place(&mut command)?,
        }
        let sockets = &self.lab.control_plane.servers[0].sockets;
        let stolen = self.lab.folder().join("w2/agent");
        let tunnel = sockets.tunnel;
        let konnectivity = SocketAddr::from((address::server(1), KONNECTIVITY));
        let tcp = |kind: &str, at: SocketAddr| format!("{kind}={at}");
        let unix = |kind: &str, at: &Path| format!("{kind}={}", at.display());
        command.arg(misdeed.name);
        match misdeed.aim {
            Aim::Tunnel => command.arg(tunnel.to_string()).arg(stolen),
            Aim::TunnelWithout => command.arg(tunnel.to_string()),
            Aim::Konnectivity => command.arg(konnectivity.to_string()).arg(stolen),
            Aim::Agent => {
                let at = SocketAddr::from((address::server(1), IMPOSTORS));
                command
                    .arg(at.to_string())
                    .arg(self.foreign_server()?)
                    .arg(stolen)
            }
            Aim::Connect => command.arg(tunnel.to_string()).arg(&sockets.connect_unix),
            Aim::Outside => command
                .arg(tunnel.to_string())
                .args([tcp("http", tunnel), tcp("tls", konnectivity)])
                .arg(tcp("tls", SocketAddr::from((address::server(1), JOIN)))),
            Aim::Inside => command.arg(tunnel.to_string()).args([
                tcp("http", sockets.admin),
                tcp("tls", sockets.connect_tcp),
                tcp("tls", SocketAddr::from(([127, 0, 0, 1], GRPC))),
                unix("connect", &sockets.connect_unix),
                unix("grpc", &self.lab.folder().join("grpc.sock")),
            ]),
        };
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        spawned.with_context(|| format!("cannot start {}", self.hostile.display()))
    }

    /// Creates the certificate of a server of another domain.
    fn foreign_server(&self) -> Result<PathBuf> {
        let folder = self.lab.folder().join("foreign");
        let out = folder.to_str().context("the folder's name is not UTF-8")?;
        let pki = crate::lab::config::ConnectorPki::at(&self.lab.programs().cpc, folder.join("ca"));
        pki.run("init", &["--trust-domain", "other.local"])?;
        pki.run("server", &["--id", "s1", "--out", out])?;
        Ok(folder)
    }

    /// Opens clients of worker 2 that read nothing and write as much as possible.
    fn dial_worker_2(&self) -> Result<Vec<UnixStream>> {
        let proxy = &self.lab.control_plane.servers[0].sockets.connect_unix;
        let target = SocketAddr::from((address::node(2), Behaviour::Echo.port()));
        self.server().wait_status(SOON, |status| {
            routes(status, "w2").contains(&address::node(2).to_string())
        })?;
        let dial = || -> Result<UnixStream> {
            let mut stream = connect_through(proxy, &target.to_string())?;
            stream.set_nonblocking(true)?;
            while stream.write(&[0; 64 << 10]).is_ok() {}
            Ok(stream)
        };
        (0..POURED).map(|_| dial()).collect()
    }

    /// Waits for the program's end; gives the most memory that the server held meanwhile, in KiB.
    fn watch(&self, program: &mut Child) -> Result<u64> {
        let mut most = 0;
        loop {
            most = most.max(self.server().memory()?);
            if program.try_wait()?.is_some() {
                return Ok(most);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Values of the server's; one that is not there yet is 0.
    fn metrics(&self, names: &[&str]) -> Result<Vec<f64>> {
        let (_, text) = self.server().get("/metrics")?;
        let value = |name: &&str| {
            let mut lines = text.lines();
            let found = lines.find_map(|line| line.strip_prefix(*name)?.strip_prefix(' '));
            Ok(found.map_or(Ok(0.0), str::parse)?)
        };
        names.iter().map(value).collect()
    }

    fn audited(&self, pieces: &[&str]) -> Result<()> {
        crate::client::eventually(SOON, || {
            for file in fs::read_dir(&self.audit)? {
                let text = fs::read_to_string(file?.path())?;
                let all = |line: &str| pieces.iter().all(|piece| line.contains(piece));
                if text.lines().any(all) {
                    return Ok(());
                }
            }
            bail!("the audit has no record of {pieces:?}")
        })
    }

    /// Checks that no forbidden destination was dialled, no agent serves a foreign claim, and both
    /// processes live.
    fn gained_nothing(&mut self) -> Result<()> {
        let trapped: usize = self.traps.iter().map(Ledger::connections).sum();
        ensure!(trapped == 0, "{trapped} connections arrived where none may");
        let (_, status) = self.server().get("/status")?;
        let status: Value = serde_json::from_str(&status)?;
        let own = address::nodes(2).map(|it| it.to_string());
        let foreign = routes(&status, "w2");
        let foreign = foreign.iter().find(|route| !own.contains(route));
        ensure!(foreign.is_none(), "worker 2 serves {foreign:?}: {status}");
        ensure!(
            routes(&status, "w1").contains(&address::node(1).to_string()),
            "worker 1 lost its own: {status}"
        );
        let log = self.server().log();
        if let Some(line) = log.lines().find(|line| line.contains("panicked")) {
            bail!("the server panicked: {line}");
        }
        self.lab.control_plane.servers[0].daemon.check()?;
        self.lab.workers[0].agent()?.check()
    }
}

/// Returns the routes of the agents of this worker, by the status.
fn routes(status: &Value, worker: &str) -> Vec<String> {
    let identity = format!("/agent/{worker}");
    let agents = status["agents"].as_array().into_iter().flatten();
    let own = agents.filter(|agent| {
        let name = agent["identity"].as_str();
        name.is_some_and(|name| name.ends_with(&identity))
    });
    let routes = own.flat_map(|agent| agent["routes"].as_array().into_iter().flatten());
    routes
        .filter_map(|it| Some(it.as_str()?.to_owned()))
        .collect()
}

/// Returns the program's own counts.
fn outcome(mut program: Child) -> Result<BTreeMap<String, u64>> {
    let status = program.wait()?;
    let mut text = String::new();
    if let Some(mut out) = program.stdout.take() {
        out.read_to_string(&mut text)?;
    }
    ensure!(status.success(), "the program ended with {status}: {text}");
    serde_json::from_str(&text).with_context(|| format!("{text:?} is no outcome"))
}
