//! The server under systemd: sockets that it is handed and that outlive it, what it tells, and
//! what it asks to be kept. The test stands in for systemd.

use std::collections::HashMap;
use std::fs;
use std::io::{IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use socket2::{Domain, Socket, Type};
use tunnel_tests::client::round_trips;
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Load, ask};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
/// Twice in this time the server says that it is alive.
const WATCHDOG: Duration = Duration::from_secs(4);
/// The first descriptor that is handed over (sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// Sockets and the names under which they are handed over.
type Sockets = Vec<(String, OwnedFd)>;

/// A service manager with one service.
struct Manager {
    notify: UnixDatagram,
    path: PathBuf,
    kept: HashMap<String, Vec<OwnedFd>>,
    /// Whether the store is full.
    is_full: bool,
}

impl Manager {
    fn new(folder: &Path) -> Result<Self> {
        let path = folder.join("notify.sock");
        let notify = UnixDatagram::bind(&path)?;
        notify.set_read_timeout(Some(SOON))?;
        Ok(Self {
            notify,
            path,
            kept: HashMap::new(),
            is_full: false,
        })
    }

    /// Prepares the start of a service: the sockets from descriptor 3 on, and the address for
    /// notifications.
    fn prepare(&self, command: &mut Command, sockets: &Sockets) {
        let names: Vec<_> = sockets.iter().map(|(name, _)| name.as_str()).collect();
        command
            .env("NOTIFY_SOCKET", &self.path)
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
        if sockets.is_empty() {
            return;
        }
        command
            .env("LISTEN_FDS", sockets.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        let own: Vec<_> = sockets.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        // SAFETY: fcntl(2) and dup2(2) on descriptors that outlive the call; nothing is allocated
        // but what `own` holds already.
        unsafe {
            command.pre_exec(move || {
                let mut aside = [0; 16];
                // First out of the way of the numbers that they are to have.
                for (fd, aside) in own.iter().zip(&mut aside) {
                    *aside = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 64);
                }
                for (number, fd) in (FIRST..).zip(&aside[..own.len()]) {
                    if libc::dup2(*fd, number) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
    }

    /// Returns copies of the kept sockets of a process. The listeners of the redirect are the server's.
    fn sockets(&self, is_server: bool) -> Result<Sockets> {
        let mut sockets = Vec::new();
        for (name, kept) in &self.kept {
            if name == "handover" || is_server {
                for descriptor in kept {
                    sockets.push((name.clone(), descriptor.try_clone()?));
                }
            }
        }
        Ok(sockets)
    }

    /// Does what the messages that wait ask for.
    fn catch_up(&mut self) -> Result<()> {
        self.notify.set_nonblocking(true)?;
        while self.receive().is_ok() {}
        Ok(self.notify.set_nonblocking(false)?)
    }

    /// Waits for a message with `piece` in it, and does what all messages until then ask for.
    fn hear(&mut self, piece: &str) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            let text = self.receive();
            let text = text.with_context(|| format!("the process sent no {piece:?}"))?;
            if text.contains(piece) {
                return Ok(());
            }
        }
        anyhow::bail!("{piece:?} was not told");
    }

    /// Receives a message, and keeps or forgets the sockets that it names.
    fn receive(&mut self) -> Result<String> {
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 16]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.notify.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let mut received = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just made these descriptors for us.
                received.extend(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
        let length = message.bytes;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        if text.contains("FDSTORE=1") && !self.is_full {
            let name = name.context("a descriptor without a name")?.to_owned();
            self.kept.entry(name).or_default().extend(received);
        } else if text.contains("FDSTOREREMOVE=1") {
            self.kept.remove(name.context("a removal without a name")?);
        }
        Ok(text)
    }

    /// Reloads `daemon` as `Type=notify-reload` does: RELOADING says since when, READY ends it.
    fn reload(&mut self, daemon: &mut Daemon) -> Result<()> {
        daemon.signal(Signal::SIGHUP)?;
        self.hear("RELOADING=1\nMONOTONIC_USEC=")?;
        self.hear("READY=1")
    }
}

/// A laboratory whose programs are started in a shell that tells them their process id.
fn lab(folder: &Path, redirect: bool) -> Result<Lab> {
    let programs = Programs::of_this_test()?;
    fs::create_dir_all(folder)?;
    let script = folder.join("cpc");
    let text = format!(
        "#!/bin/sh\nexport LISTEN_PID=$$\nexec {} \"$@\"\n",
        programs.cpc.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let programs = Programs {
        cpc: script,
        ..programs
    };
    let spec = LabSpec::new(programs);
    let mut lab = Lab::without_connector(LabSpec { redirect, ..spec })?;
    lab.configure_connector()?;
    Ok(lab)
}

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn folder(name: &str) -> Folder {
    Folder(std::env::temp_dir().join(format!("cpc-{name}-{}", std::process::id())))
}

/// The sockets of the units in `deploy/systemd`, and the admin port's. Whether the tunnel's is
/// `shared` is for the unit to say.
fn listening(lab: &Lab, shared: bool) -> Result<Sockets> {
    let sockets = &lab.control_plane.servers[0].sockets;
    let (udp, health, admin) = lab.control_plane.netns.enter(|| {
        let domain = Domain::for_address(sockets.tunnel);
        let udp = Socket::new(domain, Type::DGRAM, None)?;
        udp.set_reuse_port(shared)?;
        udp.bind(&sockets.tunnel.into())?;
        Ok((
            UdpSocket::from(udp),
            TcpListener::bind(sockets.tunnel)?,
            TcpListener::bind(sockets.admin)?,
        ))
    })?;
    let unix = UnixListener::bind(&sockets.connect_unix)?;
    let name = || "cpc-server.socket".to_owned();
    Ok(vec![
        (name(), udp.into()),
        (name(), health.into()),
        (name(), admin.into()),
        (name(), unix.into()),
    ])
}

/// Handed-over sockets serve, and outlive the process: what is connected while it is away waits in
/// the backlog and is answered by the next one.
#[test]
fn sockets_outlive_the_process() -> Result<()> {
    outlive("activation", true)
}

/// A UDP socket that was not made to be shared has all tunnels on one shard.
#[test]
fn a_socket_that_is_not_shared_outlives_the_process_too() -> Result<()> {
    outlive("alone", false)
}

fn outlive(name: &str, shared: bool) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let folder = folder(name);
    let mut lab = lab(&folder.0, false)?;
    let mut manager = Manager::new(&folder.0)?;
    let sockets = listening(&lab, shared)?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["shards"] = 2.into())?;
    lab.workers[0]
        .agent()?
        .configure(|config| config["tunnels"] = 2.into())?;
    lab.control_plane.servers[0]
        .daemon
        .start_with(|command| manager.prepare(command, &sockets))?;
    // Packets that come before the sockets are steered go anywhere.
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_log(SOON, 0, &["server is up"])?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    let log = lab.control_plane.servers[0].daemon.log();
    ensure!(!log.contains("is not used"), "{log}");
    ensure!(
        log.contains("one shard serves all tunnels") != shared,
        "{log}"
    );
    two_tunnels(&lab, shared)?;
    let of = lab.control_plane.servers[0].sockets.clone();
    let echo = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let stream = tunnel_tests::client::connect_through(&of.connect_unix, &echo.to_string())?;
    round_trips(stream, 3)?;

    lab.control_plane.servers[0].daemon.kill()?;
    let netns = lab.control_plane.netns.clone();
    let mut waiting = Vec::new();
    for port in [of.tunnel, of.admin] {
        let mut stream = netns.enter(|| Ok(TcpStream::connect(port)?))?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
        waiting.push(stream);
    }
    let mut client = UnixStream::connect(&of.connect_unix)?;
    client.set_read_timeout(Some(SOON))?;
    client.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    // The frontend that nobody was asked to hold is gone meanwhile.
    let other = netns.enter(|| Ok(TcpStream::connect(of.connect_tcp).is_err()))?;
    ensure!(other, "a socket of the killed process is still there");

    lab.control_plane.servers[0]
        .daemon
        .start_with(|command| manager.prepare(command, &sockets))?;
    for mut stream in waiting {
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        read.with_context(|| {
            let log = lab.control_plane.servers[0].daemon.log();
            format!("no answer at {:?}\n{log}", stream.peer_addr())
        })?;
        ensure!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    }
    let mut answer = String::new();
    let read = client.read_to_string(&mut answer);
    read.context("no answer at the Unix socket")?;
    ensure!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    two_tunnels(&lab, shared)?;
    manager.hear("READY=1")
}

/// A restart by the service manager: the process leaves everything with it, and the next one goes on with
/// every connection. A full store and a start that fails end none.
#[test]
fn connections_outlive_a_restart() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let folder = folder("restart");
    let mut lab = lab(&folder.0, true)?;
    let mut manager = Manager::new(&folder.0)?;
    let none = Vec::new();
    lab.control_plane.servers[0]
        .daemon
        .start_with(|command| manager.prepare(command, &none))?;
    let agent = lab.workers[0].agent()?;
    agent.start_with(|command| manager.prepare(command, &none))?;
    agent.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    let echo = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let paces = [Pace::Messages(100, Duration::from_millis(5)), Pace::Bulk];
    let talks = Frontend::ALL
        .into_iter()
        .flat_map(|frontend| paces.map(|pace| (frontend, pace)));
    let talks = talks.map(|(frontend, pace)| {
        let stream = frontend.dial(&lab, echo)?;
        Conversation::start(stream, pace)
    });
    let talks = talks.collect::<Result<Vec<_>>>()?;
    let load = Load::start(&lab.control_plane, 2, move |request| ask(echo, request))?;
    for round in 0..3 {
        std::thread::sleep(Duration::from_secs(2));
        let daemon = match round % 2 {
            0 => &mut lab.control_plane.servers[0].daemon,
            _ => lab.workers[0].agent()?,
        };
        // A process that can't leave everything goes on.
        let logged = daemon.log().len();
        manager.is_full = true;
        daemon.signal(Signal::SIGUSR2)?;
        manager.hear("BARRIER=1")?;
        daemon.wait_log(SOON, logged, &["ERROR", "nothing is handed over"])?;
        manager.is_full = false;
        load.wait_answered(20, SOON)?;

        daemon.signal(Signal::SIGUSR2)?;
        manager.hear("BARRIER=1")?;
        daemon.wait_ended(SOON)?;
        let is_server = round % 2 == 0;
        let left = manager.sockets(is_server)?;
        ensure!(left.iter().any(|(name, _)| name == "handover"));
        // A start that fails takes nothing.
        daemon.start_with(|command| {
            manager.prepare(command, &left);
            command.env("CPC_TLS_KEY", "/nonexistent");
        })?;
        let ended = daemon.wait_ended(SOON).unwrap_err();
        ensure!(format!("{ended:#}").contains("/nonexistent"), "{ended:#}");
        drop(left);
        manager.catch_up()?;
        let left = manager.sockets(is_server)?;
        daemon.start_with(|command| manager.prepare(command, &left))?;
        manager.hear("FDSTOREREMOVE=1")?;
        drop(left);
        load.wait_answered(20, SOON)?;
    }
    load.stop_answered(&lab)?;
    for talk in talks {
        println!("{:?}", talk.finish().with_context(|| lab.logs())?);
    }
    Ok(())
}

