//! Destinations in configuration: an address range with ports.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Serialize};

/// Ports from the first to the last, both included: `10250` or `1-1024`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// Returns the range of one port.
    pub fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// Whether the range has `port`.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Whether `port` is in one of `ranges`; none of them means every port.
    pub(super) fn any_contains(ranges: &[Self], port: u16) -> bool {
        ranges.is_empty() || ranges.iter().any(|range| range.contains(port))
    }

    /// Reads ranges that are joined by commas.
    pub(super) fn list(text: &str) -> Result<Vec<Self>, PortRangeError> {
        text.split(',').map(str::parse).collect()
    }

    /// Writes ports behind an address range or a name.
    pub(super) fn fmt_list(ranges: &[Self], f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, range) in ranges.iter().enumerate() {
            write!(f, "{}{range}", if i == 0 { " ports " } else { "," })?;
        }
        Ok(())
    }
}

/// Text that is not a port range. Port 0 alone is not one: no client connects to it.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no port range: 10250 and 1-1024 are")]
pub struct PortRangeError(String);

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (first, last) = s.split_once('-').unwrap_or((s, s));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if first <= last && last != 0 => Ok(Self { first, last }),
            _ => Err(PortRangeError(s.into())),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// A number where it is one port.
impl Serialize for PortRange {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.first == self.last {
            true => s.serialize_u16(self.first),
            false => s.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Ports;
        impl Visitor<'_> for Ports {
            type Value = PortRange;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port or a range of ports, such as 10250 or 1-1024")
            }

            fn visit_u64<E: Error>(self, port: u64) -> Result<PortRange, E> {
                port.to_string().parse().map_err(E::custom)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PortRange, E> {
                text.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(Ports)
    }
}

/// An address range, and the ports in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Addresses. A single address needs no prefix length.
    #[serde(deserialize_with = "net")]
    pub cidr: IpNet,
    /// Ports; none listed means every port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
}

impl Rule {
    /// Whether the rule covers `addr` and `port`.
    pub fn covers(&self, addr: IpAddr, port: u16) -> bool {
        self.cidr.contains(&addr) && PortRange::any_contains(&self.ports, port)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cidr)?;
        PortRange::fmt_list(&self.ports, f)
    }
}

/// Text that is no rule.
#[derive(Debug, thiserror::Error)]
pub enum RuleError {
    /// No address range.
    #[error("{0:?} is no address range: 10.0.0.0/8 and 10.0.0.1 are")]
    Cidr(String),
    /// No ports.
    #[error(transparent)]
    Ports(#[from] PortRangeError),
}

/// `CIDR` or `CIDR:PORTS`, where PORTS are ranges joined by commas; `[v6/64]:PORTS` for IPv6.
impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (cidr, ports) = match s.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((cidr, rest)) => (cidr, rest.strip_prefix(':')),
            None if s.matches(':').count() > 1 => (s, None),
            None => match s.split_once(':') {
                Some((cidr, ports)) => (cidr, Some(ports)),
                None => (s, None),
            },
        };
        let cidr = parse_net(cidr)?;
        let ports = ports.map_or(Ok(Vec::new()), PortRange::list)?;
        Ok(Self { cidr, ports })
    }
}

pub(super) fn parse_net(text: &str) -> Result<IpNet, RuleError> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| RuleError::Cidr(text.into()))
}

fn net<'de, D: serde::Deserializer<'de>>(d: D) -> Result<IpNet, D::Error> {
    parse_net(&String::deserialize(d)?).map_err(D::Error::custom)
}

/// Reads a list of address ranges. The key may have no value.
pub(super) fn nets<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<IpNet>, D::Error> {
    let texts: Vec<String> = super::section(d)?;
    let nets = texts.iter().map(|text| parse_net(text));
    nets.collect::<Result<_, _>>().map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_as_text() {
        let rule: Rule = "10.99.1.0/24:10250,7001-7007".parse().unwrap();
        assert!(rule.covers("10.99.1.2".parse().unwrap(), 10250));
        assert!(rule.covers("10.99.1.2".parse().unwrap(), 7007));
        assert!(!rule.covers("10.99.1.2".parse().unwrap(), 22));
        assert!(!rule.covers("10.99.2.2".parse().unwrap(), 10250));
        let rule: Rule = "[fd00:99::/32]:443".parse().unwrap();
        assert!(rule.covers("fd00:99::1".parse().unwrap(), 443));
        let rule: Rule = "fd00::1".parse().unwrap();
        assert!(rule.covers("fd00::1".parse().unwrap(), 1));
        for wrong in [
            "10.0.0.0/8:0",
            "",
            "10.0.0.0/33",
            "10.0.0.0/8:",
            "10.0.0.0/8:9-1",
            "x:1",
            "[fd00::1",
        ] {
            assert!(wrong.parse::<Rule>().is_err(), "{wrong:?} was taken");
        }
    }
}
