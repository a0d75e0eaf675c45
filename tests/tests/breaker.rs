//! A destination that swallows every packet costs its clients a wait five times, and then nothing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Failure, ask};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);

fn echoes(lab: &Lab, destination: &str) -> Result<()> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let stream = connect_through(proxy, destination)?;
    stream.set_read_timeout(Some(SOON))?;
    round_trips(stream, 1).map(drop)
}

/// The text of a refused CONNECT.
fn refusal(lab: &Lab, destination: &str) -> Result<String> {
    let refused = echoes(lab, destination).err();
    Ok(refused.context("it was let through")?.to_string())
}

/// Dials that time out, three in a row, open the breaker: further ones are refused by the server, in
/// words that say so, through the redirect too; other destinations are dialled as before. When the
/// destination answers again so does the connector.
#[test]
fn what_keeps_timing_out_is_not_dialled_until_it_answers() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        // One table: each shard counts for itself.
        config["shards"] = json!(1);
        config["limits"] = json!({
            "dial_timeout": "1s", "breaker_failures": 3, "breaker_retry": "1s",
            "breaker_max_retry": "2s",
        });
    })?;
    lab.start_configured()?;
    let hole = (address::node(1), Behaviour::Echo.port());
    let (hole, other) = (
        format!("{}:{}", hole.0, hole.1),
        format!("{}:{}", hole.0, Behaviour::Banner.port()),
    );
    echoes(&lab, &hole)?;
    lab.workers[0].netns.nft(&format!(
        "table inet hole {{ chain input {{
           type filter hook input priority 0; policy accept;
           tcp dport {} drop
         }}
         }}",
        Behaviour::Echo.port()
    ))?;
    for n in 1..=3 {
        let text = refusal(&lab, &hole)?;
        ensure!(!text.contains("last"), "refused after {n}: {text}");
    }
    let text = refusal(&lab, &hole)?;
    ensure!(text.contains("did not answer the last 3 dials"), "{text}");
    let (to, proxy) = (hole.parse()?, &lab.control_plane.servers[0].sockets);
    let asked = lab.control_plane.as_apiserver(|| Ok(ask(to, "hello")))?;
    ensure!(asked.as_ref().is_err_and(Failure::is_reset), "{asked:?}");
    drop(connect_through(&proxy.connect_unix, &other)?);
    let daemon = &lab.control_plane.servers[0].daemon;
    daemon.wait_log(SOON, 0, &["WARN", "keep timing out"])?;
    daemon.wait_log(SOON, 0, &["cpc::access", "circuit_open"])?;
    let (_, metrics) = daemon.get("/metrics")?;
    for metric in ["cpc_breakers_open 1", "cpc_breakers_opened_total 1"] {
        ensure!(metrics.contains(metric), "{metrics}");
    }

    lab.workers[0].netns.nft("delete table inet hole")?;
    eventually(SOON, || echoes(&lab, &hole)).context("after it answers again")?;
    let (_, metrics) = daemon.get("/metrics")?;
    ensure!(metrics.contains("cpc_breakers_open 0"), "{metrics}");
    Ok(())
}
