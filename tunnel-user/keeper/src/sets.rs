//! Decisions about sets of kept sockets: which one a process gets, and when one is closed. No I/O: `T` is what
//! a set holds, and time is an argument.
//!
//! A set has an owner, a process with a connection. The set is for the next process once the connection has
//! ended and the process is dead. Until then two processes could use one socket.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Maximum number of sets.
pub(crate) const MAX_SETS: usize = 16;

/// Maximum time for which a set waits for the next process.
const MAX_PATIENCE: Duration = Duration::from_secs(600);

/// Time from the end of a connection to the death of the process. A process that lives on without its
/// connection closes sockets without telling the keeper: their peers must learn that.
const DYING: Duration = Duration::from_secs(10);

/// Number of a set; a younger set has a higher one.
pub(crate) type SetId = u64;

/// Sockets of one process.
#[derive(Debug)]
pub(crate) struct Set<T> {
    pub(crate) role: String,
    pub(crate) contents: T,
    patience: Duration,
    /// End of the owner's connection.
    lost: Option<Instant>,
    /// Death of the owner, as far as the keeper knows.
    dead: Option<Instant>,
    /// Whether a process is being given the set.
    is_given: bool,
}

impl<T> Set<T> {
    /// Returns the time since which the set has no owner.
    fn left(&self) -> Option<Instant> {
        Some(self.lost?.max(self.dead?))
    }

    /// Returns for how long the set has had no owner.
    pub(crate) fn left_for(&self, now: Instant) -> Duration {
        self.left()
            .map_or(Duration::ZERO, |left| now.saturating_duration_since(left))
    }

    /// Returns the time for which the set waits for the next process.
    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.is_some()
    }

    fn expiry(&self) -> Option<Instant> {
        match (self.is_given, self.left(), self.lost) {
            (false, Some(left), _) => Some(left + self.patience),
            (false, None, Some(lost)) => Some(lost + self.patience.min(DYING)),
            _ => None,
        }
    }
}

/// Answer to a process that asks for a set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The process gets this one, which is now marked as given.
    Set(SetId),
    /// An owner is about to die, or another process is being given a set.
    Later,
    /// There is none.
    Nothing,
}

/// All sets of a keeper.
#[derive(Debug)]
pub(crate) struct Sets<T> {
    sets: BTreeMap<SetId, Set<T>>,
    next: SetId,
}

impl<T> Default for Sets<T> {
    fn default() -> Self {
        Self {
            sets: BTreeMap::new(),
            next: 0,
        }
    }
}

impl<T> Sets<T> {
    /// Adds a set of a living owner. Returns `None` if there are too many.
    pub(crate) fn add(&mut self, role: String, patience: Duration, contents: T) -> Option<SetId> {
        if self.sets.len() >= MAX_SETS {
            return None;
        }
        let id = self.next;
        self.next += 1;
        let set = Set {
            role,
            contents,
            patience: patience.min(MAX_PATIENCE),
            lost: None,
            dead: None,
            is_given: false,
        };
        self.sets.insert(id, set);
        Some(id)
    }

    pub(crate) fn get(&self, id: SetId) -> Option<&Set<T>> {
        self.sets.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: SetId) -> Option<&mut Set<T>> {
        self.sets.get_mut(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (SetId, &Set<T>)> {
        self.sets.iter().map(|(id, set)| (*id, set))
    }

    /// Removes a set, whose sockets its owner closes or the next process has.
    pub(crate) fn remove(&mut self, id: SetId) -> Option<Set<T>> {
        self.sets.remove(&id)
    }

    /// Notes that the connection of the owner has ended.
    pub(crate) fn lose(&mut self, id: SetId, now: Instant) {
        if let Some(set) = self.sets.get_mut(&id) {
            set.lost.get_or_insert(now);
        }
    }

    /// Notes that the owner is dead.
    pub(crate) fn die(&mut self, id: SetId, now: Instant) {
        if let Some(set) = self.sets.get_mut(&id) {
            set.dead.get_or_insert(now);
        }
    }

    /// Decides what a process of `role` gets, oldest first. It was given the sets `own` before.
    pub(crate) fn take(&mut self, role: &str, own: &[SetId]) -> Taken {
        let mut answer = Taken::Nothing;
        let others = self.sets.iter_mut();
        let others = others.filter(|(id, set)| set.role == role && !own.contains(id));
        for (id, set) in others {
            if set.left().is_some() && !set.is_given {
                set.is_given = true;
                return Taken::Set(*id);
            }
            if set.lost.is_some() || set.dead.is_some() {
                answer = Taken::Later;
            }
        }
        answer
    }

    /// Notes that the process that was being given the set is gone: the next one gets it.
    pub(crate) fn give_back(&mut self, id: SetId) {
        if let Some(set) = self.sets.get_mut(&id) {
            set.is_given = false;
        }
    }

    /// Removes the sets for which no process has come in time.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Set<T>> {
        let is_over = |_: &SetId, set: &mut Set<T>| set.expiry().is_some_and(|it| it <= now);
        let expired = self.sets.extract_if(.., is_over);
        expired.map(|(_, set)| set).collect()
    }

    /// Returns the time of the next expiry.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.sets.values().filter_map(Set::expiry).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sets(count: usize) -> Sets<usize> {
        let mut sets = Sets::default();
        for number in 0..count {
            let id = sets.add("server".to_owned(), 60 * SECOND, number);
            assert_eq!(id, Some(number as SetId));
        }
        sets
    }

