//! `cargo xtask lab`: the laboratory by hand and for scripts.
//!
//! A laboratory that was brought up here stays until it is brought down. Several can be up at
//! once; with one, nothing needs to be named.

use std::os::unix::process::CommandExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use tunnel_tests::lab::config::Allow;
use tunnel_tests::lab::description::Description;
use tunnel_tests::lab::site::Site;
use tunnel_tests::lab::{Lab, LabSpec};

use crate::setup::{self, Purpose};
use crate::workspace::AS_ROOT;
use crate::{ebpf, hostile, programs, sh};

/// Options of `cargo xtask lab`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build a laboratory and leave it up.
    Up(Up),
    /// Run a command in it, for example `lab run cp -- curl -k https://10.99.1.2:10250/`.
    Run {
        /// Laboratory, if several exist
        #[arg(long)]
        id: Option<String>,
        /// cp (the control plane, as kube-apiserver), nat (the router), w1, w2, ..
        place: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print the existing laboratories
    Status {
        /// Print it as JSON, one object for each laboratory.
        #[arg(long)]
        json: bool,
    },
    /// Remove the laboratory, also the remains of a crash
    Down {
        /// Laboratory, if several exist
        #[arg(long, conflicts_with = "all")]
        id: Option<String>,
        /// Remove every laboratory on this machine.
        #[arg(long)]
        all: bool,
    },
    /// Do harm in one of its own, beside a pair that must not notice; writes docs/hostile-peers.md.
    Hostile(hostile::Args),
}

#[derive(clap::Args)]
struct Up {
    /// Number of workers
    #[arg(long, default_value_t = 1)]
    workers: u8,
    /// Number of servers
    #[arg(long, default_value_t = 1)]
    servers: u8,
    /// Let the agents dial these as well, for example 10.99.1.0/24:22,8000-8100.
    #[arg(long, value_name = "CIDR:PORTS")]
    allow: Vec<Allow>,
    /// Print one JSON object instead of a text.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Up(args) => up(args),
        Action::Run { id, place, command } => execute(&pick(id)?, &place, &command),
        Action::Status { json } => status(json),
        Action::Down { id, all } => down(id, all),
        Action::Hostile(args) => hostile::hostile(&args),
    }
}

fn up(args: Up) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "the laboratory is made of network namespaces and needs root: run `{AS_ROOT} lab up`; \
             without root, `cargo xtask demo` runs on loopback"
        );
    }
    setup::ensure(Purpose::Demo)?;
    ebpf::build()?;
    let programs = programs::build()?;
    sh::heading("Laboratory");
    let lab = Lab::up(LabSpec {
        workers: args.workers,
        servers: args.servers,
        allow: args.allow,
        ..LabSpec::new(programs)
    })?;
    print(&lab.keep()?, args.json)
}

fn status(json: bool) -> Result<()> {
    for site in Site::all()? {
        match Description::read(&site) {
            Ok(description) => print(&description, json)?,
            Err(error) => eprintln!("{error:#}"),
        }
    }
    Ok(())
}

fn down(id: Option<String>, all: bool) -> Result<()> {
    let sites = if all { Site::all()? } else { vec![pick(id)?] };
    for site in sites {
        site.remove()?;
        eprintln!("laboratory {} is removed", site.id());
    }
    Ok(())
}

/// Returns the laboratory called `id`, or the only one; those of running tests do not count.
fn pick(id: Option<String>) -> Result<Site> {
    let mut sites = Site::all()?;
    if let Some(id) = id {
        let found = sites.into_iter().find(|site| site.id() == id);
        return found.with_context(|| format!("there is no laboratory {id}"));
    }
    if sites.iter().any(Site::stays) {
        sites.retain(Site::stays);
    }
    match sites.len() {
        0 => bail!("no laboratory is up; `cargo xtask lab up` builds one"),
        1 => Ok(sites.remove(0)),
        _ => {
            let ids: Vec<_> = sites.iter().map(Site::id).collect();
            bail!(
                "several laboratories are up, choose with --id: {}",
                ids.join(", ")
            )
        }
    }
}

/// Becomes `command` in a place of the laboratory.
fn execute(site: &Site, place: &str, command: &[String]) -> Result<()> {
    let (program, arguments) = command.split_first().context("no command")?;
    let netns = site.netns(place);
    if !netns.path().exists() {
        bail!(
            "laboratory {} has no place {place}; it has cp, nat, w1, w2, ..",
            site.id()
        );
    }
    let mut command = netns.command(program)?;
    if place == "cp" {
        site.cgroup("apiserver")?.place(&mut command)?;
    }
    Err(command.args(arguments).exec()).with_context(|| format!("cannot run {program}"))
}

fn print(lab: &Description, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(lab)?);
        return Ok(());
    }
    println!("laboratory {} in {}", lab.id, lab.folder.display());
    for server in &lab.control_plane.servers {
        println!(
            "  server {}  {}  {}  log {}",
            server.id,
            server.address,
            state(server.pid),
            server.log.display()
        );
    }
    for worker in &lab.workers {
        println!(
            "  worker {}  {}  agent {}  namespace {}",
            worker.name,
            worker.node_address,
            state(worker.agent_pid),
            worker.netns
        );
    }
    if let Some(worker) = lab.workers.first() {
        println!("try:");
        println!(
            "  cargo xtask lab run cp -- curl -k https://{}:10250/",
            worker.node_address
        );
        println!("  cargo xtask lab down");
    }
    Ok(())
}

fn state(pid: Option<i32>) -> String {
    match pid {
        Some(pid) if Path::new("/proc").join(pid.to_string()).exists() => format!("pid {pid}"),
        Some(pid) => format!("ended (was pid {pid})"),
        None => "not started".to_owned(),
    }
}
