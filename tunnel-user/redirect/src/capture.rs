//! Capture and exclusion rules, compiled for a longest-prefix-match look-up.
//!
//! The kernel finds one entry, that of the longest prefix. So each prefix of any rule gets the ports
//! that all rules covering it leave: those captured and not excluded. Entries equal to the next shorter
//! one are left out.

use std::{
    net::IpAddr,
    ops::{Range, RangeInclusive},
};

use ipnet::IpNet;
use tunnel_ebpf_common::{MAX_RANGES, PortRange, PortSet};

use super::{
    RedirectError, Rule,
    prefix::{Key, Table, canonical},
};

/// Networks that are never captured: these addresses mean this host, or a link of it.
const NEVER: [&str; 6] = [
    "127.0.0.0/8",
    "::1/128",
    "0.0.0.0/32",
    "::/128",
    "169.254.0.0/16",
    "fe80::/10",
];

/// Networks that are captured only by a rule within them: this host's provider answers there, for this
/// host.
const UNLESS_NAMED: [&str; 5] = [
    "100.100.100.200/32",
    "168.63.129.16/32",
    "192.0.0.0/24",
    "fd00:ec2::/32",
    "fd20:ce::254/128",
];

/// Compiles the rules of one attachment. `own` are addresses of this host.
///
/// # Errors
///
/// When a prefix needs more port ranges than an entry holds.
pub(super) fn compile(
    attachment: u32,
    capture: &[Rule],
    exclude: &[Rule],
    own: &[IpAddr],
) -> Result<Table<PortSet>, RedirectError> {
    let capture: Vec<_> = capture.iter().map(Effect::of).collect();
    let mut exclude: Vec<_> = exclude.iter().map(Effect::of).collect();
    let never = NEVER.iter().filter_map(|cidr| cidr.parse().ok());
    let unless_named = UNLESS_NAMED.iter().filter_map(|cidr| cidr.parse().ok());
    let is_named = |range: &IpNet| capture.iter().any(|effect| range.contains(&effect.cidr));
    let never = never.chain(unless_named.filter(|range| !is_named(range)));
    exclude.extend(
        never
            .chain(own.iter().map(|own| IpNet::from(*own)))
            .map(Effect::all),
    );

    let mut cidrs: Vec<_> = capture
        .iter()
        .chain(&exclude)
        .map(|effect| effect.cidr)
        .collect();
    cidrs.sort_by_key(|cidr| (cidr.prefix_len(), *cidr));
    cidrs.dedup();

    let mut kept: Vec<(IpNet, Ports)> = Vec::new();
    for cidr in cidrs {
        let mut ports = Ports::default();
        for effect in capture.iter().filter(|effect| effect.cidr.contains(&cidr)) {
            ports.add(&effect.ports);
        }
        for effect in exclude.iter().filter(|effect| effect.cidr.contains(&cidr)) {
            ports.subtract(&effect.ports);
        }
        let shorter = kept.iter().rev().find(|(other, _)| other.contains(&cidr));
        if shorter.map_or(&Ports::default(), |(_, ports)| ports) != &ports {
            kept.push((cidr, ports));
        }
    }
    kept.into_iter()
        .map(|(cidr, ports)| Ok((Key::new(attachment, cidr), ports.compile(cidr)?)))
        .collect()
}

/// A rule in canonical form.
struct Effect {
    cidr: IpNet,
    ports: Ports,
}

impl Effect {
    fn of(rule: &Rule) -> Self {
        if rule.ports.is_empty() {
            return Self::all(rule.cidr);
        }
        let mut ports = Ports::default();
        for range in &rule.ports {
            ports.add(&Ports::from(range));
        }
        Self {
            cidr: canonical(rule.cidr),
            ports,
        }
    }

    fn all(cidr: IpNet) -> Self {
        Self {
            cidr: canonical(cidr),
            ports: Ports::from(&(0..=u16::MAX)),
        }
    }
}

/// A set of ports: half-open ranges, sorted, with a gap between any two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ports(Vec<Range<u32>>);

impl From<&RangeInclusive<u16>> for Ports {
    fn from(range: &RangeInclusive<u16>) -> Self {
        let range = u32::from(*range.start())..u32::from(*range.end()) + 1;
        Self(if range.is_empty() {
            Vec::new()
        } else {
            vec![range]
        })
    }
}

impl Ports {
    fn add(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
        self.0.sort_by_key(|range| range.start);
        self.0.dedup_by(|next, range| {
            let touches = next.start <= range.end;
            if touches {
                range.end = range.end.max(next.end);
            }
            touches
        });
    }

    fn subtract(&mut self, other: &Self) {
        for hole in &other.0 {
            self.0 = self
                .0
                .iter()
                .flat_map(|range| {
                    let below = range.start..range.end.min(hole.start);
                    let above = range.start.max(hole.end)..range.end;
                    [below, above]
                })
                .filter(|range| !range.is_empty())
                .collect();
        }
    }

