//! One message with descriptors, over a Unix stream socket.
//!
//! The message itself is in a memfd (memfd_create(2)). The socket carries its descriptor, the number of the
//! others, and then these: so a whole parcel fits into the queue of a socket whose reader does not run yet.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::libc;
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

/// Number of descriptors for which memory is allocated before any has come.
const MOST_AT_ONCE: usize = 1 << 14;

/// A message with descriptors.
#[derive(Debug)]
pub struct Parcel {
    memory: File,
    descriptors: Vec<OwnedFd>,
}

impl Parcel {
    /// Creates an empty message: every field has its default.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            memory: memfd_create("cpc-handover", MemfdFlags::CLOEXEC)?.into(),
            descriptors: Vec::new(),
        })
    }

    /// Creates a parcel of a message alone.
    ///
    /// # Errors
    /// The error of a system call.
    pub fn of(message: &impl Message) -> io::Result<Self> {
        let mut parcel = Self::new()?;
        parcel.merge(message)?;
        Ok(parcel)
    }

    /// Merges `part` into the message: lists go on, so that a long one is never in memory as a whole.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn merge(&mut self, part: &impl Message) -> io::Result<()> {
        // The encodings of two messages in a row are that of both merged (protobuf).
        self.memory.write_all(&part.encode_to_vec())
    }

    /// Adds a descriptor, and returns its number.
    pub fn add(&mut self, descriptor: OwnedFd) -> u32 {
        // No process has 2^32 descriptors.
        let number = u32::try_from(self.descriptors.len()).unwrap_or(u32::MAX);
        self.descriptors.push(descriptor);
        number
    }

    /// Sends the message, and copies of the descriptors.
    ///
    /// # Errors
    /// The error of a system call.
    pub fn send(&self, to: &UnixStream) -> io::Result<()> {
        let count = u32::try_from(self.descriptors.len()).map_err(io::Error::other)?;
        let head = [MAGIC, count.to_be_bytes()].concat();
        send_with(to, &head, &[self.memory.as_fd()])?;
        let borrowed: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        for some in borrowed.chunks(DESCRIPTORS) {
            send_with(to, &[0], some)?;
        }
        Ok(())
    }

    /// Receives a parcel.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn receive(from: &UnixStream) -> Result<Self, HandoverError> {
        Self::read(from, MsgFlags::empty())
    }

    /// Returns a copy of the first parcel in the queue of `from`. The next call returns the same one.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn peek(from: &UnixStream) -> Result<Self, HandoverError> {
        peek_from_start(from)?;
        Self::read(from, MsgFlags::MSG_PEEK)
    }

    fn read(from: &UnixStream, flags: MsgFlags) -> Result<Self, HandoverError> {
        let mut head = [0; 8];
        let mut memory = receive_with(from, flags, &mut head)?.into_iter();
        let (Some(memory), None) = (memory.next(), memory.next()) else {
            return Err(HandoverError::Malformed("no memory"));
        };
        let (magic, count) = head.split_at(4);
        let count = count.try_into().map_or(u32::MAX, u32::from_be_bytes) as usize;
        if magic != MAGIC || count > MAX_DESCRIPTORS {
            return Err(HandoverError::Malformed("no parcel"));
        }
        let mut descriptors = Vec::with_capacity(count.min(MOST_AT_ONCE));
        while descriptors.len() < count {
            let some = receive_with(from, flags, &mut [0])?;
            if some.is_empty() || descriptors.len() + some.len() > count {
                return Err(HandoverError::Malformed("descriptors"));
            }
            descriptors.extend(some);
        }
        Ok(Self {
            memory: memory.into(),
            descriptors,
        })
    }

    /// Returns message and descriptors.
    ///
    /// # Errors
    /// The memory can't be read, or holds something else.
    pub fn open<M: Message + Default>(mut self) -> Result<(M, Vec<OwnedFd>), HandoverError> {
        let mut bytes = Vec::new();
        self.memory.rewind()?;
        self.memory.read_to_end(&mut bytes)?;
        // The message takes its bytes from here, without a copy.
        let message = M::decode(bytes::Bytes::from(bytes))?;
        Ok((message, self.descriptors))
    }
}

/// Sends a message alone.
///
/// # Errors
/// The error of a system call.
pub fn send(to: &UnixStream, message: &impl Message) -> io::Result<()> {
    Parcel::of(message)?.send(to)
}

