//! A successor that takes over what a process hands over, up to a point, and then fails.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Timeout of an answer: a process waits for dials before it hands over.
const PATIENCE: Duration = Duration::from_secs(20);

/// Steps of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Asking for the handover.
    Asked,
    /// Receiving the listeners.
    Offered,
    /// Receiving the state and every socket.
    Given,
}

/// Asks the process behind `socket` for a handover to a process of `role`, and fails after `last`.
///
/// # Errors
///
/// The process does not come to that.
pub fn fail_after(last: Step, socket: &Path, role: &str) -> Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Field 1, a string (protobuf).
    let mut request = vec![0x0a, u8::try_from(role.len())?];
    request.extend_from_slice(role.as_bytes());
    send(&stream, &request)?;
    if last >= Step::Offered {
        ensure!(receive(&stream)? > 0, "no listener was offered");
    }
    if last >= Step::Given {
        send(&stream, &[])?;
        receive(&stream)?;
    }
    Ok(())
}

fn send(to: &UnixStream, message: &[u8]) -> Result<()> {
    let mut memory = File::from(memfd_create("successor", MFdFlags::empty())?);
    memory.write_all(message)?;
    let descriptors = [memory.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let head = [IoSlice::new(b"cpc1\0\0\0\0")];
    sendmsg::<()>(to.as_raw_fd(), &head, &control, MsgFlags::empty(), None)?;
    Ok(())
}

/// Receives a message, closes its descriptors, and returns their number.
fn receive(from: &UnixStream) -> Result<usize> {
    let mut head = [0; 8];
    let memory = receive_some(from, &mut head)?;
    ensure!(memory == 1 && head.starts_with(b"cpc1"), "{head:?}");
    let count = u32::from_be_bytes(head[4..].try_into()?);
    let count = usize::try_from(count)?;
    let mut received = 0;
    while received < count {
        let some = receive_some(from, &mut [0])?;
        ensure!(some > 0, "{received} descriptors of {count}");
        received += some;
    }
    Ok(count)
}

fn receive_some(from: &UnixStream, bytes: &mut [u8]) -> Result<usize> {
    let mut space = nix::cmsg_space!([RawFd; 253]);
    let mut slices = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let received = recvmsg::<()>(from.as_raw_fd(), &mut slices, Some(&mut space), flags);
    let received = received.context("no answer")?;
    ensure!(received.bytes > 0, "the process has closed the connection");
    let mut count = 0;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just given us these descriptors, and nothing else knows them.
            let own = descriptors
                .iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            count += own.count();
        }
    }
    Ok(count)
}
