//! Faults of a running server beside a lack of agents, for readiness.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Lasting faults, each with a key of its own. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults(Arc<Mutex<BTreeMap<String, String>>>);

impl Faults {
    /// Sets the fault of `key`. Returns whether that is news.
    pub(super) fn set(&self, key: &str, why: String) -> bool {
        let before = self.lock().insert(key.to_owned(), why.clone());
        before != Some(why)
    }

    /// Removes the fault of `key`.
    pub(super) fn clear(&self, key: &str) {
        self.lock().remove(key);
    }

    /// Returns all faults, in one text; `None` when there are none.
    pub(super) fn text(&self) -> Option<String> {
        let faults = self.lock();
        let texts: Vec<_> = faults.values().map(String::as_str).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_there_until_it_is_cleared() {
        let faults = Faults::default();
        assert_eq!(faults.text(), None);
        assert!(faults.set("b", "second".into()));
        assert!(faults.set("a", "first".into()));
        assert!(faults.set("a", "another".into()));
        assert!(!faults.set("a", "another".into()));
        assert_eq!(faults.text().as_deref(), Some("another; second"));
        faults.clear("b");
        faults.clear("a");
        assert_eq!(faults.text(), None);
    }
}
