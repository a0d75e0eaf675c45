//! Counts of a misdeed.

use std::cell::RefCell;
use std::collections::BTreeMap;

/// Counts by name; printed as one JSON object.
#[derive(Debug, Default)]
pub(crate) struct Tally(RefCell<BTreeMap<String, u64>>);

impl Tally {
    /// Adds one to a count.
    pub(crate) fn one(&self, what: impl Into<String>) {
        self.add(what, 1);
    }

    /// Adds a number to a count. A count of 0 is not recorded.
    pub(crate) fn add(&self, what: impl Into<String>, count: u64) {
        if count > 0 {
            *self.0.borrow_mut().entry(what.into()).or_default() += count;
        }
    }

    /// Returns the counts as JSON, on one line.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(&*self.0.borrow())
    }
}
