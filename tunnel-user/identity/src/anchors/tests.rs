use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};

use super::*;
use crate::provider;
use crate::testing::{DAY, below, ca_params, cross, leaf, leaf_params, root};

fn verify_at(
    anchors: &[&CertificateDer<'static>],
    chain: &[&CertificateDer<'static>],
    now: SystemTime,
) -> Result<(), String> {
    let anchors = anchors.iter().map(|&it| it.clone()).collect();
    let anchors = Anchors::new(anchors).map_err(|error| error.to_string())?;
    let between: Vec<_> = chain[1..].iter().map(|&it| it.clone()).collect();
    let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    let algorithms = provider().signature_verification_algorithms;
    let when = (now, KeyUsage::client_auth());
    let verified = anchors.verify(chain[0], &between, when, &algorithms);
    verified.map_err(|error| error.to_string())
}

fn verify(
    anchors: &[&CertificateDer<'static>],
    chain: &[&CertificateDer<'static>],
) -> Result<(), String> {
    verify_at(anchors, chain, SystemTime::now())
}

fn with(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = ca_params("CA");
    change(&mut params);
    params
}

/// Otherwise the key of a leaf in a `ca` file could issue certificates.
#[test]
fn only_a_ca_is_an_anchor() {
    let ca = root(ca_params("CA"));
    assert_eq!(verify(&[ca.der()], &[&leaf(&ca)]), Ok(()));
    // Only that it may sign nothing is said of it, where that is said.
    let bare = root(with(|it| it.key_usages.clear()));
    assert_eq!(verify(&[bare.der()], &[&leaf(&bare)]), Ok(()));

    let explicit = root(with(|it| it.is_ca = IsCa::ExplicitNoCa));
    let silent = root(with(|it| it.is_ca = IsCa::NoCa));
    let other_use = root(with(|it| it.key_usages = vec![KeyUsagePurpose::CrlSign]));
    let key = KeyPair::generate().unwrap();
    let issued = leaf_params().signed_by(&key, &ca).unwrap();
    for (anchor, why) in [
        (explicit.der(), "CA:FALSE"),
        (silent.der(), "no basic constraints"),
        (other_use.der(), "keyCertSign"),
        (issued.der(), "no basic constraints"),
    ] {
        let error = verify(&[ca.der(), anchor], &[&leaf(&ca)]).unwrap_err();
        assert!(error.contains("certificate 2 of 2"), "{error}");
        assert!(error.contains(why), "{error}");
    }
    let garbage = CertificateDer::from(vec![0x30, 0]);
    let error = verify(&[&garbage], &[&leaf(&ca)]).unwrap_err();
    assert!(
        error.contains("certificate 1 of 1 can't be read"),
        "{error}"
    );
}

#[test]
fn a_ca_vouches_while_it_is_valid() {
    let ca = root(ca_params("CA"));
    let mut params = leaf_params();
    params.not_before = (SystemTime::now() - 100 * DAY).into();
    params.not_after = (SystemTime::now() + 100 * DAY).into();
    let leaf = params
        .signed_by(&KeyPair::generate().unwrap(), &ca)
        .unwrap();
    let at = |now| verify_at(&[ca.der()], &[leaf.der()], now);
    let now = SystemTime::now();
    assert_eq!(at(now), Ok(()));
    let error = at(now + 20 * DAY).unwrap_err();
    assert!(error.contains("CN=CA has expired at"), "{error}");
    let error = at(now - 20 * DAY).unwrap_err();
    assert!(error.contains("is not valid before"), "{error}");
    let anchors = Anchors::new(vec![ca.der().clone()]).unwrap();
    assert!(anchors.any_valid(now));
    assert!(!anchors.any_valid(now + 20 * DAY));

    // Of two certificates of one CA the one that is valid counts.
    let longer = with(|it| it.not_after = (now + 50 * DAY).into());
    let longer = longer.self_signed(ca.key()).unwrap();
    let both = [ca.der(), longer.der()];
    assert_eq!(verify_at(&both, &[leaf.der()], now + 20 * DAY), Ok(()));
}

#[test]
fn a_path_is_no_longer_than_its_anchor_allows() {
    let bounded = |max| with(|it| it.is_ca = IsCa::Ca(BasicConstraints::Constrained(max)));
    for (max, direct, one, two) in [(0, true, false, false), (1, true, true, false)] {
        let ca = root(bounded(max));
        let first = below(&ca, ca_params("first"));
        let second = below(&first, ca_params("second"));
        let chains = [
            (vec![leaf(&ca)], direct),
            (vec![leaf(&first), first.der().clone()], one),
            (
                vec![leaf(&second), second.der().clone(), first.der().clone()],
                two,
            ),
        ];
        for (chain, good) in chains {
            let chain: Vec<_> = chain.iter().collect();
            let verified = verify(&[ca.der()], &chain);
            assert_eq!(
                verified.is_ok(),
                good,
                "{max}, {}: {verified:?}",
                chain.len()
            );
            if let Err(error) = verified {
                assert!(
                    error.contains(&format!("allows {max} CAs below")),
                    "{error}"
                );
            }
        }
    }
    // A CA's next key is no CA below it.
    let (old, new) = (root(bounded(0)), root(bounded(0)));
    let bridge = cross(&old, &new, &bounded(0));
    assert_eq!(verify(&[old.der()], &[&leaf(&new), &bridge]), Ok(()));
}

#[test]
fn a_certificate_between_is_a_cas() {
    let ca = root(ca_params("CA"));
    let other_use = with(|it| it.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    let between = below(&ca, other_use);
    let chain = [&leaf(&between), between.der()];
    let error = verify(&[ca.der()], &chain).unwrap_err();
    assert!(error.contains("keyCertSign"), "{error}");
    let between = below(&ca, with(|it| it.is_ca = IsCa::ExplicitNoCa));
    assert!(verify(&[ca.der()], &[&leaf(&between), between.der()]).is_err());
}

#[test]
fn strangers_are_unknown() {
    let (ca, other) = (root(ca_params("CA")), root(ca_params("other")));
    let error = verify(&[ca.der()], &[&leaf(&other)]).unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
    let server = KeyUsage::server_auth();
    let anchors = Anchors::new(vec![ca.der().clone()]).unwrap();
    let algorithms = provider().signature_verification_algorithms;
    let when = (UnixTime::now(), server);
    let error = anchors
        .verify(&leaf(&ca), &[], when, &algorithms)
        .unwrap_err();
    assert!(error.to_string().contains("extended key usage"), "{error}");
    let error = verify(&[ca.der()], &[ca.der()]).unwrap_err();
    assert!(error.contains("is that of a CA"), "{error}");
}
