//! Opening connections: the time of one, and the number in a second.

use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};

use super::{Effort, Figure, Meter, latency};
use crate::bench::path::Running;

/// Opens connections one after another, each from connect(2) to the first byte of the answer.
pub(super) fn first_byte(path: &Running, effort: &Effort) -> Result<Vec<Figure>> {
    let end = Instant::now() + effort.time;
    let mut times = Vec::new();
    while Instant::now() < end {
        let start = Instant::now();
        let connection = path.dial().open_echo()?;
        times.push(start.elapsed());
        drop(connection);
    }
    Ok(latency(times))
}

/// Runs `dialers` that open connections, have a byte echoed and close, as fast as they can.
pub(super) fn rate(path: &Running, dialers: usize, effort: &Effort) -> Result<Vec<Figure>> {
    let meter = Meter::start(path)?;
    let start = Instant::now();
    let end = start + effort.time;
    let count = thread::scope(|scope| {
        let work = || -> Result<usize> {
            let mut count = 0;
            while Instant::now() < end {
                drop(path.dial().open_echo()?);
                count += 1;
            }
            Ok(count)
        };
        let dialers: Vec<_> = (0..dialers).map(|_| scope.spawn(work)).collect();
        let mut count = 0;
        for dialer in dialers {
            count += dialer
                .join()
                .ok()
                .context("a client thread has panicked")??;
        }
        anyhow::Ok(count as f64)
    })?;
    let mut figures = vec![Figure::new(
        "rate",
        "1/s",
        count / start.elapsed().as_secs_f64(),
    )];
    if let Some([server, agent]) = meter.stop()? {
        figures.push(Figure::new("CPU server", "µs each", server * 1e6 / count));
        figures.push(Figure::new("CPU agent", "µs each", agent * 1e6 / count));
    }
    Ok(figures)
}
