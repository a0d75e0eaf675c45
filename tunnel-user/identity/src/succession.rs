//! CAs that a server may introduce: the trusted ones, and those that they vouch for.
//!
//! A server shows its certificate, not the key of the CA. So an offered CA counts only when a trusted
//! CA has signed it: the certificate itself, or another one of the same name and key (RFC 4210 section
//! 4.4, "new with old"). `cpc pki cross-sign` makes such a certificate.

use std::time::SystemTime;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::anchors::{Anchor, AnchorError, Anchors};
use super::identity::TrustDomain;

/// Verdicts about the CAs that a server offers.
#[derive(Debug)]
pub struct Succession {
    /// CAs that count, possibly none.
    pub accepted: Anchors,
    /// CAs that don't count, with the reason.
    pub refused: Vec<(Anchor, Reason)>,
}

/// Reason why an offered CA does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// No trusted CA vouches for it.
    #[error("no CA that is trusted here has signed it; `cpc pki cross-sign` does that")]
    Unvouched,
    /// The CA belongs to another tenant.
    #[error("it is of another trust domain")]
    Domain,
    /// The CA has expired or is not valid yet.
    #[error("it is not valid now")]
    Time,
}

/// Judges the CAs in `offered` by those in `present`, for the trust domain `domain`.
///
/// # Errors
/// [`AnchorError`]: an offered certificate is not a CA's.
pub fn judge(
    offered: Vec<CertificateDer<'static>>,
    present: &Anchors,
    domain: &TrustDomain,
    now: SystemTime,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<Succession, AnchorError> {
    let offered = Anchors::new(offered)?;
    let mut open: Vec<_> = offered.iter().collect();
    let mut trusted: Vec<_> = present.iter().filter(|it| is_valid(it, now)).collect();
    let mut refused = Vec::new();
    open.retain(|it| {
        let why = if present.contains(it.certificate()) {
            return true;
        } else if !it.is_of(domain) {
            Reason::Domain
        } else if !is_valid(it, now) {
            Reason::Time
        } else {
            return true;
        };
        refused.push(((*it).clone(), why));
        false
    });
    // One that is accepted may vouch for the next.
    while let Some(at) = open.iter().position(|it| {
        present.contains(it.certificate())
            || trusted.iter().any(|ca| vouches(ca, it, algorithms))
            || trusted.iter().any(|ca| is_twin(ca, it, algorithms))
    }) {
        trusted.push(open.remove(at));
    }
    refused.extend(open.into_iter().map(|it| (it.clone(), Reason::Unvouched)));
    // In the order in which they were offered.
    let is_refused = |it: &&Anchor| {
        let mut refused = refused.iter();
        refused.any(|(other, _)| other.certificate() == it.certificate())
    };
    let accepted = offered.iter().filter(|it| !is_refused(it));
    let accepted = accepted.map(|it| it.certificate().clone()).collect();
    Ok(Succession {
        accepted: Anchors::new(accepted)?,
        refused,
    })
}

fn is_valid(anchor: &Anchor, now: SystemTime) -> bool {
    let (from, until) = anchor.validity();
    from <= now && now <= until
}

/// Whether `ca` has signed the certificate of the CA `other`, and may.
fn vouches(ca: &Anchor, other: &Anchor, algorithms: &WebPkiSupportedAlgorithms) -> bool {
    let is_own_next_key = ca.subject_der() == other.subject_der();
    let may = match ca.path_length() {
        None => true,
        // Its own next key is no CA below it (RFC 5280 section 6.1.4).
        Some(max) => is_own_next_key || other.path_length().is_some_and(|below| below < max),
    };
    let keeps_constraints =
        ca.name_constraints().is_none() || ca.name_constraints() == other.name_constraints();
    may && keeps_constraints && has_signed(ca, other, algorithms)
}

/// Whether `other` is self-signed, and has the name and key of `ca`.
fn is_twin(ca: &Anchor, other: &Anchor, algorithms: &WebPkiSupportedAlgorithms) -> bool {
    ca.trust() == other.trust() && has_signed(other, other, algorithms)
}

fn has_signed(ca: &Anchor, other: &Anchor, algorithms: &WebPkiSupportedAlgorithms) -> bool {
    let Ok((_, read)) = X509Certificate::from_der(other.certificate()) else {
        return false;
    };
    let Ok(issuer) = EndEntityCert::try_from(ca.certificate()) else {
        return false;
    };
    let (message, signature) = (read.tbs_certificate.as_ref(), &read.signature_value.data);
    let is_named = read.issuer().as_raw() == ca.subject_der();
    let mut algorithms = algorithms.all.iter();
    is_named && algorithms.any(|it| issuer.verify_signature(*it, message, signature).is_ok())
}

#[cfg(test)]
mod tests;
