//! Where certificates are asked for: judges, issues, writes down, and says so.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use tunnel_proto::certificate::{Answer, Issued, Join};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::admit::{Asked, Holder, Pages, Refused};
use super::metrics::{JoinMetrics, Outcome};
use super::token::Token;
use super::{Book, BookError};
use crate::kubernetes::token::{ReviewError, TokenReviewer};
use crate::telemetry::audit::events::{self as audit, Listener};
use crate::tls::identity::{self, Identity};
use crate::tls::issue::{Applicant, Authority, IssueError, Request};
use crate::tls::revoked::{Peer, Revocations, Revoked};
use crate::tls::{Material, Role};

/// What a token of Kubernetes is good for.
pub struct Pods {
    /// Asks the API server.
    pub reviewer: TokenReviewer,
    /// Which addresses their nodes may have.
    pub addresses: Vec<IpNet>,
}

/// Issues certificates to agents.
pub struct Desk {
    /// Tokens, and what was issued.
    pub book: Book,
    /// The CA's directory. Read anew each time, so that it may be replaced.
    pub ca: PathBuf,
    /// For how long.
    pub validity: Duration,
    /// Whose roots go with what is issued.
    pub material: Arc<Material>,
    /// Who gets nothing any more.
    pub revocations: Arc<Revocations>,
    /// Tokens of Kubernetes, where they are taken.
    pub pods: Option<Pods>,
    /// Counters.
    pub metrics: JoinMetrics,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
enum DeskError {
    /// By the rules.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Somebody who counts no more.
    #[error(transparent)]
    Revoked(#[from] Revoked),
    /// The request for a certificate.
    #[error("the request for a certificate is of no use: {0}")]
    Csr(#[source] rcgen::Error),
    /// Neither kind of token.
    #[error(transparent)]
    NoToken(#[from] super::token::TokenError),
    /// Kubernetes does not vouch for it.
    #[error(transparent)]
    Review(#[from] ReviewError),
    /// Kubernetes does not say where the pod is.
    #[error(
        "the API server does not say to which node the token belongs: it has to be a pod's \
         (projected), and Kubernetes 1.32 or later"
    )]
    NoNode,
    /// Of another tenant.
    #[error("the CA here is of {ours}; certificates of {theirs} come from elsewhere")]
    Domain {
        /// The CA's.
        ours: String,
        /// The agent's.
        theirs: String,
    },
    /// The book.
    #[error(transparent)]
    Book(#[from] BookError),
    /// The CA.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// A CA whose certificates no agent would take.
    #[error(
        "the CA in join.ca is not among those of tls.ca, so no agent would trust what it issues: see \
         docs/joining.md, \"Another CA\""
    )]
    UnknownCa,
    /// The thread that was to do it.
    #[error("it was given up: {0}")]
    GivenUp(#[from] tokio::task::JoinError),
}

impl DeskError {
    /// Our own trouble, of which whoever asks is told nothing.
    fn is_ours(&self) -> bool {
        matches!(
            self,
            Self::Book(_) | Self::Issue(_) | Self::UnknownCa | Self::GivenUp(_)
        )
    }
}

/// What was issued, for the record.
struct Done {
    identity: String,
    serial: String,
    until: SystemTime,
    issued: Issued,
}

/// What somebody without a certificate asks for.
struct Ask {
    node: String,
    addresses: Vec<IpAddr>,
    csr: Vec<u8>,
}

impl Desk {
    /// Answers somebody without a certificate. The file, the CA and Kubernetes may take their time.
    pub async fn join(self: &Arc<Self>, join: Join, remote: SocketAddr) -> Answer {
        let (token, ask) = (
            join.token,
            Ask {
                node: join.node,
                addresses: join.addresses,
                csr: join.csr,
            },
        );
        let node = ask.node.clone();
        let done = match (token.parse::<Token>(), &self.pods) {
            (Err(_), Some(pods)) => match self.reviewed(pods, &token, ask).await {
                Ok(ask) => self.apart(move |desk| desk.by_pod(ask)).await,
                Err(error) => Err(error),
            },
            (Err(error), None) => Err(error.into()),
            (Ok(token), _) => self.apart(move |desk| desk.by_token(&token, ask)).await,
        };
        self.metrics.join(outcome(&done));
        match done {
            Ok((done, by)) => {
                tracing::info!(
                    agent = done.identity, %remote, token = by, serial = done.serial,
                    until = %humantime::format_rfc3339_seconds(done.until), "agent joined"
                );
                audit::joined(&done.identity, remote, &by, (&done.serial, done.until));
                Ok(done.issued)
            }
            Err(error) => {
                audit::peer_refused(Listener::Join, remote, &error);
                Err(told(&error, &node, Some(remote)))
            }
        }
    }

    /// Answers an agent that has a certificate, over its tunnel.
    pub async fn renew(self: &Arc<Self>, agent: Identity, csr: Vec<u8>) -> Answer {
        let name = agent.name.clone();
        let done = self.apart(move |desk| desk.by_tunnel(&agent, &csr)).await;
        self.metrics.renewal(outcome(&done));
        match done {
            Ok(done) => {
                tracing::info!(
                    agent = done.identity, serial = done.serial,
                    until = %humantime::format_rfc3339_seconds(done.until), "certificate renewed"
                );
                audit::renewed(&done.identity, (&done.serial, done.until));
                Ok(done.issued)
            }
            Err(error) => Err(told(&error, &name, None)),
        }
    }

    /// Files and signatures hold up nothing else.
    async fn apart<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, DeskError> + Send + 'static,
    ) -> Result<T, DeskError> {
        let desk = self.clone();
        tokio::task::spawn_blocking(move || work(&desk)).await?
    }

    async fn reviewed(&self, pods: &Pods, token: &str, ask: Ask) -> Result<Ask, DeskError> {
        let account = pods.reviewer.review(token.trim()).await?;
        let node = account.node.ok_or(DeskError::NoNode)?;
        if node != ask.node {
            return Err(Refused::Node {
                nodes: node,
                node: ask.node,
            }
            .into());
        }
        Ok(ask)
    }

    fn by_token(&self, token: &Token, ask: Ask) -> Result<(Done, String), DeskError> {
        self.admit(ask, token.id(), |pages, asked, now| {
            pages.by_token(token, asked, now)
        })
    }

    fn by_pod(&self, ask: Ask) -> Result<(Done, String), DeskError> {
        let allowed = self.pods.as_ref().map(|pods| &pods.addresses[..]);
        self.admit(ask, "kubernetes", |pages, asked, now| {
            pages.by_name(allowed.unwrap_or_default(), asked, now)
        })
    }

    fn admit(
        &self,
        ask: Ask,
        by: &str,
        judge: impl FnOnce(&mut Pages, &Asked<'_>, SystemTime) -> Result<(), Refused>,
    ) -> Result<(Done, String), DeskError> {
        let applicant = Applicant::read(&ask.csr).map_err(DeskError::Csr)?;
        let (node, addresses) = (&ask.node, &ask.addresses);
        let asked = Asked {
            node,
            addresses,
            key: applicant.key(),
        };
        self.book.change(|pages| {
            let now = SystemTime::now();
            judge(pages, &asked, now)?;
            let (done, holder) = self.issue(node, addresses, &applicant, (by, now))?;
            pages.record(node, holder);
            Ok((done, by.to_owned()))
        })
    }

    fn by_tunnel(&self, agent: &Identity, csr: &[u8]) -> Result<Done, DeskError> {
        let applicant = Applicant::read(csr).map_err(DeskError::Csr)?;
        self.book.change(|pages| {
            let now = SystemTime::now();
            pages.renewal(&agent.name, now)?;
            let ours = self.authority()?;
            if *ours.trust_domain() != agent.trust_domain {
                return Err(DeskError::Domain {
                    ours: ours.trust_domain().to_string(),
                    theirs: agent.trust_domain.to_string(),
                });
            }
            let by = pages.issued.get(&*agent.name);
            let by = by.map_or_else(|| "elsewhere".into(), |holder| holder.token.clone());
            let addresses = pages.still_of(&agent.name, &agent.addresses, now);
            let (done, holder) = self.issue(&agent.name, &addresses, &applicant, (&by, now))?;
            pages.record(&agent.name, holder);
            Ok(done)
        })
    }

    fn authority(&self) -> Result<Authority, IssueError> {
        Authority::open(&self.ca)
    }

    fn issue(
        &self,
        node: &str,
        addresses: &[IpAddr],
        applicant: &Applicant,
        (by, now): (&str, SystemTime),
    ) -> Result<(Done, Holder), DeskError> {
        let authority = self.authority()?;
        let identity = identity::uri(authority.trust_domain(), Role::Agent, node);
        self.revocations.check(&Peer::called(identity.clone()))?;
        let until = (now + self.validity).min(authority.not_after());
        let request = Request {
            role: Role::Agent,
            name: node.into(),
            dns: Vec::new(),
            addresses: addresses.to_vec(),
            not_after: until,
        };
        let anchors = self.material.anchors();
        if !anchors.iter().any(|it| it.key() == authority.key()) {
            return Err(DeskError::UnknownCa);
        }
        let leaf = authority.certify(&request, applicant)?;
        let roots = anchors.certificates();
        let serial = serial(&leaf);
        let holder = Holder {
            addresses: addresses.to_vec(),
            key: applicant.key().to_string(),
            serial: serial.clone(),
            since: now,
            until,
            token: by.into(),
        };
        let issued = Issued {
            chain: vec![leaf.to_vec()],
            roots: roots.iter().map(|root| root.to_vec()).collect(),
        };
        let done = Done {
            identity,
            serial,
            until,
            issued,
        };
        Ok((done, holder))
    }
}

fn outcome<T>(done: &Result<T, DeskError>) -> Outcome {
    match done {
        Ok(_) => Outcome::Issued,
        Err(error) if error.is_ours() => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}

/// What the one who asked is told.
fn told(error: &DeskError, node: &str, remote: Option<SocketAddr>) -> String {
    let remote = remote.map(tracing::field::display);
    if error.is_ours() {
        tracing::error!(%error, node, remote, "no certificate could be issued");
        return "the server could not issue a certificate; its log says why".into();
    }
    tracing::warn!(%error, node, remote, "no certificate issued");
    error.to_string()
}

/// As `openssl x509 -serial` prints it, and as `tls.revoked` takes it.
fn serial(certificate: &CertificateDer<'_>) -> String {
    let read = X509Certificate::from_der(certificate).ok();
    let serial = read.map(|(_, it)| it.raw_serial().to_vec());
    let octets = serial.unwrap_or_default();
    octets.iter().map(|octet| format!("{octet:02X}")).collect()
}

#[cfg(test)]
mod tests;
