//! HTTP CONNECT, on a Unix socket and on TCP with mutual TLS: the protocol of kube-apiserver's egress
//! selector, and of any HTTP client.
//!
//! The reason phrase of a refusal is the text that the person at kubectl reads. The answer of success
//! comes only when the target is connected, and before its first byte.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;
use tunnel_proto::http_connect::{ConnectError, ConnectRequest, parse, response};

use super::client::{
    AnswerFormat, Client, REQUEST_TIMEOUT, answer_and_close, answer_at_once, serve_once,
};
use super::connection::admit;
use super::refusals::Refusals;
use super::scope::Scope;
use crate::dial::{Dial, connection_id};
use crate::early::{Early, EarlyBytes};
use crate::shard::Shard;
use cpc_datapath::LocalSocket;
use cpc_datapath::socket::Portable;
use cpc_observe::access::Record;
use cpc_observe::metrics::FrontendKind;

/// Serves one client.
pub(super) fn connection(
    shard: Rc<Shard>,
    scope: Arc<Scope>,
    refusals: &'static dyn Refusals,
    client: Option<SocketAddr>,
    local: impl Portable,
) -> impl Future<Output = ()> {
    let asked = ask(shard.clone(), scope, refusals, client, local);
    let serving = shard.clone();
    let dialled = async move { Box::pin(asked).await?.dial(serving).await };
    serve_once(shard, Box::pin(dialled))
}

/// Reads and checks the request. Returns `None` if there is none to serve.
async fn ask<L: Portable>(
    shard: Rc<Shard>,
    scope: Arc<Scope>,
    refusals: &'static dyn Refusals,
    client: Option<SocketAddr>,
    local: L,
) -> Option<Box<Client<L>>> {
    let Some(waiting) = shard.waiting.acquire() else {
        let full = response(503, "too many clients have not said yet what they want");
        answer_at_once(&local, &full);
        return None;
    };
    let counted = shard.observer.as_ref().map(|it| it.http_connection());
    let (request, first) = match timeout(REQUEST_TIMEOUT, read_request(&local)).await {
        Ok(Ok(Some(read))) => read,
        Ok(Ok(None)) => return None,
        Ok(Err(error)) => {
            answer_and_close(&local, refusals.bad_request(&error)).await;
            return None;
        }
        Err(_) => {
            let late = response(408, "the request did not arrive in time");
            answer_and_close(&local, late).await;
            return None;
        }
    };
    let mut record = Record::new(
        connection_id(),
        FrontendKind::HttpConnect,
        request.destination,
    );
    record.client = client;
    let (admitted, dialling) = match admit(&shard, &scope, &record) {
        Ok(admitted) => admitted,
        Err(error) => {
            answer_and_close(&local, refusals.failure(&error)).await;
            return None;
        }
    };
    drop(waiting);
    let early = EarlyBytes::new(Early::Hold, first);
    Some(Box::new(Client {
        dial: Dial::new(&shard, record, &scope.tenant, (early, dialling)),
        manner: AnswerFormat::HttpConnect(refusals),
        local,
        admitted,
        counted,
    }))
}

/// Reads the request and the bytes behind it. Returns `None` if the client left before.
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
