//! `cpc agent join`.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use tracing_subscriber::filter::LevelFilter;

use cpc_agent::join::{self, Joining};
use cpc_identity::KeyHash;

/// Get this node's certificate from a server, with a token
///
/// The command creates the key, which never leaves this host. The hash of its CA's key
/// authenticates the server; `cpc token create` prints it with the whole command. The result is two
/// files: agent.pem with key and certificate, and ca.crt. After a failure run the command again: it
/// uses the same key, which costs the token no further use.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Address of a server's join listener
    #[arg(long, env = "CPC_JOIN_SERVER", value_name = "HOST:PORT")]
    server: String,
    /// The token
    #[arg(
        long,
        env = "CPC_JOIN_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true,
        required_unless_present = "token_file",
        conflicts_with = "token_file"
    )]
    token: Option<String>,
    /// File with the token, such as a service account's
    #[arg(long, env = "CPC_JOIN_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Hash of the CA's key; may be repeated while one CA replaces another
    #[arg(
        long,
        env = "CPC_JOIN_CA_HASH",
        value_name = "sha256:HEX",
        value_delimiter = ',',
        required = true
    )]
    ca_hash: Vec<KeyHash>,
    /// The node's name [default: the host's]
    #[arg(long, env = "CPC_NODE", value_name = "NAME")]
    node: Option<String>,
    /// Address of the node, which the agent then serves; may be repeated [default: the local address
    /// towards the server]
    #[arg(
        long, env = "CPC_NODE_IP", value_name = "ADDR", value_delimiter = ',',
        value_parser = |text: &str| text.trim().parse::<IpAddr>()
    )]
    ip: Vec<IpAddr>,
    /// Directory for agent.pem and ca.crt
    #[arg(long, value_name = "DIR", default_value = "/etc/cpc/agent")]
    out: PathBuf,
    /// Time for retries while the server is not reached
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        // Standard output is for the result alone.
        tracing_subscriber::fmt()
            .with_max_level(LevelFilter::WARN)
            .with_writer(std::io::stderr)
            .init();
        let token = match (self.token, &self.token_file) {
            (Some(token), _) => token,
            (None, Some(file)) => {
                fs::read_to_string(file).with_context(|| file.display().to_string())?
            }
            // clap has seen to it.
            (None, None) => String::new(),
        };
        let node = match self.node {
            Some(node) => node,
            None => {
                let name = nix::unistd::gethostname().context("the host's name")?;
                name.to_string_lossy().to_lowercase()
            }
        };
        let joining = Joining {
            server: self.server,
            token: token.trim().to_owned(),
            pins: self.ca_hash,
            node,
            addresses: self.ip,
            out: self.out,
            patience: self.timeout,
        };
        let joined = super::runtime()?.block_on(join::join(&joining))?;
        let (file, ca) = (joined.file.display(), joined.ca.display());
        println!(
            "{} until {}",
            joined.credential.identity,
            humantime::format_rfc3339_seconds(joined.credential.not_after)
        );
        println!("cpc agent --server HOST:8132 --cert {file} --key {file} --ca {ca} --renew");
        Ok(())
    }
}
