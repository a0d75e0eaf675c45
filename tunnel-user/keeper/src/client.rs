//! The owner's side: what to keep, and what no longer.
//!
//! A thread sends everything, so that no caller waits for the keeper. The number of a dropped slot is free only once
//! its `Drop` is sent: a next process would otherwise find an old socket with the progress of a new one.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::bytes::Bytes;
use socket2::Socket;
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{Discard, Drop as DropSlot, Hello, Keep};

use crate::connect::{answer, connect, request};
use crate::error::KeeperError;
use crate::message::{Attached, MAX_DESCRIPTION};
use crate::numbers::Numbers;
use crate::table::Table;
use cpc_host::report::report;

/// Time for the keeper to close everything.
const DISCARD: Duration = Duration::from_secs(2);

/// Maximum number of sockets that wait to be sent. Each has a descriptor of its own.
const MAX_QUEUED: usize = 4096;

/// Pause while too many descriptors are in flight (`ETOOMANYREFS`, unix(7)), and number of attempts.
const PAUSE: Duration = Duration::from_millis(10);
const ATTEMPTS: usize = 500;

/// The connection of an owner to its keeper. Clones share it.
#[derive(Clone, Debug)]
pub struct Keeper {
    shared: Arc<Shared>,
}

/// State of callers and slots. The thread ends with the last of them.
#[derive(Debug)]
struct Shared {
    table: Table,
    commands: Sender<Command>,
    common: Arc<Common>,
}

/// State that the thread has a part in.
#[derive(Debug)]
struct Common {
    socket: Socket,
    numbers: Mutex<Numbers>,
    /// Number of sockets that wait to be sent.
    queued: AtomicUsize,
    is_gone: AtomicBool,
    is_discarded: AtomicBool,
}

#[derive(Debug)]
enum Command {
    Keep {
        slot: u32,
        description: Vec<u8>,
        descriptor: OwnedFd,
    },
    Drop(u32),
    Flush(SyncSender<()>),
    Discard(SyncSender<bool>),
}

impl Keeper {
    /// Connects to the keeper at `path`. The sockets of this process wait for `patience` after its death, at most
    /// 10 minutes, for a process that [takes](crate::take) those of `role`. `process` is the instance_id.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn open(
        path: &Path,
        role: &str,
        process: &[u8],
        patience: Duration,
    ) -> Result<Self, KeeperError> {
        let table = Table::new().map_err(KeeperError::Table)?;
        let socket = connect(path)?;
        let hello = Hello {
            role: role.to_owned(),
            process: Bytes::copy_from_slice(process),
            patience_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        };
        request(&socket, Kind::Hello(hello), Some(table.descriptor()))?;
        let (AnswerKind::Done(_), _) = answer(&socket)? else {
            return Err(KeeperError::Malformed("no Done to Hello"));
        };
        // The thread may wait: only the queue grows, and that has a bound.
        socket.set_write_timeout(None)?;
        socket.set_read_timeout(Some(DISCARD))?;
        let common = Arc::new(Common {
            socket,
            numbers: Mutex::default(),
            queued: AtomicUsize::new(0),
            is_gone: AtomicBool::new(false),
            is_discarded: AtomicBool::new(false),
        });
        let (commands, queue) = channel();
        let of_thread = Arc::clone(&common);
        thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || of_thread.run(&queue))
            .map_err(KeeperError::Thread)?;
        let shared = Arc::new(Shared {
            table,
            commands,
            common,
        });
        Ok(Self { shared })
    }

    /// Gives the keeper a duplicate of `descriptor`, of which `consumed` bytes were read, with at most 4 KiB for the next
    /// process to know. Never blocks.
    /// Returns `None` if the keeper is gone or too far behind, if 65,536 sockets are kept, and if this process has no
    /// descriptor left: the socket then ends with this process.
    pub fn keep(
        &self,
        description: Vec<u8>,
        consumed: u64,
        descriptor: BorrowedFd<'_>,
    ) -> Option<Slot> {
        let Shared {
            table,
            commands,
            common,
        } = &*self.shared;
        let is_behind = common.queued.load(Ordering::Relaxed) >= MAX_QUEUED;
        if is_behind || common.is_gone() || description.len() > MAX_DESCRIPTION {
            return None;
        }
        let descriptor = descriptor.try_clone_to_owned().ok()?;
        // Held until the command is in the queue: none may be behind a Discard.
        let mut numbers = common.numbers();
        if numbers.is_closed {
            return None;
        }
        let number = numbers.take()?;
        table.set_consumed(number, consumed);
        table.set_intended(number, consumed);
        common.queued.fetch_add(1, Ordering::Relaxed);
        let command = Command::Keep {
            slot: number,
            description,
            descriptor,
        };
        if commands.send(command).is_err() {
            numbers.end();
            return None;
        }
        drop(numbers);
        Some(Slot {
            number,
            shared: Arc::clone(&self.shared),
        })
    }

    /// Has the keeper close all its duplicates, before a planned end or a handover. Waits for at most 2 seconds.
    /// Returns whether they are closed. Nothing is kept from now on.
    pub fn discard(&self) -> bool {
        let (reply, done) = sync_channel(1);
        let mut numbers = self.shared.common.numbers();
        numbers.is_closed = true;
        let sent = self.shared.commands.send(Command::Discard(reply));
        drop(numbers);
        // Both fail where an earlier call has done it.
        let is_done = sent.is_ok() && done.recv_timeout(DISCARD).unwrap_or(false);
        is_done || self.shared.common.is_discarded.load(Ordering::Acquire)
    }

    /// Waits until everything that was ordered before has been sent, at most 2 seconds.
    pub fn flush(&self) {
        let (reply, done) = sync_channel(1);
        if self.shared.commands.send(Command::Flush(reply)).is_ok() {
            // Both errors tell that the keeper is of no use.
            let _ = done.recv_timeout(DISCARD);
        }
    }

    /// Returns whether the connection to the keeper was lost, as far as this process has noticed.
    pub fn is_gone(&self) -> bool {
        self.shared.common.is_gone()
    }

    /// Returns whether the keeper is there, as far as the kernel knows, and keeps sockets.
    pub fn is_there(&self) -> bool {
        let common = &self.shared.common;
        if common.is_gone() {
            return false;
        }
        let mut polled = [PollFd::new(common.socket.as_fd(), PollFlags::empty())];
        let has_ended = poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        if has_ended {
            common.lose(&KeeperError::Io(ErrorKind::UnexpectedEof.into()));
        }
        !has_ended
    }

    /// Returns the number of slots in use.
    pub fn kept(&self) -> usize {
        self.shared.common.numbers().used()
    }

    /// Returns the connection.
    #[cfg(test)]
    pub(crate) fn shared_socket(&self) -> &Socket {
        &self.shared.common.socket
    }

    /// Returns whether everything has been sent.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        self.shared.common.queued.load(Ordering::Acquire) == 0
    }
}

