//! The laboratory: a control plane, a NAT router and workers on one machine.
//!
//! Each is a network namespace ([`address`] has the picture). The control plane has no route to a
//! worker, and the router lets nothing in: what arrives at a worker came through a tunnel that the
//! worker opened. On each worker stand an nginx in the kubelet's place and the plain
//! [targets](crate::target); the servers and agents are the real `cpc`.
//!
//! A [`Lab`] belongs to the process that built it and is removed when it is dropped; [`site`] says
//! what happens when that process is killed. Building one needs root.

pub mod address;
pub mod cgroup;
pub mod config;
mod connector;
pub mod daemon;
pub mod description;
pub mod hosts;
pub mod kubelet;
pub mod netns;
pub mod process;
pub mod router;
pub mod server;
pub mod shaper;
pub mod site;
pub mod small_disk;
pub mod usage;
pub mod worker;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use config::{Allow, ConnectorPki, Redirect};
use daemon::Daemon;
use description::Description;
use kubelet::ClusterPki;
use router::Router;
use server::ControlPlane;
use site::Site;
use worker::Worker;

/// Whether a laboratory can be built here; a test returns early where it can't.
///
/// # Errors
///
/// It can't and this is CI (the variable `CI` is set), where a test that did not run has failed.
pub fn available() -> Result<bool> {
    if nix::unistd::geteuid().is_root() {
        return Ok(true);
    }
    if std::env::var_os("CI").is_some() {
        bail!("the laboratory needs root, and CI has to run it");
    }
    eprintln!("skipped: the laboratory needs root");
    Ok(false)
}

/// Feature of [`kernel_since`] for tests that expect an errno of a refused connect(2).
pub const ERRNOS: &str = "errnos of refused connects";

/// Whether the kernel is `version` or newer, and so has `what`; a test that needs that returns
/// early otherwise.
///
/// # Errors
///
/// It is older and this is CI, where a test that did not run has failed.
pub fn kernel_since(version: (u32, u32), what: &str) -> Result<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    if next().zip(next()) >= Some(version) {
        return Ok(true);
    }
    let (major, minor) = version;
    let missing = format!(
        "needs Linux {major}.{minor} for {what}, this is {}",
        release.trim()
    );
    if std::env::var_os("CI").is_some() {
        bail!("{missing}");
    }
    eprintln!("skipped: {missing}");
    Ok(false)
}

/// The programs of this workspace that a laboratory runs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The connector.
    pub cpc: PathBuf,
    /// The plain targets.
    pub target: PathBuf,
}

impl Programs {
    /// Returns the programs in cargo's `folder`.
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            cpc: folder.join("cpc"),
            target: folder.join("lab-target"),
        }
    }

    /// Returns the programs of the same profile as the running test.
    ///
    /// # Errors
    ///
    /// They have not been built; the error says how to.
    pub fn of_this_test() -> Result<Self> {
        let this = std::env::current_exe()?;
        // target/PROFILE/deps/TEST-HASH
        let folder = this
            .ancestors()
            .nth(2)
            .context("the test is in no target folder")?;
        let programs = Self::in_folder(folder);
        for program in [&programs.cpc, &programs.target] {
            if !program.exists() {
                bail!(
                    "there is no {}; run the tests with `cargo xtask test`",
                    program.display()
                );
            }
        }
        Ok(programs)
    }
}

/// Parts of a laboratory.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// Number of workers, from 1.
    pub workers: u8,
    /// Number of servers, from 1.
    pub servers: u8,
    /// Destinations of the agents beyond their own workers.
    pub allow: Vec<Allow>,
    /// Whether the first server redirects the API server's sockets.
    pub redirect: bool,
    /// Engine of servers and agents (`datapath.engine`); their default when missing.
    pub engine: Option<Engine>,
    /// The programs to run.
    pub programs: Programs,
}

/// Engine that moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// epoll(7)
    Epoll,
    /// io_uring(7)
    IoUring,
}

