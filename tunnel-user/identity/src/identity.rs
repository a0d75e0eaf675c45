//! Identities: `spiffe://<trust domain>/<role>/<name>`, read from a certificate.
//!
//! Invariant: an [`Identity`] is only ever made from a certificate whose URI **and** extended key usage
//! agree on the role. The verifier decides whether the certificate is genuine.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

pub use tunnel_proto::trust_domain::TrustDomain;
use tunnel_proto::trust_domain::TrustDomainError;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Role of a certificate's holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// `cpc server`: terminates tunnels.
    Server,
    /// `cpc agent`: dials out from a worker.
    Agent,
    /// A program that uses a frontend over TLS, such as kube-apiserver.
    Client,
}

impl Role {
    /// Returns the first segment of the URI's path.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Agent => "agent",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Reason why a certificate gives no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The certificate is not X.509, or lacks the shape of an identity.
    #[error("the certificate can't be read: {0}")]
    Malformed(String),
    /// The certificate has no URI, or more than one.
    #[error(
        "the certificate has {0} URI names, an identity needs exactly one; issue it with `cpc pki`"
    )]
    UriCount(usize),
    /// The URI has another form.
    #[error("{0:?} is no identity: spiffe://<trust domain>/<server|agent|client>/<name> is one")]
    Uri(String),
    /// The trust domain has invalid characters.
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
    /// The name has invalid characters.
    #[error("{0:?} is no name: 1 to 253 of A-Z a-z 0-9 . - _")]
    Name(String),
    /// The pattern can match no name.
    #[error("{0:?} is no pattern of names: 1 to 253 of A-Z a-z 0-9 . - _ and *")]
    NamePattern(String),
    /// The extended key usage lacks the one of the role.
    #[error("{uri} lacks the extended key usage of its role, {needed}; issue it with `cpc pki`")]
    KeyUsage {
        /// Identity that the certificate claims.
        uri: String,
        /// Missing usage.
        needed: &'static str,
    },
    /// The extended key usage would allow the certificate to serve as a server's as well.
    #[error(
        "{uri} has the extended key usage serverAuth beside clientAuth, and only a server may: issue \
         it without, as `cpc pki` does"
    )]
    ExcessUsage {
        /// Identity that the certificate claims.
        uri: String,
    },
}

/// The identity of a peer, as its certificate names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Trust domain, which is the tenant.
    pub trust_domain: TrustDomain,
    /// Role of the peer.
    pub role: Role,
    /// Server id, node name or client name.
    pub name: Arc<str>,
    /// Node addresses: the IP names of the certificate.
    pub addresses: Vec<IpAddr>,
}

impl Identity {
    /// Creates an identity that something other than a certificate vouches for, without node addresses.
    ///
    /// # Errors
    /// [`IdentityError::Name`].
    pub fn new(trust_domain: TrustDomain, role: Role, name: &str) -> Result<Self, IdentityError> {
        check_name(name)?;
        Ok(Self {
            trust_domain,
            role,
            name: name.into(),
            addresses: Vec::new(),
        })
    }

    /// Reads the identity in a DER certificate (RFC 5280).
    ///
    /// # Errors
    /// [`IdentityError`] unless the certificate has exactly one URI name of the right form and the
    /// extended key usage that belongs to its role.
    pub fn from_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let malformed = |e: &dyn fmt::Display| IdentityError::Malformed(e.to_string());
        let (_, cert) = X509Certificate::from_der(der).map_err(|e| malformed(&e))?;
        let mut uris = Vec::new();
        let mut addresses = Vec::new();
        if let Some(san) = cert.subject_alternative_name().map_err(|e| malformed(&e))? {
            for name in &san.value.general_names {
                match name {
                    GeneralName::URI(uri) => uris.push(*uri),
                    GeneralName::IPAddress(octets) => addresses.push(
                        ip_from_octets(octets)
                            .ok_or_else(|| malformed(&"an IP name of odd length"))?,
                    ),
                    _ => {}
                }
            }
        }
        let [uri] = uris[..] else {
            return Err(IdentityError::UriCount(uris.len()));
        };
        let (trust_domain, role, name) = parse_uri(uri)?;
        let usage = cert.extended_key_usage().map_err(|e| malformed(&e))?;
        let usage = usage.map(|it| (it.value.server_auth, it.value.client_auth));
        let (is_server, is_client) = usage.unwrap_or_default();
        let lacks = |needed| IdentityError::KeyUsage {
            uri: uri.into(),
            needed,
        };
        match role {
            Role::Server if !is_server => return Err(lacks("serverAuth")),
            Role::Agent | Role::Client if !is_client => return Err(lacks("clientAuth")),
            Role::Agent | Role::Client if is_server => {
                return Err(IdentityError::ExcessUsage { uri: uri.into() });
            }
            _ => {}
        }
        Ok(Self {
            trust_domain,
            role,
            name,
            addresses,
        })
    }

    /// Returns `spiffe://<trust domain>/<role>/<name>`.
    pub fn uri(&self) -> String {
        uri(&self.trust_domain, self.role, &self.name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/{}/{}",
            self.trust_domain, self.role, self.name
        )
    }
}

