//! The redirect as programs see it: a worker without a route answers, unmodified programs notice
//! nothing, and who is not redirected is left alone.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage};
use serde_json::json;
use tunnel_tests::client;
use tunnel_tests::lab::cgroup::Cgroup;
use tunnel_tests::lab::netns::Netns;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const PATIENCE: Duration = Duration::from_secs(5);

fn addresses() -> [IpAddr; 4] {
    let [node, node_v6] = address::nodes(1);
    let [pod, pod_v6] = address::pods(1);
    [node, node_v6, pod, pod_v6]
}

fn url(address: IpAddr) -> String {
    format!("https://{}/healthz", SocketAddr::new(address, 10250))
}

/// A curl that shows a kubelet the API server's certificate.
fn curl(lab: &Lab, url: &str) -> Command {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "10", "--fail"]);
    curl.arg("--cacert").arg(lab.cluster_pki.ca());
    curl.arg("--cert").arg(lab.cluster_pki.client_cert());
    curl.arg("--key").arg(lab.cluster_pki.client_key()).arg(url);
    curl
}

fn run_in(netns: &Netns, cgroup: Option<&Cgroup>, mut command: Command) -> Result<Output> {
    netns.place(&mut command)?;
    if let Some(cgroup) = cgroup {
        cgroup.place(&mut command)?;
    }
    Ok(command.output()?)
}

fn answered_by_kubelet(output: &Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success()
            && said.contains(r#""node":"w1""#)
            && said.contains("kube-apiserver"),
        "{}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// curl and kubectl reach the kubelet with their own TLS, end to end, and do not outside the
/// cgroup.
#[test]
fn unmodified_programs_reach_a_kubelet_that_nothing_can_reach() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let (netns, cgroup) = (&lab.control_plane.netns, &lab.control_plane.apiserver);
    for address in addresses() {
        let inside = run_in(netns, Some(cgroup), curl(&lab, &url(address)))?;
        answered_by_kubelet(&inside).with_context(|| format!("{address}"))?;
        let outside = run_in(netns, None, curl(&lab, &url(address)))?;
        // curl(1): failed to connect to host.
        assert_eq!(
            outside.status.code(),
            Some(7),
            "{address} was reached from outside the cgroup"
        );
    }

    if !Command::new("kubectl")
        .arg("--help")
        .output()
        .is_ok_and(|o| o.status.success())
    {
        eprintln!("skipped: kubectl is not installed");
        return Ok(());
    }
    for address in address::nodes(1) {
        let mut kubectl = Command::new("kubectl");
        let server = format!("--server=https://{}", SocketAddr::new(address, 10250));
        kubectl.args(["--kubeconfig=/dev/null", "--request-timeout=10s", &server]);
        for (flag, file) in [
            ("certificate-authority", lab.cluster_pki.ca()),
            ("client-certificate", lab.cluster_pki.client_cert()),
            ("client-key", lab.cluster_pki.client_key()),
        ] {
            kubectl.arg(format!("--{flag}={}", file.display()));
        }
        kubectl
            .args(["get", "--raw", "/healthz"])
            .env("HOME", lab.folder());
        let inside = run_in(netns, Some(cgroup), kubectl)?;
        answered_by_kubelet(&inside).with_context(|| format!("kubectl, {address}"))?;
    }
    Ok(())
}

/// IPv4, IPv6 and v4-mapped sockets, blocking and not, arrive where they asked, and getpeername
/// tells them so; sockets of other cgroups fail as if there were no connector.
#[test]
fn a_redirected_socket_looks_like_a_direct_one() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let mapped = address::node(1).to_ipv6_mapped().into();
    for address in addresses().into_iter().chain([mapped]) {
        let to = SocketAddr::new(address, Behaviour::Echo.port());
        let blocking = || {
            let stream = TcpStream::connect(to)?;
            assert_eq!(stream.peer_addr()?, to, "getpeername");
            stream.set_read_timeout(Some(PATIENCE))?;
            client::round_trips(&stream, 3)
        };
        lab.control_plane
            .as_apiserver(blocking)
            .with_context(|| format!("blocking, {to}"))?;
        let nonblocking = || {
            let stream = connect_nonblocking(to)?;
            assert_eq!(stream.peer_addr()?, to, "getpeername");
            stream.set_read_timeout(Some(PATIENCE))?;
            client::round_trips(&stream, 3)
        };
        lab.control_plane
            .as_apiserver(nonblocking)
            .with_context(|| format!("non-blocking, {to}"))?;

        let outside = lab
            .control_plane
            .netns
            .enter(|| Ok(TcpStream::connect(to).err()))?
            .with_context(|| format!("{to} was reached from outside the cgroup"))?;
        assert_eq!(
            outside.kind(),
            ErrorKind::NetworkUnreachable,
            "{to}: {outside}"
        );
    }
    Ok(())
}

