//! A laboratory with one honest pair at work, and what must be true of it after each attack.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::runtime::Handle;
use tunnel_tests::client::eventually;
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{Lab, LabSpec, Programs, address};
use tunnel_tests::steady::Steady;
use tunnel_tests::target::Behaviour;

/// Timeout of an action that takes no time on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(15);
/// Permitted growth of a process's memory after an attack, in KiB: allocators keep some.
const GROWTH: u64 = 32 * 1024;
/// Permitted growth of its descriptors: those of connections that end by themselves.
const FILES: usize = 8;

/// A laboratory in which worker 1 is honest and a client uses it without a pause. Worker 2 has no
/// agent: attacks on the server come from there.
pub(crate) struct Scene {
    pub(crate) lab: Lab,
    steady: Steady,
    server: Usage,
    agent: Usage,
}

/// Resources of a process.
struct Usage {
    memory: u64,
    files: usize,
}

impl Usage {
    fn of(daemon: &Daemon) -> Result<Self> {
        Ok(Self {
            memory: daemon.memory()?,
            files: daemon.open_files()?,
        })
    }

    /// Fails if the process has ended or holds much more than before.
    fn compare(&self, daemon: &mut Daemon) -> Result<()> {
        daemon.check()?;
        eventually(SOON, || {
            let now = Self::of(daemon)?;
            ensure!(
                now.memory <= self.memory + GROWTH && now.files <= self.files + FILES,
                "{} grew from {} KiB and {} descriptors to {} KiB and {}",
                daemon.name,
                self.memory,
                self.files,
                now.memory,
                now.files,
            );
            Ok(())
        })?;
        let log = daemon.log();
        if let Some(line) = log.lines().find(|line| line.contains("panicked")) {
            bail!("{} panicked: {line}", daemon.name);
        }
        Ok(())
    }
}

impl Scene {
    /// Builds it. `change` may change the configuration before anything is started.
    pub(crate) fn new(change: impl FnOnce(&mut Lab) -> Result<()>) -> Result<Self> {
        let spec = LabSpec::new(Programs::of_this_test()?);
        let mut lab = Lab::without_connector(LabSpec { workers: 2, ..spec })?;
        lab.configure_connector()?;
        change(&mut lab)?;
        lab.control_plane.servers[0].daemon.start()?;
        lab.workers[0].agent()?.start()?;
        lab.workers[0].agent()?.wait_ready(SOON)?;
        lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
        let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
        let steady = Steady::start(proxy, echo().to_string());
        // The first requests fill caches and pools, which is no growth.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Self {
            steady,
            server: Usage::of(&lab.control_plane.servers[0].daemon)?,
            agent: Usage::of(lab.workers[0].agent()?)?,
            lab,
        })
    }

    /// The server's process.
    pub(crate) fn server(&mut self) -> &mut Daemon {
        &mut self.lab.control_plane.servers[0].daemon
    }

    /// The honest agent's process.
    pub(crate) fn agent(&mut self) -> Result<&mut Daemon> {
        self.lab.workers[0].agent()
    }

    /// Returns the address of the server's tunnel.
    pub(crate) fn tunnel(&self) -> SocketAddr {
        self.lab.control_plane.servers[0].sockets.tunnel
    }

    /// A folder below the laboratory's, for certificates.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.lab.folder().join(name)
    }

    /// Lets the agent hold this much more memory than usual when the attack is over, in KiB.
    pub(crate) fn spare(&mut self, memory: u64) {
        self.agent.memory += memory;
    }

    /// The value of a metric of the server, labels included in its name; 0 while it is absent.
    pub(crate) fn metric(&self, name: &str) -> Result<f64> {
        metric(&self.lab.control_plane.servers[0].daemon, name)
    }

    /// The attack is over: both processes live, hold no more than before, and none of the honest
    /// client's requests failed.
    pub(crate) fn unharmed(mut self) -> Result<()> {
        let requests = self.steady.finish()?;
        ensure!(requests > 10, "only {requests} honest requests were made");
        self.server
            .compare(&mut self.lab.control_plane.servers[0].daemon)?;
        self.agent.compare(self.lab.workers[0].agent()?)
    }
}

/// A runtime that the hostile peers of one test live on: it turns on a thread of its own, so that
/// they go on while the test looks elsewhere, and ends with the test's process.
pub(crate) fn runtime() -> Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    Ok(handle)
}

/// Worker 1's echo.
pub(crate) fn echo() -> SocketAddr {
    (address::node(1), Behaviour::Echo.port()).into()
}

/// The value of a metric of a process, labels included in its name; 0 while it is absent.
pub(crate) fn metric(daemon: &Daemon, name: &str) -> Result<f64> {
    let (_, text) = daemon.get("/metrics")?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(Ok(0.0), |text| text.parse().context("no number"))
}
