//! `cpc token`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use clap::Subcommand;
use ipnet::IpNet;
use serde_json::json;

use super::common::net;
use super::status::table;
use cpc_config::ServerConfig;
use cpc_identity::KeyHash;
use cpc_identity::identity::check_name_pattern;
use cpc_identity::join::clock::SKEW;
use cpc_identity::join::issue_records::{IssueRecords, Ticket};
use cpc_identity::join::{IssueLog, IssueLogError, Token};
use cpc_identity::pem;

mod issued;

/// Create and revoke the tokens with which workers join
///
/// A worker presents a token to the join listener of a server (`join` in its configuration) and gets an
/// agent's certificate. The server's state_dir holds the tokens; a running server sees each change at
/// once. Run this command on the server's host.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The server's configuration file
    #[arg(long, short, env = "CPC_CONFIG", value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a token, and print the command with which a worker joins
    Create {
        /// Name of the node, in which `*` stands for any characters. A token for a name without `*`
        /// also admits another key while the node's certificate is valid
        #[arg(long, value_name = "NAME")]
        node: String,
        /// Address or range for the node's addresses; may be repeated. A token for a single address
        /// also moves it from another node
        #[arg(long, value_name = "CIDR", required = true, value_parser = net)]
        ip: Vec<IpNet>,
        /// Number of nodes that may use the token
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        uses: u32,
        /// Validity of the token, at most 30 days
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: Duration,
        /// Address of the join listener for workers, for the printed command
        #[arg(long, value_name = "HOST:PORT")]
        server: Option<String>,
        /// Print only the token
        #[arg(long, short)]
        quiet: bool,
    },
    /// Show the tokens, and the nodes that used them
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// End a token for further joins. Joined nodes stay; `tls.revoked` ends them
    Revoke {
        /// Part of the token before the dot
        id: String,
    },
    /// Show the nodes with certificates
    ///
    /// Lists the nodes that joined here, and those of `cpc pki` from the same CA.
    Issued {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Release a node's name and addresses for other nodes
    ///
    /// For a node that no longer exists or was installed again. Its certificates stay valid until
    /// they expire; `tls.revoked` ends them at once, and releases their name and addresses too.
    Release {
        /// The node's name
        #[arg(required_unless_present = "ip")]
        node: Option<String>,
        /// Release only this address, of any node or of the named one; may be repeated
        #[arg(long, value_name = "ADDR")]
        ip: Vec<IpAddr>,
    },
}

/// Maximum validity of a token.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let file = self.config.as_deref();
        let config = ServerConfig::load(file)?;
        config.check().map_err(|error| error.within(file))?;
        let Some(join) = &config.join else {
            bail!(
                "the configuration has no `join`, so the server accepts no tokens (docs/configuration.md)"
            );
        };
        let log = IssueLog::open(&config.join_directory())?;
        let by_hand = IssueLog::of_ca(&join.ca);
        match self.command {
            Command::Create {
                node,
                ip,
                uses,
                ttl,
                server,
                quiet,
            } => {
                if ttl.is_zero() || ttl > LONGEST {
                    bail!("--ttl: must be over 0 s and at most 30 days");
                }
                check_name_pattern(&node).context("--node")?;
                let ip: Vec<_> = ip.into_iter().map(canonical).collect();
                let now = SystemTime::now();
                let token = Token::generate().ok().context("no random numbers")?;
                let ticket = Ticket {
                    digest: token.digest(),
                    nodes: node.clone(),
                    addresses: ip.clone(),
                    uses,
                    created: Some(now),
                    expires: now + ttl,
                    used: Vec::new(),
                };
                let id = token.id().to_owned();
                // Nothing is forgotten here, where the clock may be wrong for all that is known.
                let warning = log.change(|records| {
                    records.tokens.insert(id, ticket);
                    Ok::<_, IssueLogError>(clock_warning(records, now))
                })?;
                if let Some(warning) = warning {
                    eprintln!("cpc: {warning}");
                }
                if quiet {
                    println!("{}", token.reveal());
                    return Ok(());
                }
                let server = server.unwrap_or_else(|| format!("HOST:{}", join.listen.port()));
                let mut command = format!(
                    "cpc agent join --server {server} --token {}",
                    token.reveal()
                );
                let ca = config.tls.files()?.ca;
                let mut hashes = Vec::new();
                for root in pem::certificates(&ca)? {
                    // The file has a cross-signed CA twice.
                    let hash = KeyHash::of(&root)?;
                    if !hashes.contains(&hash) {
                        command.push_str(&format!(" --ca-hash {hash}"));
                        hashes.push(hash);
                    }
                }
                if !node.contains('*') {
                    command.push_str(&format!(" --node {node}"));
                }
                // Without them the worker requests its local address towards the server.
                if ip.iter().all(is_single) {
                    for net in &ip {
                        command.push_str(&format!(" --ip {}", net.addr()));
                    }
                }
                println!("{command}");
            }
            Command::List { json } => list(&log, json)?,
            Command::Revoke { id } => {
                // The operator may have passed the whole token.
                let id = id.split('.').next().unwrap_or_default().to_owned();
                let found = log.change(|records| {
                    Ok::<_, IssueLogError>(records.tokens.remove(&id).is_some())
                })?;
                if !found {
                    bail!("there is no token {id}; `cpc token list` shows all tokens");
                }
                println!("token {id} is revoked");
            }
            Command::Issued { json } => issued::list(&log, &by_hand, json)?,
            Command::Release { node, ip } => {
                issued::release(&log, &by_hand, node.as_deref(), &ip)?;
            }
        }
        Ok(())
    }
}