/// connect(2) as Go's and every event loop's does it.
fn connect_nonblocking(to: SocketAddr) -> Result<TcpStream> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(family, SockType::Stream, flags, None)?;
    let to = SockaddrStorage::from(to);
    match socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &to) {
        Err(nix::errno::Errno::EINPROGRESS) => {}
        other => anyhow::bail!("a non-blocking connect gave {other:?}"),
    }
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(PATIENCE)?;
    ensure!(poll(&mut fds, timeout)? == 1, "never writable");
    let stream = TcpStream::from(socket);
    if let Some(error) = stream.take_error()? {
        return Err(error.into());
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The listener is useless for a program that connects to it directly: the server does not know the
/// destination of that connection, and resets it. The listener's port is useless for a program that
/// binds it while no server runs, and keeps it: no captured connection arrives there, and the next
/// server works all the same.
#[test]
fn the_listener_itself_serves_nobody() -> Result<()> {
    if !lab::available()? || !lab::kernel_since((6, 1), lab::ERRNOS)? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let direct = || {
        for listener in ["127.0.0.1:8137", "[::1]:8137"] {
            // On a slow machine the reset is there before connect(2) returns.
            let error = match TcpStream::connect(listener) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    io::Read::read(&mut &stream, &mut [0]).err()
                }
                Err(error) => Some(error),
            };
            let error = error.with_context(|| format!("{listener} ended cleanly"))?;
            assert_eq!(
                error.kind(),
                ErrorKind::ConnectionReset,
                "{listener}: {error}"
            );
        }
        Ok(())
    };
    lab.control_plane.as_apiserver(direct)?;
    lab.control_plane.netns.enter(direct)?;

    lab.control_plane.servers[0].daemon.kill()?;
    let bind = || {
        let stranger = TcpListener::bind("127.0.0.1:8137")?;
        stranger.set_nonblocking(true)?;
        Ok(stranger)
    };
    let stranger = lab.control_plane.netns.enter(bind)?;
    let echo = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let dial = || Ok(TcpStream::connect_timeout(&echo, PATIENCE));
    let error = lab.control_plane.as_apiserver(dial)?.err();
    let error = error.context("a stranger was given a captured connection")?;
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    let server = &mut lab.control_plane.servers[0].daemon;
    server.start()?;
    server.wait_ready(3 * PATIENCE)?;
    server.wait_log(PATIENCE, 0, &["captured connections go to another port"])?;
    let stream = lab.control_plane.as_apiserver(dial)??;
    stream.set_read_timeout(Some(PATIENCE))?;
    client::round_trips(stream, 3)?;
    let accepted = stranger.accept().err().map(|error| error.kind());
    assert_eq!(accepted, Some(ErrorKind::WouldBlock));
    Ok(())
}

/// An API server in a pod: a namespace without any network, in which the listener is opened. Its
/// control group goes and comes with the container; the first connect of the next one is
/// redirected already.
#[test]
fn a_program_in_a_namespace_and_a_group_that_comes_and_goes() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let netns = lab.netns("pod")?;
    let cgroup = lab.cgroup("pod")?;
    let attachment = json!({
        "name": "pod",
        "cgroup": cgroup.path(),
        "netns": netns.path(),
        "capture": [{"cidr": "10.99.0.0/16"}, {"cidr": "fd00:99::/32"}],
    });
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        if let Some(list) = config["redirect"]["attachments"].as_array_mut() {
            list.push(attachment);
        }
    })?;
    lab.start_configured()?;

    for address in address::nodes(1) {
        for container in 1..=3 {
            let first = run_in(&netns, Some(&cgroup), curl(&lab, &url(address)))?;
            answered_by_kubelet(&first)
                .with_context(|| format!("{address}, container {container}"))?;
            cgroup.remove()?;
            std::fs::create_dir(cgroup.path())?;
        }
        let outside = run_in(&netns, None, curl(&lab, &url(address)))?;
        assert_eq!(
            outside.status.code(),
            Some(7),
            "{address} from outside the group"
        );
    }
    // Each attachment holds in its own namespace only.
    let elsewhere = run_in(
        &lab.control_plane.netns,
        Some(&cgroup),
        curl(&lab, &url(Ipv4Addr::new(10, 99, 1, 2).into())),
    )?;
    assert_eq!(
        elsewhere.status.code(),
        Some(7),
        "the pod's group in another namespace"
    );

    // Below a group that stays there is no gap at all: not even this process, which connects the
    // moment it is a member, is early enough to miss the programs.
    for _ in 0..20 {
        let container = lab.control_plane.apiserver.child("container")?;
        let connect = || {
            Ok(TcpStream::connect((
                address::node(1),
                Behaviour::Echo.port(),
            ))?)
        };
        container.join(|| lab.control_plane.netns.enter(connect))?;
        container.remove()?;
    }
    Ok(())
}
