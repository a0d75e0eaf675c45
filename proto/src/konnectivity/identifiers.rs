//! Identifiers of an agent: its served destinations, in one field of its metadata. The field is a
//! URL query with the keys `ipv4`, `ipv6`, `host` and `cidr`, each any number of times, and
//! `default-route`.
//!
//! Upstream compares texts, and so accepts any text for `ipv4`, `ipv6` and `host`. Here each of
//! these keys accepts an address of either family or a name, whose form decides its kind.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use form_urlencoded::Serializer;
use ipnet::IpNet;
use thiserror::Error;

use crate::preface::{Host, Name, NameError};
use crate::route::{Claim, MAX_CLAIM_LEN, MAX_CLAIMS, NamePattern, canonical};

/// Maximum number of identifiers of one agent; later ones are ignored.
pub const MAX_IDENTIFIERS: usize = MAX_CLAIMS;

/// The identifiers of one agent, in canonical form. `Display` gives the text of the metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identifiers {
    /// IPv4 addresses.
    pub ipv4: Vec<Ipv4Addr>,
    /// IPv6 addresses.
    pub ipv6: Vec<Ipv6Addr>,
    /// Names of hosts.
    pub host: Vec<Name>,
    /// Networks.
    pub cidr: Vec<IpNet>,
    /// Every destination that no other agent serves.
    pub default_route: bool,
}

/// A part of the identifiers that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdentifierError {
    /// The key is unknown.
    #[error("there are no identifiers {0:?}; write ipv4, ipv6, host, cidr or default-route")]
    UnknownKey(String),
    /// Not a URL query.
    #[error("{0:?} is not URL-encoded: '%' needs two hexadecimal digits, and '&' separates")]
    Encoding(String),
    /// Neither an address nor a name.
    #[error("{0}, and it is no address either")]
    Host(NameError),
    /// Not a network.
    #[error("{0:?} is not a network: write address/prefix, such as 10.244.1.0/24")]
    Cidr(String),
    /// There are more than [`MAX_IDENTIFIERS`].
    #[error("more than {MAX_IDENTIFIERS} identifiers; name networks instead of addresses")]
    TooMany,
}

impl From<NameError> for IdentifierError {
    fn from(why: NameError) -> Self {
        Self::Host(why)
    }
}

impl Identifiers {
    /// Reads the identifiers as a server does: unusable ones are skipped and returned.
    #[must_use]
    pub fn parse_lenient(text: &str) -> (Self, Vec<IdentifierError>) {
        let mut identifiers = Self::default();
        let mut unusable = Vec::new();
        let mut first_default_route = true;
        for (count, pair) in pairs(text).enumerate() {
            if count == MAX_IDENTIFIERS {
                unusable.push(IdentifierError::TooMany);
                break;
            }
            let (key, value) = match decode(pair) {
                Ok(pair) => pair,
                Err(error) => {
                    unusable.push(error);
                    continue;
                }
            };
            let added = match &*key {
                "ipv4" | "ipv6" | "host" => identifiers.add_host(&value),
                "cidr" => identifiers.add_cidr(&value),
                "default-route" => {
                    if std::mem::take(&mut first_default_route) {
                        identifiers.default_route = is_true(&value);
                    }
                    Ok(())
                }
                _ => Err(IdentifierError::UnknownKey(excerpt(&key))),
            };
            unusable.extend(added.err());
        }
        (identifiers, unusable)
    }

    /// Reads the identifiers as an agent reads its own option: a bad value is skipped and returned,
    /// as by [`parse_lenient`](Self::parse_lenient), and any other fault is an error.
    ///
    /// # Errors
    /// [`IdentifierError`]: an unknown key, bad encoding, or too many of them.
    pub fn parse_strict(text: &str) -> Result<(Self, Vec<IdentifierError>), IdentifierError> {
        let (identifiers, mut unusable) = Self::parse_lenient(text);
        let is_value = |error: &IdentifierError| {
            matches!(error, IdentifierError::Host(_) | IdentifierError::Cidr(_))
        };
        match unusable.iter().position(|error| !is_value(error)) {
            Some(bad) => Err(unusable.swap_remove(bad)),
            None => Ok((identifiers, unusable)),
        }
    }

    /// Returns the claims that the identifiers stand for.
    #[must_use]
    pub fn claims(&self) -> Vec<Claim> {
        let ipv4 = self.ipv4.iter().map(|&ip| Claim::Address(ip.into()));
        let ipv6 = self.ipv6.iter().map(|&ip| Claim::Address(ip.into()));
        let cidr = self.cidr.iter().map(|&network| Claim::Cidr(network));
        let host = self.host.iter().cloned();
        let host = host.map(|name| Claim::Name(NamePattern::Exact(name)));
        let default_route = self.default_route.then_some(Claim::DefaultRoute);
        ipv4.chain(ipv6)
            .chain(cidr)
            .chain(host)
            .chain(default_route)
            .collect()
    }

    fn add_host(&mut self, value: &str) -> Result<(), IdentifierError> {
        match value.parse()? {
            Host::Ip(IpAddr::V4(address)) => self.ipv4.push(address),
            Host::Ip(IpAddr::V6(address)) => self.ipv6.push(address),
            Host::Name(name) => self.host.push(name),
        }
        Ok(())
    }

    fn add_cidr(&mut self, value: &str) -> Result<(), IdentifierError> {
        let network = value.parse();
        let network = network.map_err(|_| IdentifierError::Cidr(excerpt(value)))?;
        self.cidr.push(canonical(network));
        Ok(())
    }
}

