//! Cost of agents and routes for a server, whether or not they are used.

use std::thread;
use std::time::Instant;

use anyhow::Result;

use super::{Effort, Figure, Meter, latency, memory};
use crate::bench::path::Running;

/// Adds agents or routes, waits, and then dials another agent.
pub(super) fn take(
    path: &Running,
    agents: usize,
    routes: usize,
    effort: &Effort,
) -> Result<Vec<Figure>> {
    let before = memory(path)?[0];
    let meter = Meter::start(path)?;
    let crowd = path.crowd(agents, routes)?;
    let admitted = crowd.admitted.as_secs_f64();
    let mut figures = vec![Figure::new("until all are in", "s", admitted)];
    if let Some([server, _]) = meter.stop()? {
        figures.push(Figure::new("server's CPU for it", "s", server));
    }
    thread::sleep(effort.settle);
    let held = memory(path)?[0].saturating_sub(before);
    figures.push(Figure::new("server's memory", "MB", held as f64 / 1e6));

    let (meter, start) = (Meter::start(path)?, Instant::now());
    thread::sleep(effort.time);
    let idle = start.elapsed().as_secs_f64();
    if let Some([server, _]) = meter.stop()? {
        let share = 100.0 * server / idle;
        figures.push(Figure::new("server's CPU idle", "% of one", share));
    }
    let end = Instant::now() + effort.time;
    let mut times = Vec::new();
    while Instant::now() < end {
        let start = Instant::now();
        drop(path.dial().open_echo()?);
        times.push(start.elapsed());
    }
    drop(crowd);
    figures.extend(latency(times).into_iter().map(|figure| Figure {
        name: match figure.name {
            "p50" => "dial p50",
            _ => "dial p99",
        },
        ..figure
    }));
    Ok(figures)
}
