//! `cpc status`, and the client of the admin port.

use std::collections::HashSet;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{ContentArrangement, Table};

use cpc_host::report::report;
use cpc_observe::admin::status::{
    AgentRow, AgentStatus, CertificateRow, ConnectionCounts, Keeper, Refused, ServerRow,
    ServerStatus, Status,
};

/// Timeout of the admin port.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Minimum number of columns for a table. With fewer, or an unknown number, the terminal wraps the
/// lines: cells of one letter each are not a table.
const NARROW: u16 = 80;

/// Show the agents of a running server, or the servers of a running agent
///
/// For a server: each agent with its identity, address, round-trip time, streams, bytes, routes and
/// start; refused claims; attachments of the redirect. For an agent: its tunnels. Exits with 1 when
/// the process is not ready.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    admin: Admin,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Refresh every second until interrupted
    #[arg(long, short)]
    watch: bool,
}

/// Address of a process.
#[derive(Debug, clap::Args)]
pub(super) struct Admin {
    /// Admin address; an agent's is 127.0.0.1:8136 by default
    #[arg(
        long,
        env = "CPC_ADMIN",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:8135"
    )]
    admin: SocketAddr,
}

impl Admin {
    fn http() -> ureq::Agent {
        ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .build()
            .into()
    }

    fn status(&self) -> anyhow::Result<Status> {
        let url = format!("http://{}/status", self.admin);
        let mut answer = Self::http().get(&url).call().with_context(|| {
            format!(
                "no answer at {}; is the process running, and is that its admin address?",
                self.admin
            )
        })?;
        answer
            .body_mut()
            .read_json()
            .context("the answer is not a status; is that a cpc of another release?")
    }

    /// Sends `body` and prints the answer.
    pub(super) fn put(&self, path: &str, body: &str) -> anyhow::Result<()> {
        let url = format!("http://{}{path}", self.admin);
        let mut answer = Self::http()
            .put(&url)
            .send(body)
            .with_context(|| format!("no answer at {}", self.admin))?;
        let text = answer.body_mut().read_to_string()?;
        if !answer.status().is_success() {
            bail!("{}", text.trim());
        }
        print!("{text}");
        Ok(())
    }
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        loop {
            let status = match self.admin.status() {
                Err(error) if !self.watch => return Err(error),
                // It may come back.
                status => status,
            };
            let text = match &status {
                Ok(status) if self.json => serde_json::to_string_pretty(status)?,
                Ok(status) => render(status),
                Err(error) => report(error.as_ref()),
            };
            let mut out = std::io::stdout();
            if self.watch && out.is_terminal() {
                // Home and clear: the table stays in place.
                write!(out, "\x1b[H\x1b[2J")?;
            }
            writeln!(out, "{text}")?;
            if let (false, Ok(status)) = (self.watch, status) {
                let ready = match status {
                    Status::Server(server) => server.ready,
                    Status::Agent(agent) => agent.ready,
                };
                std::process::exit(if ready { 0 } else { 1 });
            }
            std::thread::sleep(WATCH_INTERVAL);
        }
    }
}

fn render(status: &Status) -> String {
    match status {
        Status::Server(server) => render_server(server),
        Status::Agent(agent) => render_agent(agent),
    }
}

/// Creates a table as wide as the terminal.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if table.width().is_some_and(|columns| columns < NARROW) {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.set_header(header);
    table
}

fn readiness(not_ready: Option<&str>) -> String {
    not_ready.map_or_else(|| "ready".into(), |why| format!("NOT ready: {why}"))
}

fn render_server(server: &ServerStatus) -> String {
    let ready = readiness(server.not_ready.as_deref());
    let mut text = format!("{}  {}  {ready}\n\n", server.identity, server.version);
    let mut agents = table(&[
        "agent", "protocol", "address", "shard", "state", "rtt", "mtu", "streams", "up", "down",
        "routes", "since",
    ]);
    for agent in &server.agents {
        agents.add_row(agent_row(agent));
    }
    let shards = server.agents.iter().map(|agent| agent.shard);
    text += &format!(
        "{agents}\n{}; datapath: {}\n",
        spread(server.shards, shards),
        server.engine
    );
    text += &connections(&server.connections);
    if server.breakers_open > 0 {
        text += &format!(
            "{} destinations are skipped for now: their dials timed out (circuit_open in the \
             access log)\n",
            server.breakers_open
        );
    }
    text += &certificates(&server.certificates);
    for agent in &server.agents {
        text += &refused(&agent.identity, &agent.refused);
    }
    if let Some(error) = &server.attachments_error {
        text += &format!("\nredirect: {error}\n");
    }
    for attachment in &server.attachments {
        text += &format!("\n{}", super::redirect::render(attachment));
    }
    text
}

