use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};

use super::*;
use crate::provider;
use crate::testing::{Ca, DAY, below, ca_params, cross, leaf, root};

fn with(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    // As `cpc pki init` makes them.
    let mut params = ca_params("CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    change(&mut params);
    params
}

fn ours() -> CertificateParams {
    with(|_| ())
}

/// Whether each of `offered` counts where `present` is trusted.
fn judged(present: &[&Ca], offered: &[&CertificateDer<'static>]) -> Vec<bool> {
    let present = present.iter().map(|ca| ca.der().clone()).collect();
    let present = Anchors::new(present).unwrap();
    let all = offered.iter().map(|&it| it.clone()).collect();
    let algorithms = provider().signature_verification_algorithms;
    let domain = "c".parse().unwrap();
    let judged = judge(all, &present, &domain, SystemTime::now(), &algorithms).unwrap();
    assert_eq!(
        judged.accepted.iter().count() + judged.refused.len(),
        offered.len()
    );
    let counts = |it: &&CertificateDer<'_>| judged.accepted.contains(it);
    offered.iter().map(counts).collect()
}

/// The key of a server, without that of a CA, proves no other CA.
#[test]
fn what_nobody_vouches_for_does_not_count() {
    let (old, new) = (root(ours()), root(ours()));
    assert_eq!(judged(&[&old], &[old.der()]), [true]);
    assert_eq!(judged(&[&old], &[new.der()]), [false]);
    assert_eq!(judged(&[&old], &[old.der(), new.der()]), [true, false]);
    // One that only looks as if, and one that is signed by a leaf's key.
    let fake = cross(&new, &root(ours()), &ours());
    assert_eq!(judged(&[&old], &[&fake, new.der()]), [false, false]);
    let server = Ca::signed_by(
        with(|it| it.is_ca = IsCa::NoCa),
        KeyPair::generate().unwrap(),
        &old,
    );
    let server = server.unwrap();
    let by_server = cross(&server, &new, &ours());
    assert_eq!(judged(&[&old], &[&by_server, new.der()]), [false, false]);
    // The name and key of a CA that counts, in a certificate that others made.
    let forged = with(|it| it.not_after = (SystemTime::now() + 99 * DAY).into());
    let forged = forged.signed_by(old.key(), &new).unwrap();
    assert_eq!(judged(&[&old], &[forged.der()]), [false]);
}

#[test]
fn a_ca_vouches_for_the_next() {
    let (old, new, third) = (root(ours()), root(ours()), root(ours()));
    let bridge = cross(&old, &new, &ours());
    let further = cross(&new, &third, &ours());
    let all = [old.der(), new.der(), &bridge];
    assert_eq!(judged(&[&old], &all), [true; 3]);
    // In whatever order, also when the old one is gone already.
    assert_eq!(judged(&[&old], &[new.der(), &bridge]), [true; 2]);
    assert_eq!(judged(&[&old], &[&bridge]), [true]);
    let both = [third.der(), &further, new.der(), &bridge];
    assert_eq!(judged(&[&old], &both), [true; 4]);
    assert_eq!(judged(&[&old], &[third.der(), &further]), [false; 2]);
    // The old one's certificate with a later end, by its own key.
    let longer = with(|it| it.not_after = (SystemTime::now() + 99 * DAY).into());
    let longer = longer.self_signed(old.key()).unwrap();
    assert_eq!(judged(&[&old], &[longer.der()]), [true]);
}

#[test]
fn a_ca_vouches_within_its_bounds() {
    let (old, new) = (root(ours()), root(ours()));
    // No CA below it, unless that is its own next key.
    let child = below(
        &old,
        with(|it| {
            it.distinguished_name
                .push(rcgen::DnType::CommonName, "other")
        }),
    );
    assert_eq!(judged(&[&old], &[child.der()]), [false]);
    let free = root(ca_params("CA"));
    let child = below(&free, ca_params("child"));
    assert_eq!(judged(&[&free], &[child.der()]), [true]);
    // Of the same trust domain.
    let names = |domain: &str| vec![SanType::URI(domain.try_into().unwrap())];
    let foreign = with(|it| it.subject_alt_names = names("spiffe://d"));
    let bridge = cross(&old, &new, &foreign);
    assert_eq!(judged(&[&old], &[&bridge]), [false]);
    // As long as both are valid.
    let past = with(|it| it.not_after = (SystemTime::now() - DAY / 2).into());
    assert_eq!(judged(&[&old], &[&cross(&old, &new, &past)]), [false]);
    let expired = root(past);
    let bridge = cross(&expired, &new, &ours());
    assert_eq!(judged(&[&expired], &[&bridge, new.der()]), [false; 2]);
    // No leaf, and no key that is for something else.
    let algorithms = provider().signature_verification_algorithms;
    let present = Anchors::new(vec![old.der().clone()]).unwrap();
    let other_use = with(|it| it.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    for wrong in [leaf(&old), cross(&old, &new, &other_use)] {
        let domain = "c".parse().unwrap();
        let judged = judge(
            vec![wrong],
            &present,
            &domain,
            SystemTime::now(),
            &algorithms,
        );
        assert!(judged.is_err());
    }
}
