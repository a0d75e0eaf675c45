//! Allow-lists: the destinations that an agent dials, or that the clients of a frontend may
//! request.
//!
//! A client requests a destination by address or by name, and rules of one kind decide nothing
//! about the other: the rule of a name never allows an address, and the rule of an address never
//! allows a name. [`AllowList::allows_resolved`] decides about the addresses to which a name
//! resolves.
//!
//! Loopback, link-local, multicast, unspecified, reserved and cloud metadata addresses, and those
//! that contain an IPv4 address, are guarded. Only a rule within such a range allows them, never a
//! wider one: neither `0.0.0.0/0` nor a name that resolves to 169.254.169.254 opens that address.

use std::net::IpAddr;
use std::sync::LazyLock;

use ipnet::IpNet;
use tunnel_proto::preface::{Destination, Host, Name};

use super::{AllowRule, Rule};

/// Ranges that only a rule within them opens.
const GUARDED: [&str; 30] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    // For protocols (RFC 6890), one provider's metadata among them; reserved (RFC 1112, section 4).
    "192.0.0.0/24",
    "240.0.0.0/4",
    // Metadata services that are not link-local.
    "100.100.100.200/32",
    "168.63.129.16/32",
    "fd00:ec2::/32",
    "fd20:ce::254/128",
    "224.0.0.0/4",
    "255.255.255.255/32",
    "::/128",
    "::1/128",
    "fe80::/10",
    // Site-local, given up by RFC 3879.
    "fec0::/10",
    "ff00::/8",
    "::ffff:0:0/96",
    // IPv4 addresses in other forms: compatible (RFC 4291, section 2.5.5.1), Teredo (RFC 4380), 6to4
    // (RFC 3056), and a site's own NAT64 (RFC 8215).
    "::/96",
    "2001::/32",
    "2002::/16",
    "64:ff9b:1::/48",
    // The IPv4 ones again, behind a NAT64 of the well-known prefix (RFC 6052, section 2.1).
    "64:ff9b::/104",
    "64:ff9b::7f00:0/104",
    "64:ff9b::a9fe:0/112",
    "64:ff9b::c000:0/120",
    "64:ff9b::f000:0/100",
    "64:ff9b::6464:64c8/128",
    "64:ff9b::a83f:8110/128",
    "64:ff9b::e000:0/100",
    "64:ff9b::ffff:ffff/128",
];

static GUARDED_NETS: LazyLock<Vec<IpNet>> =
    LazyLock::new(|| GUARDED.iter().filter_map(|net| net.parse().ok()).collect());

/// Returns the narrowest guarded range that contains `addr`, if there is one.
pub fn guard(addr: IpAddr) -> Option<&'static IpNet> {
    let guards = GUARDED_NETS.iter().filter(|net| net.contains(&addr));
    guards.max_by_key(|net| net.prefix_len())
}

/// Returns rules that allow every address, including the guarded ones.
pub fn everything() -> Vec<AllowRule> {
    let rule = |net: &&str| {
        let cidr = net.parse().ok()?;
        let ports = Vec::new();
        Some(AllowRule::Addresses(Rule { cidr, ports }))
    };
    let all = ["0.0.0.0/0", "::/0"];
    all.iter().chain(&GUARDED).filter_map(rule).collect()
}

/// Rules, of which one that covers a destination is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<AllowRule>);

impl AllowList {
    /// Creates a list of configured rules. An empty list allows nothing.
    pub fn new(rules: Vec<AllowRule>) -> Self {
        Self(rules)
    }

    /// Whether `addr` and `port` are allowed as an address. `addr` is not IPv4-mapped.
    pub fn allows_address(&self, addr: IpAddr, port: u16) -> bool {
        let guard = guard(addr);
        self.0.iter().any(|rule| match rule {
            AllowRule::Addresses(rule) => {
                rule.covers(addr, port) && guard.is_none_or(|guard| guard.contains(&rule.cidr))
            }
            AllowRule::Names(_) => false,
        })
    }

    /// Whether `name` and `port` are allowed as a name.
    pub fn allows_name(&self, name: &Name, port: u16) -> bool {
        self.0.iter().any(|rule| match rule {
            AllowRule::Names(rule) => rule.covers(name, port),
            AllowRule::Addresses(_) => false,
        })
    }

    /// Whether the list allows the destination that a client requests, as far as that is known
    /// without resolving it.
    pub fn allows(&self, destination: &Destination) -> bool {
        match &destination.host {
            Host::Ip(addr) => self.allows_address(*addr, destination.port),
            Host::Name(name) => self.allows_name(name, destination.port),
        }
    }

    /// Whether the agent may dial `addr`, to which the host of `destination` resolves: because a
    /// rule allows the address or, unless the address is guarded, the requested name.
    pub fn allows_resolved(&self, destination: &Destination, addr: IpAddr) -> bool {
        let by_name = || match &destination.host {
            Host::Ip(_) => false,
            Host::Name(name) => self.allows_name(name, destination.port) && guard(addr).is_none(),
        };
        self.allows_address(addr, destination.port) || by_name()
    }

