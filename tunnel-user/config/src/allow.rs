//! Entries of an allow-list: address ranges or DNS names, with ports.

use std::fmt;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use tunnel_proto::preface::{Name, NameError};
use tunnel_proto::route::NamePattern;

use super::rule::{PortRange, PortRangeError, Rule, RuleError};

/// Entry of an allow-list. `Display` writes it as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Keys")]
pub enum AllowRule {
    /// Destinations requested by address, and addresses to which requested names resolve.
    Addresses(Rule),
    /// Destinations requested by name.
    Names(NameRule),
}

/// A name, or all names below one, and the ports there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRule {
    /// The names.
    pub name: NamePattern,
    /// Ports; none listed means every port.
    pub ports: Vec<PortRange>,
}

impl NameRule {
    /// Whether the rule covers `name` and `port`.
    pub fn covers(&self, name: &Name, port: u16) -> bool {
        self.name.matches(name) && PortRange::any_contains(&self.ports, port)
    }
}

impl fmt::Display for NameRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)?;
        PortRange::fmt_list(&self.ports, f)
    }
}

/// Keys of both kinds, as the file has them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    #[serde(skip_serializing_if = "Option::is_none")]
    cidr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<PortRange>,
}

/// Text that is no entry of an allow-list.
#[derive(Debug, thiserror::Error)]
pub enum AllowError {
    /// Neither an address range nor a name, or both.
    #[error("a rule has either `cidr` or `name`, and optionally `ports`")]
    Kind,
    /// No address range.
    #[error(transparent)]
    Range(#[from] RuleError),
    /// No name.
    #[error(
        "{text:?} is neither an address range (10.0.0.0/8, 10.0.0.1) nor a name (web.svc, *.svc): \
         {why}"
    )]
    Name {
        /// The text.
        text: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// No ports.
    #[error(transparent)]
    Ports(#[from] PortRangeError),
}

/// Reads an allow-list. Rejects a key without a value: its author may mean an empty list, and a
/// missing key allows more.
pub(super) fn list<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Vec<AllowRule>>, D::Error> {
    let list = Option::deserialize(d)?;
    list.map(Some).ok_or_else(|| {
        D::Error::custom(
            "allow has no rules: write [] to allow nothing, or leave the key out for the default",
        )
    })
}

impl TryFrom<Keys> for AllowRule {
    type Error = AllowError;

    fn try_from(keys: Keys) -> Result<Self, AllowError> {
        let ports = keys.ports;
        match (keys.cidr, keys.name) {
            (Some(cidr), None) => {
                let cidr = super::rule::parse_net(&cidr)?;
                Ok(Self::Addresses(Rule { cidr, ports }))
            }
            (None, Some(name)) => names(&name, ports),
            _ => Err(AllowError::Kind),
        }
    }
}

impl From<AllowRule> for Keys {
    fn from(rule: AllowRule) -> Self {
        let (cidr, name, ports) = match rule {
            AllowRule::Addresses(rule) => (Some(rule.cidr.to_string()), None, rule.ports),
            AllowRule::Names(rule) => (None, Some(rule.name.to_string()), rule.ports),
        };
        Self { cidr, name, ports }
    }
}

/// `CIDR`, `NAME` or `*.NAME`, each with `:PORTS` or without, as for [`Rule`].
impl FromStr for AllowRule {
    type Err = AllowError;

    fn from_str(s: &str) -> Result<Self, AllowError> {
        match s.parse::<Rule>() {
            Ok(rule) => Ok(Self::Addresses(rule)),
            Err(RuleError::Ports(error)) => Err(error.into()),
            Err(RuleError::Cidr(_)) => {
                let (name, ports) = match s.split_once(':') {
                    Some((name, ports)) => (name, PortRange::list(ports)?),
                    None => (s, Vec::new()),
                };
                names(name, ports)
            }
        }
    }
}

fn names(text: &str, ports: Vec<PortRange>) -> Result<AllowRule, AllowError> {
    let name = text.parse().map_err(|error: NameError| AllowError::Name {
        text: text.into(),
        why: error.why,
    })?;
    Ok(AllowRule::Names(NameRule { name, ports }))
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses(rule) => rule.fmt(f),
            Self::Names(rule) => rule.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> NameRule {
        match text.parse().unwrap() {
            AllowRule::Names(rule) => rule,
            AllowRule::Addresses(rule) => panic!("{text}: {rule}"),
        }
    }

    #[test]
    fn names_as_text() {
        let rule = names("Web.SVC.:443,8000-8100");
        assert_eq!(rule.to_string(), "web.svc ports 443,8000-8100");
        assert!(rule.covers(&"WEB.svc".parse().unwrap(), 8050));
        assert!(!rule.covers(&"web.svc".parse().unwrap(), 80));
        assert!(!rule.covers(&"a.web.svc".parse().unwrap(), 443));
        let below = names("*.svc");
        assert!(below.covers(&"a.b.svc".parse().unwrap(), 1));
        assert!(!below.covers(&"svc".parse().unwrap(), 1));
        assert!(!below.covers(&"xsvc".parse().unwrap(), 1));
    }

    /// A text that a resolver reads as an address does not pass for a name.
    #[test]
    fn what_is_neither_is_refused() {
        for wrong in [
            "",
            "127.1",
            "0x7f.1",
            "0x7f000001",
            "2130706433",
            "127.0.0.1.",
            "*",
            "*.",
            "*.1",
            "a.*.svc",
            "*web.svc",
            "10.0.0.0/33",
            "web.svc:",
            "web.svc:x",
            "10.0.0.1:",
            "[fd00::1",
            "a b",
            "unix:///run/x",
            "/run/x",
        ] {
            assert!(wrong.parse::<AllowRule>().is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn rules_as_keys() {
        let read = |text: &str| serde_json::from_str::<AllowRule>(text);
        let rule = read(r#"{"name": "*.svc", "ports": [443, "8000-8100"]}"#).unwrap();
        assert_eq!(rule, "*.svc:443,8000-8100".parse().unwrap());
        let rule = read(r#"{"cidr": "10.0.0.0/8"}"#).unwrap();
        assert_eq!(rule, "10.0.0.0/8".parse().unwrap());
        for wrong in [
            r#"{"ports": [1]}"#,
            r#"{"cidr": "10.0.0.0/8", "name": "web.svc"}"#,
            r#"{"name": "10.0.0.1"}"#,
            r#"{"cidr": "web.svc"}"#,
            r#"{"name": "web.svc", "protocol": "unix"}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong} was taken");
        }
    }
}