/// Waits for them; each has a shard of its own where the socket can be shared.
fn two_tunnels(lab: &Lab, shared: bool) -> Result<()> {
    let server = &lab.control_plane.servers[0].daemon;
    let on = if shared { [0, 1] } else { [0, 0] };
    server.wait_status(SOON, |status| {
        let agents = status["agents"].as_array().into_iter().flatten();
        let mut shards: Vec<_> = agents.filter_map(|row| row["shard"].as_u64()).collect();
        shards.sort_unstable();
        shards == on
    })?;
    Ok(())
}

/// A handed-over socket that belongs to no address of the configuration is complained about.
#[test]
fn a_socket_for_nothing_is_noticed() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let folder = folder("stray");
    let mut lab = lab(&folder.0, false)?;
    let manager = Manager::new(&folder.0)?;
    let netns = lab.control_plane.netns.clone();
    let stray = netns.enter(|| Ok(TcpListener::bind("127.0.0.1:8999")?))?;
    let sockets = vec![("stray.socket".to_owned(), stray.into())];
    let server = &mut lab.control_plane.servers[0].daemon;
    server.start_with(|command| manager.prepare(command, &sockets))?;
    let pieces = ["WARN", "an inherited socket is not used", "stray.socket"];
    server.wait_log(SOON, 0, &pieces)?;
    Ok(())
}

