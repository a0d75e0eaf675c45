//! Configuration: a YAML file, then the environment (`CPC_*`), then flags. Later values override
//! earlier ones.
//!
//! Unknown keys are errors that name their line. Paths in a file are relative to the file. A loaded
//! configuration is checked and immutable. A reload reads everything again that may change without
//! a restart: TLS files and, on SIGHUP, the policy, allow-lists, capture sets and the log filter.

pub mod address;
pub mod agent;
mod allow;
pub mod allow_list;
pub mod audit;
pub mod datapath;
pub mod frontend;
pub mod join;
pub mod konnectivity;
pub mod kubernetes;
pub mod labels;
mod locate;
mod removed;
pub mod role;
pub mod rule;
pub mod server;
pub mod tls_floor;
pub mod transport;
mod tunnel_kind;
mod write;

use std::borrow::Cow;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tunnel_proto::trust_domain::TrustDomain;

use cpc_host::cores::MAX_SHARDS;

pub use agent::AgentConfig;
pub use allow::AllowRule;
pub use audit::AuditConfig;
pub use datapath::DatapathConfig;
pub use join::JoinConfig;
pub use rule::{PortRange, Rule};
pub use server::ServerConfig;
pub use transport::TransportConfig;
pub use tunnel_kind::TunnelKind;
pub use write::to_yaml;

/// UDP port of the tunnel, and TCP port of the health answer beside it.
pub const TUNNEL_PORT: u16 = 8132;

/// Reads a section or a list whose key may have no value: `limits:` is the same as `limits: {}`.
fn section<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Option::deserialize(d).map(Option::unwrap_or_default)
}

/// Reads a section that is in force only where its key is present, with or without a value.
fn optional_section<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    d: D,
) -> Result<Option<T>, D::Error> {
    section(d).map(Some)
}

/// Checks that no bound of `counts` is 0: it would refuse everything.
fn above_zero<T: Default + PartialEq, const N: usize>(
    counts: [(&'static str, Option<T>); N],
) -> Result<(), ConfigError> {
    let is_zero = |(_, count): &(_, Option<T>)| *count == Some(T::default());
    match counts.into_iter().find(is_zero) {
        None => Ok(()),
        Some((key, _)) => Err(ConfigError::value(
            key,
            "is 0, which would refuse everything; give it a number from 1 on, or leave it out for \
             the default",
        )),
    }
}

/// Maximum time for which connections wait for another tunnel.
const MAX_RESUME: Duration = Duration::from_secs(3600);

/// Checks the time for which connections wait for another tunnel.
fn check_resume(resume: Duration) -> Result<(), ConfigError> {
    if resume <= MAX_RESUME {
        return Ok(());
    }
    Err(ConfigError::value("limits.resume", "must be at most 1 h"))
}

/// Permitted windows of a stream, in bytes.
const STREAM_WINDOWS: RangeInclusive<u32> = 64 << 10..=256 << 20;

/// Checks the window of a stream.
fn check_stream_window(window: u32) -> Result<(), ConfigError> {
    if STREAM_WINDOWS.contains(&window) {
        return Ok(());
    }
    let why = format!("must be in {STREAM_WINDOWS:?} bytes");
    Err(ConfigError::value("limits.stream_window", why))
}

/// Checks a number of shards.
fn check_shards(shards: usize) -> Result<(), ConfigError> {
    if (1..=MAX_SHARDS).contains(&shards) {
        return Ok(());
    }
    Err(ConfigError::value(
        "shards",
        format!("must be 1 to {MAX_SHARDS}"),
    ))
}

/// Reason why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {why}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        why: io::Error,
    },
    /// The file is not YAML, or not in our schema. The text names line and column.
    #[error("{}: {why}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The mistake and its place.
        why: String,
    },
    /// A configuration that can't be written.
    #[error("the configuration can't be written: {why}")]
    Write {
        /// Value that has no form in YAML.
        why: String,
    },
    /// A value that can't be right.
    #[error("{key}: {why}")]
    Value {
        /// The key: `tls.cert`, `servers[0]`.
        key: Cow<'static, str>,
        /// The mistake and a correct value.
        why: String,
    },
}

