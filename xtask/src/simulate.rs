//! Runs many seeds of the simulation, and records a run in docs/simulation.md.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::bench::machine::Machine;
use crate::{sh, test, workspace};

/// Options of `cargo xtask simulate`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Number of seeds.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first seed. The tests run those below 2,000.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Seeds at once.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Write the result to docs/simulation.md.
    #[arg(long)]
    record: bool,
}

/// Result of a run.
#[derive(Deserialize)]
struct Outcome {
    from: u64,
    seeds: u64,
    failed: u64,
    events: u64,
    requests: u64,
    ran: u64,
    simulated_s: u64,
    elapsed_s: u64,
}

/// Builds the simulation and runs it.
pub(crate) fn run(args: &Args) -> Result<()> {
    test::build()?;
    sh::heading("Simulation");
    let machine = Machine::look(false);
    let program = workspace::target()
        .join(workspace::PROFILE)
        .join("simulate");
    let numbers = [args.from, args.seeds, args.jobs as u64];
    let mut simulate = Command::new(program);
    simulate
        .arg("run")
        .args(numbers.map(|number| number.to_string()));
    let output = simulate.stderr(Stdio::inherit()).output();
    let output = output.context("cannot start the simulation")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (failures, last) = text
        .trim_end()
        .rsplit_once('\n')
        .unwrap_or(("", text.trim_end()));
    if !failures.is_empty() {
        println!("{failures}");
    }
    let outcome: Outcome = serde_json::from_str(last).context("the simulation has no result")?;
    println!("{}", row(&outcome).trim_end());
    if args.record {
        record(&outcome, args.jobs, &machine)?;
    }
    anyhow::ensure!(outcome.failed == 0, "{} seeds failed", outcome.failed);
    Ok(())
}

const HEAD: &str = "# Simulation

`tests/simulation` runs servers and agents as they are over a simulated kernel: up to two servers, three agents and seven
targets on hosts of their own, with virtual time, on one thread. A seed determines requests and faults, and replays exactly.
`cargo xtask test` runs the seeds below 2,000; this page is of the last recorded run.
`target/lab/simulate trace SEED` replays a seed and prints its events.

**Faults**: loss, delay, reordering, duplication and damage of packets, paths of a low rate and of an MTU from 1280 to 9000, partitions in one
direction or both, new ports at a NAT; crashes of servers and agents, with and without a restart; drains, rollouts of an agent in
either order, reloads; steps of the wall clock by up to 300 days; targets that answer no connect, refuse, stall, reset or end
their half at any byte, and clients that do the same; packets of strangers, also under the address of a peer; agents that claim
what they are not granted.

**Checked at every step**: a request runs at most once, at the target that it names, through an agent that may serve it; no byte is
lost or invented, and order is kept; an end that was not orderly is a reset; a dial has an outcome a second after its time at
the latest; time never stands still. **45 s after the last fault**: every agent has its tunnels, a request over each server to
each served target succeeds in both directions, every connection has ended, and no limit counts a connection or a dial. Stalled
bytes may count 1 MiB: quinn-proto keeps lists of ended streams. A lost tunnel beside those may stay at its server for up to 240 s:
QUIC keeps it for three times its probe timeout, where that is longer than the idle timeout.

Konnectivity's gRPC, frontends over TLS and Unix sockets, io_uring and the kernel programs are not part of it
([0034](adr/0034-simulation-below-libc.md)). Seeds that have found a fault are in `tests/simulation/seeds.txt`.

**Open**: a path whose MTU shrinks below what a tunnel has found stalls the connections of that tunnel for a minute and more.

";

const COLUMNS: &str = "\
| seeds | failed | events | requests | of these ran | simulated | elapsed |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
";

/// Writes the page, with the command that repeats the run.
fn record(outcome: &Outcome, jobs: usize, machine: &Machine) -> Result<()> {
    let page = workspace::root().join("docs/simulation.md");
    let Outcome { from, seeds, .. } = outcome;
    let command =
        format!("cargo xtask simulate --from {from} --seeds {seeds} --jobs {jobs} --record");
    let (machine, row) = (machine.sentence(), row(outcome));
    let text = format!("{HEAD}{machine}\n\n```sh\n{command}\n```\n\n{COLUMNS}{row}");
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))
}

fn row(outcome: &Outcome) -> String {
    let Outcome {
        from,
        seeds,
        failed,
        events,
        requests,
        ran,
        simulated_s,
        elapsed_s,
    } = outcome;
    let simulated = simulated_s / 3600;
    format!(
        "| {seeds} from {from} | {failed} | {events} | {requests} | {ran} | {simulated} h | {elapsed_s} s |\n"
    )
}
