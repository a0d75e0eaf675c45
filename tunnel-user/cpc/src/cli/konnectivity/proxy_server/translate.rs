//! Translation of the flags of proxy-server to the configuration of our server.
//!
//! Flags and their defaults decide every setting that has a flag. All other settings come from the file.

use std::ops::RangeInclusive;
use std::time::Duration;

use tunnel_proto::preface::MAX_DEADLINE;

use super::{Args, Mode};
use crate::cli::konnectivity::common::{keepalive, listen, non_empty, pair, path, port, wrong};
use cpc_config::frontend::{Answers, FrontendConfig, TcpFrontend, UnixFrontend};
use cpc_config::konnectivity::{KonnectivityConfig, LeaseConfig, TokenConfig};
use cpc_config::kubernetes::Rate;
use cpc_config::labels::Labels;
use cpc_config::server::Strategy;
use cpc_config::tls_floor::{TlsFloor, TlsVersion, is_suite};
use cpc_config::{ConfigError, ServerConfig};
use cpc_host::lifecycle::LONGEST_DRAIN;

/// Ports that are neither reserved nor ephemeral.
const PORTS: RangeInclusive<u16> = 1024..=49151;

/// Mode of the socket under umask 0007: members of the socket's group may connect.
const SOCKET_MODE: u32 = 0o770;

/// Suites that Go has and our TLS lacks: they are weaker than those of every present client.
const CBC_SUITES: [&str; 4] = [
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
];

/// Suites that Go always offers, with any list.
const TLS13_SUITES: [&str; 3] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
];

/// Warning where agents need no proof of their identity.
const ANYBODY: &str = "the server accepts any peer at --agent-port as an agent, as Konnectivity does; \
    --cluster-ca-cert, or --agent-namespace, --agent-service-account and --authentication-audience restrict that";

impl Args {
    pub(super) fn lay_over(
        &self,
        config: &mut ServerConfig,
        notes: &mut Vec<String>,
    ) -> Result<(), ConfigError> {
        let floor = self.floor(notes)?;
        let frontend = self.frontend(&floor)?;
        match self.frontend.mode {
            Mode::Grpc => config.frontends.grpc.push(frontend),
            Mode::HttpConnect => config.frontends.http_connect.push(frontend),
        }
        self.identity(config)?;
        config.routing.strategies = strategies(&self.server.proxy_strategies)?;
        if self.server.enable_lease_controller {
            config.leases = Some(LeaseConfig {
                namespace: self.server.lease_namespace.clone(),
                label: labels(&self.server.lease_label)?,
                kubeconfig: path(&self.agents.kubeconfig),
                rate: self.rate(),
            });
        }
        let alone = config.server_count == 1 || config.leases.is_some();
        let kept = config.konnectivity.take().unwrap_or_default();
        let mut konnectivity = self.konnectivity(kept, floor, notes)?;
        konnectivity.server_ids = self.server_ids(alone);
        config.konnectivity = Some(konnectivity);
        self.times(config);
        self.pages(config)
    }

    fn frontend(&self, floor: &TlsFloor) -> Result<FrontendConfig, ConfigError> {
        let flags = &self.frontend;
        // gRPC has one way to refuse.
        let answers = match flags.mode {
            Mode::Grpc => Answers::default(),
            Mode::HttpConnect => Answers::Konnectivity,
        };
        let tls = pair(
            ("--server-cert", &flags.server_cert),
            ("--server-key", &flags.server_key),
        )?;
        let client_ca = path(&flags.server_ca_cert);
        if let Some(unix) = path(&flags.uds_name) {
            if flags.server_port != 0 {
                return Err(wrong("--server-port", "must be 0 with --uds-name"));
            }
            if tls.is_some() || client_ca.is_some() {
                let why = "a Unix socket has no TLS: leave out --server-cert, --server-key and \
                           --server-ca-cert, or --uds-name";
                return Err(wrong("--uds-name", why));
            }
            return Ok(FrontendConfig::Unix(UnixFrontend {
                unix,
                mode: SOCKET_MODE,
                takeover: flags.delete_existing_uds_file,
                tenant: None,
                allow: None,
                answers,
            }));
        }
        let port = port("--server-port", flags.server_port, PORTS)?;
        let needed = "is needed without --uds-name: kube-apiserver authenticates by certificate";
        let (cert, key) = tls.ok_or_else(|| wrong("--server-cert", needed))?;
        let client_ca = client_ca.ok_or_else(|| wrong("--server-ca-cert", needed))?;
        let host = non_empty(&flags.server_bind_address).unwrap_or_default();
        Ok(FrontendConfig::Tcp(TcpFrontend {
            tcp: listen("--server-bind-address", host, port)?,
            cert,
            key,
            client_ca,
            tls_floor: Some(floor.clone()),
            tenant: None,
            allow: None,
            answers,
        }))
    }