/// READY when everything is served, RELOADING and READY around a reload, WATCHDOG while it turns and
/// not while it is stuck, STOPPING at the end; the agent the same.
#[test]
fn the_service_manager_is_told() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let folder = folder("notify");
    let mut lab = lab(&folder.0, false)?;
    let mut manager = Manager::new(&folder.0)?;
    let none = Vec::new();
    let tunnel = lab.control_plane.servers[0].sockets.tunnel;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.start_with(|command| manager.prepare(command, &none))?;
    manager.hear("READY=1")?;
    assert_eq!(server.get("/healthz")?.0, 200, "said too early: {tunnel}");
    manager.hear("WATCHDOG=1")?;
    manager.reload(server)?;
    server.stop()?;
    // What was sent before it stopped.
    manager.notify.set_read_timeout(Some(WATCHDOG))?;
    std::thread::sleep(WATCHDOG / 4);
    manager.notify.set_nonblocking(true)?;
    while manager.notify.recv(&mut [0; 4096]).is_ok() {}
    manager.notify.set_nonblocking(false)?;
    ensure!(
        manager.hear("WATCHDOG=1").is_err(),
        "a stopped process says that it is alive"
    );
    manager.notify.set_read_timeout(Some(SOON))?;
    server.cont()?;
    manager.hear("WATCHDOG=1")?;
    server.terminate()?;
    manager.hear("STOPPING=1")?;

    let agent = lab.workers[0].agent()?;
    agent.start_with(|command| manager.prepare(command, &none))?;
    manager.hear("READY=1")?;
    manager.hear("WATCHDOG=1")?;
    manager.reload(agent)?;
    agent.terminate()?;
    manager.hear("STOPPING=1")
}

