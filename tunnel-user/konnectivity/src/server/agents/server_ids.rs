//! The ids of this server towards agents: its own, and further ones, which make an agent open a stream
//! for each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tunnel_proto::session::InstanceId;

use cpc_identity::Identity;
use cpc_server::extension::TunnelPermit;

/// Number of an agent's streams beyond one for each id: some that it is about to find superfluous, and
/// some that it has lost and whose loss is not detected here yet.
const SPARE: usize = 8;

/// An agent: its proven identity, and its reported instance. The latter alone proves nothing.
type Key = (String, InstanceId);

/// The ids, and the agents with a stream to each, on any shard.
#[derive(Debug)]
pub(super) struct ServerIds {
    ids: Vec<String>,
    taken: Mutex<HashMap<Key, Streams>>,
}

/// Streams of one agent, which has one place.
#[derive(Debug)]
struct Streams {
    /// Number of streams by id.
    counts: Vec<usize>,
    _place: TunnelPermit,
}

/// Reason why an agent gets no place for a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// A limit on agents is reached, with its text.
    Agents(String),
    /// The agent has far too many streams.
    Streams,
}

impl ServerIds {
    /// Creates the set of `ids`, at least one.
    pub(super) fn new(ids: Vec<String>) -> Arc<Self> {
        Arc::new(Self {
            ids,
            taken: Mutex::default(),
        })
    }

    /// Returns the number of ids.
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    /// Takes the first id that this agent has no stream to; the first of all when it has one to each,
    /// which tells it so. The first stream takes a `place`.
    ///
    /// # Errors
    /// [`NoPlace`].
    pub(super) fn take(
        self: &Arc<Self>,
        identity: &Identity,
        instance: InstanceId,
        place: impl FnOnce() -> Result<TunnelPermit, String>,
    ) -> Result<Taken, NoPlace> {
        let key = (identity.uri(), instance);
        let mut taken = self.taken();
        let counts = match taken.get_mut(&key) {
            Some(streams) => &mut streams.counts,
            None => {
                let streams = Streams {
                    counts: vec![0; self.ids.len()],
                    _place: place().map_err(NoPlace::Agents)?,
                };
                &mut taken.entry(key.clone()).or_insert(streams).counts
            }
        };
        if counts.iter().sum::<usize>() >= self.ids.len() + SPARE {
            return Err(NoPlace::Streams);
        }
        let index = counts.iter().position(|count| *count == 0).unwrap_or(0);
        counts[index] += 1;
        Ok(Taken {
            of: self.clone(),
            key,
            index,
        })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<Key, Streams>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id with an agent's stream, until dropped.
#[derive(Debug)]
pub(super) struct Taken {
    of: Arc<ServerIds>,
    key: Key,
    index: usize,
}

impl Taken {
    /// Returns the id.
    pub(super) fn id(&self) -> &str {
        &self.of.ids[self.index]
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.of.taken();
        if let Some(Streams { counts, .. }) = taken.get_mut(&self.key) {
            counts[self.index] -= 1;
            if counts.iter().all(|count| *count == 0) {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_host::concurrency::ConcurrencyLimit;
    use cpc_identity::Role;

    /// Creates `count` ids, and three places.
    fn ids(count: usize) -> (Arc<ServerIds>, ConcurrencyLimit) {
        let all = ["s", "s-2", "s-3"].map(str::to_owned);
        (
            ServerIds::new(all[..count].to_vec()),
            ConcurrencyLimit::new(3),
        )
    }

    fn take(
        (ids, places): &(Arc<ServerIds>, ConcurrencyLimit),
        identity: &Identity,
        instance: InstanceId,
    ) -> Result<Taken, NoPlace> {
        let place = || places.acquire().zip(ConcurrencyLimit::new(1).acquire());
        ids.take(identity, instance, || place().ok_or("full".into()))
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
        let mut taken: Vec<_> = (0..3).map(|_| take(&ids, &w1, FIRST).unwrap()).collect();
        let names: Vec<_> = taken.iter().map(Taken::id).collect();
        assert_eq!(names, ["s", "s-2", "s-3"]);
        let surplus = take(&ids, &w1, FIRST).unwrap();
        assert_eq!(surplus.id(), "s", "which it knows");
        drop(surplus);
        drop(taken.remove(1));
        assert_eq!(take(&ids, &w1, FIRST).unwrap().id(), "s-2");
    }

    #[test]
    fn agents_of_one_name_are_told_apart_by_what_vouches_for_them() {
        let ids = ids(2);
        let _one = take(&ids, &agent("w1"), FIRST).unwrap();
        let other = take(&ids, &agent("w2"), FIRST).unwrap();
        assert_eq!(other.id(), "s");
        assert_eq!(take(&ids, &agent("w1"), SECOND).unwrap().id(), "s");
    }

    #[test]
    fn an_agent_has_only_so_many_streams_and_leaves_no_trace() {
        let ids = ids(2);
        let taken: Vec<_> = std::iter::from_fn(|| take(&ids, &agent("w1"), FIRST).ok()).collect();
        assert_eq!(taken.len(), 2 + SPARE);
        assert_eq!(
            take(&ids, &agent("w1"), FIRST).err(),
            Some(NoPlace::Streams)
        );
        assert_eq!(ids.1.in_use(), 1);
        drop(taken);
        assert_eq!(ids.1.in_use(), 0);
        assert!(ids.0.taken().is_empty());
    }

    #[test]
    fn an_agent_has_one_place_for_all_its_streams() {
        let ids = ids(2);
        let first = take(&ids, &agent("w1"), FIRST).unwrap();
        let _second = take(&ids, &agent("w1"), FIRST).unwrap();
        let _others = ["w2", "w4"].map(|name| take(&ids, &agent(name), FIRST).unwrap());
        assert_eq!(
            take(&ids, &agent("w3"), FIRST).err(),
            Some(NoPlace::Agents("full".into()))
        );
        drop(first);
        assert_eq!(
            take(&ids, &agent("w3"), FIRST).err(),
            Some(NoPlace::Agents("full".into()))
        );
    }
}