    fn konnectivity(
        &self,
        kept: KonnectivityConfig,
        tls_floor: TlsFloor,
        notes: &mut Vec<String>,
    ) -> Result<KonnectivityConfig, ConfigError> {
        let flags = &self.agents;
        let port = port("--agent-port", flags.agent_port, PORTS)?;
        let host = non_empty(&flags.agent_bind_address).unwrap_or_default();
        let listen = listen("--agent-bind-address", host, port)?;
        let tls = pair(
            ("--cluster-cert", &flags.cluster_cert),
            ("--cluster-key", &flags.cluster_key),
        )?;
        let (cert, key) =
            tls.ok_or_else(|| wrong("--cluster-cert", "is needed: agents connect over TLS only"))?;
        let client_ca = path(&flags.cluster_ca_cert);
        let token = self.token()?;
        if client_ca.is_some() && token.is_some() {
            let why = "agents show a certificate or a token: leave out this one or \
                       --agent-namespace, --agent-service-account, --authentication-audience";
            return Err(wrong("--cluster-ca-cert", why));
        }
        let believe_identifiers = self.own.cpc_believe_identifiers;
        if client_ca.is_none() && token.is_none() {
            if !believe_identifiers {
                let why = "false needs authenticated agents: add --cluster-ca-cert, or \
                           --agent-namespace, --agent-service-account and \
                           --authentication-audience";
                return Err(wrong("--cpc-believe-identifiers", why));
            }
            notes.push(ANYBODY.into());
        }
        Ok(KonnectivityConfig {
            listen,
            cert: Some(cert),
            key: Some(key),
            client_ca,
            token,
            believe_identifiers,
            keepalive: keepalive("--keepalive-time", flags.keepalive_time, notes),
            tls_floor,
            ..kept
        })
    }

    fn token(&self) -> Result<Option<TokenConfig>, ConfigError> {
        let flags = &self.agents;
        let all = [
            ("--agent-namespace", non_empty(&flags.agent_namespace)),
            (
                "--agent-service-account",
                non_empty(&flags.agent_service_account),
            ),
            (
                "--authentication-audience",
                non_empty(&flags.authentication_audience),
            ),
        ];
        if all.iter().all(|(_, value)| value.is_none()) {
            return Ok(None);
        }
        let needed = "is needed where agents show tokens, with the other two of \
                      --agent-namespace, --agent-service-account and --authentication-audience";
        let [namespace, service_account, audience] =
            all.map(|(flag, value)| value.map(str::to_owned).ok_or_else(|| wrong(flag, needed)));
        Ok(Some(TokenConfig {
            audience: audience?,
            namespace: namespace?,
            service_account: service_account?,
            kubeconfig: path(&flags.kubeconfig),
            rate: self.rate(),
        }))
    }

    /// Returns the rate of requests, `None` for unlimited. A value of 0 becomes the default of
    /// Kubernetes' own clients, if the other is not 0.
    fn rate(&self) -> Option<Rate> {
        let (qps, burst) = (self.agents.kubeconfig_qps, self.agents.kubeconfig_burst);
        if qps < 0.0 || (qps == 0.0 && burst <= 0) {
            return None;
        }
        Some(Rate {
            per_second: if qps == 0.0 { 5.0 } else { qps },
            burst: u32::try_from(burst).ok().filter(|n| *n > 0).unwrap_or(10),
        })
    }

    /// Returns the number of server ids: 1 where agents count several servers by their reports, because
    /// several ids of one server would satisfy them and leave another out.
    fn server_ids(&self, alone: bool) -> u32 {
        let usual = if alone {
            KonnectivityConfig::default().server_ids
        } else {
            1
        };
        self.own.cpc_server_ids.unwrap_or(usual)
    }

