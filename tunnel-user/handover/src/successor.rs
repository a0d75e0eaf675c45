//! A successor, as the running process sees it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tunnel_proto::handover::{Accepted, Offer, Ready, Released, Request};

use super::error::HandoverError;
use super::parcel::{Parcel, receive, send};

/// Timeout of an answer that takes no work.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout for a successor to prepare: to load programs, and to read keys from a slow disk.
const PREPARATION: Duration = Duration::from_secs(60);

/// Maximum length of a wrong role that is shown, in characters.
const MAX_ROLE: usize = 32;

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
    /// [`HandoverError`]; the process has the refusal.
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
            let other: String = request.role.chars().take(MAX_ROLE).collect();
            let text = format!(
                "the running process is of role {role}, the successor of role {}",
                other.escape_debug()
            );
            // Who does not wait for the answer needs none.
            let _ = successor.refuse(&text).await;
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
            ..Offer::default()
        };
        send_parcel(&self.stream, Parcel::of(&offer)?).await
    }

    /// Offers the listeners, and waits until the successor is prepared.
    ///
    /// # Errors
    /// [`HandoverError`]: the successor did not come to that.
    pub async fn prepare(&self, listeners: Vec<(String, OwnedFd)>) -> Result<(), HandoverError> {
        send_parcel(&self.stream, offer(listeners)?).await?;
        let Ready { failure } = receive_within(&self.stream, PREPARATION).await?;
        match &*failure {
            "" => Ok(()),
            _ => Err(HandoverError::Unprepared(failure)),
        }
    }

    /// Gives the [`State`](tunnel_proto::handover::State) away. After success this process must touch none of
    /// its sockets any more.
    ///
    /// # Errors
    /// [`HandoverError`], with what the successor does not use.
    pub async fn give(self, state: Parcel) -> Result<(), (HandoverError, Option<Parcel>)> {
        let given = spawn_blocking(move || {
            let given = self.exchange(&state);
            given.map_err(|error| (error, Some(state)))
        });
        given.await.unwrap_or_else(|panic| {
            let error = HandoverError::Io(std::io::Error::other(panic));
            Err((error, None))
        })
    }

    fn exchange(&self, state: &Parcel) -> Result<(), HandoverError> {
        state.send(&self.stream)?;
        self.stream.set_read_timeout(Some(TIMEOUT))?;
        let Accepted {} = receive(&self.stream)?;
        Ok(send(&self.stream, &Released {})?)
    }
}

/// Returns the offer of `listeners`, with their descriptors.
pub(super) fn offer(listeners: Vec<(String, OwnedFd)>) -> std::io::Result<Parcel> {
    let (names, descriptors): (_, Vec<_>) = listeners.into_iter().unzip();
    let mut parcel = Parcel::of(&Offer {
        version: env!("CARGO_PKG_VERSION").into(),
        listeners: names,
        ..Offer::default()
    })?;
    for descriptor in descriptors {
        parcel.add(descriptor);
    }
    Ok(parcel)
}

async fn send_parcel(to: &Arc<UnixStream>, parcel: Parcel) -> Result<(), HandoverError> {
    let to = to.clone();
    let sent = spawn_blocking(move || parcel.send(&to));
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
    received.await.map_err(std::io::Error::other)?
}