/// Returns the URI of an identity.
pub fn uri(trust_domain: &TrustDomain, role: Role, name: &str) -> String {
    format!("spiffe://{trust_domain}/{role}/{name}")
}

/// Maximum length of a name, in bytes.
const MAX_NAME: usize = 253;

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

/// Converts a text such as `system:node:w1` to a name: each invalid character becomes `-`.
pub fn name_of(text: &str) -> String {
    let name: String = text
        .chars()
        .take(MAX_NAME)
        .map(|c| if in_name(c) { c } else { '-' })
        .collect();
    if name.is_empty() { "-".into() } else { name }
}

/// Checks a server id, node name or client name.
///
/// # Errors
/// [`IdentityError::Name`] with the given text.
pub fn check_name(name: &str) -> Result<(), IdentityError> {
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(in_name) {
        return Err(IdentityError::Name(name.chars().take(64).collect()));
    }
    Ok(())
}

/// Checks a pattern of names, in which `*` stands for any characters.
///
/// # Errors
/// [`IdentityError::NamePattern`] with the given text.
pub fn check_name_pattern(pattern: &str) -> Result<(), IdentityError> {
    let fits = |c| c == '*' || in_name(c);
    if pattern.is_empty() || pattern.len() > MAX_NAME || !pattern.chars().all(fits) {
        let shown = pattern.chars().take(64).collect();
        return Err(IdentityError::NamePattern(shown));
    }
    Ok(())
}

/// Checks that `identity` is the URI of one, and returns it in the form of [`Identity::uri`].
///
/// # Errors
/// [`IdentityError`].
pub fn canonical(identity: &str) -> Result<String, IdentityError> {
    let (trust_domain, role, name) = parse_uri(identity)?;
    Ok(uri(&trust_domain, role, &name))
}

/// Returns the trust domain of an identity.
pub fn domain_of(identity: &str) -> Option<TrustDomain> {
    parse_uri(identity).ok().map(|(domain, ..)| domain)
}

fn parse_uri(uri: &str) -> Result<(TrustDomain, Role, Arc<str>), IdentityError> {
    let wrong = || IdentityError::Uri(uri.chars().take(300).collect());
    let mut parts = uri.strip_prefix("spiffe://").ok_or_else(wrong)?.split('/');
    let (Some(domain), Some(role), Some(name), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(wrong());
    };
    let role = match role {
        "server" => Role::Server,
        "agent" => Role::Agent,
        "client" => Role::Client,
        _ => return Err(wrong()),
    };
    check_name(name)?;
    Ok((domain.parse()?, role, name.into()))
}

/// Returns the address in an IP name of a certificate (RFC 5280, section 4.2.1.6).
pub fn ip_from_octets(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_of_the_right_form() {
        let (domain, role, name) = parse_uri("spiffe://cluster.local/agent/w1").unwrap();
        assert_eq!(uri(&domain, role, &name), "spiffe://cluster.local/agent/w1");
    }

    #[test]
    fn uris_of_a_wrong_form() {
        for wrong in [
            "",
            "https://cluster.local/agent/w1",
            "spiffe://cluster.local/agent",
            "spiffe://cluster.local/agent/w1/x",
            "spiffe://cluster.local/admin/w1",
            "spiffe://cluster.local/agent/",
            "spiffe://cluster.local/agent/w 1",
            "spiffe:///agent/w1",
            "spiffe://Cluster/agent/w1",
        ] {
            assert!(parse_uri(wrong).is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn patterns_of_names_are_bounded() {
        for right in ["w1", "*", "pool-a-*", "*-*-*-x"] {
            assert_eq!(check_name_pattern(right), Ok(()), "{right}");
        }
        for wrong in ["", "w 1", "a/*", "ä*", &"*".repeat(254)] {
            assert!(check_name_pattern(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn garbage_is_no_certificate() {
        assert!(matches!(
            Identity::from_certificate(b"x"),
            Err(IdentityError::Malformed(_))
        ));
    }
}
