//! The thread that moves a link's packets from one device to the other, by their schedules.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::schedule::{Counts, Impairment, Schedule};

/// Packets that are read of one device before the other has its turn.
const BATCH: usize = 64;

/// More than a packet has.
const ROOM: usize = 1 << 16;

/// State shared by the thread and its owner.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Configuration of each direction.
    pub(super) path: Mutex<[Impairment; 2]>,
    /// Counts of the packets of each direction.
    pub(super) counts: Mutex<[Counts; 2]>,
}

/// Devices of a link: packets read from one are written to the other.
pub(super) struct Pump<'a> {
    pub(super) devices: [File; 2],
    pub(super) schedules: [Schedule; 2],
    pub(super) shared: &'a Shared,
    /// Socket whose other end the owner drops to end the thread.
    pub(super) owner: UnixStream,
}

impl Pump<'_> {
    /// Moves packets until the owner has dropped its end.
    pub(super) fn run(mut self) -> Result<(), Errno> {
        let mut buffer = vec![0; ROOM];
        loop {
            let path = *lock(&self.shared.path);
            let mut is_busy = false;
            for (from, path) in path.iter().enumerate() {
                is_busy |= self.read(from, path, &mut buffer);
            }
            self.write(Instant::now());
            *lock(&self.shared.counts) = [0, 1].map(|from| self.schedules[from].counts());
            if !is_busy && self.wait()? {
                return Ok(());
            }
        }
    }

    /// Takes packets from a device. `true`: there may be more.
    fn read(&mut self, from: usize, path: &Impairment, buffer: &mut [u8]) -> bool {
        for _ in 0..BATCH {
            match (&self.devices[from]).read(buffer) {
                Ok(size) => self.schedules[from].push(path, Instant::now(), &buffer[..size]),
                // Nothing more; or the device is not up, and `wait` decides how to go on.
                Err(error) => return error.kind() == ErrorKind::Interrupted,
            }
        }
        true
    }

    fn write(&mut self, now: Instant) {
        for from in 0..2 {
            while let Some(packet) = self.schedules[from].pop(now) {
                // A device that is down, or a full backlog, loses it, as on any network.
                let _ = (&self.devices[1 - from]).write(&packet);
            }
        }
    }

    /// Waits for packets, or until one is due. `true`: the owner has dropped its end.
    fn wait(&self) -> Result<bool, Errno> {
        let next = self.schedules.iter().filter_map(Schedule::next).min();
        let now = Instant::now();
        let timeout = next.map(|at| TimeSpec::from(at.saturating_duration_since(now)));
        let [one, other] = &self.devices;
        let mut watched = [one.as_fd(), other.as_fd(), self.owner.as_fd()]
            .map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
        match ppoll(&mut watched, timeout, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        Ok(watched[2].any() == Some(true))
    }
}

/// Locks a mutex; no holder panics.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
