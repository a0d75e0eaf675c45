//! Seeds of the simulation: each violates no invariant, and a seed replays exactly.

use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use tunnel_simulation::runner;
use tunnel_simulation::world::Shared;

/// Seeds of all parts together.
const SEEDS: u64 = 2_000;

/// Parts, so that each core of a machine has some.
const PARTS: u64 = 4;

/// Failures after which a part ends.
const ENOUGH: usize = 5;

/// Runs the seeds of a part, and reports those that fail.
fn part(number: u64) -> Result<()> {
    let shared = Rc::new(Shared::new()?);
    let seeds = (0..SEEDS).filter(|seed| seed % PARTS == number);
    let failures = seeds.filter_map(|seed| runner::run(&shared, seed).err());
    let failures: Vec<_> = failures
        .map(|error| format!("{error:#}"))
        .take(ENOUGH)
        .collect();
    ensure!(
        failures.is_empty(),
        "{}\n`simulate trace SEED` replays a seed",
        failures.join("\n")
    );
    Ok(())
}

#[test]
fn seeds_hold_part_1() -> Result<()> {
    part(0)
}

#[test]
fn seeds_hold_part_2() -> Result<()> {
    part(1)
}

#[test]
fn seeds_hold_part_3() -> Result<()> {
    part(2)
}

#[test]
fn seeds_hold_part_4() -> Result<()> {
    part(3)
}

/// Seeds that have found a fault once.
#[test]
fn seeds_of_earlier_failures_hold() -> Result<()> {
    let shared = Rc::new(Shared::new()?);
    for line in include_str!("../seeds.txt").lines() {
        let text = line.split('#').next().unwrap_or_default().trim();
        if !text.is_empty() {
            let seed = text.parse().with_context(|| format!("{line:?}"))?;
            runner::run(&shared, seed)?;
        }
    }
    Ok(())
}

/// Certificates and keys differ between the two, and nothing else does.
#[test]
fn a_seed_replays_exactly() -> Result<()> {
    let (one, other) = (Rc::new(Shared::new()?), Rc::new(Shared::new()?));
    let mut traces = Vec::new();
    for seed in 0..20 {
        let first = runner::run(&one, seed)?;
        let second = runner::run(&other, seed)?;
        ensure!(first == second, "seed {seed}: {first:?} and {second:?}");
        ensure!(first.events > 0 && first.ran > 0, "nothing ran: {first:?}");
        traces.push(first.trace);
    }
    traces.sort_unstable();
    traces.dedup();
    ensure!(traces.len() == 20, "different seeds have one trace");
    Ok(())
}
