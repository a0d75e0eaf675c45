//! A server beside the Kubernetes API: its leases, and the metrics that dashboards made for
//! Konnectivity look for.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_fake_kubernetes::FakeKubernetes;
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);

/// The API in the control plane's network, and the server told of it.
fn with_kubernetes(lab: &mut Lab) -> Result<FakeKubernetes> {
    let netns = &lab.control_plane.netns;
    let api = FakeKubernetes::serve(netns.enter(|| Ok(TcpListener::bind("127.0.0.1:0")?))?)?;
    let kubeconfig = lab.folder().join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig())?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        config["leases"] = json!({"label": "app=us", "kubeconfig": kubeconfig});
    })?;
    server.restart()?;
    server.wait_ready(SOON)?;
    Ok(api)
}

fn through(lab: &Lab, destination: SocketAddr) -> Result<()> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let stream = connect_through(proxy, &destination.to_string())?;
    stream.set_read_timeout(Some(SOON))?;
    round_trips(stream, 1).map(drop)
}

#[test]
fn a_server_holds_a_lease_while_it_takes_connections() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let api = with_kubernetes(&mut lab)?;
    let lease = eventually(SOON, || api.leases().pop().context("no lease"))?;
    let holder = lease["spec"]["holderIdentity"].as_str().context("nobody")?;
    let metadata = &lease["metadata"];
    assert_eq!(
        metadata["name"],
        *format!("konnectivity-proxy-server-{holder}")
    );
    assert_eq!(metadata["namespace"], "kube-system");
    assert_eq!(metadata["labels"], json!({"app": "us"}));
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 30);

    lab.control_plane.servers[0].daemon.terminate()?;
    assert_eq!(api.leases(), Vec::<Value>::new());
    Ok(())
}

#[test]
fn dashboards_of_konnectivity_find_their_metrics() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let before = lab.control_plane.servers[0].daemon.get("/metrics")?.1;
    ensure!(!before.contains("konnectivity_network_proxy"), "{before}");
    let _api = with_kubernetes(&mut lab)?;
    through(&lab, (address::node(1), Behaviour::Echo.port()).into())?;
    ensure!(through(&lab, "10.9.9.9:1".parse()?).is_err());
    ensure!(through(&lab, (address::node(1), 1).into()).is_err());

    let server = &lab.control_plane.servers[0].daemon;
    eventually(SOON, || {
        let text = server.get("/metrics")?.1;
        for sample in [
            "http_connections 0",
            "dial_duration_seconds_count 1",
            "connection_duration_seconds_count 1",
            "established_connections 0",
            "pending_backend_dials 0",
            "dial_failure_count{reason=\"no_agent\"} 1",
            "dial_failure_count{reason=\"error_response\"} 1",
            "ready_backend_connections 1",
            "ready_backends{proxy_strategy=\"destHost\"} 1",
            "ready_backends{proxy_strategy=\"defaultRoute\"} 0",
            "lease_list_total{http_status_code=\"200\",reason=\"\"} 1",
            "culled_leases_count 0",
        ] {
            let line = format!("\nkonnectivity_network_proxy_server_{sample}\n");
            ensure!(text.contains(&line), "no {sample} in {text}");
        }
        Ok(())
    })
}
