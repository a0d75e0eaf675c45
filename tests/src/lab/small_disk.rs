//! A file system that a test can fill to its last byte and empty again.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The file that takes the room.
const BALLAST: &str = "ballast";
/// Size of one write: the unit in which tmpfs allocates.
const PAGE: usize = 4096;

/// A file system of its own. The laboratory unmounts it.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Returns the mount point.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Fills it but for `pages` of 4096 bytes.
    ///
    /// # Errors
    ///
    /// Anything but that it is full.
    pub fn fill(&self, pages: usize) -> Result<()> {
        let mut file = File::create(self.ballast())?;
        let mut written = 0;
        loop {
            match file.write(&[0; PAGE]) {
                Ok(PAGE) => written += PAGE,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error).context("filling a file system"),
            }
        }
        let left = written.saturating_sub(pages * PAGE);
        Ok(file.set_len(left as u64)?)
    }

    /// Makes room again.
    ///
    /// # Errors
    ///
    /// It was not full.
    pub fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.ballast())?)
    }

    fn ballast(&self) -> PathBuf {
        self.0.join(BALLAST)
    }
}
