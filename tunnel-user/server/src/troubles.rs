//! What keeps a running server from its job beside a lack of agents: readiness names it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Troubles that last, each under a key of its own. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Troubles(Arc<Mutex<BTreeMap<String, String>>>);

impl Troubles {
    /// Notes what is wrong with `key`. Returns whether that is news.
    pub(super) fn set(&self, key: &str, why: String) -> bool {
        let before = self.lock().insert(key.to_owned(), why.clone());
        before != Some(why)
    }

    /// `key` is as it should be.
    pub(super) fn clear(&self, key: &str) {
        self.lock().remove(key);
    }

    /// All of them, in one text; `None` when there are none.
    pub(super) fn text(&self) -> Option<String> {
        let troubles = self.lock();
        let texts: Vec<_> = troubles.values().map(String::as_str).collect();
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
        let troubles = Troubles::default();
        assert_eq!(troubles.text(), None);
        assert!(troubles.set("b", "second".into()));
        assert!(troubles.set("a", "first".into()));
        assert!(troubles.set("a", "another".into()));
        assert!(!troubles.set("a", "another".into()));
        assert_eq!(troubles.text().as_deref(), Some("another; second"));
        troubles.clear("b");
        troubles.clear("a");
        assert_eq!(troubles.text(), None);
    }
}
