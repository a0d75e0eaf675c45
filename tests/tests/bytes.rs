//! No byte is lost and none is invented, whichever side closes first: over the redirect and through
//! HTTP CONNECT.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::Socket;
use tunnel_tests::client::{self, eventually};
use tunnel_tests::frontend::{Frontend, unacknowledged};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::puppet::Puppet;
use tunnel_tests::target::{BANNER, Behaviour};

const MEBIBYTE: u64 = 1 << 20;
const TIMES: usize = 100;
/// For what happens within one machine.
const SOON: Duration = Duration::from_secs(10);

fn lab() -> Result<Lab> {
    let mut spec = LabSpec::new(Programs::of_this_test()?);
    spec.allow.push(Puppet::allow()?);
    Lab::up(spec)
}

fn target(lab: &Lab, behaviour: Behaviour) -> SocketAddr {
    (lab.workers[0].node_addresses()[0], behaviour.port()).into()
}

/// Closes `socket` once the peer's kernel has all of it: then what the peer writes can no longer
/// take anything back (a reset discards what was not sent).
fn close_when_sent(socket: Socket) -> Result<()> {
    socket.shutdown(Shutdown::Write)?;
    eventually(SOON, || {
        let rest = unacknowledged(&socket);
        ensure!(rest == 0, "{rest} bytes are not acknowledged");
        Ok(())
    })
}

