//! `cpc redirect`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::bail;
use clap::Subcommand;
use sd_notify::NotifyState;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use cpc_config::server::RedirectConfig;
use cpc_config::{AuditConfig, ServerConfig};
use cpc_host::environment::Reloads;
use cpc_host::report::report;
use cpc_host::{lifecycle, privileges};
use cpc_identity::{Material, Role, provider};
use cpc_observe::logging;
use cpc_redirect::{FoundAttachment, Redirect};
use cpc_server::Attachments;

/// Attach, detach and inspect the eBPF redirect
///
/// The command pins programs and maps under redirect.pin, where they outlive every process. While
/// no server answers, the kernel refuses captured connections (or lets them pass, where the
/// attachment fails open).
///
/// A `cpc server` with CAP_NET_ADMIN attaches by itself. A server without capabilities uses the
/// attachments of `attach`, if it is a member of redirect.group. `attach --stay` then starts before
/// the server at each boot and follows cgroups and the host's addresses; the shipped unit
/// cpc-redirect.service runs that command. Run `attach` without --stay at each boot, and again for
/// a changed capture set, for a recreated cgroup, and for a later address of the host.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Attach the configured attachments, or replace their programs in one step
    ///
    /// Fails while another attachment of cpc decides over the same connections. With --stay the command
    /// logs one line instead, and another one when that attachment is gone.
    Attach {
        #[command(flatten)]
        config: Config,
        /// Stay, without any capability: attach again when a cgroup is recreated, keep the host's own
        /// addresses out of the capture set as they come and go, and put a changed capture set in force
        /// at SIGHUP. Notifies the service manager when everything is attached (sd_notify). The end of
        /// this process detaches nothing
        #[arg(long)]
        stay: bool,
    },
    /// Remove attachments: from then on their connections take the ordinary route
    Detach {
        #[command(flatten)]
        config: Config,
        /// Name of one attachment; all of redirect.pin when missing
        #[arg(conflicts_with = "all")]
        name: Option<String>,
        /// Detach every attachment of `list`, with its maps, of every version and pin directory.
        /// Needs no configuration
        #[arg(long)]
        all: bool,
        /// Pin directory, as `list` names it, in place of the configured one. Needs no configuration
        #[arg(long, value_name = "DIR", conflicts_with = "all")]
        pin: Option<PathBuf>,
    },
    /// List every attachment of cpc on this host, of any process
    ///
    /// Reads the BPF file system, and with CAP_SYS_ADMIN all links in the kernel. Needs no
    /// configuration: without one the command searches /sys/fs/bpf.
    List {
        #[command(flatten)]
        config: Config,
        /// Print JSON
        #[arg(long)]
        json: bool,
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
    /// Opens the redirect below the configured pin directory, or the default one without a file.
    fn redirect(&self) -> anyhow::Result<Redirect> {
        let pin = match &self.config {
            Some(_) => self.load()?.redirect.pin,
            None => RedirectConfig::default().pin,
        };
        Ok(Redirect::new(pin))
    }

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
            Command::Attach { config, stay: true } => stay(&config),
            Command::Attach { config, .. } => attach(&config.load()?),
            Command::Detach {
                config, all: true, ..
            } => detach_all(&config.redirect()?),
            Command::Detach {
                config, name, pin, ..
            } => {
                let pin = pin.map_or_else(|| config.load().map(|it| it.redirect.pin), Ok)?;
                detach(&Redirect::new(pin), name.as_deref())
            }
            Command::List { config, json } => list(&config.redirect()?, json),
            Command::Status { config, json } => status(&config.load()?, json),
        }
    }
}

