//! A path that delays, loses, reorders, throttles and drops packets.
//!
//! A veth pair of the laboratory gives way to two TUN devices of the same names, one in each
//! namespace, and a thread of this process carries the packets between them. So everything that is
//! IP passes through it, of the kernel's own TCP as of the tunnel, and no kernel module is needed
//! (netem is missing in many). What happens to packets can be changed while they flow.
//!
//! The decisions are [`schedule`]'s. Their seed is printed; [`SEED`] repeats it.

mod pump;
pub mod schedule;
mod tun;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;

use super::Lab;
use super::netns::Netns;
use pump::{Pump, Shared, lock};
use schedule::Schedule;
pub use schedule::{Counts, Impairment};

/// The environment variable that gives the seed.
pub const SEED: &str = "CPC_LAB_SEED";

/// A link of the router's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Link to the control plane, which all workers share.
    ControlPlane,
    /// Link to a worker (from 1).
    Worker(u8),
}

/// A direction on a link, seen from the router in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the router.
    Outward = 0,
    /// To the router.
    Inward = 1,
}

/// A link whose packets pass through this process. Dropping it cuts the link.
#[derive(Debug)]
pub struct Shaper {
    shared: Arc<Shared>,
    /// Dropped to end the thread.
    owner: Option<UnixStream>,
    thread: Option<JoinHandle<Result<(), Errno>>>,
}

impl Impairment {
    /// Returns a delay of half of `rtt`, for each direction.
    pub fn of_rtt(rtt: Duration) -> Self {
        Self {
            delay: rtt / 2,
            ..Self::default()
        }
    }
}

impl Shaper {
    /// Carries packets between two new devices; each is a namespace and the device's name.
    pub(super) fn start(router: (&Netns, &str), other: (&Netns, &str)) -> Result<Self> {
        let seed = seed()?;
        eprintln!("path {}: {SEED}={seed}", router.1);
        let devices = [tun::open(router.0, router.1)?, tun::open(other.0, other.1)?];
        let shared = Arc::<Shared>::default();
        let (owner, owned) = UnixStream::pair()?;
        let thread = thread::Builder::new().name("shaper".into());
        let thread = thread.spawn({
            let shared = shared.clone();
            move || {
                let pump = Pump {
                    devices,
                    schedules: [seed, !seed].map(Schedule::new),
                    shared: &shared,
                    owner: owned,
                };
                pump.run()
            }
        })?;
        Ok(Self {
            shared,
            owner: Some(owner),
            thread: Some(thread),
        })
    }

    /// Sets the treatment of later packets, in both directions.
    pub fn set(&self, path: Impairment) {
        *lock(&self.shared.path) = [path; 2];
    }

    /// Sets it for one direction.
    pub fn set_one(&self, direction: Direction, path: Impairment) {
        lock(&self.shared.path)[direction as usize] = path;
    }

    /// Returns the counts of a direction's packets.
    pub fn counts(&self, direction: Direction) -> Counts {
        lock(&self.shared.counts)[direction as usize]
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        drop(self.owner.take());
        // With the thread end the devices: nothing is left behind.
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Ok(()))) | None => {}
            Some(failed) => eprintln!("the path's thread has failed: {failed:?}"),
        }
    }
}

impl Lab {
    /// Makes the packets of `link` pass through this process. Sockets stay, and find the same
    /// addresses. It is for tests: where a laboratory is [kept](Lab::keep), the link is cut.
    ///
    /// # Errors
    ///
    /// There is no such link, or the kernel has no TUN devices.
    pub fn shape(&mut self, link: Link) -> Result<Shaper> {
        match link {
            Link::ControlPlane => {
                let servers = self.spec.servers;
                self.router
                    .shape_control_plane(&self.control_plane.netns, servers)
            }
            Link::Worker(n) => {
                let worker = self.workers.iter().find(|worker| worker.number == n);
                let worker = worker.with_context(|| format!("there is no worker {n}"))?;
                self.router.shape_worker(&worker.netns, n)
            }
        }
    }
}

/// Returns the given seed, or one that changes from run to run.
fn seed() -> Result<u64> {
    match std::env::var(SEED) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{SEED}={text:?} is no number")),
        Err(_) => {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
            // The low bits change; few digits are easier to repeat.
            Ok(u64::from(since.subsec_nanos()))
        }
    }
}
