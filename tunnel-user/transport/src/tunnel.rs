//! A tunnel: one connection between agent and server that carries many streams.
//!
//! [`Tunnel`] is what agent and server use of it. QUIC is one kind ([`quic`](crate::quic)); [`kinds`] lists all
//! of them behind one enum, so that calls are dispatched statically.

pub mod kinds;
mod path;

pub use kinds::{Connection, Recv, Send};
pub use path::{Path, Probe};

use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use rustls::pki_types::CertificateDer;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::PrefaceError;

use cpc_config::TunnelKind;
use cpc_datapath::Budget;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_identity::Identity;
use cpc_identity::identity::IdentityError;

/// One connection between agent and server that carries many streams. Clones are handles of the same
/// connection; dropping the last one closes it.
pub trait Tunnel: Clone + fmt::Debug {
    /// The sending half of a stream.
    type Send: TunnelSend;
    /// The receiving half of a stream.
    type Recv: TunnelRecv;

    /// Returns the kind of the tunnel.
    fn kind(&self) -> TunnelKind;

    /// Opens a stream. Waits for the peer's permission, so callers need a timeout.
    ///
    /// # Errors
    /// [`TunnelError`]; the tunnel is gone.
    fn open(&self) -> impl Future<Output = Result<(Self::Send, Self::Recv), TunnelError>>;

    /// Waits for a stream of the peer.
    ///
    /// # Errors
    /// [`TunnelError`]; the tunnel is gone.
    fn accept(&self) -> impl Future<Output = Result<(Self::Send, Self::Recv), TunnelError>>;

    /// Closes the tunnel with all its streams; no effect on a closed one. The peer receives `reason` and
    /// `text`, if the path still works.
    fn close(&self, reason: CloseReason, text: &str);

    /// Returns the peer's address.
    fn remote(&self) -> SocketAddr;

    /// Returns a probe of the path, for any thread.
    fn probe(&self) -> Probe;

    /// Returns the peer's certificate, which its verifier has accepted.
    fn peer_certificate(&self) -> Option<CertificateDer<'static>>;

    /// Charges the memory held for the peer to a part of the process's budget.
    fn charge_to(&self, budget: &Budget);

    /// Whether there is a stream without writer of which the peer may lack a part: answer, end or reset
    /// may be lost with the tunnel.
    fn has_unacknowledged(&self) -> bool;

    /// Returns the identity in the peer's certificate.
    ///
    /// # Errors
    /// [`IdentityError`]; the verifier reads the same, so this takes a bug.
    fn peer_identity(&self) -> Result<Identity, IdentityError> {
        let leaf = self.peer_certificate();
        let leaf = leaf.ok_or_else(|| IdentityError::Malformed("there is none".into()))?;
        Identity::from_certificate(&leaf)
    }
}

/// The sending half of a tunnel's stream. Its polls let an enum of kinds dispatch without a box.
pub trait TunnelSend: SendHalf + fmt::Debug {
    /// A future that waits for the end of the half.
    type Ended: Future<Output = SendEnd> + Unpin;

    /// Sends `chunk`, as [`SendHalf::send`] does.
    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<Result<(), SendEnd>>;

    /// Waits for the end of the half, as [`SendHalf::stopped`] does.
    fn ended(&self) -> Self::Ended;

    /// Waits until no more can be sent, in place of [`poll_send`](Self::poll_send) where the caller itself has to wait.
    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<SendEnd>;

    /// Gives the stream the highest priority: its bytes wait for no other stream. The tunnel is of no use
    /// without this stream.
    fn go_first(&mut self);

    /// Returns the error that ended the tunnel, if it has ended.
    fn tunnel_error(&self) -> Option<TunnelError>;
}

/// The receiving half of a tunnel's stream. Its polls let an enum of kinds dispatch without a box.
pub trait TunnelRecv: RecvHalf + fmt::Debug {
    /// Takes the available bytes, as [`RecvHalf::recv`] does.
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut Vec<Bytes>,
    ) -> Poll<Result<(), RecvEnd>>;

    /// Waits for a reset by the peer, as [`RecvHalf::reset`] does.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason>;

    /// Puts bytes back that were received last: the next receive returns them first.
    fn put_back(&mut self, bytes: Bytes);

    /// Returns the error that ended the tunnel, if it has ended.
    fn tunnel_error(&self) -> Option<TunnelError>;

    /// Reads the head of the stream. Later bytes can then be received. Cancelling loses the bytes read so
    /// far: give up the stream then.
    ///
    /// # Errors
    /// [`HeadError`].
    fn read_head<T>(
        &mut self,
        decode: impl Fn(&[u8]) -> Result<Option<(T, usize)>, PrefaceError>,
    ) -> impl Future<Output = Result<T, HeadError>> {
        async move {
            // `decode` bounds it: a head that is too long is malformed.
            let mut head = BytesMut::new();
            loop {
                let mut chunks = Vec::new();
                self.recv(&mut chunks).await.map_err(HeadError::End)?;
                chunks
                    .iter()
                    .for_each(|chunk| head.extend_from_slice(chunk));
                if let Some((message, used)) = decode(&head)? {
                    let rest = head.freeze().slice(used..);
                    if !rest.is_empty() {
                        self.put_back(rest);
                    }
                    return Ok(message);
                }
            }
        }
    }
}

/// Reason why there is no head.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The peer sent something else.
    #[error(transparent)]
    Malformed(#[from] PrefaceError),
    /// The stream ended before its head.
    #[error("the stream ended early")]
    End(RecvEnd),
}

/// The error that ended a tunnel, of any kind. Displays as its cause does.
#[derive(Clone, Debug)]
pub struct TunnelError {
    reason: CloseReason,
    peer_text: Option<Arc<str>>,
    cause: Arc<dyn Error + std::marker::Send + Sync>,
}

impl TunnelError {
    /// Creates the error of a tunnel that ended for `reason`, as far as `cause` tells.
    pub fn new(
        reason: CloseReason,
        cause: impl Error + std::marker::Send + Sync + 'static,
    ) -> Self {
        Self {
            reason,
            peer_text: None,
            cause: Arc::new(cause),
        }
    }

    /// Notes that the peer closed the tunnel, with a text for people.
    #[must_use]
    pub fn closed_by_peer(mut self, text: &str) -> Self {
        self.peer_text = Some(text.into());
        self
    }

    /// Returns the reason with which everything on the tunnel ends.
    pub fn reason(&self) -> CloseReason {
        self.reason
    }

    /// Returns the peer's text, if the peer closed the tunnel.
    pub fn peer_text(&self) -> Option<&str> {
        self.peer_text.as_deref()
    }
}

impl fmt::Display for TunnelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl Error for TunnelError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.source()
    }
}
