use clap::Parser;

use super::*;
use crate::cli::konnectivity::common::Translated;
use crate::cli::{Cli, Command};
use cpc_config::agent::Protocol;
use cpc_config::allow_list::AllowList;

fn translate(flags: &[&str]) -> Result<Translated<AgentConfig>, String> {
    let line = ["cpc", "proxy-agent"].iter().chain(flags);
    let cli = Cli::try_parse_from(line).map_err(|error| error.to_string())?;
    let Command::ProxyAgent(args) = cli.command else {
        return Err("another command".into());
    };
    args.translate().map_err(|error| error.to_string())
}

/// Returns a valid command line with additional arguments.
fn with(flags: &[&str]) -> Result<Translated<AgentConfig>, String> {
    translate(&[&["--ca-cert=ca.crt"], flags].concat())
}

fn config(flags: &[&str]) -> AgentConfig {
    with(flags).unwrap().config
}

fn said(flags: &[&str]) -> String {
    with(flags).unwrap().notes.join("\n")
}

/// Flags from Kubernetes' documentation, from Konnectivity's own examples, and in the style of
/// installers.
#[test]
fn command_lines_of_manifests() {
    const TOKEN: &str = "/var/run/secrets/tokens/konnectivity-agent-token";
    for (flags, server, health, in_vain) in [
        (
            &[
                "--logtostderr=true",
                "--proxy-server-host=35.225.206.7",
                "--proxy-server-port=8132",
                "--admin-server-port=8133",
                "--health-server-port=8134",
            ][..],
            "35.225.206.7:8132",
            8134,
            "without effect here: --logtostderr",
        ),
        (
            &[
                "--logtostderr=true",
                "--proxy-server-host=konnectivity-server.kube-system.svc.cluster.local",
                "--proxy-server-port=8091",
                "--sync-interval=5s",
                "--sync-interval-cap=30s",
                "--sync-forever",
                "--probe-interval=5s",
                "--agent-identifiers=ipv4=10.0.0.1",
                "--count-server-leases",
            ],
            "konnectivity-server.kube-system.svc.cluster.local:8091",
            8093,
            "without effect here: --sync-interval --sync-interval-cap --probe-interval \
             --sync-forever --logtostderr",
        ),
        (
            &[
                "--proxy-server-host=fd00::7",
                "--agent-identifiers=ipv6=fd00::1&host=w1&default-route=true",
                "--agent-id=10.0.0.1",
                "--keepalive-time=60m",
                "--v=3",
            ],
            "[fd00::7]:8091",
            8093,
            "",
        ),
    ] {
        let token = format!("--service-account-token-path={TOKEN}");
        let Translated { config, notes } = with(&[flags, &[&token]].concat()).unwrap();
        assert_eq!(config.servers.len(), 1);
        assert_eq!(config.servers[0].address, server);
        assert_eq!(config.protocol(&config.servers[0]), Protocol::Konnectivity);
        assert_eq!(config.health.unwrap().port(), health);
        let konnectivity = config.konnectivity.unwrap();
        assert_eq!(konnectivity.token_file, Some(TOKEN.into()));
        assert_eq!(konnectivity.keepalive, Duration::from_secs(3600));
        assert_eq!(
            konnectivity.leases.is_some(),
            flags.contains(&"--count-server-leases")
        );
        assert_eq!(notes.get(1).map_or("", String::as_str), in_vain);
    }
}

#[test]
fn defaults_are_those_of_konnectivity() {
    let config = config(&[]);
    assert_eq!(config.servers[0].address, "127.0.0.1:8091");
    assert_eq!(config.admin, "127.0.0.1:8094".parse().unwrap());
    assert!(config.health.is_some_and(|addr| addr.ip().is_unspecified()));
    assert_eq!(config.limits.drain, None);
    let konnectivity = config.konnectivity.unwrap();
    assert!(konnectivity.agent_id.is_some_and(|id| id.len() == 36));
    assert!(konnectivity.identifiers.is_empty() && konnectivity.leases.is_none());
}

#[test]
fn everything_may_be_dialled_unless_rules_are_given() {
    assert!(said(&[]).contains("--cpc-allow"));
    let allow = config(&[]).allow.unwrap();
    assert!(AllowList::new(allow).allows(&"127.0.0.1:1".parse().unwrap()));
    let narrow = ["--cpc-allow=10.0.0.0/8:10250", "--cpc-allow=10.244.0.0/16"];
    assert_eq!(config(&narrow).allow.unwrap().len(), 2);
    assert_eq!(said(&narrow), "");
}

#[test]
fn the_api_server_is_reached_and_leases_are_found() {
    let flags = [
        "--count-server-leases=true",
        "--lease-namespace=a",
        "--lease-label=app=b",
        "--kubeconfig=c",
    ];
    let leases = config(&flags).konnectivity.unwrap().leases.unwrap();
    assert_eq!(
        (leases.namespace.as_str(), leases.label.as_str()),
        ("a", "app=b")
    );
    assert_eq!(leases.kubeconfig, Some("c".into()));
}

#[test]
fn quic_comes_from_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "tls: {cert: a, key: b, ca: c}\nservers: [{address: \"cp:8132\", protocol: quic}]\n\
                allow: [{cidr: 10.0.0.0/8}]\nkonnectivity: {server_name: kas}\n";
    std::fs::write(file.path(), text).unwrap();
    let path = file.path().to_str().unwrap();
    let config = config(&["--cpc-config", path, "--cpc-protocol=auto"]);
    let protocols: Vec<_> = config.servers.iter().map(|s| config.protocol(s)).collect();
    assert_eq!(protocols, [Protocol::Auto, Protocol::Quic]);
    assert_eq!(config.allow.unwrap().len(), 1);
    assert_eq!(
        config.konnectivity.unwrap().server_name.as_deref(),
        Some("kas")
    );
}

#[test]
fn a_wrong_value_names_its_flag() {
    for (wrong, flag) in [
        (&["--ca-cert="][..], "--ca-cert"),
        (&["--agent-cert=a"], "--agent-key"),
        (&["--agent-key=a"], "--agent-cert"),
        (&["--proxy-server-port=0"], "--proxy-server-port"),
        (&["--proxy-server-port=65536"], "--proxy-server-port"),
        (&["--proxy-server-host="], "--proxy-server-host"),
        (&["--health-server-port=0"], "--health-server-port"),
        (&["--admin-server-port=-8"], "--admin-server-port"),
        (&["--sync-interval=11s"], "--sync-interval"),
        (&["--sync-interval=soon"], "--sync-interval"),
        (&["--probe-interval=1"], "--probe-interval"),
        (&["--agent-identifiers=mac=1"], "--agent-identifiers"),
        (&["--agent-identifiers=ipv4=%zz"], "--agent-identifiers"),
        (&["--server-count-source=min"], "--server-count-source"),
        (&["--xfr-channel-size=-1"], "--xfr-channel-size"),
        (&["--sync-forever=2"], "--sync-forever"),
        (&["--cpc-allow=every thing"], "--cpc-allow"),
        (&["--lease-label-selector=="], "--lease-label-selector"),
        (&["--lease-label=*notavalidlabel*"], "--lease-label"),
    ] {
        let error = with(wrong).map(|it| it.notes).unwrap_err();
        assert!(error.contains(flag), "{wrong:?}: {error}");
    }
}
