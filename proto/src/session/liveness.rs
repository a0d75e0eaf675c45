//! Life signs: when to send a Ping, and when to call the peer silent. The same on both ends.
//!
//! Any received byte is a life sign and delays the next Ping. After a heartbeat interval without
//! one a Ping goes out, and another one after each further interval. So two ends with one interval
//! take turns, and each measures the round trip. The peer is silent after some time without a life
//! sign, a shorter one where connections are in use, and alive again at the next byte. An end with
//! a reason to doubt the peer sends a Ping at once, and waits no longer than that reason allows.
//!
//! Silence is a reason to choose another agent, not to close: the transport's idle timeout does
//! that.

use std::time::{Duration, Instant};

/// Time for which a link counts as in use after
/// [`note_traffic`](super::ServerSession::note_traffic).
pub const BUSY_WINDOW: Duration = Duration::from_secs(10);

/// The shortest heartbeat interval: a peer can't ask for more.
pub const MIN_HEARTBEAT: Duration = Duration::from_millis(100);

/// Timeouts of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// Timeout of the peer's first message.
    pub hello_timeout: Duration,
    /// Time without a life sign after which a Ping is sent; at least [`MIN_HEARTBEAT`].
    pub heartbeat: Duration,
    /// The same with traffic in the last [`BUSY_WINDOW`], where it is shorter.
    pub heartbeat_busy: Duration,
    /// Time without a life sign after which the peer is silent, with traffic in the last
    /// [`BUSY_WINDOW`].
    pub silent_busy: Duration,
    /// The same without traffic.
    pub silent_idle: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            hello_timeout: Duration::from_secs(5),
            heartbeat: Duration::from_secs(2),
            heartbeat_busy: Duration::from_secs(1),
            // A Ping has 1.5 s for its answer: a lost packet is repeated several times by then.
            silent_busy: Duration::from_millis(2500),
            silent_idle: Duration::from_secs(10),
        }
    }
}

#[derive(Debug)]
pub(super) struct Liveness {
    timers: Timers,
    last_heard: Instant,
    last_traffic: Option<Instant>,
    next_ping: Instant,
    /// The last Ping's number; 0 before the first.
    seq: u64,
    /// Time of the last Ping, until its answer.
    ping_sent: Option<Instant>,
    rtt: Option<Duration>,
    silent: bool,
    /// Time at which the peer becomes silent unless a life sign comes first.
    challenge: Option<Instant>,
}

/// Actions due at a timeout.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    /// Send a Ping with this number.
    pub(super) ping: Option<u64>,
    /// The peer has just become silent.
    pub(super) silent: bool,
}

impl Liveness {
    pub(super) fn new(mut timers: Timers, now: Instant) -> Self {
        timers.heartbeat = timers.heartbeat.max(MIN_HEARTBEAT);
        timers.heartbeat_busy = timers.heartbeat_busy.max(MIN_HEARTBEAT);
        Self {
            timers,
            last_heard: now,
            last_traffic: None,
            next_ping: now + timers.heartbeat,
            seq: 0,
            ping_sent: None,
            rtt: None,
            silent: false,
            challenge: None,
        }
    }

    /// Applies the interval that the peer requests, where that is shorter than ours: a longer one
    /// could make us call a living peer silent.
    pub(super) fn apply_peer_interval(&mut self, heartbeat: Duration) {
        if !heartbeat.is_zero() {
            let heartbeat = heartbeat.max(MIN_HEARTBEAT);
            self.timers.heartbeat = self.timers.heartbeat.min(heartbeat);
            self.next_ping = self.last_heard + self.interval(self.last_heard);
        }
    }

    /// Returns the heartbeat interval at `now`.
    fn interval(&self, now: Instant) -> Duration {
        let Timers {
            heartbeat,
            heartbeat_busy,
            ..
        } = self.timers;
        match self.last_traffic {
            Some(traffic) if now <= traffic + BUSY_WINDOW => heartbeat.min(heartbeat_busy),
            _ => heartbeat,
        }
    }

    /// Bytes arrived. Whether the peer was silent until now.
    pub(super) fn heard(&mut self, now: Instant) -> bool {
        self.last_heard = now;
        self.next_ping = now + self.interval(now);
        self.challenge = None;
        std::mem::take(&mut self.silent)
    }

    /// Requests a life sign at once: a Ping is due, and the peer is silent without a life sign
    /// within `limit`, or within three round trips where these take longer. A challenge under way
    /// stays as it is.
    pub(super) fn challenge(&mut self, limit: Duration, now: Instant) {
        if self.challenge.is_none() {
            let limit = limit.max(self.rtt.unwrap_or_default() * 3);
            self.challenge = Some(now + limit);
            self.next_ping = now;
        }
    }

    /// Notes a Pong. Only the answer to the last Ping counts, and once.
    pub(super) fn answered(&mut self, seq: u64, now: Instant) {
        if seq != self.seq {
            return;
        }
        if let Some(ping_sent) = self.ping_sent.take() {
            let sample = now.saturating_duration_since(ping_sent);
            // RFC 9002, section 5.3.
            self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
    }

    pub(super) fn note_traffic(&mut self, now: Instant) {
        self.last_traffic = Some(now);
        // Sooner than an idle one is due.
        self.next_ping = self.next_ping.min(now + self.interval(now));
    }

    pub(super) fn timeout(&self) -> Instant {
        if self.silent {
            self.next_ping
        } else {
            self.next_ping.min(self.silent_at())
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) -> Due {
        let silent = !self.silent && now >= self.silent_at();
        self.silent |= silent;
        let ping = (now >= self.next_ping).then(|| {
            self.seq += 1;
            self.ping_sent = Some(now);
            self.next_ping = now + self.interval(now);
            self.seq
        });
        Due { ping, silent }
    }

    /// Returns the time at which the peer becomes silent without a life sign.
    fn silent_at(&self) -> Instant {
        let at = self.silent_by_timers();
        self.challenge.map_or(at, |challenge| challenge.min(at))
    }

    fn silent_by_timers(&self) -> Instant {
        // A long path with losses needs several round trips for a Ping.
        let patience = self.timers.heartbeat_busy + self.rtt.unwrap_or_default() * 8;
        let busy = self.last_heard + self.timers.silent_busy.max(patience);
        let idle = self.last_heard + self.timers.silent_idle;
        match self.last_traffic {
            // This may have passed when the traffic is noted: then the silence counts at once.
            Some(traffic) if busy <= traffic + BUSY_WINDOW => busy,
            _ => idle,
        }
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    pub(super) fn last_heard(&self) -> Instant {
        self.last_heard
    }
}