impl Common {
    /// Sends what callers order, until the last of them has gone.
    fn run(&self, queue: &Receiver<Command>) {
        while let Ok(command) = queue.recv() {
            let sent = match command {
                Command::Keep {
                    slot,
                    description,
                    descriptor,
                } => {
                    let sent = self.keep(slot, description, &descriptor);
                    drop(descriptor);
                    self.queued.fetch_sub(1, Ordering::Release);
                    sent
                }
                Command::Drop(slot) => request(&self.socket, Kind::Drop(DropSlot { slot }), None)
                    .map(|()| self.numbers().free(slot)),
                Command::Flush(reply) => {
                    // The caller waits.
                    let _ = reply.try_send(());
                    Ok(())
                }
                Command::Discard(reply) => {
                    let done = self.discard();
                    match &done {
                        // Its end is no surprise any more.
                        Ok(()) => {
                            self.is_discarded.store(true, Ordering::Release);
                            self.is_gone.store(true, Ordering::Release);
                        }
                        Err(error) => self.lose(error),
                    }
                    // The caller may have stopped waiting.
                    let _ = reply.try_send(done.is_ok());
                    return;
                }
            };
            if let Err(error) = sent {
                return self.lose(&error);
            }
        }
    }

    fn keep(
        &self,
        slot: u32,
        description: Vec<u8>,
        descriptor: &OwnedFd,
    ) -> Result<(), KeeperError> {
        let keep = Keep {
            slot,
            description: description.into(),
        };
        let mut attempts = 0;
        loop {
            let kind = Kind::Keep(keep.clone());
            match request(&self.socket, kind, Some(descriptor.as_fd())) {
                Err(KeeperError::Io(error))
                    if error.raw_os_error() == Some(Errno::ETOOMANYREFS as i32)
                        && attempts < ATTEMPTS =>
                {
                    attempts += 1;
                    thread::sleep(PAUSE);
                }
                sent => return sent,
            }
        }
    }

    fn discard(&self) -> Result<(), KeeperError> {
        request(&self.socket, Kind::Discard(Discard {}), None)?;
        match answer(&self.socket)? {
            (AnswerKind::Done(_), Attached::None) => Ok(()),
            _ => Err(KeeperError::Malformed("no Done to Discard")),
        }
    }

    /// Notes that the keeper is gone, and logs it once.
    fn lose(&self, error: &KeeperError) {
        // One that lives closes what it has of this process: that can't tell it any more what it has closed.
        let _ = self.socket.shutdown(Shutdown::Both);
        if !self.is_gone.swap(true, Ordering::AcqRel) {
            tracing::warn!(
                error = report(error),
                "no keeper any more: a crash of this process ends its connections"
            );
        }
    }

    fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A kept socket. The keeper closes its duplicate when this is dropped.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    shared: Arc<Shared>,
}

impl Slot {
    /// Returns whether the keeper is gone that has the duplicate, as far as this process has noticed.
    pub fn is_lost(&self) -> bool {
        self.shared.common.is_gone()
    }

    /// Notes, before a read, the number of bytes of this socket that will have been read after it. One store in
    /// memory.
    pub fn consuming(&self, total: u64) {
        self.shared.table.set_intended(self.number, total);
    }

    /// Notes, after a read, the number of bytes of this socket that were read.
    pub fn consumed(&self, total: u64) {
        self.shared.table.set_consumed(self.number, total);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.common.numbers().end();
        // The keeper may be gone, and has then closed everything.
        let _ = self.shared.commands.send(Command::Drop(self.number));
    }
}
