//! HTTP CONNECT, on a Unix socket and on TCP with mutual TLS: what kube-apiserver's egress selector
//! speaks, and any HTTP client.
//!
//! The reason phrase of a refusal is what the person at kubectl reads. Success is answered only
//! when the target is connected, and before its first byte.

use std::io::{self, IoSlice};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;
use tracing::Instrument;
use tunnel_proto::http_connect::{ConnectError, ConnectRequest, ESTABLISHED, parse, response};

use super::{answers, failed, overloaded, serve};
use crate::config::frontend::Answers;
use crate::datapath::LocalSocket;
use crate::server::dial::{connection_id, dial};
use crate::server::early::{Early, EarlyBytes};
use crate::server::shard::Shard;
use crate::telemetry::access::Record;
use crate::telemetry::metrics::FrontendKind;
use crate::tls::TrustDomain;

/// A client that has not sent its request by then is dropped.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves one client.
pub(super) async fn connection(
    shard: &Rc<Shard>,
    tenant: &TrustDomain,
    answers: Answers,
    client: Option<String>,
    local: impl LocalSocket,
) {
    let _open = shard.metrics.konnectivity.http_connection();
    let (request, first) = match timeout(REQUEST_TIMEOUT, read_request(&local)).await {
        Ok(Ok(Some(read))) => read,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => return refuse(&local, answers::bad_request(answers, &error)).await,
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
        return refuse(&local, answers::failure(answers, &error)).await;
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
                refuse(&local, answers::failure(answers, &error)).await;
            }
        }
    };
    served.instrument(span).await;
}

/// Reads the request and what came behind it. `None`: the client left without a word.
async fn read_request(
    local: &impl LocalSocket,
) -> Result<Option<(ConnectRequest, Bytes)>, ConnectError> {
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
            Err(error) => return Err(error),
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
