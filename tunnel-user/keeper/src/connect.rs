//! A client's connection to a keeper.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{Answer, Request};

use crate::error::KeeperError;
use crate::message::{Attached, is_later, receive, send};
use crate::owner::check;

/// Timeout of an answer.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to the keeper at `path`. Sends and receipts have a timeout of 5 seconds each.
///
/// # Errors
/// [`KeeperError::Unreachable`], [`KeeperError::Stranger`].
pub(crate) fn connect(path: &Path) -> Result<Socket, KeeperError> {
    let connected = SockAddr::unix(path).and_then(|address| {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        socket.connect(&address)?;
        Ok(socket)
    });
    let socket = connected.map_err(|why| KeeperError::Unreachable {
        path: path.to_owned(),
        why,
    })?;
    check(&socket)?;
    Ok(socket)
}

/// Sends a request.
///
/// # Errors
/// [`KeeperError::Refused`], if that is why the connection has ended, and [`KeeperError::Io`].
pub(crate) fn request(
    keeper: &Socket,
    kind: Kind,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), KeeperError> {
    let request = Request { kind: Some(kind) };
    match send(keeper, &request, descriptor) {
        Ok(()) => Ok(()),
        // The reason may be in the queue.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => match answer(keeper) {
            Err(refused @ KeeperError::Refused(_)) => Err(refused),
            _ => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Receives an answer, with the descriptor beside it.
///
/// # Errors
/// [`KeeperError::Refused`] for a refusal, and all errors of a receipt.
pub(crate) fn answer(keeper: &Socket) -> Result<(AnswerKind, Attached), KeeperError> {
    let received = receive::<Answer>(keeper).map_err(|error| match error {
        KeeperError::Io(error) if is_later(&error) => KeeperError::Io(ErrorKind::TimedOut.into()),
        error => error,
    })?;
    let Some(received) = received else {
        return Err(KeeperError::Io(ErrorKind::UnexpectedEof.into()));
    };
    match received.message.kind {
        Some(AnswerKind::Refused(refused)) => Err(KeeperError::Refused(refused.reason)),
        Some(kind) => Ok((kind, received.descriptor)),
        None => Err(KeeperError::Malformed("an unknown answer")),
    }
}