impl Engine {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Epoll, Self::IoUring];

    /// Returns the name in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Epoll => "epoll",
            Self::IoUring => "io_uring",
        }
    }

    /// Whether the kernel has it; a test returns early where it has not.
    ///
    /// # Errors
    ///
    /// It has not and this is CI, where a test that did not run has failed.
    pub fn available(self) -> Result<bool> {
        if self == Self::IoUring && !kernel_since((6, 12), "what io_uring is used for")? {
            return Ok(false);
        }
        // SAFETY: without parameters nothing is read or written: EFAULT where it is let.
        let refused = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, 0) } < 0
            && std::io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT);
        if self == Self::Epoll || !refused {
            return Ok(true);
        }
        if std::env::var_os("CI").is_some() {
            bail!("io_uring is refused here, and CI has to run it");
        }
        eprintln!("skipped: io_uring is refused here");
        Ok(false)
    }
}

impl LabSpec {
    /// Returns one worker and one server, with the redirect.
    pub fn new(programs: Programs) -> Self {
        Self {
            workers: 1,
            servers: 1,
            allow: Vec::new(),
            redirect: true,
            engine: None,
            programs,
        }
    }
}

/// A laboratory. Dropping it ends every process in it and removes all its remains.
#[derive(Debug)]
pub struct Lab {
    /// The control-plane host.
    pub control_plane: ControlPlane,
    /// The router in between.
    pub router: Router,
    /// The workers; worker `n` is at index `n - 1`.
    pub workers: Vec<Worker>,
    /// The cluster's own certificates.
    pub cluster_pki: ClusterPki,
    /// The connector's certificate authority, once the connector has been configured.
    pub connector_pki: Option<ConnectorPki>,
    spec: LabSpec,
    redirect: Option<Redirect>,
    site: Site,
}

impl Lab {
    /// Returns the logs of all servers and agents, without the connections that have ended in order.
    pub fn logs(&self) -> String {
        let servers = self.control_plane.servers.iter();
        let servers = servers.map(|server| &server.daemon);
        let agents = self.workers.iter();
        let agents = agents.filter_map(|worker| worker.agent.as_ref());
        let logs = servers.chain(agents).map(|daemon| {
            let log = daemon.log();
            let is_end =
                |line: &&str| line.contains("cpc::access") && line.contains("reason=\"finished\"");
            let lines: Vec<_> = log.lines().filter(|line| !is_end(line)).collect();
            format!("{}:\n{}", daemon.name, lines.join("\n"))
        });
        logs.collect::<Vec<_>>().join("\n")
    }

    /// Builds the laboratory and waits until every server and every agent is ready.
    ///
    /// # Errors
    ///
    /// What could not be built; nothing of it is left behind.
    pub fn up(spec: LabSpec) -> Result<Self> {
        let mut lab = Self::without_connector(spec)?;
        lab.start_connector()?;
        Ok(lab)
    }

