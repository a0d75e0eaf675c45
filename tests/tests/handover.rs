//! Handover: a process takes the place of another one, and every connection goes on.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client;
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::shaper::{Direction, Impairment, Link};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Load, ask};
use tunnel_tests::side::Side;
use tunnel_tests::successor::{Step, fail_after};
use tunnel_tests::target::Behaviour;

/// Age from which on a connection is held in any case, with room.
const HELD: Duration = Duration::from_secs(2);

/// Stack of a thread that reads one connection.
const STACK: usize = 1 << 20;

/// Time for a process to take over and for the other one to end, with room.
const REPLACED: Duration = Duration::from_secs(10);

fn echo() -> SocketAddr {
    (address::node(1), Behaviour::Echo.port()).into()
}

fn lab() -> Result<Lab> {
    let spec = LabSpec {
        workers: 1,
        servers: 1,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    Ok(Lab::up_with(spec, Lab::keep_state)?.0)
}

/// Live connections of every kind and clients that come meanwhile notice nothing but a pause.
fn replace(side: Side, times: u32) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let paces = [
        Pace::Messages(100, Duration::from_millis(5)),
        Pace::Messages(3000, Duration::from_millis(50)),
        Pace::Messages(1, Duration::from_secs(3)),
        Pace::Bulk,
    ];
    let mut talks = Vec::new();
    for frontend in Frontend::ALL {
        for pace in paces {
            let stream = frontend.dial(&lab, echo())?;
            talks.push((frontend, pace, Conversation::start(stream, pace)?));
        }
    }
    let load = Load::start(&lab.control_plane, 2, |request| ask(echo(), request))?;
    load.wait_answered(20, REPLACED)?;
    for _ in 0..times {
        thread::sleep(HELD);
        let replaced = side.daemon(&mut lab)?.replace(REPLACED);
        replaced.with_context(|| lab.logs())?;
        load.wait_answered(20, REPLACED)?;
    }
    let attempts = load.stop_answered(&lab)?;
    let longest = attempts.iter().map(|it| it.end - it.start).max();
    println!("{} requests, the longest took {longest:?}", attempts.len());
    thread::sleep(Duration::from_secs(1));
    for (frontend, pace, talk) in talks {
        let summary = talk.finish();
        let summary = summary.with_context(|| format!("{frontend:?} {pace:?}\n{}", lab.logs()))?;
        println!("{frontend:?} {pace:?}: {summary:?}");
    }
    Ok(())
}

#[test]
fn connections_outlive_a_server() -> Result<()> {
    replace(Side::Server, 3)
}

#[test]
fn connections_outlive_an_agent() -> Result<()> {
    replace(Side::Agent, 3)
}

/// Requests that are on their way to a process when it leaves are answered: by that process, or by its successor.
fn replace_far_away(side: Side) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec {
        workers: 1,
        servers: 1,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    let (mut lab, shaper) = Lab::up_with(spec, |lab| {
        lab.keep_state()?;
        lab.shape(Link::Worker(1))
    })?;
    // The agent is idle while a request takes its time to reach it.
    let slow = Impairment {
        delay: Duration::from_millis(200),
        ..Impairment::default()
    };
    shaper.set_one(Direction::Outward, slow);
    let load = Load::start(&lab.control_plane, 1, |request| {
        thread::sleep(Duration::from_millis(250));
        ask(echo(), request)
    })?;
    load.wait_answered(2, REPLACED)?;
    for phase in 0..5 {
        thread::sleep(phase * Duration::from_millis(90));
        let replaced = side.daemon(&mut lab)?.replace(REPLACED);
        replaced.with_context(|| lab.logs())?;
        load.wait_answered(2, REPLACED)?;
    }
    let attempts = load.stop_answered(&lab)?;
    println!("{} requests", attempts.len());
    Ok(())
}

#[test]
fn requests_on_their_way_outlive_an_agent() -> Result<()> {
    replace_far_away(Side::Agent)
}

