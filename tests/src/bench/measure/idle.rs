//! Open connections without traffic: the memory of each, on each side.

use std::thread;

use anyhow::{Context, Result};

use super::{Effort, Figure, memory};
use crate::bench::path::Running;
use crate::bench::usage;

/// Number of threads that open connections.
const DIALERS: usize = 8;

/// Measures `connections` over all nodes of the path. Each has carried one byte.
pub(super) fn take(path: &Running, connections: usize, effort: &Effort) -> Result<Vec<Figure>> {
    let (before, kernel_before) = (memory(path)?, usage::kernel_memory()?);
    let held = thread::scope(|scope| {
        let open = |dialer: usize| {
            let own = (dialer..connections).step_by(DIALERS);
            own.map(|number| {
                let dial = &path.dials[number % path.dials.len()];
                dial.open_echo()
                    .with_context(|| format!("connection {number} of {connections}"))
            })
            .collect::<Result<Vec<_>>>()
        };
        let dialers: Vec<_> = (0..DIALERS)
            .map(|dialer| scope.spawn(move || open(dialer)))
            .collect();
        let mut held = Vec::new();
        for dialer in dialers {
            held.extend(
                dialer
                    .join()
                    .ok()
                    .context("a client thread has panicked")??,
            );
        }
        anyhow::Ok(held)
    })?;
    thread::sleep(effort.settle);
    let (after, kernel_after) = (memory(path)?, usage::kernel_memory()?);
    drop(held);
    let each = |bytes: u64| bytes as f64 / 1e3 / connections as f64;
    let side = |side: usize| each(after[side].saturating_sub(before[side]));
    Ok(vec![
        Figure::new("server", "kB each", side(0)),
        Figure::new("agent", "kB each", side(1)),
        // Of all sockets on the way, the client's and the target's too, and of whatever else
        // happened on this machine.
        Figure::new(
            "kernel, whole machine",
            "kB each",
            each(kernel_after.saturating_sub(kernel_before)),
        ),
    ])
}
