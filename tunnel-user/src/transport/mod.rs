//! QUIC: endpoints with our TLS, ids and limits ([`endpoint`]), the UDP sockets below them
//! ([`socket`]), streams that reset unless they were finished ([`stream`]), and the control stream
//! that a session is driven over ([`control_stream`]). And gRPC over HTTP/2, for those who speak
//! Konnectivity ([`grpc`]).
//!
//! Loss, congestion and flow control are quinn's, or TCP's and h2's. What is sent on the streams is
//! not known here.

pub mod connection_id;
pub mod control_stream;
pub mod endpoint;
pub mod grpc;
pub mod secret;
pub mod socket;
pub mod stream;

use quinn::{Connection, ConnectionError, VarInt};
use rustls::pki_types::CertificateDer;
use tunnel_proto::close::CloseReason;

use crate::tls::Identity;
use crate::tls::identity::IdentityError;

/// The wire form of a reason: a QUIC application error code.
pub fn error_code(reason: CloseReason) -> VarInt {
    // The codes are a closed set below 2^16.
    VarInt::from_u64(reason.code()).unwrap_or(VarInt::MAX)
}

/// The reason behind a code from the wire; a code of a later release counts as a reset.
pub fn reason_of(code: VarInt) -> CloseReason {
    CloseReason::from_code(code.into_inner()).unwrap_or(CloseReason::PeerReset)
}

/// Why a tunnel ended, as far as the error tells.
pub fn link_reason(error: &ConnectionError) -> CloseReason {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            CloseReason::from_code(close.error_code.into_inner()).unwrap_or(CloseReason::LinkLost)
        }
        ConnectionError::TimedOut => CloseReason::IdleTimeout,
        ConnectionError::LocallyClosed => CloseReason::Shutdown,
        _ => CloseReason::LinkLost,
    }
}

/// Who the peer is: the verifier has let it in, its certificate says who it is.
///
/// # Errors
/// [`IdentityError`]; the verifier reads the same, so this takes a bug.
pub fn peer_identity(connection: &Connection) -> Result<Identity, IdentityError> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = chain.as_deref().and_then(|chain| chain.first());
    let leaf = leaf.ok_or_else(|| IdentityError::Malformed("there is none".into()))?;
    Identity::from_certificate(leaf)
}
