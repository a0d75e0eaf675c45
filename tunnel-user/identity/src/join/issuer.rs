//! The issuer of certificates: it decides, issues, records and logs.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio::time::MissedTickBehavior;
use tunnel_proto::certificate::{Answer, Issued, Join};

use super::admit::{AdmitRequest, Admitted, Refusal};
use super::clock::{Clock, Time};
use super::issue_records::{Holder, IssueRecords, PodTicket, Use};
use super::metrics::{JoinMetrics, Outcome};
use super::token::Token;
use super::{IssueLog, IssueLogError};
use crate::identity::{self, Identity, IdentityError};
use crate::issue::{Authority, IssueError, Request, SigningRequest, serial_of};
use crate::revoked::{Peer, Revocations, Revoked};
use crate::validity::validity;
use crate::{Material, Role};
use cpc_host::report::report;
use cpc_kubernetes::node::{NodeError, Nodes};
use cpc_kubernetes::token::{ReviewError, TokenReviewer, claims, fingerprint::fingerprint};
use cpc_observe::audit::events::{self as audit, Listener};

/// Maximum time for which a token of Kubernetes is remembered, if it does not end sooner.
const LONGEST_POD_TOKEN: Duration = Duration::from_secs(366 * 24 * 3600);

/// Recorded token of nodes that joined by Kubernetes.
const BY_KUBERNETES: &str = "kubernetes";

/// Maximum number of nodes looked up for one request, of those that hold a requested name or address.
const MAX_LOOKUPS: usize = 8;

/// Verification of Kubernetes' tokens.
pub struct Pods {
    /// Reviewer of tokens.
    pub reviewer: TokenReviewer,
    /// Source of node addresses.
    pub nodes: Nodes,
    /// Addresses that nodes may join with.
    pub addresses: Vec<IpNet>,
}

/// Maximum age of the recorded settled time while a server runs.
const TIME_INTERVAL: Duration = Duration::from_secs(3600);

/// Maximum number of jobs at once. Most of a job runs under the lock of the file, so more jobs would
/// wait there, each on a thread.
const MAX_JOBS: usize = 8;

/// Bound on the jobs on files and signatures, including those whose caller has left.
#[derive(Clone)]
pub struct Jobs(Arc<Semaphore>);

impl Default for Jobs {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_JOBS)))
    }
}

impl Jobs {
    /// Runs `job` on a blocking thread, once a permit is free. A caller that gives up earlier takes
    /// no thread.
    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        // It is never closed.
        let permit = self.0.clone().acquire_owned().await.ok();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            job()
        })
        .await
    }
}

/// Issues certificates to agents.
pub struct Issuer {
    /// Tokens and issued certificates.
    pub log: IssueLog,
    /// Directory of the CA. Read for each certificate, so that it may be replaced.
    pub ca: PathBuf,
    /// Validity of issued certificates.
    pub validity: Duration,
    /// TLS material whose roots go with issued certificates.
    pub material: Arc<Material>,
    /// Revoked peers, which get nothing.
    pub revocations: Arc<Revocations>,
    /// Verification of Kubernetes' tokens, where they are accepted.
    pub pods: Option<Pods>,
    /// Counters.
    pub metrics: JoinMetrics,
    /// Clock for decisions.
    pub clock: Clock,
    /// Bound on concurrent jobs.
    pub jobs: Jobs,
}

/// Reason why there is no certificate.
#[derive(Debug, thiserror::Error)]
enum IssuerError {
    /// The rules refuse it.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// The peer is revoked.
    #[error(transparent)]
    Revoked(#[from] Revoked),
    /// The certificate request is invalid.
    #[error("the certificate request is invalid: {0}")]
    Csr(rcgen::Error),
    /// The token is of neither kind.
    #[error(transparent)]
    NoToken(#[from] super::token::TokenError),
    /// Kubernetes does not vouch for the token.
    #[error(transparent)]
    Review(#[from] ReviewError),
    /// Kubernetes does not report the addresses of the node.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A recorded certificate is invalid.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Kubernetes does not report the node of the pod.
    #[error(
        "the API server does not say to which node the token belongs: it has to be a pod's \
         (projected), and Kubernetes 1.32 or later"
    )]
    NoNode,
    /// The agent belongs to another tenant.
    #[error("the CA here is of {ours}; certificates of {theirs} come from elsewhere")]
    Domain {
        /// Trust domain of the CA.
        ours: String,
        /// Trust domain of the agent.
        theirs: String,
    },
    /// The file can't be used.
    #[error(transparent)]
    IssueLog(#[from] IssueLogError),
    /// The CA can't issue.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// No agent would trust a certificate of this CA.
    #[error(
        "the CA in join.ca is not among those of tls.ca, so no agent would trust what it issues: see \
         docs/joining.md, \"Another CA\""
    )]
    UnknownCa,
    /// The thread of the job failed.
    #[error("the request was given up: {0}")]
    GivenUp(JoinError),
}

