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
    /// Time since boot at which the process has left, in nanoseconds. `None`: the process lives.
    left_at: Option<u64>,
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
        let (_, listeners) = open_offer(Parcel::receive(&stream)?)?;
        let left_at = None;
        Ok(Some((Self { stream, left_at }, listeners)))
    }

    /// Opens what a process has left with the service manager. Nothing is removed from `stream`: another process
    /// may open it again.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub(super) fn left(stream: UnixStream) -> Result<(Self, Listeners), HandoverError> {
        // The process that wrote has ended.
        stream.set_nonblocking(true)?;
        let (left_at, listeners) = open_offer(Parcel::peek(&stream)?)?;
        let left_at = Some(left_at);
        Ok((Self { stream, left_at }, listeners))
    }

    /// Tells a live predecessor why this process does not take over.
    pub fn decline(&self, failure: &str) {
        let failure = failure.into();
        if self.left_at.is_none() {
            // A predecessor that hears nothing goes on as well.
            let _ = send(&self.stream, &Ready { failure });
        }
    }

    /// Takes the state over, once `restore` has understood it. After success the sockets are this process's
    /// alone. What was left with the service manager is taken at most once.
    ///
    /// # Errors
    /// [`HandoverError`]: a live predecessor goes on.
    pub fn take<T>(
        self,
        restore: impl FnOnce(State, Vec<OwnedFd>) -> Result<T, HandoverError>,
    ) -> Result<T, HandoverError> {
        if let Some(left_at) = self.left_at {
            let state = self.receive_left();
            // A state with which a process can't start must not wait for the next one.
            store::forget();
            let (mut state, sockets) = state?.open()?;
            wait_longer(&mut state, left_at)?;
            return restore(state, sockets);
        }
        send(&self.stream, &Ready::default())?;
        self.stream.set_read_timeout(Some(STOP))?;
        let state = Parcel::receive(&self.stream)?;
        let (state, sockets) = state.open()?;
        let restored = restore(state, sockets)?;
        self.stream.set_read_timeout(Some(TIMEOUT))?;
        send(&self.stream, &Accepted {})?;
        let Released {} = receive(&self.stream)?;
        Ok(restored)
    }

    fn receive_left(&self) -> Result<Parcel, HandoverError> {
        // The offer, of which the start had a copy.
        Parcel::receive(&self.stream)?;
        Parcel::receive(&self.stream)
    }
}

/// Adds the time since `left_at` to that for which the connections have waited.
fn wait_longer(state: &mut State, left_at: u64) -> Result<(), HandoverError> {
    // A process of an earlier release does not say when it left.
    let elapsed = match left_at {
        0 => 0,
        _ => store::nanoseconds(store::since_boot()?).saturating_sub(left_at),
    };
    for connection in &mut state.connections {
        connection.waited = connection.waited.saturating_add(elapsed);
        let socket = connection.socket.as_mut();
        if let Some(record) = socket.and_then(|socket| socket.record.as_mut()) {
            record.age = record.age.saturating_add(elapsed);
            record.connected = record.connected.saturating_add(elapsed);
        }
    }
    Ok(())
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

fn open_offer(parcel: Parcel) -> Result<(u64, Listeners), HandoverError> {
    let (offer, descriptors) = parcel.open::<Offer>()?;
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
    let listeners = offer.listeners.into_iter().zip(descriptors).collect();
    Ok((offer.left_at, listeners))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tunnel_proto::handover::Connection;

    use super::*;

    /// One minute, in nanoseconds.
    const MINUTE: u64 = 60_000_000_000;

    #[test]
    fn what_was_left_outlives_a_start_that_fails() {
        let (near, far) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let left_at = store::nanoseconds(store::since_boot().unwrap()) - MINUTE;
        let mut offer = Parcel::of(&Offer {
            listeners: vec!["admin".into()],
            left_at,
            ..Offer::default()
        })
        .unwrap();
        offer.add(listener.into());
        offer.send(&near).unwrap();
        let connection = Connection {
            waited: MINUTE,
            ..Connection::default()
        };
        let state = State {
            connections: vec![connection],
            ..State::default()
        };
        send(&near, &state).unwrap();
        drop((near, offer));
        let copy = || far.try_clone().unwrap();
        for _ in 0..2 {
            let (_, listeners) = Predecessor::left(copy()).unwrap();
            assert_eq!(listeners[0].0, "admin");
        }
        let (predecessor, _) = Predecessor::left(copy()).unwrap();
        let taken = predecessor.take(|state, _| Ok(state)).unwrap();
        let waited = taken.connections[0].waited;
        assert!((2 * MINUTE..3 * MINUTE).contains(&waited), "{waited} ns");
        assert!(Predecessor::left(copy()).is_err(), "taken once");
    }
}
