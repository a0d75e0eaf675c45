//! Certificates that prove nothing, or something else, on each side of the tunnel and at the
//! frontend.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::lab::config::ConnectorPki;
use tunnel_tests::lab::{self, Programs, address};

use crate::peer::{self, Credentials};
use crate::scene::{SOON, Scene, runtime};

/// A certificate that must be refused, and what the refusing side says of it.
struct Case {
    name: &'static str,
    folder: PathBuf,
    /// The files' name.
    role: &'static str,
    says: &'static str,
}

/// Returns certificates of an unknown issuer, after their end, of another domain, and of two other
/// roles. `subject` issues a certificate that has this one fault.
fn cases(pki: &ConnectorPki, folder: &Path, role: &'static str, id: &str) -> Result<Vec<Case>> {
    let cpc = Programs::of_this_test()?.cpc;
    let authority = |name: &str, domain: &str| -> Result<ConnectorPki> {
        let pki = ConnectorPki::at(&cpc, folder.join(name).join("ca"));
        pki.run("init", &["--trust-domain", domain])?;
        Ok(pki)
    };
    let issue = |pki: &ConnectorPki, name, role, more: &[&str], says| -> Result<Case> {
        let out = folder.join(name);
        let text = out.to_str().context("the folder's name is not UTF-8")?;
        let subject = match role {
            "server" => "--id",
            "agent" => "--node",
            _ => "--name",
        };
        let arguments = [&[subject, id, "--out", text], more].concat();
        pki.run(role, &arguments)?;
        Ok(Case {
            name,
            folder: out,
            role,
            says,
        })
    };
    let expired = ["--not-after", "2020-01-01T00:00:00Z"];
    let others = ["server", "agent", "client"];
    let mut others = others.into_iter().filter(|other| *other != role);
    let (one, two) = (others.next().unwrap_or(""), others.next().unwrap_or(""));
    let right = "its certificate is for another role";
    Ok(vec![
        issue(
            &authority("stranger", "cluster.local")?,
            "stranger",
            role,
            &[],
            "was not issued by a CA",
        )?,
        issue(pki, "expired", role, &expired, "expired")?,
        issue(
            &authority("foreign", "other.local")?,
            "foreign",
            role,
            &[],
            "trust domain that is not trusted",
        )?,
        issue(pki, "one-role", one, &[], right)?,
        issue(pki, "another-role", two, &[], right)?,
    ])
}

/// The server refuses each, logs and counts that, and welcomes only the honest agent.
#[test]
fn a_server_lets_in_no_agent_that_proves_nothing() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|_| Ok(()))?;
    let runtime = runtime()?;
    let cases = cases(&scene.lab.pki(), &scene.folder("bad"), "agent", "w2")?;
    let netns = scene.lab.workers[1].netns.clone();
    let server = scene.tunnel();
    for case in &cases {
        let seen = scene.server().log().len();
        let credentials = Credentials::read(&case.folder, case.role)?;
        let endpoint = peer::agent(
            &runtime,
            netns.enter(peer::any_port)?,
            Some(&credentials),
            10,
        )?;
        let refused = runtime.block_on(async {
            let connection = peer::dial(&endpoint, server).await?;
            // Nothing is ever heard of an offer made before the server has judged.
            let (mut send, mut recv) = connection.open_bi().await?;
            let _ = send.write_all(&peer::introduction("w2", &[])?).await;
            anyhow::Ok(recv.read_chunk(1, true).await.map(|chunk| chunk.is_some()))
        });
        ensure!(
            !matches!(refused, Ok(Ok(true))),
            "{}: the server answered",
            case.name
        );
        let pieces = ["WARN", "handshake failed", case.says];
        scene
            .server()
            .wait_log(SOON, seen, &pieces)
            .context(case.name)?;
    }
    let failed = scene.metric("cpc_handshakes_failed_total{why=\"tls\"}")?;
    assert_eq!(failed, cases.len() as f64);
    let status = scene.server().wait_status(SOON, |_| true)?;
    assert_eq!(
        status["agents"].as_array().map(Vec::len),
        Some(1),
        "{status}"
    );
    scene.unharmed()
}

