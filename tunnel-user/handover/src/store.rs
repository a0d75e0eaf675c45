//! A handover from a process that ends to one that starts later: the service manager keeps one end of a socket,
//! in which everything waits (`FileDescriptorStoreMax=`, systemd.service(5)).

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use sd_notify::NotifyState;
use socket2::SockRef;
use tunnel_proto::handover::Offer;

use super::error::HandoverError;
use super::parcel::Parcel;
use super::predecessor::{Listeners, Predecessor};
use super::successor::offer;
use cpc_host::inherited::Inherited;
use cpc_host::report::report;

/// Name of the descriptor in the store.
const NAME: &str = "handover";

/// Size of the socket's queue in bytes. A message with 253 descriptors takes about 1 kB.
const QUEUE: usize = 4 << 20;

/// Time for the service manager to take the descriptor.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time for the service manager to close a descriptor that it does not keep: systemd does so in another thread.
const GRACE: Duration = Duration::from_millis(10);

/// Whether the service manager keeps descriptors for this service.
pub fn is_there() -> bool {
    let is_store = |text: std::ffi::OsString| text.to_str() != Some("0");
    // Set by systemd 254 and later where there is a store; earlier ones say nothing.
    std::env::var_os("NOTIFY_SOCKET").is_some() && std::env::var_os("FDSTORE").is_none_or(is_store)
}

/// Leaves everything with the service manager.
///
/// # Errors
/// [`HandoverError`]: nothing was left.
pub fn leave(listeners: Listeners, state: &Parcel) -> Result<(), HandoverError> {
    let mut offer = offer(listeners)?;
    let left_at = nanoseconds(since_boot()?);
    offer.merge(&Offer {
        left_at,
        ..Offer::default()
    })?;
    let near = open()?;
    let filled = fill(&near, &offer, state);
    if filled.is_err() {
        forget();
        // As long as the queue has copies of the sockets, the peer of a connection does not see its end.
        if !is_closed(&near, PATIENCE)? {
            tracing::warn!("the service manager keeps copies of the sockets of connections");
        }
    }
    filled
}

fn fill(near: &UnixStream, offer: &Parcel, state: &Parcel) -> Result<(), HandoverError> {
    let sent = offer.send(near).and_then(|()| state.send(near));
    match is_closed(near, Duration::ZERO)? {
        true => Err(HandoverError::NoStore),
        false => Ok(sent?),
    }
}

/// Gives the service manager one end of a socket to keep, and returns the other one.
///
/// # Errors
/// [`HandoverError`]: the service manager keeps nothing.
fn open() -> Result<UnixStream, HandoverError> {
    let (near, far) = UnixStream::pair()?;
    // The kernel reduces it to net.core.wmem_max, which suffices for 50,000 descriptors by default.
    let _ = SockRef::from(&near).set_send_buffer_size(QUEUE);
    // A full queue must not stop the process for good.
    near.set_write_timeout(Some(PATIENCE))?;
    let states = [
        NotifyState::FdStore,
        NotifyState::FdName(NAME),
        // The other end is closed: systemd would take that for an end of the descriptor.
        NotifyState::Custom("FDPOLL=0"),
    ];
    let given = sd_notify::notify_with_fds(&states, &[far.as_fd()]);
    drop(far);
    let heard = given.and_then(|()| wait_for_manager());
    // There is no other sign of a full store.
    match heard.and_then(|()| is_closed(&near, GRACE)) {
        Ok(false) => Ok(near),
        Ok(true) => Err(HandoverError::NoStore),
        Err(error) => {
            forget();
            Err(error.into())
        }
    }
}

/// Waits until the service manager has read what it was sent (`BARRIER=1`, sd_notify(3), systemd 246): it may
/// not know the sender of a message any more once that has ended.
fn wait_for_manager() -> io::Result<()> {
    let (ours, theirs) = nix::unistd::pipe()?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    match is_closed(&ours, PATIENCE)? {
        true => Ok(()),
        false => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Whether all copies of the other end of a pipe or socket are closed within `patience`.
fn is_closed(near: &impl AsFd, patience: Duration) -> io::Result<bool> {
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    loop {
        // Without a request poll(2) returns POLLHUP alone.
        match poll(
            &mut [PollFd::new(near.as_fd(), PollFlags::empty())],
            patience,
        ) {
            Err(Errno::EINTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

/// Tells the service manager to close what a process has left.
pub(super) fn forget() {
    let states = [NotifyState::FdStoreRemove, NotifyState::FdName(NAME)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::warn!(
            error = report(&error),
            "the service manager keeps the handover"
        );
    }
}

/// Returns what an earlier process has left in `inherited`, if anything. The service manager keeps it until
/// [`Predecessor::take`], so a start that fails before loses nothing.
pub fn left(inherited: &mut Inherited) -> Option<(Predecessor, Listeners)> {
    let stream = UnixStream::from(inherited.named(NAME)?);
    match Predecessor::left(stream) {
        Ok(found) => Some(found),
        Err(error) => {
            forget();
            tracing::error!(
                error = report(&error),
                "the connections of the last process are lost"
            );
            None
        }
    }
}

/// Returns the time since the boot of the machine, with that of its suspends.
///
/// # Errors
/// The error of the system call.
pub(super) fn since_boot() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_BOOTTIME)?.into())
}

/// Returns `time` in nanoseconds.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
