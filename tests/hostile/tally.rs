//! What a misdeed came to, in numbers.

use std::cell::RefCell;
use std::collections::BTreeMap;

/// Counts by name; printed as one JSON object.
#[derive(Debug, Default)]
pub(crate) struct Tally(RefCell<BTreeMap<String, u64>>);

impl Tally {
    /// One more of these.
    pub(crate) fn one(&self, what: impl Into<String>) {
        self.add(what, 1);
    }

    /// So many more. Nothing is remembered of a name without a number.
    pub(crate) fn add(&self, what: impl Into<String>, count: u64) {
        if count > 0 {
            *self.0.borrow_mut().entry(what.into()).or_default() += count;
        }
    }

    /// As JSON, on one line.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(&*self.0.borrow())
    }
}
