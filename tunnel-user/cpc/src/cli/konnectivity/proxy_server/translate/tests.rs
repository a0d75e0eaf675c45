use clap::Parser;

use super::*;
use crate::cli::konnectivity::common::Translated;
use crate::cli::{Cli, Command};

fn translate(flags: &[&str]) -> Result<Translated<ServerConfig>, String> {
    let line = ["cpc", "proxy-server"].iter().chain(flags);
    let cli = Cli::try_parse_from(line).map_err(|error| error.to_string())?;
    let Command::ProxyServer(args) = cli.command else {
        return Err("another command".into());
    };
    args.translate().map_err(|error| error.to_string())
}

/// Returns a valid command line with additional arguments.
fn with(flags: &[&str]) -> Result<Translated<ServerConfig>, String> {
    let usual = [
        "--uds-name=/run/k.sock",
        "--server-port=0",
        "--cluster-cert=a.crt",
        "--cluster-key=a.key",
    ];
    translate(&[&usual, flags].concat())
}

fn config(flags: &[&str]) -> ServerConfig {
    with(flags).unwrap().config
}

/// Returns the notes at the start.
fn said(flags: &[&str]) -> String {
    with(flags).unwrap().notes.join("\n")
}

fn konnectivity(flags: &[&str]) -> KonnectivityConfig {
    config(flags).konnectivity.unwrap()
}

/// The command line of Kubernetes' documentation for kubeadm clusters; the installers of k0s and
/// Kamaji have similar ones.
#[test]
fn with_tokens_on_a_unix_socket() {
    for (flags, agent_port) in [
        (
            &[
                "--logtostderr=true",
                "--uds-name=/etc/kubernetes/konnectivity-server/konnectivity-server.socket",
                "--delete-existing-uds-file",
                "--cluster-cert=/etc/kubernetes/pki/apiserver.crt",
                "--cluster-key=/etc/kubernetes/pki/apiserver.key",
                "--mode=grpc",
                "--server-port=0",
                "--agent-port=8132",
                "--admin-port=8133",
                "--health-port=8134",
                "--agent-namespace=kube-system",
                "--agent-service-account=konnectivity-agent",
                "--kubeconfig=/etc/kubernetes/konnectivity-server.conf",
                "--authentication-audience=system:konnectivity-server",
            ][..],
            8132,
        ),
        (
            &[
                "--agent-namespace=kube-system",
                "--agent-service-account=konnectivity-agent",
                "--authentication-audience=system:konnectivity-server",
                "--cluster-cert=/var/lib/k0s/pki/server.crt",
                "--cluster-key=/var/lib/k0s/pki/server.key",
                "--kubeconfig=/var/lib/k0s/pki/konnectivity.conf",
                "--mode=grpc",
                "--server-port=0",
                "--agent-port=8132",
                "--admin-port=8133",
                "--health-port=8092",
                "--logtostderr=true",
                "--stderrthreshold=1",
                "--uds-name=/run/k0s/konnectivity-server/konnectivity-server.sock",
                "--delete-existing-uds-file=true",
                "--server-id=c0ffee",
                "--enable-profiling=false",
                "--proxy-strategies=destHost,default",
                "--v=1",
            ],
            8132,
        ),
        (
            &[
                "-v=8",
                "--logtostderr=true",
                "--uds-name=/run/konnectivity/konnectivity-server.socket",
                "--cluster-cert=/etc/kubernetes/pki/apiserver.crt",
                "--cluster-key=/etc/kubernetes/pki/apiserver.key",
                "--mode=grpc",
                "--server-port=0",
                "--agent-port=8091",
                "--admin-port=8133",
                "--health-port=8134",
                "--agent-namespace=kube-system",
                "--agent-service-account=konnectivity-agent",
                "--kubeconfig=/etc/kubernetes/konnectivity-server.conf",
                "--authentication-audience=system:konnectivity-server",
                "--server-count=1",
            ],
            8091,
        ),
    ] {
        let Translated { config, notes } = translate(flags).unwrap();
        let konnectivity = config.konnectivity.unwrap();
        assert_eq!(konnectivity.listen.port(), agent_port);
        assert!(konnectivity.client_ca.is_none() && konnectivity.believe_identifiers);
        let token = konnectivity.token.unwrap();
        assert_eq!(token.audience, "system:konnectivity-server");
        assert_eq!(token.namespace, "kube-system");
        assert_eq!(token.service_account, "konnectivity-agent");
        assert!(token.kubeconfig.is_some());
        let [FrontendConfig::Unix(unix)] = &config.frontends.grpc[..] else {
            panic!("{:?}", config.frontends);
        };
        assert!(unix.takeover && unix.mode == 0o770);
        assert_eq!(config.admin, "127.0.0.1:8133".parse().unwrap());
        assert!(config.limits.drain.is_zero() && config.tls.cert.is_none());
        assert!(notes.iter().any(|note| note.contains("--logtostderr")));
    }
}

