//! Two releases: each takes over from the other, with every connection.

use std::path::PathBuf;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result, ensure};
use tunnel_tests::client::eventually;
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::keeper;
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{self, Programs, address};
use tunnel_tests::side::Side;
use tunnel_tests::target::Behaviour;

/// Age from which on a connection is kept in any case, with room.
const KEPT: Duration = Duration::from_secs(2);

/// Time for a process to come up, or to take over.
const SOON: Duration = Duration::from_secs(15);

/// `cpc` of the other release.
const OTHER: &str = "CPC_OTHER_RELEASE";

/// Starts a process as a service manager does. A release without kept listeners waits for the keeper to close those of
/// the other one.
fn restart(process: &mut Daemon) -> Result<()> {
    eventually(SOON, || {
        process.start()?;
        thread::sleep(Duration::from_millis(500));
        process.check().or_else(|error| {
            process.kill()?;
            Err(error)
        })
    })
}

#[test]
#[ignore = "needs another release: `cargo xtask upgrade`"]
fn releases_take_over_from_each_other() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let other = env::var_os(OTHER).with_context(|| format!("{OTHER} names no program"))?;
    let programs = Programs::of_this_test()?;
    let (other, own) = (PathBuf::from(other), programs.cpc.clone());
    let (mut lab, _keepers) = keeper::lab(programs, 1)?;
    let echo = (address::node(1), Behaviour::Echo.port()).into();
    let paces = [
        Pace::Messages(100, Duration::from_millis(5)),
        Pace::Messages(1, Duration::from_secs(1)),
        Pace::Bulk,
    ];
    let mut talks = Vec::new();
    for pace in paces {
        let stream = Frontend::Redirect.dial(&lab, echo)?;
        talks.push(Conversation::start(stream, pace)?);
    }
    for side in [Side::Server, Side::Agent] {
        for (program, is_killed) in [
            (&other, false),
            (&own, false),
            (&other, true),
            (&own, true),
            // Both sides are of the other release in the end.
            (&other, false),
        ] {
            thread::sleep(KEPT);
            let process = side.daemon(&mut lab)?;
            process.set_program(program);
            if is_killed {
                process.kill()?;
                restart(process)?;
            } else {
                process.replace(SOON)?;
            }
            thread::sleep(KEPT);
            process.check()?;
            let cut = talks.iter().filter(|talk| !talk.goes_on()).count();
            let program = program.display();
            ensure!(
                cut == 0,
                "{cut} cut by {program} as {}, killed: {is_killed}\n{}",
                side.name(),
                lab.logs()
            );
        }
    }
    for talk in talks {
        println!("{:?}", talk.finish().with_context(|| lab.logs())?);
    }
    Ok(())
}
