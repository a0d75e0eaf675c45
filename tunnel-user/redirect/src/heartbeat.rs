//! The heartbeat of the connector.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use aya::maps::MapError;
use nix::time::{ClockId, clock_gettime};
use tunnel_ebpf_common as common;

use super::{
    RedirectError,
    maps::{self, failed},
    pin::Pin,
};

/// The heartbeat of an attachment in the kernel.
///
/// After 3 s without a [`Self::beat`] ([`super::HEARTBEAT_STALE_NS`]) captured connections are refused,
/// or pass where the attachment fails open. Beat twice a second, from the thread that accepts: a beat
/// from elsewhere would speak for a thread that may be stuck.
pub struct Heartbeat {
    map: maps::Heartbeats,
    listeners: maps::Listeners,
    attachment: u32,
    now: common::Heartbeat,
}

impl Heartbeat {
    pub(super) fn open(pin: &Pin, name: &str) -> Result<Self, RedirectError> {
        let (attachment, _) = maps::attached(pin, name)?;
        let map = maps::heartbeats(pin, super::link::Access::Write)?;
        let now = map.get(&attachment, 0).map_err(failed("HEARTBEATS"))?;
        Ok(Self {
            map,
            listeners: maps::listeners(pin)?,
            attachment,
            now,
        })
    }

    /// Makes the kernel programs redirect to `listener`, for its family, from the next beat on.
    /// They accept no other socket in its place, even on the same port.
    pub fn listen(&mut self, listener: &TcpListener) -> Result<(), RedirectError> {
        let unknown = |error: io::Error| failed("LISTENERS")(MapError::IoError(error));
        let address = listener.local_addr().map_err(unknown)?;
        self.listeners
            .insert(listener, self.attachment, 0)
            .map_err(failed("LISTENERS"))?;
        let port = match address {
            SocketAddr::V4(_) => &mut self.now.port4,
            SocketAddr::V6(_) => &mut self.now.port6,
        };
        *port = address.port().into();
        Ok(())
    }

    /// Writes the present time.
    pub fn beat(&mut self) -> Result<(), RedirectError> {
        self.now.at = monotonic_ns();
        self.set(self.now)
    }

    /// Ends the heartbeat: refuse at once instead of after 3 s. The service manager may keep the
    /// listener.
    pub fn stop(&mut self) -> Result<(), RedirectError> {
        self.now.at = 0;
        self.set(self.now)
    }

    fn set(&mut self, heartbeat: common::Heartbeat) -> Result<(), RedirectError> {
        self.map
            .set(self.attachment, heartbeat, 0)
            .map_err(failed("HEARTBEATS"))
    }
}

/// Returns the time of `bpf_ktime_get_ns`.
pub(super) fn monotonic_ns() -> u64 {
    // The clock exists on every Linux; reading it can't fail with a valid address.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default();
    now.as_nanos() as u64
}