#[test]
fn requests_on_their_way_outlive_a_server() -> Result<()> {
    replace_far_away(Side::Server)
}

/// A process goes on whatever its successor does, and so do its connections.
#[test]
fn a_process_goes_on_when_its_successor_fails() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let mut talks = Vec::new();
    for pace in [Pace::Messages(100, Duration::from_millis(5)), Pace::Bulk] {
        let stream = Frontend::Redirect.dial(&lab, echo())?;
        talks.push(Conversation::start(stream, pace)?);
    }
    let load = Load::start(&lab.control_plane, 2, |request| ask(echo(), request))?;
    thread::sleep(HELD);
    for (side, role) in [(Side::Server, "server"), (Side::Agent, "agent")] {
        let daemon = side.daemon(&mut lab)?;
        let state_dir = daemon.config_file().with_file_name("state");
        let socket = state_dir.join(format!("{role}-handover.sock"));
        for step in [Step::Asked, Step::Offered, Step::Given] {
            let before = daemon.log().len();
            fail_after(step, &socket, role).with_context(|| format!("{role} {step:?}"))?;
            let pieces = ["ERROR", "nothing is handed over: this process goes on"];
            daemon.wait_log(REPLACED, before, &pieces)?;
            load.wait_answered(20, REPLACED)?;
        }
        let before = daemon.log().len();
        fail_after(Step::Asked, &socket, "other")?;
        daemon.wait_log(REPLACED, before, &["WARN", "the successor of role other"])?;
        daemon.check()?;
    }
    // One that can't start says why.
    let server = Side::Server.daemon(&mut lab)?;
    let before = server.log().len();
    let key = server.config_file().with_file_name("elsewhere.pem");
    server.configure(|config| config["tls"]["key"] = json!(key))?;
    let failed = server.replace(Duration::from_secs(2));
    ensure!(failed.is_err(), "a server without a key has taken over");
    server.wait_log(
        REPLACED,
        before,
        &["the successor can't start", "elsewhere.pem"],
    )?;
    load.wait_answered(20, REPLACED)?;
    load.stop_answered(&lab)?;
    for talk in talks {
        println!("{:?}", talk.finish().with_context(|| lab.logs())?);
    }
    Ok(())
}

/// Opens `count` downloads and replaces the server twice meanwhile. Every byte of each is compared.
fn downloads(count: usize, bytes: u64) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let source = (address::node(1), Behaviour::Source.port()).into();
    let streams = Frontend::Redirect.through(&lab, |dial| {
        (0..count).map(|_| dial(source)).collect::<Result<Vec<_>>>()
    })?;
    let downloads = streams.into_iter().map(|stream| {
        let download = move || client::download(stream, bytes);
        thread::Builder::new().stack_size(STACK).spawn(download)
    });
    let downloads = downloads.collect::<Result<Vec<_>, _>>()?;
    for _ in 0..2 {
        thread::sleep(Duration::from_millis(300));
        let replaced = Side::Server.daemon(&mut lab)?.replace(REPLACED);
        replaced.with_context(|| lab.logs())?;
    }
    let under_way = downloads.iter().filter(|it| !it.is_finished()).count();
    ensure!(under_way > 0, "all {count} ended before the server did");
    let results = downloads.into_iter().map(|download| download.join());
    let results = results.map(|it| it.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    let failed: Vec<_> = results.filter_map(Result::err).collect();
    ensure!(
        failed.is_empty(),
        "{} failed: {:?}\n{}",
        failed.len(),
        failed[0],
        lab.logs()
    );
    Ok(())
}

#[test]
fn downloads_outlive_a_server() -> Result<()> {
    downloads(200, 10_000_000)
}

#[test]
#[ignore = "moves 10 GB"]
fn two_thousand_downloads_outlive_a_server() -> Result<()> {
    downloads(2000, 5_000_000)
}