/// A client that sends 1 MiB and closes without waiting for anything: all of it arrives, 100 times
/// of 100, and an end of file behind it.
#[test]
fn an_upload_that_is_closed_arrives_whole() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    for frontend in Frontend::ALL {
        frontend.through(&lab, |dial| {
            for round in 0..TIMES {
                let received = thread::scope(|scope| {
                    let target = scope.spawn(|| client::receive(puppet.accept()?));
                    client::send(dial(puppet.address)?, MEBIBYTE)?;
                    join(target)
                });
                let received = received.with_context(|| format!("{frontend:?}, round {round}"))?;
                assert_eq!(received, MEBIBYTE, "{frontend:?}, round {round}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The same while the target writes to the client that is gone already, before it has read: the
/// reset that this provokes must not overtake what the client had sent.
#[test]
fn an_upload_arrives_whole_though_the_target_answers_nobody() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    for frontend in Frontend::ALL {
        frontend.through(&lab, |dial| {
            for round in 0..TIMES {
                let socket = dial(puppet.address)?;
                let mut target = puppet.accept()?;
                client::send(&socket, MEBIBYTE)?;
                close_when_sent(socket)?;
                target.write_all(b"is anybody there?")?;
                let received = client::receive(target);
                let received = received.with_context(|| format!("{frontend:?}, round {round}"))?;
                assert_eq!(received, MEBIBYTE, "{frontend:?}, round {round}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A target that sends 1 MiB and closes: all of it arrives, 100 times of 100.
#[test]
fn a_download_that_is_closed_arrives_whole() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    for frontend in Frontend::ALL {
        frontend.through(&lab, |dial| {
            for round in 0..TIMES {
                let received = thread::scope(|scope| {
                    let target = scope.spawn(|| client::send(puppet.accept()?, MEBIBYTE));
                    let received = client::receive(dial(puppet.address)?)?;
                    join(target)?;
                    Ok::<_, anyhow::Error>(received)
                });
                let received = received.with_context(|| format!("{frontend:?}, round {round}"))?;
                assert_eq!(received, MEBIBYTE, "{frontend:?}, round {round}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The same while the client goes on writing to the target that is gone: it reads everything and
/// the end of file before it learns that its own bytes went nowhere.
#[test]
fn a_download_arrives_whole_though_the_client_talks_to_nobody() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    for frontend in Frontend::ALL {
        frontend.through(&lab, |dial| {
            for round in 0..TIMES {
                let socket = dial(puppet.address)?;
                let target = puppet.accept()?;
                // As much as finds room on the way while the client reads nothing.
                let bytes = MEBIBYTE / 4;
                client::send(&target, bytes)?;
                close_when_sent(target)?;
                let received = client::receive(Chatter(&socket));
                let received = received.with_context(|| format!("{frontend:?}, round {round}"))?;
                assert_eq!(received, bytes, "{frontend:?}, round {round}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Writes a little before each read, and ignores a peer that no longer reads.
struct Chatter<'a>(&'a Socket);

impl Read for Chatter<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.write(b"chatter") {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
            _ => self.0.read(buffer),
        }
    }
}

/// Half-close passes: the target answers only after the client has ended its half, and the answer
/// arrives; with socat as a client that knows nothing of tunnels, too.
#[test]
fn a_half_closed_client_is_answered() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let address = target(&lab, Behaviour::HalfClose);
    for frontend in Frontend::ALL {
        let mut socket = frontend.dial(&lab, address)?;
        socket.write_all(b"question")?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let early = socket.read(&mut [0]).err().context("answered too early")?;
        assert_eq!(early.kind(), ErrorKind::WouldBlock, "{frontend:?}");
        socket.set_read_timeout(Some(SOON))?;
        socket.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        assert_eq!(answer, "8 bytes\n", "{frontend:?}");
    }
    let mut socat = lab.control_plane.netns.command("socat")?;
    lab.control_plane.apiserver.place(&mut socat)?;
    socat.args(["-t10", "-", &format!("TCP:{address}")]);
    socat.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = socat.spawn().context("socat")?;
    let question = child.stdin.take().context("socat has no input")?;
    client::send(question, MEBIBYTE)?;
    let output = child.wait_with_output()?;
    assert_eq!(String::from_utf8(output.stdout)?, "1048576 bytes\n");
    Ok(())
}

/// A target that ends its half first still hears the client to its end.
#[test]
fn a_half_closed_target_still_hears_the_client() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    for frontend in Frontend::ALL {
        let mut socket = frontend.dial(&lab, puppet.address)?;
        let mut target = puppet.accept()?;
        target.write_all(b"only this")?;
        target.shutdown(Shutdown::Write)?;
        let mut heard = String::new();
        socket.read_to_string(&mut heard)?;
        assert_eq!(heard, "only this", "{frontend:?}");
        thread::scope(|scope| {
            let target = scope.spawn(|| client::receive(target));
            client::send(&socket, MEBIBYTE)?;
            socket.shutdown(Shutdown::Write)?;
            assert_eq!(join(target)?, MEBIBYTE, "{frontend:?}");
            Ok::<_, anyhow::Error>(())
        })?;
    }
    Ok(())
}

/// A server that speaks first is heard by a client that has said nothing; through CONNECT its
/// banner comes behind the proxy's whole answer.
#[test]
fn a_banner_is_heard() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    let address = target(&lab, Behaviour::Banner);
    for frontend in Frontend::ALL {
        let mut socket = frontend.dial(&lab, address)?;
        let mut banner = vec![0; BANNER.len()];
        socket.read_exact(&mut banner)?;
        assert_eq!(banner, BANNER.as_bytes(), "{frontend:?}");
        client::round_trips(socket, 10)?;
    }
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let mut raw = UnixStream::connect(proxy)?;
    write!(raw, "CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n\r\n")?;
    let expected = format!("HTTP/1.1 200 Connection Established\r\n\r\n{BANNER}");
    let mut answer = vec![0; expected.len()];
    raw.read_exact(&mut answer)?;
    assert_eq!(String::from_utf8(answer)?, expected);
    Ok(())
}

/// A gigabyte in each direction, every byte checked, over the redirect.
#[test]
fn a_gigabyte_each_way() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab()?;
    const BYTES: u64 = 1_000_000_000;
    let up = Frontend::Redirect.dial(&lab, target(&lab, Behaviour::Sink))?;
    let up = client::upload(up, BYTES, |it| it.shutdown(Shutdown::Write))?;
    let down = Frontend::Redirect.dial(&lab, target(&lab, Behaviour::Source))?;
    let down = client::download(down, BYTES)?;
    for (way, transfer) in [("up", up), ("down", down)] {
        println!("{way}: {:.0} MB/s", transfer.megabytes_per_second());
    }
    Ok(())
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
