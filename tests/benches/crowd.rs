//! Many agents in one process: sessions with one server that offer routes and then only stay alive.
//!
//! ```text
//! crowd SERVER FOLDER SESSIONS SESSIONS-OF-ONE-IDENTITY ROUTES
//! ```
//!
//! Session n has the certificate `FOLDER/crowd-(n / SESSIONS-OF-ONE-IDENTITY)/agent.crt`. When the
//! server has taken all of them in, the line `ready` is printed.

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, process};

use anyhow::{Context, Result, bail};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, TransportConfig};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::task::{LocalSet, spawn_local};
use tunnel_proto::control::VERSION;
use tunnel_proto::route::Claim;
use tunnel_proto::session::{AgentEvent, AgentSession, Hello, InstanceId, Timers};

/// Sessions that are being opened at the same time.
const AT_ONCE: usize = 32;
/// The first of the networks that are offered, of 64 addresses each.
const FIRST: u32 = 0x0a80_0000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [server, folder, sessions, of_one, routes] = &arguments[..] else {
        bail!("arguments: SERVER FOLDER SESSIONS SESSIONS-OF-ONE-IDENTITY ROUTES");
    };
    let server: SocketAddr = server.parse()?;
    let (sessions, of_one): (usize, usize) = (sessions.parse()?, of_one.parse()?);
    let routes: usize = routes.parse()?;
    let welcomed = Rc::new(Cell::new(0));
    let endpoint = Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into())?;
    let configs = (0..sessions.div_ceil(of_one))
        .map(|number| config(&Path::new(folder).join(format!("crowd-{number}"))))
        .collect::<Result<Vec<_>>>()?;
    LocalSet::new()
        .run_until(async {
            for number in 0..sessions {
                let share = routes * number / sessions..routes * (number + 1) / sessions;
                let identity = number / of_one;
                let first = routes * (identity * of_one) / sessions;
                let offer = share.map(|route| claim(identity, route - first));
                let offer = offer.collect::<Result<_>>()?;
                let dial = endpoint.connect_with(configs[identity].clone(), server, "cpc")?;
                let session = session(dial, number, offer, welcomed.clone());
                spawn_local(async move {
                    if let Err(error) = session.await {
                        eprintln!("session {number}: {error:#}");
                        process::exit(1);
                    }
                });
                while number + 1 >= welcomed.get() + AT_ONCE {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            while welcomed.get() < sessions {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            println!("ready");
            std::future::pending().await
        })
        .await
}

/// Returns a route of an identity, within the /11 of its grant.
fn claim(identity: usize, route: usize) -> Result<Claim> {
    let (identity, route) = (u32::try_from(identity)?, u32::try_from(route)?);
    let network = Ipv4Addr::from(FIRST + (identity << 21) + (route << 6));
    Ok(Claim::Cidr(format!("{network}/26").parse()?))
}

/// Lives until the server ends it.
async fn session(
    dial: quinn::Connecting,
    number: usize,
    offer: Vec<Claim>,
    welcomed: Rc<Cell<usize>>,
) -> Result<()> {
    let connection = dial.await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    let hello = Hello {
        version: VERSION,
        agent_id: format!("crowd-{number}"),
        instance_id: InstanceId((number as u128).to_be_bytes()),
        node: format!("crowd-{number}"),
        software_version: "0".into(),
        features: Vec::new(),
        offer,
        predecessor: None,
        incarnation: 0,
    };
    let mut session = AgentSession::new(hello, Timers::default(), Instant::now())?;
    let mut buffer = vec![0; 4096];
    loop {
        while let Some(bytes) = session.poll_transmit() {
            send.write_chunk(bytes).await?;
        }
        while let Some(event) = session.poll_event() {
            match event {
                AgentEvent::Welcomed(welcome) if welcome.refused.is_empty() => {
                    welcomed.set(welcomed.get() + 1);
                }
                AgentEvent::Welcomed(welcome) => bail!("refused: {:?}", welcome.refused.first()),
                AgentEvent::Draining { .. } => return Ok(()),
                _ => (),
            }
        }
        let timeout = session.poll_timeout().context("the session is over")?;
        tokio::select! {
            read = recv.read(&mut buffer) => {
                let count = read?.context("the server has ended the session")?;
                session.handle_bytes(&buffer[..count], Instant::now())?;
            }
            () = tokio::time::sleep_until(timeout.into()) => (),
        }
        session.handle_timeout(Instant::now())?;
    }
}

/// Returns the configuration with the certificate in `folder`.
fn config(folder: &Path) -> Result<ClientConfig> {
    let chain = CertificateDer::pem_file_iter(folder.join("agent.crt"))?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("ca.crt"))?)?;
    let provider = Arc::new(default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyName(verifier.build()?)))
        .with_client_auth_cert(
            chain.collect::<Result<_, _>>()?,
            PrivateKeyDer::from_pem_file(folder.join("agent.key"))?,
        )?;
    tls.alpn_protocols = vec![b"cpc/1".to_vec()];
    let mut transport = TransportConfig::default();
    transport
        .keep_alive_interval(Some(Duration::from_secs(10)))
        .max_concurrent_bidi_streams(8_u32.into());
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// Checks signatures, not the server's identity: the server is in the benchmark's own namespace.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
