//! The metrics that both programs expose, against what the documentation promises.

use std::collections::HashSet;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client::{connect_through, round_trips};
use tunnel_tests::exposition::Page;
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
/// Page that promises its names to authors of dashboards.
const MONITORING: &str = include_str!("../../docs/monitoring.md");

fn echo(n: u8) -> SocketAddr {
    (address::node(n), Behaviour::Echo.port()).into()
}

/// A round trip through CONNECT; the error is what the client was told.
fn through(lab: &Lab, destination: SocketAddr) -> Result<()> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let stream = connect_through(proxy, &destination.to_string())?;
    stream.set_read_timeout(Some(SOON))?;
    round_trips(stream, 1).map(drop)
}

/// The same through the redirect.
fn redirected(lab: &Lab, destination: SocketAddr) -> Result<()> {
    lab.control_plane.as_apiserver(|| {
        let stream = TcpStream::connect_timeout(&destination, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        round_trips(stream, 1).map(drop)
    })
}

/// The page in Prometheus' text format, as who asks for nothing gets it.
fn page(daemon: &Daemon) -> Result<(String, Page)> {
    let (head, body) = daemon.get_with("/metrics", "")?;
    ensure!(
        head.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"),
        "{head}"
    );
    let text = String::from_utf8(body)?;
    let page = Page::read(&text)?;
    Ok((text, page))
}

/// OpenMetrics, compressed, for who asks for it.
fn other_forms(daemon: &Daemon) -> Result<()> {
    let asked = "Accept: application/openmetrics-text\r\nAccept-Encoding: gzip\r\n";
    let (head, body) = daemon.get_with("/metrics", asked)?;
    for field in [
        "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n",
        "content-encoding: gzip\r\n",
    ] {
        ensure!(head.contains(field), "no {field} in {head}");
    }
    let mut gzip = Command::new("gzip");
    gzip.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut gzip = gzip.spawn()?;
    let mut into = gzip.stdin.take().context("no pipe")?;
    into.write_all(&body)?;
    drop(into);
    let text = String::from_utf8(gzip.wait_with_output()?.stdout)?;
    ensure!(text.contains("# TYPE cpc_up_bytes counter\n"), "{text}");
    ensure!(text.ends_with("\n# EOF\n"), "{text}");
    Ok(())
}

/// Each documented metric is there with help and type, none is undocumented, and what passed is
/// counted.
#[test]
fn metrics_are_as_documented() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let ca = lab.folder().join("pki");
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        config["audit"] = json!({"directory": "audit"});
        config["join"] = json!({"listen": "127.0.0.1:8138", "ca": ca});
    })?;
    lab.start_configured()?;
    through(&lab, echo(1))?;
    redirected(&lab, echo(1))?;
    ensure!(through(&lab, "10.9.9.9:1".parse()?).is_err());

    let daemon = &lab.control_plane.servers[0].daemon;
    let (server, of_server) = page(daemon)?;
    let (agent, of_agent) = page(lab.workers[0].agent()?)?;
    other_forms(daemon)?;
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let documented: HashSet<_> = MONITORING
        .split(|c| !is_name(c))
        .filter(|word| ["cpc_", "process_"].iter().any(|p| word.starts_with(p)))
        .collect();
    ensure!(documented.len() > 10, "{documented:?}");
    for name in &documented {
        ensure!(
            of_server.families().contains_key(*name) || of_agent.families().contains_key(*name),
            "{name} is only documented"
        );
    }
    for family in of_server
        .families()
        .keys()
        .chain(of_agent.families().keys())
    {
        ensure!(
            documented.contains(family.as_str()),
            "{family} is not documented"
        );
    }
    for sample in [
        "cpc_ready 1\n",
        "cpc_up_bytes_total 2\n",
        "cpc_connections_closed_total{frontend=\"http_connect\",by=\"client\",reason=\"finished\"} 1\n",
        "cpc_connections_closed_total{frontend=\"redirect\",by=\"client\",reason=\"finished\"} 1\n",
        "cpc_connections_closed_total{frontend=\"http_connect\",by=\"server\",reason=\"no_route\"} 1\n",
        "cpc_dial_duration_seconds_count{frontend=\"redirect\"} 1\n",
        "cpc_redirect_events_total{attachment=\"kube-apiserver\",event=\"redirected\"} 1\n",
    ] {
        ensure!(server.contains(sample), "no {sample}in {server}");
    }
    ensure!(agent.contains("cpc_servers 1\n"), "{agent}");
    Ok(())
}
