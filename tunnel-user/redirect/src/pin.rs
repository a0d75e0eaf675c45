//! The pin directory: its layout and permissions.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::Gid,
};
use tunnel_ebpf_common::SCHEMA;

use super::{
    Hook, RedirectError,
    link::{Access, remove_pin},
};

/// File beside an attachment's links with the number of their cgroup, for processes that may not open
/// links. It is a symbolic link, because nothing else on a BPF file system holds text.
const CGROUP: &str = "cgroup";

/// File beside them, if needed, with other attachments that decide over the same connections.
const RIVALS: &str = "rivals";

/// Access of a server without capabilities to the maps that it may use
/// ([`super::Redirect::shared_with`]). It can change neither the capture set nor the listeners.
const SHARED: [(&str, Access); 7] = [
    ("ATTACHMENTS", Access::Read),
    ("CAPTURES", Access::Read),
    ("COUNTERS", Access::Read),
    ("FLOWS", Access::Write),
    ("HEARTBEATS", Access::Write),
    ("LISTENERS", Access::Write),
    ("ROUTES", Access::Write),
];

/// A pin directory.
#[derive(Clone, Debug)]
pub(super) struct Pin {
    path: PathBuf,
    /// Group whose members may use the maps, beside their owner.
    group: Option<Gid>,
}

/// Lock held during changes below a pin directory.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl Pin {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, group: None }
    }

    /// Lets the members of a group use the maps as a server does: [`SHARED`].
    pub(super) fn shared_with(self, group: Option<Gid>) -> Self {
        Self { group, ..self }
    }

    /// Returns the directory itself.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of the maps of this version's schema.
    fn maps(&self) -> PathBuf {
        self.path.join(format!("maps-v{SCHEMA}"))
    }

    /// Returns the path of a map's pin.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Returns the directory of an attachment's links.
    pub(super) fn links(&self, attachment: &str) -> PathBuf {
        self.path.join("links").join(attachment)
    }

    /// Lists the directories of links, one for each attachment that has been linked or is about to be.
    pub(super) fn all_links(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path.join("links"));
        let paths = entries.into_iter().flatten().flatten();
        paths.map(|entry| entry.path()).collect()
    }

    /// Returns the path of a link's pin.
    pub(super) fn link(&self, attachment: &str, hook: Hook) -> PathBuf {
        self.links(attachment).join(hook.name())
    }

    /// Whether a map was ever pinned here in this version's schema.
    pub(super) fn exists(&self) -> bool {
        self.maps().exists()
    }

    /// Creates the directories that attaching needs.
    pub(super) fn create(&self, attachment: &str) -> Result<(), RedirectError> {
        let existing = self
            .path
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let kind = statfs(existing).map_err(|error| failed(existing, error.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            return Err(RedirectError::NotBpffs(self.path.clone()));
        }
        for directory in [self.maps(), self.links(attachment)] {
            fs::create_dir_all(&directory).map_err(|error| failed(&directory, error))?;
        }
        Ok(())
    }

    /// Sets group and mode of an attachment's maps, so that a server without capabilities can use it.
    /// Links and programs stay their owner's: opening them allows detaching them.
    pub(super) fn share(&self, attachment: &str) -> Result<(), RedirectError> {
        let Some(group) = self.group else {
            return Ok(());
        };
        let give = |path: &Path, mode| {
            chown(path, None, Some(group.as_raw()))
                .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
                .map_err(|source| match source.kind() {
                    io::ErrorKind::PermissionDenied => RedirectError::Share {
                        path: path.to_owned(),
                        group: group.as_raw(),
                        source,
                    },
                    _ => failed(path, source),
                })
        };
        let links = self.links(attachment);
        let directories = [Some(&*self.path), links.parent(), Some(&links)];
        for directory in directories.into_iter().flatten().chain([&*self.maps()]) {
            give(directory, 0o750)?;
        }
        for (name, access) in SHARED {
            let mode = match access {
                Access::Read => 0o640,
                Access::Write => 0o660,
            };
            give(&self.map(name), mode)?;
        }
        Ok(())
    }

    /// Notes the cgroup of an attachment's links.
    pub(super) fn remember_cgroup(&self, attachment: &str, id: u64) -> Result<(), RedirectError> {
        self.note(attachment, CGROUP, Some(&id.to_string()))
    }

    /// Returns the cgroup that an attachment was last linked to, if it ever was.
    pub(super) fn remembered_cgroup(&self, attachment: &str) -> Option<u64> {
        self.noted(attachment, CGROUP)?.parse().ok()
    }

    /// Notes the other attachments that decide over an attachment's connections.
    pub(super) fn remember_rivals(
        &self,
        attachment: &str,
        rivals: Option<&str>,
    ) -> Result<(), RedirectError> {
        self.note(attachment, RIVALS, rivals)
    }

    /// Returns the noted other attachments.
    pub(super) fn remembered_rivals(&self, attachment: &str) -> Option<String> {
        self.noted(attachment, RIVALS)
    }

    fn note(&self, attachment: &str, kind: &str, text: Option<&str>) -> Result<(), RedirectError> {
        let note = self.links(attachment).join(kind);
        remove_pin(&note)
            .and_then(|()| text.map_or(Ok(()), |text| symlink(text, &note)))
            .map_err(|error| failed(&note, error))
    }

    fn noted(&self, attachment: &str, kind: &str) -> Option<String> {
        let note = fs::read_link(self.links(attachment).join(kind)).ok()?;
        note.into_os_string().into_string().ok()
    }

    /// Waits for the lock of the directory.
    pub(super) fn lock(&self) -> Result<Lock, RedirectError> {
        let directory = File::open(&self.path).map_err(|error| failed(&self.path, error))?;
        Flock::lock(directory, FlockArg::LockExclusive)
            .map(Lock)
            .map_err(|(_, error)| failed(&self.path, error.into()))
    }
}

/// Returns an error about a file below a pin directory.
pub(super) fn failed(path: &Path, source: io::Error) -> RedirectError {
    RedirectError::Pin {
        path: path.to_owned(),
        source,
    }
}
