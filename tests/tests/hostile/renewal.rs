//! An attacker with a server's key, without a CA's: its answers to a renewal do not make it a CA.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use quinn::Connection;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use tunnel_proto::certificate::Issued;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::{InstanceId, ServerEvent, ServerSession, Timers, Welcome};
use tunnel_tests::lab::config::ConnectorPki;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};

use crate::peer::{self, Credentials};
use crate::scene::{SOON, runtime};

fn place() -> SocketAddr {
    (address::server(1), 9000).into()
}

fn der(folder: &Path) -> Result<Vec<u8>> {
    let certificate = CertificateDer::from_pem_file(folder.join("ca.crt"));
    Ok(certificate.context("ca.crt")?.to_vec())
}

/// Returns the answer to a request: a certificate by the CA in `evil`, which comes along beside the
/// one in `genuine`.
fn issue(csr: &[u8], evil: &Path, genuine: &Path) -> Result<Issued> {
    let read = |file: &str| fs::read_to_string(evil.join(file));
    let key = KeyPair::from_pem(&read("ca.key")?)?;
    let issuer = Issuer::from_ca_cert_pem(&read("ca.crt")?, key)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/agent/w1".try_into()?)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (SystemTime::now() - Duration::from_secs(300)).into();
    params.not_after = (SystemTime::now() + Duration::from_secs(86_400)).into();
    let csr = CertificateSigningRequestParams::from_der(&csr.into())?;
    let leaf = params.signed_by(&csr.public_key, &issuer)?;
    Ok(Issued {
        chain: vec![leaf.der().to_vec()],
        roots: vec![der(genuine)?, der(evil)?],
    })
}

/// Welcomes the agent, and answers what it asks for.
async fn serve(connection: Connection, answer: impl Fn(&[u8]) -> Result<Issued>) -> Result<()> {
    let (mut send, mut recv) = connection.accept_bi().await?;
    let mut session = ServerSession::new(Timers::default(), Instant::now());
    loop {
        let chunk = recv.read_chunk(1 << 16, true).await?.context("it left")?;
        session.handle_bytes(&chunk.bytes, Instant::now())?;
        while let Some(event) = session.poll_event() {
            match event {
                ServerEvent::Hello(hello) => session.welcome(
                    Welcome {
                        version: VERSION,
                        server_id: "s1".into(),
                        server_count: 1,
                        instance_id: InstanceId([9; 16]),
                        accepted: hello.offer,
                        refused: Vec::new(),
                        heartbeat: Duration::from_secs(60),
                        incarnation: 0,
                    },
                    Instant::now(),
                )?,
                ServerEvent::CertificateRequest(csr) => session.certificate(&Ok(answer(&csr)?))?,
                _ => {}
            }
        }
        while let Some(bytes) = session.poll_transmit() {
            send.write_chunk(bytes).await?;
        }
    }
}

/// The agent keeps its certificate and its CA, and says why.
#[test]
fn a_stolen_server_key_brings_no_ca() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let programs = Programs::of_this_test()?;
    let cpc = programs.cpc.clone();
    let mut lab = Lab::without_connector(LabSpec {
        redirect: false,
        ..LabSpec::new(programs)
    })?;
    lab.configure_connector()?;
    let (genuine, evil) = (lab.folder().join("pki"), lab.folder().join("evil"));
    ConnectorPki::create(&cpc, evil.clone())?;
    let stolen = lab.folder().join("stolen");
    let out = stolen.to_str().context("not UTF-8")?;
    lab.pki().run("server", &["--id", "s1", "--out", out])?;

    // Its certificate is due: it counts from five minutes ago.
    let own = lab.workers[0].agent()?.config_file().with_file_name("own");
    let out = own.to_str().context("not UTF-8")?;
    let end = humantime::format_rfc3339_seconds(SystemTime::now() + Duration::from_secs(60));
    let end = end.to_string();
    let request = ["--node", "w1", "--not-after", &end, "--out", out];
    lab.pki().run("agent", &request)?;
    let pair = [
        fs::read(own.join("agent.key"))?,
        fs::read(own.join("agent.crt"))?,
    ]
    .concat();
    fs::write(own.join("agent.pem"), &pair)?;
    lab.workers[0].agent()?.configure(|config| {
        config["servers"] = json!([place()]);
        config["tls"] = json!({
            "cert": "own/agent.pem", "key": "own/agent.pem", "ca": "own/ca.crt", "renew": true,
        });
    })?;

    let runtime = runtime()?;
    let netns = &lab.control_plane.netns;
    let socket = netns.enter(|| Ok(UdpSocket::bind(place())?))?;
    let credentials = Credentials::read(&stolen, "server")?;
    let endpoint = peer::server(&runtime, socket, &credentials, 1)?;
    let ca = genuine.clone();
    runtime.spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            if let Ok(connection) = incoming.await {
                let _ = serve(connection, |csr| issue(csr, &evil, &ca)).await;
            }
        }
    });
    let agent = lab.workers[0].agent()?;
    agent.start()?;
    let refused = ["WARN", "certificate not renewed", "was not issued by a CA"];
    agent.wait_log(SOON, 0, &refused)?;
    ensure!(fs::read(own.join("agent.pem"))? == pair, "its certificate");
    let ca = fs::read(own.join("ca.crt"))?;
    ensure!(ca == fs::read(genuine.join("ca.crt"))?, "its CA");
    agent.check()
}
