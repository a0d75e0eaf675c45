//! Barriers: questions that the agent answers in turn, and the meaning of its silence.

use std::collections::VecDeque;
use std::time::Instant;

use super::{DialId, LOST_AFTER, SILENT_AFTER};

#[derive(Debug)]
pub(super) struct Barriers {
    /// The last one's number.
    sent: u64,
    unanswered: VecDeque<Barrier>,
    /// Time of the last answer.
    heard: Instant,
    /// Time at which the driver resumed reading the stream. Answers that were held behind unread
    /// data are not late by the agent's fault.
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
    /// Creates the barriers of an agent without an answer so far.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sent: 0,
            unanswered: VecDeque::new(),
            heard: now,
            resumed: now,
            silent: true,
        }
    }

    /// Returns the id of another barrier, for its CLOSE_REQ.
    pub(super) fn ask(&mut self, dial: Option<DialId>, now: Instant) -> i64 {
        self.sent += 1;
        self.unanswered.push_back(Barrier {
            seq: self.sent,
            asked: now,
            dial,
        });
        0_i64.saturating_sub_unsigned(self.sent)
    }

    /// Notes that the agent has handled everything before barrier `seq`. Returns the connections
    /// that waited for it; `None` if the barrier was not sent, or was answered before.
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

    /// Notes that the driver resumes reading the stream.
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
    pub(super) fn is_pending(&self) -> bool {
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

    /// Returns the next time at which the oldest unanswered barrier means more; `None` if there is
    /// none.
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