fn attach(config: &ServerConfig) -> anyhow::Result<()> {
    if config.redirect.attachments.is_empty() {
        bail!("the configuration names no attachment (redirect.attachments)");
    }
    let redirect = cpc_server::redirect(&config.redirect)?;
    let material = Material::load(config.tls.files()?, Role::Server, provider())?;
    let own = material.identity().trust_domain;
    let attachments = &config.redirect.attachments;
    let names: Vec<_> = attachments.iter().map(|it| it.name.as_str()).collect();
    let mut shared = Vec::new();
    let mut remedies = BTreeSet::new();
    for attachment in attachments {
        let spec = cpc_server::spec(attachment, &own);
        redirect.attach(&spec)?;
        let (name, cgroup) = (&attachment.name, attachment.cgroup.display());
        if let Some(warning) = spec.fleeting_cgroup() {
            eprintln!("warning: {name}: {warning}");
        }
        let rivals = redirect.rivals(&spec, &names)?;
        if !rivals.is_empty() {
            remedies.extend(rivals.iter().map(FoundAttachment::remedy));
            shared.push(format!(
                "{name} shares its connections with {}",
                listed(&rivals)
            ));
        }
        println!("{name} is attached to {cgroup}");
    }
    if !shared.is_empty() {
        bail!(
            "NOT in place: {}. An attachment refuses its connections while its server is away. Remove the attachments that are not needed with {}, then attach again",
            shared.join("; "),
            remedies.into_iter().collect::<Vec<_>>().join(" and ")
        );
    }
    Ok(())
}

/// Lists other attachments, for people.
fn listed(rivals: &[FoundAttachment]) -> String {
    let rivals: Vec<_> = rivals.iter().map(ToString::to_string).collect();
    rivals.join(", ")
}

/// Attaches, drops every capability, and follows the host until it is stopped.
fn stay(file: &Config) -> anyhow::Result<()> {
    let config = file.load()?;
    if config.redirect.attachments.is_empty() {
        bail!("the configuration names no attachment (redirect.attachments)");
    }
    privileges::begin(cpc_server::for_start(&config))?;
    let _log = logging::init(&config.log, &AuditConfig::default())?;
    let material = Material::load(config.tls.files()?, Role::Server, provider())?;
    let own = material.identity().trust_domain;
    let mut attachments = Attachments::hold(&config.redirect, &own)?;
    let (kept, why) = cpc_server::kept(&config, true);
    privileges::finish(kept, why)?;
    attachments.follow()?;
    super::runtime()?.block_on(async {
        let mut hangups = Reloads::hangups()?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let watching = tokio::spawn(attachments.watch());
        lifecycle::notify(&[NotifyState::Ready]);
        let reload = lifecycle::on_reload(&mut hangups, async || match file.load() {
            Ok(config) => drop(attachments.update(&config.redirect, &own)),
            Err(error) => tracing::warn!(
                error = report(error.as_ref()),
                "configuration not reloaded, the old one stays"
            ),
        });
        tokio::select! {
            () = reload => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        lifecycle::notify(&[NotifyState::Stopping]);
        tracing::info!(
            "ending: attachments stay and capture; no process follows the host's addresses and cgroups any more"
        );
        watching.abort();
        anyhow::Ok(())
    })
}

fn list(redirect: &Redirect, json: bool) -> anyhow::Result<()> {
    let found = redirect.survey();
    if json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else if found.is_empty() {
        println!("nothing is attached");
    }
    for it in found.iter().filter(|_| !json) {
        match it.cgroup {
            Some(cgroup) => println!("{it}, in the cgroup with the inode number {cgroup}"),
            None => println!("{it}, whose cgroup was removed"),
        }
    }
    Ok(())
}

fn detach_all(redirect: &Redirect) -> anyhow::Result<()> {
    for it in redirect.detach_all()? {
        println!("{it} is detached");
    }
    Ok(())
}

fn detach(redirect: &Redirect, name: Option<&str>) -> anyhow::Result<()> {
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
    // Those that an earlier version has left where nothing is attached any more.
    redirect.remove_retired_maps()?;
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

/// Formats one attachment, for people. Reads JSON, because `cpc status` has it from another process.
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
