//! Hosts with one family of addresses: server, agent and frontends with their defaults.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::round_trips;
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
/// A name of the server that leads to an address of each family.
const NAME: &str = "cp.example";

/// A laboratory that is configured and not started. What an address is written down for has its default.
fn configured() -> Result<Lab> {
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        for at in ["", "/redirect/attachments/0"] {
            let object = config.pointer_mut(at).and_then(Value::as_object_mut);
            object.and_then(|it| it.remove("listen"));
        }
    })?;
    let agent = lab.workers[0].agent()?;
    agent.configure(|config| config["servers"] = json!([format!("{NAME}:8132")]))?;
    let (v4, v6) = (address::server(1), address::server_v6(1));
    agent.set_hosts(&format!("{v4} {NAME}\n{v6} {NAME}\n"))?;
    Ok(lab)
}

/// Bytes go both ways through each frontend, to the worker's own address and to a pod's.
fn serves(lab: &Lab, family: usize) -> Result<()> {
    for frontend in Frontend::ALL {
        for addresses in [address::nodes(1), address::pods(1)] {
            let echo: SocketAddr = (addresses[family], Behaviour::Echo.port()).into();
            round_trips(frontend.dial(lab, echo)?, 3)?;
        }
    }
    // The frontend on TCP listens, and health beside the tunnel's port.
    let of = &lab.control_plane.servers[0].sockets;
    let own: [IpAddr; 2] = [address::server(1).into(), address::server_v6(1).into()];
    for address in [of.connect_tcp, (own[family], of.tunnel.port()).into()] {
        lab.control_plane.netns.enter(|| {
            std::net::TcpStream::connect_timeout(&address, SOON)?;
            Ok(())
        })?;
    }
    Ok(())
}

/// Each host has IPv4 on its loopback interface alone. The name of the server leads to an IPv4 address first.
#[test]
fn hosts_without_ipv4() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = configured()?;
    let server = address::server(1);
    let netns = &lab.control_plane.netns;
    netns.ip(&format!("address del {server}/24 dev eth0\n"))?;
    let (node, pod) = (address::node(1), address::pod(1));
    let worker = format!("address del {node}/24 dev eth0\naddress del {pod}/32 dev lo\n");
    lab.workers[0].netns.ip(&worker)?;
    lab.start_configured()?;
    serves(&lab, 1)
}

/// `disable_ipv6` takes away ::1 too.
#[test]
fn hosts_without_ipv6() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = configured()?;
    for netns in [&lab.control_plane.netns, &lab.workers[0].netns] {
        netns.sysctl("ipv6/conf/all/disable_ipv6", "1")?;
    }
    lab.start_configured()?;
    let server = &lab.control_plane.servers[0].daemon;
    let told = ["WARN", "lacks the address family", "[::1]:8137"];
    server.wait_log(SOON, 0, &told)?;
    for log in [server.log(), lab.workers[0].agent()?.log()] {
        ensure!(!log.contains("ERROR"), "{log}");
    }
    serves(&lab, 0)
}

/// Addresses of both families that are written down: the one that is missing is an error with its name.
#[test]
fn an_address_of_a_missing_family_is_named() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = configured()?;
    let netns = &lab.control_plane.netns;
    netns.sysctl("ipv6/conf/all/disable_ipv6", "1")?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["listen"] = json!("[2001:db8::1]:8132"))?;
    server.start()?;
    let ended = server.wait_ended(SOON).err();
    let ended = ended.map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(ended.contains("[2001:db8::1]:8132"), "{ended}");
    // Both families where the host has both, otherwise the one that it has.
    server.configure(|config| config["listen"] = json!("[::]:8132"))?;
    lab.start_configured()?;
    serves(&lab, 0)
}
