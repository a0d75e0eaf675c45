//! HTTP CONNECT, on a Unix socket and on TCP with mutual TLS: what kube-apiserver's egress selector
//! speaks, and any HTTP client.
//!
//! The reason phrase of a refusal is what the person at kubectl reads. Success is answered only
//! when the target is connected, and before its first byte.

use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::http_connect::{ConnectRequest, ESTABLISHED, parse, response};

use super::tls::FrontendTls;
use super::{accept_failed, failed, overloaded, serve};
use crate::config::server::UnixFrontend;
use crate::datapath::LocalSocket;
use crate::datapath::socket::TlsSocket;
use crate::process::gate::Gate;
use crate::server::dial::{connection_id, dial};
use crate::server::early::{Early, EarlyBytes};
use crate::server::shard::Shard;
use crate::telemetry::access::Record;
use crate::telemetry::metrics::FrontendKind;
use crate::tls::TrustDomain;

/// A client that has not sent its request (with TLS: finished its handshake) by then is dropped.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// TLS handshakes under way at once on one frontend.
const MAX_STRANGERS: usize = 1024;

/// Makes the socket of a Unix frontend. One left by a process that is gone is replaced; one that
/// answers is not.
///
/// # Errors
/// What the system says.
pub(crate) fn bind_unix(config: &UnixFrontend) -> io::Result<std::os::unix::net::UnixListener> {
    let path = &config.unix;
    if fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            let text = format!("{} is served by another process", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        fs::remove_file(path)?;
    }
    // Under another name until its mode is right: nobody can connect before.
    let aside = aside(path);
    let _ = fs::remove_file(&aside);
    let listener = std::os::unix::net::UnixListener::bind(&aside)?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(config.mode))?;
    fs::rename(&aside, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Accepts on a Unix socket for ever.
pub(crate) async fn accept_unix(shard: Rc<Shard>, tenant: TrustDomain, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let (shard, tenant) = (shard.clone(), tenant.clone());
                tokio::task::spawn_local(async move {
                    connection(&shard, &tenant, None, socket).await;
                });
            }
            Err(error) => accept_failed("http_connect unix", &error).await,
        }
    }
}

/// Accepts on TCP for ever.
pub(crate) async fn accept_tls(
    shard: Rc<Shard>,
    tenant: TrustDomain,
    listener: TcpListener,
    tls: FrontendTls,
) {
    let strangers = Gate::new(MAX_STRANGERS);
    loop {
        match listener.accept().await {
            Ok((socket, client)) => {
                // Dropped with its socket at the bound.
                let Some(stranger) = strangers.enter() else {
                    tracing::warn!(%client, "too many handshakes at once, connection is reset");
                    continue;
                };
                let (shard, tenant) = (shard.clone(), tenant.clone());
                let acceptor = tls.acceptor();
                tokio::task::spawn_local(async move {
                    let client = client.to_string();
                    let known = timeout(REQUEST_TIMEOUT, handshake(&acceptor, socket)).await;
                    drop(stranger);
                    match known {
                        Ok(Ok(socket)) => connection(&shard, &tenant, Some(client), socket).await,
                        Ok(Err(error)) => {
                            tracing::warn!(client, %error, "frontend handshake failed")
                        }
                        Err(_) => tracing::warn!(client, "frontend handshake not finished in time"),
                    }
                });
            }
            Err(error) => accept_failed("http_connect tcp", &error).await,
        }
    }
}

async fn handshake(acceptor: &TlsAcceptor, socket: TcpStream) -> io::Result<TlsSocket> {
    Ok(TlsSocket::new(acceptor.accept(socket).await?))
}

async fn connection(
    shard: &Rc<Shard>,
    tenant: &TrustDomain,
    client: Option<String>,
    local: impl LocalSocket,
) {
    let (request, first) = match timeout(REQUEST_TIMEOUT, read_request(&local)).await {
        Ok(Ok(Some(read))) => read,
        Ok(Ok(None)) => return,
        Ok(Err(answer)) => return refuse(&local, answer).await,
        Err(_) => return refuse(&local, response(408, "the request did not arrive in time")).await,
    };
    let mut record = Record::new(
        connection_id(),
        FrontendKind::HttpConnect,
        request.destination,
    );
    record.client = client;
    let Some(_admitted) = shard.admit() else {
        let error = overloaded(shard);
        failed(shard, &record, &error);
        return refuse(&local, response(status(error.reason), &error.to_string())).await;
    };
    let early = EarlyBytes::new(Early::Hold, first);
    let span = record.span();
    let served = async {
        match dial(shard, &mut record, tenant, &local, early).await {
            Ok(dialled) => {
                record.reached(&shard.metrics.dials);
                // A client that is gone by now shows in the relay as well.
                let _ = write(&local, ESTABLISHED).await;
                serve(shard, record, local, dialled).await;
            }
            Err(error) => {
                failed(shard, &record, &error);
                refuse(&local, response(status(error.reason), &error.to_string())).await;
            }
        }
    };
    served.instrument(span).await;
}

/// Reads the request and what came behind it. `None`: the client left without a word.
async fn read_request(local: &impl LocalSocket) -> Result<Option<(ConnectRequest, Bytes)>, Bytes> {
    // `parse` refuses a head that is too long.
    let mut head = BytesMut::new();
    loop {
        match local.read().await {
            Ok(bytes) if !bytes.is_empty() => head.extend_from_slice(&bytes),
            _ => return Ok(None),
        }
        match parse(&head) {
            Ok(Some((request, used))) => return Ok(Some((request, head.freeze().slice(used..)))),
            Ok(None) => {}
            Err(error) => return Err(response(error.status(), &error.to_string())),
        }
    }
}

/// Answers and closes in order, so that the answer arrives.
async fn refuse(local: &impl LocalSocket, answer: Bytes) {
    let told = async {
        write(local, &answer).await?;
        local.finish().await
    };
    if timeout(REQUEST_TIMEOUT, told)
        .await
        .is_ok_and(|done| done.is_ok())
    {
        local.reset_on_close(false);
    }
}

async fn write(local: &impl LocalSocket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match local.try_write(&[IoSlice::new(bytes)])? {
            Some(n) => bytes = &bytes[n..],
            None => local.writable().await?,
        }
    }
    Ok(())
}

/// The HTTP status of a dial that failed.
fn status(reason: CloseReason) -> u16 {
    match reason {
        CloseReason::PolicyDenied => 403,
        CloseReason::NoRoute
        | CloseReason::NoAgent
        | CloseReason::Draining
        | CloseReason::Overloaded => 503,
        CloseReason::DialTimeout => 504,
        _ => 502,
    }
}
