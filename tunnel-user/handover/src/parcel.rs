//! One message with descriptors, over a Unix stream socket.
//!
//! The message itself is in a memfd (memfd_create(2)). The socket carries its descriptor, the number of the
//! others, and then these: so a whole parcel fits into the queue of a socket whose reader does not run yet.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use prost::Message;
use rustix::fs::{MemfdFlags, memfd_create};

use super::error::HandoverError;

/// First bytes of a parcel.
const MAGIC: [u8; 4] = *b"cpc1";

/// Maximum number of descriptors of one sendmsg(2) (`SCM_MAX_FD`, unix(7)).
const DESCRIPTORS: usize = 253;

/// Maximum number of descriptors of a parcel: more than any process has.
const MAX_DESCRIPTORS: usize = 1 << 24;

/// Sends `message` with `descriptors`.
///
/// # Errors
/// The error of a system call.
pub fn send(
    to: &UnixStream,
    message: &impl Message,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut memory = File::from(memfd_create("cpc-handover", MemfdFlags::CLOEXEC)?);
    memory.write_all(&message.encode_to_vec())?;
    let count = u32::try_from(descriptors.len()).map_err(io::Error::other)?;
    let head = [MAGIC, count.to_be_bytes()].concat();
    send_with(to, &head, &[memory.as_fd()])?;
    for some in descriptors.chunks(DESCRIPTORS) {
        send_with(to, &[0], some)?;
    }
    Ok(())
}

fn send_with(to: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    loop {
        let bytes = [IoSlice::new(bytes)];
        match sendmsg::<()>(
            to.as_raw_fd(),
            &bytes,
            &control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(n) if n == bytes[0].len() => return Ok(()),
            Ok(_) => return Err(ErrorKind::WriteZero.into()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a message and its descriptors.
///
/// # Errors
/// [`HandoverError`].
pub fn receive<M: Message + Default>(
    from: &UnixStream,
) -> Result<(M, Vec<OwnedFd>), HandoverError> {
    let mut head = [0; 8];
    let mut memory = receive_with(from, &mut head)?.into_iter();
    let (Some(memory), None) = (memory.next(), memory.next()) else {
        return Err(HandoverError::Malformed("no memory"));
    };
    let (magic, count) = head.split_at(4);
    let count = count.try_into().map(u32::from_be_bytes).unwrap_or(u32::MAX) as usize;
    if magic != MAGIC || count > MAX_DESCRIPTORS {
        return Err(HandoverError::Malformed("no parcel"));
    }
    let mut descriptors = Vec::with_capacity(count);
    while descriptors.len() < count {
        let some = receive_with(from, &mut [0])?;
        if some.is_empty() || descriptors.len() + some.len() > count {
            return Err(HandoverError::Malformed("descriptors"));
        }
        descriptors.extend(some);
    }
    let (mut memory, mut bytes) = (File::from(memory), Vec::new());
    memory.rewind()?;
    memory.read_to_end(&mut bytes)?;
    // The message takes its bytes from here, without a copy.
    Ok((M::decode(prost::bytes::Bytes::from(bytes))?, descriptors))
}

/// Fills `bytes`, and returns the descriptors that came with them.
fn receive_with(from: &UnixStream, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let mut descriptors = Vec::new();
    let mut filled = 0;
    while filled < bytes.len() {
        let mut slices = [IoSliceMut::new(&mut bytes[filled..])];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(from.as_raw_fd(), &mut slices, Some(&mut space), flags);
        let received = match received {
            Err(nix::errno::Errno::EINTR) => continue,
            received => received?,
        };
        for control in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just given us these descriptors, and nothing else knows them.
                let own = raw.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                descriptors.extend(own);
            }
        }
        match received.bytes {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => filled += n,
        }
    }
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use tunnel_proto::handover::{Connection, State};

    use super::*;

    /// More than the queue of a socket takes as bytes, and more descriptors than one message. Nobody reads
    /// before everything is sent.
    #[test]
    fn a_parcel_waits_in_the_socket_with_all_descriptors() {
        let (near, far) = UnixStream::pair().unwrap();
        let connection = Connection {
            cause: 7,
            ..Connection::default()
        };
        let state = State {
            instance: vec![1; 16].into(),
            connections: vec![connection; 100_000],
        };
        let pairs: Vec<_> = (0..600).map(|_| UnixStream::pair().unwrap()).collect();
        let sent: Vec<_> = pairs.iter().map(|(one, _)| one.as_fd()).collect();
        send(&near, &state, &sent).unwrap();
        send(&near, &State::default(), &[]).unwrap();
        drop(near);
        let (received, descriptors) = receive::<State>(&far).unwrap();
        assert_eq!((received, descriptors.len()), (state, 600));
        for (descriptor, (_, other)) in descriptors.into_iter().zip(&pairs) {
            (&UnixStream::from(descriptor)).write_all(b"x").unwrap();
            let mut read = [0];
            (&*other).read_exact(&mut read).unwrap();
        }
        let (second, none) = receive::<State>(&far).unwrap();
        assert!(second == State::default() && none.is_empty());
        assert!(matches!(
            receive::<State>(&far),
            Err(HandoverError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof
        ));
    }

    #[test]
    fn what_is_no_parcel_is_refused() {
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(b"cpc1\0\0\0\0").unwrap();
        let error = receive::<State>(&far).unwrap_err();
        assert!(matches!(error, HandoverError::Malformed(_)), "{error}");
        for head in [*b"cpc1\xff\xff\xff\xff", *b"http\0\0\0\0"] {
            send_with(&near, &head, &[near.as_fd()]).unwrap();
            let error = receive::<State>(&far).unwrap_err();
            assert!(matches!(error, HandoverError::Malformed(_)), "{error}");
        }
    }
}
