//! Joining: the first certificate of a worker, for a token. What `cpc agent join` does.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use rustls::pki_types::ServerName;
use rustls::version::TLS13;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tunnel_proto::certificate::{Answer, Join};
use tunnel_proto::join::{self, Reader};

use super::race::{in_turn, race};
use cpc_host::directory::Directory;
use cpc_host::report::report;
use cpc_identity::credential::{Credential, CredentialError, Draft, Expected};
use cpc_identity::pin::PinnedVerifier;
use cpc_identity::{KeyHash, provider};

/// The key and its certificate.
const CREDENTIAL: &str = "agent.pem";

/// Whom to trust.
const CA: &str = "ca.crt";

/// The key as long as it has no certificate.
const PENDING: &str = "joining.key";

/// For one try.
const PATIENCE: Duration = Duration::from_secs(20);

/// Who joins, and where.
#[derive(Debug)]
pub struct Joining {
    /// `host:port` of the join listener.
    pub server: String,
    /// Proof that we may.
    pub token: String,
    /// CAs of which one has to vouch for the server.
    pub pins: Vec<KeyHash>,
    /// The node's name.
    pub node: String,
    /// Its addresses; the one that we reach the server from when empty.
    pub addresses: Vec<IpAddr>,
    /// Where key, certificate and CAs are put.
    pub out: PathBuf,
    /// How long to try while the server is not reached.
    pub patience: Duration,
}

/// What came of it.
pub struct Joined {
    /// What was issued; saved already.
    pub credential: Credential,
    /// Key and certificate.
    pub file: PathBuf,
    /// CAs.
    pub ca: PathBuf,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// There is one.
    #[error("{} is there already; remove it if this node is to join again", .0.display())]
    Exists(PathBuf),
    /// The directory.
    #[error("{}: {why}", path.display())]
    Directory {
        /// Which one.
        path: PathBuf,
        /// What the system says.
        why: io::Error,
    },
    /// Our key, or what was issued.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The server was not reached, or is not the one that was meant.
    #[error("{server}: {why}")]
    Server {
        /// Where.
        server: String,
        /// What went wrong.
        why: io::Error,
    },
    /// The server refuses.
    #[error("{server} refuses: {why}")]
    Refused {
        /// Where.
        server: String,
        /// What it says.
        why: String,
    },
}

/// Joins, and puts what it gets into files. The key stays until there is a certificate, so that a second
/// try after a lost answer gets one for the same use of the token.
///
/// # Errors
/// [`JoinError`].
pub async fn join(joining: &Joining) -> Result<Joined, JoinError> {
    let place = |name| joining.out.join(name);
    let (file, ca, pending) = (place(CREDENTIAL), place(CA), place(PENDING));
    if file.exists() {
        return Err(JoinError::Exists(file));
    }
    make_directory(&joining.out)?;
    let draft = Draft::kept_in(&pending)?;
    let csr = draft.request(&joining.node)?;
    let answer = ask_until_answered(joining, csr).await?;
    let issued = answer.map_err(|why| JoinError::Refused {
        server: joining.server.clone(),
        why,
    })?;
    let expected = Expected::Join {
        name: &joining.node,
        pins: &joining.pins,
    };
    let credential = draft.complete(issued, &expected, &provider())?;
    for (ca, why) in &credential.refused {
        tracing::warn!(ca = ca.subject(), key = %ca.key(), %why, "a CA that the server offers is not trusted");
    }
    credential.save(&file, &ca)?;
    // It stands with its certificate now.
    let _ = Directory::of(&pending).and_then(|(directory, name)| directory.remove(name));
    Ok(Joined {
        credential,
        file,
        ca,
    })
}

fn make_directory(path: &Path) -> Result<(), JoinError> {
    let made = Directory::create(path, 0o755);
    made.map(drop).map_err(|why| JoinError::Directory {
        path: path.into(),
        why,
    })
}

/// A server that is not reached may be about to start; one that answers has answered.
async fn ask_until_answered(joining: &Joining, csr: Vec<u8>) -> Result<Answer, JoinError> {
    let end = Instant::now() + joining.patience;
    let delays = ExponentialBuilder::new().with_min_delay(Duration::from_millis(500));
    let delays = delays.with_max_delay(Duration::from_secs(5));
    let mut delays = delays.without_max_times().with_jitter().build();
    loop {
        let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
        let asked = timeout(PATIENCE, ask(joining, csr.clone())).await;
        let why = match asked.unwrap_or_else(|_| late()) {
            Ok(answer) => return Ok(answer),
            Err(why) => why,
        };
        let delay = delays.next().unwrap_or_default();
        // The wrong server, or garbage: it will be that again.
        let is_final = why.kind() == io::ErrorKind::InvalidData;
        if is_final || Instant::now() + delay > end {
            let server = joining.server.clone();
            return Err(JoinError::Server { server, why });
        }
        tracing::warn!(
            server = joining.server,
            why = report(&why),
            "not joined yet"
        );
        sleep(delay).await;
    }
}

async fn ask(joining: &Joining, csr: Vec<u8>) -> io::Result<Answer> {
    let socket = connect(&joining.server).await?;
    let mut addresses = joining.addresses.clone();
    if addresses.is_empty() {
        addresses.push(socket.local_addr()?.ip().to_canonical());
    }
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(PinnedVerifier::new(joining.pins.clone(), provider()))
        .with_no_client_auth();
    tls.alpn_protocols = vec![join::ALPN.to_vec()];
    tls.enable_sni = false;
    // Never checked: a server is known by its identity.
    let name = ServerName::try_from("cpc.invalid").map_err(io::Error::other)?;
    let connector = TlsConnector::from(Arc::new(tls));
    let mut session = connector.connect(name, socket).await?;
    let request = join::request(&Join {
        token: joining.token.clone(),
        node: joining.node.clone(),
        addresses,
        csr,
    });
    session
        .write_all(&request.map_err(io::Error::other)?)
        .await?;
    let (mut reader, mut room) = (Reader::default(), [0; 4096]);
    loop {
        let read = session.read(&mut room).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let garbage = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        if let Some(answer) = reader.answer(&room[..read]).map_err(garbage)? {
            return Ok(answer);
        }
    }
}

async fn connect(server: &str) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = lookup_host(server).await?.collect();
    match timeout(PATIENCE / 2, race(&in_turn(&addresses), TcpStream::connect)).await {
        Ok(Ok((_, socket))) => Ok(socket),
        Ok(Err(Some((_, error)))) => Err(error),
        Ok(Err(None)) => Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        )),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}
