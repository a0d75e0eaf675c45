//! The two ends of a simulated connection: the client, and the target that it dials. Both know every byte
//! that they may receive.

use crate::interpose::kernel;
use crate::random::mix;

/// Length of the header that a client sends first: the number of its request.
pub const HEADER: u64 = 8;

/// Bytes that are moved in one call.
const CHUNK: usize = 16 << 10;

/// The number of a request, and the direction of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Number of the request.
    pub id: u64,
    /// Whether the bytes go to the client.
    pub is_answer: bool,
}

impl Stream {
    /// Returns the words of eight bytes from number `from` on.
    fn words(self, from: u64) -> impl Iterator<Item = [u8; 8]> {
        let base = mix(self.id << 1 | u64::from(self.is_answer));
        (from..).map(move |number| match number {
            0 if !self.is_answer => self.id.to_be_bytes(),
            number => mix(base.wrapping_add(number)).to_le_bytes(),
        })
    }

    /// Returns the bytes from an offset on. The first of a request are its number.
    pub fn bytes(self, from: u64, length: usize) -> Vec<u8> {
        let mut skipped = (from % 8) as usize;
        let mut bytes = Vec::with_capacity(length + 8);
        for word in self.words(from / 8) {
            if bytes.len() >= length {
                break;
            }
            bytes.extend_from_slice(&word[std::mem::take(&mut skipped)..]);
        }
        bytes.truncate(length);
        bytes
    }

    /// Returns the offset of the first byte that is not the stream's.
    fn first_wrong(self, from: u64, bytes: &[u8]) -> Option<u64> {
        let right = self.bytes(from, bytes.len());
        if right == bytes {
            return None;
        }
        let wrong = right.iter().zip(bytes).position(|(right, it)| right != it);
        wrong.map(|at| from + at as u64)
    }
}

/// Script of an end, in bytes and nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// Bytes to send, header included.
    pub send: u64,
    /// Time of the first byte.
    pub start: u64,
    /// Rest between writes.
    pub rest: u64,
    /// Largest write.
    pub write: usize,
    /// Bytes received after which the end stops to read for a while.
    pub stall_at: u64,
    /// Duration of the stop.
    pub stall: u64,
    /// Bytes sent and received after which the end aborts.
    pub abort_at: Option<u64>,
    /// Whether it ends its half only after the peer's end of file.
    pub waits: bool,
}

/// End of the peer, as an end has seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// An orderly end of file.
    Eof,
    /// A reset, or another error.
    Error(i32),
}

/// One end of a connection.
#[derive(Debug)]
pub struct End {
    /// Descriptor; `None` once it is closed.
    pub fd: Option<i32>,
    /// Incoming bytes; unknown on a target before the header.
    pub incoming: Option<Stream>,
    /// Outgoing bytes.
    pub outgoing: Option<Stream>,
    /// Script of the end.
    pub script: Script,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    header: Vec<u8>,
    /// Whether its half has ended in order.
    pub has_finished: bool,
    /// End of the peer, once seen.
    pub seen: Option<Seen>,
    /// Error of a write after the peer's end of file.
    error: Option<i32>,
    next_write: u64,
    stalled_until: Option<u64>,
}

/// Result of a poll of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing of note.
    Nothing,
    /// The header of a request.
    Header(u64),
    /// A byte that its peer has not sent.
    WrongByte {
        /// Offset of the byte.
        at: u64,
    },
}

impl End {
    /// Creates an end over a descriptor.
    pub fn new(fd: i32, script: Script) -> Self {
        Self {
            fd: Some(fd),
            incoming: None,
            outgoing: None,
            script,
            sent: 0,
            received: 0,
            header: Vec::new(),
            has_finished: false,
            seen: None,
            error: None,
            next_write: script.start,
            stalled_until: None,
        }
    }

    /// Whether both halves have ended in order.
    pub fn has_succeeded(&self) -> bool {
        self.seen == Some(Seen::Eof) && self.has_finished && self.error.is_none()
    }

    /// Begins the script of a target that knows its request.
    pub fn begin(&mut self, script: Script, id: u64, now: u64) {
        self.script = script;
        self.next_write = now.max(script.start);
        self.outgoing = Some(Stream {
            id,
            is_answer: true,
        });
    }

