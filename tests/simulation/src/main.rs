//! `simulate`: runs seeds of the simulation, and prints those that fail.

use std::rc::Rc;
use std::time::Instant;

use anyhow::{Result, bail};
use tunnel_simulation::kernel::TRACE;
use tunnel_simulation::runner;
use tunnel_simulation::scenario;
use tunnel_simulation::world::Shared;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let shared = Rc::new(Shared::new()?);
    match arguments[..] {
        ["run", from, count] => run(&shared, from.parse()?, count.parse()?),
        ["trace", seed] => {
            TRACE.set(true);
            let state = shared.pki.directory().join("state");
            println!("{:?}", scenario::run(shared, seed.parse()?, state)?);
            Ok(())
        }
        _ => bail!("usage: simulate run FROM COUNT | simulate trace SEED"),
    }
}

fn run(shared: &Rc<Shared>, from: u64, count: u64) -> Result<()> {
    let start = Instant::now();
    let mut failed = 0;
    let (mut events, mut requests, mut ran, mut time) = (0, 0, 0, 0);
    for seed in from..from + count {
        match runner::run(shared, seed) {
            Ok(it) => {
                events += it.events;
                requests += it.requests;
                ran += it.ran;
                time += it.time / 1_000_000_000;
            }
            Err(error) => {
                failed += 1;
                println!("{error:#}");
            }
        }
    }
    println!(
        "{count} seeds, {failed} failed, {events} events, {requests} requests, {ran} ran, {time} s simulated in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    match failed {
        0 => Ok(()),
        _ => bail!("{failed} seeds failed"),
    }
}