impl From<JoinError> for IssuerError {
    fn from(why: JoinError) -> Self {
        Self::GivenUp(why)
    }
}

impl IssuerError {
    /// Whether the server is at fault. The requester learns nothing about such a fault.
    fn is_ours(&self) -> bool {
        let by_api = matches!(
            self,
            Self::Review(ReviewError::Unavailable(_)) | Self::Node(_)
        );
        let by_files = matches!(self, Self::IssueLog(_) | Self::Issue(_) | Self::Identity(_));
        by_api || by_files || matches!(self, Self::UnknownCa | Self::GivenUp(_))
    }

    /// Whether another node holds the name or address.
    fn is_taken(&self) -> bool {
        let taken =
            |it: &Refusal| matches!(it, Refusal::Taken { .. } | Refusal::AddressTaken { .. });
        matches!(self, Self::Refusal(refused) if taken(refused))
    }
}

/// An issued certificate, for the record.
struct Issuance {
    identity: String,
    serial: String,
    until: SystemTime,
    issued: Issued,
    /// Whether it was issued just now. Otherwise an earlier certificate was returned.
    is_new: bool,
}

/// A request without a certificate.
struct JoinRequest {
    node: String,
    addresses: Vec<IpAddr>,
    csr: Vec<u8>,
    proof: Proof,
}

/// Proof of the right to join.
enum Proof {
    /// A join token of this server.
    Token(Token),
    /// A token of Kubernetes.
    Pod {
        /// Unique id of the token.
        id: String,
        /// End of the token.
        expires: SystemTime,
    },
}

/// A certificate whose node no longer exists or has other addresses.
struct StaleHolder {
    serial: String,
    /// The free address; `None` for all.
    address: Option<IpAddr>,
}

impl Issuer {
    /// Answers a worker without a certificate. The file, the CA and Kubernetes may take their time.
    pub async fn join(self: &Arc<Self>, join: Join, remote: SocketAddr) -> Answer {
        let node = join.node.clone();
        let issuance = self.process_join(join).await;
        self.metrics.join(outcome(&issuance));
        match issuance {
            Ok((issuance, by)) => {
                if issuance.is_new {
                    tracing::info!(
                        agent = issuance.identity, %remote, token = by, serial = issuance.serial,
                        until = %humantime::format_rfc3339_seconds(issuance.until), "agent joined"
                    );
                } else {
                    tracing::debug!(
                        agent = issuance.identity, %remote, token = by, serial = issuance.serial,
                        "an agent got its certificate once more"
                    );
                }
                audit::joined(
                    &issuance.identity,
                    remote,
                    &by,
                    (&issuance.serial, issuance.until),
                );
                Ok(issuance.issued)
            }
            Err(error) => {
                audit::peer_refused(Listener::Join, remote, &error);
                Err(public_reason(&error, &node, Some(remote)))
            }
        }
    }

    /// Answers an agent that has a certificate, over its tunnel, whose handshake used `leaf`.
    pub async fn renew(
        self: &Arc<Self>,
        agent: Identity,
        leaf: Option<CertificateDer<'static>>,
        csr: Vec<u8>,
    ) -> Answer {
        let name = agent.name.clone();
        let serial = leaf.map(|leaf| serial_of(&leaf)).unwrap_or_default();
        let issuance = self
            .run_blocking(move |issuer| issuer.by_tunnel(&agent, &serial, &csr))
            .await;
        self.metrics.renewal(outcome(&issuance));
        match issuance {
            Ok(issuance) => {
                tracing::info!(
                    agent = issuance.identity, serial = issuance.serial,
                    until = %humantime::format_rfc3339_seconds(issuance.until), "certificate renewed"
                );
                audit::renewed(&issuance.identity, (&issuance.serial, issuance.until));
                Ok(issuance.issued)
            }
            Err(error) => Err(public_reason(&error, &name, None)),
        }
    }