/// The command lines of kOps and GKE: HTTP CONNECT over TCP or on a Unix socket, and certificates
/// of agents.
#[test]
fn with_certificates_and_http_connect() {
    let flags = [
        "--log-file=/var/log/konnectivity-server.log",
        "--logtostderr=false",
        "--log-file-max-size=0",
        "--server-ca-cert=/pki/ca.crt",
        "--server-cert=/pki/server.crt",
        "--server-key=/pki/server.key",
        "--cluster-ca-cert=/pki/agents.crt",
        "--cluster-cert=/pki/cluster.crt",
        "--cluster-key=/pki/cluster.key",
        "--server-port=8090",
        "--server-bind-address=127.0.0.1",
        "--agent-port=8091",
        "--health-port=8092",
        "--admin-port=8093",
        "--keepalive-time=60m",
        "--mode=http-connect",
        "--proxy-strategies=destHost,defaultRoute,default",
        "--graceful-shutdown-timeout=25s",
        "--backend-dial-timeout=7s",
        "--tls-min-version=VersionTLS13",
        "--enable-lease-controller",
        "--server-count=3",
    ];
    let Translated { config, notes } = translate(&flags).unwrap();
    let [FrontendConfig::Tcp(tcp)] = &config.frontends.http_connect[..] else {
        panic!("{:?}", config.frontends);
    };
    assert_eq!(tcp.tcp, "127.0.0.1:8090".parse().unwrap());
    assert_eq!(tcp.answers, Answers::Konnectivity);
    let floor = tcp.tls_floor.as_ref().unwrap();
    assert_eq!(floor.min_version, TlsVersion::Tls13);
    let konnectivity = config.konnectivity.unwrap();
    assert!(konnectivity.token.is_none() && konnectivity.client_ca.is_some());
    assert_eq!(&konnectivity.tls_floor, floor);
    assert_eq!(konnectivity.server_ids, 3);
    assert_eq!(
        config.routing.strategies,
        [
            Strategy::DestHost,
            Strategy::DefaultRoute,
            Strategy::Default
        ]
    );
    assert_eq!(config.limits.drain, Duration::from_secs(25));
    assert_eq!(config.limits.dial_timeout, Duration::from_secs(7));
    assert_eq!(config.leases.unwrap().label, "k8s-app=konnectivity-server");
    assert_eq!(config.server_count, 3);
    let in_vain = notes.last().unwrap();
    assert_eq!(
        in_vain,
        "without effect here: --log-file --log-file-max-size --logtostderr"
    );
}

#[test]
fn defaults_are_those_of_konnectivity() {
    let config = config(&[]);
    let konnectivity = config.konnectivity.clone().unwrap();
    assert_eq!(konnectivity.listen.port(), 8091);
    assert!(konnectivity.listen.ip().is_unspecified());
    assert_eq!(konnectivity.keepalive, Duration::from_secs(3600));
    assert_eq!(konnectivity.tls_floor, TlsFloor::default());
    assert_eq!(konnectivity.server_ids, 3);
    assert_eq!(config.health.unwrap().port(), 8092);
    assert_eq!(config.admin, "127.0.0.1:8095".parse().unwrap());
    assert_eq!(config.routing.strategies, [Strategy::Default]);
    assert_eq!(config.server_count, 1);
    assert_eq!(config.log.filter, "info");
    // A dial always ends.
    assert_eq!(
        config.limits.dial_timeout,
        ServerConfig::default().limits.dial_timeout
    );
    assert!(config.leases.is_none());
    let id = config.server_id.unwrap();
    assert_eq!((id.len(), id.matches('-').count()), (36, 4), "{id}");
    assert_ne!(Some(id), self::config(&[]).server_id);
}

