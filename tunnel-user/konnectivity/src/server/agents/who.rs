//! Identity of an agent: from its certificate, from a service account's token, or unproven from its own
//! report.
//!
//! The reported name identifies a process and no more, except where there is no proof. The texts of
//! refusals are Konnectivity's, because people search logs for them.

use rustls::pki_types::CertificateDer;
use tunnel_proto::konnectivity::metadata::{AGENT_ID, AGENT_IDENTIFIERS, AUTHORIZATION, BEARER};
use tunnel_proto::konnectivity::{IdentifierError, Identifiers};
use tunnel_proto::session::InstanceId;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::grpc::server::Call;
use cpc_identity::identity::{IdentityError, ip_from_octets, name_of};
use cpc_identity::revoked::Revoked;
use cpc_identity::{Identity, Role, TrustDomain};
use cpc_kubernetes::token::{ReviewError, TokenReviewer};

/// Maximum length of the displayed part of an agent's report, in characters.
pub(super) const MAX_SHOWN: usize = 256;

/// Proof of an agent's identity.
#[derive(Clone)]
pub(super) enum Proof {
    /// A certificate of the listener's CA.
    Certificate,
    /// A token, which the Kubernetes API reviews.
    Token(TokenReviewer),
    /// No proof.
    Nothing,
}

/// Report of an agent about itself.
#[derive(Debug)]
pub(super) struct Introduction {
    /// Reported name, which may be empty and proves nothing.
    pub agent_id: String,
    /// Reported identifiers.
    pub identifiers: Identifiers,
    /// Unusable identifiers.
    pub unusable: Vec<IdentifierError>,
    /// Token, or the reason why there is none.
    token: Result<String, Refusal>,
}

/// Reason why an agent is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// The agent reports no name, or several.
    #[error("expected one agent ID in the context, got [{0}]")]
    AgentId(String),
    /// The agent reports its identifiers twice.
    #[error("expected at most one set of agent identifiers in the context, got [{0}]")]
    Identifiers(String),
    /// The identifiers can't be decoded.
    #[error("fail to parse url encoded string: {0}")]
    Encoding(IdentifierError),
    /// There is no token.
    #[error("Authentication context was not found in metadata")]
    NoToken,
    /// There are several tokens.
    #[error("too many ({0}) tokens are received")]
    Tokens(usize),
    /// The header holds no bearer token.
    #[error("received token does not have {BEARER:?} prefix")]
    NotBearer,
    /// The token is not valid.
    #[error("Failed to validate authentication token, err:{0}")]
    Token(ReviewError),
    /// The agent is revoked.
    #[error(transparent)]
    Revoked(#[from] Revoked),
    /// The certificate is missing, or has no identity.
    #[error("the agent's certificate has no identity: {0}")]
    Certificate(IdentityError),
}

impl From<ReviewError> for Refusal {
    fn from(why: ReviewError) -> Self {
        Self::Token(why)
    }
}

impl From<IdentityError> for Refusal {
    fn from(why: IdentityError) -> Self {
        Self::Certificate(why)
    }
}

impl Introduction {
    /// Reads the metadata of a call.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(super) fn read(call: &Call) -> Result<Self, Refusal> {
        Self::from_metadata(|name| call.metadata(name).collect())
    }

    fn from_metadata<'a>(values: impl Fn(&str) -> Vec<&'a str>) -> Result<Self, Refusal> {
        let agent_id = match values(AGENT_ID)[..] {
            [id] => id.to_owned(),
            ref others => return Err(Refusal::AgentId(excerpt(others))),
        };
        let identifiers = match values(AGENT_IDENTIFIERS)[..] {
            [] => "",
            [one] => one,
            ref others => return Err(Refusal::Identifiers(excerpt(others))),
        };
        let (identifiers, unusable) = Identifiers::parse_lenient(identifiers);
        let encoding = |error: &&_| matches!(error, IdentifierError::Encoding(_));
        if let Some(error) = unusable.iter().find(encoding) {
            return Err(Refusal::Encoding(error.clone()));
        }
        let token = match values(AUTHORIZATION)[..] {
            [] => Err(Refusal::NoToken),
            [one] => one
                .strip_prefix(BEARER)
                .map(str::to_owned)
                .ok_or(Refusal::NotBearer),
            ref others => Err(Refusal::Tokens(others.len())),
        };
        Ok(Self {
            agent_id,
            identifiers,
            unusable,
            token,
        })
    }

    /// Returns the id of the process.
    pub(super) fn instance(&self) -> InstanceId {
        let digest =
            aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.agent_id.as_bytes());
        let mut instance = [0; 16];
        for (to, from) in instance.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        InstanceId(instance)
    }

    /// Determines the identity.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(super) async fn identity(
        &self,
        proof: &Proof,
        certificate: Option<&CertificateDer<'static>>,
        tenant: &TrustDomain,
    ) -> Result<Identity, Refusal> {
        let name = match (proof, certificate) {
            (Proof::Certificate, Some(leaf)) => return Ok(certified(leaf, tenant)?),
            (Proof::Certificate, None) => {
                return Err(IdentityError::Malformed("there is none".into()).into());
            }
            (Proof::Token(reviewer), _) => {
                let token = self.token.as_ref().map_err(Clone::clone)?;
                let account = reviewer.review(token).await?;
                let node = account.node.map(|node| format!(".{node}"));
                let node = node.unwrap_or_default();
                format!("{}.{}{node}", account.namespace, account.name)
            }
            (Proof::Nothing, _) => self.agent_id.clone(),
        };
        Ok(Identity::new(tenant.clone(), Role::Agent, &name_of(&name))?)
    }
}

