//! Bulk: the speed of bytes, and its cost.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Effort, Figure, Meter};
use crate::bench::load::{Connection, Dial};
use crate::bench::path::Running;
use crate::bench::target::{self, Order};

/// Moved first, to see how fast the path is and to fill its windows, in bytes.
const TRIAL: u64 = 8 << 20;

/// Direction of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the client, as for a log.
    Down,
    /// To the target.
    Up,
}

impl Direction {
    /// Returns the order for the target.
    pub(super) fn order(self, bytes: u64) -> Order {
        match self {
            Self::Down => Order::Send(bytes),
            Self::Up => Order::Receive(bytes),
        }
    }

    pub(super) fn transfer(
        self,
        connection: &mut Connection,
        bytes: u64,
        zeros: &OwnedFd,
    ) -> Result<()> {
        match self {
            Self::Down => connection.receive(bytes),
            Self::Up => connection.send(bytes, zeros),
        }
    }
}

/// Moves as many bytes as `streams` connections can in the time of `effort`. Every byte has arrived
/// at the end, so that the counted bytes are those whose cost is measured.
pub(super) fn take(
    path: &Running,
    direction: Direction,
    streams: usize,
    effort: &Effort,
) -> Result<Vec<Figure>> {
    let trial = transfer(path.dial(), direction, streams, TRIAL.min(effort.bytes))?;
    let speed = TRIAL.min(effort.bytes) as f64 / trial.as_secs_f64();
    let bytes = (speed * effort.time.as_secs_f64()) as u64;
    let bytes = bytes.clamp(TRIAL.min(effort.bytes), effort.bytes);

    let meter = Meter::start(path)?;
    let elapsed = transfer(path.dial(), direction, streams, bytes)?;
    let gigabytes = bytes as f64 / 1e9;
    let mut figures = vec![Figure::new(
        "speed",
        "Gbit/s",
        8.0 * gigabytes / elapsed.as_secs_f64(),
    )];
    if let Some([server, agent]) = meter.stop()? {
        let cost = |name, seconds| Figure::new(name, "s/GB", seconds / gigabytes);
        figures.push(cost("CPU server", server));
        figures.push(cost("CPU agent", agent));
        figures.push(cost("CPU both", server + agent));
    }
    Ok(figures)
}

/// Moves `bytes` over `streams` connections and gives the time from the first byte to the last.
fn transfer(dial: &Dial, direction: Direction, streams: usize, bytes: u64) -> Result<Duration> {
    let zeros = target::zeros()?;
    let share = bytes / streams as u64;
    let start = Barrier::new(streams + 1);
    thread::scope(|scope| {
        let work = || -> Result<()> {
            // Nothing moves before all are open, and nobody waits for one that could not be.
            let opened = dial.open_with(&[]);
            start.wait();
            let mut connection = opened?;
            let order = direction.order(share).encode();
            connection.socket.write_all(&order)?;
            direction.transfer(&mut connection, share, &zeros)
        };
        let workers: Vec<_> = (0..streams).map(|_| scope.spawn(work)).collect();
        start.wait();
        let begin = Instant::now();
        for worker in workers {
            let ended = worker.join().ok();
            ended.context("a client thread has panicked")??;
        }
        Ok(begin.elapsed())
    })
}
