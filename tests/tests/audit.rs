//! The record of who reached what: on the server and on the agent, beside the log and not in it.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunnel_tests::client::eventually;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{ask, ask_through};
use tunnel_tests::target::Behaviour;

const SOON: std::time::Duration = std::time::Duration::from_secs(15);

/// All records in `directory`, which lie in one file but around midnight.
fn records(directory: &Path) -> Result<Vec<Value>> {
    let files = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let mut files = files.collect::<Result<Vec<_>>>()?;
    files.sort();
    let mut records = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file)?;
        for line in text.lines() {
            records.push(serde_json::from_str(line).with_context(|| format!("{line:?}"))?);
        }
    }
    Ok(records)
}

/// Waits for a record with these fields.
fn wait_for(directory: &Path, fields: &Value) -> Result<Value> {
    let wanted = fields.as_object().context("no object")?;
    eventually(SOON, || {
        let records = records(directory)?;
        let found = records
            .iter()
            .find(|record| wanted.iter().all(|(key, value)| record[key] == *value));
        let found = found.cloned();
        found.with_context(|| format!("no record of {fields} in {records:#?}"))
    })
}

/// Connections, refused dials, refused claims, agents that come and go, and what was changed; whether
/// or not the log says anything.
#[test]
fn the_audit_records_who_reached_what() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    // Beside its configuration.
    let of_server = server.config_file().with_file_name("audit");
    server.configure(|config| {
        config["audit"] = json!({"directory": "audit"});
        config["log"] = json!({"filter": "off", "access": false});
    })?;
    let agent = lab.worker("w1")?.agent()?;
    let of_agent = agent.config_file().with_file_name("audit");
    agent.configure(|config| {
        config["audit"] = json!({"directory": "audit"});
        config["serve"] = json!({"cidrs": ["10.99.77.0/24"]});
    })?;
    lab.start_configured()?;

    wait_for(&of_server, &json!({"event": "started", "role": "server"}))?;
    wait_for(&of_agent, &json!({"event": "started", "role": "agent"}))?;
    let w1 = "spiffe://cluster.local/agent/w1";
    wait_for(
        &of_server,
        &json!({"event": "agent_connected", "agent": w1}),
    )?;
    let claims = json!({"event": "claims_refused", "agent": w1, "claims": "10.99.77.0/24"});
    wait_for(&of_server, &claims)?;

    let target = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let asked = lab
        .control_plane
        .as_apiserver(|| Ok(ask(target, "secret words")))?;
    ensure!(asked.is_ok(), "{asked:?}");
    let forbidden = SocketAddr::from((address::node(1), 9000));
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    ensure!(ask_through(proxy, forbidden, "secret words").is_err());

    let served = json!({
        "target": "cpc::access", "frontend": "redirect", "destination": target.to_string(),
        "peer": "w1", "up": 13, "down": 13, "reason": "finished",
    });
    let on_server = wait_for(&of_server, &served)?;
    let same = json!({"target": "cpc::access", "id": on_server["id"], "up": 13, "down": 13});
    wait_for(&of_agent, &same)?;
    let refused = json!({
        "target": "cpc::access", "destination": forbidden.to_string(), "reason": "policy_denied",
    });
    wait_for(&of_server, &refused)?;
    wait_for(&of_agent, &refused)?;

    // Each kind has files of its own: no number of connections pushes a decision out.
    for entry in fs::read_dir(&of_server)? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        let of_connections = fs::read_to_string(of_server.join(&name))?.contains("cpc::access");
        assert_eq!(of_connections, name.starts_with("connections."), "{name}");
    }

    let server = &mut lab.control_plane.servers[0];
    server.daemon.signal(Signal::SIGHUP)?;
    wait_for(
        &of_server,
        &json!({"event": "configuration", "what": "policy", "done": true}),
    )?;
    wait_for(
        &of_server,
        &json!({"event": "configuration", "what": "capture set", "done": true}),
    )?;
    for record in records(&of_server)?.iter().chain(&records(&of_agent)?) {
        ensure!(!record.to_string().contains("secret"), "{record}");
    }
    Ok(())
}
