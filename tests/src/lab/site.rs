//! The remains of a laboratory on the machine, and how all of them are found and removed.
//!
//! Everything carries the laboratory's id: its folder, its namespaces, its control groups (which
//! hold every process) and the BPF file system mounted in its folder. So removing needs nothing
//! but the id, also after a crash in the middle of building.
//!
//! The process that builds a laboratory holds a lock in its folder until it ends. A folder whose lock
//! is free has no owner any more: the next process that builds one removes it. A laboratory that
//! stays has no lock.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::cgroup::Cgroup;
use super::netns::Netns;

const BASE: &str = "/run/cpc-lab";
/// The group below the root of the hierarchy that holds the groups of all laboratories.
const GROUP: &str = "cpc-lab";

/// Place of one laboratory. Dropping it removes the laboratory if this process built it and it is
/// not kept.
#[derive(Debug)]
pub struct Site {
    id: String,
    folder: PathBuf,
    /// Held while the laboratory belongs to this process.
    lock: Option<Flock<File>>,
}

impl Site {
    /// Creates a new place, after removing those without an owner.
    ///
    /// # Errors
    ///
    /// No root.
    pub fn create() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "network namespaces need root: run this with sudo; `cargo xtask demo` shows what \
                 is possible without"
            );
        }
        fs::create_dir_all(BASE)?;
        let _serialised = exclusive(&Path::new(BASE).join("lock"), FlockArg::LockExclusive)?
            .context("a waiting lock was refused")?;
        remove_abandoned()?;
        let id = (0..=u16::MAX)
            .map(|n| format!("{:04x}", n.wrapping_add(std::process::id() as u16)))
            .find(|id| !Path::new(BASE).join(id).exists())
            .context("there are 65,536 laboratories; remove some with `cargo xtask lab down`")?;
        let folder = Path::new(BASE).join(&id);
        fs::create_dir(&folder)?;
        let lock = exclusive(&folder.join("lock"), FlockArg::LockExclusiveNonblock)?;
        Ok(Self { id, folder, lock })
    }

    /// Returns every laboratory on this machine.
    ///
    /// # Errors
    ///
    /// The folder can't be read.
    pub fn all() -> Result<Vec<Self>> {
        let entries = match fs::read_dir(BASE) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context(BASE),
        };
        let mut sites: Vec<_> = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .map(|id| Self {
                folder: Path::new(BASE).join(&id),
                id,
                lock: None,
            })
            .collect();
        sites.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(sites)
    }

    /// Returns a few characters that no other laboratory on this machine has.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the folder of certificates, configuration, logs and sockets.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether it was built to stay, and so has no owner.
    pub fn stays(&self) -> bool {
        !self.lock_file().exists()
    }

    /// Lets it stay when this process ends.
    ///
    /// # Errors
    ///
    /// The folder can't be written to.
    pub fn keep(&mut self) -> Result<()> {
        fs::remove_file(self.lock_file())?;
        self.lock = None;
        Ok(())
    }

    /// Returns the namespace of `role`: `cp`, `nat`, `w1`, ..
    pub fn netns(&self, role: &str) -> Netns {
        Netns::named(format!("{}{role}", self.prefix()))
    }

    /// Returns the control group `name` of this laboratory, created if needed.
    ///
    /// # Errors
    ///
    /// There is no writable hierarchy.
    pub fn cgroup(&self, name: &str) -> Result<Cgroup> {
        Cgroup::root()?.child(GROUP)?.child(&self.id)?.child(name)
    }

    /// Returns a folder, created if needed.
    ///
    /// # Errors
    ///
    /// It can't be made.
    pub fn subfolder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Mounts a separate BPF file system: its pins end when it is unmounted.
    ///
    /// # Errors
    ///
    /// The kernel has none, or refuses the mount.
    pub fn mount_bpffs(&self) -> Result<PathBuf> {
        let path = self.subfolder("bpf")?;
        mount(
            Some("bpf"),
            &path,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount a BPF file system at {}", path.display()))?;
        Ok(path)
    }

    /// Mounts a small file system in memory at the folder `name`, created if needed, for tests of a
    /// full one.
    ///
    /// # Errors
    ///
    /// The kernel refuses the mount.
    pub fn mount_small(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.subfolder(name)?;
        let options = format!("size={bytes},mode=0755");
        let (kind, options) = (Some("tmpfs"), Some(&*options));
        mount(Some("small"), &path, kind, MsFlags::empty(), options)
            .with_context(|| format!("cannot mount a file system at {}", path.display()))?;
        Ok(path)
    }

    /// Ends every process of the laboratory and removes all its remains.
    ///
    /// # Errors
    ///
    /// The first thing that could not be removed; the rest may be there still, and this can be
    /// called again.
    pub fn remove(&self) -> Result<()> {
        Cgroup::at(Cgroup::root()?.path().join(GROUP).join(&self.id)).remove()?;
        for entry in fs::read_dir("/run/netns")
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&self.prefix()) {
                Netns::named(name).delete()?;
            }
        }
        for path in mounts_below(&self.folder)? {
            match umount2(&path, MntFlags::MNT_DETACH) {
                // Somebody else was faster.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => (),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot unmount {}", path.display()));
                }
            }
        }
        fs::remove_dir_all(&self.folder)
            .with_context(|| format!("cannot remove {}", self.folder.display()))
    }

    fn lock_file(&self) -> PathBuf {
        self.folder.join("lock")
    }

    fn prefix(&self) -> String {
        format!("cpc-{}-", self.id)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.lock.is_some()
            && let Err(error) = self.remove()
        {
            eprintln!("laboratory {} is not removed: {error:#}", self.id);
        }
    }
}

/// Returns the mounts below `folder` (proc_pid_mountinfo(5)), the last one first. The names there have none of
/// the characters that are escaped.
fn mounts_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let below = points
        .map(PathBuf::from)
        .filter(|path| path.starts_with(folder));
    let mut below: Vec<_> = below.collect();
    below.reverse();
    Ok(below)
}

/// Removes the laboratories whose owner has ended without doing so.
fn remove_abandoned() -> Result<()> {
    for site in Site::all()?.iter().filter(|site| !site.stays()) {
        if exclusive(&site.lock_file(), FlockArg::LockExclusiveNonblock)?.is_some() {
            site.remove()?;
        }
    }
    Ok(())
}

/// Locks the file at `path`; `None` when another process has it.
fn exclusive(path: &Path, how: FlockArg) -> Result<Option<Flock<File>>> {
    let file = File::create(path).with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