fn pairs(text: &str) -> impl Iterator<Item = &str> {
    text.split('&').filter(|pair| !pair.is_empty())
}

/// Decodes a part of a query like Go's url.ParseQuery, which refuses texts that other parsers take
/// literally.
fn decode(pair: &str) -> Result<(Cow<'_, str>, Cow<'_, str>), IdentifierError> {
    let mut behind_percent = pair.split('%').skip(1);
    let escaped = behind_percent.all(|rest| {
        let digits = rest.as_bytes().first_chunk::<2>();
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    form_urlencoded::parse(pair.as_bytes())
        .next()
        .filter(|_| escaped && !pair.contains(';'))
        .ok_or_else(|| IdentifierError::Encoding(excerpt(pair)))
}

/// Parses a boolean like Go's strconv.ParseBool; any other text is false.
fn is_true(value: &str) -> bool {
    matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

/// Shortens a text for an error.
fn excerpt(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_CLAIM_LEN)].to_owned()
}

impl fmt::Display for Identifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut query = Serializer::new(String::new());
        for network in &self.cidr {
            query.append_pair("cidr", &network.to_string());
        }
        if self.default_route {
            query.append_pair("default-route", "true");
        }
        for name in &self.host {
            query.append_pair("host", name.as_str());
        }
        for address in &self.ipv4 {
            query.append_pair("ipv4", &address.to_string());
        }
        for address in &self.ipv6 {
            query.append_pair("ipv6", &address.to_string());
        }
        f.write_str(&query.finish())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::preface::tests::{any_address, any_name};

    fn lenient(text: &str) -> (String, usize) {
        let (identifiers, unusable) = Identifiers::parse_lenient(text);
        let claims: Vec<_> = identifiers.claims().iter().map(Claim::to_string).collect();
        (claims.join(" "), unusable.len())
    }

    #[test]
    fn what_agents_send() {
        for (text, claims, unusable) in [
            ("", "", 0),
            (
                "ipv4=10.99.1.2&default-route=true",
                "10.99.1.2 default route",
                0,
            ),
            (
                "host=Node-1&host=n.example.&ipv6=fd00::1&ipv4=1.2.3.4&cidr=10.0.0.1/8",
                "1.2.3.4 fd00::1 10.0.0.0/8 node-1 n.example",
                0,
            ),
            (
                "ipv6=fd00%3A%3A1&cidr=fd00%3A%3A%2F64",
                "fd00::1 fd00::/64",
                0,
            ),
            // Upstream compares texts, whatever the key.
            (
                "host=10.0.0.1&ipv4=node&ipv6=::ffff:1.2.3.4",
                "10.0.0.1 1.2.3.4 node",
                0,
            ),
            ("default-route=false&default-route=true", "", 0),
            ("default-route=1&default-route=0", "default route", 0),
            ("default-route=yes", "", 0),
            // A later release's key, bad values, bad encoding: the rest counts.
            ("zone=a&ipv4=1.2.3.4", "1.2.3.4", 1),
            (
                "ipv6=:::::&cidr=x&host=&host=*.x&ipv4=1.2.3.4",
                "1.2.3.4",
                4,
            ),
            ("host=a%2&host=b;c&host=d", "d", 2),
        ] {
            assert_eq!(lenient(text), (claims.to_owned(), unusable), "{text}");
        }
    }

    #[test]
    fn an_agent_checks_its_own() {
        let (identifiers, unusable) = Identifiers::parse_strict("ipv4=1.2.3.4&ipv6=:::::").unwrap();
        assert_eq!(identifiers.to_string(), "ipv4=1.2.3.4");
        assert!(matches!(unusable[..], [IdentifierError::Host(_)]));
        assert_eq!(
            Identifiers::parse_strict("ipv6=:::::&zone=a"),
            Err(IdentifierError::UnknownKey("zone".into()))
        );
        assert_eq!(
            Identifiers::parse_strict("host=%zz"),
            Err(IdentifierError::Encoding("host=%zz".into()))
        );
    }

    #[test]
    fn their_number_is_bounded() {
        let text = "ipv4=1.2.3.4&".repeat(MAX_IDENTIFIERS + 9);
        let (identifiers, unusable) = Identifiers::parse_lenient(&text);
        assert_eq!(identifiers.ipv4.len(), MAX_IDENTIFIERS);
        assert_eq!(unusable, [IdentifierError::TooMany]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            addresses in proptest::collection::vec(any_address(), 0..5),
            host in proptest::collection::vec(any_name(), 0..5),
            networks in proptest::collection::vec((any_address(), 0..=32_u8), 0..5),
            default_route: bool,
        ) {
            let mut identifiers = Identifiers { host, default_route, ..Identifiers::default() };
            for address in addresses {
                match address {
                    IpAddr::V4(address) => identifiers.ipv4.push(address),
                    IpAddr::V6(address) => identifiers.ipv6.push(address),
                }
            }
            for (address, prefix) in networks {
                identifiers.cidr.push(canonical(IpNet::new(address, prefix).unwrap()));
            }
            let read = Identifiers::parse_strict(&identifiers.to_string());
            prop_assert_eq!(read, Ok((identifiers, Vec::new())));
        }

        #[test]
        fn any_text_is_read(text in "([a-z0-9=&;%:./-]|default-route=|ipv4=|cidr=|.){0,40}") {
            let (identifiers, _) = Identifiers::parse_lenient(&text);
            let again = Identifiers::parse_lenient(&identifiers.to_string());
            prop_assert_eq!(again, (identifiers, Vec::new()));
        }
    }
}
