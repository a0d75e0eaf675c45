//! Tables of prefixes, and their transition without a gap.
//!
//! The kernel's longest-prefix-match tries can only be changed one entry at a time, while connect(2)
//! looks up addresses in them. [`plan`] orders the changes such that at every moment each address finds
//! its entry of the old table, or of the new one.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use aya::{
    Pod,
    maps::{LpmTrie, MapData, MapError, lpm_trie},
};
use ipnet::{IpNet, Ipv4Net};
use tunnel_ebpf_common::{Address, Family, PREFIX_BITS, Prefix};

use super::maps::is_full;

/// A prefix and its number of significant bits, including scope and family. Shorter ones come
/// first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    bits: u32,
    prefix: Prefix,
}

impl Key {
    /// Creates the key of a network within a scope. Host bits are cut off; v4-mapped networks become
    /// IPv4 ones.
    pub(super) fn new(scope: u32, cidr: IpNet) -> Self {
        let cidr = canonical(cidr);
        let (family, host_bits) = match cidr {
            IpNet::V4(v4) => (Family::V4, 32 - v4.prefix_len()),
            IpNet::V6(v6) => (Family::V6, 128 - v6.prefix_len()),
        };
        let address = Address::from(cidr.network());
        Self {
            bits: PREFIX_BITS - u32::from(host_bits),
            prefix: Prefix {
                scope,
                family: family as u32,
                address,
            },
        }
    }

    /// Returns the scope.
    pub(super) fn scope(&self) -> u32 {
        self.prefix.scope
    }

    fn trie(&self) -> lpm_trie::Key<Prefix> {
        lpm_trie::Key::new(self.bits, self.prefix)
    }
}

impl From<lpm_trie::Key<Prefix>> for Key {
    fn from(key: lpm_trie::Key<Prefix>) -> Self {
        Self {
            bits: key.prefix_len(),
            prefix: key.data(),
        }
    }
}

/// Returns a network without host bits, as IPv4 where it is a v4-mapped one.
pub(super) fn canonical(cidr: IpNet) -> IpNet {
    if let IpNet::V6(v6) = cidr
        && let Some(length) = v6.prefix_len().checked_sub(96)
        && let IpAddr::V4(v4) = Ipv6Addr::to_canonical(&v6.addr())
        && let Ok(v4) = Ipv4Net::new(v4, length)
    {
        return IpNet::V4(v4.trunc());
    }
    cidr.trunc()
}

/// Values by prefix.
pub(super) type Table<V> = BTreeMap<Key, V>;

/// One change of a trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step<V> {
    /// Inserts or replaces an entry.
    Set(Key, V),
    /// Removes an entry.
    Remove(Key),
}

/// Returns the changes from `old` to `new`, in order.
///
/// New entries come first, longest first: an address whose new entry is not there yet is still covered
/// by old ones only. Then obsolete entries are removed, shortest first: removing one uncovers a new
/// one, because all shorter old ones are gone.
pub(super) fn plan<V: Copy + PartialEq>(old: &Table<V>, new: &Table<V>) -> Vec<Step<V>> {
    let mut sets: Vec<_> = new
        .iter()
        .filter(|(key, value)| old.get(key) != Some(value))
        .map(|(key, value)| Step::Set(*key, *value))
        .collect();
    sets.sort_by_key(|step| match step {
        Step::Set(key, _) | Step::Remove(key) => Reverse(key.bits),
    });
    let removals = old
        .keys()
        .filter(|key| !new.contains_key(key))
        .map(|key| Step::Remove(*key));
    sets.into_iter().chain(removals).collect()
}

/// Plans as [`plan`] does, for a trie of `capacity` entries. Where old and new ones do not fit
/// together, removals come first, without [`plan`]'s guarantee: an address may be without an entry for
/// a moment.
pub(super) fn plan_within<V: Copy + PartialEq>(
    old: &Table<V>,
    new: &Table<V>,
    capacity: usize,
) -> Vec<Step<V>> {
    let mut steps = plan(old, new);
    let fresh = new.keys().filter(|key| !old.contains_key(key)).count();
    if old.len() + fresh > capacity {
        steps.sort_by_key(|step| matches!(step, Step::Set(..)));
    }
    steps
}

/// Reads the entries of a trie, of one scope or of all.
pub(super) fn read<V: Pod>(
    trie: &LpmTrie<MapData, Prefix, V>,
    scope: Option<u32>,
) -> Result<Table<V>, MapError> {
    let mut table = Table::new();
    for entry in trie.iter() {
        let (key, value) = entry?;
        let key = Key::from(key);
        if scope.is_none_or(|scope| scope == key.scope()) {
            table.insert(key, value);
        }
    }
    Ok(table)
}

/// Applies changes. After an error the trie is somewhere between old and new, still with [`plan`]'s
/// guarantee.
pub(super) fn apply<V: Pod>(
    trie: &mut LpmTrie<MapData, Prefix, V>,
    steps: &[Step<V>],
) -> Result<(), MapError> {
    for step in steps {
        match step {
            Step::Set(key, value) => trie.insert(&key.trie(), value, 0)?,
            Step::Remove(key) => trie.remove(&key.trie())?,
        }
    }
    Ok(())
}

