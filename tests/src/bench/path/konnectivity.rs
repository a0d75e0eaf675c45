//! Konnectivity in its best case: nothing logged, HTTP CONNECT over a Unix socket, TLS with client
//! certificates to the agent.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Running, Start};
use crate::bench::load::Dial;
use crate::bench::target;
use crate::lab::config::ConnectorPki;

pub(super) fn start(place: &Start<'_>) -> Result<Running> {
    let folder = &place.folder;
    let programs = place.programs.konnectivity.as_deref();
    let programs = programs.context("where its programs are is not known")?;
    let address = place.scene.server().to_string();
    let pki = ConnectorPki::create(&place.programs.cpc, folder.join("pki"))?;
    let text = |path: &Path| path.display().to_string();
    let (server, agent) = (folder.join("server"), folder.join("agent"));
    pki.run(
        "server",
        &["--id", "s1", "--out", &text(&server), "--ip", &address],
    )?;
    pki.run("agent", &["--node", "w1", "--out", &text(&agent)])?;
    let proxy = folder.join("connect.sock");
    let mut running = Running::new(Dial::Connect {
        proxy: proxy.clone(),
        destination: (place.scene.node(place.number, 0), target::PORT).into(),
    });

    let port = place.port(26_000);
    let mut command = Command::new(programs.join("proxy-server"));
    command.args(["-v=0", "--mode=http-connect", "--server-port=0"]);
    command.args([
        "--server-bind-address=127.0.0.1",
        "--health-bind-address=127.0.0.1",
    ]);
    command.arg(format!("--uds-name={}", proxy.display()));
    command.arg(format!("--agent-port={port}"));
    command.arg(format!("--admin-port={}", port + 1));
    command.arg(format!("--health-port={}", port + 2));
    for (flag, file) in [
        ("cluster-cert", "server.crt"),
        ("cluster-key", "server.key"),
        ("cluster-ca-cert", "ca.crt"),
    ] {
        command.arg(format!("--{flag}={}", server.join(file).display()));
    }
    running.processes[0].push(place.server(&mut command)?);

    let mut command = Command::new(programs.join("proxy-agent"));
    command.args(["-v=0", "--agent-id=w1", "--health-server-host=127.0.0.1"]);
    command.arg(format!("--proxy-server-host={address}"));
    command.arg(format!("--proxy-server-port={port}"));
    command.arg(format!("--admin-server-port={}", port + 3));
    command.arg(format!("--health-server-port={}", port + 4));
    for (flag, file) in [
        ("agent-cert", "agent.crt"),
        ("agent-key", "agent.key"),
        ("ca-cert", "ca.crt"),
    ] {
        command.arg(format!("--{flag}={}", agent.join(file).display()));
    }
    running.processes[1].push(place.agent(&mut command)?);
    Ok(running)
}
