//! The ids under which this server is known to agents: its own, and more, which lead an agent to
//! open a stream for each.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tunnel_proto::session::InstanceId;

use crate::tls::Identity;

/// Streams of one agent beyond one for each id: some that it is about to find superfluous, and
/// some that it has lost and we have yet to miss.
const SPARE: usize = 8;

/// An agent: what vouches for it, and what it calls itself. The latter alone may be anybody's.
type Key = (String, InstanceId);

/// The ids, and who has a stream to which.
#[derive(Debug)]
pub(super) struct ServerIds {
    ids: Vec<String>,
    taken: RefCell<HashMap<Key, Vec<usize>>>,
}

impl ServerIds {
    /// These, at least one.
    pub(super) fn new(ids: Vec<String>) -> Rc<Self> {
        Rc::new(Self {
            ids,
            taken: RefCell::default(),
        })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    /// How many agents have a stream.
    pub(super) fn agents(&self) -> usize {
        self.taken.borrow().len()
    }

    /// Whether this agent has a stream.
    pub(super) fn knows(&self, identity: &Identity, instance: InstanceId) -> bool {
        let key = (identity.uri(), instance);
        self.taken.borrow().contains_key(&key)
    }

    /// The first id that this agent has no stream to; the first of all when it has one to each,
    /// which tells it so. `None`: it has far too many.
    pub(super) fn take(
        self: &Rc<Self>,
        identity: &Identity,
        instance: InstanceId,
    ) -> Option<Taken> {
        let key = (identity.uri(), instance);
        let mut taken = self.taken.borrow_mut();
        let streams = taken
            .entry(key.clone())
            .or_insert_with(|| vec![0; self.ids.len()]);
        if streams.iter().sum::<usize>() >= self.ids.len() + SPARE {
            return None;
        }
        let index = streams.iter().position(|count| *count == 0).unwrap_or(0);
        streams[index] += 1;
        Some(Taken {
            of: self.clone(),
            key,
            index,
        })
    }
}

/// An id that an agent has a stream to, until this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    of: Rc<ServerIds>,
    key: Key,
    index: usize,
}

impl Taken {
    /// The id.
    pub(super) fn id(&self) -> &str {
        &self.of.ids[self.index]
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.of.taken.borrow_mut();
        if let Some(streams) = taken.get_mut(&self.key) {
            streams[self.index] -= 1;
            if streams.iter().all(|count| *count == 0) {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::Role;

    fn ids(count: usize) -> Rc<ServerIds> {
        let all = ["s", "s-2", "s-3"].map(str::to_owned);
        ServerIds::new(all[..count].to_vec())
    }

    fn agent(name: &str) -> Identity {
        Identity::new("a".parse().unwrap(), Role::Agent, name).unwrap()
    }

    const FIRST: InstanceId = InstanceId([1; 16]);
    const SECOND: InstanceId = InstanceId([2; 16]);

    #[test]
    fn an_agent_is_given_the_lowest_id_that_it_lacks() {
        let ids = ids(3);
        let w1 = agent("w1");
        let mut taken: Vec<_> = (0..3).map(|_| ids.take(&w1, FIRST).unwrap()).collect();
        let names: Vec<_> = taken.iter().map(Taken::id).collect();
        assert_eq!(names, ["s", "s-2", "s-3"]);
        let surplus = ids.take(&w1, FIRST).unwrap();
        assert_eq!(surplus.id(), "s", "which it knows");
        drop(surplus);
        drop(taken.remove(1));
        assert_eq!(ids.take(&w1, FIRST).unwrap().id(), "s-2");
    }

    #[test]
    fn agents_of_one_name_are_told_apart_by_what_vouches_for_them() {
        let ids = ids(2);
        let _one = ids.take(&agent("w1"), FIRST).unwrap();
        let other = ids.take(&agent("w2"), FIRST).unwrap();
        assert_eq!(other.id(), "s");
        assert_eq!(ids.take(&agent("w1"), SECOND).unwrap().id(), "s");
    }

    #[test]
    fn an_agent_has_only_so_many_streams_and_leaves_no_trace() {
        let ids = ids(2);
        let taken: Vec<_> = std::iter::from_fn(|| ids.take(&agent("w1"), FIRST)).collect();
        assert_eq!(taken.len(), 2 + SPARE);
        assert!(ids.knows(&agent("w1"), FIRST));
        drop(taken);
        assert_eq!(ids.agents(), 0);
    }
}
