//! A reset is a reset at the other end, and the death of a process is one too: never a clean end
//! of file, which a reader would take for the whole answer.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::Socket;
use tunnel_tests::client::{self, eventually};
use tunnel_tests::frontend::{Frontend, reset};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::puppet::Puppet;
use tunnel_tests::target::Behaviour;

/// For what happens within one machine.
const SOON: Duration = Duration::from_secs(10);
/// A tunnel whose other end has died is given up after 30 s; the rest is for a busy machine.
const IDLE_TIMEOUT: Duration = Duration::from_secs(40);
/// More than all buffers on the way hold together, in bytes.
const ENDLESS: u64 = 1 << 40;

fn lab() -> Result<Lab> {
    let mut spec = LabSpec::new(Programs::of_this_test()?);
    spec.allow.push(Puppet::allow()?);
    Lab::up(spec)
}

fn target(lab: &Lab, behaviour: Behaviour) -> SocketAddr {
    (lab.workers[0].node_addresses()[0], behaviour.port()).into()
}

/// Reads until the connection ends and says with what; `None` is an end of file.
fn end_of(mut socket: &Socket) -> Result<Option<ErrorKind>> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("it does not end"),
            Err(error) => return Ok(Some(error.kind())),
        }
    }
}

/// Waits until the kernel knows that `socket` has been reset, without reading from it.
fn wait_broken(socket: &Socket, limit: Duration) -> Result<()> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::try_from(limit)?)?;
    let events = fds[0].revents().unwrap_or(PollFlags::empty());
    ensure!(events.contains(PollFlags::POLLERR), "not reset: {events:?}");
    Ok(())
}

/// Writes until nothing more is taken: every buffer on the way is full.
fn fill(mut socket: &Socket) -> Result<u64> {
    let before = socket.write_timeout()?;
    socket.set_write_timeout(Some(Duration::from_millis(500)))?;
    let chunk = vec![0; 1 << 16];
    let mut sent = 0;
    let end = loop {
        match socket.write(&chunk) {
            Ok(count) => sent += count as u64,
            Err(error) => break error,
        }
        ensure!(sent < 1 << 30, "a gigabyte was taken from a stopped reader");
    };
    ensure!(end.kind() == ErrorKind::WouldBlock, "{end}");
    socket.set_write_timeout(before)?;
    Ok(sent)
}

/// A client's reset arrives at the target as one: on a quiet connection, and behind an upload
/// that the target does not read.
#[test]
fn a_client_that_resets_is_a_reset_for_the_target() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;

    let client = Frontend::Redirect.dial(&lab, puppet.address)?;
    let target = puppet.accept()?;
    reset(client)?;
    assert_eq!(end_of(&target)?, Some(ErrorKind::ConnectionReset), "quiet");

    let client = Frontend::Redirect.dial(&lab, puppet.address)?;
    let target = puppet.accept()?;
    fill(&client)?;
    reset(client)?;
    wait_broken(&target, SOON).context("with all buffers full")?;
    Ok(())
}

/// A target's reset arrives at the client as ECONNRESET: on a quiet connection, in the middle of a
/// download, and at a client that does not read.
#[test]
fn a_target_that_resets_is_a_reset_for_the_client() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;

    let mut client = Frontend::Redirect.dial(&lab, target(&lab, Behaviour::Reset))?;
    client.write_all(b"x")?;
    assert_eq!(end_of(&client)?, Some(ErrorKind::ConnectionReset), "quiet");

    let mut client = Frontend::Redirect.dial(&lab, puppet.address)?;
    let target = puppet.accept()?;
    client::send(&target, 3 << 20)?;
    client.read_exact(&mut [0; 1 << 16])?;
    reset(target)?;
    assert_eq!(
        end_of(&client)?,
        Some(ErrorKind::ConnectionReset),
        "in a download"
    );

    for half_closed in [false, true] {
        let client = Frontend::Redirect.dial(&lab, puppet.address)?;
        let target = puppet.accept()?;
        if half_closed {
            client.shutdown(Shutdown::Write)?;
            assert_eq!(end_of(&target)?, None);
        }
        fill(&target)?;
        reset(target)?;
        wait_broken(&client, SOON)
            .with_context(|| format!("with all buffers full, half-closed: {half_closed}"))?;
    }
    Ok(())
}

/// Through CONNECT on a Unix socket, which knows no reset, a reset still ends the other side: the
/// client's departure reaches the target, the target's reset the client.
#[test]
fn a_reset_ends_a_connection_through_the_unix_socket() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;

    let client = Frontend::Connect.dial(&lab, puppet.address)?;
    let target = puppet.accept()?;
    reset(target)?;
    end_of(&client)?;

    // Unread bytes make the departure a reset for the server, unix(7).
    let mut client = Frontend::Connect.dial(&lab, puppet.address)?;
    let mut target = puppet.accept()?;
    target.write_all(b"never read")?;
    wait_readable(&client)?;
    client.write_all(b"x")?;
    drop(client);
    assert_eq!(end_of(&target)?, Some(ErrorKind::ConnectionReset));
    Ok(())
}

