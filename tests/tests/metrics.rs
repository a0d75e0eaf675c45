//! The metrics that both programs expose, against what the documentation promises.

use std::collections::HashSet;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tunnel_tests::client::{connect_through, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
/// The names in it are promised to whoever builds dashboards.
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

/// One family of metrics in OpenMetrics text: its type, help and the names of its samples.
#[derive(Default)]
struct Metrics {
    typed: HashSet<String>,
    helped: HashSet<String>,
    samples: HashSet<String>,
}

impl Metrics {
    /// Reads all of the text and fails at the first line that is not OpenMetrics.
    fn parse(text: &str) -> Result<Self> {
        let mut metrics = Self::default();
        let mut lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.pop(), Some("# EOF"));
        for line in lines {
            let words: Vec<_> = line.splitn(4, ' ').collect();
            match words[..] {
                ["#", "TYPE", name, "counter" | "gauge" | "histogram"] => {
                    ensure!(metrics.typed.insert(name.to_owned()), "twice: {line}");
                }
                ["#", "HELP", name, help] if help.len() > 5 => {
                    ensure!(metrics.helped.insert(name.to_owned()), "twice: {line}");
                }
                ["#", ..] => bail!("not OpenMetrics: {line}"),
                _ => {
                    let (sample, value) = line.rsplit_once(' ').context("no value")?;
                    value.parse::<f64>().with_context(|| line.to_owned())?;
                    let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
                    ensure!(labels.ends_with('}'), "{line}");
                    let of = |family: &String| {
                        let suffix = name.strip_prefix(family.as_str());
                        suffix.is_some_and(|s| {
                            ["", "_total", "_bucket", "_sum", "_count"].contains(&s)
                        })
                    };
                    ensure!(metrics.typed.iter().any(of), "of no family: {line}");
                    metrics.samples.insert(name.to_owned());
                }
            }
        }
        ensure!(metrics.typed == metrics.helped, "help and type differ");
        Ok(metrics)
    }

    fn has(&self, documented: &str) -> bool {
        let family = documented.strip_suffix("_total").unwrap_or(documented);
        self.typed.contains(family)
    }
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

    let server = lab.control_plane.servers[0].daemon.get("/metrics")?.1;
    let agent = lab.workers[0].agent()?.get("/metrics")?.1;
    let (of_server, of_agent) = (Metrics::parse(&server)?, Metrics::parse(&agent)?);
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let documented: HashSet<_> = MONITORING
        .split(|c| !is_name(c))
        .filter(|word| word.starts_with("cpc_"))
        .collect();
    ensure!(documented.len() > 10, "{documented:?}");
    for name in &documented {
        ensure!(
            of_server.has(name) || of_agent.has(name),
            "{name} is only documented"
        );
    }
    for family in of_server.typed.union(&of_agent.typed) {
        let counter = format!("{family}_total");
        ensure!(
            documented.contains(family.as_str()) || documented.contains(counter.as_str()),
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
