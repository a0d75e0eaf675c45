//! Destination of a connection: an IP address or a DNS name, and a port.
//!
//! Every value has one form: names are lower case without a trailing dot, and an IPv4-mapped IPv6
//! address is the IPv4 address. So values can be compared, looked up and checked against a policy
//! as they are.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;

use super::PrefaceError;

const HOST_IPV4: u8 = 1;
const HOST_IPV6: u8 = 2;
const HOST_NAME: u8 = 3;

/// A DNS name: labels of 1 to 63 letters, digits, hyphens and underscores, [`Name::MAX_LEN`] bytes
/// in all, lower case, no trailing dot (RFC 1035, section 2.3.4; RFC 2181, section 11).
///
/// The last label is not a number: resolvers read `127.1` and `0x7f000001` as addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

/// The text can't be a DNS name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{name:?} is not a host name: {why}")]
pub struct NameError {
    /// The text, cut to a name's longest length.
    pub name: String,
    /// The rule that it breaks.
    pub why: &'static str,
}

impl Name {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 253;

    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let name = text.strip_suffix('.').unwrap_or(text);
        match broken_rule(name) {
            None => Ok(Self(name.to_ascii_lowercase())),
            Some(why) => Err(NameError {
                name: text[..text.floor_char_boundary(Name::MAX_LEN)].to_owned(),
                why,
            }),
        }
    }
}

fn broken_rule(name: &str) -> Option<&'static str> {
    if name.len() > Name::MAX_LEN {
        return Some("it is longer than 253 bytes");
    }
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Some("each label has 1 to 63 characters");
        }
        if !label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        {
            return Some("only letters, digits, '-' and '_' are allowed in a label");
        }
    }
    let last = name.rsplit('.').next().unwrap_or(name);
    let hexadecimal = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    let number = match hexadecimal {
        Some(digits) => digits.bytes().all(|b| b.is_ascii_hexdigit()),
        None => last.bytes().all(|b| b.is_ascii_digit()),
    };
    number.then_some("its last label is a number, which resolvers take for an address")
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host to dial. Names are resolved by the agent, never by the server.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// An address. Make it by [`Host::from`], so that it is never IPv4-mapped.
    Ip(IpAddr),
    /// A name.
    Name(Name),
}

impl From<IpAddr> for Host {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
}

impl From<Name> for Host {
    fn from(name: Name) -> Self {
        Self::Name(name)
    }
}

impl FromStr for Host {
    type Err = NameError;

    /// Parses an address without brackets, or a name.
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse::<IpAddr>() {
            Ok(address) => Ok(address.into()),
            Err(_) => text.parse::<Name>().map(Self::Name),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Host {
    pub(super) fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Ip(address) => match address.to_canonical() {
                IpAddr::V4(address) => {
                    out.put_u8(HOST_IPV4);
                    out.put_slice(&address.octets());
                }
                IpAddr::V6(address) => {
                    out.put_u8(HOST_IPV6);
                    out.put_slice(&address.octets());
                }
            },
            Self::Name(name) => {
                out.put_u8(HOST_NAME);
                // A name has at most 253 bytes, so its length fits.
                out.put_u8(name.0.len() as u8);
                out.put_slice(name.0.as_bytes());
            }
        }
    }

    pub(super) fn decode(body: &mut &[u8]) -> Result<Self, PrefaceError> {
        match body.try_get_u8()? {
            HOST_IPV4 => Ok(IpAddr::V4(Ipv4Addr::from_bits(body.try_get_u32()?)).into()),
            HOST_IPV6 => Ok(IpAddr::V6(Ipv6Addr::from_bits(body.try_get_u128()?)).into()),
            HOST_NAME => {
                let length = usize::from(body.try_get_u8()?);
                let name = body.split_off(..length).ok_or(PrefaceError::Truncated)?;
                Ok(Self::Name(String::from_utf8_lossy(name).parse()?))
            }
            unknown => Err(PrefaceError::UnknownHostType(unknown)),
        }
    }
}

/// A host and a port. As text: `host:port`, with an IPv6 address in brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Destination {
    /// The host.
    pub host: Host,
    /// The port, not 0.
    pub port: u16,
}

/// The text is not a destination.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DestinationError {
    /// The host has no `:port`.
    #[error("the port is missing: write host:port, or [address]:port for IPv6")]
    MissingPort,
    /// The port is not a number from 1 to 65535.
    #[error("the port must be a number from 1 to 65535")]
    BadPort,
    /// The text in brackets is not an IPv6 address.
    #[error("only an IPv6 address stands in brackets, and without brackets none does")]
    BadBrackets,
    /// The host is neither an address nor a name.
    #[error(transparent)]
    BadHost(#[from] NameError),
}

impl Destination {
    /// Creates a destination; an IPv4-mapped address becomes an IPv4 address.
    #[must_use]
    pub fn new(host: impl Into<Host>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
        }
    }
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let (host, port) = text.rsplit_once(':').ok_or(DestinationError::MissingPort)?;
        let host = match host.strip_prefix('[') {
            Some(bracketed) => bracketed
                .strip_suffix(']')
                .and_then(|address| address.parse::<Ipv6Addr>().ok())
                .map(|address| Host::from(IpAddr::V6(address)))
                .ok_or(DestinationError::BadBrackets)?,
            None if host.contains(':') => return Err(DestinationError::BadBrackets),
            None => host.parse()?,
        };
        // u16's own parser also takes "+80".
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|port| digits && *port != 0);
        Ok(Self {
            host,
            port: port.ok_or(DestinationError::BadPort)?,
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}
