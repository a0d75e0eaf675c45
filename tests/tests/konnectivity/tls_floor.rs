//! TLS versions of a proxy-server, on the port of its agents and on that of its clients. The test
//! uses OpenSSL, which offers what neither side of ours would.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use tunnel_tests::lab;

use crate::frontend_tcp::{FRONTEND, proxy_server};
use crate::program::Maker;
use crate::scene::{AGENTS, Scene};

const STRONGEST: &str = "ECDHE-ECDSA-AES256-GCM-SHA384";
const OTHER: &str = "ECDHE-ECDSA-AES128-GCM-SHA256";

/// OpenSSL's arguments, and what it says then.
type Case = (&'static [&'static str], &'static str);

/// OpenSSL by itself would not offer what is so old.
const TLS_1_1: &[&str] = &["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"];
/// The server's word, of which there are several: a hello of that age lacks more than a version.
const REFUSED: &str = "SSL alert number";
const WRONG_VERSION: &str = "alert protocol version";
const NO_COMMON_SUITE: &str = "alert handshake failure";

#[test]
fn old_versions_are_refused() -> Result<()> {
    each(
        &[],
        &[
            (TLS_1_1, REFUSED),
            (&["-tls1_2"], "Protocol version: TLSv1.2"),
            (&["-tls1_3"], "Protocol version: TLSv1.3"),
        ],
    )
}

#[test]
fn the_floor_can_be_raised() -> Result<()> {
    each(
        &["--tls-min-version=VersionTLS13"],
        &[
            (TLS_1_1, REFUSED),
            (&["-tls1_2"], WRONG_VERSION),
            (&["-tls1_3"], "Protocol version: TLSv1.3"),
        ],
    )
}

/// Go's names. They are about TLS 1.2 alone.
#[test]
fn listed_suites_are_spoken_alone() -> Result<()> {
    each(
        &["--cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"],
        &[
            (
                &["-tls1_2", "-cipher", STRONGEST],
                "Ciphersuite: ECDHE-ECDSA-AES256-GCM-SHA384",
            ),
            (&["-tls1_2", "-cipher", OTHER], NO_COMMON_SUITE),
            (
                &["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"],
                "Ciphersuite: TLS_AES_128_GCM_SHA256",
            ),
        ],
    )
}

/// Asks both ports of a proxy-server with these flags, the peer's too where there is one.
fn each(flags: &[&str], cases: &[Case]) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for maker in Maker::all()? {
        let scene = Scene::new(1)?;
        let server = proxy_server(&scene, &maker, flags)?;
        for (port, protocol) in [(AGENTS, "h2"), (FRONTEND.port(), "http/1.1")] {
            for (arguments, expected) in cases {
                let said = s_client(&scene, port, protocol, arguments)?;
                let told = || {
                    let log = server.log();
                    format!("{maker:?}, port {port}, {arguments:?}:\n{said}\n{log}")
                };
                ensure!(said.contains(expected), "no {expected:?} from {}", told());
                // A client that is refused after all has not been accepted.
                let refused = said.contains("alert");
                ensure!(refused == expected.contains("alert"), "{}", told());
            }
        }
    }
    Ok(())
}

/// Returns OpenSSL's account of a handshake, as a client with the right certificate.
fn s_client(scene: &Scene, port: u16, protocol: &str, arguments: &[&str]) -> Result<String> {
    let mut openssl = scene.lab.control_plane.netns.command("openssl")?;
    openssl
        .args(["s_client", "-brief", "-connect"])
        .arg(format!("{}:{port}", FRONTEND.ip()))
        .args(["-alpn", protocol])
        .args(arguments)
        .arg("-CAfile")
        .arg(&scene.server.ca)
        .arg("-cert")
        .arg(&scene.agent.cert)
        .arg("-key")
        .arg(&scene.agent.key)
        .stdin(Stdio::null());
    let output = openssl.output().context("openssl")?;
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}