    #[test]
    fn a_set_is_taken_once_its_owner_is_lost_and_dead() {
        let now = Instant::now();
        let mut sets = sets(3);
        assert_eq!(sets.take("server", &[]), Taken::Nothing, "all owners live");
        sets.lose(2, now);
        assert_eq!(sets.take("server", &[]), Taken::Later, "not dead yet");
        sets.die(2, now);
        sets.die(1, now);
        assert_eq!(sets.take("agent", &[]), Taken::Nothing, "of another role");
        assert_eq!(sets.take("server", &[]), Taken::Set(2));
        assert_eq!(sets.take("server", &[]), Taken::Later, "1 has a connection");
        sets.lose(1, now + SECOND);
        assert_eq!(sets.take("server", &[]), Taken::Set(1));
        sets.remove(1).unwrap();
        assert_eq!(sets.take("server", &[]), Taken::Later, "2 is being given");
        assert_eq!(sets.take("server", &[2]), Taken::Nothing, "to this process");
        sets.remove(2).unwrap();
        assert_eq!(sets.take("server", &[]), Taken::Nothing);
    }

    #[test]
    fn the_oldest_comes_first_and_a_set_comes_back() {
        let now = Instant::now();
        let mut sets = sets(2);
        for id in [1, 0] {
            sets.lose(id, now);
            sets.die(id, now + SECOND);
        }
        assert_eq!(sets.take("server", &[]), Taken::Set(0));
        assert_eq!(sets.take("server", &[]), Taken::Set(1));
        sets.give_back(1);
        sets.give_back(0);
        assert_eq!(sets.take("server", &[]), Taken::Set(0));
        let left = sets.get(0).unwrap();
        assert_eq!(left.left_for(now + 3 * SECOND), 2 * SECOND);
        assert_eq!(left.left_for(now), Duration::ZERO);
    }

    #[test]
    fn a_dead_set_waits_for_its_patience() {
        let now = Instant::now();
        let mut sets = sets(2);
        assert_eq!(sets.next_expiry(), None);
        sets.lose(0, now);
        sets.die(0, now + SECOND);
        assert_eq!(sets.next_expiry(), Some(now + 61 * SECOND));
        assert!(sets.expire(now + 60 * SECOND).is_empty());
        // Not while a process is being given it.
        assert_eq!(sets.take("server", &[]), Taken::Set(0));
        assert_eq!(sets.next_expiry(), None);
        assert!(sets.expire(now + 61 * SECOND).is_empty());
        sets.give_back(0);
        let expired = sets.expire(now + 61 * SECOND);
        assert_eq!(expired.len(), 1);
        assert_eq!(expired[0].contents, 0);
        assert!(sets.get(1).is_some(), "its owner lives");
    }

    #[test]
    fn a_lost_set_of_a_living_owner_waits_for_its_death_alone() {
        let now = Instant::now();
        let mut sets = sets(2);
        sets.lose(0, now);
        assert_eq!(sets.next_expiry(), Some(now + DYING));
        sets.lose(0, now + SECOND);
        assert_eq!(sets.next_expiry(), Some(now + DYING), "lost once");
        assert_eq!(sets.expire(now + DYING).len(), 1);
        // A dead owner whose connection another process holds has no end of its own.
        sets.die(1, now);
        assert_eq!(sets.next_expiry(), None);
    }

    #[test]
    fn sets_and_patience_are_bounded() {
        let now = Instant::now();
        let mut sets = sets(MAX_SETS - 1);
        let id = sets.add(String::new(), Duration::MAX, 0).unwrap();
        assert_eq!(sets.add(String::new(), SECOND, 0), None);
        sets.lose(id, now);
        sets.die(id, now);
        assert_eq!(sets.next_expiry(), Some(now + MAX_PATIENCE));
        sets.remove(id).unwrap();
        assert!(sets.add(String::new(), SECOND, 0).is_some());
    }
}
