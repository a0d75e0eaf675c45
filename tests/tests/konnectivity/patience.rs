//! Properties that need a timeout of seconds to pass. The laboratories wait side by side: one after
//! the other they would take minutes, and none has much to do.

use std::thread;

use anyhow::{Result, ensure};
use tunnel_tests::lab;

use crate::{agent, agent_session, choice, defects};

type Case = (&'static str, fn() -> Result<()>);

#[test]
fn limits_are_kept() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let cases: [Case; 10] = [
        (
            "agent::a_stopped_endpoint_is_reset",
            agent::a_stopped_endpoint_is_reset,
        ),
        (
            "agent::it_notices_a_dead_server",
            agent::it_notices_a_dead_server,
        ),
        (
            "agent_session::a_silent_server_is_given_up",
            agent_session::a_silent_server_is_given_up,
        ),
        (
            "choice::equals_share_and_who_is_ill_is_left_out",
            choice::equals_share_and_who_is_ill_is_left_out,
        ),
        (
            "defects::a_slow_reader_is_served_by_a_legacy_agent",
            defects::a_slow_reader_is_served_by_a_legacy_agent,
        ),
        (
            "defects::a_stopped_reader_is_reset_on_a_legacy_agent",
            defects::a_stopped_reader_is_reset_on_a_legacy_agent,
        ),
        (
            "defects::a_stopped_endpoint_wedges_one_stream_of_several",
            defects::a_stopped_endpoint_wedges_one_stream_of_several,
        ),
        (
            "defects::readiness_notices_a_wedged_stream",
            defects::readiness_notices_a_wedged_stream,
        ),
        (
            "defects::a_dial_that_is_never_answered_ends",
            defects::a_dial_that_is_never_answered_ends,
        ),
        (
            "defects::a_dead_legacy_agent_is_noticed",
            defects::a_dead_legacy_agent_is_noticed,
        ),
    ];
    let failed: Vec<_> = thread::scope(|scope| {
        let started = cases.map(|(name, case)| (name, scope.spawn(case)));
        let ended = started.map(|(name, case)| (name, case.join()));
        ended
            .into_iter()
            .filter_map(|(name, result)| match result {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{name}: {error:?}")),
                Err(_) => Some(format!("{name} panicked")),
            })
            .collect()
    });
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}