    /// Returns the time at which the end has something to do by itself.
    pub fn alarm(&self, now: u64) -> Option<u64> {
        self.fd?;
        let stall = self.stalled_until;
        let write = (self.outgoing.is_some() && !self.has_finished).then_some(self.next_write);
        let later = |at: &u64| *at > now;
        stall.into_iter().chain(write).filter(later).min()
    }

    /// Writes and reads as far as possible.
    pub fn poll(&mut self, now: u64) -> Found {
        if let Some(until) = self.stalled_until
            && until <= now
        {
            self.stalled_until = None;
        }
        let found = self.read(now);
        self.write(now);
        let Some(fd) = self.fd else {
            return found;
        };
        let moved = self.sent + self.received;
        if self.script.abort_at.is_some_and(|at| moved >= at) && self.seen.is_none() {
            self.close(true);
        } else if matches!(self.seen, Some(Seen::Error(_))) || self.error.is_some() {
            self.close(false);
        } else if self.seen == Some(Seen::Eof) && self.has_finished {
            let _ = kernel(|kernel| kernel.set_reset_on_close(fd, false));
            self.close(false);
        }
        found
    }

    /// Closes the connection, by a reset if so wanted.
    pub fn close(&mut self, reset: bool) {
        if let Some(fd) = self.fd.take() {
            let _ = kernel(|kernel| kernel.set_reset_on_close(fd, reset));
            let _ = kernel(|kernel| kernel.close(fd));
        }
    }

    fn read(&mut self, now: u64) -> Found {
        while let Some(fd) = self.fd
            && self.stalled_until.is_none()
            && self.seen.is_none()
        {
            let bytes = match kernel(|kernel| kernel.recv(fd, CHUNK)) {
                Ok(bytes) => bytes,
                Err(libc::EAGAIN) => break,
                Err(error) => {
                    self.seen = Some(Seen::Error(error));
                    break;
                }
            };
            if bytes.is_empty() {
                self.seen = Some(Seen::Eof);
                break;
            }
            let from = self.received;
            self.received += bytes.len() as u64;
            if self.script.stall > 0
                && from < self.script.stall_at
                && self.received >= self.script.stall_at
            {
                self.stalled_until = Some(now + self.script.stall);
            }
            match self.incoming {
                Some(stream) => {
                    if let Some(at) = stream.first_wrong(from, &bytes) {
                        return Found::WrongByte { at };
                    }
                }
                None => {
                    self.header.extend(&bytes);
                    let Some(id) = self.header.first_chunk().copied() else {
                        continue;
                    };
                    let stream = Stream {
                        id: u64::from_be_bytes(id),
                        is_answer: false,
                    };
                    self.incoming = Some(stream);
                    let header = std::mem::take(&mut self.header);
                    return match stream.first_wrong(0, &header) {
                        Some(at) => Found::WrongByte { at },
                        None => Found::Header(stream.id),
                    };
                }
            }
        }
        Found::Nothing
    }

    fn failed(&mut self, error: i32) {
        match self.seen {
            None => self.seen = Some(Seen::Error(error)),
            Some(_) => self.error = Some(error),
        }
    }

    fn write(&mut self, now: u64) {
        while let (Some(fd), Some(stream)) = (self.fd, self.outgoing)
            && !self.has_finished
            && self.next_write <= now
        {
            let left = self.script.send - self.sent;
            if left == 0 {
                if self.script.waits && self.seen.is_none() {
                    break;
                }
                match kernel(|kernel| kernel.shutdown(fd, libc::SHUT_WR)) {
                    Ok(_) => self.has_finished = true,
                    Err(error) => self.failed(error),
                }
                break;
            }
            let size = left.min(self.script.write as u64) as usize;
            match kernel(|kernel| kernel.send(fd, &stream.bytes(self.sent, size))) {
                Ok(sent) => self.sent += sent as u64,
                Err(libc::EAGAIN) => break,
                Err(error) => {
                    self.failed(error);
                    break;
                }
            }
            if self.script.rest > 0 {
                self.next_write = now + self.script.rest;
            }
        }
    }
}
