//! The connector: one server, two agents, so that one tunnel's bound of connections is not what is
//! measured.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use serde_json::{Value, json};

use super::crowd::{Gate, grants};
use super::{Running, Start};
use crate::bench::load::Dial;
use crate::bench::scene::{Place, local};
use crate::bench::target;
use crate::lab::cgroup::Cgroup;
use crate::lab::config::{self, ConnectorPki, Redirect, ServerSockets};
use crate::lab::daemon::{Daemon, Role};

const READY: Duration = Duration::from_secs(15);

/// Starts it, with `redirect` (a BPF file system, and the group that is redirected) or, without,
/// for HTTP CONNECT; `server` and `agent` are merged into the configurations.
pub(super) fn start(
    place: &Start<'_>,
    redirect: Option<(PathBuf, &Cgroup)>,
    server: &Value,
    agent: &Value,
) -> Result<Running> {
    let nodes = [0, 1].map(|second| place.scene.node(place.number, second));
    let pki = ConnectorPki::create(&place.programs.cpc, place.folder.join("pki"))?;
    let out = |name: &str| -> Result<(PathBuf, String)> {
        let folder = place.folder.join(name);
        let text = folder.to_str().context("the folder's name is not UTF-8")?;
        let text = text.to_owned();
        Ok((folder, text))
    };

    let (folder, text) = out("server")?;
    let local_address = local(0).ip().to_string();
    pki.run(
        "server",
        &["--id", "s1", "--out", &text, "--ip", &local_address],
    )?;
    let mut sockets = ServerSockets {
        tunnel: (place.scene.server(), place.port(21_000)).into(),
        admin: local(place.port(22_000)),
        connect_unix: folder.join("connect.sock"),
        connect_tcp: local(place.port(23_000)),
        redirect: Vec::new(),
    };
    let mut dials = nodes.map(|node| Dial::Connect {
        proxy: sockets.connect_unix.clone(),
        destination: (node, target::PORT).into(),
    });
    let redirect = redirect.map(|(bpffs, cgroup)| Redirect {
        // The same after a restart, which then takes the programs over.
        pin: bpffs.join(format!("cpc-{}", place.number)),
        cgroup: cgroup.path().to_owned(),
    });
    if redirect.is_some() {
        sockets.redirect = vec![local(place.port(24_000))];
        dials = nodes.map(|node| Dial::Tcp((node, target::PORT).into()));
    }
    let mut config = config::server(&folder, &sockets, 1, redirect.as_ref(), 0);
    config["policy"]["grants"] = grants().into();
    // One identity of the crowd may hold all routes that a tenant may have.
    config["limits"] = json!({"routes": 44_000, "routes_per_agent": 33_000});
    merge(&mut config, server);
    let mut running = Running::new(dials[0].clone());
    running.dials = dials.into();
    let daemon = daemon(
        place,
        Role::Server,
        "s1",
        folder,
        &place.scene.control_plane,
        config,
    )?;
    running.daemons[0].push(daemon);

    for (index, node) in nodes.into_iter().enumerate() {
        let name = format!("w{}", index + 1);
        let (folder, text) = out(&name)?;
        let node = node.to_string();
        pki.run("agent", &["--node", &name, "--out", &text, "--ip", &node])?;
        let mut config = json!({
            "version": 1,
            "servers": [sockets.tunnel],
            "tls": {"cert": "agent.crt", "key": "agent.key", "ca": "ca.crt"},
            "allow": [{"cidr": format!("{node}/32"), "ports": [target::PORT]}],
            "admin": local(place.port(25_000) + index as u16),
        });
        merge(&mut config, agent);
        let daemon = daemon_of_agent(place, &name, folder, config)?;
        running.daemons[1].push(daemon);
    }
    running.gate = Some(Gate {
        program: place.programs.crowd.clone(),
        server: sockets.tunnel,
        pki,
        folder: place.folder.clone(),
        place: place.scene.worker.clone(),
    });
    for daemon in running.daemons.iter_mut().flatten() {
        daemon.start()?;
    }
    for daemon in running.daemons.iter_mut().flatten() {
        daemon.wait_ready(READY)?;
    }
    Ok(running)
}

/// Returns a short text that this `cpc` does not know a key of a variant, which is no failure.
pub(super) fn explain(error: Error) -> Error {
    let text = format!("{error:#}");
    let key = text
        .split_once("unknown field `")
        .and_then(|(_, rest)| rest.split_once('`'));
    match key {
        Some((key, _)) => anyhow!("this cpc knows no key `{key}`"),
        None => error,
    }
}

fn daemon_of_agent(
    place: &Start<'_>,
    name: &str,
    folder: PathBuf,
    config: Value,
) -> Result<Daemon> {
    daemon(
        place,
        Role::Agent,
        name,
        folder,
        &place.scene.worker,
        config,
    )
}

fn daemon(
    start: &Start<'_>,
    role: Role,
    name: &str,
    folder: PathBuf,
    place: &Place,
    config: Value,
) -> Result<Daemon> {
    let cpc = &start.programs.cpc;
    Daemon::new(role, name, cpc, folder, place.inside.clone(), config)
}

/// Puts `more` into `config`: objects and lists are merged piece by piece, all else is replaced.
fn merge(config: &mut Value, more: &Value) {
    match (config, more) {
        (Value::Object(config), Value::Object(more)) => {
            for (key, value) in more {
                merge(config.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (config, more) => *config = more.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_told_in_short() {
        let long = anyhow!("it has ended: line 2: unknown field `datapath`, expected one of ..");
        assert_eq!(
            explain(long).to_string(),
            "this cpc knows no key `datapath`"
        );
        assert_eq!(
            explain(anyhow!("something else")).to_string(),
            "something else"
        );
    }

    #[test]
    fn merging_changes_what_is_named() {
        let mut config = json!({"a": {"b": 1, "c": 2}, "list": [1]});
        merge(
            &mut config,
            &json!({"a": {"c": 3}, "list": [2], "new": true}),
        );
        let expected = json!({
            "a": {"b": 1, "c": 3},
            "list": [2],
            "new": true,
        });
        assert_eq!(config, expected);
    }
}