    /// Builds the laboratory, has `configure` change the configurations, and waits until every server and every agent
    /// is ready.
    ///
    /// # Errors
    ///
    /// As [`Self::up`], and those of `configure`.
    pub fn up_with<T>(
        spec: LabSpec,
        configure: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<(Self, T)> {
        let mut lab = Self::without_connector(spec)?;
        lab.configure_connector()?;
        let configured = configure(&mut lab)?;
        lab.start_configured()?;
        Ok((lab, configured))
    }

    /// Gives every agent a directory for its state, without which it has no successor.
    ///
    /// # Errors
    ///
    /// A configuration can't be written.
    pub fn keep_state(&mut self) -> Result<()> {
        for worker in &mut self.workers {
            let agent = worker.agent()?;
            let state_dir = agent.config_file().with_file_name("state");
            agent.configure(|config| config["state_dir"] = serde_json::json!(state_dir))?;
        }
        Ok(())
    }

    /// Builds everything but the servers and agents.
    ///
    /// # Errors
    ///
    /// What could not be built; nothing of it is left behind.
    pub fn without_connector(spec: LabSpec) -> Result<Self> {
        let in_range = |count| (1..=address::MOST).contains(&count);
        if !in_range(spec.workers) || !in_range(spec.servers) {
            bail!(
                "a laboratory has 1 to {} workers and as many servers",
                address::MOST
            );
        }
        let site = Site::create()?;
        let netns = |role: &str| netns::Netns::create(site.netns(role).name());
        let control_plane = ControlPlane {
            netns: netns("cp")?,
            apiserver: site.cgroup("apiserver")?,
            servers: Vec::new(),
        };
        let router = Router::create(netns("nat")?, &control_plane.netns, spec.servers)?;
        let cluster_pki = ClusterPki::create(site.subfolder("cluster")?)?;
        let cgroup = site.cgroup("workers")?;
        let workers = (1..=spec.workers)
            .map(|n| {
                let name = format!("w{n}");
                let netns = netns(&name)?;
                router.connect(&netns, n)?;
                let folder = site.subfolder(&name)?;
                Worker::start(
                    n,
                    netns,
                    &cgroup,
                    &folder,
                    &spec.programs.target,
                    &cluster_pki,
                )
            })
            .collect::<Result<_>>()?;
        let redirect = match spec.redirect {
            true => Some(Redirect {
                pin: site.mount_bpffs()?.join("cpc"),
                cgroup: control_plane.apiserver.path().to_owned(),
            }),
            false => None,
        };
        Ok(Self {
            control_plane,
            router,
            workers,
            cluster_pki,
            connector_pki: None,
            spec,
            redirect,
            site,
        })
    }

    /// Returns its parts, for people and scripts.
    pub fn describe(&self) -> Description {
        Description::of(self)
    }

    /// Returns the programs that it runs.
    pub fn programs(&self) -> &Programs {
        &self.spec.programs
    }

    /// Returns the folder of its files.
    pub fn folder(&self) -> &Path {
        self.site.folder()
    }

    /// Returns the connector's certificate authority, once the connector is configured.
    pub fn pki(&self) -> ConnectorPki {
        ConnectorPki::at(&self.spec.programs.cpc, self.folder().join("pki"))
    }

    /// Returns the worker `wN`.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn worker(&mut self, name: &str) -> Result<&mut Worker> {
        let found = self.workers.iter_mut().find(|worker| worker.name == name);
        found.with_context(|| format!("there is no worker {name} in this laboratory"))
    }

    /// Creates another namespace, with a loopback interface and nothing else.
    ///
    /// # Errors
    ///
    /// There is one of that name in this laboratory.
    pub fn netns(&self, name: &str) -> Result<netns::Netns> {
        netns::Netns::create(self.site.netns(name).name())
    }

    /// Mounts a small file system at the folder `name` of this laboratory.
    ///
    /// # Errors
    ///
    /// The kernel refuses the mount.
    pub fn small_disk(&self, name: &str, bytes: u64) -> Result<small_disk::SmallDisk> {
        Ok(small_disk::SmallDisk::at(
            self.site.mount_small(name, bytes)?,
        ))
    }

    /// Returns the folder of files that the kubelet's stand-in of worker `n` serves below `/files/`.
    ///
    /// # Errors
    ///
    /// The folder can't be created.
    pub fn files(&self, n: u8) -> Result<PathBuf> {
        let folder = self.site.subfolder(&format!("w{n}"))?.join("files");
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Creates another control group.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn cgroup(&self, name: &str) -> Result<cgroup::Cgroup> {
        self.site.cgroup(name)
    }

    /// Lets it stay when this process ends; `cargo xtask lab down` removes it.
    ///
    /// # Errors
    ///
    /// Its folder can't be written to; then it is removed.
    pub fn keep(mut self) -> Result<Description> {
        let description = self.describe();
        description.write(&self.site)?;
        self.site.keep()?;
        Ok(description)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.site.stays() {
            return;
        }
        // The site, which is dropped next, ends every process. These are our own children and are
        // waited for, so that none stays as a zombie; one that has ended already is no error.
        for worker in &mut self.workers {
            for program in worker.programs() {
                let _ = program.kill();
            }
            let _ = worker.agent.as_mut().map(Daemon::kill);
        }
        for server in &mut self.control_plane.servers {
            let _ = server.daemon.kill();
        }
    }
}
