//! A handover from a process that ends to one that starts later: the service manager keeps one end of a socket,
//! in which everything waits (`FileDescriptorStoreMax=`, systemd.service(5)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use socket2::SockRef;

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
    let (near, far) = UnixStream::pair()?;
    // The kernel reduces it to net.core.wmem_max, which suffices for 50,000 descriptors by default.
    let _ = SockRef::from(&near).set_send_buffer_size(QUEUE);
    // A full queue must not stop the process for good.
    near.set_write_timeout(Some(PATIENCE))?;
    offer(listeners)?.send(&near)?;
    state.send(&near)?;
    let states = [
        NotifyState::FdStore,
        NotifyState::FdName(NAME),
        // The other end is closed: systemd would take that for an end of the descriptor.
        NotifyState::Custom("FDPOLL=0"),
    ];
    sd_notify::notify_with_fds(&states, &[far.as_fd()])?;
    wait_for_manager()?;
    Ok(())
}

/// Waits until the service manager has read what it was sent (`BARRIER=1`, sd_notify(3), systemd 246): it may
/// not know the sender of a message any more once that has ended.
fn wait_for_manager() -> io::Result<()> {
    let (ours, theirs) = nix::unistd::pipe()?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    let mut polled = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    if poll(&mut polled, patience)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // Its end of file.
    let _: usize = File::from(ours).read(&mut [0])?;
    Ok(())
}

/// Returns what an earlier process has left in `inherited`, if anything. It is taken once: what is not used is
/// closed, and its connections are reset.
pub fn left(inherited: &mut Inherited) -> Option<(Predecessor, Listeners)> {
    let stream = UnixStream::from(inherited.named(NAME)?);
    let states = [NotifyState::FdStoreRemove, NotifyState::FdName(NAME)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::debug!(
            error = report(&error),
            "the service manager keeps the handover"
        );
    }
    match Predecessor::left(stream) {
        Ok(found) => Some(found),
        Err(error) => {
            tracing::error!(
                error = report(&error),
                "the connections of the last process are lost"
            );
            None
        }
    }
}
