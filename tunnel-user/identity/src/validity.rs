//! The validity of a certificate.

use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Returns the first and the last moment of validity of a certificate.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_, read) = X509Certificate::from_der(certificate).ok()?;
    let validity = read.validity();
    let time = |at: x509_parser::time::ASN1Time| SystemTime::from(at.to_datetime());
    Some((time(validity.not_before), time(validity.not_after)))
}
