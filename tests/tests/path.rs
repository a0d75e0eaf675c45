//! Paths that lose, delay, reorder, throttle, go dark and shrink: each byte arrives whole through
//! the tunnel, in both directions, and so do the ends of both.

use std::io::Read;
use std::net::{Shutdown, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::Socket;
use tunnel_tests::client;
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::shaper::{Counts, Direction, Impairment, Link, Shaper};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

/// Without a byte for so long a transfer has stopped. Behind heavy losses the timers of QUIC may
/// take seconds.
const PATIENCE: Duration = Duration::from_secs(25);

fn laboratory() -> Result<(Lab, Shaper)> {
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    let shaper = lab.shape(Link::Worker(1))?;
    lab.start_connector()?;
    Ok((lab, shaper))
}

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// A stream that does something once, when so many bytes have been read from it.
struct Midway<R, F> {
    stream: R,
    left: usize,
    action: Option<F>,
}

impl<R: Read, F: FnOnce()> Read for Midway<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0
            && let Some(action) = self.action.take()
        {
            action();
        }
        let count = self.stream.read(buffer)?;
        self.left = self.left.saturating_sub(count);
        Ok(count)
    }
}

/// Sends `bytes` to a target that sends them back, both at once, and compares each; then ends the
/// own half and waits for the end of the other. When a quarter of them is back, does `midway`.
fn there_and_back(lab: &Lab, bytes: u64, midway: impl FnOnce()) -> Result<()> {
    let target = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let start = Instant::now();
    let socket = Frontend::Redirect.dial(lab, target)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let back = Midway {
        stream: &socket,
        left: usize::try_from(bytes / 4)?,
        action: Some(midway),
    };
    let received = thread::scope(|scope| {
        let sending = scope.spawn(|| send(&socket, bytes));
        let received = client::receive(back).context("on the way back");
        let sent = sending.join();
        sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        received
    })?;
    assert_eq!(received, bytes);
    println!(
        "{bytes} bytes there and back in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn send(socket: &Socket, bytes: u64) -> Result<()> {
    client::send(socket, bytes).context("on the way there")?;
    Ok(socket.shutdown(Shutdown::Write)?)
}

/// Returns the counts of the path; a test in which the path did nothing has shown nothing.
fn counts(shaper: &Shaper, of: impl Fn(Counts) -> u64) -> Result<()> {
    let counts = [Direction::Outward, Direction::Inward].map(|it| shaper.counts(it));
    println!("{counts:#?}");
    ensure!(
        counts.into_iter().map(of).sum::<u64>() > 0,
        "nothing has happened"
    );
    Ok(())
}

fn passes(path: Impairment, bytes: u64, of: impl Fn(Counts) -> u64) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (lab, shaper) = laboratory()?;
    shaper.set(path);
    there_and_back(&lab, bytes, || ())?;
    counts(&shaper, of)
}

#[test]
fn one_packet_of_a_hundred_is_lost() -> Result<()> {
    let path = Impairment {
        loss: 0.01,
        ..Impairment::of_rtt(ms(50))
    };
    passes(path, 2_000_000, |counts| counts.lost)
}

#[test]
fn three_packets_of_a_hundred_are_lost() -> Result<()> {
    let path = Impairment {
        loss: 0.03,
        ..Impairment::of_rtt(ms(50))
    };
    passes(path, 1_000_000, |counts| counts.lost)
}

#[test]
fn a_third_of_the_packets_is_overtaken() -> Result<()> {
    let path = Impairment {
        reorder: 0.3,
        reorder_by: ms(15),
        ..Impairment::of_rtt(ms(20))
    };
    passes(path, 2_000_000, |counts| counts.held_back)
}

#[test]
fn a_bottleneck_has_a_small_buffer() -> Result<()> {
    let path = Impairment {
        rate: Some(20_000_000),
        // A quarter of what is under way.
        queue: 32_000,
        ..Impairment::of_rtt(ms(40))
    };
    passes(path, 8_000_000, |counts| counts.overflowed)
}

#[test]
fn the_other_side_is_far_away_and_not_always_as_far() -> Result<()> {
    let path = Impairment {
        jitter: ms(60),
        ..Impairment::of_rtt(ms(400))
    };
    passes(path, 2_000_000, |counts| counts.packets)
}

/// Nothing passes for 5 s, which is much less than the idle timeout: the connection goes on.
#[test]
fn the_path_goes_dark_and_comes_back() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (lab, shaper) = laboratory()?;
    let path = Impairment {
        rate: Some(20_000_000),
        queue: 100_000,
        ..Impairment::of_rtt(ms(30))
    };
    shaper.set(path);
    there_and_back(&lab, 6_000_000, || {
        let before = shaper.counts(Direction::Outward).bytes;
        shaper.set(Impairment { loss: 1.0, ..path });
        thread::sleep(Duration::from_secs(5));
        shaper.set(path);
        println!(
            "in the dark after {before} bytes, until after {}",
            shaper.counts(Direction::Outward).bytes
        );
    })?;
    counts(&shaper, |counts| counts.lost)
}

/// The path takes smaller packets from one moment on, without notice: larger ones vanish, and
/// smaller ones take their place.
#[test]
fn large_packets_begin_to_vanish() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (lab, shaper) = laboratory()?;
    let path = Impairment {
        rate: Some(20_000_000),
        queue: 100_000,
        ..Impairment::of_rtt(ms(30))
    };
    shaper.set(path);
    there_and_back(&lab, 6_000_000, || {
        shaper.set(Impairment {
            mtu: Some(1300),
            ..path
        });
    })?;
    counts(&shaper, |counts| counts.too_large)
}
