use std::fmt::Debug;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::*;
use crate::agent::{Protocol, ServerAddress};
use crate::{AgentConfig, LogConfig, ServerConfig};

/// Every key of a server, each with another value than its default.
pub(crate) const SERVER: &str = r#"
version: 1
listen: "[::1]:1"
server_id: "1"
server_count: 3
shards: 64
state_dir: "0x10"
tls:
  cert: "null"
  key: " key with blanks "
  ca: "a: b # c"
  trust: [{domain: "1e3", ca: "~"}, {domain: other.example, ca: "line\nbreak"}]
  revoked: "yes"
  renew: true
transport: {mtu: 1400, max_mtu: 1500, congestion: newreno, ack_every: 64}
datapath: {engine: io_uring}
policy:
  grants:
    - identity: spiffe://cluster.local/agent/*
      cidrs: [10.0.0.1/8, 10.0.0.1, "fd00::/64"]
      names: ["*.svc", "-"]
      default_route: true
    - identity: ""
routing: {strategies: [default, defaultRoute, destHost]}
frontends:
  http_connect:
    - unix: /run/a
      mode: "0600"
      takeover: true
      tenant: "0"
      allow: []
      answers: konnectivity
    - unix: /run/b
      mode: "0007"
    - tcp: 127.0.0.1:1
      cert: a
      key: b
      client_ca: c
      tls_floor: {min_version: "1.3", cipher_suites: [TLS_AES_128_GCM_SHA256]}
      tenant: a
      allow:
        - {cidr: 10.0.0.0/8, ports: [1, "2-3", "0-65535"]}
        - {cidr: "fd00::1"}
        - {name: "*.svc", ports: [443]}
        - {name: Web.SVC.}
  grpc:
    - {tcp: "[::]:2", cert: a, key: b, client_ca: c, tls_floor: }
    - {tcp: "[::]:3", cert: a, key: b, client_ca: c}
redirect:
  pin: /pin
  group: "12"
  attachments:
    - name: "on"
      cgroup: /cgroup
      netns: /netns
      tenant: b
      allow: [{cidr: 10.0.0.0/8}]
      listen: [127.0.0.2:1]
      capture: [{cidr: 10.0.0.0/8, ports: [10250]}, {cidr: 10.0.0.1}]
      exclude: [{cidr: 10.0.0.1, ports: ["1-2"]}]
      fail: open
    - {name: b, cgroup: c, capture: []}
konnectivity:
  listen: 127.0.0.1:4
  tenant: c
  cert: a
  key: b
  client_ca: c
  token:
    audience: a
    namespace: b
    service_account: c
    kubeconfig: d
    rate: {per_second: 0.1, burst: 2}
  believe_identifiers: true
  server_ids: 8
  keepalive: 1m 30s
  tls_floor: {min_version: "1.3", cipher_suites: [a, b]}
join:
  listen: 127.0.0.1:5
  ca: ca
  validity: 1y 2months 3days
  kubernetes:
    audience: a
    namespace: b
    service_account: c
    kubeconfig: d
    addresses: [10.0.0.0/8]
leases: {namespace: a, label: "a=b,c=d", kubeconfig: k, rate: {per_second: 16777216, burst: 1}}
admin: 127.0.0.1:6
health: 127.0.0.1:7
limits:
  dial_timeout: 1ns
  drain: 0s
  forget: 1h 1m 1s 1ms
  connections: 1
  connections_per_tenant: 2
  connections_per_tunnel: 3
  dials: 4
  dials_per_tenant: 5
  dials_per_tunnel: 6
  agents: 7
  agents_per_tenant: 8
  routes: 9
  routes_per_tenant: 10
  routes_per_agent: 11
  stalled_bytes: 18446744073709551615
  stalled_bytes_per_tenant: 12
  stalled_bytes_per_tunnel: 13
  resume: 0s
  session_bytes: 14
  stream_window: 65536
  waiting_sessions: 15
  waiting_sessions_per_tenant: 16
  waiting_sessions_per_agent: 17
  handshakes: {at_once: 1, per_second: 2, burst: 3, ipv4_prefix: 4, ipv6_prefix: 5}
  breaker_failures: 0
  breaker_retry: 1s
  breaker_max_retry: 2s
log: {filter: "info,cpc=debug", format: json, access: false}
audit: {directory: a, keep: 1, max_bytes: 2, journal: true}
"#;

/// The same of an agent.
pub(crate) const AGENT: &str = r#"
version: 1
servers:
  - "cp:1"
  - "[fd00::1]:2"
  - {address: "a:3", protocol: auto}
  - {address: "b:4", protocol: quic}
  - {address: "c:5", protocol: konnectivity}