    /// Returns the rules as text.
    pub fn rules(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(ToString::to_string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(rules: &[&str]) -> AllowList {
        AllowList::new(rules.iter().map(|rule| rule.parse().unwrap()).collect())
    }

    fn allows(list: &AllowList, addr: &str, port: u16) -> bool {
        list.allows_address(addr.parse().unwrap(), port)
    }

    fn resolved(list: &AllowList, requested: &str, addr: &str) -> bool {
        list.allows_resolved(&requested.parse().unwrap(), addr.parse().unwrap())
    }

    const SOME_GUARDED: [&str; 24] = [
        "127.0.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "::1",
        "fe80::1",
        "0.0.0.0",
        "::",
        "fd00:ec2::254",
        "224.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b::192.0.0.192",
        "64:ff9b::240.0.0.1",
        "192.0.0.192",
        "240.0.0.1",
        "255.255.255.255",
        "fd00:ec2::23",
        "fec0::1",
        "::10.1.2.3",
        "2001::1",
        "2002:a01:203::1",
        "64:ff9b:1::a01:203",
        "64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
    ];

    #[test]
    fn every_guarded_range_can_be_read() {
        assert_eq!(GUARDED_NETS.len(), GUARDED.len());
        for (net, text) in GUARDED_NETS.iter().zip(GUARDED) {
            assert_eq!(*net, net.trunc(), "{text} has host bits");
        }
    }

    #[test]
    fn a_wide_rule_does_not_open_what_is_guarded() {
        let wide = list(&["0.0.0.0/0", "::/0"]);
        assert!(allows(&wide, "10.1.2.3", 80));
        assert!(allows(&wide, "64:ff9b::10.1.2.3", 80));
        for addr in SOME_GUARDED {
            assert!(!allows(&wide, addr, 80), "{addr}");
            if addr != "::ffff:127.0.0.1" {
                assert!(allows(&list(&[addr]), addr, 80), "{addr} is named");
            }
        }
        // Beside them.
        for addr in [
            "192.0.1.1",
            "239.0.0.1",
            "fd00:ec3::1",
            "2001:1::1",
            "2003::1",
        ] {
            assert_eq!(allows(&wide, addr, 80), addr != "239.0.0.1", "{addr}");
        }
        assert!(allows(&list(&["2002::/16"]), "2002:a01:203::1", 80));
        assert!(
            !allows(&list(&["::/96"]), "::1", 80),
            "a narrower range guards it"
        );
        assert!(allows(&list(&["127.0.0.1:80"]), "127.0.0.1", 80));
        let all = AllowList::new(everything());
        for net in &*GUARDED_NETS {
            assert!(
                all.allows_address(net.network(), 80) && all.allows_address(net.broadcast(), 80),
                "{net}"
            );
        }
        assert!(allows(&all, "10.1.2.3", 80) && allows(&all, "2001:db8::1", 80));
    }

    #[test]
    fn a_name_opens_what_it_resolves_to_but_for_what_is_guarded() {
        let names = list(&["*.svc:443", "web.example"]);
        assert!(resolved(&names, "a.svc:443", "10.1.2.3"));
        assert!(resolved(&names, "A.SVC.:443", "2001:db8::1"));
        assert!(resolved(&names, "web.example:80", "10.1.2.3"));
        assert!(!resolved(&names, "a.svc:80", "10.1.2.3"));
        assert!(!resolved(&names, "svc:443", "10.1.2.3"));
        assert!(!resolved(&names, "b.web.example:80", "10.1.2.3"));
        for addr in SOME_GUARDED {
            assert!(!resolved(&names, "a.svc:443", addr), "{addr}");
        }
        let with_address = list(&["*.svc:443", "127.0.0.1:443"]);
        assert!(resolved(&with_address, "a.svc:443", "127.0.0.1"));
        assert!(!resolved(&with_address, "a.svc:443", "127.0.0.2"));
    }

    #[test]
    fn one_kind_of_rule_says_nothing_of_the_other() {
        let requested = |list: &AllowList, text: &str| list.allows(&text.parse().unwrap());
        let names = list(&["*.svc"]);
        assert!(requested(&names, "a.svc:1"));
        assert!(!requested(&names, "10.1.2.3:1"));
        assert!(!resolved(&names, "10.1.2.3:1", "10.1.2.3"));
        let addresses = list(&["10.0.0.0/8"]);
        assert!(requested(&addresses, "10.1.2.3:1"));
        assert!(requested(&addresses, "[::ffff:10.1.2.3]:1"));
        assert!(!requested(&addresses, "a.svc:1"));
        // The resolved address counts, too.
        assert!(resolved(&addresses, "a.svc:1", "10.1.2.3"));
        let nothing = list(&[]);
        assert!(!requested(&nothing, "a.svc:1") && !requested(&nothing, "10.1.2.3:1"));
    }
}
