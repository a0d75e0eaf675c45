//! The pin directory: where everything lies, and who may change it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tunnel_ebpf_common::SCHEMA;

use super::{Hook, RedirectError};

/// A pin directory.
#[derive(Clone, Debug)]
pub(super) struct Pin(PathBuf);

/// Held while something below a pin directory is changed.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl Pin {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Directory of the maps of this version's schema.
    fn maps(&self) -> PathBuf {
        self.0.join(format!("maps-v{SCHEMA}"))
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Directory of an attachment's links.
    pub(super) fn links(&self, attachment: &str) -> PathBuf {
        self.0.join("links").join(attachment)
    }

    /// Where a link is pinned.
    pub(super) fn link(&self, attachment: &str, hook: Hook) -> PathBuf {
        self.links(attachment).join(hook.name())
    }

    /// Whether anything was ever pinned here in this version's schema.
    pub(super) fn exists(&self) -> bool {
        self.maps().exists()
    }

    /// Makes the directories that attaching needs.
    pub(super) fn create(&self, attachment: &str) -> Result<(), RedirectError> {
        let existing = self
            .0
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let kind = statfs(existing).map_err(|error| failed(existing, error.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            return Err(RedirectError::NotBpffs(self.0.clone()));
        }
        for directory in [self.maps(), self.links(attachment)] {
            fs::create_dir_all(&directory).map_err(|error| failed(&directory, error))?;
        }
        Ok(())
    }

    /// Waits until nobody else changes anything here.
    pub(super) fn lock(&self) -> Result<Lock, RedirectError> {
        let directory = File::open(&self.0).map_err(|error| failed(&self.0, error))?;
        Flock::lock(directory, FlockArg::LockExclusive)
            .map(Lock)
            .map_err(|(_, error)| failed(&self.0, error.into()))
    }
}

/// An error about a file below a pin directory.
pub(super) fn failed(path: &Path, source: io::Error) -> RedirectError {
    RedirectError::Pin {
        path: path.to_owned(),
        source,
    }
}
