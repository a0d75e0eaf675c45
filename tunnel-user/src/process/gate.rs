//! Counts what is under way on one thread, up to a bound.

use std::cell::Cell;
use std::rc::Rc;

/// A bound on things under way.
#[derive(Clone, Debug)]
pub struct Gate {
    inside: Rc<Cell<usize>>,
    most: usize,
}

/// One thing under way, until it is dropped.
#[derive(Debug)]
pub struct Entered(Rc<Cell<usize>>);

impl Gate {
    /// Lets `most` in at once.
    pub fn new(most: usize) -> Self {
        Self {
            inside: Rc::default(),
            most,
        }
    }

    /// One more; `None` at the bound.
    pub fn enter(&self) -> Option<Entered> {
        (self.inside.get() < self.most).then(|| {
            self.inside.set(self.inside.get() + 1);
            Entered(self.inside.clone())
        })
    }

    /// How many are inside.
    pub fn inside(&self) -> usize {
        self.inside.get()
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_when_its_holder_leaves() {
        let gate = Gate::new(1);
        let entered = gate.enter().unwrap();
        assert!(gate.enter().is_none());
        drop(entered);
        assert_eq!(gate.inside(), 0);
        assert!(gate.enter().is_some());
    }
}