/// Applies as many changes as the trie has room for. Returns the number of those without room.
pub(super) fn apply_most<V: Pod>(
    trie: &mut LpmTrie<MapData, Prefix, V>,
    steps: &[Step<V>],
) -> Result<usize, MapError> {
    let mut missing = 0;
    for step in steps {
        match apply(trie, std::slice::from_ref(step)) {
            Err(error) if is_full(&error) => missing += 1,
            applied => applied?,
        }
    }
    Ok(missing)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Implements the kernel's lookup by linear search.
    pub(in super::super) fn lookup<V>(table: &Table<V>, scope: u32, address: IpAddr) -> Option<&V> {
        let wanted = Prefix::of(scope, address.into());
        let covers = |key: &Key| {
            key.prefix.scope == scope && key.prefix.family == wanted.family && {
                let host_bits = PREFIX_BITS - key.bits;
                let number = |a: Address| u128::from_be_bytes(a.octets());
                number(key.prefix.address)
                    .checked_shr(host_bits)
                    .unwrap_or(0)
                    == number(wanted.address).checked_shr(host_bits).unwrap_or(0)
            }
        };
        table
            .iter()
            .rev()
            .find(|(key, _)| covers(key))
            .map(|(_, value)| value)
    }

    /// Networks close enough together to nest.
    pub(in super::super) fn cidr() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (0_u32..256, 24_u8..=32).prop_map(|(low, length)| {
                IpNet::new(IpAddr::V4((0x0a00_0000 | low).into()), length).unwrap()
            }),
            (0_u128..256, 120_u8..=128).prop_map(|(low, length)| {
                IpNet::new(IpAddr::V6((0x2001_0db8 << 96 | low).into()), length).unwrap()
            }),
            Just("0.0.0.0/0".parse().unwrap()),
            Just("::/0".parse().unwrap()),
        ]
    }

    pub(in super::super) fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0_u32..256).prop_map(|low| IpAddr::V4((0x0a00_0000 | low).into())),
            (0_u128..256).prop_map(|low| IpAddr::V6((0x2001_0db8 << 96 | low).into())),
        ]
    }

    fn table() -> impl Strategy<Value = Table<u32>> {
        prop::collection::vec((cidr(), 0_u32..2, 0_u32..4), 0..12).prop_map(|entries| {
            entries
                .into_iter()
                .map(|(cidr, scope, value)| (Key::new(scope, cidr), value))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn every_address_sees_the_old_table_or_the_new_one(
            old in table(),
            new in table(),
            addresses in prop::collection::vec(address(), 1..20),
        ) {
            let mut now = old.clone();
            for step in plan(&old, &new) {
                match step {
                    Step::Set(key, value) => { now.insert(key, value); }
                    Step::Remove(key) => { now.remove(&key); }
                }
                for address in &addresses {
                    for scope in 0..2 {
                        let seen = lookup(&now, scope, *address);
                        prop_assert!(
                            seen == lookup(&old, scope, *address)
                                || seen == lookup(&new, scope, *address)
                        );
                    }
                }
            }
            prop_assert_eq!(now, new);
        }
    }

    #[test]
    fn a_full_table_loses_the_old_before_it_takes_the_new() {
        let table = |range: std::ops::Range<u32>| -> Table<u32> {
            let key = |n: u32| Key::new(1, IpNet::from(IpAddr::V4(n.into())));
            range.map(|n| (key(n), n)).collect()
        };
        let (old, new) = (table(0..10), table(5..15));
        let removals_first = |capacity| {
            let steps = plan_within(&old, &new, capacity);
            assert_eq!(steps.len(), 10);
            let mut now = old.clone();
            for step in &steps {
                match step {
                    Step::Set(key, value) => now.insert(*key, *value),
                    Step::Remove(key) => now.remove(key),
                };
                assert!(now.len() <= capacity);
            }
            assert_eq!(now, new);
            matches!(steps[0], Step::Remove(_))
        };
        assert!(!removals_first(15));
        assert!(removals_first(14));
    }

    #[test]
    fn mapped_networks_are_ipv4_networks() {
        let key = |cidr: &str| Key::new(7, cidr.parse().unwrap());
        assert_eq!(key("::ffff:10.1.2.3/112"), key("10.1.0.0/16"));
        assert_eq!(key("::ffff:0.0.0.0/96"), key("0.0.0.0/0"));
        assert_eq!(key("10.1.2.3/8"), key("10.0.0.0/8"));
        assert_ne!(key("::/0"), key("0.0.0.0/0"));
    }

    #[test]
    fn the_default_route_of_one_family_is_not_the_others() {
        let table = Table::from([(Key::new(1, "::/0".parse().unwrap()), ())]);
        assert!(lookup(&table, 1, "2001:db8::1".parse().unwrap()).is_some());
        assert!(lookup(&table, 1, "10.0.0.1".parse().unwrap()).is_none());
        assert!(lookup(&table, 1, "::ffff:10.0.0.1".parse().unwrap()).is_none());
    }
}
