//! The scene of a measurement: a control plane and a worker, as network namespaces with one wire
//! between them, and the target on the worker.
//!
//! ```text
//!  cp  192.0.2.1 ---- veth ---- 192.0.2.2  w     10.99.N.2, 10.99.N.3: nodes of path N, on w
//! ```
//!
//! There is no route to the nodes, nor to anywhere else: a connection reaches them through a tunnel
//! only. The direct path leads to 192.0.2.2. Without root everything is on loopback instead.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result};

use super::target;
use crate::client::eventually;
use crate::lab::cgroup::Cgroup;
use crate::lab::netns::Netns;
use crate::lab::process::{Process, end_with_parent};
use crate::lab::site::Site;

/// The wire between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wire {
    /// A word for reports.
    pub name: &'static str,
    /// Bytes of an IP packet.
    pub mtu: u32,
    /// Whether the device cuts UDP packets by itself (USO); otherwise the kernel does.
    pub udp_segmentation: bool,
}

impl Wire {
    /// Usual size of a packet.
    pub const USUAL: Self = Self {
        name: "mtu 1500",
        mtu: 1500,
        udp_segmentation: true,
    };
    /// Jumbo frames.
    pub const JUMBO: Self = Self {
        name: "mtu 9000",
        mtu: 9000,
        udp_segmentation: true,
    };
    /// A network card without UDP segmentation offload.
    pub const NO_USO: Self = Self {
        name: "mtu 1500, no USO",
        mtu: 1500,
        udp_segmentation: false,
    };
    /// The loopback interface of this machine.
    pub const LOOPBACK: Self = Self {
        name: "loopback",
        mtu: 65_536,
        udp_segmentation: true,
    };
}

/// A host: where its programs run. Without a namespace it is this machine.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Namespace, and the group in which the programs are ended.
    pub inside: Option<(Netns, Cgroup)>,
}

impl Place {
    /// Lets `command` start there.
    ///
    /// # Errors
    ///
    /// The namespace does not exist.
    pub fn put(&self, command: &mut Command) -> Result<()> {
        match &self.inside {
            Some((netns, cgroup)) => {
                netns.place(command)?;
                cgroup.place(command)
            }
            None => {
                end_with_parent(command);
                Ok(())
            }
        }
    }

    /// Runs `work` there; programs and sockets that it starts stay there.
    ///
    /// # Errors
    ///
    /// Those of `work`.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.inside {
            Some((netns, _)) => netns.enter(work),
            None => work(),
        }
    }
}

/// One wire with its two ends.
#[derive(Debug)]
pub struct Scene {
    /// Connection of the two.
    pub wire: Wire,
    /// The servers' and the clients' host.
    pub control_plane: Place,
    /// The agents' and the target's host.
    pub worker: Place,
    target: Process,
}

impl Scene {
    /// Returns the address at which servers listen for agents.
    pub fn server(&self) -> Ipv4Addr {
        match self.control_plane.inside {
            Some(_) => Ipv4Addr::new(192, 0, 2, 1),
            None => Ipv4Addr::new(127, 0, 0, 1),
        }
    }

    /// Returns the target without a tunnel.
    pub fn direct(&self) -> SocketAddr {
        match self.worker.inside {
            Some(_) => (Ipv4Addr::new(192, 0, 2, 2), target::PORT).into(),
            None => (Ipv4Addr::new(127, 0, 0, 2), target::PORT).into(),
        }
    }

    /// Returns the target as the first (0) or second (1) node of path `number`.
    pub fn node(&self, number: u8, second: u8) -> Ipv4Addr {
        match self.worker.inside {
            Some(_) => Ipv4Addr::new(10, 99, number, 2 + second),
            None => Ipv4Addr::new(127, 99, number, 2 + second),
        }
    }

    fn create(wire: Wire, stage: &Stage, target: &Path) -> Result<Self> {
        let (control_plane, worker) = match &stage.site {
            Some(site) => {
                let name = wire.name.replace([' ', ','], "");
                let place = |role: &str| -> Result<Place> {
                    let netns = Netns::create(site.netns(&format!("{role}-{name}")).name())?;
                    netns.sysctl("ipv4/ip_local_port_range", "10000 65000")?;
                    // Thousands of short connections a second would use up the ports otherwise.
                    netns.sysctl("ipv4/tcp_tw_reuse", "1")?;
                    let inside = Some((netns, site.cgroup(role)?));
                    Ok(Place { inside })
                };
                let (control_plane, worker) = (place("cp")?, place("w")?);
                connect(&control_plane, &worker, wire)?;
                (control_plane, worker)
            }
            None => Default::default(),
        };
        let mut command = Command::new(target);
        worker.put(&mut command)?;
        let log = stage.subfolder("target")?.join("target.log");
        let mut scene = Self {
            wire,
            control_plane,
            worker,
            target: Process::start("bench-target", &mut command, &log)?,
        };
        let direct = scene.direct();
        let connect = || Ok(std::net::TcpStream::connect(direct).map(drop)?);
        let reached = scene
            .control_plane
            .enter(|| eventually(Duration::from_secs(5), connect));
        scene.target.check()?;
        reached.context("the target does not answer")?;
        Ok(scene)
    }

