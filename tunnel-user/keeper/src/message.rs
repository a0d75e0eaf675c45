//! One datagram: a message with at most one descriptor.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use prost::bytes::Bytes;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::KeeperError;

/// Maximum size of a message in bytes.
pub(crate) const MAX_MESSAGE: usize = 8 << 10;

/// Maximum size of a description in bytes. The rest of a message has room beside it.
pub(crate) const MAX_DESCRIPTION: usize = 4 << 10;

/// Number of descriptors for which there is room: more than one, so that a message with several is known for one
/// even where the kernel does not say that it has left some out.
const ROOM: usize = 4;

/// A received message.
#[derive(Debug)]
pub(crate) struct Received<M> {
    pub(crate) message: M,
    pub(crate) descriptor: Attached,
}

/// The descriptor beside a message.
#[derive(Debug)]
pub(crate) enum Attached {
    None,
    One(OwnedFd),
    /// More than one, or fewer than were sent: this process has no room for another descriptor. All are closed.
    Lost,
}

impl Attached {
    /// Returns the only descriptor.
    pub(crate) fn one(self) -> Option<OwnedFd> {
        match self {
            Self::One(descriptor) => Some(descriptor),
            Self::None | Self::Lost => None,
        }
    }
}

/// Sends a message, and a duplicate of the descriptor.
///
/// # Errors
/// The error of sendmsg(2). `WouldBlock`: the queue is full, or the timeout of the socket is over.
pub(crate) fn send(
    to: &impl AsFd,
    message: &impl Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = message.encode_to_vec();
    let descriptors = descriptor.as_slice();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    loop {
        let slices = [IoSlice::new(&bytes)];
        match sendmsg(to, &slices, &mut control, SendFlags::NOSIGNAL) {
            // A datagram is sent as a whole.
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a message. Returns `None` at the end of the connection. A datagram without a byte counts as the end.
///
/// # Errors
/// [`KeeperError::Io`] with `WouldBlock`: there is none now, or the timeout of the socket is over. With another
/// kind, [`KeeperError::Malformed`] and [`KeeperError::Decode`]: the connection is of no use any more.
pub(crate) fn receive<M: Message + Default>(
    from: &impl AsFd,
) -> Result<Option<Received<M>>, KeeperError> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut resets = 0;
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg(from, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            // Reported once, in front of the messages in the queue: the peer has ended without reading an answer.
            Err(Errno::CONNRESET) if resets == 0 => resets += 1,
            Err(error) => return Err(KeeperError::Io(error.into())),
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            descriptors.extend(some);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(KeeperError::Malformed("longer than 8 KiB"));
    }
    // A copy: a slice would hold the whole buffer for as long as a field of the message lives.
    let Some(bytes) = bytes.get(..received.bytes).filter(|it| !it.is_empty()) else {
        return Ok(None);
    };
    let message = M::decode(Bytes::copy_from_slice(bytes))?;
    let is_cut = received.flags.contains(ReturnFlags::CTRUNC);
    let descriptor = match (descriptors.pop(), descriptors.is_empty(), is_cut) {
        (None, _, false) => Attached::None,
        (Some(descriptor), true, false) => Attached::One(descriptor),
        _ => Attached::Lost,
    };
    Ok(Some(Received {
        message,
        descriptor,
    }))
}

/// Returns whether a send or receive failed for now alone.
pub(crate) fn is_later(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}