impl ConfigError {
    /// Returns the error about the value of a key.
    pub fn value(key: impl Into<Cow<'static, str>>, why: impl Into<String>) -> Self {
        let (key, why) = (key.into(), why.into());
        Self::Value { key, why }
    }

    /// Adds the file of a value, where one was read, and the line of its key, where the file has
    /// the key.
    pub fn within(self, path: Option<&Path>) -> Self {
        match (self, path) {
            (Self::Value { key, why }, Some(path)) => {
                // Read again: errors are rare, and the text of all others need not be kept.
                let text = std::fs::read_to_string(path).unwrap_or_default();
                let place = match locate::locate(&text, &key) {
                    Some((line, column)) => format!("line {line} column {column}: "),
                    None => String::new(),
                };
                Self::Parse {
                    path: path.into(),
                    why: format!("{place}{key}: {why}"),
                }
            }
            (error, _) => error,
        }
    }
}

/// Reads `path` into `T`, or takes the defaults when there is no file.
///
/// # Errors
/// [`ConfigError`] naming the file and the line.
pub fn load<T: DeserializeOwned + Default>(path: Option<&Path>) -> Result<T, ConfigError> {
    let Some(path) = path else {
        return Ok(T::default());
    };
    let text = std::fs::read_to_string(path).map_err(|why| ConfigError::Read {
        path: path.into(),
        why,
    })?;
    serde_saphyr::from_str(&text).map_err(|e| ConfigError::Parse {
        path: path.into(),
        // The library's own words are for those who program with it.
        why: e.render_with_formatter(&removed::Formatter),
    })
}

/// The version of the schema: 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version;

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(1)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match u32::deserialize(d)? {
            1 => Ok(Self),
            other => Err(serde::de::Error::custom(format!(
                "version {other} is not known to this release, which reads version 1"
            ))),
        }
    }
}

/// `tls`: certificate of this process, and its CAs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM certificate chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// PEM private key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// PEM roots for our own trust domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Roots of further trust domains.
    #[serde(deserialize_with = "section")]
    pub trust: Vec<TrustConfig>,
    /// List of revoked identities and serial numbers, one per line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked: Option<PathBuf>,
    /// Agents request the next certificate from a server after two thirds of the lifetime of this
    /// one.
    pub renew: bool,
}

/// Another trust domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustConfig {
    /// Name of the trust domain.
    pub domain: TrustDomain,
    /// PEM roots that vouch for this domain alone.
    pub ca: PathBuf,
}

/// Files of TLS material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM chain, the leaf first.
    pub cert: PathBuf,
    /// PEM private key of the leaf.
    pub key: PathBuf,
    /// PEM roots that vouch for the leaf's own trust domain.
    pub ca: PathBuf,
    /// Further trust domains and the PEM roots that vouch for each.
    pub trust: Vec<(TrustDomain, PathBuf)>,
    /// List of revoked peers.
    pub revoked: Option<PathBuf>,
}

impl TlsConfig {
    /// Returns the files, if all are named.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key that is missing.
    pub fn files(&self) -> Result<TlsFiles, ConfigError> {
        let need = |path: &Option<PathBuf>, key: &'static str| {
            let needed = || ConfigError::value(key, "is needed; `cpc pki` makes certificates");
            path.clone().ok_or_else(needed)
        };
        Ok(TlsFiles {
            cert: need(&self.cert, "tls.cert")?,
            key: need(&self.key, "tls.key")?,
            ca: need(&self.ca, "tls.ca")?,
            trust: self
                .trust
                .iter()
                .map(|t| (t.domain.clone(), t.ca.clone()))
                .collect(),
            revoked: self.revoked.clone(),
        })
    }

    fn resolve(&mut self, base: &Path) {
        let own = [
            &mut self.cert,
            &mut self.key,
            &mut self.ca,
            &mut self.revoked,
        ]
        .into_iter()
        .flatten();
        for path in own.chain(self.trust.iter_mut().map(|t| &mut t.ca)) {
            *path = base.join(&*path);
        }
    }
}

