//! `audit`: the files of the audit.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Smallest file: the records of one write must fit well into it.
const SMALLEST: u64 = 1 << 20;

/// `audit`: the record of connections and decisions. Off without `directory` and `journal`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Directory of its files, one a day (UTC) or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Number of days for which files stay.
    pub keep: usize,
    /// Maximum bytes of all files, at least 1 MiB.
    pub max_bytes: u64,
    /// Writes to systemd's journal, as `cpc-audit`.
    pub journal: bool,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            directory: None,
            keep: 30,
            max_bytes: 1 << 30,
            journal: false,
        }
    }
}

impl AuditConfig {
    /// Whether the audit is on.
    pub fn is_on(&self) -> bool {
        self.directory.is_some() || self.journal
    }

    /// Makes paths absolute.
    pub(super) fn resolve(&mut self, base: &Path) {
        if let Some(directory) = &mut self.directory {
            *directory = base.join(&directory);
        }
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &'static str, why: &str| Err(ConfigError::value(key, why));
        if !(1..=10_000).contains(&self.keep) {
            return wrong("audit.keep", "must be 1 to 10000 days");
        }
        if self.max_bytes < SMALLEST {
            return wrong("audit.max_bytes", "must be at least 1048576");
        }
        Ok(())
    }
}