    fn compile(&self, cidr: IpNet) -> Result<PortSet, RedirectError> {
        let count = self.0.len();
        if count > MAX_RANGES {
            return Err(RedirectError::TooManyRanges { cidr, count });
        }
        let mut set = PortSet::EMPTY;
        for (slot, range) in set.ranges.iter_mut().zip(&self.0) {
            *slot = PortRange {
                first: range.start as u16,
                last: (range.end - 1) as u16,
            };
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::prefix::tests::{address, cidr, lookup},
        *,
    };

    fn rule(cidr: &str, ports: &[RangeInclusive<u16>]) -> Rule {
        Rule {
            cidr: cidr.parse().unwrap(),
            ports: ports.to_vec(),
        }
    }

    fn captured(table: &Table<PortSet>, address: &str, port: u16) -> bool {
        let address = address.parse().unwrap();
        lookup(table, 3, address).is_some_and(|ports| ports.contains(port.into()))
    }

    #[test]
    fn exclusions_cut_holes() {
        let table = compile(
            3,
            &[rule("10.0.0.0/8", &[]), rule("10.1.2.3/32", &[443..=443])],
            &[rule("10.1.0.0/16", &[]), rule("10.0.0.0/8", &[22..=22])],
            &["10.9.9.9".parse().unwrap()],
        )
        .unwrap();
        assert!(captured(&table, "10.2.0.1", 80));
        assert!(!captured(&table, "10.2.0.1", 22));
        assert!(!captured(&table, "10.1.2.3", 443));
        assert!(!captured(&table, "10.9.9.9", 80));
        assert!(!captured(&table, "11.0.0.1", 80));
    }

    #[test]
    fn loopback_is_never_captured() {
        let table = compile(3, &[rule("0.0.0.0/0", &[]), rule("::/0", &[])], &[], &[]).unwrap();
        for address in [
            "127.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "fe80::1",
        ] {
            assert!(!captured(&table, address, 443), "{address}");
        }
        for address in ["10.0.0.1", "2001:db8::1", "::ffff:10.0.0.1"] {
            assert!(captured(&table, address, 443), "{address}");
        }
    }

    #[test]
    fn metadata_services_are_captured_by_name_only() {
        let everything = [rule("0.0.0.0/0", &[]), rule("::/0", &[])];
        let wide = compile(3, &everything, &[], &[]).unwrap();
        for address in [
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "fd00:ec2::254",
            "fd20:ce::254",
        ] {
            assert!(!captured(&wide, address, 80), "{address}");
            let named = [
                everything[0].clone(),
                everything[1].clone(),
                rule(
                    &IpNet::from(address.parse::<IpAddr>().unwrap()).to_string(),
                    &[],
                ),
            ];
            let named = compile(3, &named, &[], &[]).unwrap();
            assert!(captured(&named, address, 80), "{address} is named");
        }
        // Where an IPv4 address hides, nothing leaves by the ordinary route.
        for address in [
            "2002:a9fe:a9fe::1",
            "64:ff9b:1::a9fe:a9fe",
            "2001::1",
            "240.0.0.1",
        ] {
            assert!(captured(&wide, address, 80), "{address}");
        }
    }

    #[test]
    fn nothing_captured_needs_no_entries() {
        assert!(
            compile(3, &[], &[rule("10.0.0.0/8", &[])], &[])
                .unwrap()
                .is_empty()
        );
        let twice = [rule("10.0.0.0/8", &[]), rule("10.1.0.0/16", &[])];
        let once = compile(3, &twice, &[], &[]).unwrap();
        assert_eq!(once.len(), 1);
    }

    #[test]
    fn too_many_ranges_name_the_prefix() {
        let ports: Vec<_> = (0..17).map(|n| n * 2..=n * 2).collect();
        let error = compile(3, &[rule("10.0.0.0/8", &ports)], &[], &[]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("17 separate port ranges for 10.0.0.0/8"),
            "{error}"
        );
        assert!(compile(3, &[rule("10.0.0.0/8", &ports[..16])], &[], &[]).is_ok());
    }

    fn rules() -> impl Strategy<Value = Vec<Rule>> {
        let ports = prop::collection::vec((0_u16..8, 0_u16..8).prop_map(|(a, b)| a..=b), 0..3);
        prop::collection::vec((cidr(), ports), 0..6).prop_map(|rules| {
            rules
                .into_iter()
                .map(|(cidr, ports)| Rule { cidr, ports })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn says_what_the_rules_say(
            capture in rules(),
            exclude in rules(),
            address in address(),
            port in 0_u16..9,
        ) {
            let matches = |rule: &Rule| {
                rule.cidr.contains(&address)
                    && (rule.ports.is_empty() || rule.ports.iter().any(|r| r.contains(&port)))
            };
            let wanted = capture.iter().any(matches) && !exclude.iter().any(matches);
            let table = compile(3, &capture, &exclude, &[]).unwrap();
            let found = lookup(&table, 3, address).is_some_and(|set| set.contains(port.into()));
            prop_assert_eq!(found, wanted);
        }
    }
}