/// Receives a message alone.
///
/// # Errors
/// [`HandoverError`].
pub fn receive<M: Message + Default>(from: &UnixStream) -> Result<M, HandoverError> {
    Ok(Parcel::receive(from)?.open()?.0)
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

/// Starts the reads of `from` with `MSG_PEEK` at the start of its queue. Each one goes on where the last has ended
/// (`SO_PEEK_OFF`, socket(7)).
fn peek_from_start(from: &UnixStream) -> io::Result<()> {
    let offset: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel reads as many bytes from `offset` as it has.
    let done = unsafe {
        libc::setsockopt(
            from.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of_val(&offset) as libc::socklen_t,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Fills `bytes`, and returns the descriptors that came with them.
fn receive_with(from: &UnixStream, flags: MsgFlags, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let mut descriptors = Vec::new();
    let mut filled = 0;
    while filled < bytes.len() {
        let mut slices = [IoSliceMut::new(&mut bytes[filled..])];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
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
    use prost::bytes::Bytes;
    use tunnel_proto::handover::{Connection, State};

    use super::*;

    /// More than the queue of a socket takes as bytes, and more descriptors than one message. No process reads
    /// before everything is sent.
    #[test]
    fn a_parcel_waits_in_the_socket_with_all_descriptors() {
        let (near, far) = UnixStream::pair().unwrap();
        let connection = Connection {
            cause: 7,
            ..Connection::default()
        };
        let pairs: Vec<_> = (0..600).map(|_| UnixStream::pair().unwrap()).collect();
        let mut parcel = Parcel::new().unwrap();
        let mut state = State {
            instance: vec![1; 16].into(),
            ..State::default()
        };
        parcel.merge(&state).unwrap();
        state.connections.push(connection);
        let part = State {
            instance: Bytes::new(),
            ..state.clone()
        };
        (0..100_000).for_each(|_| parcel.merge(&part).unwrap());
        for (number, (one, _)) in pairs.iter().enumerate() {
            let added = parcel.add(one.as_fd().try_clone_to_owned().unwrap());
            assert_eq!(added as usize, number);
        }
        parcel.send(&near).unwrap();
        send(&near, &State::default()).unwrap();
        drop(near);
        let (received, descriptors) = Parcel::receive(&far).unwrap().open::<State>().unwrap();
        assert_eq!(received.instance, state.instance);
        assert_eq!(
            received.connections,
            vec![state.connections[0].clone(); 100_000]
        );
        assert_eq!(descriptors.len(), 600);
        for (descriptor, (_, other)) in descriptors.into_iter().zip(&pairs) {
            (&UnixStream::from(descriptor)).write_all(b"x").unwrap();
            let mut read = [0];
            (&*other).read_exact(&mut read).unwrap();
        }
        assert_eq!(receive::<State>(&far).unwrap(), State::default());
        assert!(matches!(
            receive::<State>(&far),
            Err(HandoverError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof
        ));
    }

    #[test]
    fn a_peeked_parcel_stays_in_the_socket_with_all_descriptors() {
        let (near, far) = UnixStream::pair().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let state = State {
            instance: vec![1; 16].into(),
            ..State::default()
        };
        let mut parcel = Parcel::of(&state).unwrap();
        for _ in 0..600 {
            parcel.add(one.try_clone().unwrap().into());
        }
        parcel.send(&near).unwrap();
        send(&near, &State::default()).unwrap();
        drop((parcel, near, one));
        for reader in [Parcel::peek, Parcel::peek, Parcel::receive] {
            let (received, descriptors) = reader(&far).unwrap().open::<State>().unwrap();
            assert_eq!(received, state);
            assert_eq!(descriptors.len(), 600);
            for descriptor in descriptors {
                (&UnixStream::from(descriptor)).write_all(b"x").unwrap();
                (&other).read_exact(&mut [0]).unwrap();
            }
        }
        assert_eq!((&other).read(&mut [0]).unwrap(), 0, "no copy is left");
        for reader in [Parcel::peek, Parcel::receive] {
            let (received, _) = reader(&far).unwrap().open::<State>().unwrap();
            assert_eq!(received, State::default());
        }
        assert!(Parcel::peek(&far).is_err(), "the end");
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
