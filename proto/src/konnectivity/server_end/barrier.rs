//! Barriers: questions that the agent answers in turn, and what its silence means.

use std::collections::VecDeque;
use std::time::Instant;

use super::{DialId, LOST_AFTER, SILENT_AFTER};

#[derive(Debug)]
pub(super) struct Barriers {
    /// The last one's number.
    sent: u64,
    unanswered: VecDeque<Barrier>,
    /// When the last answer came.
    heard: Instant,
    /// Since when the stream is read, after it was held. Answers that stood behind what nobody
    /// took are no fault of the agent's.
    resumed: Instant,
    silent: bool,
}

#[derive(Debug)]
struct Barrier {
    seq: u64,
    asked: Instant,
    /// The connection that waits for it, if it is more than a heartbeat.
    dial: Option<DialId>,
}

impl Barriers {
    /// Of an agent that has yet to be heard.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sent: 0,
            unanswered: VecDeque::new(),
            heard: now,
            resumed: now,
            silent: true,
        }
    }

    /// One more, to be sent as a CLOSE_REQ for the id that this returns.
    pub(super) fn ask(&mut self, dial: Option<DialId>, now: Instant) -> i64 {
        self.sent += 1;
        self.unanswered.push_back(Barrier {
            seq: self.sent,
            asked: now,
            dial,
        });
        0_i64.saturating_sub_unsigned(self.sent)
    }

    /// The agent has handled all that was sent before barrier `seq`. Gives the connections that
    /// waited for it; `None` if it was not asked, or answered before.
    pub(super) fn answered(&mut self, seq: u64, now: Instant) -> Option<Vec<DialId>> {
        let first = self.unanswered.front()?.seq;
        if !(first..=self.sent).contains(&seq) {
            return None;
        }
        self.heard = now;
        let mut passed = Vec::new();
        while let Some(barrier) = self.unanswered.pop_front_if(|barrier| barrier.seq <= seq) {
            passed.extend(barrier.dial);
        }
        Some(passed)
    }

    /// The stream was held, and is read again.
    pub(super) fn resume(&mut self, now: Instant) {
        self.resumed = now;
    }

    pub(super) fn resumed(&self) -> Instant {
        self.resumed
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Whether an answer is awaited.
    pub(super) fn awaits(&self) -> bool {
        !self.unanswered.is_empty()
    }

    /// Whether the agent was silent until now.
    pub(super) fn comes_alive(&mut self) -> bool {
        std::mem::take(&mut self.silent)
    }

    /// Whether the agent has just become silent.
    pub(super) fn falls_silent(&mut self, now: Instant) -> bool {
        let overdue = self
            .waiting_since()
            .is_some_and(|at| now >= at + SILENT_AFTER);
        overdue && !std::mem::replace(&mut self.silent, true)
    }

    pub(super) fn is_lost(&self, now: Instant) -> bool {
        self.waiting_since()
            .is_some_and(|at| now >= at + LOST_AFTER)
    }

    /// When the oldest unanswered one means more; `None` if there is none.
    pub(super) fn timeout(&self) -> Option<Instant> {
        let patience = if self.silent {
            LOST_AFTER
        } else {
            SILENT_AFTER
        };
        self.waiting_since().map(|at| at + patience)
    }

    fn waiting_since(&self) -> Option<Instant> {
        let oldest = self.unanswered.front()?;
        Some(oldest.asked.max(self.resumed))
    }
}
