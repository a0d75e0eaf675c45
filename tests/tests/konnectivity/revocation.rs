//! An agent of Konnectivity that counts no more.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;
use tunnel_tests::client::eventually;
use tunnel_tests::lab;

use crate::scene::Scene;
use crate::script::SOON;

/// The agent's stream ends, a new one is refused with a text, and the agent returns when the list
/// is empty again.
#[test]
fn a_revoked_agent_loses_its_stream() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(1)?;
    let list = scene.lab.folder().join("revoked");
    fs::write(&list, "")?;
    scene.configure_server(|config| config["tls"]["revoked"] = json!(list))?;
    scene.cpc_server().start()?;
    let _agent = scene.legacy_agent(1)?;
    let agent = "spiffe://cluster.local/agent/agent";
    let came = ["agent of Konnectivity connected", agent];
    scene.cpc_server().wait_log(SOON, 0, &came)?;

    let seen = scene.cpc_server().log().len();
    fs::write(&list, agent)?;
    let revoked = format!("{agent} has been revoked");
    let cut = ["agent disconnected", "identity_refused", &revoked];
    scene.cpc_server().wait_log(SOON, seen, &cut)?;
    let refused = ["agent refused", &revoked];
    scene.cpc_server().wait_log(SOON, seen, &refused)?;

    let seen = scene.cpc_server().log().len();
    fs::write(&list, "# nobody\n")?;
    eventually(SOON, || {
        let log = scene.cpc_server().log();
        ensure!(log[seen..].contains(came[0]), "it does not come back");
        Ok(())
    })
}