tls: {cert: a, key: a, ca: c, trust: [{domain: a, ca: b}], revoked: r, renew: true}
transport: {mtu: 1280, max_mtu: 1280, congestion: bbr, ack_every: 1}
datapath: {engine: epoll}
konnectivity:
  ca: a
  cert: b
  key: c
  token_file: d
  server_name: e
  agent_id: f
  identifiers: "ipv4=10.0.0.1&host=w1&default-route=true"
  keepalive: 30s
  alpn: ["false", h3]
  leases: {namespace: a, label: "a in (b, c),!d", kubeconfig: k, rate: {per_second: 5, burst: 10}}
  server_count: max
serve: {cidrs: [10.0.0.0/8], names: ["*.svc"], default_route: true}
shards: 64
tunnels: 16
state_dir: s
allow: [{cidr: 10.0.0.0/8, ports: [10250]}, {name: "*.svc"}]
admin: "[::1]:1"
health: "[::1]:2"
limits: {drain: forever, connections: 1, stalled_bytes: 2, resume: 3s, session_bytes: 4, stream_window: 268435456, waiting_sessions: 5}
log: {filter: "", format: json, access: false}
audit: {directory: /a, keep: 2, max_bytes: 3, journal: true}
"#;

fn read<T: DeserializeOwned + Default>(text: &str) -> T {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, text).unwrap();
    crate::load(Some(&file)).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Reads a written configuration, which has to equal the original. Returns it as JSON.
fn comes_back<T>(config: &T) -> Value
where
    T: Serialize + DeserializeOwned + Default + PartialEq + Debug,
{
    let text = to_yaml(config).unwrap();
    assert_eq!(&read::<T>(&text), config, "{text}");
    serde_json::to_value(config).unwrap()
}

/// Asserts that each key of `usual` stands in `set` with another value.
fn all_differ(usual: &Value, set: &Value, at: &str) {
    match (usual, set) {
        (Value::Object(usual), Value::Object(set)) => {
            for (key, value) in usual.iter().filter(|(key, _)| *key != "version") {
                all_differ(value, &set[key], &format!("{at}.{key}"));
            }
        }
        (usual, set) => assert_ne!(usual, set, "{at} has its default"),
    }
}

#[test]
fn defaults_are_read_back() {
    comes_back(&ServerConfig::default());
    comes_back(&AgentConfig::default());
}

#[test]
fn every_key_is_read_back() {
    let set = comes_back(&read::<ServerConfig>(SERVER));
    let usual = "frontends: {}\nkonnectivity: {token: }\nleases:\njoin: {kubernetes: }\n";
    all_differ(&comes_back(&read::<ServerConfig>(usual)), &set, "server");
    let set = comes_back(&read::<AgentConfig>(AGENT));
    let usual = "konnectivity: {leases: }\n";
    all_differ(&comes_back(&read::<AgentConfig>(usual)), &set, "agent");
}

/// A section that is in force where its key is present, and an empty list, differ from missing
/// ones.
#[test]
fn what_is_there_stays_apart_from_what_is_not() {
    for text in [
        "leases:\n",
        "join:\n",
        "konnectivity: {token: }\n",
        "redirect: {group: 12}\n",
        "redirect: {group: wheel}\n",
        "frontends: {grpc: [{unix: x, allow: []}, {unix: x}]}\n",
        "limits: {drain: 1ms}\n",
    ] {
        comes_back(&read::<ServerConfig>(text));
    }
    for text in [
        "allow: []\n",
        "konnectivity:\n",
        "limits: {drain: 1h}\n",
        "limits: {drain: forever}\n",
    ] {
        comes_back(&read::<AgentConfig>(text));
    }
}

#[test]
fn texts_that_look_like_something_else_are_read_back() {
    for text in [
        "",
        " ",
        "0",
        "0660",
        "1.5",
        "1e3",
        "true",
        "No",
        "null",
        "~",
        "-",
        "- a",
        "a: b",
        "a #b",
        "#",
        "*a",
        "&a",
        "!a",
        "|",
        ">",
        "%",
        "@",
        "`",
        "'",
        "\"",
        "\\",
        "{",
        "[a]",
        "\t",
        "a\nb\n",
        "\u{e9}\u{1f600}",
        "\u{7f}",
        "\u{85}\u{2028}",
        "---",
        "...",
        "2026-01-01",
        "12:30",
        "?",
        "=",
        "<<",
        ".inf",
    ] {
        let log = LogConfig {
            filter: text.repeat(60),
            ..LogConfig::default()
        };
        comes_back(&ServerConfig {
            server_id: Some(text.into()),
            state_dir: text.into(),
            log,
            ..ServerConfig::default()
        });
        let with_protocol = ServerAddress {
            address: text.into(),
            protocol: Some(Protocol::Quic),
        };
        comes_back(&AgentConfig {
            servers: vec![text.to_owned().into(), with_protocol],
            ..AgentConfig::default()
        });
    }
}

#[test]
fn a_path_that_is_no_text_is_named_as_the_reason() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let config = ServerConfig {
        state_dir: Path::new(OsStr::from_bytes(b"/\xff")).into(),
        ..ServerConfig::default()
    };
    let error = to_yaml(&config).unwrap_err().to_string();
    assert!(error.contains("UTF-8"), "{error}");
}
