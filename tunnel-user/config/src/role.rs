//! Program that reads a configuration file.

use std::collections::HashMap;
use std::path::Path;

use serde::de::IgnoredAny;

use super::ConfigError;

/// A program that reads a configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// `cpc server`.
    Server,
    /// `cpc agent`.
    Agent,
}

/// Top-level keys that only a server has.
const OF_SERVERS: [&str; 9] = [
    "frontends",
    "join",
    "leases",
    "listen",
    "policy",
    "redirect",
    "routing",
    "server_count",
    "server_id",
];

/// Top-level keys that only an agent has.
const OF_AGENTS: [&str; 4] = ["allow", "serve", "servers", "tunnels"];

impl Role {
    /// Returns the role to which the keys of a file belong; `None` where the file has keys of both
    /// roles, or of neither.
    ///
    /// # Errors
    /// [`ConfigError`] when it can't be read, or is not YAML with keys.
    pub fn of_file(path: &Path) -> Result<Option<Self>, ConfigError> {
        let keys: HashMap<String, IgnoredAny> = super::load(Some(path))?;
        let any_of = |of: &[&str]| of.iter().any(|key| keys.contains_key(*key));
        Ok(match (any_of(&OF_SERVERS), any_of(&OF_AGENTS)) {
            (true, false) => Some(Self::Server),
            (false, true) => Some(Self::Agent),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::write::tests::{AGENT, SERVER};

    fn of_text(text: &str) -> Result<Option<Role>, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Role::of_file(file.path())
    }

    #[test]
    fn a_role_is_told_from_its_own_keys() {
        assert_eq!(of_text(SERVER).unwrap(), Some(Role::Server));
        assert_eq!(of_text(AGENT).unwrap(), Some(Role::Agent));
        assert_eq!(of_text("servers:\n").unwrap(), Some(Role::Agent));
        for neither in ["", "version: 1\ntls: {}\n", "servers: []\nlisten: a\n"] {
            assert_eq!(of_text(neither).unwrap(), None, "{neither}");
        }
        for wrong in ["- a\n", "a: [\n", "text"] {
            of_text(wrong).unwrap_err();
        }
    }

    #[test]
    fn the_keys_of_each_role_are_complete() {
        let keys = |text: &str| -> BTreeSet<String> {
            let lines = text
                .lines()
                .filter(|line| line.starts_with(char::is_alphabetic));
            let keys = lines.filter_map(|line| line.split_once(':'));
            keys.map(|(key, _)| key.to_owned()).collect()
        };
        let (server, agent) = (keys(SERVER), keys(AGENT));
        assert!(server.difference(&agent).eq(&OF_SERVERS));
        assert!(agent.difference(&server).eq(&OF_AGENTS));
    }
}
