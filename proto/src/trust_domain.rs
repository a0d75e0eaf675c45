//! The name of a trust domain.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Trust domain: the name space of identities that one set of CAs vouches for. It is also the
/// tenant of the identity. Lower-case letters, digits, `.`, `-` and `_`, 1 to 255 of them
/// (SPIFFE-ID section 2.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = TrustDomainError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        if s.is_empty() || s.len() > 255 || !s.bytes().all(allowed) {
            return Err(TrustDomainError(s.chars().take(64).collect()));
        }
        Ok(Self(s.into()))
    }
}

/// A text that is no trust domain; its first 64 characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no trust domain: 1 to 255 of a-z 0-9 . - _")]
pub struct TrustDomainError(String);

#[cfg(feature = "serde")]
impl serde::Serialize for TrustDomain {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for TrustDomain {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