    /// Records the settled time for the next start, at once and then periodically.
    pub async fn keep_time(self: Arc<Self>) {
        let mut tick = tokio::time::interval(TIME_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Err(error) = self.run_blocking(Self::note_time).await {
                tracing::warn!(
                    error = report(&error),
                    "the time is not on record: the next start compares its clock with an earlier one"
                );
            }
        }
    }

    fn note_time(&self) -> Result<(), IssuerError> {
        self.log.change(|records| {
            let settled = self.clock.read().settled;
            let since = settled.duration_since(SystemTime::UNIX_EPOCH);
            let seconds = since.unwrap_or_default().as_secs();
            records.settled = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
            Ok(())
        })
    }

    /// Runs a job on files and signatures, so that it blocks nothing else.
    async fn run_blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, IssuerError> + Send + 'static,
    ) -> Result<T, IssuerError> {
        let issuer = self.clone();
        self.jobs.run(move || work(&issuer)).await?
    }

    async fn process_join(self: &Arc<Self>, join: Join) -> Result<(Issuance, String), IssuerError> {
        let mut addresses: Vec<_> = { join.addresses.iter() }
            .map(IpAddr::to_canonical)
            .collect();
        addresses.sort();
        addresses.dedup();
        let proof = match (join.token.parse(), &self.pods) {
            (Ok(token), _) => Proof::Token(token),
            (Err(error), None) => return Err(error.into()),
            (Err(_), Some(pods)) => {
                self.verify_pod_token(pods, join.token.trim(), &join.node, &addresses)
                    .await?
            }
        };
        let join_request = Arc::new(JoinRequest {
            node: join.node,
            addresses,
            csr: join.csr,
            proof,
        });
        let request = join_request.clone();
        let first = self
            .run_blocking(move |issuer| issuer.admit(&request, &[]))
            .await;
        match (&first, &self.pods) {
            (Err(error), Some(pods)) if error.is_taken() => {
                let stale = self.stale_holders(pods, &join_request).await?;
                if stale.is_empty() {
                    return first;
                }
                self.run_blocking(move |issuer| issuer.admit(&join_request, &stale))
                    .await
            }
            _ => first,
        }
    }

    /// Returns the proof of a Kubernetes token: the node of its pod, whose addresses are checked.
    async fn verify_pod_token(
        &self,
        pods: &Pods,
        token: &str,
        node: &str,
        addresses: &[IpAddr],
    ) -> Result<Proof, IssuerError> {
        let account = pods.reviewer.review(token).await?;
        let of = account.node.ok_or(IssuerError::NoNode)?;
        if of != node {
            return Err(Refusal::Node {
                nodes: of,
                node: node.into(),
            }
            .into());
        }
        let known = pods.nodes.addresses(node).await?.unwrap_or_default();
        if let Some(address) = addresses.iter().find(|address| !known.contains(address)) {
            return Err(Refusal::NotOfNode {
                address: *address,
                node: node.into(),
            }
            .into());
        }
        Ok(Proof::Pod {
            id: account.credential.unwrap_or_else(|| fingerprint(token)),
            expires: claims::good_until(token, self.clock.read().now, LONGEST_POD_TOKEN),
        })
    }

    /// Returns the certificates that hold a name or address of `join_request` and whose nodes no longer
    /// exist or have other addresses. Only nodes that joined by Kubernetes are considered.
    async fn stale_holders(
        self: &Arc<Self>,
        pods: &Pods,
        join_request: &Arc<JoinRequest>,
    ) -> Result<Vec<StaleHolder>, IssuerError> {
        let request = join_request.clone();
        let held = self
            .run_blocking(move |issuer| issuer.conflicting_holders(&request))
            .await?;
        let mut stale = Vec::new();
        for (node, holder) in held.into_iter().take(MAX_LOOKUPS) {
            let known = match pods.nodes.addresses(&node).await {
                Ok(known) => known,
                Err(error) => {
                    tracing::warn!(
                        error = report(&error),
                        "the node can't be looked up: its name and addresses stay reserved"
                    );
                    continue;
                }
            };
            let serial = holder.serial;
            let Some(known) = known else {
                let address = None;
                stale.push(StaleHolder { serial, address });
                continue;
            };
            let has = |address: &&IpAddr| holder.addresses.contains(address);
            let moved = join_request.addresses.iter().filter(has);
            stale.extend(
                moved
                    .filter(|it| !known.contains(it))
                    .map(|address| StaleHolder {
                        serial: serial.clone(),
                        address: Some(*address),
                    }),
            );
        }
        Ok(stale)
    }

    fn conflicting_holders(
        &self,
        join_request: &JoinRequest,
    ) -> Result<Vec<(String, Holder)>, IssuerError> {
        let key = SigningRequest::read(&join_request.csr)
            .map_err(IssuerError::Csr)?
            .key();
        let (key, time) = (key.to_string(), self.clock.read());
        let records = self.log.read()?;
        let is_in_the_way = |node: &str, holder: &Holder| match node == join_request.node {
            true => holder.key != key && records.holds_name(holder, time),
            false => {
                { join_request.addresses.iter() }.any(|it| records.holds_address(holder, it, time))
            }
        };
        let held = records
            .holders()
            .filter(|(node, holder)| holder.token == BY_KUBERNETES && is_in_the_way(node, holder));
        Ok(held
            .map(|(node, holder)| (node.to_owned(), holder.clone()))
            .collect())
    }

    fn admit(
        &self,
        join_request: &JoinRequest,
        stale: &[StaleHolder],
    ) -> Result<(Issuance, String), IssuerError> {
        let csr = SigningRequest::read(&join_request.csr).map_err(IssuerError::Csr)?;
        let (node, addresses) = (&join_request.node, &join_request.addresses);
        let request = AdmitRequest {
            node,
            addresses,
            key: csr.key(),
        };
        let by = match &join_request.proof {
            Proof::Token(token) => token.id(),
            Proof::Pod { .. } => BY_KUBERNETES,
        };
        // Who has no token does not get to the lock, which all others wait for.
        if let Proof::Token(token) = &join_request.proof {
            let records = self.log.read()?;
            let known = records.ticket(token, self.clock.read().now);
            known.ok_or(Refusal::Token)?;
        }
        self.change(|records, time| {
            for stale in stale {
                match stale.address {
                    Some(address) => records.release_address(&stale.serial, address),
                    None => records.release(&stale.serial),
                }
            }
            let admitted = match &join_request.proof {
                Proof::Token(token) => records.by_token(token, &request, time)?,
                Proof::Pod { id, .. } => {
                    let allowed = self.pods.as_ref().map(|pods| &pods.addresses[..]);
                    records.by_pod(id, allowed.unwrap_or_default(), &request, time)?
                }
            };
            if let Admitted::Existing(leaf) = &admitted {
                let leaf = CertificateDer::from(&leaf[..]);
                return Ok((self.issued_before(&leaf)?, by.to_owned()));
            }
            let (issuance, holder) = self.issue(node, addresses, &csr, (by, time.now))?;
            let got = Use {
                node: node.clone(),
                key: holder.key.clone(),
                addresses: addresses.clone(),
                serial: holder.serial.clone(),
                certificate: STANDARD.encode(&issuance.issued.chain[0]),
            };
            match &join_request.proof {
                Proof::Token(token) if admitted == Admitted::Redated => records.redated(token, got),
                Proof::Token(token) => records.used(token, got),
                Proof::Pod { id, expires } => {
                    let expires = (*expires).max(time.now);
                    let ticket = PodTicket { expires, used: got };
                    records.pods.insert(id.clone(), ticket);
                }
            }
            records.joined(node, holder, time);
            Ok((issuance, by.to_owned()))
        })
    }

    fn by_tunnel(
        &self,
        agent: &Identity,
        serial: &str,
        csr: &[u8],
    ) -> Result<Issuance, IssuerError> {
        self.revocations.check(&Peer::issued(agent.uri(), serial))?;
        let csr = SigningRequest::read(csr).map_err(IssuerError::Csr)?;
        self.change(|records, time| {
            records.renewal(&agent.name, serial, self.validity, time)?;
            let ours = self.authority()?;
            if *ours.trust_domain() != agent.trust_domain {
                return Err(IssuerError::Domain {
                    ours: ours.trust_domain().to_string(),
                    theirs: agent.trust_domain.to_string(),
                });
            }
            let last = || records.issued.get(&*agent.name)?.last();
            let by = records.by_serial(serial).map(|(_, holder)| holder);
            let by = by.or_else(last);
            let by = by.map_or_else(|| "elsewhere".into(), |holder| holder.token.clone());
            let addresses = records.still_of(&agent.name, &agent.addresses, time);
            let (issuance, holder) = self.issue(&agent.name, &addresses, &csr, (&by, time.now))?;
            records.record(&agent.name, holder);
            Ok(issuance)
        })
    }

    /// Changes the file. Revoked certificates hold no name and no address there.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut IssueRecords, Time) -> Result<T, IssuerError>,
    ) -> Result<T, IssuerError> {
        self.log.change(|records| {
            let time = self.clock.read();
            records.by_hand = IssueLog::of_ca(&self.ca).read()?.issued;
            let domain = &self.material.identity().trust_domain;
            let is_revoked = |node: &str, holder: &Holder| {
                let uri = identity::uri(domain, Role::Agent, node);
                let peer = Peer::issued(uri, &holder.serial);
                self.revocations.check(&peer).is_err()
            };
            let revoked = records
                .holders()
                .filter(|(node, holder)| is_revoked(node, holder));
            let revoked: Vec<_> = revoked.map(|(_, holder)| holder.serial.clone()).collect();
            revoked.iter().for_each(|serial| records.release(serial));
            let issuance = change(records, time)?;
            if time.is_steady {
                records.forget(time.settled);
            }
            Ok(issuance)
        })
    }

    fn issued_before(&self, leaf: &CertificateDer<'_>) -> Result<Issuance, IssuerError> {
        self.revocations.check(&Peer::of(leaf))?;
        let (_, until) = validity(leaf).unwrap_or((SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH));
        Ok(Issuance {
            identity: Identity::from_certificate(leaf)?.uri(),
            serial: serial_of(leaf),
            until,
            issued: self.with_roots(leaf),
            is_new: false,
        })
    }

    fn with_roots(&self, leaf: &CertificateDer<'_>) -> Issued {
        let roots = self.material.roots();
        Issued {
            chain: vec![leaf.to_vec()],
            roots: roots.iter().map(|root| root.to_vec()).collect(),
        }
    }

    fn authority(&self) -> Result<Authority, IssueError> {
        Authority::open(&self.ca)
    }

    fn issue(
        &self,
        node: &str,
        addresses: &[IpAddr],
        csr: &SigningRequest,
        (by, now): (&str, SystemTime),
    ) -> Result<(Issuance, Holder), IssuerError> {
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
            return Err(IssuerError::UnknownCa);
        }
        let leaf = authority.certify(&request, csr)?;
        let serial = serial_of(&leaf);
        let holder = Holder {
            addresses: addresses.to_vec(),
            key: csr.key().to_string(),
            serial: serial.clone(),
            since: now,
            until,
            token: by.into(),
        };
        let issuance = Issuance {
            identity,
            serial,
            until,
            issued: self.with_roots(&leaf),
            is_new: true,
        };
        Ok((issuance, holder))
    }
}

fn outcome<T>(issuance: &Result<T, IssuerError>) -> Outcome {
    match issuance {
        Ok(_) => Outcome::Issued,
        Err(error) if error.is_ours() => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}

/// Logs the error, and returns the reason for the worker. The log alone has Kubernetes' answer
/// about a token.
fn public_reason(error: &IssuerError, node: &str, remote: Option<SocketAddr>) -> String {
    let remote = remote.map(tracing::field::display);
    if error.is_ours() {
        tracing::error!(
            error = report(error),
            node,
            remote,
            "no certificate could be issued"
        );
        return "the server could not issue a certificate; its log says why".into();
    }
    tracing::warn!(error = report(error), node, remote, "no certificate issued");
    match error {
        IssuerError::Review(_) => {
            "the token of Kubernetes is not valid here: its audience, its service account \
                                 and its end count; the server's log says why"
                .into()
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
