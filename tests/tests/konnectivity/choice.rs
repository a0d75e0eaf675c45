//! The choice of an agent by `cpc server`, in agreement with the peer and better.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client::eventually;
use tunnel_tests::lab;

use crate::client::{Client, metadata};
use crate::scene::{GRPC, Scene};
use crate::script::Script;
use crate::script_agent::ScriptAgent;
use crate::wire::{self, PROXY};

/// Time until a faulty agent is skipped, and room for a busy machine.
const LEFT_OUT: Duration = Duration::from_secs(20);

/// Dials `destination`, which `agent` has to be asked for. The connection stays as long as what is
/// returned.
fn goes_to(scene: &Scene, destination: &str, agent: &mut ScriptAgent, id: i64) -> Result<Script> {
    let mut client = scene.client_at(scene.grpc())?;
    client.send(wire::dial(destination, id))?;
    let request = agent
        .accept(id)
        .with_context(|| format!("{destination} went elsewhere"))?;
    ensure!(request.address == destination, "{request:?}");
    let response = client.dial_response()?;
    ensure!(response.error.is_empty(), "{response:?}");
    Ok(client)
}

fn goes_nowhere(scene: &Scene, destination: &str) -> Result<()> {
    let response = scene.client_at(scene.grpc())?.dial(destination, 99)?;
    ensure!(
        response.error.starts_with("No agent available"),
        "{destination}: {response:?}"
    );
    Ok(())
}

/// The frontend's list decides about its clients' requests, whatever agents serve: the server asks
/// no agent for the rest.
#[test]
fn a_frontend_has_an_allow_list_of_its_own() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::with_server(1, |config| {
        config["frontends"]["grpc"][0]["allow"] = json!([{"name": "*.svc", "ports": [443]}]);
    })?;
    let mut agent = scene.script_agent(1, "all", "default-route=true")?;
    let _kept = goes_to(&scene, "web.svc:443", &mut agent, 1)?;
    for (id, destination) in [
        (2, "web.svc:80"),
        (3, "127.0.0.1:443"),
        (4, "web.other:443"),
    ] {
        let response = scene.client_at(scene.grpc())?.dial(destination, id)?;
        ensure!(
            response.error.contains("allow-list for grpc"),
            "{destination}: {response:?}"
        );
    }
    // The next that it is asked is the next that it may be asked.
    let _kept = goes_to(&scene, "a.svc:443", &mut agent, 5)?;
    Ok(())
}

/// Networks count as identifiers: the narrowest is asked, before the default route.
#[test]
fn networks_are_identifiers_too() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::with_server(1, |_| ())?;
    let mut wide = scene.script_agent(1, "wide", "cidr=10.50.0.0%2F16&cidr=fd50::%2F32")?;
    let mut narrow = scene.script_agent(1, "narrow", "cidr=10.50.7.0%2F24")?;
    let mut host = scene.script_agent(1, "host", "ipv4=10.50.7.7&host=node.example")?;
    let mut route = scene.script_agent(1, "route", "default-route=true")?;
    let _open = [
        goes_to(&scene, "10.50.1.1:80", &mut wide, 1)?,
        goes_to(&scene, "[fd50::1]:80", &mut wide, 2)?,
        goes_to(&scene, "10.50.7.1:80", &mut narrow, 3)?,
        goes_to(&scene, "10.50.7.7:80", &mut host, 4)?,
        goes_to(&scene, "node.example:80", &mut host, 5)?,
        goes_to(&scene, "10.51.0.1:80", &mut route, 6)?,
    ];
    Ok(())
}

/// Without belief an identifier counts as far as the agent's identity is granted it.
#[test]
fn an_unbelieved_agent_serves_what_it_is_granted() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::with_server(1, |config| {
        config["konnectivity"]["believe_identifiers"] = json!(false);
        config["policy"]["grants"] = json!([{
            "identity": "spiffe://cluster.local/agent/agent",
            "cidrs": ["10.60.0.0/16"],
        }]);
    })?;
    let mut agent =
        scene.script_agent(1, "a", "ipv4=10.60.0.1&ipv4=10.61.0.1&default-route=true")?;
    let _open = goes_to(&scene, "10.60.0.1:80", &mut agent, 1)?;
    goes_nowhere(&scene, "10.61.0.1:80")?;
    goes_nowhere(&scene, "10.62.0.1:80")?;
    agent.quiet()
}

/// Two agents for one address share what there is to do; one that falls silent is left out, and
/// comes back when it is heard again.
pub(crate) fn equals_share_and_who_is_ill_is_left_out() -> Result<()> {
    let scene = Scene::with_server(1, |_| ())?;
    let mut agents = [
        scene.script_agent(1, "one", "ipv4=10.70.0.1")?,
        scene.script_agent(1, "two", "ipv4=10.70.0.1")?,
    ];
    let mut open = Vec::new();
    let mut counts = [0; 2];
    for id in 1..=20 {
        let client = scene.client_at(scene.grpc())?;
        client.send(wire::dial("10.70.0.1:80", id))?;
        let asked = eventually(Duration::from_secs(5), || {
            for (at, agent) in agents.iter_mut().enumerate() {
                let packet = agent.packet_or_end(Duration::from_millis(20))?;
                if let Some(packet) = packet {
                    return Ok((at, packet?));
                }
            }
            anyhow::bail!("nobody was asked")
        });
        let (at, packet) = asked?;
        let Some(wire::Payload::DialRequest(request)) = packet.content() else {
            anyhow::bail!("{packet:?} came");
        };
        agents[at].answer(request, id)?;
        counts[at] += 1;
        open.push(client);
    }
    ensure!(counts.iter().all(|count| *count >= 7), "{counts:?}");

    let [one, two] = &mut agents;
    one.reflex.mute(true);
    eventually(LEFT_OUT, || {
        // Whoever is asked has to answer before the next try.
        for id in 100..104 {
            let client = scene.client_at(scene.grpc())?;
            client.send(wire::dial("10.70.0.1:80", id))?;
            two.accept(id).context("the silent one is asked")?;
            open.push(client);
        }
        Ok(())
    })?;
    one.reflex.mute(false);
    Ok(())
}

/// gRPC over TCP: with a certificate of the clients' authority, and not without.
#[test]
fn clients_prove_themselves_over_tcp() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::with_server(1, |_| ())?;
    let mut agent = scene.script_agent(1, "a", "ipv4=10.80.0.1")?;
    let place = &scene.control_plane;
    let address = format!("127.0.0.1:{GRPC}");
    let client = place.run(Client::tls(address.clone(), scene.agent.client()?))?;
    let mut client = client.script(place, PROXY, metadata(&[])?, 1);
    client.send(wire::dial("10.80.0.1:80", 1))?;
    agent.accept(1)?;
    let id = client.dial_response()?.connect_id;
    client.send(wire::data(id, "hello"))?;
    ensure!(agent.data(1, 5)? == b"hello");

    let refused = match place.run(Client::tls(address, scene.agent.anonymous()?)) {
        Err(_) => true,
        Ok(client) => {
            let mut client = client.script(place, PROXY, metadata(&[])?, 1);
            // Refused at once, or as soon as something is asked.
            client.send(wire::dial("10.80.0.1:80", 2)).is_err() || client.dial_response().is_err()
        }
    };
    ensure!(refused, "let in without a certificate");
    agent.quiet()
}
