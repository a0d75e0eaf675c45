//! The connector's sign of life.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::{
    RedirectError,
    maps::{self, failed},
    pin::Pin,
};

/// Tells the kernel that an attachment's connector is alive.
///
/// After 3 s without a [`Self::beat`] ([`super::HEARTBEAT_STALE_NS`]) its captured connections
/// are refused, or pass where it fails open. Beat twice a second, from the thread that accepts:
/// a beat from elsewhere would speak for a thread that may be stuck.
pub struct Heartbeat {
    map: maps::Heartbeats,
    attachment: u32,
}

impl Heartbeat {
    pub(super) fn open(pin: &Pin, name: &str) -> Result<Self, RedirectError> {
        let (attachment, _) = maps::attached(pin, name)?;
        Ok(Self {
            map: maps::heartbeats(pin, maps::Access::Write)?,
            attachment,
        })
    }

    /// Alive now.
    pub fn beat(&mut self) -> Result<(), RedirectError> {
        self.set(monotonic_ns())
    }

    /// No longer alive: refuse at once instead of after 3 s. The listener may live on, in a
    /// service manager's hands.
    pub fn stop(&mut self) -> Result<(), RedirectError> {
        self.set(0)
    }

    fn set(&mut self, now: u64) -> Result<(), RedirectError> {
        self.map
            .set(self.attachment, now, 0)
            .map_err(failed("HEARTBEATS"))
    }
}

/// `bpf_ktime_get_ns`, as seen from here.
pub(super) fn monotonic_ns() -> u64 {
    // The clock exists on every Linux; reading it can't fail with a valid address.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default();
    now.as_nanos() as u64
}
