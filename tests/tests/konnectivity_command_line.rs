//! The programs of Konnectivity as their manifests start them: by their names, with their flags,
//! and with the pages that probes read. None of it needs root.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tunnel_tests::client::eventually;
use tunnel_tests::exposition::Page;
use tunnel_tests::lab::Programs;

const SOON: Duration = Duration::from_secs(15);

/// Every flag of proxy-server with a value that it takes.
const PROXY_SERVER: &[&str] = &[
    "--add-dir-header=false",
    "--admin-bind-address=127.0.0.1",
    "--admin-port=8095",
    "--agent-bind-address=",
    "--agent-namespace=kube-system",
    "--agent-port=8091",
    "--agent-service-account=konnectivity-agent",
    "--alsologtostderr",
    "--alsologtostderrthreshold=2",
    "--authentication-audience=system:konnectivity-server",
    "--backend-dial-timeout=0",
    "--cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "--cluster-ca-cert=",
    "--cluster-cert=/no/such/file",
    "--cluster-key=",
    "--delete-existing-uds-file=true",
    "--enable-contention-profiling",
    "--enable-lease-controller=false",
    "--enable-profiling",
    "--frontend-keepalive-time=1h0m0s",
    "--graceful-shutdown-timeout=15s",
    "--health-bind-address=0.0.0.0",
    "--health-port=8092",
    "--keepalive-time=1h0m0s",
    "--kube-api-content-type=application/vnd.kubernetes.protobuf",
    "--kubeconfig=",
    "--kubeconfig-burst=10",
    "--kubeconfig-qps=5",
    "--lease-label=k8s-app=konnectivity-server",
    "--lease-namespace=kube-system",
    "--legacy-stderr-threshold-behavior=true",
    "--log-backtrace-at=:0",
    "--log-dir=/var/log",
    "--log-file=/var/log/konnectivity-server.log",
    "--log-file-max-size=0",
    "--logtostderr=true",
    "--mode=grpc",
    "--one-output=false",
    "--proxy-strategies=destHost,default",
    "--server-bind-address=",
    "--server-ca-cert=",
    "--server-cert=",
    "--server-count=1",
    "--server-id=s1",
    "--server-key=",
    "--server-port=0",
    "--skip-headers=false",
    "--skip-log-headers=false",
    "--stderrthreshold=2",
    "--tls-min-version=VersionTLS12",
    "--uds-name=/run/konnectivity.sock",
    "--v=4",
    "-v=4",
    "--vmodule=tunnel=5",
    "--warn-on-channel-limit=true",
    "--xfr-channel-size=10",
];

/// Every flag of proxy-agent with a value that it takes.
const PROXY_AGENT: &[&str] = &[
    "--add-dir-header=false",
    "--admin-bind-address=127.0.0.1",
    "--admin-server-port=8094",
    "--agent-cert=",
    "--agent-id=w1",
    "--agent-identifiers=host=localhost&cidr=127.0.0.1/16&ipv4=1.2.3.4&ipv6=::1&default-route=true",
    "--agent-key=",
    "--alpn-proto=konnectivity,other",
    "--alsologtostderr=false",
    "--alsologtostderrthreshold=2",
    "--ca-cert=/no/such/file",
    "--count-server-leases=true",
    "--enable-contention-profiling=false",
    "--enable-profiling=false",
    "--health-server-host=0.0.0.0",
    "--health-server-port=8093",
    "--keepalive-time=1h0m0s",
    "--kube-api-content-type=application/json",
    "--kubeconfig=",
    "--lease-label=k8s-app=konnectivity-server",
    "--lease-label-selector=k8s-app=konnectivity-server",
    "--lease-namespace=kube-system",
    "--legacy-stderr-threshold-behavior=true",
    "--log-backtrace-at=:0",
    "--log-dir=/var/log",
    "--log-file=/var/log/konnectivity-agent.log",
    "--log-file-max-size=1800",
    "--logtostderr",
    "--one-output=false",
    "--probe-interval=1s",
    "--proxy-server-host=127.0.0.1",
    "--proxy-server-port=8091",
    "--server-count-source=max",
    "--service-account-token-path=",
    "--skip-headers=false",
    "--skip-log-headers=false",
    "--stderrthreshold=2",
    "--sync-forever=true",
    "--sync-interval=1s",
    "--sync-interval-cap=10s",
    "--v=4",
    "-v=4",
    "--vmodule=client=5",
    "--warn-on-channel-limit=true",
    "--xfr-channel-size=150",
];