#[test]
fn flags_are_written_as_for_go() {
    assert_eq!(
        config(&["-v", "2", "-v=3", "-v4", "--v=5"]).log.filter,
        "info,cpc=debug"
    );
    assert_eq!(
        config(&["--server-count", "1", "--server-count=2"]).server_count,
        2
    );
    assert_eq!(
        config(&["--agent-port=0x1f9b"])
            .konnectivity
            .unwrap()
            .listen
            .port(),
        8091
    );
    let takeover = |flags: &[&str]| match &config(flags).frontends.grpc[..] {
        [FrontendConfig::Unix(unix)] => unix.takeover,
        other => panic!("{other:?}"),
    };
    assert!(takeover(&["--delete-existing-uds-file"]));
    assert!(!takeover(&["--delete-existing-uds-file=F"]));
    // What stands alone is no value of the switch before it, and nothing at all.
    assert!(takeover(&["--delete-existing-uds-file", "false"]));
    assert!(said(&["--delete-existing-uds-file", "false"]).contains("\"false\""));
    // As from a template whose variable is empty.
    let empty = [
        "--server-cert=",
        "--server-ca-cert=",
        "--cluster-ca-cert=",
        "--agent-namespace=",
        "--kubeconfig=",
        "--cipher-suites=",
        "--tls-min-version=",
        "--server-id=",
        "--admin-bind-address=",
    ];
    let config = config(&empty);
    assert!(config.server_id.is_some_and(|id| !id.is_empty()));
    assert!(config.admin.ip().is_loopback());
}

#[test]
fn several_ids_only_where_agents_do_not_count_them_for_servers() {
    assert_eq!(konnectivity(&["--server-count=2"]).server_ids, 1);
    let leases = ["--server-count=2", "--enable-lease-controller"];
    assert_eq!(konnectivity(&leases).server_ids, 3);
    assert_eq!(
        konnectivity(&["--server-count=2", "--cpc-server-ids=4"]).server_ids,
        4
    );
}

#[test]
fn the_api_server_is_asked_as_often_as_told() {
    let tokens = [
        "--agent-namespace=x",
        "--agent-service-account=x",
        "--authentication-audience=x",
    ];
    for (flags, rate) in [
        (&[][..], None),
        (&["--kubeconfig-qps=-1", "--kubeconfig-burst=3"], None),
        (
            &["--kubeconfig-qps=75", "--kubeconfig-burst=150"],
            Some((75.0, 150)),
        ),
        (&["--kubeconfig-qps", "0.5"], Some((0.5, 10))),
        (&["--kubeconfig-burst=3"], Some((5.0, 3))),
    ] {
        let token = konnectivity(&[&tokens, flags].concat()).token.unwrap();
        let given = token.rate.map(|rate| (rate.per_second, rate.burst));
        assert_eq!(given, rate, "{flags:?}");
    }
}

#[test]
fn cipher_suites_by_their_names() {
    let ecdsa = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256";
    let rsa = "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256";
    let both = format!("--cipher-suites={ecdsa},{rsa}");
    let listed = konnectivity(&[&both]).tls_floor.cipher_suites;
    assert_eq!(listed[..2], [ecdsa, rsa]);
    assert_eq!(listed[2..], TLS13_SUITES);
    let repeated = [
        format!("--cipher-suites={ecdsa}"),
        format!("--cipher-suites={rsa}"),
    ];
    let repeated = konnectivity(&repeated.each_ref().map(String::as_str));
    assert_eq!(repeated.tls_floor.cipher_suites, listed);
    let weak = "--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA";
    assert_eq!(konnectivity(&[weak]).tls_floor.cipher_suites, TLS13_SUITES);
    assert!(said(&[weak]).contains("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"));
}

