//! CAs and leaves of every kind, for tests.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;

/// A CA and its key.
pub(crate) type Ca = CertifiedIssuer<'static, KeyPair>;

pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// Returns the parameters of a CA: named `name`, of the trust domain `c`, valid from yesterday for
/// ten days.
pub(crate) fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.subject_alt_names = vec![SanType::URI("spiffe://c".try_into().unwrap())];
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = (SystemTime::now() + 9 * DAY).into();
    params
}

/// Returns a CA that signs itself.
pub(crate) fn root(params: CertificateParams) -> Ca {
    Ca::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Returns a CA that `issuer` signs.
pub(crate) fn below(issuer: &Ca, params: CertificateParams) -> Ca {
    Ca::signed_by(params, KeyPair::generate().unwrap(), issuer).unwrap()
}

/// Returns `ca`, signed by `issuer`.
pub(crate) fn cross(issuer: &Ca, ca: &Ca, params: &CertificateParams) -> CertificateDer<'static> {
    params.signed_by(ca.key(), issuer).unwrap().der().clone()
}

/// Returns the parameters of a leaf: of the agent `w1`, valid from yesterday for ten days.
pub(crate) fn leaf_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://c/agent/w1".try_into().unwrap())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = (SystemTime::now() + 9 * DAY).into();
    params
}

/// Returns a leaf of the agent `w1`.
pub(crate) fn leaf(issuer: &Issuer<'_, KeyPair>) -> CertificateDer<'static> {
    let key = KeyPair::generate().unwrap();
    leaf_params().signed_by(&key, issuer).unwrap().der().clone()
}
