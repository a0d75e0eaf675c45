//! The shortcut: what clients write goes into our receive queues, past TCP on loopback.
//!
//! The kernel keeps no order between the two ways and bounds nothing on this one. The programs do
//! both, by what the accepting side tells them that it has read. So every byte that is read has to
//! be told, whichever way it came.

mod program;

use std::{
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
};

use tunnel_ebpf_common::FlowKey;

use super::{
    RedirectError,
    maps::{self, failed},
    pin::Pin,
};

pub(super) use program::load;
pub use tunnel_ebpf_common::SHORTCUT_BYTES;

/// The shortcuts of one attachment. Opened anew after its namespace has changed.
pub struct Shortcuts {
    readers: maps::ShortcutReaders,
    read: maps::ShortcutCounts,
    taken: maps::ShortcutCounts,
    netns: u64,
}

/// A connection with a shortcut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortcut(FlowKey);

impl Shortcuts {
    pub(super) fn open(pin: &Pin, name: &str) -> Result<Self, RedirectError> {
        let (_, attachment) = maps::attached(pin, name)?;
        Ok(Self {
            readers: maps::shortcut_readers(pin)?,
            read: maps::shortcut_read(pin)?,
            taken: maps::shortcut_taken(pin)?,
            netns: attachment.netns,
        })
    }

    /// Opens the shortcut to an accepted socket, of which nothing has been read yet. `client` and
    /// `listener` are as for [`super::Flows::take_origin`].
    ///
    /// # Errors
    ///
    /// The client has gone already, or there are too many; the connection stays TCP's.
    pub fn open_to(
        &mut self,
        socket: &impl AsFd,
        client: SocketAddr,
        listener: SocketAddr,
    ) -> Result<Shortcut, RedirectError> {
        let key = FlowKey {
            netns: self.netns,
            client: client.into(),
            listener: listener.into(),
        };
        let shortcut = Shortcut(key);
        let opened = self.insert(key, socket);
        if opened.is_err() {
            self.close(shortcut);
        }
        opened.map(|()| shortcut)
    }

    /// The socket comes last: it is what the programs look for.
    fn insert(&mut self, key: FlowKey, socket: &impl AsFd) -> Result<(), RedirectError> {
        self.taken
            .insert(key, 0, 0)
            .map_err(failed("SHORTCUT_TAKEN"))?;
        self.read
            .insert(key, 0, 0)
            .map_err(failed("SHORTCUT_READ"))?;
        self.readers
            .insert(key, socket.as_fd().as_raw_fd(), 0)
            .map_err(failed("SHORTCUT_READERS"))
    }

    /// Tells how many bytes have been read in all.
    pub fn has_read(&mut self, shortcut: Shortcut, bytes: u64) -> Result<(), RedirectError> {
        self.read
            .insert(shortcut.0, bytes, 0)
            .map_err(failed("SHORTCUT_READ"))
    }

    /// How many bytes took the shortcut, those that have not been read yet among them.
    pub fn taken(&self, shortcut: Shortcut) -> Result<u64, RedirectError> {
        self.taken
            .get(&shortcut.0, 0)
            .map_err(failed("SHORTCUT_TAKEN"))
    }

    /// Forgets a connection. Its socket leaves the map by itself when it is closed.
    pub fn close(&mut self, shortcut: Shortcut) {
        // What is not there need not be forgotten.
        let _ = self.read.remove(&shortcut.0);
        let _ = self.taken.remove(&shortcut.0);
    }
}
