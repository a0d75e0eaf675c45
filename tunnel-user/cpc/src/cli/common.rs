//! Flags that several subcommands share.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ipnet::IpNet;

use cpc_config::{AuditConfig, ConfigError, LogConfig, LogFormat, TlsConfig};
use cpc_handover::Predecessor;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::End;
use cpc_host::privileges::{self, CapabilitySet};
use cpc_observe::logging::{self, LogHandle};

/// Keys with values from flags or the environment, which override the file's.
#[derive(Debug, Default)]
pub(super) struct Overlay(Vec<&'static str>);

impl Overlay {
    /// Replaces a value by the one of a flag, if that is given.
    pub(super) fn put<T>(&mut self, key: &'static str, value: &mut T, given: Option<T>) {
        if let Some(given) = given {
            *value = given;
            self.0.push(key);
        }
    }

    /// Adds the source of a wrong value: the line of `file`, or the note that a flag or the
    /// environment has it.
    pub(super) fn locate(&self, error: ConfigError, file: Option<&Path>) -> ConfigError {
        let is_given = |key: &str| {
            let list = key.split('[').next().unwrap_or_default();
            self.0.contains(&list)
        };
        match error {
            ConfigError::Value { key, why } if is_given(&key) => {
                ConfigError::value(key, format!("{why} (set by a flag or in the environment)"))
            }
            error => error.within(file),
        }
    }
}

/// Checks the log filter.
pub(super) fn check_log(config: &LogConfig) -> Result<(), ConfigError> {
    let checked = logging::check_filter(&config.filter);
    checked.map_err(|error| ConfigError::value("log.filter", error.to_string()))
}

/// Parses a range of addresses; a single one needs no prefix length.
pub(super) fn net(text: &str) -> Result<IpNet, String> {
    let single = text.parse::<IpAddr>().map(IpNet::from);
    let net = single.or_else(|_| text.parse::<IpNet>().map(|net| net.trunc()));
    net.map_err(|_| format!("{text:?} is no address and no range: 10.99.1.2 and 10.99.0.0/16 are"))
}

/// Prepares a process that serves: drops all capabilities that its start does not need, and starts
/// logging.
pub(super) fn begin(
    for_start: CapabilitySet,
    log: &LogConfig,
    audit: &AuditConfig,
) -> anyhow::Result<LogHandle> {
    privileges::begin(for_start)?;
    // The thread that writes the log outlives the start.
    Ok(privileges::without(|| logging::init(log, audit))??)
}

/// Returns the sockets that the service manager passes, and the process whose place this one takes: what an
/// earlier one has left with the service manager, or, where `is_replacing`, the running one of `role`.
pub(super) fn take_over(
    state_dir: Option<&Path>,
    role: &str,
    is_replacing: bool,
) -> anyhow::Result<(Inherited, Option<Predecessor>)> {
    let inherited = Inherited::from_environment();
    let mut inherited = inherited.context("sockets from the service manager")?;
    let found = cpc_handover::find(state_dir, role, is_replacing, &mut inherited);
    let found = found.context("takeover")?;
    Ok((inherited, found))
}

/// Ends a process that does not serve any more. Nothing of its service is left, such as tasks and listeners.
pub(super) fn finish(end: End) -> anyhow::Result<()> {
    Ok(super::runtime()?.block_on(end.may_exit())?)
}

/// Flags of our certificate and the trusted CAs.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct TlsArgs {
    /// PEM certificate chain
    #[arg(long, env = "CPC_TLS_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// PEM private key
    #[arg(long, env = "CPC_TLS_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    /// PEM roots that vouch for peers of our own trust domain
    #[arg(long, env = "CPC_TLS_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl TlsArgs {
    pub(super) fn apply(&self, overlay: &mut Overlay, config: &mut TlsConfig) {
        overlay.put("tls.cert", &mut config.cert, self.cert.clone().map(Some));
        overlay.put("tls.key", &mut config.key, self.key.clone().map(Some));
        overlay.put("tls.ca", &mut config.ca, self.ca.clone().map(Some));
    }
}

/// Flags of the log.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Logging")]
pub(super) struct LogArgs {
    /// Log filter, such as `info` or `info,cpc::agent=debug` [default: info]
    #[arg(long, env = "CPC_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// Format of log lines [default: text]
    #[arg(long, env = "CPC_LOG_FORMAT", value_enum)]
    log_format: Option<LogFormat>,
}

impl LogArgs {
    pub(super) fn apply(&self, overlay: &mut Overlay, config: &mut LogConfig) {
        overlay.put("log.filter", &mut config.filter, self.log.clone());
        overlay.put("log.format", &mut config.format, self.log_format);
    }
}
