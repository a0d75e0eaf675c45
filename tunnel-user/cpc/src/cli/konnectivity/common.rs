//! The common part of the two commands.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::go;
use crate::cli::common::{LogArgs, Overlay};
use cpc_config::{ConfigError, LogConfig};

/// Shortest keepalive: peers end HTTP/2 connections that ping more often.
const SHORTEST_KEEPALIVE: Duration = Duration::from_secs(30);

/// A configuration, with the notes to log once when it takes effect.
#[derive(Debug)]
pub(super) struct Translated<C> {
    /// The configuration, checked.
    pub config: C,
    /// Sentences for the log.
    pub notes: Vec<String>,
}

/// Flags that Konnectivity does not have, of both commands.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Beyond Konnectivity")]
pub(super) struct Base {
    /// Configuration file of `cpc` (YAML, version 1) that the flags override: for QUIC, the
    /// redirect, grants and limits
    #[arg(long = "cpc-config", env = "CPC_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    log: LogArgs,
    /// Verbosity of the log, as in klog: up to 2 no line per connection, 3 and 4 one for each, from 5
    /// on internal details, from 8 on everything [default: 4]
    #[arg(short, long, value_name = "LEVEL", value_parser = go::integer, help_heading = "Logging")]
    v: Option<i64>,
    /// Arguments without a flag, which Konnectivity ignores too
    #[arg(hide = true)]
    ignored: Vec<String>,
}

impl Base {
    /// Returns the file, if the command names one.
    pub(super) fn file(&self) -> Option<&Path> {
        let file = self.config.as_deref();
        file.filter(|file| !file.as_os_str().is_empty())
    }

    /// Applies the flags of the log.
    pub(super) fn apply_log(&self, log: &mut LogConfig) {
        if let Some(level) = self.v {
            log.filter = filter(level).into();
        }
        self.log.apply(&mut Overlay::default(), log);
    }

    /// Returns one sentence about all flags without effect.
    pub(super) fn unused_note(&self, mut flags: Vec<String>) -> Option<String> {
        flags.extend(self.ignored.iter().map(|argument| format!("{argument:?}")));
        (!flags.is_empty()).then(|| format!("without effect here: {}", flags.join(" ")))
    }
}

fn filter(level: i64) -> &'static str {
    match level {
        ..=2 => "info,cpc::access=off",
        3..=4 => "info",
        5..=7 => "info,cpc=debug",
        8.. => "debug",
    }
}

/// Returns the error about an invalid value of a flag.
pub(super) fn wrong(flag: &'static str, why: impl Into<String>) -> ConfigError {
    ConfigError::value(flag, why)
}

/// Returns `None` for an empty text, as Go does.
pub(super) fn non_empty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

/// Returns the file that a flag names.
pub(super) fn path(text: &Option<String>) -> Option<PathBuf> {
    non_empty(text).map(PathBuf::from)
}

/// Returns the files of the flags of a certificate and its key: both or neither.
///
/// # Errors
/// [`ConfigError::Value`] naming the flag that is missing.
pub(super) fn pair(
    (cert_flag, cert): (&'static str, &Option<String>),
    (key_flag, key): (&'static str, &Option<String>),
) -> Result<Option<(PathBuf, PathBuf)>, ConfigError> {
    match (path(cert), path(key)) {
        (Some(cert), Some(key)) => Ok(Some((cert, key))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(wrong(key_flag, format!("is needed with {cert_flag}"))),
        (None, Some(_)) => Err(wrong(cert_flag, format!("is needed with {key_flag}"))),
    }
}

/// Checks that the files of flags exist.
///
/// # Errors
/// [`ConfigError::Value`] naming the first flag whose file is missing.
pub(super) fn exist(files: &[(&'static str, &Option<String>)]) -> Result<(), ConfigError> {
    for (flag, file) in files {
        if let Some(file) = non_empty(file)
            && let Err(error) = std::fs::metadata(file)
        {
            return Err(wrong(flag, format!("{file}: {error}")));
        }
    }
    Ok(())
}

/// Checks that a port is in `range`.
///
/// # Errors
/// [`ConfigError::Value`] naming the flag and the range.
pub(super) fn port(
    flag: &'static str,
    port: i64,
    range: RangeInclusive<u16>,
) -> Result<u16, ConfigError> {
    let known = u16::try_from(port).ok().filter(|port| range.contains(port));
    let (first, last) = range.into_inner();
    known.ok_or_else(|| wrong(flag, format!("{port} is not a port from {first} to {last}")))
}

/// Returns the listen address: an address or a name of this host, or all addresses when empty.
///
/// # Errors
/// [`ConfigError::Value`] naming the flag of the host.
pub(super) fn listen(flag: &'static str, host: &str, port: u16) -> Result<SocketAddr, ConfigError> {
    if host.is_empty() {
        return Ok(everywhere(port));
    }
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let unknown = |why: String| wrong(flag, format!("{host:?} is no address of this host: {why}"));
    let mut addresses = (bare, port)
        .to_socket_addrs()
        .map_err(|error| unknown(error.to_string()))?;
    let first = addresses.next();
    // Like Go, which prefers IPv4 for a name of both families.
    let chosen = first
        .into_iter()
        .chain(addresses)
        .min_by_key(SocketAddr::is_ipv6);
    chosen.ok_or_else(|| unknown("it has none".into()))
}

/// Returns the unspecified address of both families where the system has IPv6.
fn everywhere(port: u16) -> SocketAddr {
    if TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok() {
        (Ipv6Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, port).into()
    }
}

/// Default interval of pings.
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(3600);

/// Returns the interval of pings, with a note where it is longer than requested; 0 means the default.
pub(super) fn keepalive(flag: &str, time: Duration, notes: &mut Vec<String>) -> Duration {
    if time.is_zero() {
        return DEFAULT_KEEPALIVE;
    }
    if time < SHORTEST_KEEPALIVE {
        notes.push(format!(
            "{flag}={time:?} is taken as 30s: a peer ends connections that ping more often"
        ));
    }
    time.max(SHORTEST_KEEPALIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_to_listen_on() {
        let at = |host| listen("--x", host, 80).map(|addr| addr.to_string());
        assert_eq!(at("127.0.0.1").unwrap(), "127.0.0.1:80");
        assert_eq!(at("::1").unwrap(), "[::1]:80");
        assert_eq!(at("[::1]").unwrap(), "[::1]:80");
        assert_eq!(at("localhost").unwrap(), "127.0.0.1:80");
        assert!(at("").unwrap().ends_with(":80"));
        let error = at("no such host").unwrap_err().to_string();
        assert!(error.starts_with("--x: "), "{error}");
    }

    #[test]
    fn verbosity_grows() {
        let filters = [0, 2, 3, 4, 5, 8, 10].map(filter);
        assert_eq!(filters[0], filters[1]);
        assert_eq!(filters[2], "info");
        assert!(filters[4].contains("debug") && filters[6] == "debug");
    }
}