    /// Gives the worker the addresses of path `number`.
    pub(super) fn add_nodes(&self, number: u8) -> Result<()> {
        let Some((netns, _)) = &self.worker.inside else {
            return Ok(());
        };
        let [first, second] = [0, 1].map(|second| self.node(number, second));
        netns.ip(&format!(
            "address replace {first}/32 dev eth0\naddress replace {second}/32 dev eth0\n"
        ))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.target.kill();
    }
}

fn connect(control_plane: &Place, worker: &Place, wire: Wire) -> Result<()> {
    let (Some((cp, _)), Some((w, _))) = (&control_plane.inside, &worker.inside) else {
        return Ok(());
    };
    cp.ip(&format!(
        "link add eth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
         address add 192.0.2.1/24 dev eth0\nlink set eth0 up\n",
        w.name(),
        mtu = wire.mtu,
    ))?;
    w.ip("address add 192.0.2.2/24 dev eth0\nlink set eth0 up\n")?;
    if !wire.udp_segmentation {
        for netns in [cp, w] {
            netns.enter(|| super::offload::disable("eth0", "tx-udp-segmentation"))?;
        }
    }
    Ok(())
}

/// All scenes of a run, and their files. Dropping it ends every process and removes everything.
#[derive(Debug)]
pub struct Stage {
    /// Scenes in the order of their creation; dropped before the site.
    pub scenes: Vec<Scene>,
    /// Absent without root.
    site: Option<Site>,
    /// A temporary folder, without root.
    folder: Option<PathBuf>,
    bpffs: Option<PathBuf>,
}

impl Stage {
    /// Creates one scene for each of `wires`.
    ///
    /// # Errors
    ///
    /// What could not be made; nothing of it is left behind.
    pub fn create(wires: &[Wire], target: &Path) -> Result<Self> {
        let root = nix::unistd::geteuid().is_root();
        let site = if root { Some(Site::create()?) } else { None };
        let mut stage = Self {
            scenes: Vec::new(),
            site,
            folder: None,
            bpffs: None,
        };
        if !root {
            let folder = std::env::temp_dir().join(format!("cpc-bench-{}", std::process::id()));
            fs::create_dir(&folder)?;
            stage.folder = Some(folder);
        }
        for wire in wires {
            let scene = Scene::create(*wire, &stage, target)
                .with_context(|| format!("the scene with {}", wire.name))?;
            stage.scenes.push(scene);
        }
        Ok(stage)
    }

    /// Returns a folder, created if needed.
    ///
    /// # Errors
    ///
    /// It can't be made.
    pub fn subfolder(&self, name: &str) -> Result<PathBuf> {
        match (&self.site, &self.folder) {
            (Some(site), _) => site.subfolder(name),
            (None, Some(folder)) => {
                let folder = folder.join(name);
                fs::create_dir_all(&folder)?;
                Ok(folder)
            }
            (None, None) => Err(io::Error::from(io::ErrorKind::NotFound).into()),
        }
    }

    /// Creates a control group of this run; there is none without root.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn cgroup(&self, name: &str) -> Result<Cgroup> {
        self.site.as_ref().context("needs root")?.cgroup(name)
    }

    /// Returns the folder for the pins of kernel programs.
    ///
    /// # Errors
    ///
    /// There is no BPF file system, or no root.
    pub fn bpffs(&mut self) -> Result<PathBuf> {
        if let Some(folder) = &self.bpffs {
            return Ok(folder.clone());
        }
        let folder = self.site.as_ref().context("needs root")?.mount_bpffs()?;
        self.bpffs = Some(folder.clone());
        Ok(folder)
    }

    /// Returns the scene with `wire`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn scene(&self, wire: Wire) -> Result<&Scene> {
        let found = self.scenes.iter().find(|scene| scene.wire == wire);
        found.with_context(|| format!("no scene with {}", wire.name))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder
            && let Err(error) = fs::remove_dir_all(folder)
        {
            eprintln!("cannot remove {}: {error}", folder.display());
        }
    }
}

/// Returns the loopback address with `port`, where servers listen for clients.
pub(super) fn local(port: u16) -> SocketAddr {
    (IpAddr::from(Ipv4Addr::LOCALHOST), port).into()
}