/// The redirect's listeners are given to the service manager to keep, and taken from it by the
/// next process: a captured connect made in between is not refused.
#[test]
fn the_redirects_listeners_are_kept() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let folder = folder("fdstore");
    let mut lab = lab(&folder.0, true)?;
    let mut manager = Manager::new(&folder.0)?;
    let none = Vec::new();
    let server = &mut lab.control_plane.servers[0].daemon;
    server.start_with(|command| manager.prepare(command, &none))?;
    manager.hear("READY=1")?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    let name = "redirect-kube-apiserver".to_owned();
    let kept = manager.kept.remove(&name).context("nothing was kept")?;
    assert_eq!(kept.len(), 2, "one a family");

    let echo = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let connect = |lab: &Lab| {
        lab.control_plane.as_apiserver(|| {
            let stream = TcpStream::connect_timeout(&echo, SOON)?;
            stream.set_read_timeout(Some(SOON))?;
            Ok(stream)
        })
    };
    round_trips(connect(&lab)?, 3)?;
    lab.control_plane.servers[0].daemon.kill()?;
    let waiting = connect(&lab).context("refused while the listener was kept")?;
    let sockets: Sockets = kept.into_iter().map(|fd| (name.clone(), fd)).collect();
    lab.control_plane.servers[0]
        .daemon
        .start_with(|command| manager.prepare(command, &sockets))?;
    manager.hear("READY=1")?;
    let log = lab.control_plane.servers[0].daemon.log();
    ensure!(!log.contains("is not used"), "{log}");
    round_trips(waiting, 3).context("the connection that waited")?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    round_trips(connect(&lab)?, 3)?;

    // Without anybody to keep them the same connect is refused.
    drop(sockets);
    lab.control_plane.servers[0].daemon.kill()?;
    ensure!(connect(&lab).is_err(), "the listener is still there");
    Ok(())
}