fn wait_readable(socket: &Socket) -> Result<()> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    ensure!(
        poll(&mut fds, PollTimeout::try_from(SOON)?)? == 1,
        "nothing arrives"
    );
    Ok(())
}

/// Connections in three moods: one that downloads, one that uploads to a target that does not
/// read, one that is quiet; each with its target in our hands.
struct Mixed {
    downloading: Socket,
    uploading: Socket,
    quiet: Socket,
    targets: Vec<Socket>,
}

impl Mixed {
    fn open(lab: &Lab, puppet: &Puppet) -> Result<Self> {
        let mut targets = Vec::new();
        let mut dial = || {
            let socket = Frontend::Redirect.dial(lab, puppet.address)?;
            targets.push(puppet.accept()?);
            Ok::<_, anyhow::Error>(socket)
        };
        Ok(Self {
            downloading: Frontend::Redirect.dial(lab, target(lab, Behaviour::Source))?,
            uploading: dial()?,
            quiet: dial()?,
            targets,
        })
    }

    /// Lets `kill` happen in mid-stream and demands that every client sees a reset within `limit`.
    fn each_is_reset_by(
        &self,
        limit: Duration,
        kill: impl FnOnce() -> Result<()>,
    ) -> Result<Duration> {
        for socket in [&self.downloading, &self.uploading, &self.quiet] {
            socket.set_read_timeout(Some(limit))?;
        }
        fill(&self.uploading)?;
        let received = AtomicU64::new(0);
        (&self.downloading).write_all(format!("{ENDLESS}\n").as_bytes())?;
        thread::scope(|scope| {
            let reader = scope.spawn(|| client::receive(Counted(&self.downloading, &received)));
            eventually(SOON, || {
                ensure!(received.load(Ordering::Relaxed) > 4 << 20, "no download");
                Ok(())
            })?;
            kill()?;
            let killed = Instant::now();
            let error = reader.join().ok().context("the reader panicked")?;
            let error = error.err().context("the download ended cleanly")?;
            let kind = error.downcast_ref().map(std::io::Error::kind);
            ensure!(kind == Some(ErrorKind::ConnectionReset), "{error:#}");
            for (socket, name) in [(&self.uploading, "upload"), (&self.quiet, "quiet")] {
                let end = end_of(socket).context(name)?;
                ensure!(end == Some(ErrorKind::ConnectionReset), "{name}: {end:?}");
            }
            Ok(killed.elapsed())
        })
    }

    fn targets_are_reset_within(&self, limit: Duration) -> Result<()> {
        for target in &self.targets {
            target.set_read_timeout(Some(limit))?;
            let end = end_of(target)?;
            ensure!(end == Some(ErrorKind::ConnectionReset), "{end:?}");
        }
        Ok(())
    }
}

struct Counted<'a>(&'a Socket, &'a AtomicU64);

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// SIGKILL of the server in mid-stream: each client sees a reset at once; the targets see one when
/// the server is back (its stateless resets say so), long before the idle timeout.
#[test]
fn a_killed_server_is_a_reset() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    let mixed = Mixed::open(&lab, &puppet)?;
    mixed.each_is_reset_by(SOON, || lab.control_plane.servers[0].daemon.kill())?;
    lab.control_plane.servers[0].daemon.start()?;
    mixed.targets_are_reset_within(IDLE_TIMEOUT)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    client::round_trips(
        Frontend::Redirect.dial(&lab, target(&lab, Behaviour::Echo))?,
        3,
    )?;
    Ok(())
}

/// SIGKILL of the agent in mid-stream: the targets see a reset at once, the clients when the
/// tunnel has been silent for its idle timeout, though another process of the agent's is there.
#[test]
fn a_killed_agent_is_a_reset() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    let mixed = Mixed::open(&lab, &puppet)?;
    let mut agent = lab.workers[0].agent.take().context("no agent")?;
    let after = mixed.each_is_reset_by(IDLE_TIMEOUT, || {
        agent.kill()?;
        mixed.targets_are_reset_within(SOON)?;
        agent.start()
    })?;
    println!("clients were reset after {after:?}");
    lab.workers[0].agent = Some(agent);
    client::round_trips(
        Frontend::Redirect.dial(&lab, target(&lab, Behaviour::Echo))?,
        3,
    )?;
    Ok(())
}
