//! Preconditions of every other test: the laboratory keeps the workers out of reach, and the
//! targets behave as their names say.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tunnel_tests::client;
use tunnel_tests::lab::site::Site;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::{BANNER, Behaviour};

const PATIENCE: Duration = Duration::from_secs(1);

fn without_connector() -> Result<Lab> {
    let spec = LabSpec::new(Programs::of_this_test()?);
    Lab::without_connector(LabSpec { workers: 2, ..spec })
}

fn worker_addresses() -> impl Iterator<Item = IpAddr> {
    address::nodes(1).into_iter().chain(address::pods(1))
}

#[test]
fn the_control_plane_has_no_route_to_a_worker() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = without_connector()?;
    for address in worker_addresses() {
        let error = lab
            .control_plane
            .as_apiserver(|| Ok(TcpStream::connect((address, 7001)).err()))?
            .with_context(|| format!("{address} was reached"))?;
        assert_eq!(
            error.kind(),
            ErrorKind::NetworkUnreachable,
            "{address}: {error}"
        );
    }
    Ok(())
}

#[test]
fn the_router_lets_nothing_in_and_counts_it() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = without_connector()?;
    assert_eq!(lab.router.leaked()?, 0);
    lab.control_plane.netns.ip(&format!(
        "route add 10.0.0.0/8 via {}\nroute add fd00::/16 via {}\n",
        address::ROUTER,
        address::ROUTER_V6,
    ))?;
    for address in worker_addresses() {
        let before = lab.router.leaked()?;
        let attempt = || Ok(TcpStream::connect_timeout(&(address, 7001).into(), PATIENCE).err());
        let error = lab.control_plane.as_apiserver(attempt)?;
        let error = error.with_context(|| format!("{address} was reached"))?;
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{address}: {error}");
        assert!(lab.router.leaked()? > before, "{address} was not counted");
    }
    Ok(())
}

#[test]
fn a_worker_dials_out_through_the_nat_and_its_mapping_changes() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = without_connector()?;
    for (server, router) in [
        (
            IpAddr::from(address::server(1)),
            IpAddr::from(address::ROUTER),
        ),
        (address::server_v6(1).into(), address::ROUTER_V6.into()),
    ] {
        let server = SocketAddr::new(server, address::TUNNEL_PORT);
        let listener = lab
            .control_plane
            .netns
            .enter(|| Ok(UdpSocket::bind(server)?))?;
        listener.set_read_timeout(Some(PATIENCE))?;
        let any = if server.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = lab.workers[0].netns.enter(|| Ok(UdpSocket::bind(any)?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(server)?;

        socket.send(b"one")?;
        let (_, before) = listener.recv_from(&mut [0; 8])?;
        assert_eq!(before.ip(), router, "the worker was not masqueraded");
        listener.send_to(b"back", before)?;
        socket
            .recv(&mut [0; 8])
            .context("no answer through the mapping")?;

        lab.router.remap()?;
        listener.send_to(b"lost", before)?;
        assert!(
            socket.recv(&mut [0; 8]).is_err(),
            "the old mapping still works"
        );
        socket.send(b"two")?;
        let (_, after) = listener.recv_from(&mut [0; 8])?;
        assert_ne!(after.port(), before.port(), "the mapping is the old one");
    }
    Ok(())
}

#[test]
fn a_worker_can_change_its_address() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = without_connector()?;
    let listener = lab
        .router
        .netns
        .enter(|| Ok(TcpListener::bind("10.99.1.1:9000")?))?;
    let dial = || {
        lab.workers[0].netns.enter(|| {
            let server = (address::server(1), address::TUNNEL_PORT);
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(server)?;
            Ok(socket.local_addr()?.ip())
        })
    };
    assert_eq!(dial()?, IpAddr::from(address::node(1)));
    let other = lab.workers[0].change_address()?;
    assert_eq!(dial()?, IpAddr::from(other));
    drop(listener);
    Ok(())
}

#[test]
fn each_target_behaves_as_it_is_called() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = without_connector()?;
    for address in worker_addresses() {
        lab.router
            .netns
            .enter(|| targets(address))
            .with_context(|| format!("at {address}"))?;
    }
    Ok(())
}

fn targets(address: IpAddr) -> Result<()> {
    let dial = |behaviour: Behaviour| -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&(address, behaviour.port()).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    const BYTES: u64 = 3_000_001;

    client::round_trips(dial(Behaviour::Echo)?, 10)?;
    client::download(dial(Behaviour::Source)?, BYTES)?;
    client::upload(dial(Behaviour::Sink)?, BYTES, |it| {
        it.shutdown(Shutdown::Write)
    })?;

    let mut banner = vec![0; BANNER.len()];
    dial(Behaviour::Banner)?.read_exact(&mut banner)?;
    assert_eq!(banner, BANNER.as_bytes());

    let mut reset = dial(Behaviour::Reset)?;
    reset.write_all(b"x")?;
    let error = reset
        .read(&mut [0])
        .err()
        .context("the reset target ended cleanly")?;
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let mut half = dial(Behaviour::HalfClose)?;
    half.write_all(b"question")?;
    half.set_read_timeout(Some(PATIENCE / 10))?;
    assert!(half.read(&mut [0]).is_err(), "answered before the end");
    half.set_read_timeout(Some(PATIENCE))?;
    half.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    half.read_to_string(&mut answer)?;
    assert_eq!(answer, "8 bytes\n");

    // What both kernels take before the reader's absence is felt is megabytes, never a gigabyte.
    let mut stuck = dial(Behaviour::Stuck)?;
    stuck.set_nonblocking(true)?;
    let chunk = vec![0; 1 << 20];
    let error = (0..1024).find_map(|_| stuck.write(&chunk).err());
    let error = error.context("the stuck target took 1 GiB")?;
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    Ok(())
}

#[test]
fn the_kubelet_wants_a_certificate_and_says_so() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = without_connector()?;
    let curl = |arguments: &[&Path]| -> Result<String> {
        let mut curl = lab.router.netns.command("curl")?;
        curl.args(["--silent", "--show-error", "--max-time", "5", "--cacert"]);
        curl.arg(lab.cluster_pki.ca())
            .args(["--write-out", "%{http_code}"])
            .args(arguments);
        let output = curl.output()?;
        Ok(String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?)
    };
    for host in [
        "10.99.1.2",
        "[fd00:99:1::2]",
        "10.244.1.2",
        "[fd00:244:1::2]",
    ] {
        let url = format!("https://{host}:10250/healthz");
        let url = Path::new(&url);
        assert_eq!(curl(&[url])?, "Unauthorized\n401", "{host}");
        let (cert, key) = (lab.cluster_pki.client_cert(), lab.cluster_pki.client_key());
        let answer = curl(&[Path::new("--cert"), &cert, Path::new("--key"), &key, url])?;
        assert!(
            answer.contains(r#""node":"w1""#) && answer.ends_with("200"),
            "{host}: {answer}"
        );
    }
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = without_connector()?;
    let description = lab.describe();
    let cgroup = description.control_plane.cgroup.clone();
    let netns = lab.workers[0].netns.clone();
    assert!(cgroup.exists() && netns.path().exists() && description.folder.exists());
    drop(lab);
    assert!(!cgroup.exists() && !netns.path().exists() && !description.folder.exists());
    assert!(Site::all()?.iter().all(|site| site.id() != description.id));
    Ok(())
}
