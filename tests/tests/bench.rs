//! The benchmark itself, in its smallest form: it runs, gives every figure, says what it leaves out
//! and leaves nothing behind. How large the figures are is not asked.

use std::path::Path as File;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tunnel_tests::bench::measure::{Direction, Effort, Event, Measure, Neighbour};
use tunnel_tests::bench::path::{Path, Programs};
use tunnel_tests::bench::run::{self, Plan, Results, Row};
use tunnel_tests::lab;
use tunnel_tests::side::Side;

const TINY: Effort = Effort {
    time: Duration::from_millis(20),
    bytes: 1 << 20,
    settle: Duration::ZERO,
};

fn plan(names: &[&str], measures: Vec<Measure>) -> Result<Plan> {
    let programs = lab::Programs::of_this_test()?;
    let folder = programs.cpc.parent().unwrap_or(File::new("."));
    let chosen = |path: &Path| names.contains(&path.name.as_str());
    Ok(Plan {
        programs: Programs::in_folder(folder),
        paths: Path::all().into_iter().filter(chosen).collect(),
        measures,
        rounds: 1,
        effort: TINY,
    })
}

fn figure<'a>(results: &'a Results, measure: Measure, path: &str, figure: &str) -> Result<&'a Row> {
    let found = results.row(&measure.name(), path, figure);
    found.with_context(|| format!("no {figure} of {path}: {:#?}", results.skipped))
}

/// The direct way and both of the connector's, each with a measure of every kind.
#[test]
fn every_measure_gives_its_figures() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let [down, up] = [Direction::Down, Direction::Up].map(|it| Measure::Bulk(it, 2));
    let beside = Measure::Beside(Neighbour::StoppedReader);
    let measures = vec![
        down,
        up,
        Measure::Dial,
        Measure::Requests(1),
        Measure::Requests(4),
        Measure::Rate(2),
        Measure::Idle(20),
        beside,
    ];
    let plan = plan(&["direct", "connect", "redirect"], measures.clone())?;
    let mut asked = 0;
    let results = run::run(&plan, |progress| {
        assert_eq!(progress.done, asked);
        asked += 1;
        Ok(())
    })?;
    assert_eq!(asked, plan.paths.len() * plan.measures.len());
    for path in ["connect", "redirect"] {
        for measure in &measures {
            let names: &[&str] = match measure {
                Measure::Bulk(..) => &["speed", "CPU server", "CPU agent", "CPU both"],
                Measure::Requests(_) => &["p50", "p99", "rate", "CPU both"],
                Measure::Dial | Measure::Beside(_) => &["p50", "p99"],
                Measure::Rate(_) => &["rate", "CPU server", "CPU agent"],
                Measure::Idle(_) => &["server", "agent"],
                _ => continue,
            };
            for name in names {
                let row = figure(&results, *measure, path, name)?;
                assert_eq!(row.values.len(), 1, "{row:?}");
                assert!(row.median.is_finite() && row.median >= 0.0, "{row:?}");
            }
        }
    }
    figure(&results, down, "direct", "speed")?;
    assert!(results.row(&down.name(), "direct", "CPU both").is_none());
    Ok(())
}

/// Connections to which something happens, in a laboratory of their own.
#[test]
fn sessions_are_measured() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let measures = vec![
        Measure::Sessions(40, Event::Killed(Side::Agent)),
        Measure::IdleSessions(10, Side::Server),
    ];
    let plan = plan(&["redirect, kept"], measures.clone())?;
    let results = run::run(&plan, |_| Ok(()))?;
    for measure in measures {
        let row = figure(&results, measure, "redirect, kept", "cut or wrong")?;
        assert_eq!(row.values, [0.0], "{row:?}");
    }
    Ok(())
}

/// More agents and more routes than one, from the program that stands for a crowd.
#[test]
fn a_crowd_of_agents_is_let_in() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let measures = [Measure::Agents(40), Measure::Routes(1500)];
    let plan = plan(&["connect"], measures.into())?;
    if !plan.programs.crowd.exists() {
        // Examples are built with all targets, and not for one test alone.
        eprintln!("skipped: there is no {}", plan.programs.crowd.display());
        return Ok(());
    }
    let results = run::run(&plan, |_| Ok(()))?;
    for measure in measures {
        for name in [
            "until all are in",
            "server's memory",
            "server's CPU idle",
            "dial p50",
        ] {
            figure(&results, measure, "connect", name)?;
        }
    }
    Ok(())
}

/// Nothing is left out in silence: neither what is missing here nor what `cpc` refuses.
#[test]
fn what_is_skipped_is_said() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut plan = plan(&["direct", "quinn copy", "connect"], vec![Measure::Dial])?;
    plan.programs.quinn = "/nowhere/stock-quinn".into();
    for path in &mut plan.paths {
        if let tunnel_tests::bench::path::PathKind::Connector { server, .. } = &mut path.way {
            *server = serde_json::json!({"no_such_key": 1});
        }
    }
    let results = run::run(&plan, |_| Ok(()))?;
    for (path, why) in [("quinn copy", "/nowhere"), ("connect", "no_such_key")] {
        let said = results.skipped.iter().find(|it| it.path == path);
        let said = said.with_context(|| format!("{path} is not in {:#?}", results.skipped))?;
        assert!(said.measure.is_none() && said.why.contains(why), "{said:?}");
    }
    figure(&results, Measure::Dial, "direct", "p50")?;
    Ok(())
}

/// The watching process may end the run, as Ctrl-C does; namespaces and processes end with it.
#[test]
fn an_ended_run_leaves_nothing() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let plan = plan(&["direct", "connect"], vec![Measure::Dial])?;
    let own = || -> Result<Vec<String>> {
        let id = format!("cpc-{:04x}-", std::process::id() as u16);
        let names = std::fs::read_dir("/run/netns")?.filter_map(Result::ok);
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name.starts_with(&id)).collect())
    };
    let ended = run::run(&plan, |progress| match progress.done {
        0 => Ok(()),
        _ => {
            assert!(!own()?.is_empty(), "where are the namespaces?");
            bail!("that is enough")
        }
    });
    assert_eq!(ended.unwrap_err().to_string(), "that is enough");
    assert!(own()?.is_empty(), "{:?}", own()?);
    Ok(())
}
