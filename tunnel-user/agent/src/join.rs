//! Joining: the first certificate of a worker, for a token. The work of `cpc agent join`.

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

use super::happy_eyeballs::{in_turn, race};
use cpc_host::directory::Directory;
use cpc_host::report::report;
use cpc_identity::credential::{Credential, CredentialError, Expected, PendingCredential};
use cpc_identity::pin::PinnedVerifier;
use cpc_identity::{KeyHash, provider};

/// File of the key and its certificate.
const CREDENTIAL: &str = "agent.pem";

/// File of the trusted CAs.
const CA: &str = "ca.crt";

/// File of the key before there is a certificate.
const PENDING: &str = "joining.key";

/// Timeout of one attempt.
const PATIENCE: Duration = Duration::from_secs(20);

/// Parameters of a join.
#[derive(Debug)]
pub struct Joining {
    /// Address of the join listener, `host:port`.
    pub server: String,
    /// The token.
    pub token: String,
    /// Keys of CAs, of which one has to vouch for the server.
    pub pins: Vec<KeyHash>,
    /// Name of the node.
    pub node: String,
    /// Addresses of the node; if empty, the local address towards the server.
    pub addresses: Vec<IpAddr>,
    /// Directory of key, certificate and CAs.
    pub out: PathBuf,
    /// Time for retries while the server is not reached.
    pub patience: Duration,
}

/// Result of a join.
pub struct Joined {
    /// The issued credential, saved already.
    pub credential: Credential,
    /// File of key and certificate.
    pub file: PathBuf,
    /// File of the CAs.
    pub ca: PathBuf,
}

/// Reason why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A certificate exists already.
    #[error("{} is there already; remove it if this node is to join again", .0.display())]
    Exists(PathBuf),
    /// The directory can't be used.
    #[error("{}: {why}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Error of the system call.
        why: io::Error,
    },
    /// Our key or the issued certificate is unusable.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The server was not reached, or is not the intended one.
    #[error("{server}: {why}")]
    Server {
        /// Address of the server.
        server: String,
        /// The failure.
        why: io::Error,
    },
    /// The server refused the request.
    #[error("{server} refuses: {why}")]
    Refused {
        /// Address of the server.
        server: String,
        /// Reason of the server.
        why: String,
    },
}

/// Joins, and writes the credential into files. The key stays until there is a certificate, so that a
/// second attempt after a lost answer gets one for the same use of the token.
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
    let draft = PendingCredential::load_or_generate(&pending)?;
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

/// Retries until the server answers: a server that is not reached may be about to start.
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
