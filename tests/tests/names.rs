//! Servers that are named: an address that is dead does not keep an agent from the others.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tunnel_tests::client::{connect_through, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
/// An address that swallows what is sent to it.
const DEAD: &str = "192.0.2.99";

#[test]
fn a_name_whose_first_address_is_dead_leads_to_the_server() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec {
        redirect: false,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    let mut lab = Lab::without_connector(spec)?;
    lab.configure_connector()?;
    lab.router.netns.nft(&format!(
        "table inet dead {{
           chain forward {{
             type filter hook forward priority filter - 1; policy accept;
             ip daddr {DEAD} counter drop
           }}
         }}"
    ))?;
    let agent = lab.workers[0].agent()?;
    agent.configure(|config| config["servers"] = json!(["cp.example:8132"]))?;
    agent.set_hosts(&format!(
        "{DEAD} cp.example\n{} cp.example\n",
        address::server(1)
    ))?;
    lab.start_configured()?;
    let mut nft = lab.router.netns.command("nft")?;
    let listed = nft.args(["list", "table", "inet", "dead"]).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    let tried = listed.contains("counter packets") && !listed.contains("packets 0 ");
    ensure!(tried, "the dead address was not tried: {listed}");
    let echo = format!("{}:{}", address::node(1), Behaviour::Echo.port());
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    round_trips(connect_through(&proxy, &echo)?, 1)?;
    // The same after a restart of the server, whose tunnel the agent then dials again.
    lab.control_plane.servers[0].daemon.restart()?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    round_trips(connect_through(&proxy, &echo)?, 1).map(drop)
}
