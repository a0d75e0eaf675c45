//! A request loop beside a load that takes everything, takes little, or takes nothing.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Effort, Figure, latency};
use crate::bench::load::Connection;
use crate::bench::path::Running;
use crate::bench::target::{self, Order};

/// Time for which neighbours run first, so that buffers and windows are full.
const HEAD_START: Duration = Duration::from_millis(500);
/// Streams of a busy neighbour.
const STREAMS: usize = 8;
/// More than a stream can move in any measurement.
const WITHOUT_END: u64 = 1 << 50;

/// A neighbour looks so often whether it is over.
const SHORT: Duration = Duration::from_millis(100);

/// Load beside the request loop, on the same path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    /// Eight streams of bulk to the client.
    Bulk,
    /// A client that takes 1 MB a second of a stream without end.
    SlowReader,
    /// A client that reads nothing of it.
    StoppedReader,
    /// A target that reads nothing.
    StoppedTarget,
}

impl Neighbour {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Bulk,
        Self::SlowReader,
        Self::StoppedReader,
        Self::StoppedTarget,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bulk => "8 bulk streams",
            Self::SlowReader => "a slow reader (1 MB/s)",
            Self::StoppedReader => "a stopped reader",
            Self::StoppedTarget => "a stopped target",
        }
    }

    /// Opens its connections; nothing moves yet.
    fn open(self, path: &Running) -> Result<Vec<Connection>> {
        let count = match self {
            Self::Bulk => STREAMS,
            _ => 1,
        };
        let connections = (0..count).map(|_| path.dial().open_with(&[]));
        let connections: Vec<_> = connections.collect::<Result<_>>()?;
        for connection in &connections {
            connection.socket.set_read_timeout(Some(SHORT))?;
            connection.socket.set_write_timeout(Some(SHORT))?;
        }
        Ok(connections)
    }

    /// Keeps one connection as busy as this neighbour is, until `end` is set. Errors of the
    /// neighbour do not count.
    fn keep_busy(self, connection: &mut Connection, end: &AtomicBool) -> Result<()> {
        let order = match self {
            Self::StoppedTarget => Order::Stop,
            _ => Order::Send(WITHOUT_END),
        };
        connection.socket.write_all(&order.encode())?;
        let zeros = target::zeros()?;
        let mut little = vec![0; 10_000];
        while !end.load(Ordering::Relaxed) {
            match self {
                // A time-out is what others do to it; it goes on.
                Self::Bulk => {
                    if connection.receive(1 << 20).is_err() {
                        thread::sleep(SHORT);
                    }
                }
                Self::SlowReader => {
                    let _ = connection.socket.read(&mut little);
                    thread::sleep(Duration::from_millis(10));
                }
                Self::StoppedReader => thread::sleep(Duration::from_millis(10)),
                Self::StoppedTarget => {
                    let _ = target::send_zeros(&connection.socket, &zeros, target::TURN);
                }
            }
        }
        Ok(())
    }
}

/// Runs the request loop, and another one over the direct path at the same time, which shows the
/// part of the machine.
pub(super) fn take(path: &Running, neighbour: Neighbour, effort: &Effort) -> Result<Vec<Figure>> {
    let end = AtomicBool::new(false);
    let (mut own, mut direct) = (path.dial().open_echo()?, path.direct.open_echo()?);
    let mut neighbours = neighbour.open(path)?;
    thread::scope(|scope| {
        for connection in &mut neighbours {
            let end = &end;
            scope.spawn(move || neighbour.keep_busy(connection, end));
        }
        thread::sleep(HEAD_START.min(effort.time));
        let until = Instant::now() + effort.time;
        let beside = scope.spawn(move || direct.ask_until(until));
        let asked = own.ask_until(until);
        end.store(true, Ordering::Relaxed);
        let beside = beside
            .join()
            .ok()
            .context("a client thread has panicked")??;
        let mut figures = latency(asked.context("the request loop")?);
        figures.extend(latency(beside).into_iter().map(|figure| Figure {
            name: match figure.name {
                "p50" => "p50 of direct TCP meanwhile",
                _ => "p99 of direct TCP meanwhile",
            },
            ..figure
        }));
        Ok(figures)
    })
}
