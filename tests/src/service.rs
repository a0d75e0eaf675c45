//! A service that every worker can reach: one address, served by several agents, with a
//! [`Ledger`] of its own behind each of them.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::lab::config::TRUST_DOMAIN;
use crate::ledger::Ledger;

/// Address for clients; within the captured ranges.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 244, 200, 1);
/// Port.
pub const PORT: u16 = 7100;
/// Claim of its agents.
pub const NETWORK: &str = "10.244.200.0/24";

/// Address and port.
pub fn socket() -> SocketAddr {
    (ADDRESS, PORT).into()
}

/// Starts the service on every worker, and configures servers and agents for it: call it between
/// [`Lab::configure_connector`] and [`Lab::start_configured`]. Ledger `n - 1` is worker `n`'s, and
/// has its name.
///
/// # Errors
///
/// The address is taken, or a configuration can't be written.
pub fn start(lab: &mut Lab) -> Result<Vec<Ledger>> {
    for server in &mut lab.control_plane.servers {
        let identity = format!("spiffe://{TRUST_DOMAIN}/agent/w*");
        server.daemon.configure(|config| {
            let grant = json!({"identity": identity, "cidrs": [NETWORK]});
            push(&mut config["policy"]["grants"], grant);
        })?;
    }
    let mut ledgers = Vec::new();
    for worker in &mut lab.workers {
        worker
            .netns
            .ip(&format!("address add {ADDRESS}/32 dev lo\n"))?;
        let ledger = Ledger::start(&worker.netns, socket(), &worker.name);
        ledgers.push(ledger.with_context(|| format!("the service on {}", worker.name))?);
        worker.agent()?.configure(|config| {
            push(&mut config["serve"]["cidrs"], json!(NETWORK));
            push(&mut config["allow"], allowed());
        })?;
    }
    Ok(ledgers)
}

/// Returns the rule that lets an agent dial it.
pub fn allowed() -> Value {
    json!({"cidr": NETWORK, "ports": [PORT]})
}

fn push(list: &mut Value, entry: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(entry);
    }
}
