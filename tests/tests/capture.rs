//! The capture comes from the configuration alone, and no captured connection takes the ordinary
//! route: the control plane has a default route here, and the router counts packets on it.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunnel_tests::client::eventually;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Failure, ask};
use tunnel_tests::target::Behaviour;

/// Timeout of a connect that the router drops.
const LOST: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(5);

/// Captured, and on no worker.
const NOBODYS: [&str; 2] = ["10.99.77.2", "fd00:99:77::2"];
/// Not captured.
const OUTSIDE: [&str; 2] = ["10.98.1.2", "fd00:98:1::2"];

fn echo(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, Behaviour::Echo.port())
}

fn parsed(addresses: [&str; 2]) -> Result<[IpAddr; 2]> {
    Ok([addresses[0].parse()?, addresses[1].parse()?])
}

struct Capture {
    lab: Lab,
}

impl Capture {
    /// A connect from the redirected group fails with `kind`, and no packet left.
    fn refused(&self, addresses: [IpAddr; 2], kind: ErrorKind, when: &str) -> Result<()> {
        for address in addresses {
            let before = self.lab.router.leaked()?;
            let error = self
                .lab
                .control_plane
                .as_apiserver(|| Ok(TcpStream::connect_timeout(&echo(address), PATIENCE).err()))?
                .with_context(|| format!("{when}: {address} was reached"))?;
            ensure!(error.kind() == kind, "{when}: {address}: {error}");
            ensure!(
                self.lab.router.leaked()? == before,
                "{when}: {address} leaked"
            );
        }
        Ok(())
    }

    /// A connect from the redirected group takes the ordinary route, where the router drops it.
    fn untouched(&self, when: &str) -> Result<()> {
        for address in parsed(OUTSIDE)? {
            let before = self.lab.router.leaked()?;
            let lost = self
                .lab
                .control_plane
                .as_apiserver(|| Ok(TcpStream::connect_timeout(&echo(address), LOST).err()))?;
            let lost = lost.with_context(|| format!("{when}: {address} was reached"))?;
            assert_eq!(
                lost.kind(),
                ErrorKind::TimedOut,
                "{when}: {address}: {lost}"
            );
            ensure!(
                self.lab.router.leaked()? > before,
                "{when}: {address} did not take the ordinary route"
            );
        }
        Ok(())
    }

    fn served(&self, when: &str) -> Result<()> {
        let before = self.lab.router.leaked()?;
        for address in address::nodes(1) {
            let answer = eventually(PATIENCE, || {
                let asked = || Ok(ask(echo(address), "hello"));
                let asked = self.lab.control_plane.as_apiserver(asked)?;
                asked.map_err(|failure| anyhow::anyhow!("{when}: {address}: {failure:?}"))
            })?;
            assert_eq!(answer, "hello", "{when}: {address}");
        }
        assert_eq!(self.lab.router.leaked()?, before, "{when}: leaked");
        Ok(())
    }

    fn server_status(&self, condition: impl Fn(&Value) -> bool) -> Result<Value> {
        let server = &self.lab.control_plane.servers[0].daemon;
        server.wait_status(Duration::from_secs(20), condition)
    }
}

fn no_agent(status: &Value) -> bool {
    status["agents"].as_array().is_some_and(Vec::is_empty)
}

/// From a server without an agent to one whose agent is forgotten, with an agent in between that
/// claims the whole internet: each captured destination is served or refused with its errno, and
/// what is not captured is left alone all the while.
#[test]
fn nothing_captured_leaves_by_the_ordinary_route() -> Result<()> {
    if !lab::available()? || !lab::kernel_since((6, 1), lab::ERRNOS)? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.control_plane.add_ordinary_route()?;
    lab.router.netns.ip(&format!(
        "route add 10.98.0.0/16 via {}\nroute add fd00:98::/32 via {}\n",
        address::node(1),
        address::node_v6(1),
    ))?;
    lab.configure_connector()?;
    let mut capture = Capture { lab };
    let (nodes, nobodys) = (address::nodes(1), parsed(NOBODYS)?);

    let server = &mut capture.lab.control_plane.servers[0].daemon;
    server.configure(|config| config["limits"] = json!({"forget": "3s"}))?;
    server.start()?;
    capture.server_status(no_agent)?;
    let when = "no agent was ever there";
    capture.refused(nodes, ErrorKind::NetworkUnreachable, when)?;
    capture.refused(nobodys, ErrorKind::NetworkUnreachable, when)?;
    capture.untouched(when)?;

    let claims = json!(["0.0.0.0/0", "::/0"]);
    let agent = capture.lab.worker("w1")?.agent()?;
    agent.configure(|config| {
        config["serve"]["cidrs"] = claims.clone();
        config["serve"]["default_route"] = true.into();
    })?;
    agent.start()?;
    agent.wait_ready(PATIENCE)?;
    let when = "the agent claims everything and is granted nothing";
    capture.served(when)?;
    let status = capture.server_status(|status| !no_agent(status))?;
    let refused = status["agents"][0]["refused"].as_array().map(Vec::len);
    assert_eq!(
        refused,
        Some(3),
        "both ranges and the default route: {status}"
    );
    capture.refused(nobodys, ErrorKind::NetworkUnreachable, when)?;
    capture.untouched(when)?;

    let server = &mut capture.lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        config["policy"]["grants"] = json!([{
            "identity": "spiffe://cluster.local/agent/w1",
            "cidrs": claims,
            "default_route": true,
        }]);
    })?;
    server.signal(Signal::SIGHUP)?;
    let agent = capture.lab.worker("w1")?.agent()?;
    agent.restart()?;
    agent.wait_ready(PATIENCE)?;
    let when = "the agent claims everything and is granted it";
    capture.served(when)?;
    capture.server_status(|status| {
        let agents = status["agents"].as_array();
        agents.is_some_and(|all| {
            all.iter()
                .any(|agent| agent["refused"].as_array().is_some_and(Vec::is_empty))
        })
    })?;
    for address in nobodys {
        // Served now, by an agent that may not dial it.
        let before = capture.lab.router.leaked()?;
        let asked = || Ok(ask(echo(address), "hello"));
        let asked = capture.lab.control_plane.as_apiserver(asked)?;
        ensure!(
            asked.as_ref().is_err_and(Failure::is_reset),
            "{when}: {address}: {asked:?}"
        );
        assert_eq!(
            capture.lab.router.leaked()?,
            before,
            "{when}: {address} leaked"
        );
    }
    capture.untouched(when)?;

    capture.lab.worker("w1")?.agent()?.terminate()?;
    capture.server_status(no_agent)?;
    let when = "the agent is gone";
    capture.refused(nodes, ErrorKind::HostUnreachable, when)?;
    capture.refused(nobodys, ErrorKind::HostUnreachable, when)?;
    capture.untouched(when)?;

    let when = "the agent is forgotten";
    eventually(Duration::from_secs(20), || {
        capture.refused(nodes, ErrorKind::NetworkUnreachable, when)
    })
}
