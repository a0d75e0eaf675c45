//! The speed of the tunnel on a bad path, beside the kernel's TCP with the same congestion control
//! on the same path. It measures and asserts nothing:
//!
//! ```sh
//! cargo nextest run --cargo-profile lab -p tunnel-tests --test path_speed --run-ignored all --no-capture
//! ```
//!
//! Environment: `ROUNDS` (3), `DURATION` (10, seconds of each measurement, after half as much to warm
//! up), `CONGESTION` (cubic, of the kernel's TCP), `TUNNEL` (cubic, `transport.congestion` of server and
//! agent), `KEEPER` (0; 1: server and agent have one), `CASES` (all; beginnings of their names, joined by
//! semicolons).

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;
use socket2::{SockRef, Socket};
use tunnel_tests::frontend::{Frontend, patient};
use tunnel_tests::keeper::Keeper;
use tunnel_tests::lab::shaper::{Impairment, Link};
use tunnel_tests::lab::worker::Worker;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::side::Side;
use tunnel_tests::target::Behaviour;

const MEGABIT: u64 = 1_000_000;

fn cases() -> Vec<(&'static str, Impairment)> {
    let far = Impairment::of_rtt(Duration::from_millis(50));
    let loss = |loss| Impairment { loss, ..far };
    let bottleneck = |rate: u64, queue| Impairment {
        rate: Some(rate * MEGABIT),
        queue,
        ..far
    };
    let reordering = Impairment {
        reorder: 0.02,
        reorder_by: Duration::from_millis(10),
        ..bottleneck(100, 300_000)
    };
    // A queue of one bandwidth-delay product.
    let long = |rate: u64, rtt: u64| {
        let rtt = Duration::from_millis(rtt);
        Impairment {
            rate: Some(rate * MEGABIT),
            queue: usize::try_from(rate * 125 * rtt.as_millis() as u64).unwrap_or(usize::MAX),
            ..Impairment::of_rtt(rtt)
        }
    };
    vec![
        ("1 Gbit/s, 10 ms", long(1000, 10)),
        ("1 Gbit/s, 50 ms", long(1000, 50)),
        ("1 Gbit/s, 200 ms", long(1000, 200)),
        ("100 Mbit/s, 200 ms", long(100, 200)),
        (
            "1 Gbit/s, 50 ms, 0.1 % loss",
            Impairment {
                loss: 0.001,
                ..long(1000, 50)
            },
        ),
        (
            "1 Gbit/s, 50 ms, 1 % loss",
            Impairment {
                loss: 0.01,
                ..long(1000, 50)
            },
        ),
        ("1 % loss", loss(0.01)),
        ("3 % loss", loss(0.03)),
        ("0.1 % loss", loss(0.001)),
        ("20 Mbit/s, small buffer", bottleneck(20, 32_000)),
        ("100 Mbit/s, ample buffer", bottleneck(100, 625_000)),
        ("100 Mbit/s, 2 % reordered", reordering),
    ]
}

fn setting(name: &str, default: u32) -> Result<u32> {
    Ok(match std::env::var(name) {
        Ok(text) => text.parse()?,
        Err(_) => default,
    })
}

/// Fetches from a source for `time`; gives megabits a second. The start does not count: a tunnel
/// that has been used before does not start as a new connection of TCP's does, with few packets
/// that grow until the first one is lost.
fn rate(mut socket: Socket, time: Duration) -> Result<f64> {
    // More than comes in that time.
    socket.write_all(b"100000000000\n")?;
    fetch(&mut socket, time / 2)?;
    let start = Instant::now();
    let bytes = fetch(&mut socket, time)?;
    Ok(bytes as f64 * 8.0 / 1e6 / start.elapsed().as_secs_f64())
}

/// Returns the number of bytes that arrive in `time`.
fn fetch(socket: &mut Socket, time: Duration) -> Result<usize> {
    let start = Instant::now();
    let (mut bytes, mut buffer) = (0, vec![0; 1 << 18]);
    loop {
        let left = time.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(bytes);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut buffer) {
            Ok(0) => bail!("the source has ended"),
            Ok(count) => bytes += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A source in this process, whose connections have that congestion control. (A namespace of its own
/// may choose among a few only.)
fn direct_source(worker: &Worker, congestion: &str) -> Result<SocketAddr> {
    let address = SocketAddr::from((worker.node_addresses()[0], 9000));
    let listener = worker.netns.enter(|| Ok(TcpListener::bind(address)?))?;
    SockRef::from(&listener).set_tcp_congestion(congestion.as_bytes())?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let chunk = vec![7; 1 << 18];
            // Until the client has gone.
            thread::spawn(move || while stream.write_all(&chunk).is_ok() {});
        }
    });
    Ok(address)
}

fn middle(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[test]
#[ignore = "measures, for minutes"]
fn against_the_kernels_tcp() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let rounds = setting("ROUNDS", 3)?;
    let time = Duration::from_secs(setting("DURATION", 10)?.into());
    let congestion = std::env::var("CONGESTION").unwrap_or_else(|_| "cubic".into());
    let wanted = std::env::var("CASES").unwrap_or_default();

    let programs = Programs::of_this_test()?;
    let tunnels = std::env::var("TUNNEL").unwrap_or_else(|_| "cubic".into());
    let has_keeper = setting("KEEPER", 0)? > 0;
    let (lab, (shaper, _keepers)) = Lab::up_with(LabSpec::new(programs.clone()), |lab| {
        // What an earlier connection has learned would start the next one.
        let worker = &lab.workers[0].netns;
        worker.sysctl("ipv4/tcp_no_metrics_save", "1")?;
        for side in [Side::Server, Side::Agent] {
            let daemon = side.daemon(lab)?;
            daemon.configure(|config| config["transport"]["congestion"] = json!(tunnels))?;
        }
        let mut keepers = Vec::new();
        if has_keeper {
            lab.keep_state()?;
            for side in [Side::Server, Side::Agent] {
                keepers.push(Keeper::start(&programs.cpc, side.daemon(lab)?)?);
            }
        }
        Ok((lab.shape(Link::Worker(1))?, keepers))
    })?;
    let direct = direct_source(&lab.workers[0], &congestion)?;
    let source = SocketAddr::from((address::node(1), Behaviour::Source.port()));
    let cases = cases();
    let chosen = cases
        .iter()
        .filter(|(name, _)| wanted.split(';').any(|part| name.starts_with(part)));
    for (name, path) in chosen {
        shaper.set(*path);
        let [mut tcp, mut tunnel] = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            let dial = || patient(TcpStream::connect(direct)?.into());
            tcp.push(rate(lab.router.netns.enter(dial)?, time)?);
            tunnel.push(rate(Frontend::Redirect.dial(&lab, source)?, time)?);
        }
        println!("{name}: TCP {tcp:.2?}, tunnel {tunnel:.2?} Mbit/s");
        let [tcp, tunnel] = [middle(&mut tcp), middle(&mut tunnel)];
        println!(
            "{name}: TCP {tcp:.2}, tunnel {tunnel:.2} Mbit/s (medians), ratio {:.2}",
            tunnel / tcp
        );
    }
    Ok(())
}
