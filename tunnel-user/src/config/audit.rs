//! `audit`: where the record of who reached what is kept.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::ConfigError;

/// `audit`: the record of who reached what, and of what was decided. Without either it is not kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Directory of its files, one a day (UTC).
    pub directory: Option<PathBuf>,
    /// How many of them are kept.
    pub keep: usize,
    /// To systemd's journal, as `cpc-audit`.
    pub journal: bool,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            directory: None,
            keep: 30,
            journal: false,
        }
    }
}

impl AuditConfig {
    /// Whether it is kept at all.
    pub fn is_on(&self) -> bool {
        self.directory.is_some() || self.journal
    }

    /// Makes paths absolute.
    pub(super) fn resolve(&mut self, base: &Path) {
        if let Some(directory) = &mut self.directory {
            *directory = base.join(&directory);
        }
    }

    /// # Errors
    /// [`ConfigError::Value`].
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if (1..=10_000).contains(&self.keep) {
            return Ok(());
        }
        Err(ConfigError::Value {
            key: "audit.keep",
            why: "must be 1 to 10000 files".into(),
        })
    }
}