/// Returns unexpected values, cut to a length for a log.
fn excerpt(values: &[&str]) -> String {
    values.join(" ").chars().take(MAX_SHOWN).collect()
}

/// Returns the identity in a verified certificate: its URI, or its common name in a certificate of
/// another CA software.
fn certified(leaf: &CertificateDer<'_>, tenant: &TrustDomain) -> Result<Identity, IdentityError> {
    match Identity::from_certificate(leaf) {
        Err(IdentityError::UriCount(0)) => {}
        identity => return identity,
    }
    let malformed = |e: &dyn std::fmt::Display| IdentityError::Malformed(e.to_string());
    let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| malformed(&e))?;
    let mut common_names = cert.subject().iter_common_name();
    let name = common_names.next().and_then(|name| name.as_str().ok());
    let mut identity = Identity::new(
        tenant.clone(),
        Role::Agent,
        &name_of(name.unwrap_or_default()),
    )?;
    let names = cert.subject_alternative_name().map_err(|e| malformed(&e))?;
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        if let GeneralName::IPAddress(octets) = name {
            identity.addresses.extend(ip_from_octets(octets));
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn introduced(metadata: &[(&str, &'static str)]) -> Result<Introduction, Refusal> {
        Introduction::from_metadata(|name| {
            let of_name = metadata.iter().filter(|(key, _)| *key == name);
            of_name.map(|(_, value)| *value).collect()
        })
    }

    fn refused(metadata: &[(&str, &'static str)]) -> String {
        introduced(metadata).unwrap_err().to_string()
    }

    #[test]
    fn an_agent_has_one_name_which_may_be_empty() {
        assert_eq!(introduced(&[("agentid", "")]).unwrap().agent_id, "");
        assert_eq!(refused(&[]), "expected one agent ID in the context, got []");
        assert_eq!(
            refused(&[("agentid", "a"), ("agentid", "b")]),
            "expected one agent ID in the context, got [a b]"
        );
    }

    #[test]
    fn identifiers_are_read_once_and_leniently() {
        let said = |identifiers| introduced(&[("agentid", "a"), ("agentidentifiers", identifiers)]);
        let introduction = said("ipv4=10.0.0.1&foo=bar&default-route=true").unwrap();
        assert_eq!(introduction.identifiers.claims().len(), 2);
        assert_eq!(introduction.unusable.len(), 1);
        let error = said("host=%zz").unwrap_err().to_string();
        assert!(
            error.starts_with("fail to parse url encoded string: "),
            "{error}"
        );
        assert_eq!(
            refused(&[
                ("agentid", "a"),
                ("agentidentifiers", "host=x"),
                ("agentidentifiers", "host=y")
            ]),
            "expected at most one set of agent identifiers in the context, got [host=x host=y]"
        );
    }

    #[test]
    fn one_token_of_the_right_kind() {
        let token = |values: &[&'static str]| {
            let mut metadata = vec![("agentid", "a")];
            metadata.extend(values.iter().map(|value| ("authorization", *value)));
            let token = introduced(&metadata).unwrap().token;
            token.map_err(|refusal| refusal.to_string())
        };
        assert_eq!(token(&["Bearer x y"]), Ok("x y".into()));
        for (values, text) in [
            (&[][..], "Authentication context was not found in metadata"),
            (
                &["Bearer x", "Bearer y"],
                "too many (2) tokens are received",
            ),
            (
                &["bearer x"],
                "received token does not have \"Bearer \" prefix",
            ),
        ] {
            assert_eq!(token(values), Err(text.into()));
        }
    }

    #[test]
    fn processes_are_told_apart_by_their_names() {
        let instance = |id| introduced(&[("agentid", id)]).unwrap().instance();
        assert_eq!(instance("a"), instance("a"));
        assert_ne!(instance("a"), instance("b"));
    }

    #[tokio::test]
    async fn a_foreign_certificate_names_by_its_common_name_and_addresses() {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "system:node:w 1");
        params
            .subject_alt_names
            .push(SanType::IpAddress("10.99.1.2".parse().unwrap()));
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let tenant = "a".parse().unwrap();
        let introduction = introduced(&[("agentid", "not me")]).unwrap();
        let identity = introduction
            .identity(&Proof::Certificate, Some(certificate.der()), &tenant)
            .await
            .unwrap();
        assert_eq!(identity.uri(), "spiffe://a/agent/system-node-w-1");
        assert_eq!(
            identity.addresses,
            ["10.99.1.2".parse::<std::net::IpAddr>().unwrap()]
        );
        let missing = introduction.identity(&Proof::Certificate, None, &tenant);
        assert!(missing.await.is_err());
        let believed = introduction.identity(&Proof::Nothing, None, &tenant);
        assert_eq!(&*believed.await.unwrap().name, "not-me");
    }
}
