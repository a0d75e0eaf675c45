//! A successor, as the running process sees it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tunnel_proto::handover::{Accepted, Offer, Ready, Released, Request, State};

use super::error::HandoverError;
use super::parcel::{receive, send};

/// Timeout of an answer that takes no work.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout for a successor to prepare: to load programs, and to read keys from a slow disk.
const PREPARATION: Duration = Duration::from_secs(60);

/// A process that has asked to take the place of this one.
#[derive(Debug)]
pub struct Successor {
    stream: Arc<UnixStream>,
    /// Release of its software.
    pub version: String,
}

impl Successor {
    /// Reads the request of a process that is to be of `role`.
    ///
    /// # Errors
    /// [`HandoverError`]; the process was told.
    pub(super) async fn greet(
        stream: UnixStream,
        role: &'static str,
    ) -> Result<Self, HandoverError> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let stream = Arc::new(stream);
        let request: Request = receive_within(&stream, TIMEOUT).await?;
        let successor = Self {
            stream,
            version: request.version,
        };
        if request.role != role {
            let text = format!("it is a {role}, and a {} asks", request.role);
            successor.refuse(&text).await?;
            return Err(HandoverError::Refused(text));
        }
        Ok(successor)
    }

    /// Refuses the handover.
    ///
    /// # Errors
    /// [`HandoverError::Io`].
    pub async fn refuse(&self, text: &str) -> Result<(), HandoverError> {
        let offer = Offer {
            version: env!("CARGO_PKG_VERSION").into(),
            refusal: text.into(),
            listeners: Vec::new(),
        };
        send_all(&self.stream, offer, Vec::new()).await
    }

    /// Offers the listeners, and waits until the successor is prepared.
    ///
    /// # Errors
    /// [`HandoverError`]: the successor did not come to that.
    pub async fn prepare(&self, listeners: Vec<(String, OwnedFd)>) -> Result<(), HandoverError> {
        let (offer, descriptors) = offer(listeners);
        send_all(&self.stream, offer, descriptors).await?;
        let Ready { failure } = receive_within(&self.stream, PREPARATION).await?;
        match &*failure {
            "" => Ok(()),
            _ => Err(HandoverError::Unprepared(failure)),
        }
    }

    /// Gives the state away. After success this process must touch none of the sockets any more.
    ///
    /// # Errors
    /// [`HandoverError`], with what the successor does not use.
    pub async fn give(
        self,
        state: State,
        sockets: Vec<OwnedFd>,
    ) -> Result<(), (HandoverError, State, Vec<OwnedFd>)> {
        let given = spawn_blocking(move || {
            let given = self.exchange(&state, &sockets);
            given.map_err(|error| (error, state, sockets))
        });
        given.await.unwrap_or_else(|panic| {
            let error = HandoverError::Io(std::io::Error::other(panic));
            Err((error, State::default(), Vec::new()))
        })
    }

    fn exchange(&self, state: &State, sockets: &[OwnedFd]) -> Result<(), HandoverError> {
        let borrowed: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        send(&self.stream, state, &borrowed)?;
        self.stream.set_read_timeout(Some(TIMEOUT))?;
        let (Accepted {}, _) = receive(&self.stream)?;
        Ok(send(&self.stream, &Released {}, &[])?)
    }
}

/// Returns the offer of `listeners`, with their descriptors.
pub(super) fn offer(listeners: Vec<(String, OwnedFd)>) -> (Offer, Vec<OwnedFd>) {
    let (names, descriptors) = listeners.into_iter().unzip();
    let offer = Offer {
        version: env!("CARGO_PKG_VERSION").into(),
        refusal: String::new(),
        listeners: names,
    };
    (offer, descriptors)
}

async fn send_all<M: prost::Message + 'static>(
    to: &Arc<UnixStream>,
    message: M,
    descriptors: Vec<OwnedFd>,
) -> Result<(), HandoverError> {
    let to = to.clone();
    let sent = spawn_blocking(move || {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        send(&to, &message, &borrowed)
    });
    Ok(sent.await.map_err(std::io::Error::other)??)
}

async fn receive_within<M: prost::Message + Default + 'static>(
    from: &Arc<UnixStream>,
    limit: Duration,
) -> Result<M, HandoverError> {
    let from = from.clone();
    let received = spawn_blocking(move || {
        from.set_read_timeout(Some(limit))?;
        receive::<M>(&from)
    });
    let (message, _) = received.await.map_err(std::io::Error::other)??;
    Ok(message)
}