/// The agent refuses each, says so with the server's address, and keeps its tunnel to the honest
/// server.
#[test]
fn an_agent_believes_no_server_that_proves_nothing() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let address = |at: usize| SocketAddr::from((address::server(1), 9000 + at as u16));
    let runtime = runtime()?;
    let let_in = Arc::new(AtomicUsize::new(0));
    let mut all = Vec::new();
    let mut scene = Scene::new(|lab| {
        all = cases(&lab.pki(), &lab.folder().join("bad"), "server", "s2")?;
        for (at, case) in all.iter().enumerate() {
            let credentials = Credentials::read(&case.folder, case.role)?;
            let netns = &lab.control_plane.netns;
            let socket = netns.enter(|| Ok(UdpSocket::bind(address(at))?))?;
            let endpoint = peer::server(&runtime, socket, &credentials, 1)?;
            let let_in = let_in.clone();
            runtime.spawn(async move {
                while let Some(incoming) = endpoint.accept().await {
                    if incoming.await.is_ok() {
                        let_in.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        lab.control_plane.servers[0]
            .daemon
            .configure(|config| config["server_count"] = json!(2))?;
        lab.workers[0].agent()?.configure(|config| {
            if let Some(servers) = config["servers"].as_array_mut() {
                servers.extend((0..all.len()).map(|at| json!(address(at))));
            }
        })
    })?;
    for (at, case) in all.iter().enumerate() {
        let address = address(at).to_string();
        let pieces = ["WARN", "server not reached", &address, case.says];
        scene
            .agent()?
            .wait_log(SOON, 0, &pieces)
            .context(case.name)?;
    }
    assert_eq!(let_in.load(Ordering::Relaxed), 0);
    let status = scene.agent()?.wait_status(SOON, |_| true)?;
    assert_eq!(
        status["servers"].as_array().map(Vec::len),
        Some(1),
        "{status}"
    );
    scene.unharmed()
}

/// HTTP CONNECT over TLS is for clients: the same CA's certificates for agents and servers are no
/// way in, nor is none, nor a stranger's.
#[test]
fn the_tls_frontend_lets_in_clients_only() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|_| Ok(()))?;
    let pki = scene.lab.pki();
    let good = scene.folder("good");
    let out = good.to_str().context("the folder's name is not UTF-8")?;
    pki.run("client", &["--name", "kube-apiserver", "--out", out])?;
    let cases = cases(&pki, &scene.folder("bad"), "client", "kube-apiserver")?;

    let sockets = scene.lab.control_plane.servers[0].sockets.clone();
    let netns = scene.lab.control_plane.netns.clone();
    let kubelet = format!("https://{}:10250/healthz", address::node(1));
    let cluster_ca = scene.lab.cluster_pki.ca();
    let curl = |credentials: Option<(&Path, &str)>| -> Result<String> {
        let mut curl = netns.command("curl")?;
        curl.args(["--silent", "--show-error", "--max-time", "10", "--proxy"])
            .arg(format!("https://{}", sockets.connect_tcp))
            .arg("--proxy-cacert")
            .arg(good.join("ca.crt"))
            .arg("--cacert")
            .arg(&cluster_ca);
        if let Some((folder, role)) = credentials {
            let file = folder.join(role);
            curl.arg("--proxy-cert").arg(file.with_extension("crt"));
            curl.arg("--proxy-key").arg(file.with_extension("key"));
        }
        let output = curl.arg(&kubelet).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // The kubelet's own answer to a caller without one of its certificates.
    assert_eq!(curl(Some((&good, "client")))?, "Unauthorized\n");
    for case in &cases {
        // The frontend's CA is named in its configuration, and vouches for whom it has issued.
        let says = match case.name {
            "stranger" => "UnknownIssuer",
            "foreign" => "is not of cluster.local",
            _ => case.says,
        };
        let seen = scene.server().log().len();
        assert_eq!(curl(Some((&case.folder, case.role)))?, "", "{}", case.name);
        let pieces = ["WARN", "frontend handshake failed", says];
        scene
            .server()
            .wait_log(SOON, seen, &pieces)
            .context(case.name)?;
    }
    let seen = scene.server().log().len();
    assert_eq!(curl(None)?, "");
    let pieces = ["frontend handshake failed", "no certificates"];
    scene.server().wait_log(SOON, seen, &pieces)?;
    scene.unharmed()
}
