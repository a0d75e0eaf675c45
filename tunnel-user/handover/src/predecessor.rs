//! The process whose place this one takes.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use tunnel_proto::handover::{Accepted, Offer, Ready, Released, Request, State};

use super::endpoint::{self, check};
use super::error::HandoverError;
use super::parcel::{Parcel, receive, send};
use super::store;
use cpc_host::inherited::Inherited;

/// Timeout of an answer that takes no work.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout for a predecessor to stop: it waits for dials under way.
const STOP: Duration = Duration::from_secs(30);

/// A process that hands over, or what it has left with the service manager.
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
    /// Whether the process lives.
    is_live: bool,
}

/// The listeners of a predecessor, by name.
pub type Listeners = Vec<(String, OwnedFd)>;

impl Predecessor {
    /// Asks the running process of `role` with this `state_dir`. Returns `None` if there is none.
    ///
    /// # Errors
    /// [`HandoverError`].
    fn find(state_dir: &Path, role: &str) -> Result<Option<(Self, Listeners)>, HandoverError> {
        let stream = match UnixStream::connect(endpoint::path(state_dir, role)) {
            Ok(stream) => stream,
            Err(error) => {
                return match error.kind() {
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => Ok(None),
                    _ => Err(error.into()),
                };
            }
        };
        check(&stream)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let request = Request {
            role: role.into(),
            version: env!("CARGO_PKG_VERSION").into(),
        };
        send(&stream, &request)?;
        let listeners = receive_offer(&stream)?;
        let is_live = true;
        Ok(Some((Self { stream, is_live }, listeners)))
    }

    /// Opens what a process has left with the service manager.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub(super) fn left(stream: UnixStream) -> Result<(Self, Listeners), HandoverError> {
        // Nobody writes any more.
        stream.set_nonblocking(true)?;
        let listeners = receive_offer(&stream)?;
        let is_live = false;
        Ok((Self { stream, is_live }, listeners))
    }

    /// Tells a live predecessor why this process does not take over.
    pub fn decline(&self, failure: &str) {
        let failure = failure.into();
        if self.is_live {
            // A predecessor that hears nothing goes on as well.
            let _ = send(&self.stream, &Ready { failure });
        }
    }

    /// Takes the state over, once `restore` has understood it. After success the sockets are this process's
    /// alone.
    ///
    /// # Errors
    /// [`HandoverError`]: a live predecessor goes on.
    pub fn take<T>(
        self,
        restore: impl FnOnce(State, Vec<OwnedFd>) -> Result<T, HandoverError>,
    ) -> Result<T, HandoverError> {
        if !self.is_live {
            return open(Parcel::receive(&self.stream)?, restore);
        }
        send(&self.stream, &Ready::default())?;
        self.stream.set_read_timeout(Some(STOP))?;
        let state = Parcel::receive(&self.stream)?;
        let restored = open(state, restore)?;
        self.stream.set_read_timeout(Some(TIMEOUT))?;
        send(&self.stream, &Accepted {})?;
        let Released {} = receive(&self.stream)?;
        Ok(restored)
    }
}

fn open<T>(
    state: Parcel,
    restore: impl FnOnce(State, Vec<OwnedFd>) -> Result<T, HandoverError>,
) -> Result<T, HandoverError> {
    let (state, sockets) = state.open()?;
    restore(state, sockets)
}

/// Looks for the predecessor of a process of `role`: what one has left with the service manager, or, where
/// `is_replacing`, the running one. Adds its listeners to `inherited`. Returns `None` if there is none.
///
/// # Errors
/// [`HandoverError`].
pub fn find(
    state_dir: Option<&Path>,
    role: &str,
    is_replacing: bool,
    inherited: &mut Inherited,
) -> Result<Option<Predecessor>, HandoverError> {
    let found = match (store::left(inherited), state_dir) {
        (Some(left), _) => Some(left),
        (None, Some(state_dir)) if is_replacing => Predecessor::find(state_dir, role)?,
        (None, None) if is_replacing => return Err(HandoverError::NoStateDir),
        (None, _) => None,
    };
    Ok(found.map(|(predecessor, listeners)| {
        inherited.add(listeners);
        predecessor
    }))
}

fn receive_offer(stream: &UnixStream) -> Result<Listeners, HandoverError> {
    let (offer, descriptors) = Parcel::receive(stream)?.open::<Offer>()?;
    if !offer.refusal.is_empty() {
        return Err(HandoverError::Refused(offer.refusal));
    }
    if offer.listeners.len() != descriptors.len() {
        return Err(HandoverError::Malformed("listeners"));
    }
    tracing::info!(
        version = offer.version,
        listeners = descriptors.len(),
        "taking over from a process"
    );
    Ok(offer.listeners.into_iter().zip(descriptors).collect())
}