    fn identity(&self, config: &mut ServerConfig) -> Result<(), ConfigError> {
        let id = non_empty(&self.server.server_id).map(str::to_owned);
        config.server_id = id.or(config.server_id.take());
        if config.server_id.is_none() {
            config.server_id = Some(uuid::Uuid::new_v4().to_string());
        }
        let count = u32::try_from(self.server.server_count);
        config.server_count = count.ok().filter(|count| *count > 0).ok_or_else(|| {
            let given = self.server.server_count;
            wrong("--server-count", format!("{given} is not at least 1"))
        })?;
        Ok(())
    }

    fn times(&self, config: &mut ServerConfig) {
        let dial = self.server.backend_dial_timeout;
        if dial > Duration::ZERO {
            config.limits.dial_timeout = dial.min(MAX_DEADLINE);
        }
        config.limits.drain = self.server.graceful_shutdown_timeout.min(LONGEST_DRAIN);
    }

    fn pages(&self, config: &mut ServerConfig) -> Result<(), ConfigError> {
        let flags = &self.pages;
        let health = port("--health-port", flags.health_port, PORTS)?;
        let host = non_empty(&flags.health_bind_address).unwrap_or_default();
        config.health = Some(listen("--health-bind-address", host, health)?);
        let admin = port("--admin-port", flags.admin_port, PORTS)?;
        let host = match flags.admin_bind_address.as_str() {
            "" => "127.0.0.1",
            host => host,
        };
        config.admin = listen("--admin-bind-address", host, admin)?;
        Ok(())
    }

    fn floor(&self, notes: &mut Vec<String>) -> Result<TlsFloor, ConfigError> {
        let min_version = match non_empty(&self.server.tls_min_version) {
            Some("VersionTLS13") => TlsVersion::Tls13,
            None | Some("VersionTLS12") => TlsVersion::Tls12,
            Some(old @ ("VersionTLS10" | "VersionTLS11")) => {
                notes.push(format!(
                    "--tls-min-version={old} counts as VersionTLS12: older versions are not supported"
                ));
                TlsVersion::Tls12
            }
            Some(other) => {
                let why = format!("{other:?} is no version; VersionTLS12 and VersionTLS13 are");
                return Err(wrong("--tls-min-version", why));
            }
        };
        let listed = self
            .server
            .cipher_suites
            .iter()
            .filter(|name| !name.is_empty());
        let (weak, mut cipher_suites): (Vec<String>, Vec<String>) = listed
            .cloned()
            .partition(|name| CBC_SUITES.contains(&name.as_str()));
        if let Some(unknown) = cipher_suites.iter().find(|name| !is_suite(name)) {
            let why = format!("{unknown} is not known, or not safe");
            return Err(wrong("--cipher-suites", why));
        }
        if !weak.is_empty() {
            notes.push(format!("unsupported cipher suites: {}", weak.join(",")));
        }
        if !(cipher_suites.is_empty() && weak.is_empty()) {
            cipher_suites.extend(TLS13_SUITES.map(str::to_owned));
        }
        Ok(TlsFloor {
            min_version,
            cipher_suites,
        })
    }
}

/// Formats labels in their usual form.
fn labels(text: &str) -> Result<String, ConfigError> {
    let labels = text.parse::<Labels>();
    labels
        .map(|labels| labels.to_string())
        .map_err(|error| wrong("--lease-label", error.to_string()))
}

fn strategies(list: &str) -> Result<Vec<Strategy>, ConfigError> {
    let known = |name: &str| match name {
        "default" => Ok(Strategy::Default),
        "destHost" => Ok(Strategy::DestHost),
        "defaultRoute" => Ok(Strategy::DefaultRoute),
        other => Err(wrong(
            "--proxy-strategies",
            format!("{other:?} is no strategy; default, destHost and defaultRoute are"),
        )),
    };
    let names = list.split(',').filter(|name| !name.is_empty());
    let strategies = names.map(known).collect::<Result<Vec<_>, _>>()?;
    if strategies.is_empty() {
        return Err(wrong("--proxy-strategies", "must name at least one"));
    }
    Ok(strategies)
}

#[cfg(test)]
mod tests;
