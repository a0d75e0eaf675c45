//! `cargo xtask bench`: the connector beside its alternatives, in one run.
//!
//! [`tunnel_tests::bench`] measures. This module has the options ([`Args`]), the machine
//! ([`machine`]), and the output: tables in the terminal ([`table`]), JSON, or docs/performance.md
//! with plots ([`page`], [`plot`]). [`goals`] has the comparisons by which the datapath is judged.

mod goals;
pub(crate) mod machine;
mod page;
mod plot;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tunnel_tests::bench::measure::{Effort, Measure};
use tunnel_tests::bench::path::{Path, Programs};
use tunnel_tests::bench::run::{self, Plan, Results};
use tunnel_tests::bench::scene::Wire;
use tunnel_tests::lab::usage::allow_many_files;

use crate::setup::{self, Purpose};
use crate::workspace::{self, AS_ROOT, PROFILE};
use crate::{ebpf, interrupt, sh};
use machine::Machine;

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The five main paths and the seven main measures, under a minute.
    #[arg(long)]
    quick: bool,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// Only paths with one of these names, for example `redirect` or `quinn chunks`.
    #[arg(long, value_name = "NAME")]
    path: Vec<String>,
    /// Only measures whose names contain one of these, for example `bulk` or `1000 idle`.
    #[arg(long, value_name = "PART")]
    measure: Vec<String>,
    /// Number of rounds
    #[arg(long)]
    rounds: Option<usize>,
    /// Duration of one measurement, in seconds (approximate)
    #[arg(long)]
    seconds: Option<f64>,
    /// Folder for performance.md and its plots [default: docs/ for a whole run, none for a part of
    /// one]
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Build as for a release and not as for tests, which takes minutes.
    #[arg(long)]
    release: bool,
    /// Print the names of paths and measures, and the missing programs
    #[arg(long)]
    list: bool,
}

/// A run in the form of its output.
#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: usize,
    seconds: f64,
    goals: Vec<goals::Outcome>,
    #[serde(flatten)]
    results: Results,
}

/// Builds, measures and prints.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.list {
        return list(args);
    }
    let root = nix::unistd::geteuid().is_root();
    if root {
        setup::ensure(Purpose::Demo)?;
        ebpf::build()?;
    } else {
        eprintln!(
            "Network namespaces need root: `{AS_ROOT} bench`. Without it, what is possible runs on \
             loopback, which flatters everything that crosses no network."
        );
    }
    let programs = build(args.release)?;
    let plan = plan(args, programs, root)?;
    allow_many_files()?;
    interrupt::catch()?;
    let machine = Machine::look(args.release);
    let results = measure(&plan)?;
    let report = Report {
        machine,
        rounds: plan.rounds,
        seconds: plan.effort.time.as_secs_f64(),
        goals: goals::judge(&results),
        results,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        table::print(&report);
    }
    if let Some(folder) = output(args) {
        page::write(&report, &folder)?;
    }
    Ok(())
}

fn whole(args: &Args) -> bool {
    !args.quick && args.path.is_empty() && args.measure.is_empty()
}

fn output(args: &Args) -> Option<PathBuf> {
    let docs = || whole(args).then(|| workspace::root().join("docs"));
    args.output.clone().or_else(docs)
}

/// Builds `cpc`, the target and the yardstick, with one profile.
fn build(release: bool) -> Result<Programs> {
    sh::heading("Programs");
    let profile = if release { "release" } else { PROFILE };
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--profile", profile, "--package", "cpc"]);
    cargo.args(["--package", "tunnel-tests", "--bins"]);
    sh::run(cargo.args(["--example", "stock-quinn", "--example", "crowd"]))?;
    Ok(Programs::in_folder(&workspace::target().join(profile)))
}

fn plan(args: &Args, programs: Programs, root: bool) -> Result<Plan> {
    let seconds = args.seconds.unwrap_or(if args.quick { 0.3 } else { 1.0 });
    if !(0.01..=600.0).contains(&seconds) {
        bail!("--seconds is from 0.01 to 600");
    }
    let rounds = args.rounds.unwrap_or(if args.quick { 2 } else { 5 });
    let plan = Plan {
        programs,
        paths: paths(args, root),
        measures: measures(args),
        rounds: rounds.max(1),
        effort: Effort {
            time: Duration::from_secs_f64(seconds),
            bytes: 64 << 30,
            settle: Duration::from_secs_f64(seconds.min(1.0)),
        },
    };
    if plan.paths.is_empty() || plan.measures.is_empty() {
        bail!("nothing is left to measure: see `cargo xtask bench --list`");
    }
    Ok(plan)
}

/// The paths that are compared in a quick run.
const MAIN: [&str; 5] = [
    "direct",
    "quinn copy",
    "quinn chunks",
    "connect",
    "redirect",
];

fn paths(args: &Args, root: bool) -> Vec<Path> {
    let chosen = |path: &Path| match (&args.path[..], args.quick) {
        ([], true) => MAIN.contains(&path.name.as_str()),
        ([], false) => true,
        (names, _) => names.contains(&path.name),
    };
    let mut paths: Vec<_> = Path::all().into_iter().filter(chosen).collect();
    if !root {
        // On loopback there is no wire to vary.
        for path in paths.iter_mut().filter(|path| path.wire == Wire::USUAL) {
            path.wire = Wire::LOOPBACK;
        }
    }
    paths
}

fn measures(args: &Args) -> Vec<Measure> {
    let all = match args.quick && args.measure.is_empty() {
        true => Measure::few(),
        false => Measure::all(),
    };
    let chosen = |measure: &Measure| {
        let name = measure.name();
        args.measure.is_empty() || args.measure.iter().any(|part| name.contains(part))
    };
    all.into_iter().filter(chosen).collect()
}

fn measure(plan: &Plan) -> Result<Results> {
    let style = "{bar:30} {pos}/{len} {msg} {elapsed:.dim}";
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(style)?);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar.set_message("starting everything");
    let results = run::run(plan, |progress| {
        bar.set_length(progress.of as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(format!("{} over {}", progress.measure, progress.path));
        interrupt::check()
    });
    bar.finish_and_clear();
    results
}

fn list(args: &Args) -> Result<()> {
    let profile = if args.release { "release" } else { PROFILE };
    let programs = Programs::in_folder(&workspace::target().join(profile));
    println!("paths:");
    for path in paths(args, nix::unistd::geteuid().is_root()) {
        match path.missing(&programs) {
            Some(why) => println!("  {}  (here skipped: {why})", path.name),
            None => println!("  {}", path.name),
        }
    }
    println!("measures:");
    for measure in measures(args) {
        println!("  {}", measure.name());
    }
    Ok(())
}
