//! The life of a process (running, draining until a deadline, ended), and its notifications to systemd.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::environment::{Reloads, Stops};
use crate::report::report;

/// Phase in the life of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The process serves everything.
    Running,
    /// Open connections may go on until the instant. New ones are served where no other process would
    /// serve them.
    Draining(Instant),
    /// The process ends at once.
    Ended,
}

/// Maximum configured length of a drain, and the length that peers learn of a drain without an end.
pub const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);

/// Waits for the first of `stops`, SIGTERM or SIGINT, then drains for `drain` or until `idle` completes. A
/// second signal ends the drain at once. Without `drain` only `idle` or a second signal ends it.
///
/// # Errors
/// The signal handlers can't be installed.
pub async fn until_stopped(
    phase: &watch::Sender<Phase>,
    stops: Stops,
    drain: Option<Duration>,
    idle: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let mut stops = stops.listen()?;
    stops.next().await;
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!(
        seconds = drain.map(|drain| drain.as_secs()),
        "draining; a second signal ends at once"
    );
    let deadline = Instant::now() + drain.unwrap_or(LONGEST_DRAIN);
    phase.send_replace(Phase::Draining(deadline));
    let done = async {
        let Some(drain) = drain else {
            return std::future::pending().await;
        };
        if tokio::time::timeout(drain, idle).await.is_err() {
            tracing::warn!("the drain deadline has passed");
        }
    };
    tokio::select! {
        () = done => {}
        () = stops.next() => {}
    }
    phase.send_replace(Phase::Ended);
    Ok(())
}

/// End of the service of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum End {
    /// The process was told to stop.
    Stopped,
    /// Another process serves in place of this one.
    HandedOver,
}

impl End {
    /// Waits until the process may exit. The first process of a container waits to be stopped after a handover:
    /// the runtime of the container would start it again.
    ///
    /// # Errors
    /// The signal handlers can't be installed.
    pub async fn may_exit(self) -> std::io::Result<()> {
        if self == Self::HandedOver && std::process::id() == 1 {
            tracing::info!("waiting to be stopped, as the first process of a container");
            Stops::process().listen()?.next().await;
        }
        Ok(())
    }
}

/// Waits until `shard_ended` completes in the phase running. A shard that drains ends by itself, which
/// is no loss: this never completes then.
pub async fn lost(phase: &watch::Sender<Phase>, shard_ended: impl Future<Output = ()>) {
    shard_ended.await;
    if *phase.borrow() != Phase::Running {
        std::future::pending().await
    }
}

/// Waits for a phase other than running.
pub async fn stopping(mut phase: watch::Receiver<Phase>) {
    // An error means that the process is ending.
    let _ = phase.wait_for(|phase| *phase != Phase::Running).await;
}

/// Time before the deadline of a drain in which a process accepts nothing new, because it would be cut
/// in the middle.
pub const LAST_CALL: Duration = Duration::from_secs(1);

/// Waits until the process accepts nothing new: [`LAST_CALL`] before the deadline of the drain, or at
/// the end.
pub async fn last_call(mut phase: watch::Receiver<Phase>) {
    loop {
        let until = match *phase.borrow_and_update() {
            Phase::Running => None,
            Phase::Draining(deadline) => Some(deadline.checked_sub(LAST_CALL).unwrap_or(deadline)),
            Phase::Ended => return,
        };
        let near = async {
            match until {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = near => return,
            changed = phase.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

/// Waits for the phase ended.
pub async fn ended(mut phase: watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase == Phase::Ended).await;
}

/// Notifies systemd, if it started this process with `Type=notify` (sd_notify(3)).
pub fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(error = report(&error), "systemd was not notified");
    }
}

/// The life sign of a shard.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// Beats for as long as the calling runtime runs. Called only where a watchdog reads it: a shard
    /// without work sleeps.
    pub fn start(self) {
        if sd_notify::watchdog_enabled().is_some() {
            tokio::task::spawn_local(self.beat());
        }
    }

    async fn beat(self) {
        let mut tick = tokio::time::interval(PULSE);
        loop {
            tick.tick().await;
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Interval of a shard's life signs: several in the shortest `WatchdogSec=`, one second.
const PULSE: Duration = Duration::from_millis(200);

/// Sends life signs to systemd's watchdog (`WatchdogSec=`) for as long as this runtime and every shard
/// run.
pub async fn watchdog(pulses: Vec<Pulse>) {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    let mut tick = tokio::time::interval((interval / 2).max(2 * PULSE));
    let mut last = vec![None; pulses.len()];
    loop {
        tick.tick().await;
        let mut beating = true;
        for (pulse, last) in pulses.iter().zip(&mut last) {
            let beats = pulse.0.load(Ordering::Relaxed);
            beating &= last.replace(beats) != Some(beats);
        }
        if beating {
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

/// Calls `reload` at each of `requests`, SIGHUP, until dropped, and notifies systemd of the beginning and end of
/// each, as `Type=notify-reload` (systemd 253) requires.
pub async fn on_reload(requests: &mut Reloads, mut reload: impl AsyncFnMut()) {
    loop {
        requests.next().await;
        // Fails only where the kernel has no CLOCK_MONOTONIC.
        if let Ok(now) = sd_notify::NotifyState::monotonic_usec_now() {
            notify(&[sd_notify::NotifyState::Reloading, now]);
        }
        reload().await;
        notify(&[sd_notify::NotifyState::Ready]);
    }
}