fn agent_row(agent: &AgentRow) -> [String; 12] {
    [
        agent.identity.clone(),
        agent.protocol.clone(),
        agent.address.clone(),
        agent.shard.to_string(),
        agent.state.clone(),
        format!("{:.2} ms", agent.rtt_ms),
        agent
            .mtu
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        agent.streams.to_string(),
        bytes(agent.up_bytes),
        bytes(agent.down_bytes),
        agent.routes.join("\n"),
        agent.since.clone(),
    ]
}

/// Returns lines on connections, and on what becomes of them when their tunnel is lost or the process crashes.
fn connections(counts: &ConnectionCounts) -> String {
    let ConnectionCounts {
        open,
        held,
        waiting,
        waiting_since,
        kept,
        keeper,
        peek_offset,
    } = counts;
    let since = waiting_since.clone();
    let since = since.map_or_else(String::new, |since| format!(", the first since {since}"));
    let ended = open.saturating_sub(*kept);
    let keeper = match *keeper {
        Keeper::Unconfigured => "no keeper is configured",
        Keeper::Missing => "THE KEEPER IS MISSING",
        Keeper::Live => "the keeper is there",
    };
    let mut text = format!(
        "{open} connections, {held} of them outlive their tunnel; {waiting} wait for another one{since}\n\
         a crash would end {ended} of them: {keeper}\n"
    );
    let families = [("IPv4", peek_offset.ipv4), ("IPv6", peek_offset.ipv6)];
    let lacking = families.iter().filter(|(_, is_there)| !is_there);
    let lacking: Vec<_> = lacking.map(|(family, _)| *family).collect();
    if !lacking.is_empty() && counts.keeper == Keeper::Live {
        text += &format!(
            "without SO_PEEK_OFF (Linux 6.10, 6.12 for IPv6): bytes over {} are copied more than once\n",
            lacking.join(" and ")
        );
    }
    text
}

fn render_agent(agent: &AgentStatus) -> String {
    let ready = readiness(agent.not_ready.as_deref());
    let mut text = format!("{}  {}  {ready}\n\n", agent.identity, agent.version);
    let mut servers = table(&[
        "server", "address", "protocol", "shard", "state", "rtt", "mtu", "streams", "up", "down",
        "routes", "since",
    ]);
    for server in &agent.servers {
        servers.add_row(server_row(server));
    }
    let reached: HashSet<_> = agent.servers.iter().map(|row| &row.server_id).collect();
    let shards = agent.servers.iter().map(|server| server.shard);
    text += &format!(
        "{servers}\n{} of {} servers; {}; datapath: {}\n",
        reached.len(),
        agent.server_count,
        spread(agent.shards, shards),
        agent.engine
    );
    text += &connections(&agent.connections);
    text += &certificates(&agent.certificates);
    for server in &agent.servers {
        text += &refused(&server.server_id, &server.refused);
    }
    text += &format!("\nmay dial: {}\n", agent.allow.join("; "));
    text
}

fn server_row(server: &ServerRow) -> [String; 12] {
    let rtt = server.rtt_ms.map(|rtt| format!("{rtt:.2} ms"));
    [
        server.server_id.clone(),
        server.address.clone(),
        server.protocol.clone(),
        server.shard.to_string(),
        server.state.clone(),
        rtt.unwrap_or_default(),
        server
            .mtu
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        server.streams.to_string(),
        bytes(server.up_bytes),
        bytes(server.down_bytes),
        server.routes.join("\n"),
        server.since.clone(),
    ]
}

/// Formats one line per certificate: kind, subject, end, and the state unless valid.
fn certificates(rows: &[CertificateRow]) -> String {
    let line = |row: &CertificateRow| {
        let what = match row.kind.as_str() {
            "ca" => "CA",
            _ => "certificate",
        };
        let state = match row.state.as_str() {
            "valid" => String::new(),
            other => format!(", {}: {}", other.to_uppercase(), row.file),
        };
        let CertificateRow {
            purpose,
            subject,
            not_after,
            ..
        } = row;
        format!("{what} ({purpose}): {subject} until {not_after}{state}\n")
    };
    rows.iter().map(line).collect()
}

/// Returns the number of tunnels of each shard.
fn spread(shards: usize, tunnels: impl Iterator<Item = usize>) -> String {
    let mut counts = vec![0; shards];
    for shard in tunnels {
        if let Some(count) = counts.get_mut(shard) {
            *count += 1;
        }
    }
    let counts: Vec<_> = counts.iter().map(usize::to_string).collect();
    format!("tunnels by shard: {}", counts.join(" "))
}

fn refused(who: &str, refused: &[Refused]) -> String {
    refused
        .iter()
        .map(|r| format!("\nrefused: {who} claims {}: {}", r.claim, r.why))
        .collect()
}

/// Formats bytes in binary units, to three figures.
fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::{bytes, spread};

    #[test]
    fn every_shard_is_counted() {
        let tunnels = [0, 2, 2].into_iter();
        assert_eq!(spread(4, tunnels), "tunnels by shard: 1 0 2 0");
    }

    #[test]
    fn byte_counts() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1 << 20), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
