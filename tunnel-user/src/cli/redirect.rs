//! `cpc redirect`.

use std::path::PathBuf;

use anyhow::bail;
use clap::Subcommand;
use serde_json::Value;

use crate::config::ServerConfig;
use crate::redirect::Redirect;
use crate::tls::{Material, Role, provider};

/// Attach, detach and look at the eBPF redirect
///
/// Programs and maps are pinned under redirect.pin and outlive every process. While no server
/// answers, what is captured is refused (or passes, where the attachment fails open).
///
/// A `cpc server` that has CAP_NET_ADMIN attaches by itself. One without capabilities uses what
/// `attach` has put in place, if it is a member of redirect.group; `attach` is then to be run at each
/// boot before it, and again for a changed capture set and for a cgroup that was made anew.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the configured attachments in place, or renew their programs in one step
    Attach(Config),
    /// Remove attachments: from then on their connections take the ordinary route
    Detach {
        #[command(flatten)]
        config: Config,
        /// Only this one; all of them when missing
        name: Option<String>,
    },
    /// Show the attachments as the kernel has them
    Status {
        #[command(flatten)]
        config: Config,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Config {
    /// The server's configuration file
    #[arg(long, short, env = "CPC_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Config {
    fn load(&self) -> anyhow::Result<ServerConfig> {
        let config = ServerConfig::load(self.config.as_deref())?;
        let file = self.config.as_deref();
        config.check().map_err(|error| error.within(file))?;
        Ok(config)
    }
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Attach(config) => attach(&config.load()?),
            Command::Detach { config, name } => detach(&config.load()?, name.as_deref()),
            Command::Status { config, json } => status(&config.load()?, json),
        }
    }
}

fn attach(config: &ServerConfig) -> anyhow::Result<()> {
    if config.redirect.attachments.is_empty() {
        bail!("the configuration names no attachment (redirect.attachments)");
    }
    let redirect = crate::server::redirect(&config.redirect)?;
    let material = Material::load(config.tls.files()?, Role::Server, provider())?;
    let own = material.identity().trust_domain;
    for attachment in &config.redirect.attachments {
        redirect.attach(&crate::server::spec(attachment, &own))?;
        println!(
            "{} is attached to {}",
            attachment.name,
            attachment.cgroup.display()
        );
    }
    Ok(())
}

fn detach(config: &ServerConfig, name: Option<&str>) -> anyhow::Result<()> {
    let redirect = Redirect::new(&config.redirect.pin);
    let names: Vec<String> = match name {
        Some(name) => vec![name.into()],
        None => redirect
            .status()?
            .into_iter()
            .map(|attachment| attachment.name)
            .collect(),
    };
    for name in names {
        if !redirect.detach(&name)? {
            bail!("there is no attachment {name}; `cpc redirect status` lists them");
        }
        println!("{name} is detached");
    }
    Ok(())
}

fn status(config: &ServerConfig, json: bool) -> anyhow::Result<()> {
    let attachments = serde_json::to_value(Redirect::new(&config.redirect.pin).status()?)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&attachments)?);
        return Ok(());
    }
    match attachments.as_array().map(Vec::as_slice) {
        Some([]) | None => println!("nothing is attached"),
        Some(all) => all
            .iter()
            .for_each(|attachment| println!("{}", render(attachment))),
    }
    Ok(())
}

/// What a person has to know of an attachment with the shortcut.
const SHORTCUT: &str = "  shortcut is on: breaks programs that read from blocking sockets or have \
    TLS in the kernel (kTLS), and hides bytes from tcpdump and ss\n";

/// One attachment, for people. Reads JSON, since `cpc status` has it from another process.
pub(super) fn render(attachment: &Value) -> String {
    let text = |key: &str| attachment[key].as_str().unwrap_or("?").to_owned();
    let listeners: Vec<_> = attachment["listeners"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut out = format!(
        "attachment {}  fails {}  listeners {}  {} prefixes\n",
        text("name"),
        text("fail"),
        listeners.join(" "),
        attachment["prefixes"],
    );
    if attachment["shortcut"] == true {
        out += SHORTCUT;
    }
    for (hook, link) in attachment["links"].as_object().into_iter().flatten() {
        let state = link["state"].as_str().unwrap_or("?");
        if !matches!(state, "attached" | "hidden") {
            out += &format!("  {hook} is {state}\n");
        }
    }
    let counters: Vec<_> = attachment["counters"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, count)| count.as_u64() != Some(0))
        .map(|(event, count)| format!("{event} {count}"))
        .collect();
    out + &format!(
        "  {}\n",
        if counters.is_empty() {
            "no events".into()
        } else {
            counters.join("  ")
        }
    )
}