/// Converts a mapped IPv4 address (RFC 4291, section 2.5.5.2) to the IPv4 address.
fn canonical(net: IpNet) -> IpNet {
    match net.addr().to_canonical() {
        address @ IpAddr::V4(_) if is_single(&net) => address.into(),
        _ => net,
    }
}

fn is_single(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// Returns a warning about the clock: a recorded time must not be in the future.
fn clock_warning(records: &IssueRecords, now: SystemTime) -> Option<String> {
    let made = records.tokens.values().filter_map(|ticket| ticket.created);
    let issued = records.holders().map(|(_, holder)| holder.since);
    let newest = made.chain(issued).max()?;
    (newest > now + SKEW).then(|| {
        format!(
            "a token or a certificate was made at {}, which is yet to come: the clock of this host is \
             behind, or was ahead then. `cpc token list` and `cpc token issued` show them",
            humantime::format_rfc3339_seconds(newest)
        )
    })
}

fn list(log: &IssueLog, json: bool) -> anyhow::Result<()> {
    let records = log.read()?;
    let now = SystemTime::now();
    let time = |at| humantime::format_rfc3339_seconds(at).to_string();
    let addresses = |ticket: &Ticket| -> Vec<_> {
        let nets = ticket.addresses.iter();
        nets.map(ToString::to_string).collect()
    };
    if let Some(warning) = clock_warning(&records, now) {
        eprintln!("cpc: {warning}");
    }
    if json {
        let tokens = records.tokens.iter().map(|(id, ticket)| {
            json!({
                "id": id,
                "nodes": ticket.nodes,
                "addresses": addresses(ticket),
                "uses_left": ticket.uses,
                "created": ticket.created.map(time),
                "expires": time(ticket.expires),
                "expired": ticket.expires <= now,
                "used_by": used_by(ticket),
            })
        });
        println!("{:#}", json!(tokens.collect::<Vec<_>>()));
        return Ok(());
    }
    let mut table = table(&[
        "ID",
        "NODES",
        "ADDRESSES",
        "USES LEFT",
        "EXPIRES",
        "USED BY",
    ]);
    for (id, ticket) in &records.tokens {
        let expires = match ticket.expires <= now {
            true => "expired".into(),
            false => time(ticket.expires),
        };
        table.add_row([
            id.clone(),
            ticket.nodes.clone(),
            addresses(ticket).join("\n"),
            ticket.uses.to_string(),
            expires,
            used_by(ticket).join("\n"),
        ]);
    }
    println!("{table}");
    Ok(())
}

fn used_by(ticket: &Ticket) -> Vec<&str> {
    let mut nodes: Vec<_> = ticket.used.iter().map(|it| it.node.as_str()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}
