//! `simulate`: runs seeds of the simulation and prints those that fail, or replays one.
//!
//! The last line of a run is its summary in JSON, for `cargo xtask simulate`.

use std::process::ExitCode;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tracing_subscriber::EnvFilter;
use tunnel_simulation::kernel::TRACE;
use tunnel_simulation::runner::{self, Running};
use tunnel_simulation::world::Shared;

const USAGE: &str = "usage: simulate run FROM COUNT [JOBS]
       simulate trace SEED    replays a seed, and prints its events and the programs' logs";

/// Failures after which a run ends.
const ENOUGH: u64 = 20;

fn main() -> Result<ExitCode> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let shared = Rc::new(Shared::new()?);
    match arguments[..] {
        ["run", from, count] => run(&shared, from.parse()?, count.parse()?, 1),
        ["run", from, count, jobs] => run(&shared, from.parse()?, count.parse()?, jobs.parse()?),
        ["trace", seed] => {
            // In a fork too, or the state of this process would change what happens.
            TRACE.store(true, Ordering::Relaxed);
            // The log of all programs, with their clocks.
            tracing_subscriber::fmt()
                .with_env_filter(EnvFilter::new("cpc=debug,info"))
                .with_ansi(false)
                .init();
            println!("{:?}", runner::run(&shared, seed.parse()?)?);
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("{USAGE}"),
    }
}

/// Sums over seeds.
#[derive(Default)]
struct Sums {
    seeds: u64,
    failed: u64,
    events: u64,
    requests: u64,
    ran: u64,
    seconds: u64,
}

fn run(shared: &Rc<Shared>, from: u64, count: u64, jobs: usize) -> Result<ExitCode> {
    let start = Instant::now();
    let mut sums = Sums::default();
    let mut seeds = from..from + count;
    let mut running: Vec<Running> = Vec::new();
    loop {
        while running.len() < jobs.max(1) && sums.failed < ENOUGH {
            let Some(seed) = seeds.next() else {
                break;
            };
            running.push(runner::start(shared, seed)?);
        }
        if running.is_empty() {
            break;
        }
        let done = running.swap_remove(ready(&running)?);
        let seed = done.seed();
        sums.seeds += 1;
        match done.outcome() {
            Ok(it) => {
                sums.events += it.events;
                sums.requests += it.requests;
                sums.ran += it.ran;
                sums.seconds += it.time / 1_000_000_000;
            }
            Err(error) => {
                sums.failed += 1;
                println!("seed {seed}: {error:#}");
            }
        }
        if sums.seeds % 1000 == 0 {
            let elapsed = start.elapsed().as_secs();
            eprintln!("{} seeds, {} failed, {elapsed} s", sums.seeds, sums.failed);
        }
    }
    println!(
        "{}",
        json!({
            "from": from, "seeds": sums.seeds, "failed": sums.failed, "events": sums.events,
            "requests": sums.requests, "ran": sums.ran, "simulated_s": sums.seconds,
            "elapsed_s": start.elapsed().as_secs(),
        })
    );
    Ok(match sums.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Waits for one of the seeds under way. Returns its index.
fn ready(running: &[Running]) -> Result<usize> {
    let polled = |it: &Running| libc::pollfd {
        fd: it.descriptor(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polled: Vec<_> = running.iter().map(polled).collect();
    loop {
        // SAFETY: the call reads and writes the entries, of which there are as many.
        let found = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
        if found > 0 {
            break;
        }
        let error = std::io::Error::last_os_error();
        ensure!(
            error.kind() == std::io::ErrorKind::Interrupted,
            "poll: {error}"
        );
    }
    let is_ready = |it: &libc::pollfd| it.revents != 0;
    polled.iter().position(is_ready).context("poll found none")
}
