//! A connection to an [echo](crate::target::Behaviour::Echo) that goes on while something is done to the
//! connector: it shows whether a byte is lost, doubled or changed, and how long the connection stood still.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::Socket;

use crate::pattern::{self, Checker};

/// A connection without a byte for so long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Traffic of a conversation.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Messages of so many bytes, each sent when the last one has come back and the pause is over.
    Messages(usize, Duration),
    /// As much as the connection takes.
    Bulk,
}

/// A running conversation.
#[derive(Debug)]
pub struct Conversation {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<Heard>>,
}

#[derive(Debug)]
struct Heard {
    bytes: u64,
    longest_gap: Duration,
}

/// A conversation that has ended in order, with every byte right.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Number of bytes there, and back.
    pub bytes: u64,
    /// Longest time between two reads that returned bytes.
    pub longest_gap: Duration,
}

impl Conversation {
    /// Starts a conversation over `stream`.
    ///
    /// # Errors
    ///
    /// The error of a system call.
    pub fn start(stream: Socket, pace: Pace) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (echoed, echoes) = std::sync::mpsc::channel();
        let (mut writer, mut reader) = (stream.try_clone()?, stream);
        let stopped = stop.clone();
        let sender = thread::spawn(move || {
            let size = match pace {
                Pace::Messages(size, _) => size,
                Pace::Bulk => 64 << 10,
            };
            let mut buffer = vec![0; size];
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                pattern::fill(sent, &mut buffer);
                writer
                    .write_all(&buffer)
                    .with_context(|| format!("to send byte {sent}"))?;
                sent += size as u64;
                if let Pace::Messages(_, pause) = pace {
                    while echoes.recv().is_ok_and(|position: u64| position < sent) {}
                    thread::sleep(pause);
                }
            }
            writer
                .shutdown(Shutdown::Write)
                .context("to end the half")?;
            Ok(sent)
        });
        let receiver = thread::spawn(move || {
            let mut checker = Checker::default();
            let mut buffer = vec![0; 256 << 10];
            let (mut last, mut longest_gap) = (Instant::now(), Duration::ZERO);
            loop {
                let read = match reader.read(&mut buffer) {
                    Ok(n) => n,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(e) => {
                        let position = checker.position();
                        return Err(e).with_context(|| format!("to receive byte {position}"));
                    }
                };
                longest_gap = longest_gap.max(last.elapsed());
                last = Instant::now();
                if read == 0 {
                    return Ok(Heard {
                        bytes: checker.position(),
                        longest_gap,
                    });
                }
                checker.update(&buffer[..read])?;
                // A sender that has stopped needs no echo.
                let _ = echoed.send(checker.position());
            }
        });
        Ok(Self {
            stop,
            sender,
            receiver,
        })
    }

    /// Whether it goes on.
    pub fn goes_on(&self) -> bool {
        !self.sender.is_finished() && !self.receiver.is_finished()
    }

    /// Has it end as soon as possible.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends it: the half of the sender, then the other one.
    ///
    /// # Errors
    ///
    /// It was cut, or a byte was wrong.
    pub fn finish(self) -> Result<Summary> {
        self.stop();
        let heard = join(self.receiver);
        let sent = join(self.sender);
        let (heard, sent) = (heard?, sent?);
        ensure!(
            heard.bytes == sent,
            "{} bytes came back of {sent}",
            heard.bytes
        );
        Ok(Summary {
            bytes: sent,
            longest_gap: heard.longest_gap,
        })
    }
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