/// `log`: level, format and content of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Levels, also by module: `info`, `cpc=debug,quinn=warn`.
    pub filter: String,
    /// Format of lines.
    pub format: LogFormat,
    /// Writes one line per connection.
    pub access: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: LogFormat::Text,
            access: true,
        }
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Returns the directory to which the paths of a configuration file are relative.
fn base_of(path: Option<&Path>) -> PathBuf {
    path.and_then(Path::parent)
        .map_or_else(PathBuf::new, Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::frontend::FrontendConfig;
    use super::*;

    fn parse(text: &str) -> Result<ServerConfig, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load(Some(file.path()))
    }

    #[test]
    fn an_unknown_key_names_its_line() {
        let error = parse("version: 1\nlisten: 0.0.0.0:1\nlissen: x\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("lissen") && error.contains("line 3"),
            "{error}"
        );
    }

    #[test]
    fn the_shortcut_is_to_be_deleted() {
        for value in ["true", "false", "", "{a: 1}"] {
            let text = format!(
                "redirect:\n  attachments:\n    - name: a\n      shortcut: {value}\n      cgroup: /a\n"
            );
            let error = parse(&text).unwrap_err().to_string();
            for said in ["line 4", "was removed", "delete the key `shortcut`"] {
                assert!(error.contains(said), "{value:?}: {error}");
            }
            assert!(!error.contains("unknown"), "{error}");
        }
        // A key that was never there is unknown, and those that there are do not name this one.
        let error = parse("redirect: {attachments: [{shortcuts: true}]}").unwrap_err();
        let error = error.to_string();
        let named = "unknown field `shortcuts`, expected one of name, cgroup";
        assert!(
            error.contains(named) && !error.contains("shortcut,"),
            "{error}"
        );
        assert!(!error.contains("removed"), "{error}");
    }

    #[test]
    fn a_frontend_is_of_one_kind() {
        let frontend = |keys| parse(&format!("frontends: {{http_connect: [{{{keys}}}]}}"));
        assert!(frontend("unix: x, mode: \"0600\"").is_ok());
        assert!(frontend("tcp: \"127.0.0.1:1\", cert: a, key: b, client_ca: c").is_ok());
        for wrong in [
            "",
            "unix: x, tcp: \"127.0.0.1:1\"",
            "unix: x, cert: a",
            "unix: x, tls_floor: {}",
            "tcp: \"127.0.0.1:1\", cert: a, key: b, client_ca: c, takeover: true",
            "tcp: \"127.0.0.1:1\"",
        ] {
            let error = frontend(wrong).unwrap_err().to_string();
            assert!(error.contains("either `unix`"), "{wrong:?}: {error}");
        }
    }

    /// 0640 in octal is the number 416, which no operator writes as a mode.
    #[test]
    fn a_mode_is_octal_beyond_doubt() {
        let mode = |text: &str| {
            let text = format!("frontends: {{http_connect: [{{unix: x, mode: {text}}}]}}");
            parse(&text).map(|config| match &config.frontends.http_connect[..] {
                [FrontendConfig::Unix(frontend)] => frontend.mode,
                other => panic!("{other:?}"),
            })
        };
        for (text, is) in [
            ("0640", 0o640),
            ("\"0640\"", 0o640),
            ("0o640", 0o640),
            ("\"0600\"", 0o600),
            ("\"00777\"", 0o777),
        ] {
            assert_eq!(mode(text).unwrap(), is, "{text}");
        }
        for text in [
            "416", "640", "\"640\"", "432", "0", "\"0\"", "9", "\"0888\"", "01000", "0x1ff",
            "0+66", "-0640", "u=rw", "0640.0", "\"\"",
        ] {
            let error = mode(text).unwrap_err().to_string();
            assert!(
                error.contains("is not a mode") && error.contains("0660"),
                "{text}: {error}"
            );
        }
    }

    /// Comments may stand for every key of a section.
    #[test]
    fn a_section_needs_no_keys() {
        let tls = "tls: {cert: a, key: b, ca: c}\n";
        for key in [
            "transport",
            "datapath",
            "policy",
            "routing",
            "frontends",
            "redirect",
            "limits",
            "log",
            "audit",
            "leases",
        ] {
            for text in [
                format!("{tls}{key}:\n"),
                format!("{tls}{key}: # nothing\n"),
                format!("{tls}{key}: {{}}\n"),
            ] {
                let config = parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
                config
                    .check()
                    .unwrap_or_else(|error| panic!("{text}: {error}"));
                assert_eq!(config.leases.is_some(), key == "leases");
            }
        }
        for nested in [
            "limits: {handshakes: }",
            "policy: {grants: }",
            "policy: {grants: [{identity: a, cidrs: , names: }]}",
            "redirect: {attachments: }",
            "frontends: {http_connect: , grpc: }",
        ] {
            let config =
                parse(&format!("{tls}{nested}\n")).unwrap_or_else(|e| panic!("{nested}: {e}"));
            config.check().unwrap();
        }
        // A missing key is an error that names it.
        for (text, named) in [
            ("tls:\n", "tls.cert"),
            ("join:\n", "join.ca"),
            ("join: {ca: x, kubernetes: }\n", "join.kubernetes.addresses"),
            ("konnectivity:\n", "client_ca or token"),
            ("routing: {strategies: }\n", "routing.strategies"),
        ] {
            let tls = if text.starts_with("tls") { "" } else { tls };
            let error = parse(&format!("{tls}{text}")).unwrap().check().unwrap_err();
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
        for text in [
            "frontends: {http_connect: [{unix: x, allow: }]}",
            "redirect: {attachments: [{name: a, cgroup: b, capture: [], allow: }]}",
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("allow has no rules"), "{text}: {error}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "serve:\nlimits:\nservers:\n").unwrap();
        let error = AgentConfig::load(Some(file.path()))
            .unwrap()
            .check()
            .unwrap_err();
        assert!(error.to_string().contains("servers: is empty"), "{error}");
    }

    #[test]
    fn nothing_is_bounded_to_none() {
        for key in [
            "connections",
            "connections_per_tenant",
            "connections_per_tunnel",
            "dials",
            "dials_per_tenant",
            "dials_per_tunnel",
            "agents",
            "agents_per_tenant",
            "stalled_bytes",
            "stalled_bytes_per_tenant",
            "stalled_bytes_per_tunnel",
            "session_bytes",
            "waiting_sessions",
            "waiting_sessions_per_tenant",
            "waiting_sessions_per_agent",
        ] {
            let text = format!("tls: {{cert: a, key: b, ca: c}}\nlimits: {{{key}: 0}}\n");
            let error = parse(&text).unwrap().check().unwrap_err().to_string();
            assert!(error.contains(&format!("limits.{key}: is 0")), "{error}");
            let text = text.replace(": 0}", ": 1}");
            parse(&text).unwrap().check().unwrap();
        }
        for key in [
            "connections",
            "stalled_bytes",
            "session_bytes",
            "waiting_sessions",
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let text = format!(
                "servers: [\"a:1\"]\ntls: {{cert: a, key: b, ca: c}}\nlimits: {{{key}: 0}}\n"
            );
            std::fs::write(file.path(), text).unwrap();
            let error = AgentConfig::load(Some(file.path())).unwrap().check();
            assert!(error.unwrap_err().to_string().contains("is 0"), "{key}");
        }
    }

    #[test]
    fn errors_are_for_who_writes_the_file() {
        for text in [
            "a: 1\na: 2\n",
            "shards: 1\nshards: 2\n",
            "---\nshards: 1\n---\nshards: 2\n",
            "a: *b\n",
            "listen: [\n",
        ] {
            let error = parse(text).unwrap_err().to_string();
            for word in ["Options", "Policy", "from_", "DuplicateKey", "serde"] {
                assert!(!error.contains(word), "{text}: {error}");
            }
        }
    }

    #[test]
    fn an_agent_is_let_in_by_certificate_or_token() {
        let check = |keys: &str| {
            let tls = "tls: {cert: a, key: b, ca: c}";
            let config = parse(&format!("{tls}\nkonnectivity: {{{keys}}}\n"))?;
            config.check()
        };
        assert!(check("client_ca: ca.crt").is_ok());
        assert!(check("token: {namespace: x}").is_ok());
        assert!(check("believe_identifiers: true").is_ok());
        for (wrong, named) in [
            ("", "client_ca or token"),
            ("client_ca: ca.crt, token: {}", "not both"),
            ("client_ca: ca.crt, server_ids: 9", "1 to 8"),
            ("client_ca: ca.crt, keepalive: 20s", "30 s"),
            ("client_ca: ca.crt, cert: a", "go together"),
        ] {
            let error = check(wrong).unwrap_err().to_string();
            assert!(error.contains(named), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn what_a_frontend_accepts_can_be_had() {
        let check = |frontends: &str| {
            let tls = "tls: {cert: a, key: b, ca: c}";
            parse(&format!("{tls}\nfrontends: {{{frontends}}}\n"))?.check()
        };
        let tcp = "tcp: \"127.0.0.1:1\", cert: a, key: b, client_ca: c";
        assert!(check(&format!("grpc: [{{{tcp}, tls_floor: {{}}}}]")).is_ok());
        assert!(check("http_connect: [{unix: x, answers: konnectivity}]").is_ok());
        for (wrong, named) in [
            (
                "grpc: [{unix: x, answers: konnectivity}]".into(),
                "frontends.grpc[0].answers",
            ),
            (
                format!("grpc: [{{{tcp}, tls_floor: {{cipher_suites: [none]}}}}]"),
                "frontends.grpc[0].tls_floor.cipher_suites",
            ),
        ] {
            let error = check(&wrong).unwrap_err().to_string();
            assert!(error.contains(named), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn servers_are_named_with_or_without_a_protocol() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "tls: {cert: a, key: b, ca: c}\nkonnectivity: {ca: k}\n\
                    servers: [\"a:1\", {address: \"b:2\", protocol: konnectivity}]\n";
        std::fs::write(file.path(), text).unwrap();
        let config = AgentConfig::load(Some(file.path())).unwrap();
        config.check().unwrap();
        let protocols: Vec<_> = config.servers.iter().map(|s| config.protocol(s)).collect();
        assert_eq!(
            protocols,
            [agent::Protocol::Auto, agent::Protocol::Konnectivity]
        );
    }

    #[test]
    fn an_agent_may_drain_for_ever() {
        let drain = |text: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), format!("limits: {{drain: {text}}}")).unwrap();
            AgentConfig::load(Some(file.path())).map(|config| config.limits.drain)
        };
        assert_eq!(drain("forever").unwrap(), None);
        let seconds = Duration::from_secs(90);
        assert_eq!(drain("1m 30s").unwrap(), Some(seconds));
        let error = drain("soon").unwrap_err().to_string();
        assert!(error.contains("forever"), "{error}");
    }

    #[test]
    fn a_transport_is_within_bounds() {
        use transport::{Congestion, Mtu};
        let check = |keys: &str| {
            let tls = "tls: {cert: a, key: b, ca: c}";
            let config = parse(&format!("{tls}\ntransport: {{{keys}}}\n"))?;
            config.check().map(|()| config.transport)
        };
        assert_eq!(check("").unwrap(), TransportConfig::default());
        assert_eq!(check("mtu: auto").unwrap().mtu, Mtu::Auto);
        assert_eq!(check("mtu: 1400").unwrap().mtu, Mtu::Fixed(1400));
        let congestion = |keys| check(keys).unwrap().congestion;
        assert_eq!(congestion("congestion: newreno"), Congestion::NewReno);
        assert_eq!(congestion("congestion: bbr"), Congestion::Bbr);
        for (wrong, named) in [
            ("mtu: 1279", "transport.mtu: must be in 1280..=65535"),
            ("mtu: large", "auto or the size"),
            ("mtu: 70000", "out of range"),
            ("max_mtu: 576", "transport.max_mtu"),
            ("congestion: vegas", "newreno"),
            ("ack_every: 0", "transport.ack_every: must be in 1..=64"),
        ] {
            let error = check(wrong).unwrap_err().to_string();
            assert!(error.contains(named), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn another_version_is_refused() {
        let error = parse("version: 2\n").unwrap_err().to_string();
        assert!(error.contains("reads version 1"), "{error}");
    }
}
