//! Requests of 100 bytes, each connection waiting for its answer before it asks again.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{Effort, Figure, Meter, latency};
use crate::bench::load::{Connection, PATIENCE, REQUEST};
use crate::bench::path::Running;

/// Runs `connections` at once; the first quarter of a second does not count.
pub(super) fn take(path: &Running, connections: usize, effort: &Effort) -> Result<Vec<Figure>> {
    let mut open = (0..connections)
        .map(|_| path.dial().open_echo())
        .collect::<Result<Vec<_>>>()?;
    let mut ask = |time: Duration| match &mut open[..] {
        [one] => Ok(one.ask_until(Instant::now() + time)?),
        many => ask_all(many, Instant::now() + time),
    };
    ask(effort.time.min(Duration::from_millis(250)))?;
    let meter = Meter::start(path)?;
    let start = Instant::now();
    let times = ask(effort.time)?;
    let (count, elapsed) = (times.len() as f64, start.elapsed());
    let mut figures = latency(times);
    figures.push(Figure::new("rate", "1/s", count / elapsed.as_secs_f64()));
    if let Some([server, agent]) = meter.stop()? {
        let cost = |name, seconds: f64| Figure::new(name, "µs each", seconds * 1e6 / count);
        figures.push(cost("CPU server", server));
        figures.push(cost("CPU agent", agent));
        figures.push(cost("CPU both", server + agent));
    }
    Ok(figures)
}

/// Sends requests on all connections from one thread, so that context switches are not measured.
fn ask_all(connections: &mut [Connection], end: Instant) -> Result<Vec<Duration>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let request = [b'?'; REQUEST];
    let mut asked = Vec::new();
    let mut missing = vec![REQUEST; connections.len()];
    for (index, connection) in connections.iter_mut().enumerate() {
        connection.socket.set_nonblocking(true)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        epoll.add(&connection.socket, event)?;
        asked.push(Instant::now());
        connection.socket.write_all(&request)?;
    }
    let patience = EpollTimeout::try_from(PATIENCE)?;
    let mut events = vec![EpollEvent::empty(); connections.len()];
    let mut times = Vec::new();
    let mut waiting = connections.len();
    while waiting > 0 {
        let ready = match epoll.wait(&mut events, patience) {
            Ok(0) => bail!("{waiting} requests have no answer after {PATIENCE:?}"),
            Err(Errno::EINTR) => continue,
            ready => ready?,
        };
        for event in &events[..ready] {
            // As it was given above.
            let index = event.data() as usize;
            let socket = &mut connections[index].socket;
            let mut answer = [0; REQUEST];
            match socket.read(&mut answer[..missing[index]]) {
                Ok(0) => bail!("a connection has ended"),
                Ok(count) => missing[index] -= count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            if missing[index] > 0 {
                continue;
            }
            let now = Instant::now();
            times.push(now - asked[index]);
            if now < end {
                asked[index] = now;
                missing[index] = REQUEST;
                socket.write_all(&request)?;
            } else {
                waiting -= 1;
            }
        }
    }
    for connection in connections {
        connection.socket.set_nonblocking(false)?;
    }
    Ok(times)
}