/// The program under the names of Konnectivity's, in a folder that goes with the value.
struct Image(PathBuf);

impl Image {
    fn new(name: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("cpc-k-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let cpc = Programs::of_this_test()?.cpc;
        for name in ["proxy-server", "proxy-agent"] {
            symlink(&cpc, folder.join(name))?;
        }
        Ok(Self(folder))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn program(&self, name: &str) -> Command {
        let mut program = Command::new(self.0.join(name));
        program.env_remove("CPC_CONFIG").stdin(Stdio::null());
        program
    }

    fn run(&self, name: &str, arguments: &[&str]) -> Result<Output> {
        Ok(self.program(name).args(arguments).output()?)
    }

    /// A CA, and a certificate of a server at 127.0.0.1.
    fn certificates(&self) -> Result<()> {
        let cpc = Programs::of_this_test()?.cpc;
        let dir = self.path("ca");
        let out = self.path("");
        for arguments in [
            &["pki", "init", "--dir", &dir][..],
            &[
                "pki",
                "server",
                "--id",
                "s",
                "--ip",
                "127.0.0.1",
                "--dir",
                &dir,
                "--out",
                &out,
            ],
        ] {
            ensure!(
                Command::new(&cpc)
                    .args(arguments)
                    .output()?
                    .status
                    .success()
            );
        }
        Ok(())
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Result<Running> {
        let log = self.0.join(format!("{name}.log"));
        let mut program = self.program(name);
        let child = program
            .args(arguments)
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        Ok(Running { child, log })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program that ends with the value.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    fn ended(&mut self) -> Result<()> {
        let (child, log) = (&mut self.child, &self.log);
        eventually(SOON, || {
            let log = fs::read_to_string(log).unwrap_or_default();
            let status = child
                .try_wait()?
                .with_context(|| format!("it goes on:\n{log}"))?;
            ensure!(status.success(), "{status}: {log}");
            Ok(())
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a free port that the commands accept, below those that the system gives out.
fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 20_000 + u16::try_from(std::process::id() % 1000)? * 10;
    for _ in 0..1000 {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("there is no free port")
}

/// Status and body of a page.
fn get(port: u16, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port)))?;
    stream.set_read_timeout(Some(SOON))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    let status = head.split(' ').nth(1).context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Each alone, so that an error tells which, and help explains each.
#[test]
fn every_flag_is_taken() -> Result<()> {
    let image = Image::new("flags")?;
    for (program, flags, missing) in [
        ("proxy-server", PROXY_SERVER, "--cluster-cert"),
        ("proxy-agent", PROXY_AGENT, "--ca-cert"),
    ] {
        // It gets as far as the one file that is not there.
        let output = image.run(program, flags)?;
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let expected = format!("cpc: {missing}: /no/such/file: ");
        ensure!(said(&output).starts_with(&expected), "{}", said(&output));
        let help = image.run(program, &["--help"])?;
        let help = String::from_utf8(help.stdout)?;
        // Konnectivity hides these too.
        let hidden = |flag: &str| flag == "--lease-label" && program == "proxy-agent";
        for flag in flags {
            let name = flag.split('=').next().unwrap_or_default();
            ensure!(
                hidden(name) || help.contains(name),
                "{program} {name}: {help}"
            );
        }
    }
    Ok(())
}

#[test]
fn what_is_wrong_names_its_flag() -> Result<()> {
    let image = Image::new("wrong")?;
    for (program, arguments, flag, code) in [
        ("proxy-server", &["--server-port=x"][..], "--server-port", 2),
        (
            "proxy-server",
            &["--keepalive-time=5"],
            "--keepalive-time",
            2,
        ),
        ("proxy-server", &["--no-such-flag"], "--no-such-flag", 2),
        ("proxy-server", &["--uds-name=s"], "--server-port", 1),
        ("proxy-server", &[], "--server-cert", 1),
        (
            "proxy-agent",
            &["--sync-forever=maybe"],
            "--sync-forever",
            2,
        ),
        ("proxy-agent", &[], "--ca-cert", 1),
    ] {
        let output = image.run(program, arguments)?;
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        ensure!(
            said(&output).contains(flag),
            "{arguments:?}: {}",
            said(&output)
        );
    }
    Ok(())
}

/// Started as in a manifest it serves its pages, says once what it takes on trust and what it took
/// in vain, takes the socket that another one serves, and refuses as proxy-server does.
#[test]
fn a_proxy_server_without_agents() -> Result<()> {
    let image = Image::new("server")?;
    image.certificates()?;
    let socket = image.path("konnectivity-server.socket");
    let _other = UnixListener::bind(&socket)?;
    let (agents, health, admin) = (free_port()?, free_port()?, free_port()?);
    let flags = [
        "--logtostderr=true".to_owned(),
        format!("--uds-name={socket}"),
        "--delete-existing-uds-file".into(),
        format!("--cluster-cert={}", image.path("server.crt")),
        format!("--cluster-key={}", image.path("server.key")),
        format!("--cluster-ca-cert={}", image.path("ca/ca.crt")),
        "--mode=http-connect".into(),
        "--server-port=0".into(),
        format!("--agent-port={agents}"),
        format!("--admin-port={admin}"),
        format!("--health-port={health}"),
    ];
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let mut server = image.start("proxy-server", &flags)?;
    eventually(SOON, || {
        get(health, "/healthz").with_context(|| server.log())
    })?;
    assert_eq!(get(health, "/healthz")?, (200, "ok".into()));
    for page in ["/readyz", "/ready"] {
        let text = "no connection to any proxy agent";
        assert_eq!(get(health, page)?, (500, text.into()));
    }
    for port in [health, admin] {
        let (status, metrics) = get(port, "/metrics")?;
        ensure!(status == 200 && metrics.contains("cpc_ready"), "{metrics}");
        Page::read(&metrics)?;
    }
    let log = server.log();
    for once in [
        "--cpc-believe-identifiers=false",
        "without effect here: --logtostderr",
    ] {
        assert_eq!(log.matches(once).count(), 1, "{log}");
    }

    let metadata = fs::metadata(&socket)?;
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o770);
    assert_eq!(
        refusal(
            &socket,
            "CONNECT 10.1.2.3:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        )?,
        (
            "500".into(),
            "currently no tunnels available: No agent available".into()
        )
    );
    assert_eq!(
        refusal(&socket, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")?,
        (
            "405".into(),
            "this proxy only supports CONNECT passthrough\n".into()
        )
    );

    server.signal(Signal::SIGTERM)?;
    server.ended()
}

/// Status and body that a request on a Unix socket is refused with.
fn refusal(socket: impl AsRef<Path>, request: &str) -> Result<(String, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    let status = head.split(' ').nth(1).context("no status")?;
    Ok((status.to_owned(), body.to_owned()))
}

/// The agent's pages show that it reaches no server; it stays at the first signal and ends at the
/// second.
#[test]
fn a_proxy_agent_without_servers() -> Result<()> {
    let image = Image::new("agent")?;
    image.certificates()?;
    let (absent, health, admin) = (free_port()?, free_port()?, free_port()?);
    let flags = [
        format!("--ca-cert={}", image.path("ca/ca.crt")),
        format!("--proxy-server-port={absent}"),
        format!("--health-server-port={health}"),
        format!("--admin-server-port={admin}"),
        "--sync-interval=5s".into(),
        "--sync-forever".into(),
    ];
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let mut agent = image.start("proxy-agent", &flags)?;
    eventually(SOON, || {
        get(health, "/healthz").with_context(|| agent.log())
    })?;
    assert_eq!(get(health, "/healthz")?, (200, "ok".into()));
    for page in ["/readyz", "/ready?verbose"] {
        let text = "[+]ping ok\n[-]server-connected failed: no servers connected\n";
        assert_eq!(get(health, page)?, (503, text.into()));
    }
    for port in [health, admin] {
        assert_eq!(get(port, "/metrics")?.0, 200);
    }
    let log = agent.log();
    for once in [
        "--cpc-allow",
        "without effect here: --sync-interval --sync-forever",
    ] {
        assert_eq!(log.matches(once).count(), 1, "{log}");
    }

    agent.signal(Signal::SIGTERM)?;
    eventually(SOON, || {
        ensure!(agent.log().contains("draining"), "{}", agent.log());
        Ok(())
    })?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(agent.child.try_wait()?.is_none(), "{}", agent.log());
    agent.signal(Signal::SIGTERM)?;
    agent.ended()
}