#[test]
fn what_is_weaker_than_it_looks_is_said() {
    assert!(said(&[]).contains("any peer at --agent-port"));
    assert_eq!(said(&["--cluster-ca-cert=ca"]), "");
    assert!(said(&["--tls-min-version=VersionTLS10"]).contains("VersionTLS12"));
    assert!(said(&["--keepalive-time=1s"]).contains("30s"));
    let strict = ["--cpc-believe-identifiers=false", "--cluster-ca-cert=ca"];
    assert_eq!(said(&strict), "");
    assert!(!konnectivity(&strict).believe_identifiers);
}

#[test]
fn a_wrong_value_names_its_flag() {
    for (wrong, flag) in [
        (&["--server-port=8090"][..], "--server-port"),
        (&["--server-cert=a", "--server-key=b"], "--uds-name"),
        (&["--server-cert=a"], "--server-key"),
        (&["--cluster-cert="], "--cluster-cert"),
        (&["--agent-port=80"], "--agent-port"),
        (&["--agent-port=49152"], "--agent-port"),
        (&["--health-port=65536"], "--health-port"),
        (&["--admin-port=-1"], "--admin-port"),
        (&["--admin-port=eight"], "--admin-port"),
        (&["--mode=quic"], "--mode"),
        (&["--proxy-strategies="], "--proxy-strategies"),
        (&["--proxy-strategies=nearest"], "--proxy-strategies"),
        (&["--agent-namespace=x"], "--agent-service-account"),
        (&["--agent-service-account=x"], "--agent-namespace"),
        (
            &[
                "--agent-namespace=x",
                "--agent-service-account=x",
                "--authentication-audience=x",
                "--cluster-ca-cert=x",
            ],
            "--cluster-ca-cert",
        ),
        (&["--tls-min-version=1.2"], "--tls-min-version"),
        (
            &["--cipher-suites=TLS_RSA_WITH_RC4_128_SHA"],
            "--cipher-suites",
        ),
        (&["--kubeconfig-qps=many"], "--kubeconfig-qps"),
        (
            &["--enable-lease-controller", "--lease-label=x"],
            "--lease-label",
        ),
        (
            &["--graceful-shutdown-timeout=-1s"],
            "--graceful-shutdown-timeout",
        ),
        (&["--backend-dial-timeout=5"], "--backend-dial-timeout"),
        (&["--server-count=0"], "--server-count"),
        (
            &["--server-bind-address=nowhere.invalid", "--uds-name="],
            "--server-port",
        ),
        (&["--xfr-channel-size=0"], "--xfr-channel-size"),
        (&["--enable-contention-profiling"], "--enable-profiling"),
        (
            &["--enable-lease-controller=yes"],
            "--enable-lease-controller",
        ),
        (&["--cpc-server-ids=9"], "--cpc-server-ids"),
        (
            &["--cpc-believe-identifiers=false"],
            "--cpc-believe-identifiers",
        ),
        (&["--log_file=x"], "--log_file"),
    ] {
        let error = with(wrong).map(|it| it.notes).unwrap_err();
        assert!(error.contains(flag), "{wrong:?}: {error}");
    }
}

#[test]
fn flags_are_laid_over_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "tls: {cert: a, key: b, ca: c}\nlisten: \"127.0.0.1:8132\"\n\
                policy: {grants: [{identity: \"spiffe://a/agent/*\", default_route: true}]}\n\
                frontends: {http_connect: [{unix: /run/cpc.sock}]}\n\
                konnectivity: {tenant: other.example, server_ids: 7}\n\
                limits: {connections: 7}\n";
    std::fs::write(file.path(), text).unwrap();
    let config = config(&["--cpc-config", file.path().to_str().unwrap()]);
    assert_eq!(config.listen.port(), 8132);
    assert_eq!(config.policy.grants.len(), 1);
    assert_eq!(config.limits.connections, 7);
    assert_eq!(
        (
            config.frontends.http_connect.len(),
            config.frontends.grpc.len()
        ),
        (1, 1)
    );
    let konnectivity = config.konnectivity.unwrap();
    assert_eq!(konnectivity.tenant, Some("other.example".parse().unwrap()));
    assert_eq!(konnectivity.cert, Some("a.crt".into()));
    let missing = with(&["--cpc-config=/no/such/file"]).map(|it| it.notes);
    assert!(missing.unwrap_err().contains("/no/such/file"));
}
