//! A proxy-server with clients over TCP: a client with a certificate of the clients' authority
//! reaches the target, and no other one gets as far as a request.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use tunnel_tests::client::eventually;
use tunnel_tests::lab::{self, address};

use crate::authority::{Authority, Credentials};
use crate::program::{Maker, Program};
use crate::scene::Scene;
use crate::script::SOON;

/// Address for clients.
pub(crate) const FRONTEND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8090);
/// Text of curl about a CONNECT without an answer.
const UNANSWERED: &str = "000";

/// Starts a proxy-server with HTTP CONNECT over TCP; clients have to be vouched for by the
/// authority of its own certificate.
pub(crate) fn proxy_server(scene: &Scene, maker: &Maker, more: &[&str]) -> Result<Program> {
    let Credentials { ca, cert, key } = &scene.server;
    let flags = [
        "--uds-name=".to_owned(),
        format!("--server-bind-address={}", FRONTEND.ip()),
        format!("--server-port={}", FRONTEND.port()),
        format!("--server-cert={}", cert.display()),
        format!("--server-key={}", key.display()),
        format!("--server-ca-cert={}", ca.display()),
    ];
    let flags = flags.iter().map(String::as_str);
    let flags: Vec<_> = flags.chain(more.iter().copied()).collect();
    let mut server = scene.proxy_server(maker, "http-connect", &flags)?;
    server.wait_healthy(SOON)?;
    Ok(server)
}

/// Asks the kubelet's stand-in through the proxy, as a client with this certificate if any. Gives
/// the status of CONNECT and the kubelet's answer.
fn curl(scene: &Scene, credentials: Option<&Credentials>) -> Result<(String, String)> {
    let mut curl = scene.lab.control_plane.netns.command("curl")?;
    curl.args(["--silent", "--max-time", "10", "--proxytunnel", "--proxy"])
        .arg(format!("https://{FRONTEND}"))
        .arg("--proxy-cacert")
        .arg(&scene.server.ca)
        .arg("--cacert")
        .arg(scene.lab.cluster_pki.ca());
    if let Some(credentials) = credentials {
        curl.arg("--proxy-cert").arg(&credentials.cert);
        curl.arg("--proxy-key").arg(&credentials.key);
    }
    curl.args(["--write-out", "|%{http_connect}"]);
    let output = curl
        .arg(format!("https://{}:10250/healthz", address::node(1)))
        .output()?;
    let said = String::from_utf8(output.stdout)?;
    let (body, status) = said.rsplit_once('|').context("curl said nothing")?;
    Ok((status.to_owned(), body.to_owned()))
}

#[test]
fn a_client_proves_itself_over_tcp() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for maker in Maker::all()? {
        let scene = Scene::new(1)?;
        let server = proxy_server(&scene, &maker, &[])?;
        let _agent = scene.proxy_agent(&maker, 1, &[])?;
        let told = || format!("beside {maker:?}, which said:\n{}", server.log());
        clients(&scene).with_context(told)?;
    }
    Ok(())
}

fn clients(scene: &Scene) -> Result<()> {
    let client = scene.authority.issue("kube-apiserver", &[])?;
    let known = || {
        let (status, answer) = curl(scene, Some(&client))?;
        // The kubelet's own answer to a caller without one of its certificates.
        ensure!(
            status == "200" && answer == "Unauthorized\n",
            "{status} {answer:?}"
        );
        Ok(())
    };
    eventually(SOON, known).context("with the right certificate")?;

    // The same name, but who says so?
    let strange = Authority::create(scene.lab.folder().join("strange"))?;
    let stranger = strange.issue("kube-apiserver", &[])?;
    for (who, credentials) in [("nobody", None), ("a stranger", Some(&stranger))] {
        let answer = curl(scene, credentials)?;
        ensure!(
            answer == (UNANSWERED.to_owned(), String::new()),
            "{who}: {answer:?}"
        );
        // It was no outage.
        known().with_context(|| format!("after {who}"))?;
    }
    Ok(())
}
